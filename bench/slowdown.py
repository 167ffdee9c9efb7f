"""How much slower ours was in one run than in another on the same device, and how sure that is.

On a GPU times are compared. A time on a CPU says little about another run's, so there ours is first divided by what the
plain peers took in the same round (their geometric mean, so that the noise of one peer counts little), and these ratios
are compared.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.case import OURS
from bench.result import Result, Row
from bench.runner import METHODS
from bench.statistics import FEWEST, Array, Estimate, centre, combined, known

Key = tuple[str, ...]  # as Row.key: case, size, dtype, mode, provider, method

WHOLE_MODELS = "e2e"  # Row.op of bench.e2e

# What a run as a whole is off by beside the noise in it, as the standard deviation of a logarithm. Two processes with
# identical code differed by 1.4 % on two CPU cores (root mean square over seven cases): 1 % each. Assumed for GPUs too.
RUN_TO_RUN = 0.01


class View:
    """A result, with its rows by key, and which of them are compared."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.kind: str = result.header["kind"]
        self.rows = {row.key: row for row in result.rows}
        self.ours = [row.key for row in result.rows if self.compared(row) and row.passed and row.samples]

    def compared(self, row: Row) -> bool:
        """Ours, timed as it is compared. The reference promises no speed; whole models are small on a CPU."""
        if row.op == WHOLE_MODELS:
            return row.ours and self.kind == "cuda"
        return row.ours and row.method == METHODS[self.kind][0] and not row.provider.startswith(f"{OURS}/reference")

    def peers(self, key: Key) -> dict[str, Row]:
        """Plain peers timed in the same rounds as this row of ours."""
        ours = self.rows[key]
        return {
            row.provider: row
            for row in self.result.rows
            if row.point == ours.point
            and row.method == ours.method
            and not row.ours
            and row.passed
            and len(row.samples) == len(ours.samples)
        }

    def logs(self, key: Key, peers: Sequence[str]) -> Array:
        """Logarithms of what is compared, round by round."""
        ours = np.log(self.rows[key].samples)
        if self.kind == "cuda":
            return ours
        beside = self.peers(key)
        return ours - np.mean([np.log(beside[name].samples) for name in peers], axis=0)


def slowdown(old: View, new: Sequence[View], key: Key) -> Estimate | str:
    """Ours in the mean of the ``new`` runs over ours in the old one; or why that cannot be said.

    Raises:
        ValueError: the results are of different devices.
    """
    for view in new:
        same_device(old, view)
    views = [old, *new]
    if any(key not in view.ours for view in views):
        return "it has no time in one of the runs"
    peers = sorted(set.intersection(*(set(view.peers(key)) for view in views)))
    if old.kind == "cpu" and not peers:
        return "no plain peer was measured in both runs, and times of a CPU say nothing by themselves"
    fewest = min(len(view.rows[key].samples) for view in views)
    if fewest < FEWEST:
        return f"expected at least {FEWEST} rounds in each run, got {fewest}"
    return over([centre(view.logs(key, peers)) for view in new], centre(old.logs(key, peers)))


def over(new: Sequence[Estimate], old: Estimate, run_to_run: float = RUN_TO_RUN) -> Estimate:
    """The mean of the new runs over the old one; each is off as a whole by a standard deviation of ``run_to_run``."""
    share = 1 / len(new)
    offsets = known(np.full_like(old.log, run_to_run**2 * (1 + share)))
    return combined([*((share, one) for one in new), (-1.0, old), (1.0, offsets)])


def same_device(old: View, new: View) -> None:
    for name in ("slug", "small"):
        before, now = (view.result.header[name] for view in (old, new))
        if before != now:
            raise ValueError(f"{name}: expected two results of the same, got {before!r} and {now!r}")


@dataclass(frozen=True)
class Line:
    """One provider at one size of a case: B over A, or why there is no ratio; ``failed``: that is an error of ours."""

    key: Key
    ratio: Estimate | None
    note: str = ""
    failed: bool = False


def label(key: Key) -> str:
    """A key as a person reads it."""
    case, size, dtype, mode, provider, _ = key
    return f"{case} ({size}; {dtype}, {mode}), {provider}"


def short_sizes(keys: Iterable[Key]) -> dict[Key, str]:
    """The size of each, as far as others of its case have another one: what a table needs to tell them apart."""
    listed = list(keys)
    entries = {key: key[1].split() for key in listed}
    common: dict[str, set[str]] = {}
    for key in listed:
        common[key[0]] = common.get(key[0], set(entries[key])) & set(entries[key])
    return {key: " ".join(entry for entry in entries[key] if entry not in common[key[0]]) for key in listed}


def span(ratio: Estimate) -> str:
    low, high = ratio.interval()
    return f"{low:.3f} to {high:.3f}"


def times(count: int) -> str:
    return {1: "one run", 2: "two runs", 3: "three runs"}.get(count, f"{count} runs")


def matches(name: str, pattern: str | None) -> bool:
    """Whether a case's name contains the pattern, or matches it with ``*`` and ``?``."""
    return pattern is None or pattern in name or fnmatch.fnmatch(name, pattern)


def percent(text: str) -> float:
    """The share of ``5%`` or ``5``: 0.05."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", text.strip())
    share = float(found.group(1)) / 100 if found else -1.0
    if not 0 <= share <= 10:
        raise argparse.ArgumentTypeError(f"expected a percentage such as 5%, got {text!r}")
    return share
