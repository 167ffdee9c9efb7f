"""Flops of every phase, from configuration alone: no weights, no run, the same answer on every machine.

What counts is what :class:`torch.utils.flop_counter.FlopCounterMode` counts: matrix products and attention, a
multiply-add as two flops. Attention counts every pair of a prompt, though causal kernels skip half of them. Norms,
activations, softmax, rotary embeddings and lookups are left out: they cost time and hardly a flop. The fused ops
count as they are computed, with the projections of the query module absorbed (docs/kernels/embedded_query.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.case import Work
from bench.e2e.models import Model
from bench.e2e.tokens import Layout

VISION, COMPRESSION, PREFILL, FIRST_TOKEN = "vision", "compression", "prefill", "first token"
DECODE, ANSWER = "decode", "answer"
STAGES = TRAINING_1, TRAINING_2 = "training stage 1", "training stage 2"
PHASES = (VISION, COMPRESSION, PREFILL, FIRST_TOKEN, DECODE, ANSWER, *STAGES)


class Product(NamedTuple):
    """``rows`` vectors of ``inner`` numbers through a matrix to ``outer`` numbers."""

    rows: int
    inner: int
    outer: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.outer

    @property
    def weights(self) -> int:
        return self.inner * self.outer


@dataclass(frozen=True)
class Transformer:
    """The shapes of a stack of layers. ``gated``: whether the MLP has a third matrix."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    gated: bool

    @property
    def weights(self) -> int:
        """Numbers in its matrices."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + (3 if self.gated else 2) * self.width * self.hidden)

    @property
    def cache(self) -> int:
        """Numbers kept of a token: its keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def linear(self, tokens: float) -> float:
        """Flops of the matrices for that many tokens."""
        return 2.0 * tokens * self.weights

    def attention(self, pairs: float) -> float:
        """Flops of scores and weighted sums for that many pairs of a query and a key."""
        return 4.0 * self.layers * self.heads * self.head_dim * pairs


class Forward(NamedTuple):
    """A forward pass over a batch.

    The products of ``compression`` are in order; the first reads the tower's output, through a trained norm where
    ``norm_first``. ``queries`` are those of the query module, whose attention is ``query_attention`` flops.
    """

    vision: float
    vision_weights: int
    compression: list[Product]
    norm_first: bool
    decoder: Transformer
    head: Product
    queries: list[Product]
    query_attention: float
    batch: int
    prompt: int


def decoder(config: Any) -> Transformer:
    """Of a text configuration of transformers: phi, llama, qwen2, qwen2_vl_text."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    gated = config.model_type != "phi"
    return Transformer(
        config.num_hidden_layers, config.hidden_size, heads, kv_heads, head_dim, config.intermediate_size, gated
    )


def tower(config: Any) -> tuple[Transformer, int]:
    """Of a whole configuration: its vision tower, and the numbers that a patch consists of."""
    vision = config.vision_config
    if config.model_type == "qwen2_vl":
        width, heads, layers = vision.embed_dim, vision.num_heads, vision.depth
        hidden, frames = width * vision.mlp_ratio, vision.temporal_patch_size
    else:
        width, heads, layers = vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers
        hidden, frames = vision.intermediate_size, 1
    layers = getattr(config, "vision_layers", layers)  # FlashSloth leaves out the last
    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    return Transformer(layers, width, heads, heads, width // heads, hidden, False), 3 * frames * side * side


def forward(model: Model, config: Any, layout: Layout, batch: int, text: int) -> Forward:
    """What one forward pass of a batch consists of, with logits of the last position only."""
    vision, patch = tower(config)
    per_tile = layout.grid[0] * layout.grid[1]
    seen = per_tile + (config.model_type == "internvl")  # a class token, dropped behind the tower
    tiles = batch * layout.tiles
    embedding = Product(tiles * per_tile, patch, vision.width)
    flops = embedding.flops + vision.linear(tiles * seen) + vision.attention(tiles * seen**2)
    language = decoder(config.text_config)
    queries, attention = _query_module(config, layout, batch, text) if model.ours else ([], 0.0)
    return Forward(
        flops,
        embedding.weights + vision.weights,
        _compression(model, config, layout, batch),
        config.model_type in ("internvl", "qwen2_vl"),
        language,
        Product(batch, language.width, config.text_config.vocab_size),
        queries,
        attention,
        batch,
        model.prompt(layout, config, text),
    )


def _compression(model: Model, config: Any, layout: Layout, batch: int) -> list[Product]:
    vision, wide = tower(config)[0].width, config.text_config.hidden_size
    patches, visual = batch * layout.patches, batch * layout.visual_tokens
    if model.ours:
        pooling = [Product(patches, vision, vision), Product(patches, vision, 1)]
        state = Product(patches, vision, config.query_dim)
        return [*pooling, Product(visual, vision, wide), Product(visual, wide, wide), state]
    stacked = vision * layout.patches // layout.visual_tokens
    if config.model_type == "qwen2_vl":
        return [Product(visual, stacked, stacked), Product(visual, stacked, wide)]
    if config.model_type == "smolvlm":
        return [Product(visual, stacked, wide)]
    entering = vision if model.window > 1 and not model.shuffled else stacked
    return [Product(visual, entering, wide), Product(visual, wide, wide)]


def _query_module(config: Any, layout: Layout, batch: int, text: int) -> tuple[list[Product], float]:
    """With keys and values never formed: scores against the down-projected image, sums over the raw image."""
    inner, image, wide = config.query_dim, config.vision_config.hidden_size, config.text_config.hidden_size
    asked = text - text // 2
    rows, words, tokens = batch * config.num_queries, batch * asked, layout.patches
    products = [
        Product(rows + words, wide, inner),
        *(Product(count, inner, inner) for count in (rows, words, words)),  # text: queries, keys, values
        *(Product(rows, inner, inner) for _ in range(2)),  # image: queries, and these through the keys' matrix
        Product(rows, image, image),
        Product(rows, image, wide),
    ]
    reading_text = 4.0 * rows * asked * inner
    reading_image = 2.0 * rows * config.query_heads * tokens * (inner + image)
    return products, reading_text + reading_image


def works(model: Model, config: Any, layout: Layout, batch: int, text: int, new_tokens: int) -> dict[str, Work]:
    """Flops of each phase for a whole batch, and the numbers it has to read at least: weights, and a cache.

    "decode" is one step of all rows, at the mean length of the answer; "answer" is the first token and the steps to
    ``new_tokens``. A training step has logits at every position.
    """
    f = forward(model, config, layout, batch, text)
    tokens, language = f.batch * f.prompt, f.decoder
    compression = Work(_flops(f.compression), _weights(f.compression))
    prompt = language.linear(tokens) + language.attention(f.batch * f.prompt**2) + f.head.flops
    prefill = Work(
        prompt + _flops(f.queries) + f.query_attention, language.weights + f.head.weights + _weights(f.queries)
    )
    first = Work(f.vision + compression.flops + prefill.flops, f.vision_weights + sum(_elements(compression, prefill)))
    keys = f.prompt + new_tokens / 2  # of a step, in the mean
    step = Work(
        language.linear(f.batch) + language.attention(f.batch * keys) + f.head.flops,
        language.weights + f.head.weights + f.batch * keys * language.cache,
    )
    steps = new_tokens - 1
    return {
        VISION: Work(f.vision, f.vision_weights),
        COMPRESSION: compression,
        PREFILL: prefill,
        FIRST_TOKEN: first,
        DECODE: step,
        ANSWER: Work(first.flops + steps * step.flops, first.elements + steps * step.elements),
        **{stage: Work(_training(f, stage), first.elements) for stage in STAGES},
    }


def _training(f: Forward, stage: str) -> float:
    """Forward and backward. A product costs once more for the gradient of its input, and once more for that of its
    matrix where that is trained; attention costs twice more; the tower runs forward only, so that the products that
    read its output need no gradient of their input."""
    tokens, language = f.batch * f.prompt, f.decoder
    trained = 3 if stage == TRAINING_2 else 2
    # What reads the tower directly: the first product, unless a trained norm stands before it, and with FlashSloth the
    # down-projection of the query module, which the first stage does not train.
    compression = 3 * _flops(f.compression) - (0.0 if f.norm_first else f.compression[0].flops)
    if f.queries:
        compression -= (4 - trained) * f.compression[-1].flops
    queries = trained * _flops(f.queries) + 3 * f.query_attention
    logits = f.head._replace(rows=tokens)
    whole = trained * (language.linear(tokens) + logits.flops) + 3 * language.attention(f.batch * f.prompt**2)
    return f.vision + compression + queries + whole


def _flops(products: list[Product]) -> float:
    return sum(product.flops for product in products)


def _weights(products: list[Product]) -> int:
    return sum(product.weights for product in products)


def _elements(*works: Work) -> list[float]:
    return [work.elements for work in works]
