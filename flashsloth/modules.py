"""The parts FlashSloth adds: pooling, projector, embedded queries. Each runs one fused op or two plain layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashsloth.config import FlashSlothConfig
from flashsloth_ops import EmbeddedQueryParams, ImageState, embedded_query_attention, spatial_attention_pool


class PlainLinear(nn.Linear):
    """A linear layer that starts as torch starts it; the others start from ``initializer_range``."""


class SpatialAttentionPool(nn.Module):
    """Compress a grid of vision tokens by attention within windows (paper, "SAP")."""

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__()
        width = config.vision_config.hidden_size
        self.grid, self.window, self.dropout = config.vision_grid, config.pool_window, config.pool_dropout
        # Keys as in the released weights, where 1 and 2 are the activation and the dropout.
        self.mlp = nn.ModuleDict({"0": PlainLinear(width, width), "3": PlainLinear(width, 1)})

    def forward(self, features: Tensor) -> Tensor:
        """``(tiles, H*W, Di)`` -> ``(tiles, windows, Di)``."""
        hidden, score = (self.mlp[key] for key in ("0", "3"))
        weights: Any = (hidden.weight, hidden.bias, score.weight, score.bias)
        pooled = spatial_attention_pool(
            features,
            *weights,
            grid=self.grid,
            window=self.window,
            dropout_p=self.dropout,
            training=self.training,
        )
        assert isinstance(pooled, Tensor)
        return pooled


class PlainPool(nn.Module):
    """What attention pooling is compared with: average or pixel shuffle of each window, or every token as it is."""

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__()
        self.kind, self.grid, self.window = config.pooling, config.vision_grid, config.pool_window

    def forward(self, features: Tensor) -> Tensor:
        """``(tiles, H*W, Di)`` -> ``(tiles, windows, Di)``; pixel shuffle gives ``window * window * Di``."""
        if self.kind == "none":
            return features
        tiles, _, width = features.shape
        (rows, columns), window = self.grid, self.window
        if self.kind == "average":
            image = features.view(tiles, rows, columns, width).permute(0, 3, 1, 2)
            # ceil_mode: windows at the edge are smaller, as in attention pooling, and averages of what they have.
            return nn.functional.avg_pool2d(image, window, ceil_mode=True).flatten(2).transpose(1, 2)
        image = features.view(tiles, rows // window, window, columns // window, window, width)
        return image.transpose(2, 3).reshape(tiles, -1, window * window * width)


class Projector(nn.Sequential):
    """Pooled vision tokens to the width of the language model."""

    def __init__(self, config: FlashSlothConfig) -> None:
        width = config.text_config.hidden_size
        super().__init__(PlainLinear(config.pooled_width, width), nn.GELU(), PlainLinear(width, width))


class LearnableTokens(nn.Module):
    """The embedded queries before they have seen anything."""

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(config.num_queries, config.text_config.hidden_size))


class EmbeddedQuery(nn.Module):
    """Let the embedded queries read their question and then the image (paper, "EmbQ")."""

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__()
        text, image, inner = config.text_config.hidden_size, config.vision_config.hidden_size, config.query_dim
        self.num_heads = config.query_heads
        self.down_projector_learnable_text = nn.Linear(text, inner)
        self.down_projector_image = nn.Linear(image, inner)
        self.layers = nn.ModuleList([EmbeddedQueryLayer(inner, image)])
        self.up_projector = nn.Linear(image, text)

    def params(self) -> EmbeddedQueryParams:
        """The weights by their names in the op. Gradients flow through."""
        return EmbeddedQueryParams.from_state_dict(dict(self.named_parameters()))

    def image_state(self, image: Tensor) -> ImageState:
        """What depends on the image ``(images, N, Di)`` alone, for every question on it."""
        return ImageState.from_image(image, self.params())

    def forward(
        self, query: Tensor, text: Tensor, text_lengths: Tensor, image: Tensor, state: ImageState | None = None
    ) -> Tensor:
        """query ``(B, Q, Dm)``, text ``(B, T, Dm)``, image ``(Bi, N, Di)`` -> updated query rows ``(B, Q, Dm)``."""
        updated = embedded_query_attention(
            query, text, image, self.params(), num_heads=self.num_heads, text_lengths=text_lengths, image_state=state
        )
        assert isinstance(updated, Tensor)
        return updated


class EmbeddedQueryLayer(nn.Module):
    """Parameters of the two attentions; the op reads them."""

    def __init__(self, inner: int, image: int) -> None:
        super().__init__()
        self.t2q_attn = _Projections(inner, inner)
        self.i2q_attn = _Projections(inner, image)
        self.ln_text = nn.LayerNorm(inner)
        self.ln_q = nn.LayerNorm(inner)
        self.ln_kv = nn.LayerNorm(inner)


class _Projections(nn.Module):
    def __init__(self, inner: int, value: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(inner, inner)
        self.k_proj = nn.Linear(inner, inner)
        self.v_proj = nn.Linear(value, value)
