"""The table of a run: ours against every peer, with what was to be reached, and never a ratio of something wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.case import OURS, Case
from bench.result import GoalResult, Result, Row
from bench.runner import METHODS, best_of


def render(result: Result, cases: Sequence[Case]) -> Group:
    """What is shown at the end of a run, or of a stored one."""
    titles = {case.name: case for case in cases}
    gpu = result.header["kind"] == "cuda"
    table = Table(title="The peer's time over ours, medians of pairs within this run", title_justify="left", box=SIMPLE)
    for name, justify in (("case", "left"), ("ours", "left"), ("against", "left"), ("ratio", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("p20 to p80", justify="right")
    table.add_column("goal", justify="right")
    table.add_column("")
    for point in dict.fromkeys(row.point for row in result.rows if row.op != "e2e"):
        rows = [row for row in result.rows if row.point == point]
        title = _title(rows[0], titles.get(rows[0].case))
        for cells in _lines(rows, METHODS[result.header["kind"]][0], gpu):
            table.add_row(title, *cells)
            title = ""
    parts: list[Table | Text] = [Text(heading(result.header)), *([table] if table.row_count else [])]
    parts += [
        Text(f"{row.case}: {row.provider}: check failed: {row.failure}", style="bold red") for row in result.failed
    ]
    parts += [Text(line, style="dim") for line in missing(result)]
    parts.append(Text(summary(result)))
    return Group(*parts)


def of_models(rows: Sequence[Row]) -> Group:
    """Whole models, a line an image and batch: speed, then memory and training. On a CPU they are small, for a test."""
    from bench.e2e.summary import HEADINGS
    from bench.e2e.summary import table as lines

    _, found = lines(rows)
    point, speed = HEADINGS[:3], HEADINGS[3:12]
    tables = []
    for title, names in (("Whole models with random weights", speed), ("Memory and training", HEADINGS[12:])):
        table = Table(title=title, title_justify="left", box=SIMPLE)
        for name in (*point, *names):
            table.add_column(name, no_wrap=name == "model", justify="right" if name in speed else "left")
        for cells in found:
            table.add_row(*(cell for name, cell in zip(HEADINGS, cells, strict=True) if name in (*point, *names)))
        tables.append(table)
    return Group(*tables)


def heading(header: Mapping[str, object]) -> str:
    """The machine and the versions, in a few lines."""
    backends = header["backends"]
    assert isinstance(backends, dict)
    served = "; an automatic choice takes " + ", ".join(f"{op}: {name}" for op, name in backends.items())
    lines = [f"{header['device']}, {header['threads']} threads, kernels for {header['isa'] or 'none'}"]
    if header["kind"] == "cuda":
        ceilings = header["ceilings"]
        assert isinstance(ceilings, dict)
        lines = [f"{header['device']}, driver {header['driver']}, triton {header['triton']}, CUDA {header['cuda']}"]
        if ceilings:
            copy, product = ceilings["bytes_per_second"] / 1e12, ceilings["flops_per_second"] / 1e12
            lines.append(f"measured here: copy {copy:.2f} TB/s, product {product:.0f} TFLOP/s")
    lines.append(f"torch {header['torch']}{served if backends else ''}")
    if header["dirty"]:
        lines.append("with uncommitted changes: these numbers belong to no commit")
    if header["small"]:
        lines.append("small sizes: these numbers say nothing of speed")
    return "\n".join(lines)


def _title(row: Row, case: Case | None) -> str:
    title = case.title if case is not None else row.case
    if case is None or not case.axis:
        return title
    differing = [name for name in row.size if len({size.get(name) for size in case.sizes}) > 1]
    return f"{title}: {', '.join(f'{name} {row.size[name]}' for name in differing)}"


def _lines(rows: Sequence[Row], method: str, gpu: bool) -> list[tuple[str | Text, ...]]:
    lines: list[tuple[str | Text, ...]] = []
    for variant in dict.fromkeys(row.variant for row in rows if row.ours):
        best = best_of(rows, variant, method)
        if best is None:
            continue
        name = best.provider.removeprefix(f"{OURS}/")
        if best.p50 is not None and gpu:
            share = f"{100 * best.share:.0f} % of the limit" if best.share is not None else ""
            lines.append((name, seconds(best.p50), share, "", "", ""))
            name = ""
        for cells in _compared(best, rows):
            lines.append((name, *cells))
            name = ""
    for row in rows:
        if row.failure is not None and row.method == method:
            lines.append((row.provider, Text("check failed", style="bold red"), "", "", "", ""))
    return lines


def _compared(best: Row, rows: Sequence[Row]) -> list[tuple[str | Text, ...]]:
    """Lines of one of ours: goals that are no speedup, then every peer, with its goal where it has one."""
    by_peer: dict[str, list[GoalResult]] = {}
    lines: list[tuple[str | Text, ...]] = []
    for goal in best.goals:
        if goal.kind != "speedup":
            lines.append((_what(goal), "" if goal.measured is None else _value(goal), "", *_judged(goal)))
        else:
            by_peer.setdefault(_hardest(goal, best, rows), []).append(goal)
    for peer, spread in best.ratios.items():
        if peer.startswith(f"{OURS}/") and peer not in by_peer:
            continue
        cells = (peer, f"{spread['p50']:.2f}x", f"{spread['p20']:.2f} to {spread['p80']:.2f}")
        goals = by_peer.pop(peer, [])
        lines.append((*cells, *(_judged(goals[0]) if goals else ("", ""))))
        lines += [("", "", "", *_judged(goal)) for goal in goals[1:]]
    lines += [(" or ".join(goal.peers), "", "", *_judged(goal)) for goals in by_peer.values() for goal in goals]
    return lines


def _hardest(goal: GoalResult, best: Row, rows: Sequence[Row]) -> str:
    """The peer that decides a goal: the fastest of those it names."""
    named = [r.provider for r in rows if r.provider in goal.peers or (r.ours and r.variant in goal.peers)]
    measured = [name for name in named if name in best.ratios]
    return min(measured, key=lambda name: best.ratios[name]["p50"]) if measured else "/".join(goal.peers)


def _what(goal: GoalResult) -> str:
    if goal.kind == "overhead":
        return f"time over {' or '.join(goal.peers)}"
    return {"seconds": "time", "share": "share of the limit", "kept": "kept for backward, of the hidden layer"}[
        goal.kind
    ]


def _value(goal: GoalResult) -> str:
    assert goal.measured is not None
    if goal.kind == "seconds":
        return seconds(goal.measured)
    return f"{100 * goal.measured:.0f} %" if goal.kind == "share" else f"{goal.measured:.4g}"


def _judged(goal: GoalResult) -> tuple[str, Text]:
    least = goal.kind in ("speedup", "share")
    shown = seconds(goal.limit) if goal.kind == "seconds" else f"{goal.limit:.3g}"
    limit = f"{'≥' if least else '≤'} {shown}"
    if goal.reached is None:
        return limit, Text("unmeasured", style="dim")
    return limit, Text("reached", style="green") if goal.reached else Text("missed", style="bold yellow")


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    return f"{value * 1e6:.1f} us" if value < 1e-3 else f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def missing(result: Result) -> list[str]:
    """What could not run here, by reason; ours on other devices are not missed."""
    reasons: dict[str, list[str]] = {}
    for row in result.rows:
        if row.missing is not None and not (row.ours and row.missing.startswith("made for")):
            what = row.provider if " flops, more than" not in row.missing else f"{row.case} at its largest sizes"
            reason = row.missing if " flops, more than" not in row.missing else "more work than is asked of this device"
            reasons.setdefault(reason, []).append(what)
    return [f"not measured: {', '.join(dict.fromkeys(who))}: {reason}" for reason, who in reasons.items()]


def summary(result: Result) -> str:
    """How many goals were reached, and how many results have no ratio because they were wrong."""
    goals = [goal for row in result.rows for goal in row.goals]
    text = (
        f"{sum(bool(g.reached) for g in goals)} of {len(goals)} goals reached" if goals else "no goals at these sizes"
    )
    unmeasured = sum(goal.reached is None for goal in goals)
    if unmeasured:
        text += f", {unmeasured} unmeasured"
    if result.failed:
        text += f"; {len(result.failed)} checks failed, so those results have no ratio"
    return text
