"""The curves of a result: time along the axis of a case, a line a provider, each with its fitted exponent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.report import formats
from bench.report.points import REFERENCE, Cases, backend, is_product, methods, operations, sizes_of, varying
from bench.report.scaling import Fit, Measured, fit
from bench.result import Result, Row
from bench.timing import Quantiles

SAME_SHARE = 0.1  # log of a ratio: kept rows are a whole number, so a share of 1/9 is now 28/256, now 57/512


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
        labels = _lines_of(sizes, axis)
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


def _lines_of(sizes: Sequence[Mapping[str, int]], axis: str) -> list[str]:
    """For each size, the line it belongs to: its other entries where these differ within the case.

    An entry that goes along with the axis (rows kept of rows) is known by its share of it.
    """
    parts: list[list[str]] = [[] for _ in sizes]
    for name in varying(sizes):
        if name == axis:
            continue
        values = [size.get(name, 0) for size in sizes]
        shares = _shares(values, [size[axis] for size in sizes])
        words = [f"{name.replace('_', ' ')} {value}" for value in values]
        if len(set(shares)) < len(set(values)) and all(shares):
            words = [f"{name.replace('_', ' ')} {share} of {axis.replace('_', ' ')}" for share in shares]
        for part, word in zip(parts, words, strict=True):
            part.append(word)
    return [", ".join(part) for part in parts]


def _shares(values: Sequence[int], whole: Sequence[int]) -> list[str]:
    """Each value as a share of the whole, close ones alike: ``1/9``, ``2x``. Empty for a value of zero."""
    if any(value <= 0 for value in (*values, *whole)):
        return ["" for _ in values]
    logs = [math.log(value / total) for value, total in zip(values, whole, strict=True)]
    names: dict[float, str] = {}
    ordered = sorted(set(logs))
    start = 0
    for i, one in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] - one > SAME_SHARE:
            group = ordered[start : i + 1]
            share = math.exp(group[len(group) // 2])
            name = (
                "all" if abs(share - 1) < 0.02 else f"1/{1 / share:.2g}" if share < 1 else f"{share:.2g}{formats.TIMES}"
            )
            names.update(dict.fromkeys(group, name))
            start = i + 1
    return [names[one] for one in logs]


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
