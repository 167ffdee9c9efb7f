"""The table of a run: ratios with what was to be reached, and never a ratio of something that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.case import Case
from bench.result import GoalResult, Result, Row


def render(result: Result, cases: Sequence[Case]) -> Group:
    """What is shown at the end of a run, or of a stored one."""
    titles = {case.name: case.title for case in cases}
    table = Table(title="The peer's time over ours, medians of pairs within this run", title_justify="left", box=SIMPLE)
    table.add_column("case")
    table.add_column("against")
    table.add_column("measured", justify="right")
    table.add_column("p20 to p80", justify="right")
    table.add_column("goal", justify="right")
    table.add_column("")
    last = None
    for row in result.rows:
        title = titles.get(row.case, row.case)
        for cells in _lines(row):
            table.add_row("" if row.case == last else title, *cells)
            last = row.case
    parts: list[Table | Text] = [Text(_heading(result.header)), table]
    parts += [
        Text(f"{row.case}: {row.provider}: check failed: {row.failure}", style="bold red") for row in result.failed
    ]
    parts.append(Text(_summary(result)))
    return Group(*parts)


def _heading(header: Mapping[str, object]) -> str:
    backends = header["backends"]
    assert isinstance(backends, dict)
    served = ", ".join(f"{op}: {name}" for op, name in backends.items())
    lines = [
        f"{header['device']}, {header['threads']} threads, kernels for {header['isa'] or 'none'}",
        f"torch {header['torch']}, fp32; served by {served}",
    ]
    if header["small"]:
        lines.append("small sizes: these numbers say nothing of speed")
    return "\n".join(lines)


def _lines(row: Row) -> list[tuple[str | Text, ...]]:
    if not row.check_passed:
        return [(row.provider, Text("check failed", style="bold red"), "", "", "")]
    variant = row.provider.partition(", ")[2]
    prefix = f"{variant}: " if variant else ""
    goals = {goal.peer: goal for goal in row.goals}
    lines: list[tuple[str | Text, ...]] = []
    for goal in row.goals:
        if goal.kind == "kept":
            lines.append((f"{prefix}of the {goal.peer}", f"{goal.measured:.4f}", "", *_goal(goal)))
        elif goal.kind == "overhead":
            spread = row.ratios[goal.peer]
            between = f"{1 / spread['p80']:.2f} to {1 / spread['p20']:.2f}"
            lines.append((f"{prefix}time over {goal.peer}", f"{goal.measured:.2f}", between, *_goal(goal)))
    for peer, spread in row.ratios.items():
        found = goals.get(peer)
        if found is not None and found.kind != "speedup":
            continue
        between = f"{spread['p20']:.2f} to {spread['p80']:.2f}"
        end = _goal(found) if found is not None else ("", "")
        lines.append((f"{prefix}{peer}", f"{spread['p50']:.2f}x", between, *end))
    return lines


def _goal(goal: GoalResult) -> tuple[str, Text]:
    limit = f"≥ {goal.at_least:.3g}" if goal.at_least is not None else f"≤ {goal.at_most:.3g}"
    return limit, Text("reached", style="green") if goal.reached else Text("missed", style="bold yellow")


def _summary(result: Result) -> str:
    goals = [goal for row in result.rows for goal in row.goals]
    reached = sum(goal.reached for goal in goals)
    text = f"{reached} of {len(goals)} goals reached" if goals else "no goals at these sizes"
    if result.failed:
        text += f"; {len(result.failed)} checks failed, so those results have no ratio"
    return text
