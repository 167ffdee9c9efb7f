"""Plots: the same numbers give the same bytes, and a file is whole whenever it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashsloth.files import replacing

GRID = "#DDDDDD"


@contextmanager
def figure(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """An empty figure of matplotlib, ``size`` in inches, to draw on; at the end it is written to ``path``, whose ending
    is its kind. An error writes nothing.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "flashsloth", "svg.fonttype": "path", "font.size": 10}):
        made = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(made)
        yield made
        given: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}
        with replacing(path) as partial:
            made.savefig(partial, **given)


def plain(axes: Any, **grid: Any) -> None:
    """Axes with lines across behind the data, and nothing above or to the right of it."""
    axes.grid(axis="y", color=GRID, **grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
