"""What each patch of a tower's view shows, known exactly because the pictures are drawn: labels to pretrain a tower on.

A caption says a dozen words of a picture; the patches say thousands of things, each where it is. That is what makes a
tower of a million parameters learn to see on a processor without a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from flashsloth.data.sight.scene import COLORS, SHAPES, Scene, Thing
from flashsloth.data.sight.sources import font

KINDS = ("nothing", *SHAPES, *map(str, range(10)), "bar", "word", "small")
INKS = ("nothing", *COLORS, "black")
LETTERS = 27  # nothing, a to z
PLACES = 6  # nothing, first to fifth letter
SPELLED = 5  # letters that a word has at most
COLUMNS = 3  # a letter of small print is narrower than a patch, so letters are told at three points across one
# Centre of the thing from that of the patch (x, y), half its width and height, height of a bar, centre within the view.
GEOMETRY = 7

_INSIDE = 0.75  # of a shape's radius: within a square almost wholly, within a star or a triangle mostly
_FINE = 4  # small print is drawn this much larger and reduced


@dataclass(frozen=True)
class View:
    """A square of a picture as a tower sees it: pixel = (picture - origin) * scale."""

    scale: float
    left: float = 0.0
    top: float = 0.0


@dataclass(frozen=True)
class PatchLabels:
    """kind, ink: int64 (rows, columns); letter, place: int64 (rows, columns, 3): which letter of a word is there;
    spelling: int64 (rows, columns, 5), all letters of the word that is there; geometry: float32 (rows, columns, 7), in
    parts of the side of the view, and only of meaning where there is a thing."""

    kind: np.ndarray
    ink: np.ndarray
    letter: np.ndarray
    place: np.ndarray
    spelling: np.ndarray
    geometry: np.ndarray


def views(picture: int, side: int) -> tuple[View, list[View]]:
    """The whole of a square picture at ``side`` pixels, and its four quarters as HD cuts them."""
    whole, half = View(side / picture), View(2 * side / picture)
    quarters = [View(half.scale, x * picture / 2, y * picture / 2) for y in (0, 1) for x in (0, 1)]
    return whole, quarters


def label_patches(scene: Scene, view: View, grid: int, patch: int, upright: bool) -> PatchLabels:
    """Labels of ``grid`` x ``grid`` patches of ``patch`` pixels. ``upright``: words are not turned (on photographs)."""
    centres = (np.arange(grid) + 0.5) * patch / view.scale
    x, y = np.meshgrid(centres + view.left, centres + view.top)
    across = (np.arange(COLUMNS) - COLUMNS // 2) * patch / COLUMNS / view.scale
    kind, ink = np.zeros((grid, grid), np.int64), np.zeros((grid, grid), np.int64)
    letter, place = np.zeros((grid, grid, COLUMNS), np.int64), np.zeros((grid, grid, COLUMNS), np.int64)
    spelling = np.zeros((grid, grid, SPELLED), np.int64)
    geometry = np.zeros((grid, grid, GEOMETRY), np.float32)
    side = grid * patch / view.scale
    for thing in scene.things:
        dx, dy = x - thing.x, y - thing.y
        if thing.family == "shape":
            there = np.hypot(dx, dy) < _INSIDE * thing.half[0]
        else:
            there = (np.abs(dx) < thing.half[0]) & (np.abs(dy) < thing.half[1])
        if thing.family in ("word", "small"):
            found = _letters(thing, dx[..., None] + across, dy[..., None], 0.0 if upright else thing.turn)
            code = np.frombuffer(thing.name.encode(), np.uint8).astype(np.int64) - ord("a") + 1
            letter[found > 0] = code[found[found > 0] - 1]
            place[found > 0] = found[found > 0]
            there |= found.any(axis=-1)
            spelling[there, : len(code)] = code
        kind[there] = KINDS.index(thing.name if thing.family in ("shape", "digit") else thing.family)
        ink[there] = INKS.index(thing.color)
        level = thing.source / 10 if thing.family == "bar" else 0.0
        geometry[there, 0], geometry[there, 1] = -dx[there] / side, -dy[there] / side
        geometry[there, 2:5] = thing.half[0] / side, thing.half[1] / side, level
        geometry[there, 5:] = (thing.x - view.left) / side, (thing.y - view.top) / side
    return PatchLabels(kind, ink, letter, place, spelling, geometry)


def _letters(thing: Thing, dx: np.ndarray, dy: np.ndarray, turn: float) -> np.ndarray:
    """Which letter of a word (from 1) lies at an offset from its centre, 0 for none."""
    fine = _FINE if thing.family == "small" else 1
    edges, height = _edges(thing.face, thing.source * fine, thing.name)
    angle = math.radians(turn if thing.family == "word" else 0.0)
    along = (dx * math.cos(angle) - dy * math.sin(angle)) * fine
    down = (dx * math.sin(angle) + dy * math.cos(angle)) * fine
    index = np.searchsorted(edges, along, side="right")
    index[(index == len(edges)) | (np.abs(down) > height / 2)] = 0
    return index


@cache
def _edges(face: str, pixels: int, word: str) -> tuple[np.ndarray, float]:
    """Where letters begin and the last ends, from the middle of the drawn word, and how high it is. In pixels."""
    drawn = font(face, pixels)
    left, top, right, bottom = drawn.getbbox(word)
    ends = [drawn.getlength(word[:i]) for i in range(len(word) + 1)]
    return np.array(ends) - (left + right) / 2, bottom - top
