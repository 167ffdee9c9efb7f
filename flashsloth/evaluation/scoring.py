"""Right or wrong, and how sure a share of right answers is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_Z95 = 1.959963984540054  # of a normal distribution, 95 % lies within so many deviations


def normalise(text: str) -> str:
    """What two answers are compared by, and all that is forgiven: runs of white space count as one space and none
    counts at the ends, upper case is lower case, and one full stop at the end is left out."""
    joined = " ".join(text.split()).casefold()
    return joined[:-1].rstrip() if joined.endswith(".") and not joined.endswith("..") else joined


def matches(got: str, expected: str) -> bool:
    """Exact match of the normalised texts."""
    return normalise(got) == normalise(expected)


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of Wilson's score for a share: (0, 1) where nothing was counted.

    Raises:
        ValueError: numbers of which no share can be taken.
    """
    if not 0 <= correct <= count:
        raise ValueError(f"correct: expected 0 to count = {count}, got {correct}")
    if count == 0:
        return 0.0, 1.0
    share, spread = correct / count, _Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    # At the ends the interval touches 0 or 1; rounding must not move it away.
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == count else middle + half)


@dataclass(frozen=True)
class Score:
    """``correct`` of ``count`` questions."""

    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """0 to 1; NaN where nothing was asked."""
        return self.correct / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.count)

    def __add__(self, other: Score) -> Score:
        return Score(self.correct + other.correct, self.count + other.count)


def score_kinds(marked: Iterable[tuple[str, bool]]) -> dict[str, Score]:
    """The score of each kind, in alphabetical order, from pairs (kind, right)."""
    scores: dict[str, Score] = {}
    for kind, right in marked:
        scores[kind] = scores.get(kind, Score(0, 0)) + Score(int(right), 1)
    return dict(sorted(scores.items()))
