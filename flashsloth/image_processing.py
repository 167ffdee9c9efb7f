"""Images to pixel values, bit for bit as released weights saw them: Pillow's bicubic resize, then a table of values."""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import load_image as download_image
from transformers.processing_utils import ImagesKwargs

ASPECT_RATIOS = ("square", "pad")
# Beyond this side an image is first reduced before it is padded to a square; nothing that size is a photograph, and
# the square of a 100,000 x 1 strip would not fit in memory.
MAX_PADDED_SIDE = 16384
_STRIP_PIXELS = 1 << 24


class FlashSlothImageKwargs(ImagesKwargs, total=False):
    """Settings of :class:`FlashSlothImageProcessor`, also accepted by its calls."""

    image_size: int
    image_hd: bool
    image_aspect_ratio: str


class FlashSlothImageProcessor(BaseImageProcessor):
    """Turns images into ``pixel_values`` (num_images, tiles, 3, S, S), float32, values ``(x / 255 - mean) / std``.

    Args:
        image_size: S, the side of a tile in pixels.
        image_hd: False: one tile. True: five, the whole image squashed to S x S, then the image padded to a square,
            resized to 2S x 2S and cut in four (top left, top right, bottom left, bottom right).
        image_aspect_ratio: how one tile, without HD, comes from an image that is not square: ``"square"`` squashes it,
            ``"pad"`` pads it to a square first.
        image_mean, image_std: one number a channel.

    Accepted images: a path, an http(s) or data URL, base64, a PIL image of any mode, a numpy array or torch tensor
    (H, W), (H, W, C) or (C, H, W) with 1 to 4 channels: integers in 0..255, uint16 in 0..65535, bool, or floats in
    [0, 1]. Where (H, W, C) and (C, H, W) are both possible, an array is read as the former and a tensor as the latter.

    Colours as the official code's ``convert("RGB")``: an alpha channel or a palette's transparent entry is dropped,
    nothing is composited. Unlike there, EXIF orientation is applied, and 16-bit grey keeps its upper eight bits
    instead of being clipped.
    """

    valid_kwargs = FlashSlothImageKwargs

    def __init__(
        self,
        image_size: int = 384,
        image_hd: bool = False,
        image_aspect_ratio: str = "square",
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        kwargs.pop("image_processor_type", None)
        super().__init__(**kwargs)
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size: expected a positive int, got {image_size!r}")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != 3:
                raise ValueError(f"{name}: expected 3 numbers, got {len(values)}")
        if not all(std > 0 for std in image_std):
            raise ValueError(f"image_std: expected positive numbers, got {tuple(image_std)}")
        self.image_size = image_size
        self.image_hd, self.image_aspect_ratio = _check_view(image_hd, image_aspect_ratio)
        self.image_mean = [float(value) for value in image_mean]
        self.image_std = [float(value) for value in image_std]

    def num_tiles(self, image_hd: bool | None = None) -> int:
        """Tiles an image becomes: 5 in HD, else 1. ``image_hd`` overrides the processor's own setting."""
        return 5 if (self.image_hd if image_hd is None else image_hd) else 1

    def preprocess(
        self,
        images: Any,
        image_hd: bool | None = None,
        image_aspect_ratio: str | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Processes one image or a (nested) list of images.

        Returns:
            ``pixel_values`` (num_images, tiles, 3, S, S) float32: a tensor ("pt"), an array ("np") or a list of
            arrays (None).

        Raises:
            ValueError: an image cannot be read, is empty, or has values or a shape that are no image; the error names
                its position, ``images[2]``. Or there is none, or a setting is unknown.
            TypeError: something that is no image.
        """
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors: expected 'pt', 'np' or None, got {return_tensors!r}")
        named = list(flatten_images(images))
        if not named:
            raise ValueError("images: expected at least one image, got none")
        values = self.pixel_values(named, image_hd, image_aspect_ratio)
        data = {"pixel_values": list(values) if return_tensors is None else values}
        return BatchFeature(data, tensor_type=return_tensors)

    def pixel_values(
        self, named: Sequence[tuple[str, Any]], image_hd: bool | None = None, image_aspect_ratio: str | None = None
    ) -> np.ndarray:
        """The same for (name, image) pairs, the names being what errors call the images. Returns one array."""
        hd, aspect = _check_view(
            self.image_hd if image_hd is None else image_hd,
            self.image_aspect_ratio if image_aspect_ratio is None else image_aspect_ratio,
        )
        return np.stack([self._to_values(self._tiles(load_rgb(image, name), hd, aspect)) for name, image in named])

    def _tiles(self, image: Image.Image, hd: bool, aspect: str) -> np.ndarray:
        """(tiles, S, S, 3) uint8."""
        side = self.image_size
        if not hd:
            view = _pad_and_resize(image, side, self._padding()) if aspect == "pad" else _squash(image, side)
            return np.asarray(view)[None]
        square = np.asarray(_pad_and_resize(image, 2 * side, self._padding()))
        quarters = [square[y : y + side, x : x + side] for y in (0, side) for x in (0, side)]
        return np.stack([np.asarray(_squash(image, side)), *quarters])

    def _padding(self) -> tuple[int, ...]:
        return tuple(int(mean * 255) for mean in self.image_mean)

    def _to_values(self, tiles: np.ndarray) -> np.ndarray:
        """(tiles, S, S, 3) uint8 to (tiles, 3, S, S) float32. The product with 1/255 is taken in double precision and
        rounded once, the rest in single, as the official code does it; with 256 values a table is exact and quick."""
        scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
        out = np.empty((len(tiles), 3, *tiles.shape[1:3]), dtype=np.float32)
        for c, (mean, std) in enumerate(zip(self.image_mean, self.image_std, strict=True)):
            table = (scaled - np.float32(mean)) / np.float32(std)
            np.take(table, tiles[..., c], out=out[:, c])
        return out


def flatten_images(images: Any, name: str = "images") -> Iterator[tuple[str, Any]]:
    """Walks through one image, a list of images or nested lists, giving each with its position (``images[1][0]``).
    An array or tensor of four dimensions is a list of images."""
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
        for i, image in enumerate(images):
            yield from flatten_images(image, f"{name}[{i}]")
    else:
        yield name, images


def load_rgb(source: Any, name: str = "image") -> Image.Image:
    """Reads one image of any accepted kind, upright, as a PIL image of mode RGB.

    Raises:
        ValueError: it cannot be read or is empty; TypeError: it is no image. Both begin with ``name``.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source, name)
    if isinstance(source, (str, os.PathLike)):
        image = _open(source, name)
    elif isinstance(source, Image.Image):
        image = source
    else:
        raise TypeError(
            f"{name}: expected a path, URL, PIL image, numpy array or torch tensor, got {type(source).__name__}"
        )
    if 0 in image.size:
        raise ValueError(f"{name}: expected an image of at least one pixel, got size {image.width} x {image.height}")
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise anything from SyntaxError to zlib.error on a damaged file
        raise ValueError(f"{name}: cannot decode the image: {error}") from error


def _open(source: str | os.PathLike[str], name: str) -> Image.Image:
    text = os.fspath(source)
    shown = text if len(text) <= 80 else text[:28] + "..." + text[-49:]  # the end of a path is what tells
    try:
        if text.startswith(("http://", "https://")):
            return download_image(text)
        if os.path.isdir(text):
            raise IsADirectoryError("it is a directory")
        if isinstance(source, str) and (text.startswith("data:image/") or not os.path.exists(text)):
            data = _from_base64(text)
            return Image.open(io.BytesIO(data))
        return Image.open(text)
    except Exception as error:  # besides OSError: a decompression bomb, a refused connection, a broken header
        raise ValueError(f"{name}: cannot read an image from {shown!r}: {error}") from error


def _from_base64(text: str) -> bytes:
    encoded = text.split(",", 1)[-1] if text.startswith("data:image/") else text
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    # Any short word is valid base64, and a mistyped file name should be told as such: no image is this small.
    if len(data) < 32:
        raise FileNotFoundError("no such file, and neither a URL nor base64")
    return data


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(f"expected grey values in 0..65535, got {low}..{high}")
        return Image.fromarray((values >> (8 if high > 255 else 0)).astype(np.uint8)).convert("RGB")
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("expected finite grey values")
    # Pillow converts palettes with transparency, and premultiplied alpha, only through a mode that has alpha.
    via = {"P": "RGBA", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(image.mode)
    return (image.convert(via) if via else image).convert("RGB")


def _from_array(source: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    shape = tuple(source.shape)
    channels_first = isinstance(source, torch.Tensor)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        values = source.float().numpy() if source.is_floating_point() else source.numpy()
    else:
        values = source
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3:
        first, last = 1 <= shape[0] <= 4, 1 <= shape[2] <= 4
        if first and (channels_first or not last):
            values = np.moveaxis(values, 0, -1)
        elif not last:
            raise ValueError(f"{name}: expected 1 to 4 channels, first or last, got shape {shape}")
    else:
        raise ValueError(f"{name}: expected shape (H, W), (H, W, C) or (C, H, W), got {shape}")
    if values.size == 0:
        raise ValueError(f"{name}: expected an image of at least one pixel, got shape {shape}")
    pixels = _to_uint8(values, name)
    if pixels.shape[2] in (1, 2):  # grey, grey with alpha
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3]))


def _to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind not in "uif":
        raise TypeError(f"{name}: expected integers, floats or bool, got dtype {values.dtype}")
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    if kind == "f":
        if not (low >= -1e-4 and high <= 1 + 1e-4):  # written so that NaN fails
            raise ValueError(f"{name}: expected floats in [0, 1], got values from {low:g} to {high:g}")
        return np.rint(np.clip(values, 0, 1).astype(np.float32) * 255).astype(np.uint8)
    if low < 0 or high > 255:
        raise ValueError(f"{name}: expected integers in 0..255, got values from {low:g} to {high:g}")
    return values.astype(np.uint8)


def _squash(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _pad_and_resize(image: Image.Image, side: int, padding: tuple[int, ...]) -> Image.Image:
    """Pads to a square, the image in the middle, and resizes it to ``side``, without holding the square in memory.

    Pillow resizes rows first and columns second, rounding to 8 bits in between, so doing the two passes by hand, the
    first one in strips, gives the same bits as resizing the whole square.
    """
    longest = max(image.size)
    if longest > MAX_PADDED_SIDE:
        factor = MAX_PADDED_SIDE / longest
        width, height = (max(1, round(length * factor)) for length in image.size)
        image, longest = image.resize((width, height), Image.Resampling.BICUBIC), MAX_PADDED_SIDE
    width, height = image.size
    left, top = (longest - width) // 2, (longest - height) // 2
    columns = Image.new("RGB", (side, longest), padding)
    rows_at_once = max(1, _STRIP_PIXELS // longest)
    for y in range(0, height, rows_at_once):
        rows = image.crop((0, y, width, min(y + rows_at_once, height)))
        if left:
            strip = Image.new("RGB", (longest, rows.height), padding)
            strip.paste(rows, (left, 0))
            rows = strip
        columns.paste(rows.resize((side, rows.height), Image.Resampling.BICUBIC), (0, top + y))
    return columns.resize((side, side), Image.Resampling.BICUBIC)


def _check_view(image_hd: bool, image_aspect_ratio: str) -> tuple[bool, str]:
    if not isinstance(image_hd, bool):
        raise TypeError(f"image_hd: expected a bool, got {image_hd!r}")
    if image_aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(f"image_aspect_ratio: expected one of {ASPECT_RATIOS}, got {image_aspect_ratio!r}")
    return image_hd, image_aspect_ratio
