"""Maps of vision tokens put back onto the picture they were taken from, and drawn over it."""

from __future__ import annotations

import numpy as np
from PIL import Image

# The colours of "inferno" (Nathaniel Smith and Stefan van der Walt, public domain) at 25 even steps, dark to bright.
_INFERNO = (
    "000004 050417 110a30 210c4a 320a5e 450a69 57106e 67166e 781c6d 8a226a 9a2865 ab2f5e bc3754 "
    "ca404a d84c3e e45a31 ed6925 f57b17 f98e09 fca108 fbb61a f9cb35 f4df53 f2f27d fcffa4"
)
COLOURS = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in _INFERNO.split()]) / 255


def relative_pooling(weights: np.ndarray, window: int) -> np.ndarray:
    """Pooling weights ``(tiles, rows, columns)``, which sum to one in each window, times the tokens of the window: 1 is
    what a plain average gives. Windows at the edge may be smaller."""
    rows, columns = (_tokens_beside(side, window) for side in weights.shape[1:])
    return weights * np.outer(rows, columns)


def relative_attention(attention: np.ndarray) -> np.ndarray:
    """Attention ``(tiles, rows, columns)``, which sums to one, times the number of tokens: 1 is an even share."""
    return attention * attention.size


def onto_picture(
    values: np.ndarray, size: tuple[int, int], *, padded: bool = False, smooth: bool = False
) -> np.ndarray:
    """Put the values of vision tokens where the tokens lie in the picture.

    Args:
        values: ``(tiles, rows, columns)``: one tile, or five in HD, of which the first is the whole picture squashed
            to a square and the others are the quarters of the picture padded to a square.
        size: width and height of the result, in pixels, in the proportions of the picture.
        padded: the one tile is the picture padded to a square, not squashed.
        smooth: bicubic between tokens, else each token is a plain rectangle.

    Returns:
        ``(height, width)`` float32. In HD two tokens see each pixel, one of the whole and one of a quarter: their mean,
        weighted by how densely tokens of each kind lie there.

    Raises:
        ValueError: not one or five tiles, or no pixel.
    """
    if values.ndim != 3 or values.shape[0] not in (1, 5) or 0 in values.shape:
        raise ValueError(f"values: expected (1 or 5 tiles, rows, columns), got shape {values.shape}")
    if min(size) < 1:
        raise ValueError(f"size: expected a width and a height of at least one pixel, got {size}")
    values = values.astype(np.float32)
    whole = _cropped(values[0], size, smooth) if padded and len(values) == 1 else _resized(values[0], size, smooth)
    if len(values) == 1:
        return whole
    quarters = np.block([[values[1], values[2]], [values[3], values[4]]])
    detail = _cropped(quarters, size, smooth)
    width, height = size
    coarse, fine = 1 / (width * height), 4 / max(size) ** 2  # tokens a pixel, but for the rows and columns of a tile
    return (coarse * whole + fine * detail) / (coarse + fine)


def tint(photo: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The photograph in greys, its light taken on by the colour of the values: least is dark, most is bright.

    Args:
        photo: ``(height, width, 3)``, numbers in 0..1, as the result.
        values: ``(height, width)``; their own least and most span the colours.
    """
    low, high = float(values.min()), float(values.max())
    share = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    steps = np.linspace(0, 1, len(COLOURS))
    colour = np.stack([np.interp(share, steps, COLOURS[:, channel]) for channel in range(3)], axis=-1)
    light = (photo @ np.array([0.299, 0.587, 0.114]))[..., None]
    return np.clip(colour * (0.45 + 0.75 * light) + 0.10 * light, 0, 1)


def _tokens_beside(side: int, window: int) -> np.ndarray:
    """For each of ``side`` tokens in a row, how many of the row share its window."""
    place = np.arange(side)
    return np.minimum(window, side - place // window * window)


def _resized(values: np.ndarray, size: tuple[int, int], smooth: bool) -> np.ndarray:
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32)).resize(size, method)
    return np.clip(np.asarray(image), values.min(), values.max())  # bicubic overshoots


def _cropped(values: np.ndarray, size: tuple[int, int], smooth: bool) -> np.ndarray:
    """Values over the picture padded to a square, the picture in the middle; what lies over padding is cut off."""
    width, height = size
    side = max(size)
    left, top = (side - width) // 2, (side - height) // 2
    return _resized(values, (side, side), smooth)[top : top + height, left : left + width]
