"""How time grows with the work: the exponent of a curve, and whether it is steeper than the work.

The exponent is the slope of log time over log work. It is the median of the slopes of all pairs of points (Theil and
Sen), so one bad point does not move it. Its interval holds the true slope with at least 90 % confidence whatever the
distribution of the errors (Sen 1968, from Kendall's rank statistic, exact for few points); it takes four points.

Short calls measure the launch and not the work, and would make any curve look flat. So a fit begins where the time
starts to follow the work: at the first point from which it grows at least with the square root of the work.

A curve is steeper than the work where the whole interval lies above 1.05. The margin of 0.05 is a growth of 26 % beyond
the work over a hundredfold range: less is a cache that got too small, not another algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

MARGIN = 0.05
FLOOR_SLOPE = 0.5
CONFIDENCE = 0.9


class Measured(NamedTuple):
    """A point of a curve: the work, in any unit, and the time, in any unit."""

    work: float
    time: float


@dataclass(frozen=True)
class Fit:
    """The exponent of a curve.

    Attributes:
        exponent: None where fewer than two points differ in work.
        low, high: its interval, None with fewer than four points.
        used, given: points beyond the launch floor, and all of them.
        floored: whether no part of the curve follows the work; all points were fitted then.
    """

    exponent: float | None
    low: float | None
    high: float | None
    used: int
    given: int
    floored: bool = False

    @property
    def steep(self) -> bool:
        """Whether the curve is steeper than the work, beyond doubt and beyond the margin."""
        return self.low is not None and not self.floored and self.low > 1 + MARGIN

    def __str__(self) -> str:
        if self.exponent is None:
            return "one point, no slope"
        text = f"{self.exponent:.2f}"
        if self.low is not None and self.high is not None:
            text += f" ({self.low:.2f} to {self.high:.2f})"
        if self.floored:
            return f"{text}, launch floor throughout"
        return text if self.used == self.given else f"{text}, last {self.used} of {self.given} points"


def fit(points: Sequence[Measured]) -> Fit:
    """Fit the exponent. Points of equal work count as one, with their median time.

    Raises:
        ValueError: a work or a time that is not positive and finite.
    """
    for point in points:
        if not all(math.isfinite(value) and value > 0 for value in point):
            raise ValueError(f"points: expected positive work and time, got {tuple(point)}")
    times: dict[float, list[float]] = {}
    for work, time in points:
        times.setdefault(work, []).append(time)
    curve = [(math.log(work), math.log(median(found))) for work, found in sorted(times.items())]
    start = _beyond_floor(curve)
    beyond = curve if start is None else curve[start:]
    slopes = sorted(_slope(a, b) for i, a in enumerate(beyond) for b in beyond[i + 1 :])
    if not slopes:
        return Fit(None, None, None, len(beyond), len(curve))
    cut = _trimmed(len(beyond))
    low, high = (None, None) if cut is None else (slopes[cut], slopes[-1 - cut])
    return Fit(median(slopes), low, high, len(beyond), len(curve), start is None)


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _beyond_floor(curve: Sequence[tuple[float, float]]) -> int | None:
    """The first point from which time follows work; None where it never does."""
    if len(curve) < 2:
        return 0
    steps = (_slope(a, b) for a, b in pairwise(curve))
    return next((i for i, slope in enumerate(steps) if slope >= FLOOR_SLOPE), None)


def _trimmed(count: int) -> int | None:
    """How many slopes to drop at each end for the narrowest interval of enough confidence; None for too few points.

    Were the slope known, the pairs that lie below it would be the inversions of a random order: of the orders of
    ``count`` things, how many have how many inversions is counted here.
    """
    orders = [1]
    for size in range(2, count + 1):
        orders = [
            sum(orders[i - shift] for shift in range(size) if 0 <= i - shift < len(orders))
            for i in range(len(orders) + size - 1)
        ]
    total, outside, cut = sum(orders), 0, None
    for dropped, number in enumerate(orders):
        outside += number
        if 1 - 2 * outside / total < CONFIDENCE:
            break
        cut = dropped
    return cut
