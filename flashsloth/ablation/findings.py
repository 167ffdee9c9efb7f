"""What the runs say: means and spread of each variant, and differences over the same seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median, stdev
from typing import NamedTuple

from flashsloth.ablation.runs import Run, share
from flashsloth.ablation.variants import ATTENTION, AVERAGE, NONE, QUERIES, SHUFFLE

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_FIRST = (NONE, AVERAGE, SHUFFLE, ATTENTION, QUERIES, "layer", "queries", "window")


@dataclass(frozen=True)
class Group:
    """The runs of one variant.

    Attributes:
        mark: the letter it has in tables and in the plot.
        runs: by seed.
        seconds: to the first token, round by round; None where it was not measured.
    """

    mark: str
    runs: Mapping[int, Run]
    seconds: Sequence[float] | None = None

    @property
    def one(self) -> Run:
        """Any of them, for what does not depend on the seed."""
        return next(iter(self.runs.values()))

    @property
    def accuracies(self) -> list[float]:
        return [run.accuracy for run in self.runs.values()]

    @property
    def mean(self) -> float:
        return fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        return stdev(self.accuracies) if len(self.runs) > 1 else None

    @property
    def tokens(self) -> int:
        """Of the prompt that are spent on a picture: visual tokens and embedded queries."""
        return self.one.visual_tokens + self.one.queries

    def of_kind(self, kind: str) -> float | None:
        """Mean accuracy on one kind of question."""
        found = [share([run.scores[kind]]) for run in self.runs.values() if kind in run.scores]
        return fmean(found) if found else None


class Difference(NamedTuple):
    """Mean of the differences of two variants over the seeds both have, and the interval that holds it with 95 %.

    ``low`` and ``high`` are None for a single seed.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0: the difference cannot be told from none."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def groups(runs: Sequence[Run], seconds: Mapping[str, Sequence[float]] | None = None) -> list[Group]:
    """The runs by variant, in the order of the tables, seeds in order."""
    by_variant: dict[str, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: (_place(run.variant), run.seed)):
        by_variant.setdefault(run.variant, {})[run.seed] = run
    times = seconds or {}
    return [
        Group(_letter(number), found, times.get(variant)) for number, (variant, found) in enumerate(by_variant.items())
    ]


def paired(a: Group, b: Group) -> Difference | None:
    """Accuracy of ``a`` minus that of ``b``, seed by seed; None where they have no seed in common.

    The interval is that of Student's t: it covers what the seed changes (weights, order of the pictures, dropout), not
    which questions happen to be in the test, as these are the same for both.
    """
    seeds = [seed for seed in a.runs if seed in b.runs]
    if not seeds:
        return None
    found = [a.runs[seed].accuracy - b.runs[seed].accuracy for seed in seeds]
    mean = fmean(found)
    if len(found) < 2:
        return Difference(mean, None, None, 1)
    half = student(len(found) - 1) * stdev(found) / math.sqrt(len(found))
    return Difference(mean, mean - half, mean + half, len(found))


def times_over(a: Group, b: Group) -> tuple[float, float, float] | None:
    """Time to the first token of ``a`` over that of ``b``, each round by itself: 20th, 50th and 80th percentile.

    None where one of them was not measured. Rounds are compared, as a shared processor is now fast and now slow.
    """
    if a.seconds is None or b.seconds is None:
        return None
    ratios = sorted(one / other for one, other in zip(a.seconds, b.seconds, strict=True))
    last = len(ratios) - 1
    return ratios[round(0.2 * last)], median(ratios), ratios[round(0.8 * last)]


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t: a table, and beyond it the expansion around the normal one (within 1e-3)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def sentences(found: Sequence[Group]) -> list[str]:
    """Whether the paper's claims hold here, in words that follow from the numbers alone."""
    by_name = {group.one.variant: group for group in found}
    return [*_pooling(by_name), *_recovery(by_name), *_time(by_name)]


def _pooling(by_name: Mapping[str, Group]) -> list[str]:
    if ATTENTION not in by_name or AVERAGE not in by_name:
        return []
    difference = paired(by_name[ATTENTION], by_name[AVERAGE])
    if difference is None:
        return []
    verdict = {
        1: "Here attention pooling beats averaging.",
        0: "Here attention pooling cannot be told from averaging.",
        -1: "Here averaging beats attention pooling.",
    }[difference.sign]
    return [
        f"**Does attention pooling beat averaging?** At the same {by_name[ATTENTION].one.visual_tokens} tokens and "
        f"without queries its accuracy differs by {told(difference)}. {verdict}"
    ]


def _recovery(by_name: Mapping[str, Group]) -> list[str]:
    if not {NONE, ATTENTION, QUERIES} <= by_name.keys():
        return []
    loss = paired(by_name[NONE], by_name[ATTENTION])
    gain, gap = paired(by_name[QUERIES], by_name[ATTENTION]), paired(by_name[NONE], by_name[QUERIES])
    if loss is None or gain is None or gap is None:
        return []
    if loss.sign <= 0:
        verdict = "No loss can be told here, so there is nothing to recover"
        verdict += ", though queries help." if gain.sign > 0 else "."
    elif gain.sign <= 0:
        verdict = "Here the queries do not recover what compression loses."
    elif gap.sign > 0:
        verdict = f"Here the queries recover a part of it, {100 * gain.mean / loss.mean:.0f} %, and not all."
    else:
        verdict = "Here the queries recover what compression loses."
    none, less = by_name[NONE].one.visual_tokens, by_name[ATTENTION].one.visual_tokens
    return [
        f"**Do embedded queries recover what compression loses?** Without compression ({none} tokens) against "
        f"attention pooling ({less} tokens): {told(loss)}. With {by_name[QUERIES].one.queries} queries beside the "
        f"{less} tokens against without: {told(gain)}. Without compression against pooling and queries: {told(gap)}. "
        f"{verdict}"
    ]


def _time(by_name: Mapping[str, Group]) -> list[str]:
    if NONE not in by_name or QUERIES not in by_name:
        return []
    ratio = times_over(by_name[QUERIES], by_name[NONE])
    if ratio is None:
        return []
    flops = sum(by_name[QUERIES].one.flops.values()) / sum(by_name[NONE].one.flops.values())
    return [
        f"**What does it save?** With pooling and queries the first token takes {ratio[1]:.2f} of the time it takes "
        f"without compression, and {flops:.2f} of the flops."
    ]


def told(difference: Difference) -> str:
    """A difference in points, with its interval."""
    mean = f"{100 * difference.mean:+.1f} points"
    if difference.low is None or difference.high is None:
        return f"{mean} (one seed: no interval)"
    interval = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return f"{mean} (95 % interval {interval}, {difference.seeds} seeds)"


def _place(variant: str) -> tuple[int, int, str]:
    """Where a variant comes in the tables: by kind, then by number."""
    if variant in _FIRST[:5]:
        return _FIRST.index(variant), 0, variant
    kind, _, number = variant.rpartition("-")
    place = _FIRST.index(kind) if kind in _FIRST[5:] else len(_FIRST)
    return max(place, 5), int(number) if number.isdecimal() else 0, variant


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"A{_letter(number - 26)}"
