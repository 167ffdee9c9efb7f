"""``attn_implementation="flashsloth"``: token-sparse prefill as the attention of any transformers model.

The mask function turns padding and cache offsets into the two token indices of the op, once a forward pass; the
attention function hands them to it in every layer. Padded rows are skipped, not masked. What the op cannot serve
(a pattern that is not causal or full, dropout) falls back to SDPA with a warning; what SDPA cannot serve either raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.utils import logging

from flashsloth_ops import TokenIndex, token_sparse_prefill

ATTENTION = "flashsloth"
# transformers takes every name with "flash" in it for the package flash-attn and tries to import that, so the functions
# are registered under another, and our configuration translates. Other models of transformers use this one.
REGISTERED_NAME = "token_sparse"
logger = logging.get_logger(__name__)


class KeptTokens(NamedTuple):
    """What takes part: the mask of this attention.

    Attributes:
        query, key: indices of the rows that are no padding, positions counted from the start of the cache.
        keep: bool ``(B, keys)``, the keys that are no padding.
        first: position of the first query row, an int or an int tensor.
        causal: whether a row sees only what is not behind it.
    """

    query: TokenIndex
    key: TokenIndex
    keep: Tensor
    first: int | Tensor
    causal: bool

    def dense(self, queries: int) -> Tensor:
        """The same mask as bool ``(B, 1, queries, keys)``, for SDPA."""
        keys = torch.arange(self.keep.shape[1], device=self.keep.device)
        rows = torch.arange(queries, device=self.keep.device)[:, None] + self.first
        seen = keys <= rows if self.causal else keys >= 0
        return (seen & self.keep[:, None, :]).unsqueeze(1).expand(-1, 1, queries, -1)


def flashsloth_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> KeptTokens | Tensor | None:
    """The mask of one forward pass: None where nothing is padded, else :class:`KeptTokens`.

    ``attention_mask`` is bool ``(B, tokens)``; tokens it does not reach are dropped. ``q_offset`` is an int, or an int
    tensor with a static cache. A pattern that is neither causal nor full gives SDPA's mask, and a warning.
    """
    plain = mask_function in (causal_mask_function, bidirectional_mask_function) and local_size is None
    if not plain or kv_offset:
        logger.warning_once(
            f"attn_implementation={ATTENTION!r}: expected causal or full attention without a window, got another "
            "pattern; SDPA runs instead"
        )
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            device=device,
            **kwargs,
        )
    causal = mask_function is causal_mask_function
    if attention_mask is None:
        # The op aligns the last query with the last key, which is right unless a cache has room behind.
        if not causal or (isinstance(q_offset, int) and q_offset + q_length == kv_length):
            return None
        keep = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        keep = attention_mask.bool()
        missing = kv_length - keep.shape[1]
        keep = nn.functional.pad(keep, (0, missing)) if missing > 0 else keep[:, :kv_length]
    rows = torch.arange(q_length, device=keep.device) + q_offset
    kept_rows = keep.index_select(1, rows) if causal else keep.new_ones(batch_size, q_length)
    query = TokenIndex.from_mask(kept_rows).shifted(q_offset)
    return KeptTokens(query, TokenIndex.from_mask(keep), keep, q_offset, causal)


def flashsloth_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: KeptTokens | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query ``(B, Hq, L, d)``, key and value ``(B, Hkv, S, d)`` -> ``(B, L, Hq, d)``, and no weights.

    With ``packed_index``, a :class:`TokenIndex` of packed sequences, B is 1, and the mask is not read.
    """
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with attn_implementation={ATTENTION!r}, got a value")
    if kwargs.get("output_attentions"):
        logger.warning_once(f"attn_implementation={ATTENTION!r} keeps no attention weights; use 'eager' for them")
    packed: TokenIndex | None = kwargs.get("packed_index")
    if packed is not None:
        if dropout:
            raise ValueError(f"attention_dropout: expected 0 with packed sequences, got {dropout}")
        q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
        out = token_sparse_prefill(q, k, v, packed, scale=scaling)
        assert isinstance(out, Tensor)
        return out[None], None
    if dropout:
        logger.warning_once(
            f"attn_implementation={ATTENTION!r}: expected no attention dropout, got {dropout}; SDPA runs instead"
        )
    if dropout or isinstance(attention_mask, Tensor):
        if isinstance(attention_mask, KeptTokens):
            attention_mask = attention_mask.dense(query.shape[2])
        elif attention_mask is not None:
            logger.warning_once(f"attn_implementation={ATTENTION!r}: got a dense mask; SDPA runs instead")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if attention_mask is None:
        index = None
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    else:
        index, causal = (attention_mask.query, attention_mask.key), attention_mask.causal
    out = token_sparse_prefill(query, key, value, index, causal=causal, scale=scaling)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def padding_for_cache(attention_mask: Tensor | None, past_key_values: Any) -> Tensor | None:
    """The padding mask ``(B, tokens)`` filled to the length of a static cache, so that its shape stays."""
    if attention_mask is None or attention_mask.dim() != 2:
        return attention_mask
    length = max(past_key_values.layers[0].max_cache_len, attention_mask.shape[1])
    return nn.functional.pad(attention_mask, (0, length - attention_mask.shape[1]))


def registered_name(implementation: Any) -> Any:
    """What transformers is told for an ``attn_implementation``: a name, None, or a dict of them by part of a model."""
    if isinstance(implementation, dict):
        return {part: registered_name(name) for part, name in implementation.items()}
    return REGISTERED_NAME if implementation == ATTENTION else implementation


def register_attention() -> None:
    """Register the attention and, since without one there would be no mask at all, its mask function."""
    AttentionInterface.register(REGISTERED_NAME, flashsloth_attention)
    AttentionMaskInterface.register(REGISTERED_NAME, flashsloth_mask)
