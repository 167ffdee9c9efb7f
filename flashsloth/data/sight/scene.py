"""What is in a picture, before it is drawn: things with a name, a colour and a place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flashsloth.data.sight.dice import Dice, split_of
from flashsloth.data.sight.sources import FACES, SMALL_FACES, Sources, font
from flashsloth.data.sight.words import draw_word

COLORS = ("red", "blue", "green", "orange", "yellow", "gray")  # those of Sort-of-CLEVR
SHAPES = ("circle", "square", "triangle", "star")

# As parts of the side of the picture. Below the first, "left or right?" and "above or below?" would be hard to tell.
CLEAR = 0.10
FROM_MIDDLE = 0.07
MARGIN = 0.03

# Small print is set in 9/216 of the side: an x-height of 5 pixels in a picture of 216. Tiles in HD keep every pixel; a
# tower that sees the picture at half its side is left with 2 or 3. A network of one hidden layer, trained on 16,000
# crops, told the letter in the middle of three in 97.5 % at full and in 85 % at half the side, where a word of four
# letters would come out right half the time. Digits are told at half the side too (98 %), so there are none.
SMALL_PRINT = 9 / 216
BAR_LEVELS = 10


@dataclass(frozen=True)
class Thing:
    """``family`` is shape, digit, word, bar or small (print); x and y are its centre, in pixels.

    ``name``: the shape, the digit or the word; for a bar its colour. ``half``: half its width and height.
    ``turn``: degrees; ``source``: the digit sample, the height of a bar in levels or the font in pixels.
    """

    family: str
    name: str
    color: str
    x: float
    y: float
    half: tuple[float, float]
    turn: float = 0.0
    source: int = 0
    face: str = ""


@dataclass(frozen=True)
class Scene:
    """A picture of one kind (shapes, digits, words, chart, mixed, label) and of ``size`` x ``size`` pixels."""

    kind: str
    size: int
    things: tuple[Thing, ...]
    horizontal: bool = False  # bars that grow to the right
    plot: tuple[float, float, float, float] = field(default=(0, 0, 0, 0))  # of a chart: left, top, right, bottom

    def of(self, family: str) -> list[Thing]:
        return [thing for thing in self.things if thing.family == family]

    def key(self) -> str:
        """What makes the picture what it is; which split owns it depends on this."""
        things = (f"{t.family} {t.name} {t.color} {t.x:.0f} {t.y:.0f} {t.source}" for t in self.things)
        return f"{self.kind} {self.size} " + ", ".join(things)


def compose(dice: Dice, split: str, size: int, sources: Sources) -> Scene:
    """A scene that belongs to ``split``: words and digit samples are its own, and so is the layout as a whole."""
    while True:
        kind = dice.weighted(tuple(_KINDS), tuple(weight for _, weight in _KINDS.values()))
        scene = _KINDS[kind][0](dice, split, size, sources)
        if scene is not None and split_of(scene.key()) == split:
            return scene


def _shapes(dice: Dice, split: str, size: int, sources: Sources) -> Scene | None:
    count = dice.weighted((1, 2, 3, 4, 5, 6), (2, 3, 4, 4, 4, 4))
    looks = _looks(dice, count)
    things = _scatter(dice, looks, size, (0.055, 0.11), [])
    return Scene("shapes", size, tuple(things)) if things else None


def _looks(dice: Dice, count: int) -> list[tuple[str, str]]:
    """(shape, colour) of each. Few shapes or few colours now and then, so that counts beyond two come up too."""
    shapes = dice.sample(SHAPES, dice.weighted((1, 2, 4), (2, 3, 5)))
    colors = dice.sample(COLORS, dice.weighted((1, 2, 6), (1, 3, 8)))
    return [(dice.choice(shapes), dice.choice(colors)) for _ in range(count)]


def _scatter(
    dice: Dice, looks: Sequence[tuple[str, str]], size: int, radius: tuple[float, float], taken: Sequence[Thing]
) -> list[Thing] | None:
    """Shapes that touch neither each other nor what is there; up to three stand in a clear order from left to right."""
    things: list[Thing] = []
    for shape, color in looks:
        for _ in range(60):
            r = size * dice.between(*radius)
            low, high = MARGIN * size + r, (1 - MARGIN) * size - r
            x, y = round(dice.between(low, high)), round(dice.between(low, high))
            thing = Thing("shape", shape, color, x, y, (r, r), turn=dice.between(-20, 20))
            in_order = len(looks) > 3 or all(abs(x - other.x) > CLEAR * size for other in things)
            if in_order and not any(_touch(thing, other, 0.02 * size) for other in [*things, *taken]):
                things.append(thing)
                break
        else:
            return None
    return things


def _touch(a: Thing, b: Thing, gap: float) -> bool:
    if a.family == b.family == "shape":
        reach = a.half[0] + b.half[0] + gap
        return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < reach**2
    return abs(a.x - b.x) < a.half[0] + b.half[0] + gap and abs(a.y - b.y) < a.half[1] + b.half[1] + gap


def _digit(dice: Dice, split: str, sources: Sources, color: str, x: float, y: float, half: float) -> Thing:
    sample = dice.choice(sources.digit_ids[split])
    name = str(sources.labels[sample])
    return Thing("digit", name, color, round(x), round(y), (half, half), turn=dice.between(-8, 8), source=sample)


def _digits(dice: Dice, split: str, size: int, sources: Sources) -> Scene | None:
    count = dice.integer(1, 3)
    colors = dice.sample(COLORS, count)
    things = []
    for i in range(count):
        slot = size / count
        half = dice.between(0.10, min(0.18, 0.46 / count)) * size
        x = slot * i + dice.between(half + 0.01 * size, slot - half - 0.01 * size)
        y = dice.between(half + MARGIN * size, (1 - MARGIN) * size - half)
        things.append(_digit(dice, split, sources, colors[i], x, y, half))
    return Scene("digits", size, tuple(things))


def _word(
    dice: Dice, word: str, color: str, size: int, top: float, bottom: float, pixels: tuple[float, float]
) -> Thing:
    """A word somewhere between two heights, as large as ``pixels`` (of a picture of side 1) and the width allow."""
    face = dice.choice(FACES)
    letters = round(size * dice.between(*pixels))
    while font(face, letters).getlength(word) > 0.86 * size:
        letters -= 1
    width, height = font(face, letters).getlength(word), 1.2 * letters
    half = (width / 2 + 0.02 * size, height / 2 + 0.01 * size)
    slack = max(0.0, (bottom - top) * size - 2 * half[1])
    x = dice.between(half[0] + MARGIN * size, (1 - MARGIN) * size - half[0])
    y = top * size + half[1] + dice.between(0, slack)
    return Thing("word", word, color, round(x), round(y), half, turn=dice.between(-5, 5), source=letters, face=face)


def _words(dice: Dice, split: str, size: int, sources: Sources) -> Scene | None:
    colors = dice.sample(COLORS, 2)
    first, second = draw_word(dice, split), draw_word(dice, split)
    if dice.coin():
        return Scene("words", size, (_word(dice, first, colors[0], size, 0.06, 0.94, (0.13, 0.21)),))
    if first == second:
        return None
    bands = ((0.06, 0.46), (0.54, 0.94))
    things = [
        _word(dice, word, color, size, *band, (0.12, 0.17))
        for word, color, band in zip((first, second), colors, bands, strict=True)
    ]
    return Scene("words", size, tuple(things))


def _chart(dice: Dice, split: str, size: int, sources: Sources) -> Scene | None:
    count = dice.integer(2, 5)
    levels = dice.sample(range(1, BAR_LEVELS + 1), count)
    colors = dice.sample(COLORS, count)
    horizontal = dice.coin(0.4)
    left, top = dice.between(0.08, 0.18) * size, dice.between(0.06, 0.16) * size
    right, bottom = dice.between(0.82, 0.94) * size, dice.between(0.80, 0.92) * size
    across, along = (bottom - top, right - left) if horizontal else (right - left, bottom - top)
    slot = across / count
    half = slot * dice.between(0.28, 0.42)
    things = []
    for i, (level, color) in enumerate(zip(levels, colors, strict=True)):
        length, middle = along * level / BAR_LEVELS, slot * (i + 0.5)
        if horizontal:
            x, y, box = left + length / 2, top + middle, (length / 2, half)
        else:
            x, y, box = left + middle, bottom - length / 2, (half, length / 2)
        things.append(Thing("bar", color, color, x, y, box, source=level))
    return Scene("chart", size, tuple(things), horizontal, (left, top, right, bottom))


def _mixed(dice: Dice, split: str, size: int, sources: Sources) -> Scene | None:
    """A word across the top or the bottom, a digit and one to three shapes, all of different colours."""
    colors = dice.sample(COLORS, 5)
    above = dice.coin()
    word = _word(
        dice, draw_word(dice, split), colors[0], size, *((0.04, 0.28) if above else (0.72, 0.96)), (0.11, 0.14)
    )
    top, bottom = (0.31, 0.96) if above else (0.04, 0.69)
    half = dice.between(0.10, 0.14) * size
    x, y = (
        dice.between(half + MARGIN * size, (1 - MARGIN) * size - half),
        dice.between(top * size + half, bottom * size - half),
    )
    digit = _digit(dice, split, sources, colors[1], x, y, half)
    looks = [(dice.choice(SHAPES), color) for color in colors[2 : 2 + dice.integer(1, 3)]]
    shapes = _scatter(dice, looks, size, (0.055, 0.09), [word, digit])
    return Scene("mixed", size, (word, digit, *shapes)) if shapes else None


def _label(dice: Dice, split: str, size: int, sources: Sources) -> Scene | None:
    """One to three shapes, and a white card with a word in small print."""
    text, face, pixels = draw_word(dice, split), dice.choice(SMALL_FACES), round(SMALL_PRINT * size)
    half = (font(face, pixels).getlength(text) / 2 + 0.03 * size, 0.75 * pixels + 0.01 * size)
    x = round(dice.between(half[0] + MARGIN * size, (1 - MARGIN) * size - half[0]))
    y = round(dice.between(half[1] + MARGIN * size, (1 - MARGIN) * size - half[1]))
    card = Thing("small", text, "black", x, y, half, source=pixels, face=face)
    shapes = _scatter(dice, _looks(dice, dice.integer(1, 3)), size, (0.055, 0.10), [card])
    return Scene("label", size, (card, *shapes)) if shapes else None


_Composer = Callable[[Dice, str, int, Sources], Scene | None]
_KINDS: dict[str, tuple[_Composer, int]] = {
    "shapes": (_shapes, 6),
    "digits": (_digits, 3),
    "words": (_words, 4),
    "chart": (_chart, 3),
    "mixed": (_mixed, 3),
    "label": (_label, 4),
}
