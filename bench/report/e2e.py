"""Whole models: time to first token by phase, decoding, requests, memory, training; and the claims of the paper.

Rows of op ``e2e``: the provider is a model, the mode a phase. On a CPU all times become multiples of FlashSloth's at
the same size, as times there mean nothing by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bench.report import formats
from bench.report.collect import Device
from bench.report.points import END_TO_END, methods
from bench.report.tables import Table
from bench.result import Row

PARTS = ("vision", "compression", "prefill")
FIRST_TOKEN, DECODE, ANSWER = "first token", "decode", "answer"
STAGES = ("training stage 1", "training stage 2")

Claims = Callable[[Sequence[Row]], Table]
"""Rows of a result to the table of the paper's claims, beside what was measured and whether it holds."""

PAPER = (
    ("visual tokens", "80 to 89 % fewer"),
    ("memory", "61 to 80 % less"),
    ("FLOPs", "70 to 98 % fewer"),
    ("latency", "2 to 5 times lower"),
)


@dataclass(frozen=True)
class Run:
    """A model at one size: its rows by phase, those that are right."""

    model: str
    ours: bool
    phases: Mapping[str, Row]

    def seconds(self, phase: str) -> float | None:
        row = self.phases.get(phase)
        return None if row is None else row.p50

    @property
    def parts(self) -> list[float]:
        """Seconds of vision, compression and prefill; zero for a phase the model does not have."""
        return [self.seconds(phase) or 0.0 for phase in PARTS]

    @property
    def first_token(self) -> float | None:
        """As measured in one piece, or the sum of its phases."""
        whole = self.seconds(FIRST_TOKEN)
        return whole if whole is not None else sum(self.parts) or None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all answers of the batch together; the phase is one step, which gives each of them a token."""
        row = self.phases.get(DECODE)
        return row.size.get("batch", 1) / row.p50 if row is not None and row.p50 else None

    @property
    def requests_per_second(self) -> float | None:
        row = self.phases.get(ANSWER)
        return row.size.get("batch", 1) / row.p50 if row is not None and row.p50 else None

    @property
    def peak(self) -> Row | None:
        """What an answer needs at most, from pixels to its last token; weights are in it."""
        row = self.phases.get(ANSWER)
        return row if row is not None and row.peak_bytes is not None else None

    @property
    def visual_tokens(self) -> int | None:
        return next((row.size["visual_tokens"] for row in self.phases.values() if "visual_tokens" in row.size), None)


@dataclass(frozen=True)
class Setting:
    """All models on images of one size, in batches of one size."""

    width: int
    height: int
    batch: int
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        return f"{self.width}{formats.TIMES}{self.height}, batch {self.batch}"

    def unit(self, device: Device, value: Callable[[Run], float | None]) -> float | None:
        """What counts as one: nothing on a GPU, where numbers have units; ours on a CPU. None where ours is unknown."""
        if device.absolute:
            return 1.0
        return next((found for run in self.runs if run.ours and (found := value(run))), None)


def rows_of(rows: Sequence[Row]) -> list[Row]:
    """The rows of whole models."""
    return [row for row in rows if row.op == END_TO_END]


def settings(rows: Sequence[Row]) -> list[Setting]:
    """What was measured of whole models and is right, by image and batch; models as in the file."""
    own = [row for row in rows_of(rows) if row.passed]
    first = {name: i for i, name in enumerate(methods(own))}
    groups: dict[tuple[int, int, int], dict[str, dict[str, Row]]] = {}
    for row in sorted(own, key=lambda row: first[row.method]):
        at = (row.size.get("width", 0), row.size.get("height", 0), row.size.get("batch", 1))
        groups.setdefault(at, {}).setdefault(row.provider, {}).setdefault(row.mode, row)
    order = list(dict.fromkeys(row.provider for row in own))
    found = []
    for (width, height, batch), models in sorted(groups.items(), key=lambda one: (one[0][0] * one[0][1], one[0][2])):
        runs = tuple(
            Run(name, any(row.ours for row in models[name].values()), models[name]) for name in order if name in models
        )
        found.append(Setting(width, height, batch, runs))
    return found


def models(found: Sequence[Setting], device: Device) -> Table:
    """A line a model and setting."""
    columns = (
        "image, batch",
        "model",
        "visual tokens",
        "prefill",
        "first token",
        "decode",
        "answers",
        "memory",
    )
    rows = []
    for setting in found:
        for run in setting.runs:
            tokens, prefill, peak = run.visual_tokens, run.phases.get("prefill"), run.peak
            rows.append(
                (
                    setting.title,
                    run.model,
                    "" if tokens is None else str(tokens),
                    "" if prefill is None else formats.metric(prefill.flops, "FLOP"),
                    time(setting, device, run, lambda one: one.first_token),
                    speed(setting, device, run, lambda one: one.tokens_per_second, "tokens/s"),
                    speed(setting, device, run, lambda one: one.requests_per_second, "/s"),
                    "" if peak is None or peak.peak_bytes is None else formats.amount(peak.peak_bytes),
                )
            )
    return Table(columns, rows, frozenset(range(2, len(columns)))).without_empty()


def training(found: Sequence[Setting], device: Device) -> Table:
    """One step of each stage: time and memory."""
    columns = ["image, batch", "model"]
    for stage in STAGES:
        short = stage.removeprefix("training ")
        columns += [f"{short}, time", f"{short}, memory"]
    rows = []
    for setting in found:
        for run in setting.runs:
            cells = []
            for stage in STAGES:
                row = run.phases.get(stage)
                peak = None if row is None else row.peak_bytes
                cells.append(time(setting, device, run, partial(_stage, stage)))
                cells.append("" if peak is None else formats.amount(peak))
            if any(cells):
                rows.append((setting.title, run.model, *cells))
    return Table(tuple(columns), rows, frozenset(range(2, len(columns)))).without_empty()


def _stage(stage: str, run: Run) -> float | None:
    return run.seconds(stage)


def time(setting: Setting, device: Device, run: Run, value: Callable[[Run], float | None]) -> str:
    """In seconds on a GPU, as a multiple of ours on a CPU."""
    found, unit = value(run), setting.unit(device, value)
    if found is None or unit is None:
        return ""
    return formats.seconds(found) if device.absolute else formats.ratio(found / unit)


def speed(setting: Setting, device: Device, run: Run, value: Callable[[Run], float | None], unit_name: str) -> str:
    """Per second on a GPU, as a multiple of ours on a CPU."""
    found, unit = value(run), setting.unit(device, value)
    if found is None or unit is None:
        return ""
    return f"{formats.three_digits(found)} {unit_name}" if device.absolute else formats.ratio(found / unit)


def unmeasured_claims(rows: Sequence[Row]) -> Table:
    """The claims alone, where nothing is at hand to set beside the rows of whole models."""
    lines = [(what, claim, "not compared") for what, claim in PAPER] if rows else []
    return Table(("of FlashSloth", "the paper", "here"), lines)


def compared_claims(lines: Iterable[tuple[str, ...]]) -> Table:
    """Lines of quantity, what the paper claims, model, image, what is found here, and whether it holds."""
    columns = ("of FlashSloth", "the paper", "model", "image", "here", "verdict")
    return Table(columns, list(lines), tones={"holds": "good", "does not hold": "bad"})
