"""Flops of a request to its first token, by part, from the shapes of a model alone.

What counts is what :class:`torch.utils.flop_counter.FlopCounterMode` counts: matrix products, convolutions and
attention, a multiply-add as two flops. Attention counts every pair of a prompt, though a causal kernel skips half of
them. The query module counts as the fused op computes it, with the projections of its keys and values absorbed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from flashsloth.modeling import FlashSlothForConditionalGeneration


class Flops(NamedTuple):
    """Of one request with one image, in flops.

    Attributes:
        tower, pooling, projector: of the image.
        queries: the query module, with what it computes of the image alone.
        prefill: decoder over the whole prompt, and logits of its last position.
    """

    tower: float
    pooling: float
    projector: float
    queries: float
    prefill: float

    @property
    def total(self) -> float:
        return sum(self)


def count(model: FlashSlothForConditionalGeneration, prompt: int, question: int) -> Flops:
    """Flops of a prompt of ``prompt`` tokens, visual ones and queries included, whose question has ``question``."""
    config = model.config
    rows, columns = config.vision_grid
    per_tile, tiles = rows * columns, config.num_tiles
    tokens = tiles * per_tile
    vision, text = config.vision_config, config.text_config
    tower = 2.0 * tokens * _weights(model.vision_tower, nn.Conv2d, nn.Linear)
    tower += 4.0 * config.vision_layers * vision.hidden_size * tiles * per_tile**2
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    prefill = 2.0 * prompt * _weights(model.get_decoder(), nn.Linear)
    prefill += 4.0 * text.num_hidden_layers * text.num_attention_heads * head_dim * prompt**2
    prefill += 2.0 * text.hidden_size * text.vocab_size
    return Flops(
        tower,
        2.0 * tokens * _weights(model.pooling, nn.Linear),
        2.0 * config.num_visual_tokens * _weights(model.projector, nn.Linear),
        _query_module(model, tokens, question) if config.num_queries else 0.0,
        prefill,
    )


def _query_module(model: FlashSlothForConditionalGeneration, tokens: int, question: int) -> float:
    config = model.config
    wide, image, inner = config.text_config.hidden_size, config.vision_config.hidden_size, config.query_dim
    rows = config.num_queries
    products = tokens * image * inner  # the image, down; once an image
    products += (rows + question) * wide * inner  # query and text, down
    products += (rows + 2 * question) * inner**2  # reading the text: queries, keys, values
    products += 2 * rows * inner**2  # reading the image: queries, and these through the keys' matrix
    products += rows * image * (image + wide)  # values of the sums, and up
    reading = 2 * rows * question * inner + rows * config.query_heads * tokens * (inner + image)
    return 2.0 * (products + reading)


def _weights(module: nn.Module, *kinds: type[nn.Module]) -> int:
    """Numbers in the matrices of a module's layers."""
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, kinds)]
    return sum(layer.weight.numel() for layer in layers)
