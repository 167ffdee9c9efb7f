"""A run in a table: one line a model, image and batch, in the units that users of a model ask for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.e2e.flops import ANSWER, COMPRESSION, DECODE, FIRST_TOKEN, PHASES, PREFILL, TRAINING_1, TRAINING_2, VISION
from bench.e2e.points import OP
from bench.result import Row


class Summary(NamedTuple):
    """A model on images of one size in batches of one size. None: not measured.

    Attributes:
        attention: the implementation that the model ran with.
        prefill_flops: of the whole batch, counted.
        vision, compression, prefill, first_token: seconds.
        tokens_per_second: while decoding, of all rows together. ``requests_per_second``: answers of all rows.
        answer_bytes, training_bytes: peaks, weights included; of stage 1 and 2.
        training: seconds of a step of stage 1 and 2.
        note: what failed or is missing, by phase.
    """

    model: str
    width: int
    height: int
    batch: int
    attention: str
    visual_tokens: int
    prefill_flops: float
    vision: float | None
    compression: float | None
    prefill: float | None
    first_token: float | None
    tokens_per_second: float | None
    requests_per_second: float | None
    answer_bytes: int | None
    training: tuple[float | None, float | None]
    training_bytes: tuple[int | None, int | None]
    note: str


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Of all end-to-end rows, by image and batch, models in the order in which they were measured."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.op == OP:
            groups.setdefault((row.case, row.provider), {})[row.mode] = row
    found = [_summary(by_phase) for by_phase in groups.values() if set(PHASES) <= set(by_phase)]
    return sorted(found, key=lambda one: (one.width * one.height, one.batch))


def _summary(rows: dict[str, Row]) -> Summary:
    prefill, size = rows[PREFILL], rows[PREFILL].size
    step, answer, stages = rows[DECODE].p50, rows[ANSWER].p50, (rows[TRAINING_1], rows[TRAINING_2])
    reasons: dict[str, list[str]] = {}
    for phase in PHASES:
        reason = rows[phase].failure or rows[phase].missing
        if reason is not None:
            reasons.setdefault(reason, []).append(phase)
    return Summary(
        prefill.provider,
        size["width"],
        size["height"],
        size["batch"],
        prefill.variant,
        size["visual_tokens"],
        prefill.flops,
        rows[VISION].p50,
        rows[COMPRESSION].p50,
        prefill.p50,
        rows[FIRST_TOKEN].p50,
        size["batch"] / step if step else None,
        size["batch"] / answer if answer else None,
        rows[ANSWER].peak_bytes,
        (stages[0].p50, stages[1].p50),
        (stages[0].peak_bytes, stages[1].peak_bytes),
        "; ".join(f"{'all' if len(who) == len(PHASES) else ', '.join(who)}: {why}" for why, who in reasons.items()),
    )


HEADINGS = (
    "image",
    "batch",
    "model",
    "attention",
    "visual tokens",
    "prefill TFLOPs",
    "vision ms",
    "compression ms",
    "prefill ms",
    "first token ms",
    "decode tokens/s",
    "requests/s",
    "answer GB",
    "training ms, stage 1 / 2",
    "training GB, stage 1 / 2",
    "",
)


def table(rows: Iterable[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The summaries as headings and lines of text; a dash where nothing was measured."""
    return HEADINGS, [_line(one) for one in summaries(rows)]


def _line(one: Summary) -> tuple[str, ...]:
    seconds = (one.vision, one.compression, one.prefill, one.first_token)
    rates = (one.tokens_per_second, one.requests_per_second)
    return (
        f"{one.width}x{one.height}",
        str(one.batch),
        one.model,
        one.attention,
        str(one.visual_tokens),
        f"{one.prefill_flops / 1e12:.3g}",
        *(_shown(value, 1e3) for value in seconds),
        *(_shown(value, 1.0) for value in rates),
        _shown(one.answer_bytes, 1e-9),
        " / ".join(_shown(value, 1e3) for value in one.training),
        " / ".join(_shown(value, 1e-9) for value in one.training_bytes),
        one.note,
    )


def _shown(value: float | None, scale: float) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return "-"
    scaled = value * scale
    return f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"
