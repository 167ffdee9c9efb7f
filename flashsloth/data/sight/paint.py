"""Scenes become pixels."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from flashsloth.data.sight.dice import Dice
from flashsloth.data.sight.scene import Scene, Thing
from flashsloth.data.sight.sources import Sources, font

Color = tuple[int, int, int]

RGB: dict[str, Color] = {
    "red": (222, 38, 38),
    "blue": (40, 84, 226),
    "green": (34, 158, 66),
    "orange": (246, 138, 18),
    "yellow": (252, 222, 36),
    "gray": (128, 128, 128),
    "black": (24, 24, 24),
}
DARK, LIGHT = (26, 28, 34), (250, 250, 247)
_PALE = ("orange", "yellow")  # legible on dark only; the others, gray apart, on light only
_PHOTOGRAPH, _GRADIENT = 0.35, 0.2  # shares of the pictures
_INKED = [min(255, round(1.3 * value)) for value in range(256)]  # few strokes reach full ink by themselves
_FINE = 4  # masks are drawn this much larger and reduced: smooth edges


def paint(scene: Scene, dice: Dice, split: str, sources: Sources) -> tuple[Image.Image, bool]:
    """The picture, RGB, and whether a photograph is behind it. ``dice`` decides only what no question asks about."""
    dark = dice.coin()
    photograph = dice.coin(_PHOTOGRAPH)
    if photograph:
        image = _photograph(scene.size, dice, dark, sources.photographs[split])
    else:
        image = _plain(scene.size, dice, dark)
    if scene.kind == "chart":
        _chart(image, scene, dice, dark)
        return image, photograph
    for thing in scene.things:
        if thing.family == "shape":
            _shape(image, thing, dice, LIGHT if dark else DARK)
        elif thing.family == "digit":
            _digit(image, thing, dice, sources)
        else:
            _text(image, thing, dice, dark, photograph)
    return image, photograph


def _plain(size: int, dice: Dice, dark: bool) -> Image.Image:
    def tone() -> Color:
        low, high = (10, 62) if dark else (214, 255)
        return dice.integer(low, high), dice.integer(low, high), dice.integer(low, high)

    if not dice.coin(_GRADIENT):
        return Image.new("RGB", (size, size), tone())
    ends = np.array((tone(), tone()), dtype=np.float32)
    weights = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    line = (ends[0] * (1 - weights) + ends[1] * weights + 0.5).astype(np.uint8)
    line = line[:, None] if dice.coin() else line[None]
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(line, (size, size, 3))))


def _photograph(size: int, dice: Dice, dark: bool, photographs: tuple[np.ndarray, ...]) -> Image.Image:
    """A part of a photograph, turned towards black or white: what lies on it must be told apart."""
    whole = dice.choice(photographs)
    height, width = whole.shape[:2]
    side = int(min(height, width) * dice.between(0.45, 1.0))
    x, y = dice.integer(0, width - side), dice.integer(0, height - side)
    part = Image.fromarray(whole[y : y + side, x : x + side])
    if dice.coin():
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    part = part.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    end = Image.new("RGB", (size, size), (16, 16, 20) if dark else (248, 248, 246))
    return Image.blend(part, end, dice.between(0.45, 0.7))


def _shade(name: str, dice: Dice) -> Color:
    """A colour is not always the very same one, but stays itself."""
    r, g, b = (min(255, max(0, value + dice.integer(-12, 12))) for value in RGB[name])
    return (r, r, r) if name == "gray" else (r, g, b)


def _shape(image: Image.Image, thing: Thing, dice: Dice, outline: Color) -> None:
    r = thing.half[0]
    edge = max(1.0, image.width * 0.007)
    box = 2 * math.ceil(r + 1)
    corner = round(thing.x - box / 2), round(thing.y - box / 2)
    for radius, color in ((r, outline), (r - edge, _shade(thing.name if thing.family == "bar" else thing.color, dice))):
        mask = Image.new("L", (box * _FINE, box * _FINE))
        draw, middle = ImageDraw.Draw(mask), box * _FINE / 2
        if thing.name == "circle":
            reach = radius * _FINE * 0.94
            draw.ellipse((middle - reach, middle - reach, middle + reach, middle + reach), fill=255)
        else:
            points = _corners(thing.name, math.radians(thing.turn), radius)
            draw.polygon([(middle + x * _FINE, middle + y * _FINE) for x, y in points], fill=255)
        image.paste(color, corner, mask.reduce(_FINE))


def _corners(shape: str, turn: float, radius: float) -> list[tuple[float, float]]:
    """On a circle of ``radius`` around the origin, y downwards."""
    sides, inner = {"square": (4, 0.0), "triangle": (3, 0.0), "star": (5, 0.42)}[shape]
    start = turn - math.pi / 2 + (math.pi / 4 if shape == "square" else 0.0)
    points = []
    for i in range(sides):
        for part, reach in ((0.0, 1.0), (0.5, inner)):
            if reach:
                angle = start + 2 * math.pi * (i + part) / sides
                points.append((radius * reach * math.cos(angle), radius * reach * math.sin(angle)))
    return points


def _plate(image: Image.Image, box: tuple[float, float, float, float], dice: Dice, dark: bool) -> None:
    tone = dice.integer(18, 44) if dark else dice.integer(236, 255)
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle(box, radius=dice.integer(0, max(1, image.width // 40)), fill=(tone, tone, tone))


def _ground(color: str, dice: Dice) -> bool:
    """Whether the ground below ink of a colour is dark."""
    return True if color in _PALE else dice.coin() if color == "gray" else False


def _digit(image: Image.Image, thing: Thing, dice: Dice, sources: Sources) -> None:
    half = round(thing.half[0])
    x, y = round(thing.x), round(thing.y)
    _plate(image, (x - half, y - half, x + half - 1, y + half - 1), dice, _ground(thing.color, dice))
    side = round(2 * half * 0.84)
    ink = Image.fromarray(sources.digits[thing.source]).point(_INKED).resize((side, side), Image.Resampling.BICUBIC)
    ink = ink.rotate(thing.turn, Image.Resampling.BILINEAR)
    image.paste(_shade(thing.color, dice), (x - side // 2, y - side // 2), ink)


def _text(image: Image.Image, thing: Thing, dice: Dice, dark: bool, photograph: bool) -> None:
    box = thing.x - thing.half[0], thing.y - thing.half[1], thing.x + thing.half[0], thing.y + thing.half[1]
    small = thing.family == "small"
    wanted = _ground(thing.color, dice)
    if small or photograph or wanted != dark:
        _plate(image, box, dice, wanted)
    if small:
        mask = _small_print(thing, dice)
    else:
        face = font(thing.face, thing.source)
        left, top, right, bottom = face.getbbox(thing.name)
        mask = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2))
        ImageDraw.Draw(mask).text((1 - left, 1 - top), thing.name, fill=255, font=face)
        mask = mask.rotate(thing.turn if not photograph else 0, Image.Resampling.BICUBIC, expand=True)
    image.paste(_shade(thing.color, dice), (round(thing.x - mask.width / 2), round(thing.y - mask.height / 2)), mask)


def _small_print(thing: Thing, dice: Dice) -> Image.Image:
    """Letters as a camera sees them, at any fraction of a pixel. Set on whole pixels with hinting, a letter would be
    the same few pixels each time, and these can be told apart even at half the side."""
    face = font(thing.face, thing.source * _FINE)
    left, top, right, bottom = face.getbbox(thing.name)
    width, height = (_FINE * (math.ceil(length / _FINE) + 2) for length in (right - left, bottom - top))
    mask = Image.new("L", (width, height))
    corner = dice.integer(0, 2 * _FINE - 1) - left, dice.integer(0, 2 * _FINE - 1) - top
    ImageDraw.Draw(mask).text(corner, thing.name, fill=255, font=face)
    return mask.reduce(_FINE)


def _chart(image: Image.Image, scene: Scene, dice: Dice, dark: bool) -> None:
    left, top, right, bottom = scene.plot
    draw = ImageDraw.Draw(image)
    _plate(image, (left - 6, top - 6, right + 6, bottom + 6), dice, dark)
    ink = LIGHT if dark else DARK
    if dice.coin():
        faint = tuple((a + 3 * b) // 4 for a, b in zip(ink, DARK if dark else LIGHT, strict=True))
        for i in range(1, 5):
            if scene.horizontal:
                x = left + (right - left) * i / 5
                draw.line((x, top, x, bottom), fill=faint)
            else:
                y = bottom - (bottom - top) * i / 5
                draw.line((left, y, right, y), fill=faint)
    for bar in scene.things:
        box = bar.x - bar.half[0], bar.y - bar.half[1], bar.x + bar.half[0], bar.y + bar.half[1]
        draw.rectangle(box, fill=_shade(bar.color, dice), outline=ink)
    if scene.horizontal:
        draw.line((left, top, left, bottom), fill=ink, width=2)
    else:
        draw.line((left, bottom, right, bottom), fill=ink, width=2)
