"""Charts as tables: a label, a strip drawn to scale, a number. Who cannot see the strip reads the number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report import formats
from bench.report import tables as written
from bench.report.collect import Device
from bench.report.history import Track
from bench.report.html import Markup, joined, tag
from bench.report.plots import (
    OURS,
    Scale,
    bar,
    chip,
    linear_scale,
    log_scale,
    mark,
    place,
    ruler,
    strip,
    swatch,
    trace,
    upright,
    whisker,
)
from bench.report.points import Against, Point, methods
from bench.report.summary import Opponent
from bench.result import Row

HEIGHT, LANE = 24, 11
FLAT = 0.02  # a line that moved less is drawn flat: to its own scale noise would look like news


@dataclass(frozen=True)
class ChartRow:
    """A row of a chart; a heading of the following ones where there is no strip."""

    label: object
    picture: Markup | None = None
    value: object = ""
    tone: str = ""


def chart(head: tuple[str, str], scale: Scale, rows: Sequence[ChartRow], about: str) -> Markup:
    """The table. ``head``: over the labels and over the values. ``about``: what the strips show.

    Roles are written out, because the style sheet lays rows out anew on a phone, which would take them away.
    """
    body = [
        tag(
            "tr",
            tag("th", row.label, scope="row", role="rowheader"),
            tag("td", row.picture, class_="cell", role="presentation"),
            tag("td", row.value, class_="value", role="cell"),
            class_=row.tone or None,
            role="row",
        )
        if row.picture is not None
        else tag("tr", tag("th", row.label, colspan=3, scope="rowgroup", role="rowheader"), class_="group", role="row")
        for row in rows
    ]
    top = tag(
        "tr",
        tag("th", head[0], scope="col", role="columnheader"),
        tag("td", ruler(scale), class_="cell", role="presentation"),
        tag("th", head[1], scope="col", class_="value", role="columnheader"),
        class_="ruler",
        role="row",
    )
    return tag(
        "table",
        tag("caption", about, class_="unseen"),
        tag("thead", top, role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        class_="chart",
        role="table",
    )


def key(*entries: tuple[str, str, bool]) -> Markup:
    """Marks and what they stand for: look, name, hollow."""
    return tag("p", *(tag("span", swatch(look, hollow=hollow), name) for look, name, hollow in entries), class_="key")


def bar_key(*entries: tuple[str, str]) -> Markup:
    """Parts of bars and what they stand for: look, name."""
    return tag("p", *(tag("span", chip(look), name) for look, name in entries), class_="key")


def _value(first: str, *rest: object) -> Markup:
    return joined(tag("b", first), *(joined(" ", tag("small", part)) for part in rest if part))


def _failed(text: str) -> Markup:
    return tag("small", text, class_="bad")


# ---- speedup ----


def overview(found: Sequence[Opponent]) -> Markup:
    """Every peer of every op: a dot a measurement, a line at the median."""
    scale = log_scale([r for one in found for r in one.ratios] or [1.0], formats.tick_ratio, baseline=1.0)
    rows, last = [], None
    for one in found:
        if one.use != last:
            rows.append(ChartRow(one.use))
            last = one.use
        middle, between, _ = written.opponent_cells(one)
        drawn = [mark(OURS, scale.at(value), HEIGHT / 2, many=len(one.ratios) > 1) for value in one.ratios]
        if len(one.ratios) > 1:
            drawn.append(upright(OURS, scale.at(one.median), 4, HEIGHT - 4))
        if one.ratios:
            failed = _failed(f"{one.failed} failed") if one.failed else None
            value = joined(_value(middle, between), " ", failed)
        else:
            value = _failed("no speedup: check failed")
        rows.append(ChartRow(one.peer, strip(HEIGHT, scale, *drawn), value))
    about = "Time of each peer over ours, a dot a measurement, on a logarithmic scale."
    return chart(("against", "median, range"), scale, rows, about)


def speedup_scale(found: Sequence[Point]) -> Scale:
    """One scale for all points of a device, so that charts can be compared."""
    ratios = [value for point in found for against in point.against for value in against.ratio]
    return log_scale(ratios or [1.0], formats.tick_ratio, baseline=1.0)


def speedups(found: Sequence[Point], scale: Scale, looks: dict[str, str]) -> Markup:
    """The points of one title: a row a peer, or where it has several sizes a row a size, with a lane a peer."""
    names = methods([point.ours for point in found if point.ours is not None]) or [found[0].method]
    labels, peers = list(dict.fromkeys(point.label for point in found)), peers_of(found)
    about = "Time of the peer over ours on a logarithmic scale, with whiskers from p20 to p80."
    if len(labels) == 1:
        rows = [_row(peer, [peer], found, names, scale, {peer: OURS}) for peer in peers]
        rows = rows or [_row("", [], found, names, scale, {})]
    else:
        own = looks if len(peers) > 1 else dict.fromkeys(peers, OURS)
        rows = [_row(label, peers, [p for p in found if p.label == label], names, scale, own) for label in labels]
    return chart(("against" if len(labels) == 1 else "size", "ratio"), scale, rows, about)


def peers_of(found: Sequence[Point]) -> list[str]:
    """The peers that have a ratio, and those that failed."""
    names = dict.fromkeys(against.peer.provider for point in found for against in point.against)
    names |= dict.fromkeys(row.provider for point in found for row in point.failed if not row.ours)
    return list(names)


def _row(
    label: str,
    peers: Sequence[str],
    found: Sequence[Point],
    names: Sequence[str],
    scale: Scale,
    looks: dict[str, str],
) -> ChartRow:
    height = max(HEIGHT, LANE * len(peers) + 8)
    drawn: list[Markup] = []
    shown: list[Against] = []
    for i, peer in enumerate(peers):
        y = height / 2 + LANE * (i - (len(peers) - 1) / 2)
        for point in found:
            own = [against for against in point.against if against.peer.provider == peer]
            drawn += [_measured(looks[peer], scale, against, y, point.method != names[0]) for against in own]
            shown += own
    failed = [peer for peer in peers if any(row.provider == peer for point in found for row in point.failed)]
    picture = strip(height, scale, *drawn)
    if all(point.ours is None for point in found):
        return ChartRow(label, picture, _failed("no speedup: our check failed"))
    if not shown:
        return ChartRow(label, picture, _failed("no speedup: check failed") if failed else "")
    medians = [against.ratio.p50 for against in shown]
    if len(peers) == 1:
        rest = " · ".join(formats.ratio(value) for value in medians[1:])
        return ChartRow(label, picture, _value(formats.ratio(medians[0]), rest or formats.spread(shown[0].ratio)))
    low, high = formats.number(min(medians)), formats.number(max(medians))
    note = joined(" ", _failed(f"failed: {formats.listed(failed)}")) if failed else None
    return ChartRow(label, picture, joined(tag("b", f"{low} to {high}{formats.TIMES}"), note))


def _measured(look: str, scale: Scale, against: Against, y: float, hollow: bool) -> Markup:
    at = scale.at(against.ratio.p50)
    colour = OURS if look == OURS else f"peer-{look}"
    stem = tag("line", x1=place(scale.at(1.0)), x2=place(at), y1=f"{y:g}", y2=f"{y:g}", class_=f"stem {colour}")
    return joined(None if hollow else stem, whisker(look, scale, against.ratio, y), mark(look, at, y, hollow=hollow))


# ---- share of the limit ----


def shares(found: Sequence[Point]) -> Markup:
    """A bar to what the device gives at best; a mark where the best peer is."""
    scale = Scale(0.0, 1.0, False, (0.0, 0.25, 0.5, 0.75, 1.0), formats.percent)
    rows = []
    for point in found:
        row = point.ours
        if row is None or row.share is None:
            continue
        peers = [against.peer for against in point.against if against.peer.share is not None]
        best = max(peers, key=lambda peer: peer.share or 0.0, default=None)
        drawn, note = [bar(OURS, scale, 0.0, min(row.share, 1.0), 6, 12)], ""
        if best is not None and best.share is not None:
            drawn.append(mark("0", scale.at(best.share), HEIGHT / 2, hollow=True))
            note = f"{formats.percent(best.share)} {best.provider}"
        rows.append(ChartRow(point.heading, strip(HEIGHT, scale, *drawn), _value(formats.percent(row.share), note)))
    about = "Share of the physical limit that our op reaches, as a bar, and the best peer as a mark."
    return chart(("case", "ours, best peer"), scale, rows, about)


# ---- memory ----


def memory_ratios(groups: Sequence[tuple[str, int, Sequence[int]]], about: str) -> Markup:
    """What peers need over what ours needs: heading, bytes of ours, bytes of the peers."""
    ratios = [peer / ours for _, ours, peers in groups for peer in peers if ours and peer]
    scale = log_scale(ratios or [1.0], formats.tick_ratio, baseline=1.0)
    rows = []
    for heading, ours, peers in groups:
        own = [peer / ours for peer in peers if ours and peer]
        drawn = [mark(OURS, scale.at(value), HEIGHT / 2, many=len(own) > 1) for value in own]
        between = ""
        if own:
            low, high = formats.number(min(own)), formats.number(max(own))
            between = f"peers {low}{f' to {high}' if high != low else ''}{formats.TIMES}"
        rows.append(ChartRow(heading, strip(HEIGHT, scale, *drawn), _value(formats.amount(ours), between)))
    return chart(("case", "ours, peers"), scale, rows, about)


def memory_bars(groups: Sequence[tuple[str, Sequence[tuple[Row, int]]]], about: str) -> Markup:
    """Bars of bytes under one scale, ours and the others'."""
    most = max(count for _, entries in groups for _, count in entries)
    unit, sign = formats.byte_unit(most)
    scale = linear_scale(most, lambda count: f"{count / unit:g} {sign}" if count else "0", unit)
    rows = []
    for title, entries in groups:
        rows.append(ChartRow(title))
        for row, count in entries:
            drawn = bar(OURS if row.ours else "3", scale, 0.0, count, 6, 12, quiet=not row.ours)
            name = tag("b", row.provider) if row.ours else row.provider
            rows.append(ChartRow(name, strip(HEIGHT, scale, drawn), _value(formats.amount(count))))
    return chart(("model", "peak"), scale, rows, about)


# ---- history ----


def history(tracks: Sequence[Track], device: Device) -> Markup:
    """A line over the commits for each point, to its own scale, with the newest value and how it moved."""
    count, height = len(device.history), 34
    names = [formats.commit(result.header) for result in device.history]
    ticks = tuple(float(i) for i in range(count))
    scale = Scale(0.0, max(count - 1.0, 1.0), False, ticks, lambda i: names[int(i)])
    rows = []
    for track in tracks:
        values = [value for _, value in track.values]
        room = max(values) / min(values)
        places = []
        for at, value in track.values:
            up = (value / min(values) - 1) / (room - 1) if room > 1 + FLAT else 0.5
            places.append((scale.at(float(at)), 7 + (height - 14) * (1 - up)))
        drawn = [trace(OURS, places, height)] if len(places) > 1 else []
        drawn += [mark(OURS, x, y, hollow=not whole) for (x, y), whole in zip(places, track.full, strict=True)]
        shown = joined(tag("b", track.shown), " ", tag("small", track.moved, class_=track.tone or None))
        label = joined(track.title, " ", tag("small", track.what) if track.what else None)
        rows.append(ChartRow(label, strip(height, scale, *drawn), shown))
    about = "Each line has its own vertical scale; the newest value and its change stand beside it."
    return chart(("case", "newest, change"), scale, rows, about)


# ---- stacked bars ----


def stacked(
    groups: Sequence[tuple[str, Sequence[tuple[object, Sequence[float], str]]]], looks: Sequence[str], about: str
) -> Markup:
    """Bars of several parts under one scale. A group: its title, then for each bar label, parts and total as text."""
    scale = linear_scale(max(sum(parts) for _, bars in groups for _, parts, _ in bars), formats.tick)
    rows = []
    for title, bars in groups:
        rows.append(ChartRow(title))
        for label, parts, total in bars:
            drawn, start = [], 0.0
            for look, part in zip(looks, parts, strict=True):
                if part:
                    drawn.append(bar(look, scale, start, start + part, 5, 14))
                start += part
            rows.append(ChartRow(label, strip(HEIGHT, scale, *drawn), _value(total)))
    return chart(("model", "first token"), scale, rows, about)
