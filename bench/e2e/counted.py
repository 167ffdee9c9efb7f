"""What is known without a measurement: visual tokens, flops and parameters of every model at full size."""

from __future__ import annotations

from typing import NamedTuple

from bench.e2e.flops import DECODE, FIRST_TOKEN, PREFILL
from bench.e2e.memory import parameters
from bench.e2e.models import MODELS, RESOLUTIONS, Model
from bench.e2e.points import Point

# Digits behind the point of what the table shows.
_SHOWN = {FIRST_TOKEN: 2, PREFILL: 2, DECODE: 4}


class Counted(NamedTuple):
    """One model on one image, at full size.

    Attributes:
        parameters: numbers of the model.
        visual_tokens: of the image, as the language model sees them; ``prompt_tokens``: with text, tags and queries.
        flops: by phase, for a batch of one.
    """

    model: Model
    width: int
    height: int
    parameters: int
    visual_tokens: int
    prompt_tokens: int
    flops: dict[str, float]


def count() -> list[Counted]:
    """Every model at every resolution. Takes seconds: parameters are counted on models built without memory."""
    return [_count(Point(model, *resolution, 1, False)) for model in MODELS for resolution in RESOLUTIONS]


def _count(point: Point) -> Counted:
    config = point.model.config(False)
    layout = point.layout(config)
    return Counted(
        point.model,
        point.width,
        point.height,
        parameters(point.model, False).total,
        layout.visual_tokens,
        point.model.prompt(layout, config, point.text),
        {phase: work.flops for phase, work in point.works(config).items()},
    )


def table() -> tuple[list[str], list[list[str]]]:
    """The same as headings and lines of text: tokens and teraflops of one request."""
    headings = ["model", "parameters", "image", "visual tokens", "prompt", "to the first token", "prefill", "a step"]
    lines = [
        [
            one.model.name,
            f"{one.parameters / 1e9:.2f} B",
            f"{one.width}x{one.height}",
            str(one.visual_tokens),
            str(one.prompt_tokens),
            *(f"{one.flops[phase] / 1e12:.{digits}f} T" for phase, digits in _SHOWN.items()),
        ]
        for one in count()
    ]
    return headings, lines
