"""What the first screen says: how much faster, than what, is it right, and are the goals reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from bench.report import formats
from bench.report.collect import Device
from bench.report.points import Against, Point, methods
from bench.result import GoalResult, Result, Row


class Checks(NamedTuple):
    """Results of this run that were right, those that were not, and those that could not be had."""

    passed: int
    failed: int
    missing: int


class JudgedGoal(NamedTuple):
    row: Row
    goal: GoalResult

    @property
    def state(self) -> str:
        return {None: "unmeasured", True: "reached", False: "missed"}[self.goal.reached]


@dataclass(frozen=True)
class Opponent:
    """All measurements of a use of an op against one peer, by the method that shows the kernels.

    ``failed``: how many of them have no ratio because the peer's or all of our results were wrong.
    """

    op: str
    variant: str
    peer: str
    found: tuple[tuple[Point, Against], ...]
    failed: int

    @property
    def use(self) -> str:
        return self.op.replace("_", " ") + (f", {self.variant}" if self.variant else "")

    @property
    def median(self) -> float:
        return median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        return [against.ratio.p50 for _, against in self.found]


def checks(result: Result) -> Checks:
    """Counts a result once, however many ways it was timed."""
    state: dict[tuple[str, ...], str] = {}
    for row in result.rows:
        key = (*row.point, row.provider)
        now = "failed" if row.failure is not None else "missing" if row.missing is not None else "passed"
        state[key] = "failed" if "failed" in (now, state.get(key)) else now
    found = list(state.values())
    return Checks(found.count("passed"), found.count("failed"), found.count("missing"))


def goals(result: Result) -> list[JudgedGoal]:
    """All goals, those missed first, then those unmeasured. A goal of a wrong result is not reached by it."""
    order = ("missed", "unmeasured", "reached")
    found = [
        JudgedGoal(row, goal if row.passed else GoalResult(goal.kind, goal.limit, goal.peers, None, None))
        for row in result.rows
        for goal in row.goals
    ]
    return sorted(found, key=lambda one: order.index(one.state))


def first_method(found: Sequence[Point]) -> list[Point]:
    """The points timed by the method that shows the kernels: replays on a GPU."""
    names = methods([point.ours for point in found if point.ours is not None])
    return [point for point in found if not names or point.method == names[0]]


def findings(found: Sequence[Point]) -> list[Point]:
    """What the first screen counts: each point once, and none that only serves to measure another."""
    return [point for point in first_method(found) if not point.measure]


def opponents(found: Sequence[Point]) -> list[Opponent]:
    """Every use of an op against every peer; uses in the order of the file."""
    held: dict[tuple[str, str], dict[str, list[tuple[Point, Against]]]] = {}
    failed: Counter[tuple[str, str, str]] = Counter()
    for point in findings(found):
        peers = held.setdefault((point.op, point.variant), {})
        for against in point.against:
            peers.setdefault(against.peer.provider, []).append((point, against))
        for row in point.failed:
            if not row.ours:
                peers.setdefault(row.provider, [])
                failed[point.op, point.variant, row.provider] += 1
    return [
        Opponent(op, variant, peer, tuple(measured), failed[op, variant, peer])
        for (op, variant), peers in held.items()
        for peer, measured in peers.items()
    ]


def headline(device: Device, found: Sequence[Point]) -> tuple[str, str]:
    """The finding in a sentence, and what it is over."""
    beside = [(point, point.fastest) for point in findings(found)]
    ratios = [fastest.ratio.p50 for _, fastest in beside if fastest is not None]
    if not ratios:
        return f"No speedup to show on {device.name}", _why_none(device)
    middle, low, high = median(ratios), min(ratios), max(ratios)
    if len(ratios) == 1:
        over = "One measurement"
    else:
        over = f"Median of {len(ratios)} measurements, which range from {formats.number(low)} to {formats.number(high)}"
    slower = sum(value < 1 for value in ratios)
    tail = f"; slower than it at {slower}" if slower else ""
    if middle >= 1:
        said = f"{formats.number(middle)} times as fast as the fastest peer"
    else:
        said = f"Slower than the fastest peer: {formats.number(middle)} times its speed"
    return said, f"{over}{tail}. Each is compared with whichever peer was fastest there."


def _why_none(device: Device) -> str:
    state = checks(device.current)
    if state.failed and not state.passed:
        return "Every result failed its check in this run."
    return "No peer that passed its check stands beside one of ours in this run."
