"""Pictures as full as can be: a picture of ``sight`` shows two letters on average, one of these 38.

They have no questions. They are for a tower to learn what things look like at every place relative to its patches, and
are of the training split: its digit samples, its words, its photographs.
"""

from __future__ import annotations

from flashsloth.data.sight.dice import Dice
from flashsloth.data.sight.scene import COLORS, MARGIN, SHAPES, SMALL_PRINT, Scene, Thing
from flashsloth.data.sight.sources import FACES, SMALL_FACES, Sources, font
from flashsloth.data.sight.words import draw_word

_FAMILIES, _SHARES = ("word", "small", "digit", "shape"), (6, 2, 2, 2)


def crowd(dice: Dice, size: int, sources: Sources) -> Scene:
    """A scene of ``size`` x ``size`` pixels: rows of words, of small print, of digits or of shapes, as they come."""
    things: list[Thing] = []
    top = dice.between(0, MARGIN) * size
    while True:
        row = _row(dice, size, sources, top)
        bottom = max(thing.y + thing.half[1] for thing in row)
        if bottom > size:
            return Scene("crowd", size, tuple(things))
        things += row
        top = bottom + dice.between(0, 0.03) * size


def _row(dice: Dice, size: int, sources: Sources, top: float) -> list[Thing]:
    """Things beside each other, their upper edges roughly at ``top``."""
    family = dice.weighted(_FAMILIES, _SHARES)
    scale, face = dice.between(0, 1), dice.choice(SMALL_FACES if family == "small" else FACES)
    things: list[Thing] = []
    left = dice.between(0, 0.06) * size
    while True:
        name, turn, source = "", 0.0, 0
        if family == "shape":
            name, turn = dice.choice(SHAPES), dice.between(-20, 20)
            half = (size * (0.055 + 0.045 * scale),) * 2
        elif family == "digit":
            source, turn = dice.choice(sources.digit_ids["train"]), dice.between(-8, 8)
            name = str(sources.labels[source])
            half = (size * (0.09 + 0.05 * scale),) * 2
        else:
            name = draw_word(dice, "train")
            source = round(SMALL_PRINT * size) if family == "small" else round(size * (0.10 + 0.09 * scale))
            width = font(face, source).getlength(name) / 2
            half = (width + (0.03 if family == "small" else 0.02) * size, (0.75 if family == "small" else 0.6) * source)
            turn = 0.0 if family == "small" else dice.between(-5, 5)
        x = left + half[0]
        if x + half[0] > size:
            return things or _row(dice, size, sources, top)
        color = "black" if family == "small" else dice.choice(COLORS)
        y = top + half[1] + dice.between(0, 0.02) * size
        things.append(Thing(family, name, color, round(x), round(y), half, turn, source, face))
        left = x + half[0] + dice.between(0, 0.04) * size
