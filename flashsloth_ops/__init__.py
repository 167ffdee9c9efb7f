"""Fused ops for FlashSloth: spatial attention pooling, embedded-query attention, token-sparse prefill."""

from flashsloth_ops.backend import BackendError, use_backend
from flashsloth_ops.embedded_query import EmbeddedQueryParams, ImageState, embedded_query_attention
from flashsloth_ops.sparse_prefill import token_sparse_prefill
from flashsloth_ops.spatial_pool import spatial_attention_pool
from flashsloth_ops.token_index import TokenIndex

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "EmbeddedQueryParams",
    "ImageState",
    "TokenIndex",
    "embedded_query_attention",
    "spatial_attention_pool",
    "token_sparse_prefill",
    "use_backend",
]
