"""Pictures with as many things in them as fit: a picture of ``sight`` shows a few letters, one of these dozens.

They have no questions. They are for a tower to learn what things look like, and are of the training split: its digit
samples, its words, its photographs.
"""

from __future__ import annotations

from flashsloth.data.sight.dice import Dice
from flashsloth.data.sight.scene import COLORS, MARGIN, SHAPES, SMALL_PRINT, Scene, Thing
from flashsloth.data.sight.sources import FACES, SMALL_FACES, Sources, font
from flashsloth.data.sight.words import draw_word

_FAMILIES, _SHARES = ("word", "small", "digit", "shape"), (5, 3, 3, 2)
_TRIES = 60
_GAP = 0.01  # of the side


def crowd(dice: Dice, size: int, sources: Sources) -> Scene:
    """A scene of ``size`` x ``size`` pixels; no two things touch."""
    things: list[Thing] = []
    for _ in range(_TRIES):
        thing = _thing(dice, size, sources)
        reach = tuple(half + _GAP * size for half in thing.half)
        if all(
            abs(thing.x - other.x) > reach[0] + other.half[0] or abs(thing.y - other.y) > reach[1] + other.half[1]
            for other in things
        ):
            things.append(thing)
    return Scene("crowd", size, tuple(things))


def _thing(dice: Dice, size: int, sources: Sources) -> Thing:
    family, color = dice.weighted(_FAMILIES, _SHARES), dice.choice(COLORS)
    name, face, turn, source = "", "", 0.0, 0
    if family == "shape":
        name, turn = dice.choice(SHAPES), dice.between(-20, 20)
        half = (size * dice.between(0.055, 0.11),) * 2
    elif family == "digit":
        source, turn = dice.choice(sources.digit_ids["train"]), dice.between(-8, 8)
        name = str(sources.labels[source])
        half = (size * dice.between(0.10, 0.16),) * 2
    else:
        small = family == "small"
        name, face = draw_word(dice, "train"), dice.choice(SMALL_FACES if small else FACES)
        source = round(SMALL_PRINT * size) if small else round(size * dice.between(0.11, 0.19))
        width = font(face, source).getlength(name) / 2
        if small:
            color, half = "black", (width + 0.03 * size, 0.75 * source + 0.01 * size)
        else:
            turn, half = dice.between(-5, 5), (min(width + 0.02 * size, 0.47 * size), 0.6 * source + 0.01 * size)

    def place(half: float) -> int:
        return round(dice.between(half + MARGIN * size, (1 - MARGIN) * size - half))

    return Thing(family, name, color, place(half[0]), place(half[1]), half, turn, source, face)
