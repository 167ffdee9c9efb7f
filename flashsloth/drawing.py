"""The picture of the demo: where pooling and the embedded queries look, drawn over the photograph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flashsloth.files import replacing
from flashsloth.overlay import onto_picture, tint

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
SIZE_INCHES, DPI = (15.0, 6.75), 110
PANEL, MARGIN, BOTTOM = 4.6, 0.4, 0.95  # inches; the gap between panels takes what is left
INK, QUIET = "#1d2433", "#5b6475"
COLOURS = "inferno"


def check_target(path: Path) -> Path:
    """``path``, if a picture can be written there; ValueError or FileNotFoundError before any work is done."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--out: expected a file ending in {', '.join(FORMATS)}, got {path}")
    if path.is_dir():
        raise ValueError(f"--out: expected a file, got the directory {path}")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out: expected a file in an existing directory, got {path}")
    return path


def draw_attention(
    path: Path, photograph: Image.Image, pooling: np.ndarray, queries: np.ndarray, *, window: int, caption: str
) -> None:
    """Write the picture to ``path``, whole or not at all.

    Args:
        photograph: RGB; shown square, as the vision tower sees it.
        pooling: weights ``(rows, columns)`` of the vision tokens, summing to one within each window.
        queries: attention ``(Q, rows, columns)`` of each embedded query to the vision tokens, summing to one.
        window: side of a pooling window, in tokens.
        caption: what a reader must know, below.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    photo = np.asarray(photograph.convert("RGB").resize((540, 540), Image.Resampling.LANCZOS)) / 255
    rows, columns = pooling.shape
    pooled = -(-rows // window) * -(-columns // window)
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _text(figure, MARGIN, 6.4, "FlashSloth compresses what it sees, and looks again", 17, bold=True)

    _heading(figure, 0, "What comes in", f"{rows} x {columns} = {rows * columns} vision tokens")
    _axes(figure, *_corner(0), PANEL).imshow(photo)

    kept = f"each {window} x {window} window becomes one token, {pooled} in all"
    _heading(figure, 1, "Spatial attention pooling", kept)
    _pooling(figure, photo, pooling * window**2, window)

    count = queries.shape[0]
    _heading(figure, 2, "Embedded queries", f"{count} queries, each attends to all {rows * columns} tokens")
    _queries(figure, photo, queries * (rows * columns))

    _text(figure, MARGIN, 0.22, caption, 10)
    _write(figure, path)


def _corner(panel: int) -> tuple[float, float]:
    gap = (SIZE_INCHES[0] - 2 * MARGIN - 3 * PANEL) / 2
    return MARGIN + panel * (PANEL + gap), BOTTOM


def _axes(figure: Any, left: float, bottom: float, width: float, height: float | None = None) -> Any:
    """Bare axes at a place given in inches."""
    across, up = SIZE_INCHES
    axes = figure.add_axes((left / across, bottom / up, width / across, (height or width) / up))
    axes.set_axis_off()
    return axes


def _text(figure: Any, x: float, y: float, text: str, size: float, *, bold: bool = False, align: str = "left") -> None:
    figure.text(
        x / SIZE_INCHES[0],
        y / SIZE_INCHES[1],
        text,
        fontsize=size,
        fontweight="bold" if bold else "normal",
        color=INK if bold else QUIET,
        ha=align,
        va="center",
    )


def _heading(figure: Any, panel: int, name: str, note: str) -> None:
    left, bottom = _corner(panel)
    _text(figure, left, bottom + PANEL + 0.16, note, 10)
    _text(figure, left, bottom + PANEL + 0.4, name, 13, bold=True)


def _tinted(photo: np.ndarray, values: np.ndarray, *, smooth: bool = False) -> np.ndarray:
    return tint(photo, onto_picture(values[None], photo.shape[1::-1], smooth=smooth))


def _pooling(figure: Any, photo: np.ndarray, weights: np.ndarray, window: int) -> None:
    left, bottom = _corner(1)
    axes = _axes(figure, left, bottom, PANEL)
    axes.imshow(_tinted(photo, weights))
    side, (rows, columns) = photo.shape[0], weights.shape
    for lines, count in ((axes.axhline, rows), (axes.axvline, columns)):
        for edge in range(window, count, window):
            lines(edge * side / count - 0.5, color="white", linewidth=0.8, alpha=0.75)
    bar = _axes(figure, left, bottom - 0.2, PANEL, 0.1)
    bar.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=COLOURS)
    low, high = weights.min(), weights.max()
    _text(figure, left, bottom - 0.33, f"{low:.2f}", 9)
    _text(figure, left + PANEL / 2, bottom - 0.33, "weight within its window (1: a plain average)", 9, align="center")
    _text(figure, left + PANEL, bottom - 0.33, f"{high:.2f}", 9, align="right")


def _queries(figure: Any, photo: np.ndarray, attention: np.ndarray) -> None:
    left, bottom = _corner(2)
    across = int(np.ceil(np.sqrt(len(attention))))
    gap = 0.08
    side = (PANEL - (across - 1) * gap) / across
    shadow = {"facecolor": "black", "alpha": 0.45, "edgecolor": "none", "pad": 1.6}
    for number, values in enumerate(attention):
        row, column = divmod(number, across)
        axes = _axes(figure, left + column * (side + gap), bottom + PANEL - side - row * (side + gap), side)
        axes.imshow(_tinted(photo, values, smooth=True))
        place: dict[str, Any] = {"transform": axes.transAxes, "color": "white", "va": "center", "bbox": shadow}
        axes.text(0.05, 0.925, str(number + 1), fontsize=10, fontweight="bold", **place)
        axes.text(0.955, 0.06, f"{values.min():.2f} to {values.max():.2f}", fontsize=8, ha="right", **place)
    _text(figure, left, bottom - 0.33, "attention (1: the same to every token), least and most in each corner", 9)


def _write(figure: Any, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=DPI)
