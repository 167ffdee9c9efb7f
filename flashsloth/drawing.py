"""The picture of the demo: where pooling and the embedded queries look, drawn over the photograph."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
SIZE_INCHES, DPI = (15.0, 6.6), 110
INK, QUIET = "#1d2433", "#5b6475"


def check_target(path: Path) -> Path:
    """``path``, if a picture can be written there; ValueError or FileNotFoundError before any work is done."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--out: expected a file ending in {', '.join(FORMATS)}, got {path}")
    if path.is_dir():
        raise ValueError(f"--out: expected a file, got the directory {path}")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out: expected an existing directory, got {path.parent}")
    return path


def draw_attention(
    path: Path, photograph: Image.Image, pooling: np.ndarray, queries: np.ndarray, *, window: int, caption: str
) -> None:
    """Write the picture to ``path``, whole or not at all.

    Args:
        photograph: RGB.
        pooling: weights ``(rows, columns)`` of the vision tokens, summing to one within each window.
        queries: attention ``(Q, rows, columns)`` of each embedded query to the vision tokens, summing to one.
        window: side of a pooling window, in tokens.
        caption: what a reader must know, below.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    photo = np.asarray(_shown(photograph))
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, facecolor="white", layout="none")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 3, left=0.02, right=0.985, top=0.81, bottom=0.115, wspace=0.085)
    rows, columns = pooling.shape
    pooled = -(-rows // window) * -(-columns // window)

    left = figure.add_subplot(grid[0])
    _title(left, "What comes in", f"{rows} x {columns} = {rows * columns} vision tokens")
    left.imshow(photo)
    _bare(left)

    middle = figure.add_subplot(grid[1])
    _title(middle, "Spatial attention pooling", f"each {window} x {window} window becomes one token: {pooled} remain")
    _pooling(middle, photo, pooling, window)

    _queries(figure, grid[2], photo, queries)
    figure.text(0.02, 0.955, "FlashSloth", color=INK, fontsize=17, fontweight="bold", va="center")
    figure.text(0.113, 0.953, "compresses what it sees, and looks again where it must", color=QUIET, fontsize=13, va="center")
    figure.text(0.02, 0.04, caption, color=QUIET, fontsize=10.5, va="center")
    _write(figure, path)


def _shown(photograph: Image.Image) -> Image.Image:
    """Square, as the vision tower sees it (a photograph is squashed, not cropped)."""
    return photograph.convert("RGB").resize((540, 540), Image.Resampling.LANCZOS)


def _grey(photo: np.ndarray) -> np.ndarray:
    """The photograph as a quiet ground for colour."""
    light = photo @ np.array([0.299, 0.587, 0.114]) / 255
    return np.repeat((0.25 + 0.75 * light)[..., None], 3, axis=2)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def _title(axes: Any, name: str, note: str) -> None:
    axes.text(0, 1.085, name, transform=axes.transAxes, fontsize=13.5, fontweight="bold", color=INK, va="center")
    axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=10.5, color=QUIET, va="center")


def _overlay(axes: Any, photo: np.ndarray, values: np.ndarray, smooth: bool, alpha: float) -> Any:
    side = photo.shape[0]
    axes.imshow(_grey(photo), extent=(0, side, side, 0))
    heat = axes.imshow(
        values,
        extent=(0, side, side, 0),
        cmap="magma",
        alpha=alpha,
        interpolation="bicubic" if smooth else "nearest",
    )
    _bare(axes)
    return heat


def _pooling(axes: Any, photo: np.ndarray, pooling: np.ndarray, window: int) -> None:
    heat = _overlay(axes, photo, pooling * window**2, smooth=False, alpha=0.62)
    side, (rows, columns) = photo.shape[0], pooling.shape
    for lines, count in ((axes.axhline, rows), (axes.axvline, columns)):
        for edge in range(0, count + 1, window):
            lines(edge * side / count, color="white", linewidth=0.9, alpha=0.85)
    bar = axes.inset_axes((0.0, -0.055, 1.0, 0.024))
    colours = axes.figure.colorbar(heat, cax=bar, orientation="horizontal")
    colours.outline.set_visible(False)
    colours.ax.tick_params(labelsize=9, colors=QUIET, length=2)
    bar.text(1.0, -3.1, "weight in its window, 1 = plain average", transform=bar.transAxes, fontsize=9, color=QUIET, ha="right")


def _queries(figure: Any, cell: Any, photo: np.ndarray, queries: np.ndarray) -> None:
    count, rows, columns = queries.shape
    across = int(np.ceil(np.sqrt(count)))
    inner = cell.subgridspec(-(-count // across), across, wspace=0.05, hspace=0.05)
    uniform = 1 / (rows * columns)
    for number, values in enumerate(queries):
        axes = figure.add_subplot(inner[number])
        if number == 0:
            box, whole = axes.get_position(), cell.get_position(figure)
            note = f"the attention of {count} embedded queries to all {rows * columns} tokens"
            for offset, text, style in (
                (1.085, "Embedded queries", {"fontsize": 13.5, "fontweight": "bold", "color": INK}),
                (1.03, note, {"fontsize": 10.5, "color": QUIET}),
            ):
                height = whole.y0 + offset * (whole.y1 - whole.y0)
                figure.text(box.x0, height, text, va="center", **style)
        _overlay(axes, photo, values, smooth=True, alpha=0.66)
        low, high = values.min() / uniform, values.max() / uniform
        axes.text(
            0.04, 0.93, f"{number + 1}", transform=axes.transAxes, color="white", fontsize=11, fontweight="bold", va="center"
        )
        axes.text(
            0.96, 0.055, f"{low:.2f} to {high:.2f}", transform=axes.transAxes, color="white", fontsize=8.5, ha="right",
            va="center",
        )  # fmt: skip


def _write(figure: Any, path: Path) -> None:
    path = path.resolve()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        figure.savefig(temporary, dpi=DPI)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
