"""Maps laid over the picture: where each token lies, as the image processor cut it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flashsloth.image_processing import FlashSlothImageProcessor
from flashsloth.overlay import COLOURS, onto_picture, relative_attention, relative_pooling, tint

GRID, TILE = 6, 48


def test_colours_are_those_of_inferno() -> None:
    colormaps = pytest.importorskip("matplotlib").colormaps
    at = np.linspace(0, 1, 256)
    steps = np.linspace(0, 1, len(COLOURS))
    ours = np.stack([np.interp(at, steps, COLOURS[:, channel]) for channel in range(3)], axis=-1)
    assert np.abs(ours - colormaps["inferno"](at)[:, :3]).max() < 4 / 255


@pytest.mark.parametrize("size", [(120, 60), (60, 120), (96, 96)])
@pytest.mark.parametrize("view", ["square", "pad", "hd"])
@pytest.mark.parametrize("place", [(0.15, 0.2), (0.7, 0.3), (0.9, 0.85)])
def test_values_lie_where_the_processor_took_them_from(
    size: tuple[int, int], view: str, place: tuple[float, float]
) -> None:
    """A bright spot in the picture, seen through the tokens of the real tiles, is drawn where the spot is."""
    width, height = size
    x, y = int(place[0] * width), int(place[1] * height)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[max(0, y - 4) : y + 4, max(0, x - 4) : x + 4] = 255
    processor = FlashSlothImageProcessor(
        image_size=TILE, image_hd=view == "hd", image_aspect_ratio="pad" if view == "pad" else "square"
    )
    tiles = processor(Image.fromarray(pixels))["pixel_values"].numpy()[0].mean(1)
    if view != "square":
        tiles = np.where(np.abs(tiles) < 0.01, -1, tiles)  # padding is grey, and would be brighter than the picture
    patch = TILE // GRID
    tokens = tiles.reshape(len(tiles), GRID, patch, GRID, patch).mean((2, 4)) + 1
    laid = onto_picture(tokens, size, padded=view == "pad")
    assert laid.shape == (height, width)
    rows, columns = np.nonzero(laid == laid.max())
    token = (width / GRID, height / GRID) if view != "pad" else (max(size) / GRID, max(size) / GRID)
    assert abs(columns.mean() - x) < 1.1 * token[0]
    assert abs(rows.mean() - y) < 1.1 * token[1]


def test_quarters_of_hd_are_weighted_by_how_dense_their_tokens_are() -> None:
    values = np.concatenate([np.full((1, 3, 3), 1.0), np.full((4, 3, 3), 3.0)])
    assert np.allclose(onto_picture(values, (60, 60)), (1 * 1 + 4 * 3) / 5)
    # Of the square around 60 x 30 half is padding: the whole has twice as many tokens a pixel as it has there.
    assert np.allclose(onto_picture(values, (60, 30)), (2 * 1 + 4 * 3) / 6)


def test_each_quarter_has_its_corner() -> None:
    values = np.stack([np.full((2, 2), float(value)) for value in (0, 1, 2, 3, 4)]) * 1.25
    laid = onto_picture(values, (40, 40))
    assert [laid[y, x] for y in (0, 39) for x in (0, 39)] == pytest.approx([1, 2, 3, 4])


def test_even_attention_and_plain_averages_are_one() -> None:
    assert np.allclose(onto_picture(relative_attention(np.full((5, 4, 4), 1 / 80)), (50, 20)), 1)
    weights = np.outer([1 / 3] * 3 + [1 / 2] * 2, [1 / 3] * 3 + [1]).reshape(1, 5, 4)  # windows at the edge are smaller
    assert np.allclose(relative_pooling(weights, 3), 1)


def test_smooth_maps_stay_between_their_values() -> None:
    values = np.zeros((1, 4, 4))
    values[0, 1, 2] = 1
    laid = onto_picture(values, (100, 100), smooth=True)
    assert laid.min() == 0
    assert 0 < laid[37, 50] < laid.max() <= 1  # between two tokens
    assert set(np.unique(onto_picture(values, (100, 100)))) == {0, 1}


@pytest.mark.parametrize("values", [np.zeros((2, 3, 3)), np.zeros((3, 3)), np.zeros((1, 0, 3))])
def test_other_tiles_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="values: expected"):
        onto_picture(values, (10, 10))


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="size: expected"):
        onto_picture(np.zeros((1, 3, 3)), (10, 0))


def test_tint_keeps_light_and_shows_values() -> None:
    photo = np.zeros((2, 2, 3))
    photo[0] = 1
    tinted = tint(photo, np.array([[0.0, 1.0], [0.0, 1.0]]))
    light = tinted.mean(-1)
    assert (light[:, 1] > light[:, 0]).all()  # more value
    assert (light[0] > light[1]).all()  # more light
    assert np.isfinite(tint(photo, np.full((2, 2), 7.0))).all()
