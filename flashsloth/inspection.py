"""``flashsloth inspect``: what a checkpoint holds and what it needs, from its configuration and headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flashsloth.checkpoint import is_official, read_meta_tensors, rename
from flashsloth.config import FlashSlothConfig
from flashsloth.tokenization import read_json

PARTS = {
    "vision_tower.": "vision tower",
    "pooling.": "spatial attention pooling",
    "projector.": "projector",
    "embedded_query.": "embedded-query module",
    "learnable_tokens.": "learnable tokens",
    "language_model.": "language model",
}
OTHER = "other"
WIDTHS = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in numbers.

    Attributes:
        layout: "official" or "flashsloth".
        tensors: how many it holds.
        dtypes: tensors of each dtype.
        parameters: by part, in the order of :data:`PARTS`; tensors of no part under "other".
        vision_tokens, visual_tokens: of one image: before and after pooling.
        pooling: how they become fewer, ``config.pooling``.
        pool_window: side of the pooling window.
        num_queries, query_layer: embedded queries behind each question, and the decoder layer before which they read.
        cache_per_token: numbers the key-value cache keeps for a token.
    """

    layout: str
    tensors: int
    dtypes: dict[str, int]
    parameters: dict[str, int]
    vision_tokens: int
    visual_tokens: int
    pooling: str
    pool_window: int
    num_queries: int
    query_layer: int
    cache_per_token: int

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def weight_bytes(self, dtype: str) -> int:
        """Memory of the weights in "fp32" or "bf16"."""
        return self.total * WIDTHS[dtype]

    def cache_bytes(self, tokens: int, dtype: str) -> int:
        """Memory of the key-value cache of that many tokens."""
        return tokens * self.cache_per_token * WIDTHS[dtype]


def inspect_checkpoint(directory: Path) -> Inspection:
    """Look into a checkpoint, ours or of the official layout. Weights are not read, only what their files say of them.

    Raises:
        FileNotFoundError: no such directory, no ``config.json``, no weights or a shard missing.
        ValueError: a file that is not what it should be.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a directory with a checkpoint, got none")
    raw = read_json(directory, "config.json")
    if raw is None:
        raise FileNotFoundError(f"{directory}: expected a checkpoint with config.json, got none")
    if raw.get("model_type") != FlashSlothConfig.model_type:
        raise ValueError(f"{directory}: expected model_type 'flashsloth' in config.json, got {raw.get('model_type')!r}")
    config = FlashSlothConfig.from_pretrained(directory)
    tensors = read_meta_tensors(directory)
    parameters = dict.fromkeys(PARTS.values(), 0)
    dtypes: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = next((part for prefix, part in PARTS.items() if rename(name).startswith(prefix)), OTHER)
        parameters[part] = parameters.get(part, 0) + tensor.numel()
        dtype = str(tensor.dtype).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    text, (rows, columns) = config.text_config, config.vision_grid
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Inspection(
        layout="official" if is_official(raw) else "flashsloth",
        tensors=len(tensors),
        dtypes=dtypes,
        parameters=parameters,
        vision_tokens=config.num_tiles * rows * columns,
        visual_tokens=config.num_visual_tokens,
        pooling=config.pooling,
        pool_window=config.pool_window,
        num_queries=config.num_queries,
        query_layer=config.query_layer,
        cache_per_token=2 * text.num_hidden_layers * heads * head_dim,
    )


def render(found: Inspection) -> Group:
    """The numbers as a table, for the terminal."""
    table = Table(box=SIMPLE)
    table.add_column("part")
    for heading in ("parameters", *WIDTHS):
        table.add_column(heading, justify="right", no_wrap=True)
    for part, count in [*found.parameters.items(), ("total", found.total)]:
        if part == "total":
            table.add_section()
        table.add_row(part, f"{count:,}", *(_size(count * width) for width in WIDTHS.values()))
    cached = (_size(found.cache_bytes(1000, dtype)) for dtype in WIDTHS)
    table.add_row("key-value cache, 1000 tokens", "", *cached)
    stored = ", ".join(f"{count} {dtype}" for dtype, count in sorted(found.dtypes.items()))
    fewer = 1 - found.visual_tokens / found.vision_tokens
    return Group(
        Text(f"{found.layout} layout, {found.tensors} tensors ({stored})"),
        Text(
            f"an image is {found.vision_tokens} vision tokens, {found.visual_tokens} after pooling (-{fewer:.0%}); "
            f"{found.num_queries or 'no'} embedded queries a question"
        ),
        Text(_variant(found)),
        table,
    )


def _variant(found: Inspection) -> str:
    """Which of the model's variants a checkpoint is, in words."""
    windows = f"windows of {found.pool_window}x{found.pool_window}"
    kinds = {"attention": "attention within", "average": "average of", "pixel_shuffle": "pixel shuffle of"}
    pooling = f"{kinds[found.pooling]} {windows}" if found.pooling in kinds else "none"
    return f"pooling: {pooling}" + (f"; queries read before layer {found.query_layer}" if found.num_queries else "")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
