"""What is measured: each model at each resolution and batch, and the rows that come of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers.utils import is_flash_attn_2_available

from bench.case import DTYPES, Work
from bench.e2e.flops import works
from bench.e2e.memory import bytes_at_least
from bench.e2e.models import (
    MODELS,
    RESOLUTIONS,
    SMALL_RESOLUTIONS,
    SMALL_TEXT_TOKENS,
    TEXT_TOKENS,
    Model,
)
from bench.e2e.tokens import Layout
from bench.result import Row

OP = "e2e"
BATCHES, SMALL_BATCHES = (1, 8, 32), (1, 2, 4)
NEW_TOKENS, SMALL_NEW_TOKENS = 32, 4
METHODS = {"cpu": "wall", "cuda": "call"}


class Point(NamedTuple):
    """One model on images of one size in batches of one size. ``small``: the small configuration of the model."""

    model: Model
    width: int
    height: int
    batch: int
    small: bool

    @property
    def case(self) -> str:
        return f"{OP}/{self.width}x{self.height}-b{self.batch}"

    @property
    def text(self) -> int:
        return SMALL_TEXT_TOKENS if self.small else TEXT_TOKENS

    @property
    def new_tokens(self) -> int:
        return SMALL_NEW_TOKENS if self.small else NEW_TOKENS

    def layout(self, config: Any) -> Layout:
        return self.model.layout(config, self.width, self.height)

    def works(self, config: Any) -> dict[str, Work]:
        return works(self.model, config, self.layout(config), self.batch, self.text, self.new_tokens)

    def rows(self, device: str) -> list[Row]:
        """One row a phase, without times: what they will be about."""
        config, dtype = self.model.config(self.small), DTYPES[device]
        layout = self.layout(config)
        size = {
            "width": self.width,
            "height": self.height,
            "batch": self.batch,
            "visual_tokens": layout.visual_tokens,
            "text_tokens": self.model.prompt(layout, config, self.text) - layout.visual_tokens,
            "new_tokens": self.new_tokens,
        }
        return [
            Row(
                case=self.case,
                op=OP,
                size=size,
                dtype=str(dtype).removeprefix("torch."),
                mode=phase,
                provider=self.model.name,
                method=METHODS[device],
                flops=work.flops,
                bytes=work.elements * dtype.itemsize,
                ours=self.model.ours,
            )
            for phase, work in self.works(config).items()
        ]

    def bytes_at_least(self, config: Any, phase: str, itemsize: int) -> int:
        layout = self.layout(config)
        shape = (layout, self.batch, self.text, self.new_tokens)
        return bytes_at_least(self.model, config, *shape, phase, self.small, itemsize)


def points(device: str, *, quick: bool, small: bool) -> list[Point]:
    """What a run measures, model by model: all sizes, or with ``quick`` the first and the last image, one at a time.

    A CPU gets the small configurations in any case.
    """
    small = small or device == "cpu"
    resolutions, batches = (list(SMALL_RESOLUTIONS), SMALL_BATCHES) if small else (list(RESOLUTIONS), BATCHES)
    if quick:
        return [Point(m, *resolution, 1, small) for m in MODELS for resolution in (resolutions[0], resolutions[-1])]
    return [Point(m, *resolution, batch, small) for m in MODELS for resolution in resolutions for batch in batches]


def attentions(model: Model, device: str) -> tuple[str, ...]:
    """The attention implementations to choose the fastest of: ours is measured with its own, a peer with its best."""
    if model.ours:
        return ("flashsloth",)
    return ("flash_attention_2", "sdpa") if device == "cuda" and is_flash_attn_2_available() else ("sdpa",)
