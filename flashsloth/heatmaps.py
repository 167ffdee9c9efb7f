"""Where a model looks: weights of the pooling windows, and attention of the embedded queries to the vision tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.modules import SpatialAttentionPool
from flashsloth_ops import embedded_query_attention, spatial_attention_pool


class Seen(NamedTuple):
    """What the embedded-query module was given in a forward pass: ``(B, Q, Dm)``, ``(B, T, Dm)``, ``(Bi, N, Di)``."""

    query: Tensor
    text: Tensor
    lengths: Tensor
    image: Tensor


@contextmanager
def watching(model: FlashSlothForConditionalGeneration) -> Iterator[list[Seen]]:
    """Collects the inputs of the embedded-query module while the model runs."""
    seen: list[Seen] = []
    handle = model.embedded_query.register_forward_pre_hook(lambda _, given: seen.append(Seen(*given[:4])))
    try:
        yield seen
    finally:
        handle.remove()


def pooling_weights(model: FlashSlothForConditionalGeneration, features: Tensor) -> Tensor:
    """Weights ``(tiles, H*W)`` of the tower's output ``(tiles, H*W, Di)``, summing to one in each window.

    Raises:
        ValueError: a model that pools without attention.
    """
    if not isinstance(model.pooling, SpatialAttentionPool):
        raise ValueError(f"model: expected pooling by attention, got {model.config.pooling!r}")
    hidden, score = (model.pooling.mlp[key] for key in ("0", "3"))
    params: Any = (hidden.weight, hidden.bias, score.weight, score.bias)
    grid, window = model.config.vision_grid, model.config.pool_window
    _, weights = spatial_attention_pool(features, *params, grid=grid, window=window, return_weights=True)
    return weights


def query_attention(model: FlashSlothForConditionalGeneration, seen: Seen) -> Tensor:
    """Attention ``(B, Q, N)`` of the embedded queries to the image, averaged over heads."""
    params, heads = model.embedded_query.params(), model.config.query_heads
    _, attention = embedded_query_attention(
        seen.query, seen.text, seen.image, params, num_heads=heads, text_lengths=seen.lengths, return_weights=True
    )
    return attention
