"""A contact sheet: what a data set looks like, for people."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

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
        lines = [line for question in sample.questions[:LINES] for line in _lines(question.text, question.answer)]
        for j, (question, answer) in enumerate(lines[:LINES]):
            top = y + CELL + 5 + j * LINE
            draw.text((x, top), question, fill=QUIET, font=font(PILLOW_FACE, TEXT))
            draw.text(
                (x + font(PILLOW_FACE, TEXT).getlength(question), top), answer, fill=INK, font=font(BOLD_FACE, TEXT - 1)
            )
    return sheet


def _lines(question: str, answer: str) -> list[tuple[str, str]]:
    """(question, answer) of each line: words of the question as far as they fit, and the answer after the last."""
    face = font(PILLOW_FACE, TEXT)
    lines, line = [], ""
    for word in question.split():
        if face.getlength(line + word) > CELL:
            lines.append((line, ""))
            line = ""
        line += word + " "
    if face.getlength(line) + font(BOLD_FACE, TEXT - 1).getlength(answer) > CELL:
        lines.append((line, ""))
        line = ""
    return [*lines, (line, answer)]
