"""How results moved over commits: time on a GPU; on a CPU the ratio with one peer, which cancels the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.report import formats
from bench.report.collect import Device, full
from bench.report.points import Cases, Point, points
from bench.report.summary import first_method

NOISE = 0.05  # a move of less is said without colour: clocks and other load do as much


@dataclass(frozen=True)
class Track:
    """One point over the results of a device.

    Attributes:
        what: the peer whose ratio it is; empty for our time.
        values: place of the result in the device's history, and the value.
        full: for each value, whether that run was complete and not quick.
        shown, moved, tone: newest value, change from the one before, and whether that is good or bad.
    """

    title: str
    what: str
    values: tuple[tuple[int, float], ...]
    full: tuple[bool, ...]
    shown: str
    moved: str
    tone: str


def tracks(device: Device, cases: Cases) -> list[Track]:
    """A track for every point of the current result that an earlier or later one has too."""
    runs = [{_key(point): point for point in first_method(points(result, cases))} for result in device.history]
    found = []
    for point in first_method(points(device.current, cases)):
        own = [(at, run[_key(point)]) for at, run in enumerate(runs) if _key(point) in run]
        track = _times(device, point, own) if device.absolute else _ratios(device, point, own)
        if track is not None:
            found.append(track)
    return found


def _key(point: Point) -> tuple[object, ...]:
    return (point.case, tuple(sorted(point.size.items())), point.method, point.variant, point.dtype, point.mode)


def _times(device: Device, point: Point, own: list[tuple[int, Point]]) -> Track | None:
    values = [(at, one.ours.p50) for at, one in own if one.ours is not None and one.ours.p50]
    return _track(device, point, "", values, formats.seconds, smaller=True)


def _ratios(device: Device, point: Point, own: list[tuple[int, Point]]) -> Track | None:
    """With the fastest of the peers that most results have: another peer would be another line."""
    held = [(at, {a.peer.provider: a.ratio.p50 for a in one.against}) for at, one in own]
    newest = next((ratios for _, ratios in reversed(held) if ratios), {})
    if not newest:
        return None
    peer = max(sorted(newest, key=newest.__getitem__), key=lambda name: sum(name in ratios for _, ratios in held))
    values = [(at, ratios[peer]) for at, ratios in held if peer in ratios]
    return _track(device, point, f"against {peer}", values, formats.ratio, smaller=False)


def _track(
    device: Device,
    point: Point,
    what: str,
    values: list[tuple[int, float]],
    name: Callable[[float], str],
    *,
    smaller: bool,
) -> Track | None:
    if len(values) < 2:
        return None
    whole = tuple(full(device.history[at]) for at, _ in values)
    if point.ours is None:
        return Track(point.heading, what, tuple(values), whole, "check failed", "", "bad")
    before, now = values[-2][1], values[-1][1]
    better = before / now if smaller else now / before
    tone = "good" if better > 1 + NOISE else "bad" if better < 1 - NOISE else ""
    return Track(point.heading, what, tuple(values), whole, name(now), formats.change(before, now), tone)
