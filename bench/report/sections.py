"""The sections of a page about single ops; each is None where there is nothing to say."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import charts, curves, formats, tables
from bench.report.content import Content
from bench.report.curves import Curve
from bench.report.html import Markup, joined, tag
from bench.report.plots import MARKS, OURS, Line, Panel
from bench.report.points import Point, largest, methods
from bench.report.summary import first_method
from bench.report.tables import Table
from bench.timing import Quantiles

FEW = 2  # sizes that are shown as rows of a chart; of more, a curve is drawn

# ---- speedup by size ----


def speedup(content: Content) -> Markup | None:
    found = content.points
    if not found:
        return None
    scale, looks = charts.speedup_scale(found), peer_looks(found)
    names = methods([point.ours for point in found if point.ours is not None])
    rows, panels = [], []
    for title in dict.fromkeys(point.title for point in found):
        own = [point for point in found if point.title == title]
        span = [value for p in found if p.case == own[0].case for one in p.against for value in one.ratio]
        if own[0].axis and len({point.size[own[0].axis] for point in own}) > FEW:
            for line in dict.fromkeys(point.line for point in own):
                panels.append(_ratio_panel([p for p in own if p.line == line], names, looks, span))
        else:
            several = len({point.label for point in own}) > 1
            peers = charts.peers_of(own)
            legend = charts.key(*((looks[peer], peer, False) for peer in peers)) if several and len(peers) > 1 else None
            against = tag("p", tag("small", f"against {peers[0]}")) if several and len(peers) == 1 else None
            rows.append(tag("div", tag("h4", title), legend, against, charts.speedups(own, scale, looks)))
    key = None
    if len(names) > 1:
        key = charts.key(*((OURS, formats.METHODS.get(name, name), i > 0) for i, name in enumerate(names[:2])))
    about = "Time of the peer over ours, by the fastest of our backends there. Whiskers from p20 to p80."
    return joined(
        tag("p", about, class_="lead"),
        key,
        *rows,
        tag("div", *panels, class_="panels") if panels else None,
        numbers(tables.speedups(found, content.device.absolute)),
    )


def peer_looks(found: Sequence[Point]) -> dict[str, str]:
    """A colour and shape for each peer, the same on the whole page."""
    return {name: str(i % MARKS) for i, name in enumerate(charts.peers_of(found))}


def _ratio_panel(
    own: Sequence[Point], names: Sequence[str], looks: dict[str, str], span: Sequence[float]
) -> Markup | None:
    """The ratios along a curve, a line a peer and method."""
    axis, title, line = own[0].axis, own[0].title, own[0].line
    lines: list[Line] = []
    for peer in charts.peers_of(own):
        for method in names:
            measured = [
                (float(point.size[axis]), against.ratio)
                for point in own
                for against in point.against
                if against.peer.provider == peer and point.method == method
            ]
            later = method != names[0]
            if measured:
                named = peer not in [line.label for line in lines]  # the key above tells the methods apart
                lines.append(Line(looks[peer], peer if named else "", sorted(measured), hollow=later, dashed=later))
    wrong = list(dict.fromkeys(f"{row.provider} at {point.label}" for point in own for row in point.failed))
    note = tag("p", tag("small", f"no speedup, check failed: {', '.join(wrong)}", class_="bad")) if wrong else None
    caption = tag("figcaption", title, tag("small", line) if line else None)
    if not lines:
        return tag("figure", caption, note) if note else None
    values = sorted({x for one in lines for x, _ in one.points})
    panel = Panel(
        title=f"{title} {line}".strip(),
        horizontal=axis.replace("_", " "),
        vertical="peer's time over ours",
        lines=lines,
        names={x: formats.tick_size(x) for x in values},
        value=formats.tick_ratio,
        span=span,
        baseline=1.0,
    )
    return tag("figure", caption, panel.draw(), note)


# ---- goals ----


def goals(content: Content) -> Markup | None:
    if not content.goals:
        return None
    absolute = content.device.absolute
    reached = [goal for goal in content.goals if goal.state == "reached"]
    others = [goal for goal in content.goals if goal.state != "reached"]
    return joined(
        table(tables.goals(others, content.headings, absolute)) if others else tag("p", "All goals are reached."),
        numbers(tables.goals(reached, content.headings, absolute), f"The {len(reached)} that are reached"),
    )


# ---- scaling ----


def scaling(content: Content) -> Markup | None:
    if not content.curves:
        return None
    looks = peer_looks(content.points)
    flagged = curves.verdicts(content.curves)
    said = [tag("p", sentence, class_="note") for sentence in flagged]
    if not flagged and any(line.fit.low is not None for curve in content.curves for line in curve.lines):
        said = [tag("p", "No curve is steeper than the work.")]
    about = (
        "Time along one size, both axes logarithmic. The dotted line grows as the work does, through the end of the "
        "fastest of ours. Exponents are of time over flops, beyond the launch floor."
    )
    drawn = []
    for curve in content.curves:
        together = [one for one in content.curves if one.heading == curve.heading and one.mode == curve.mode]
        figure = _time_panel(curve, together, looks, content.device.absolute)
        drawn.append(tag("figure", tag("figcaption", curve.title, tag("small", _subtitle(curve))), figure))
    exponents = numbers(tables.exponents(content.curves), "Exponents and their 90 % intervals")
    return joined(tag("p", about, class_="lead"), *said, tag("div", *drawn, class_="panels"), exponents)


def _subtitle(curve: Curve) -> str:
    method = formats.METHODS.get(curve.method, curve.method)
    return ", ".join(part for part in (curve.label, method) if part)


def _time_panel(curve: Curve, together: Sequence[Curve], looks: dict[str, str], absolute: bool) -> Markup:
    """The times along a curve. ``together``: the same by other methods, which share the vertical axis."""
    unit = 1.0 if absolute else curve.unit
    lines: list[Line] = []
    backends = 0
    for line in curve.lines:
        if line.ours:
            look, backends = (OURS if backends == 0 else f"{OURS}-{min(backends, 3)}"), backends + 1
        else:
            look = looks.get(line.provider, str(len(lines) % MARKS))
        measured = [(x, Quantiles(*(value / unit for value in times))) for x, times in line.measured]
        lines.append(Line(look, line.provider, measured, curves.exponent(line), dashed=look.startswith(f"{OURS}-")))
    guide = _as_the_work(curve, unit)
    values = sorted({x for line in curve.lines for x, _ in line.measured})
    start = formats.size({curve.axis: int(values[0])})
    return Panel(
        title=f"{curve.title} {_subtitle(curve)}",
        horizontal=curve.axis.replace("_", " "),
        vertical="time of a call" if absolute else f"time; ours, fastest, at {start} is 1",
        lines=[*lines, *([guide] if guide else [])],
        names={x: formats.tick_size(x) for x in values},
        value=formats.tick_seconds if absolute else formats.tick,
        span=[q / unit for one in together for line in one.lines for _, times in line.measured for q in times],
    ).draw()


def _as_the_work(curve: Curve, unit: float) -> Line | None:
    """A guide that is as steep as the work."""
    mine = min((line for line in curve.lines if line.ours), key=lambda line: line.measured[-1][1].p50, default=None)
    if mine is None or len(mine.rows) < 2:
        return None
    end, last = mine.measured[-1][1].p50 / unit, curves.work(mine.rows[-1])
    guide = [(float(row.size[curve.axis]), Quantiles(*[end * curves.work(row) / last] * 3)) for row in mine.rows]
    return Line("guide", "", guide, quiet=True)


# ---- share of the limit, memory ----


def limit(content: Content) -> Markup | None:
    found = [p for p in first_method(content.points) if p.ours is not None and p.ours.share is not None]
    if not found:
        return None
    ceilings = content.device.header.get("ceilings") or {}
    rates = [(ceilings.get("flops_per_second"), "FLOP"), (ceilings.get("bytes_per_second"), "B")]
    known = [formats.rate(value, unit) for value, unit in rates if value] if content.device.absolute else []
    measured = f": {formats.listed(known)}" if known else ""
    about = (
        "The limit of a case is the longer of two times: its flops at the rate of a large product, and its bytes at "
        f"the rate of a large copy, both measured in the same run{measured}. The mark is the best peer. Of a curve "
        "the largest size is drawn."
    )
    over = any((point.ours.share or 0) > 1 for point in found if point.ours is not None)
    note = tag("p", "Over 100 %: data came from a cache, or a ceiling was measured low.", class_="note")
    return joined(
        tag("p", about, class_="lead"),
        note if over else None,
        charts.shares(largest(found)),
        numbers(tables.shares(found)),
    )


def memory(content: Content) -> Markup | None:
    parts = []
    for name, about in (
        ("peak_bytes", "The most a call holds above what was there before it: peers over ours"),
        ("kept_bytes", "What autograd keeps between forward and backward, without the inputs: peers over ours"),
    ):
        groups = []
        for point in largest(first_method(content.points)):
            ours = None if point.ours is None else getattr(point.ours, name)
            peers = [getattr(against.peer, name) for against in point.against]
            if ours is not None:
                groups.append((point.heading, ours, [count for count in peers if count is not None]))
        if groups:
            parts += [tag("h4", about), charts.memory_ratios(groups, about)]
    if not parts:
        return None
    gpu = "Bytes as the allocator counts them, a dot a peer. Of a curve the largest size is drawn."
    cpu = (
        "Bytes by which the resident set grows, which counts whole pages and libraries' buffers too, a dot a peer. Of "
        "a curve the largest size is drawn."
    )
    about = gpu if content.device.absolute else cpu
    return joined(tag("p", about, class_="lead"), *parts, numbers(tables.memory(content.points)))


# ---- history, missing, machine ----


def history(content: Content) -> Markup | None:
    device = content.device
    if len(device.history) < 2:
        return tag("p", "One result so far. A history starts with the second.")
    if not content.tracks:
        return tag("p", "No case occurs in two results with the same size.")
    cpu = "The peer's time over ours: a ratio within each run, as times on a CPU say little by themselves"
    about = (
        f"{'Our time' if device.absolute else cpu}, over {len(device.history)} results, each line to its own scale. A "
        "plus marks uncommitted changes, a hollow mark a quick or unfinished run. Of a curve the largest size is drawn."
    )
    ends = {point.heading for point in largest(content.points)}
    shown = [track for track in content.tracks if track.title in ends]
    drawn = charts.history(shown, device)
    return joined(tag("p", about, class_="lead"), drawn, numbers(tables.history(content.tracks, device)))


def missing(content: Content) -> Markup | None:
    return table(content.missing) if content.missing else None


def machine(content: Content) -> Markup | None:
    return table(tables.header(content.device), headless=True)


# ---- tables ----


def numbers(found: Table, name: str = "All numbers") -> Markup | None:
    """A table that is opened by who wants it; on paper it is always there."""
    return tag("details", tag("summary", name), table(found)) if found else None


def table(found: Table, headless: bool = False) -> Markup:
    """A table of text; wider than the page it scrolls by itself."""

    def style(column: int) -> str | None:
        return "number" if column in found.right else None

    head = tag("tr", *(tag("th", name, scope="col", class_=style(i)) for i, name in enumerate(found.columns)))
    body = [
        tag("tr", *(tag("td", cell, class_=found.tone(cell) or style(i)) for i, cell in enumerate(row)))
        for row in found.rows
    ]
    parts = [] if headless else [tag("thead", head)]
    return tag("div", tag("table", *parts, tag("tbody", *body), class_="data"), class_="wide", tabindex=0)
