"""The drawing: SVG written by hand, in two forms that read well on a wide screen, on a phone and on paper.

A *strip* is the picture in a cell of a table: places along it are percentages and everything else is in pixels, so that
it takes the width it gets while marks and text keep their size. Rows of strips under one scale make a dot or bar chart
whose numbers stand beside it. A *panel* is a small plot of fixed proportions with labels at the ends of its lines.

By hand and not by matplotlib, whose SVG is tens of times heavier, cannot stretch without stretching its text, and has
its colours written in: here colours are classes of the style sheet, so that one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from bench.report.html import Markup, joined, tag
from bench.timing import Quantiles

OURS = "ours"
MARKS = 7  # of peers: colour and shape
_STEPS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
_EDGE = 2.0  # percent of a strip left free at both ends, for marks at the end of the scale


@dataclass(frozen=True)
class Scale:
    """Values to places along a strip, 0 to 100."""

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]
    name: Callable[[float], str]
    baseline: float | None = None

    def at(self, value: float) -> float:
        """The place of a value; those outside stand at the ends."""
        change: Callable[[float], float] = math.log if self.logarithmic else float
        low, high = change(self.low), change(self.high)
        share = (change(min(max(value, self.low), self.high)) - low) / (high - low)
        return _EDGE + (100 - 2 * _EDGE) * share


def log_scale(values: Sequence[float], name: Callable[[float], str], baseline: float | None = None) -> Scale:
    """A logarithmic scale around the values and the baseline, with up to seven round ticks."""
    known = [*values, *([] if baseline is None else [baseline])]
    low, high = min(known) / 1.12, max(known) * 1.12
    ticks: list[float] = []
    for steps in _STEPS:
        ticks = [s * 10.0**e for e in range(-12, 13) for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) <= 7:
            break
    return Scale(low, high, True, tuple(ticks), name, baseline)


def linear_scale(high: float, name: Callable[[float], str], unit: float = 1.0, ticks: int = 4) -> Scale:
    """From zero to at least ``high``, with about ``ticks`` steps that are round in ``unit``."""
    high = high or unit
    step = unit * _round_up(high / unit / ticks)
    places = tuple(step * i for i in range(math.ceil(high / step * 0.999) + 1))
    return Scale(0.0, max(high, places[-1]), False, places, name)


def _round_up(value: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(value))
    return next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= value * 0.999)


def place(value: float) -> str:
    return f"{value:.2f}%"


# ---- strips ----


def strip(height: int, scale: Scale, *content: object) -> Markup:
    """What is drawn in a cell, over the grid of the scale, which fills the cell however high its row gets.

    The table has the numbers, so the drawing is hidden from readers of text.
    """
    return joined(_grid(scale), tag("svg", *content, class_="strip", height=height, aria_hidden="true"))


def _grid(scale: Scale) -> Markup:
    def line(at: float, look: str) -> Markup:
        return tag("line", x1=place(at), x2=place(at), y1=0, y2="100%", class_=look)

    lines = [line(scale.at(tick), "grid") for tick in scale.ticks if tick != scale.baseline]
    if scale.baseline is not None:
        at = scale.at(scale.baseline)
        shade = tag("rect", x=0, y=0, width=place(at), height="100%", class_="slower")
        lines = [shade, *lines, line(at, "baseline")]
    return tag("svg", *lines, class_="behind", aria_hidden="true")


def ruler(scale: Scale) -> Markup:
    """The scale over a column of strips."""
    names = []
    for tick in _apart(scale):
        at = scale.at(tick)
        side = " start" if at < 3 else " end" if at > 97 else ""
        look = f"tick{side}{' strong' * (tick == scale.baseline)}"
        names.append(tag("text", scale.name(tick), x=place(at), y=12, class_=look))
    return tag("svg", *names, class_="strip", height=16, aria_hidden="true")


def _apart(scale: Scale) -> list[float]:
    """The ticks that have room for a name, the baseline before others."""
    kept: list[float] = [scale.baseline] if scale.baseline in scale.ticks and scale.baseline is not None else []
    for tick in scale.ticks:
        if all(abs(scale.at(tick) - scale.at(other)) >= 9 for other in kept):
            kept.append(tick)
    return sorted(kept)


def mark(look: str, x: float, y: float, *, hollow: bool = False, many: bool = False) -> Markup:
    """A mark by its shape and colour: ``ours`` or a number of a peer. ``many``: see-through, as others lie below."""
    style = f"mark {_colour(look)}{' hollow' * hollow}{' many' * many}"
    return tag("use", href=f"#mark-{look}", x=place(x), y=f"{y:g}", class_=style)


def upright(look: str, x: float, top: float, base: float) -> Markup:
    """A short line that stands at a place."""
    return tag("line", x1=place(x), x2=place(x), y1=f"{top:g}", y2=f"{base:g}", class_=f"median {_colour(look)}")


def whisker(look: str, scale: Scale, found: Quantiles, y: float) -> Markup:
    """From p20 to p80."""
    low, high = place(scale.at(found.p20)), place(scale.at(found.p80))
    return tag("line", x1=low, x2=high, y1=f"{y:g}", y2=f"{y:g}", class_=f"whisker {_colour(look)}")


def bar(look: str, scale: Scale, start: float, end: float, y: float, height: float, *, quiet: bool = False) -> Markup:
    """From one value to another."""
    left, right = scale.at(start), scale.at(end)
    return tag(
        "rect",
        x=place(left),
        y=f"{y:g}",
        width=place(max(right - left, 0.15)),
        height=f"{height:g}",
        class_=f"bar {_colour(look)}{' quiet' * quiet}",
    )


def trace(look: str, places: Sequence[tuple[float, float]], height: int) -> Markup:
    """A line through places (percent along, pixels down), as wide as the strip."""
    path = " ".join(f"{'M' if i == 0 else 'L'}{x:.2f} {y:.2f}" for i, (x, y) in enumerate(places))
    line = tag("path", d=path, class_=f"trace {_colour(look)}")
    return tag("svg", line, viewBox=f"0 0 100 {height}", preserveAspectRatio="none", width="100%", height=height)


def _colour(look: str) -> str:
    return look.partition("-")[0] if look.startswith(OURS) else f"peer-{look}"


_SHAPES = {
    "ours": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "ours-1": "M-4 -4h8v8h-8z",
    "ours-2": "M0 -5.4L5 3.8H-5z",
    "ours-3": "M0 -5.4L5.4 0L0 5.4L-5.4 0z",
    "0": "M-3.6 -3.6h7.2v7.2h-7.2z",
    "1": "M0 -5L5 0L0 5L-5 0z",
    "2": "M0 -4.6L4.6 3.6H-4.6z",
    "3": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "4": "M0 4.6L4.6 -3.6H-4.6z",
    "5": "M-1.5 -4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "6": "M-4.6 -2h9.2v4h-9.2z",
}


def marks() -> Markup:
    """The shapes that marks use, once a page."""
    symbols = [tag("path", d=path, id=f"mark-{name}") for name, path in _SHAPES.items()]
    return tag("svg", tag("defs", *symbols), class_="defs", aria_hidden="true", width=0, height=0)


def swatch(look: str, *, hollow: bool = False) -> Markup:
    """The mark of a legend."""
    use = tag("use", href=f"#mark-{look}", x=6, y=6, class_=f"mark {_colour(look)}{' hollow' * hollow}")
    return tag("svg", use, class_="swatch", width=12, height=12, aria_hidden="true")


def chip(look: str) -> Markup:
    """The part of a bar in a legend."""
    part = tag("rect", width=12, height=12, class_=f"bar {_colour(look)}")
    return tag("svg", part, class_="swatch", width=12, height=12, aria_hidden="true")


# ---- panels ----


class Line(NamedTuple):
    """A line of a panel: places on its horizontal axis and quantiles there, and the label at its end.

    ``quiet``: a guide without marks.
    """

    look: str
    label: str
    points: Sequence[tuple[float, Quantiles]]
    note: str = ""
    quiet: bool = False
    dashed: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot with both axes logarithmic.

    Attributes:
        names: the values named on the horizontal axis.
        value: names of values on the vertical one.
        span: values the vertical axis reaches over besides its own, so that panels side by side have the same one.
        baseline: a value that is drawn as a line.
    """

    title: str
    horizontal: str
    vertical: str
    lines: Sequence[Line]
    names: Mapping[float, str]
    value: Callable[[float], str]
    span: Sequence[float] = ()
    baseline: float | None = None
    left: int = 50
    right: int = 138
    top: int = 26
    bottom: int = 36
    width: int = 430
    inner: int = field(default=210)

    def draw(self) -> Markup:
        known = [q for line in self.lines if not line.quiet for _, point in line.points for q in point]
        scale_y = log_scale([*known, *self.span], self.value, self.baseline)
        xs = sorted(self.names)
        scale_x = Scale(xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] * 2, True, tuple(xs), str)
        labels = self._labels(scale_x, scale_y)
        lowest = max((y + 13 * (len(words) - 1) for y, _, words, _, _ in labels), default=0)
        height = max(self.top + self.inner + self.bottom, int(lowest) + 10)
        drawn = joined(
            *self._grid(scale_x, scale_y),
            *(self._line(line, scale_x, scale_y) for line in self.lines),
            *(self._label(*label) for label in labels),
        )
        summary = f"{self.title}. {self.vertical} by {self.horizontal}, both logarithmic. The table has the numbers."
        return tag("svg", drawn, class_="panel", viewBox=f"0 0 {self.width} {height}", role="img", aria_label=summary)

    def _x(self, scale: Scale, value: float) -> float:
        return self.left + (self.width - self.left - self.right) * scale.at(value) / 100

    def _y(self, scale: Scale, value: float) -> float:
        return self.top + self.inner * (1 - scale.at(value) / 100)

    def _grid(self, scale_x: Scale, scale_y: Scale) -> list[Markup]:
        end, base = self.width - self.right, self.top + self.inner
        drawn = [tag("text", self.vertical, x=0, y=11, class_="axis")]
        for tick in scale_y.ticks:
            y = f"{self._y(scale_y, tick):.1f}"
            look = "baseline" if tick == self.baseline else "grid"
            drawn.append(tag("line", x1=self.left, x2=end, y1=y, y2=y, class_=look))
            drawn.append(tag("text", self.value(tick), x=self.left - 6, y=y, dy="0.35em", class_="tick end"))
        drawn.append(tag("line", x1=self.left, x2=end, y1=base, y2=base, class_="base"))
        named = self._named(scale_x)
        for value, name in self.names.items():
            x = f"{self._x(scale_x, value):.1f}"
            drawn.append(tag("line", x1=x, x2=x, y1=base, y2=base + 4, class_="base"))
            if value in named:
                drawn.append(tag("text", name, x=x, y=base + 16, class_="tick"))
        middle = (self.left + end) / 2
        drawn.append(tag("text", self.horizontal, x=f"{middle:g}", y=base + 31, class_="axis middle"))
        return drawn

    def _named(self, scale: Scale) -> set[float]:
        """Every value of the axis, or every second, ...: as many as have room, the last among them."""
        values = sorted(self.names, reverse=True)
        for step in range(1, len(values) + 1):
            kept = values[::step]
            room = (
                self._x(scale, a) - self._x(scale, b) - 3.4 * (len(self.names[a]) + len(self.names[b]))
                for a, b in pairwise(kept)
            )
            if all(space >= 6 for space in room):
                return set(kept)
        return set(values[:1])

    def _line(self, line: Line, scale_x: Scale, scale_y: Scale) -> Markup:
        colour = "guide" if line.quiet else _colour(line.look)
        base, top = self.top + self.inner, self.top
        places = [(self._x(scale_x, x), self._y(scale_y, point.p50)) for x, point in line.points]
        if line.quiet:
            places = _clipped(places, [self._raw_y(scale_y, point.p50) for _, point in line.points], top, base)
        path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
        parts = [tag("path", d=path, class_=f"trace {colour}{' dashed' * line.dashed}")] if len(places) > 1 else []
        if not line.quiet:
            for (x, point), (px, py) in zip(line.points, places, strict=True):
                low, high = self._y(scale_y, point.p20), self._y(scale_y, point.p80)
                at = f"{self._x(scale_x, x):.1f}"
                parts.append(tag("line", x1=at, x2=at, y1=f"{low:.1f}", y2=f"{high:.1f}", class_=f"whisker {colour}"))
                look = f"mark {colour}{' hollow' * line.hollow}"
                parts.append(tag("use", href=f"#mark-{line.look}", x=f"{px:.1f}", y=f"{py:.1f}", class_=look))
        return joined(*parts)

    def _raw_y(self, scale: Scale, value: float) -> float:
        """Without the ends of the scale, which a guide crosses."""
        low, high = math.log(scale.low), math.log(scale.high)
        share = (math.log(value) - low) / (high - low)
        return self.top + self.inner * (1 - (_EDGE + (100 - 2 * _EDGE) * share) / 100)

    def _labels(self, scale_x: Scale, scale_y: Scale) -> list[tuple[float, float, list[str], str, bool]]:
        """Where each label stands, where its line ends, its words, its look: pushed apart, in the order of the ends."""
        found = []
        for line in self.lines:
            if line.points and line.label:
                end = self._y(scale_y, line.points[-1][1].p50)
                words = [*_wrapped(line.label, 20), *([line.note] if line.note else [])]
                found.append((end, words, line))
        found.sort(key=lambda one: one[0])
        heights = [13.0 * len(words) + 3 for _, words, _ in found]
        starts = [end - height / 2 + 12 for (end, _, _), height in zip(found, heights, strict=True)]
        starts = _apart_from_each_other(starts, heights, self.top + 6.0, self.top + self.inner + 12.0)
        return [
            (start, end, words, _colour(line.look), bool(line.note))
            for start, (end, words, line) in zip(starts, found, strict=True)
        ]

    def _label(self, start: float, end: float, words: list[str], colour: str, noted: bool) -> Markup:
        x = self.width - self.right + 14
        middle = start + 13 * (len(words) - 1) / 2 - 4
        leader = tag("path", d=f"M{x - 12} {end:.1f}L{x - 3} {middle:.1f}", class_=f"leader {colour}")
        rows = [
            tag("tspan", word, x=x, dy=13 if i else 0, class_="quiet" if noted and i == len(words) - 1 else None)
            for i, word in enumerate(words)
        ]
        return joined(leader, tag("text", *rows, x=x, y=f"{start:.1f}", class_=f"label {colour}"))


def _clipped(
    places: list[tuple[float, float]], raw: Sequence[float], top: float, base: float
) -> list[tuple[float, float]]:
    """The part of a guide that lies within the plot, cut where it leaves."""
    kept: list[tuple[float, float]] = []
    line = [(x, y) for (x, _), y in zip(places, raw, strict=True)]
    for a, b in pairwise(line):
        ends = []
        for (x, y), (ox, oy) in ((a, b), (b, a)):
            bound = min(max(y, top), base)
            if bound != y and (bound - y) * (bound - oy) > 0:
                break  # all of this piece is outside
            ends.append((x if bound == y else x + (ox - x) * (bound - y) / (oy - y), bound))
        if len(ends) == 2:
            kept += [end for end in ends if not kept or end != kept[-1]]
    return kept


def _wrapped(text: str, width: int) -> list[str]:
    """Words in lines of about so many characters."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _apart_from_each_other(starts: list[float], heights: list[float], top: float, base: float) -> list[float]:
    """Push labels down until none overlaps, then up from the base as far as there is room."""
    placed = list(starts)
    for i, start in enumerate(placed):
        least = top if i == 0 else placed[i - 1] + heights[i - 1]
        placed[i] = max(start, least)
    limit = base
    for i in reversed(range(len(placed))):
        latest = limit - heights[i] + 10
        if placed[i] <= latest:
            break
        placed[i] = max(latest, top + sum(heights[:i]))
        limit = placed[i] - 10
    return placed
