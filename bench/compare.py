"""Two results of one device, row by row: how long ours takes in the one over how long it takes in the other.

On a GPU times are compared. A time on a CPU says little about another run's, so there ours is first divided by what the
plain peers took in the same round (their geometric mean, so that the noise of one peer counts little), and these ratios
are compared.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.result import Result, Row
from bench.statistics import FEWEST, Array, Estimate, centre, combined, known

Key = tuple[str, ...]  # as Row.key: case, size, dtype, mode, provider, method

METHOD = {"cpu": "wall", "cuda": "graph"}  # the way of timing that is compared on a kind of device

# What a run as a whole is off by, as the standard deviation of a logarithm; see docs/bench.md.
RUN_TO_RUN = {"cpu": 0.02, "cuda": 0.01}


class View:
    """A result, with its rows by key, and which of them are compared."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.kind: str = result.header["kind"]
        self.rows = {row.key: row for row in result.rows}
        self.ours = [row.key for row in result.rows if self._compared(row) and row.passed and row.samples]

    def _compared(self, row: Row) -> bool:
        """Ours, timed as it is compared; the speed of the reference promises nothing."""
        return row.ours and row.method == METHOD[self.kind] and not row.provider.startswith("flashsloth/reference")

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
        _same_device(old, view)
    views = [old, *new]
    if any(key not in view.ours for view in views):
        return "it has no time in one of the runs"
    peers = sorted(set.intersection(*(set(view.peers(key)) for view in views)))
    if old.kind == "cpu" and not peers:
        return "no plain peer was measured in both runs, and times of a CPU say nothing by themselves"
    fewest = min(len(view.rows[key].samples) for view in views)
    if fewest < FEWEST:
        return f"expected at least {FEWEST} rounds in each run, got {fewest}"
    return over([centre(view.logs(key, peers)) for view in new], centre(old.logs(key, peers)), RUN_TO_RUN[old.kind])


def over(new: Sequence[Estimate], old: Estimate, run_to_run: float) -> Estimate:
    """The mean of the new runs over the old one; each is off as a whole by a standard deviation of ``run_to_run``."""
    share = 1 / len(new)
    offsets = known(np.full_like(old.log, run_to_run**2 * (1 + share)))
    return combined([*((share, one) for one in new), (-1.0, old), (1.0, offsets)])


def _same_device(old: View, new: View) -> None:
    for name in ("slug", "small"):
        before, now = (view.result.header[name] for view in (old, new))
        if before != now:
            raise ValueError(f"{name}: expected two results of the same, got {before!r} and {now!r}")


@dataclass(frozen=True)
class Line:
    """One provider at one size of a case: B over A, or why there is no ratio."""

    key: Key
    ratio: Estimate | None
    note: str = ""


def results(a: Result, b: Result) -> list[Line]:
    """B over A for everything that both hold, and what only one holds.

    Raises:
        ValueError: they are of different devices, or one is of small sizes.
    """
    first, second = View(a), View(b)
    _same_device(first, second)
    lines = []
    for key in dict.fromkeys([*_shown(first), *_shown(second)]):
        one, other = first.rows.get(key), second.rows.get(key)
        if one is None or other is None:
            lines.append(Line(key, None, "only in A" if other is None else "only in B"))
        elif not one.passed or not other.passed:
            lines.append(Line(key, None, "; ".join(_reasons(one, other))))
        else:
            found = slowdown(first, [second], key)
            lines.append(Line(key, None, found) if isinstance(found, str) else Line(key, found))
    return lines


def _shown(view: View) -> list[Key]:
    return [row.key for row in view.result.rows if view._compared(row)]


def _reasons(a: Row, b: Row) -> list[str]:
    found = []
    for name, row in (("A", a), ("B", b)):
        if row.failure is not None:
            found.append(f"check failed in {name}: {row.failure}")
        elif row.missing is not None:
            found.append(f"missing in {name}: {row.missing}")
    return found


def render(lines: Sequence[Line], title: str) -> Group:
    """The table of a comparison, and what has no ratio below it."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("case", "size", "mode", "provider"):
        table.add_column(name)
    table.add_column("B / A", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("")
    for line in lines:
        if line.ratio is not None:
            case, size, _, mode, provider, _ = line.key
            table.add_row(case, size, mode, provider, f"{line.ratio.ratio:.3f}", span(line.ratio), tendency(line.ratio))
    notes = [Text(f"{label(line.key)}: {line.note}", style="yellow") for line in lines if line.ratio is None]
    return Group(table, *notes)


def tendency(ratio: Estimate) -> Text:
    """In a word, where the interval does not hold 1."""
    low, high = ratio.interval()
    if low > 1:
        return Text("B slower", style="red")
    return Text("B faster", style="green") if high < 1 else Text("")


def label(key: Key) -> str:
    """A key as a person reads it."""
    case, size, dtype, mode, provider, _ = key
    return f"{case} ({size}; {dtype}, {mode}), {provider}"


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
