"""A contact sheet: what a data set looks like, for people."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from flashsloth.data.sight.sample import Sample
from flashsloth.data.sight.sources import PILLOW_FACE, font

COLUMNS, CELL, LINES, LINE, TEXT, GAP = 6, 216, 6, 16, 12, 14
BOLD_FACE = "DejaVuSans-Bold"
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
        row = 0
        for question in sample.questions:
            words = _wrapped(question.text, question.answer)
            if row + words[-1][0] >= LINES:
                break  # only whole questions
            for line, across, word, face, ink in words:
                draw.text((x + across, y + CELL + 5 + (row + line) * LINE), word, fill=ink, font=face)
            row += words[-1][0] + 1
    return sheet


def _wrapped(question: str, answer: str) -> list[tuple[int, float, str, ImageFont.FreeTypeFont, tuple[int, int, int]]]:
    """(line, pixels from the left, word, its font, its colour) of each word."""
    plain, bold = font(PILLOW_FACE, TEXT), font(BOLD_FACE, TEXT - 1)
    placed = []
    line, across = 0, 0.0
    for text, face, ink in ((question, plain, QUIET), (answer, bold, INK)):
        for word in text.split():
            if across + face.getlength(word) > CELL:
                line, across = line + 1, 0.0
            placed.append((line, across, word, face, ink))
            across += face.getlength(word + " ")
    return placed
