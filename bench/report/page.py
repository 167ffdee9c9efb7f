"""The page: one HTML file with its style and drawings inside, that opens anywhere and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from bench.report import charts, curves, e2e, formats, tables
from bench.report.content import Content, Fact
from bench.report.curves import Curve
from bench.report.e2e import Run, Setting
from bench.report.html import Markup, joined, tag
from bench.report.plots import MARKS, OURS, Line, Panel, marks
from bench.report.points import Point, methods
from bench.report.summary import first_method
from bench.report.tables import Table
from bench.timing import Quantiles

TITLE = "FlashSloth: fused ops, measured"


def render(contents: Sequence[Content], unread: Sequence[str] = ()) -> str:
    """The whole document. The same contents give the same bytes."""
    style = resources.files("bench.report").joinpath("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", TITLE),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        marks(),
        tag("header", tag("h1", TITLE), _devices(contents)),
        tag("main", *(_device(content) for content in contents)),
        tag("footer", *_footer(unread)),
    )
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def _devices(contents: Sequence[Content]) -> Markup | None:
    """One line a device, where there are several."""
    if len(contents) < 2:
        return None
    rows = [
        tag(
            "tr",
            tag("td", tag("a", one.device.name, href=f"#{one.device.slug}")),
            tag("td", one.finding),
            tag("td", *(tag("span", f"{fact.value}. ", class_=fact.tone or None) for fact in one.facts[:2])),
            tag("td", one.facts[2].value, class_=one.facts[2].tone or None),
        )
        for one in contents
    ]
    head = tag(
        "tr", *(tag("th", name, scope="col") for name in ("device", "FlashSloth's ops are", "checks, goals", "code"))
    )
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows), class_="data"), class_="wide devices")


def _device(content: Content) -> Markup:
    slug = content.device.slug
    parts = [(name, title, part) for name, title, make in _SECTIONS if (part := make(content)) is not None]
    links = [tag("li", tag("a", title, href=f"#{slug}-{name}")) for name, title, _ in parts]
    return tag(
        "section",
        tag("h2", tag("small", content.device.name), content.finding),
        tag("p", content.about, class_="lead"),
        tag("dl", *map(_fact, content.facts), class_="facts"),
        *(tag("p", note, class_="note") for note in content.notes),
        _alarm(content),
        _overview(content),
        tag("nav", tag("ul", *links), aria_label=f"Sections on {content.device.name}"),
        *(tag("section", tag("h3", title), part, id=f"{slug}-{name}") for name, title, part in parts),
        id=slug,
        class_="device",
    )


def _fact(fact: Fact) -> Markup:
    note = tag("small", fact.note) if fact.note else None
    return tag("div", tag("dt", fact.name), tag("dd", fact.value, note), class_=fact.tone or None)


def _alarm(content: Content) -> Markup | None:
    if not content.failures:
        return None
    return tag(
        "div",
        tag("h3", f"{formats.count(content.checks.failed, 'result')} failed the check"),
        tag("p", "A wrong result has no speedup, whatever its time. None of these is in a chart or a median below."),
        _table(content.failures),
        class_="alarm",
        role="note",
    )


def _overview(content: Content) -> Markup | None:
    if not content.opponents:
        return None
    method = first_method(content.points)[0].method
    about = (
        f"Time of each peer over ours: a dot a measurement ({formats.METHODS.get(method, method)}), the number their "
        "median. Right of the line ours is faster."
    )
    return tag("div", tag("h4", "Faster than what?"), tag("p", tag("small", about)), charts.overview(content.opponents))


# ---- sections ----


def _speedup(content: Content) -> Markup | None:
    found = [point for point in content.points if point.ours is not None or point.failed]
    if not found:
        return None
    scale, looks = charts.speedup_scale(found), _looks(found)
    blocks: list[Markup] = []
    for title in dict.fromkeys(point.title for point in found):
        own = [point for point in found if point.title == title]
        peers = list(dict.fromkeys(against.peer.provider for point in own for against in point.against))
        several = len({point.label for point in own}) > 1
        against = tag("p", tag("small", f"against {peers[0]}")) if several and len(peers) == 1 else None
        legend = charts.key(*((looks[p], p, False) for p in peers)) if several and len(peers) > 1 else None
        blocks.append(tag("div", tag("h4", title), against, legend, charts.speedups(own, scale, looks)))
    names = methods([point.ours for point in found if point.ours is not None])
    key = None
    if len(names) > 1:
        key = charts.key(*((OURS, formats.METHODS.get(name, name), i > 0) for i, name in enumerate(names[:2])))
    about = "Time of the peer over ours, by the fastest of our backends there. Whiskers from p20 to p80."
    return joined(
        tag("p", about, class_="lead"), key, *blocks, _numbers(tables.speedups(found, content.device.absolute))
    )


def _looks(found: Sequence[Point]) -> dict[str, str]:
    """A colour and shape for each peer, the same on the whole page."""
    names = dict.fromkeys(against.peer.provider for point in found for against in point.against)
    names |= dict.fromkeys(row.provider for point in found for row in point.failed if not row.ours)
    return {name: str(i % MARKS) for i, name in enumerate(names)}


def _curves(content: Content) -> Markup | None:
    if not content.curves:
        return None
    looks = _looks(content.points)
    flagged = curves.verdicts(content.curves)
    said = [tag("p", sentence, class_="note") for sentence in flagged]
    if not flagged and any(line.fit.low is not None for curve in content.curves for line in curve.lines):
        said = [tag("p", "No curve is steeper than the work.")]
    about = (
        "Time along one size, both axes logarithmic. The dotted line grows as the work does, from the end of ours: a "
        "curve that crosses it from below does more than it must. Exponents are of time over flops, beyond the launch "
        "floor, with 90 % intervals."
    )
    drawn = [
        tag(
            "figure",
            tag("figcaption", curve.title, tag("small", _subtitle(curve))),
            _panel(curve, looks, content.device.absolute),
        )
        for curve in content.curves
    ]
    table = _numbers(tables.exponents(content.curves), "Exponents and intervals")
    return joined(tag("p", about, class_="lead"), *said, tag("div", *drawn, class_="panels"), table)


def _subtitle(curve: Curve) -> str:
    method = formats.METHODS.get(curve.method, curve.method)
    return ", ".join(part for part in (curve.label, method) if part)


def _panel(curve: Curve, looks: dict[str, str], absolute: bool) -> Markup:
    unit = 1.0 if absolute else curve.unit
    lines, backends = [], 0
    spare = (str(i % MARKS) for i in range(len(looks), len(looks) + 100))
    for line in curve.lines:
        if line.ours:
            look = OURS if backends == 0 else f"{OURS}-{min(backends, 3)}"
            backends += 1
        else:
            look = looks.get(line.provider) or next(spare)
        measured = [(x, Quantiles(*(value / unit for value in q))) for x, q in line.measured]
        lines.append(Line(look, line.provider, measured, curves.exponent(line), dashed=look.startswith("ours-")))
    mine = min((line for line in curve.lines if line.ours), key=lambda line: line.measured[-1][1].p50, default=None)
    if mine is not None and len(mine.rows) > 1:
        end, last = mine.measured[-1][1].p50 / unit, curves.work(mine.rows[-1])
        guide = [(float(row.size[curve.axis]), Quantiles(*[end * curves.work(row) / last] * 3)) for row in mine.rows]
        lines.append(Line("guide", "", guide, quiet=True))
    xs = sorted({x for line in curve.lines for x, _ in line.measured})
    start = formats.size({curve.axis: int(xs[0])})
    vertical = "time of a call" if absolute else f"time, ours at {start} = 1"
    return Panel(
        title=f"{curve.title} {_subtitle(curve)}".strip(),
        horizontal=curve.axis.replace("_", " "),
        vertical=vertical,
        lines=lines,
        names={x: f"{x:.0f}" for x in xs},
        value=formats.seconds if absolute else formats.three_digits,
    ).draw()


def _shares(content: Content) -> Markup | None:
    found = [p for p in first_method(content.points) if p.ours is not None and p.ours.share is not None]
    if not found:
        return None
    ceilings = content.device.header.get("ceilings") or {}
    roof = (
        "The limit of a case is the longer of two times: its flops at the rate of a large product, and its bytes at the "
        "rate of a large copy"
    )
    rates = [(ceilings.get("flops_per_second"), "FLOP"), (ceilings.get("bytes_per_second"), "B")]
    known = [formats.rate(value, unit) for value, unit in rates if value]
    measured = (
        f", both measured in the same run: {formats.listed(known)}."
        if known and content.device.absolute
        else ", both measured in the same run."
    )
    over = [p for p in found if p.ours is not None and (p.ours.share or 0) > 1]
    note = (
        tag("p", "Over 100 %: data came from a cache, or the ceiling was measured low.", class_="note")
        if over
        else None
    )
    return joined(
        tag("p", roof, measured, " The mark is the best peer.", class_="lead"),
        note,
        charts.shares(found),
        _numbers(tables.shares(found)),
    )


def _memory(content: Content) -> Markup | None:
    last = {(point.title, point.variant): point for point in content.points}  # of a curve, its largest size
    parts = []
    for name, about in (
        ("peak_bytes", "The most a call holds above what was there before it"),
        ("kept_bytes", "What autograd keeps between forward and backward, without the inputs"),
    ):
        groups = []
        for point in last.values():
            entries = [
                (row, int(getattr(row, name))) for row in tables.memory_rows(point) if getattr(row, name) is not None
            ]
            if entries and any(row.ours for row, _ in entries):
                groups.append((point.heading, entries))
        if groups:
            parts += [tag("h4", about), charts.memory(groups, about)]
    if not parts:
        return None
    counted = (
        "as the allocator counts"
        if content.device.absolute
        else "as the resident set grows, which counts libraries' buffers too"
    )
    about = f"Peak {counted}. Of a curve the largest size is drawn."
    return joined(tag("p", about, class_="lead"), *parts, _numbers(tables.memory(content.points)))


def _goals(content: Content) -> Markup | None:
    if not content.goals:
        return None
    absolute = content.device.absolute
    open_, reached = ([goal for goal in content.goals if (goal.state == "reached") is state] for state in (False, True))
    return joined(
        _table(tables.goals(open_, content.headings, absolute)) if open_ else tag("p", "All goals are reached."),
        _numbers(tables.goals(reached, content.headings, absolute), f"The {len(reached)} that are reached")
        if reached
        else None,
    )


def _end_to_end(content: Content) -> Markup | None:
    if not content.settings:
        return None
    device, found = content.device, content.settings
    parts = [_first_token(content), _requests(content)]
    memory = []
    for setting in found:
        entries = [(peak, peak.peak_bytes or 0, run) for run in setting.runs if (peak := run.peak) is not None]
        if entries:
            memory.append((setting.title, [(row, count) for row, count, _ in entries]))
    about = "Peak memory of inference, weights excluded as they are there before the call"
    if memory:
        parts += [tag("h4", about), charts.memory(memory, about)]
    training = e2e.training(found, device)
    if training:
        parts += [tag("h4", "A training step"), _table(training)]
    unit = "" if device.absolute else " On a CPU times are multiples of FlashSloth's at the same size."
    lead = f"Full architectures with random weights, from pixels to an answer.{unit}"
    return joined(tag("p", lead, class_="lead"), *parts, _numbers(e2e.models(found, device)))


def _first_token(content: Content) -> Markup | None:
    looks = (OURS, "0", "3")
    groups = []
    for setting in content.settings:
        unit = setting.unit(content.device, lambda run: run.first_token)
        bars = []
        for run in setting.runs:
            if unit and sum(run.parts):
                total = e2e.time(setting, content.device, run, lambda one: one.first_token)
                scale = 1e3 if content.device.absolute else 1 / unit
                bars.append((run.model, [part * scale for part in run.parts], total))
        if bars:
            groups.append((setting.title, bars))
    if not groups:
        return None
    unit_name = "milliseconds" if content.device.absolute else "multiples of FlashSloth's"
    about = f"Time to first token in {unit_name}: vision, compression and prefill, one after the other."
    key = charts.key(*((look, part, False) for look, part in zip(("0", OURS, "3"), e2e.PARTS, strict=True)))
    return (
        joined(tag("h4", about), key, charts.stacked(groups, ("0", OURS, "3"), "first token", about)) if looks else None
    )


def _requests(content: Content) -> Markup | None:
    """Requests per second by batch, a panel an image size; a single batch stands in the table alone."""
    images: dict[tuple[int, int], list[Setting]] = {}
    for setting in content.settings:
        images.setdefault((setting.width, setting.height), []).append(setting)
    figures = []
    for (width, height), own in images.items():
        unit = own[0].unit(content.device, lambda run: run.requests_per_second)
        lines = _request_lines(own, unit) if unit and len(own) > 1 else []
        if lines:
            panel = Panel(
                title=f"Answers a second on images of {width}{formats.TIMES}{height}",
                horizontal="batch",
                vertical="answers per second"
                if content.device.absolute
                else "answers per second, ours at the first = 1",
                lines=lines,
                names={float(setting.batch): str(setting.batch) for setting in own},
                value=formats.three_digits,
            )
            figures.append(
                tag("figure", tag("figcaption", f"Answers a second, {width}{formats.TIMES}{height}"), panel.draw())
            )
    return tag("div", *figures, class_="panels") if figures else None


def _request_lines(own: Sequence[Setting], unit: float) -> list[Line]:
    names = {run.model: run.ours for setting in own for run in setting.runs}
    lines, mine, others = [], 0, 0
    for name, ours in names.items():
        runs: list[tuple[Setting, Run]] = [(s, run) for s in own for run in s.runs if run.model == name]
        measured = [(float(s.batch), run.requests_per_second) for s, run in runs]
        points = [(x, Quantiles(*[value / unit] * 3)) for x, value in measured if value is not None]
        look = (OURS if mine == 0 else f"{OURS}-{min(mine, 3)}") if ours else str(others % MARKS)
        mine, others = (mine + 1, others) if ours else (mine, others + 1)
        if points:
            lines.append(Line(look, name, points, dashed=look.startswith("ours-")))
    return lines


def _claims(content: Content) -> Markup | None:
    return None if content.claims is None else _table(content.claims)


def _history(content: Content) -> Markup | None:
    device = content.device
    if len(device.history) < 2:
        return tag("p", "One result so far. A history starts with the second.")
    if not content.tracks:
        return tag("p", "No case occurs in two results with the same size.")
    what = (
        "Our time"
        if device.absolute
        else "The peer's time over ours: a ratio within each run, as times on a CPU say little"
    )
    about = (
        f"{what}, over {len(device.history)} results. A plus marks uncommitted changes, a hollow mark a quick or "
        "unfinished run."
    )
    return joined(tag("p", about, class_="lead"), charts.history(content.tracks, device))


def _missing(content: Content) -> Markup | None:
    return _table(content.missing) if content.missing else None


def _machine(content: Content) -> Markup | None:
    return _table(tables.header(content.device), headless=True)


_SECTIONS = (
    ("speedup", "Speedup by size", _speedup),
    ("goals", "Goals", _goals),
    ("scaling", "Scaling", _curves),
    ("limit", "Share of the physical limit", _shares),
    ("memory", "Memory", _memory),
    ("models", "Whole models", _end_to_end),
    ("claims", "The paper's claims", _claims),
    ("history", "History on this device", _history),
    ("missing", "What could not be measured", _missing),
    ("machine", "Machine and code", _machine),
)


# ---- tables ----


def _numbers(table: Table, name: str = "All numbers") -> Markup | None:
    """A table that is opened by who wants it; on paper it is always there."""
    return tag("details", tag("summary", name), _table(table)) if table else None


def _table(table: Table, headless: bool = False) -> Markup:
    head = tag("tr", *(tag("th", name, scope="col", class_=_number(table, i)) for i, name in enumerate(table.columns)))
    body = [
        tag("tr", *(tag("td", cell, class_=table.tones.get(cell) or _number(table, i)) for i, cell in enumerate(row)))
        for row in table.rows
    ]
    parts = [] if headless else [tag("thead", head)]
    return tag("div", tag("table", *parts, tag("tbody", *body), class_="data"), class_="wide", tabindex=0)


def _number(table: Table, column: int) -> str | None:
    return "number" if column in table.right else None


def _footer(unread: Sequence[str]) -> list[Markup]:
    said = [tag("p", "A speedup stands only beside a result that passed its check in the same run. Times are medians.")]
    if unread:
        said.append(tag("p", "Files that were not used: ", "; ".join(unread), "."))
    return said
