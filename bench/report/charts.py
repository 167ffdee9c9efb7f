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
    linear_scale,
    log_scale,
    mark,
    place,
    ruler,
    strip,
    swatch,
    trace,
    whisker,
)
from bench.report.points import Against, Point, methods
from bench.report.summary import Opponent
from bench.result import Row

HEIGHT = 24


@dataclass(frozen=True)
class ChartRow:
    """A row of a chart; a heading of the following ones where there is no strip."""

    label: object
    picture: Markup | None = None
    value: object = ""
    tone: str = ""


def chart(head: tuple[str, str], scale: Scale, rows: Sequence[ChartRow], about: str) -> Markup:
    """The table. ``head``: over the labels and over the values. ``about``: what the strips show."""
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


# ---- speedup ----


def overview(found: Sequence[Opponent]) -> Markup:
    """Every peer of every op: a dot a measurement, a line at the median."""
    scale = log_scale([r for one in found for r in one.ratios] or [1.0], formats.ratio, baseline=1.0)
    rows, last = [], None
    for one in found:
        use = one.op.replace("_", " ") + (f", {one.variant}" if one.variant else "")
        if use != last:
            rows.append(ChartRow(use))
            last = use
        middle, between, _ = written.opponent_cells(one)
        marks = [mark(OURS, scale.at(value), HEIGHT / 2) for value in one.ratios]
        note = tag("small", between) if between else ""
        tone = "" if one.ratios else "bad"
        failed = tag("small", f"{formats.count(one.failed, 'check')} failed", class_="bad") if one.failed else ""
        value = joined(tag("b", middle), " ", note, " ", failed)
        rows.append(ChartRow(one.peer, strip(HEIGHT, scale, *marks), value, tone))
    about = "Time of each peer over ours, a dot a measurement, on a logarithmic scale."
    return chart(("against", "median and range"), scale, rows, about)


def speedups(found: Sequence[Point], scale: Scale, looks: dict[str, str]) -> Markup:
    """The points of one title: a row a peer, or where it has several sizes a row a size, with a lane a peer."""
    names = methods([point.ours for point in found if point.ours is not None])
    labels = list(dict.fromkeys(point.label for point in found))
    rows = []
    if len(labels) == 1:
        for peer in _peers(found):
            rows.append(_row(peer, [peer], found, names, scale, dict.fromkeys([peer], OURS)))
    else:
        peers = _peers(found)
        own = looks if len(peers) > 1 else dict.fromkeys(peers, OURS)
        for label in labels:
            rows.append(_row(label, peers, [p for p in found if p.label == label], names, scale, own))
    about = "Time of the peer over ours on a logarithmic scale, with whiskers from p20 to p80."
    return chart(("against" if len(labels) == 1 else "size", "ratio"), scale, rows, about)


def speedup_scale(found: Sequence[Point]) -> Scale:
    """One scale for all points of a device, so that charts can be compared."""
    ratios = [value for point in found for against in point.against for value in against.ratio]
    return log_scale(ratios or [1.0], formats.ratio, baseline=1.0)


def _peers(found: Sequence[Point]) -> list[str]:
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
    lane = 11
    height = max(HEIGHT, lane * len(peers) + 8)
    drawn: list[Markup] = []
    shown: list[list[Against]] = []
    for i, peer in enumerate(peers):
        y = height / 2 + lane * (i - (len(peers) - 1) / 2)
        shown.append([])
        for point in found:
            for against in point.against:
                if against.peer.provider == peer:
                    drawn.append(_measured(looks[peer], scale, against, y, point.method != names[0]))
                    shown[-1].append(against)
    failed = {row.provider for point in found for row in point.failed}
    if not any(point.ours is not None for point in found):
        return ChartRow(label, strip(height, scale), "no speedup: our check failed", "bad")
    medians = [against.ratio.p50 for lane_found in shown for against in lane_found]
    if not medians:
        wrong = any(peer in failed for peer in peers)
        return ChartRow(
            label, strip(height, scale), "no speedup: its check failed" if wrong else "", "bad" if wrong else ""
        )
    if len(peers) == 1:
        first = tag("b", formats.ratio(medians[0]))
        rest = " · ".join(formats.ratio(value) for value in medians[1:])
        spread = rest or formats.spread(shown[0][0].ratio)
        return ChartRow(label, strip(height, scale, *drawn), joined(first, " ", tag("small", spread)))
    low, high = formats.number(min(medians)), formats.number(max(medians))
    without = [peer for peer in peers if peer in failed]
    note = tag("small", f" failed: {', '.join(without)}", class_="bad") if without else ""
    return ChartRow(label, strip(height, scale, *drawn), joined(tag("b", f"{low} to {high}{formats.TIMES}"), note))


def _measured(look: str, scale: Scale, against: Against, y: float, hollow: bool) -> Markup:
    stem = tag(
        "line",
        x1=place(scale.at(1.0)),
        x2=place(scale.at(against.ratio.p50)),
        y1=f"{y:g}",
        y2=f"{y:g}",
        class_=f"stem {OURS if look == OURS else f'peer-{look}'}",
    )
    return joined(
        None if hollow else stem,
        whisker(look, scale, against.ratio, y),
        mark(look, scale.at(against.ratio.p50), y, hollow=hollow),
    )


# ---- share of the limit ----


def shares(found: Sequence[Point]) -> Markup:
    """A bar to what the device gives at best; a mark where the best peer is."""
    scale = Scale(0.0, 1.0, False, (0.0, 0.25, 0.5, 0.75, 1.0), formats.percent)
    rows, last = [], None
    for point in found:
        row = point.ours
        if row is None or row.share is None:
            continue
        if point.label and point.title != last:
            rows.append(ChartRow(point.title))
        last = point.title
        peers = [a.peer for a in point.against if a.peer.share is not None]
        best = max(peers, key=lambda peer: peer.share or 0.0, default=None)
        drawn = [bar(OURS, scale, 0.0, min(row.share, 1.0), 6, 12)]
        note: object = ""
        if best is not None and best.share is not None:
            drawn.append(mark("0", scale.at(best.share), HEIGHT / 2, hollow=True))
            note = tag("small", f"{formats.percent(best.share)} {best.provider}")
        value = joined(tag("b", formats.percent(row.share)), " ", note)
        rows.append(ChartRow(point.label or point.title, strip(HEIGHT, scale, *drawn), value))
    about = "Share of the physical limit that our op reaches, as a bar, and the best peer as a mark."
    return chart(("case", "ours, best peer"), scale, rows, about)


# ---- memory ----


def memory(groups: Sequence[tuple[str, Sequence[tuple[Row, int]]]], about: str) -> Markup:
    """Bars of bytes, ours and the peers', relative to the largest of each group."""
    scale = Scale(0.0, 1.0, False, (0.0, 0.5, 1.0), lambda share: "" if share != 1 else "the largest of each")
    rows = []
    for title, entries in groups:
        rows.append(ChartRow(title))
        largest = max(count for _, count in entries) or 1
        mine = next((count for row, count in entries if row.ours), 0)
        for row, count in entries:
            drawn = bar(OURS if row.ours else "3", scale, 0.0, count / largest, 6, 12, quiet=not row.ours)
            times = "" if row.ours or not mine else tag("small", f"{formats.ratio(count / mine)} ours")
            value = joined(tag("b", formats.amount(count)), " ", times)
            rows.append(ChartRow(row.provider, strip(HEIGHT, scale, drawn), value))
    return chart(("provider", "bytes"), scale, rows, about)


# ---- history ----


def history(tracks: Sequence[Track], device: Device) -> Markup:
    """A line over the commits for each point, to its own scale, with the newest value and how it moved."""
    count = len(device.history)
    scale = Scale(
        0.0, max(count - 1.0, 1.0), False, tuple(float(i) for i in range(count)), lambda i: _commit(device, int(i))
    )
    rows = []
    height = 34
    for track in tracks:
        values = [value for _, value in track.values]
        low, high = min(values), max(values)
        room = max(high / low, 1.02)
        places = [
            (scale.at(float(at)), 7 + (height - 14) * (1 - _share(value, low, room))) for at, value in track.values
        ]
        drawn = [trace(OURS, places, height)] if len(places) > 1 else []
        drawn += [mark(OURS, x, y, hollow=not track.full[i]) for i, (x, y) in enumerate(places)]
        value = joined(tag("b", track.shown), " ", tag("small", track.moved, class_=track.tone or None))
        label = joined(track.title, " ", tag("small", track.what))
        rows.append(ChartRow(label, strip(height, scale, *drawn), value))
    about = "Each line has its own vertical scale; the newest value and its change stand beside it."
    return chart(("case", "newest, change"), scale, rows, about)


def _share(value: float, low: float, room: float) -> float:
    middle = low * room**0.5
    return 0.5 if room <= 1.02 else (value / low - 1) / (room - 1) if middle else 0.0


def _commit(device: Device, at: int) -> str:
    return formats.commit(device.history[at].header)


# ---- stacked bars ----


def stacked(
    groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[float], str]]]],
    looks: Sequence[str],
    name: str,
    about: str,
) -> Markup:
    """Bars of several parts under one scale. A group: its title, then of each bar the label, parts, and total in words."""
    longest = max(sum(parts) for _, bars in groups for _, parts, _ in bars)
    scale = linear_scale(longest, formats.three_digits)
    rows = []
    for title, bars in groups:
        rows.append(ChartRow(title))
        for label, parts, total in bars:
            drawn, start = [], 0.0
            for look, part in zip(looks, parts, strict=True):
                drawn.append(bar(look, scale, start, start + part, 5, 14))
                start += part
            rows.append(ChartRow(label, strip(HEIGHT, scale, *drawn), joined(tag("b", total))))
    return chart(("model", name), scale, rows, about)
