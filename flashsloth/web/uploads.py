"""A file that somebody uploaded to a picture, or a sentence that says why it is none."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from flashsloth.image_processing import load_rgb

# What cameras, phones and browsers make. Pillow reads more, by decoders that few run (for EPS it starts a program).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MEGA = 1_000_000


class PictureError(ValueError):
    """The file cannot be used; the message is for the person who sent it."""


@dataclass(frozen=True)
class Limits:
    """The largest file, in megabytes (10^6 bytes), and the largest picture, in megapixels (10^6)."""

    megabytes: float = 10
    megapixels: float = 40

    def __post_init__(self) -> None:
        for name in ("megabytes", "megapixels"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    @property
    def bytes(self) -> int:
        return round(self.megabytes * MEGA)


def read_picture(path: Path, limits: Limits) -> Image.Image:
    """The picture in ``path``, upright, mode RGB; of an animation its first frame.

    Bytes and pixels are counted before anything is decoded: the size is in the first bytes of every format.

    Raises:
        PictureError: no file, too large, not one of :data:`FORMATS`, or damaged.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise PictureError("The file is no longer there. Please choose it again.") from error
    if size > limits.bytes:
        raise PictureError(f"The file has {size / MEGA:.1f} MB; {limits.megabytes:g} MB is the most.")
    if size == 0:
        raise PictureError("The file is empty.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError(f"The picture is too large; {limits.megapixels:g} megapixels is the most.") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"This is not a picture that can be read. Please send {_listed(FORMATS)}.") from error
    except Exception as error:  # plug-ins raise what they like on a damaged header
        raise PictureError("The picture is damaged and cannot be read.") from error
    with image:
        pixels = image.width * image.height
        if pixels > limits.megapixels * MEGA:
            raise PictureError(
                f"The picture has {image.width} x {image.height} pixels, {pixels / MEGA:.0f} megapixels; "
                f"{limits.megapixels:g} is the most."
            )
        try:
            return load_rgb(image)
        except (ValueError, TypeError) as error:
            raise PictureError("The picture is damaged or incomplete and cannot be read.") from error


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
