"""What is compared: for a case at a size, the fastest of our backends that is right, and each peer that is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from bench.report.sizes import label, lines_of, sizes_of, varying
from bench.result import Result, Row
from bench.timing import Quantiles

END_TO_END = "e2e"
OURS_PREFIX = "flashsloth/"
REFERENCE = "reference"
METHOD_ORDER = ("graph", "call", "wall")


class Declared(Protocol):
    """What the report reads of a declared case."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def axis(self) -> str: ...


class Against(NamedTuple):
    """A peer that passed its check, and its time over ours."""

    peer: Row
    ratio: Quantiles


@dataclass(frozen=True)
class Point:
    """A case at a size, timed one way, for one use of our op.

    Attributes:
        title: of the case, with the variant of ours.
        label: what tells the size from others of the case; empty where there is one.
        axis, line: of a curve the entry along which it runs, and which line of the case it is; empty elsewhere.
        ours: the fastest of our backends that passed; None where none did.
        backends: all of ours that passed, fastest first; the reference is not among them.
        against: the peers that passed.
        failed: rows of this point that failed: ours of this variant, and peers.
        measure: whether this use of ours only serves to measure another one by, as goals say (without the extra
            output whose cost is asked for); then it is no finding of its own.
    """

    case: str
    op: str
    title: str
    label: str
    size: Mapping[str, int]
    axis: str
    line: str
    dtype: str
    mode: str
    method: str
    variant: str
    ours: Row | None
    backends: tuple[Row, ...]
    against: tuple[Against, ...]
    failed: tuple[Row, ...]
    measure: bool

    @property
    def fastest(self) -> Against | None:
        """The peer that is hardest to beat."""
        return min(self.against, key=lambda one: one.ratio.p50, default=None)

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.label}" if self.label else self.title


class Cases:
    """Titles and axes of declared cases; a case of another commit is known by its name alone."""

    def __init__(self, declared: Sequence[Declared]) -> None:
        self._declared = {case.name: case for case in declared}

    def title(self, case: str) -> str:
        found = self._declared.get(case)
        return found.title if found else case

    def axis(self, case: str, sizes: Sequence[Mapping[str, int]]) -> str:
        """The entry along which the sizes of a case run; of an unknown case the one that differs, if it is one."""
        found = self._declared.get(case)
        if found is not None:
            return found.axis
        differing = varying(sizes)
        return differing[0] if len(differing) == 1 else ""


def largest(found: Sequence[Point]) -> list[Point]:
    """Of every curve the point at its end, and all other points."""
    ends: dict[tuple[str, ...], Point] = {}
    for point in found:
        key = (point.title, point.line if point.axis else point.label, point.dtype, point.mode)
        held = ends.get(key)
        if held is None or (point.axis and point.size[point.axis] > held.size[point.axis]):
            ends[key] = point
    return list(ends.values())


def backend(row: Row) -> str:
    """The backend of one of ours, from ``flashsloth/<backend>, <variant>``."""
    return row.provider.partition(",")[0].partition("/")[2]


def is_product(row: Row) -> bool:
    """Whether a row is one of ours that people use; the reference is the specification and is not."""
    return row.ours and backend(row) != REFERENCE


def methods(rows: Sequence[Row]) -> list[str]:
    """The ways of timing that occur, the one that shows the kernels first."""
    found = dict.fromkeys(row.method for row in rows)
    return sorted(found, key=lambda name: METHOD_ORDER.index(name) if name in METHOD_ORDER else len(METHOD_ORDER))


def operations(rows: Sequence[Row]) -> list[Row]:
    """Rows of single ops: all but those of whole models."""
    return [row for row in rows if row.op != END_TO_END]


def points(result: Result, cases: Cases) -> list[Point]:
    """All points of a result in the order of the file, each by each method and variant of ours."""
    rows = operations(result.rows)
    sizes = sizes_of(rows)
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.point, row.method), []).append(row)
    found = []
    for group in groups.values():
        variants = dict.fromkeys(row.variant for row in group if is_product(row))
        for variant in variants:
            found.append(_point(group, variant, sizes[group[0].case], cases))
    return [point for point in found if point.ours is not None or point.failed]


def _point(group: Sequence[Row], variant: str, sizes: Sequence[Mapping[str, int]], cases: Cases) -> Point:
    first = group[0]
    mine = [row for row in group if is_product(row) and row.variant == variant]
    right = sorted((row for row in mine if row.passed and row.p50 is not None), key=lambda row: row.p50 or 0.0)
    best = right[0] if right else None
    peers = {row.provider: row for row in group if not row.ours}
    against = []
    for name, found in (best.ratios if best else {}).items():
        peer = peers.get(name)
        if peer is not None and peer.passed:
            against.append(Against(peer, Quantiles(found["p20"], found["p50"], found["p80"])))
    title, axis = cases.title(first.case), cases.axis(first.case, sizes)
    if not all(axis in size for size in sizes):
        axis = ""
    line = lines_of(sizes, axis)[sizes.index(first.size)] if axis else ""
    return Point(
        case=first.case,
        op=first.op,
        title=f"{title}, {variant}" if variant else title,
        label=label(first.size, sizes, axis, line),
        size=first.size,
        axis=axis,
        line=line,
        dtype=first.dtype,
        mode=first.mode,
        method=first.method,
        variant=variant,
        ours=best,
        backends=tuple(right),
        against=tuple(against),
        measure=bool(variant) and any(variant in goal.peers for row in group for goal in row.goals),
        failed=tuple(row for row in (*mine, *peers.values()) if row.failure is not None),
    )
