"""The curves of a result: time along the axis of a case, a line a provider, each with its fitted exponent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report import formats
from bench.report.points import REFERENCE, Cases, backend, is_product, methods, operations
from bench.report.scaling import Fit, Measured, fit
from bench.report.sizes import lines_of, sizes_of
from bench.result import Result, Row
from bench.timing import Quantiles


@dataclass(frozen=True)
class ProviderLine:
    """One provider along the axis: ``rows`` ascending, all right and timed."""

    provider: str
    ours: bool
    rows: tuple[Row, ...]
    axis: str
    fit: Fit

    @property
    def measured(self) -> list[tuple[float, Quantiles]]:
        """Place on the axis, and times in seconds."""
        return [(float(row.size[self.axis]), row.times) for row in self.rows if row.times is not None]


@dataclass(frozen=True)
class Curve:
    """A case along its axis, by one method; of a case with several lines (shares that are kept, say), one of them.

    Attributes:
        lines: ours first, in the order of the file.
        unit: seconds that count as one where times are relative: ours, fastest, at the start of the curve.
    """

    case: str
    title: str
    axis: str
    label: str
    mode: str
    method: str
    lines: tuple[ProviderLine, ...]

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.label}" if self.label else self.title

    @property
    def unit(self) -> float:
        first = min(line.measured[0][0] for line in self.lines)
        at = [(not line.ours, q.p50) for line in self.lines for x, q in line.measured if x == first]
        return min(at)[1]

    @property
    def steep(self) -> list[ProviderLine]:
        return [line for line in self.lines if line.fit.steep]


def work(row: Row) -> float:
    """What the exponent is fitted against: flops, or bytes where a case counts none."""
    return row.flops or row.bytes


def curves(result: Result, cases: Cases) -> list[Curve]:
    """All curves of a result, in the order of the file."""
    rows = operations(result.rows)
    found = []
    for case, sizes in sizes_of(rows).items():
        axis = cases.axis(case, sizes)
        if not axis or not all(axis in size for size in sizes):
            continue
        labels = lines_of(sizes, axis)
        own = [row for row in rows if row.case == case and row.passed and row.times is not None and work(row) > 0]
        for key in dict.fromkeys((labels[i], row.mode) for row in own for i in [sizes.index(row.size)]):
            for method in methods(own):
                member = [
                    row for row in own if row.method == method and key == (labels[sizes.index(row.size)], row.mode)
                ]
                lines = _providers(member, axis)
                if lines:
                    title = cases.title(case)
                    found.append(Curve(case, title, axis, key[0], key[1], method, lines))
    return found


def _providers(rows: Sequence[Row], axis: str) -> tuple[ProviderLine, ...]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if is_product(row) or not row.ours or backend(row) != REFERENCE:
            groups.setdefault(row.provider, []).append(row)
    lines = []
    for provider, own in groups.items():
        own.sort(key=lambda row: row.size[axis])
        points = [Measured(work(row), row.p50) for row in own if row.p50 is not None and row.p50 > 0]
        if points:
            lines.append(ProviderLine(provider, own[0].ours, tuple(own), axis, fit(points)))
    return tuple(sorted(lines, key=lambda line: not line.ours))


def exponent(line: ProviderLine) -> str:
    """As a label of a line: ``work^0.98``."""
    found = line.fit.exponent
    return "" if found is None else f"work^{found:.2f}{', steep' if line.fit.steep else ''}"


def verdicts(found: Sequence[Curve]) -> list[str]:
    """A sentence for every line that is steeper than the work."""
    return [
        f"{curve.heading} ({formats.METHODS.get(curve.method, curve.method)}): {line.provider} grows faster than the "
        f"work, with exponent {line.fit}."
        for curve in found
        for line in curve.steep
    ]
