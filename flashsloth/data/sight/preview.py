"""A contact sheet: what a data set looks like, for people."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from flashsloth.data.sight.sample import Sample
from flashsloth.data.sight.sources import PILLOW_FACE, font

COLUMNS, CELL, LINES, LINE, GAP = 6, 216, 4, 17, 14
INK, QUIET = (29, 36, 51), (91, 101, 117)


def draw_preview(samples: Sequence[Sample]) -> Image.Image:
    """Each picture with its first questions and their answers below, as many as there is room for."""
    rows = -(-len(samples) // COLUMNS)
    height = CELL + LINES * LINE + 2 * GAP
    sheet = Image.new("RGB", (COLUMNS * (CELL + GAP) + GAP, rows * height + GAP), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, sample in enumerate(samples):
        x, y = GAP + i % COLUMNS * (CELL + GAP), GAP + i // COLUMNS * height
        smooth = sample.image.width >= CELL  # small pictures are shown in whole pixels
        resampling = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
        sheet.paste(sample.image.resize((CELL, CELL), resampling), (x, y))
        draw.rectangle((x - 1, y - 1, x + CELL, y + CELL), outline=(222, 226, 233))
        lines = [line for question in sample.questions[:LINES] for line in _lines(question.text, question.answer)]
        for j, (text, color) in enumerate(lines[:LINES]):
            draw.text((x, y + CELL + 5 + j * LINE), text, fill=color, font=font(PILLOW_FACE, 13))
    return sheet


def _lines(question: str, answer: str) -> list[tuple[str, tuple[int, int, int]]]:
    face = font(PILLOW_FACE, 13)
    if face.getlength(f"{question} {answer}") <= CELL:
        return [(f"{question} {answer}", INK)]
    return [(_cut(question), QUIET), (_cut(answer), INK)]


def _cut(text: str) -> str:
    face = font(PILLOW_FACE, 13)
    if face.getlength(text) <= CELL:
        return text
    while face.getlength(text + "...") > CELL:
        text = text[:-1]
    return text + "..."
