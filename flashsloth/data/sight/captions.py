"""What a picture shows, in full: to align a projector with, not to be scored.

Facts come in random order, so that no place in the list tells which thing is meant: to go on behind "orange circle" is
to find the orange circle. Told from left to right, the list would give the side away.
"""

from __future__ import annotations

from collections.abc import Iterator

from flashsloth.data.sight.dice import Dice
from flashsloth.data.sight.questions import ends, nearest_and_farthest, pairs
from flashsloth.data.sight.scene import CLEAR, COLORS, SHAPES, Scene, Thing

FURTHER = 6  # facts at most beyond those on single things
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")  # thirds of a picture


def caption(scene: Scene, dice: Dice) -> str:
    """Each thing with its place or its height, small print too, and some of what holds among them."""
    facts = [_itself(thing, scene.size) for thing in scene.things]
    kinds = [kind for kind in _among(scene) if kind]
    further = dict.fromkeys(dice.choice(dice.choice(kinds)) for _ in range(FURTHER if kinds else 0))  # no fact twice
    return ", ".join(dice.shuffled([*facts, *further]))


def _itself(thing: Thing, size: int) -> str:
    if thing.family == "bar":
        return f"{_name(thing)} {thing.source}"
    if thing.family == "shape":
        return f"{_name(thing)} {_place(thing.x, thing.y, size)}"
    what = "small print" if thing.family == "small" else _name(thing)
    return f"{what} {thing.name} {_place(thing.x, thing.y, size)}"


def _name(thing: Thing) -> str:
    return f"{thing.color} {thing.name if thing.family == 'shape' else thing.family}"


def _place(x: float, y: float, size: int) -> str:
    return f"{ROWS[min(2, int(3 * y / size))]} {COLUMNS[min(2, int(3 * x / size))]}"


def _among(scene: Scene) -> list[list[str]]:
    """Facts of each kind. What is to be found out stands last: all before it says of what."""
    return [list(kind(scene)) for kind in (_sides, _distances, _outermost, _numbers, _sizes)]


def _sides(scene: Scene) -> Iterator[str]:
    for name, thing, other_name, other in pairs(scene):
        dx, dy = thing.x - other.x, thing.y - other.y
        both = f"{_bare(name)} and {_bare(other_name)}"
        if abs(dx) > CLEAR * scene.size:
            yield f"{both}: {'left' if dx < 0 else 'right'}"
        if abs(dy) > CLEAR * scene.size:
            yield f"{both}: {'above' if dy < 0 else 'below'}"


def _distances(scene: Scene) -> Iterator[str]:
    for which, name, shape in nearest_and_farthest(scene):
        yield f"{which} {_bare(name)}: {_name(shape)}"


def _outermost(scene: Scene) -> Iterator[str]:
    for place, thing in ends(scene):
        yield f"{place} {thing.family}: {thing.color} {thing.name}"


def _numbers(scene: Scene) -> Iterator[str]:
    shapes = scene.of("shape")
    if shapes:
        yield f"shapes: {len(shapes)}"
        for shape in SHAPES:
            yield f"{shape}s: {sum(thing.name == shape for thing in shapes)}"
        for color in COLORS:
            yield f"{color} shapes: {sum(thing.color == color for thing in shapes)}"
    for family in ("digit", "bar"):
        if scene.of(family):
            yield f"{family}s: {len(scene.of(family))}"


def _sizes(scene: Scene) -> Iterator[str]:
    for family, most, least in (("digit", "greatest", "least"), ("bar", "largest", "smallest")):
        ordered = sorted(scene.of(family), key=lambda thing: int(thing.name) if family == "digit" else thing.source)
        if len(ordered) > 1 and len({thing.name for thing in ordered}) == len(ordered):
            for which, thing in ((most, ordered[-1]), (least, ordered[0])):
                yield f"{which} {family}: {thing.color} {thing.name if family == 'digit' else thing.source}"
    bars = scene.of("bar")
    for a in bars:
        for b in bars:
            if a.source != b.source:
                yield f"{_name(a)} and {_name(b)}: {'larger' if a.source > b.source else 'smaller'}"


def _bare(name: str) -> str:
    return name.removeprefix("the ")
