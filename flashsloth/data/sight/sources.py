"""What the pictures are made of besides drawn shapes: handwritten digits, photographs and fonts, all of them files of
installed packages, so that nothing is downloaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from flashsloth.data.sight.dice import SPLITS, split_of

# A photograph belongs to one split. Only those that are in scikit-image's wheel; others it would download.
PHOTOGRAPHS = {
    "train": ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "grass.png", "hubble_deep_field.jpg",
              "ihc.png", "retina.jpg"),
    "validation": ("coins.png", "motorcycle_left.png"),
    "test": ("coffee.png", "gravel.png", "moon.png", "rocket.jpg"),
}  # fmt: skip

# Pillow's own scalable face (Aileron) and the DejaVu faces that matplotlib carries: sans, serif, fixed width, upright
# and bold. They come with packages, so they are the same everywhere; fonts of the system would not be.
PILLOW_FACE = "Aileron"
FACES = (PILLOW_FACE, "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono")
SMALL_FACES = ("DejaVuSans", "DejaVuSansMono")  # plain and wide: legible at 9 pixels
_LONGEST_SIDE = 640  # photographs are kept no larger: they are backgrounds


@dataclass(frozen=True)
class Sources:
    """Loaded once and handed to every worker process.

    ``digits`` (1797, 8, 8) uint8, ink 0 to 255; ``labels`` (1797,); ``digit_ids``: which samples each split owns;
    ``photographs``: (H, W, 3) uint8 for each split.
    """

    digits: np.ndarray
    labels: np.ndarray
    digit_ids: dict[str, tuple[int, ...]]
    photographs: dict[str, tuple[np.ndarray, ...]]


def load_sources() -> Sources:
    """Raises ModuleNotFoundError where scikit-learn, scikit-image or matplotlib is missing, FileNotFoundError where
    one of their files is."""
    from sklearn.datasets import load_digits

    data = load_digits()
    ink = np.minimum(data.images * (255 / 16), 255).round().astype(np.uint8)
    owners = [split_of(f"digit/{i}") for i in range(len(ink))]
    ids = {split: tuple(i for i, owner in enumerate(owners) if owner == split) for split in SPLITS}
    photographs = {split: tuple(_photograph(name) for name in PHOTOGRAPHS[split]) for split in SPLITS}
    for face in FACES:
        font(face, 12)
    return Sources(ink, data.target.astype(np.int64), ids, photographs)


@cache
def font(face: str, pixels: int) -> ImageFont.FreeTypeFont:
    """A face at a size in pixels, laid out by Pillow alone: Raqm, which not every build has, may shift letters."""
    if face == PILLOW_FACE:
        default = ImageFont.load_default(pixels)
        assert isinstance(default, ImageFont.FreeTypeFont)
        return default.font_variant(layout_engine=ImageFont.Layout.BASIC)
    path = _package("matplotlib") / "mpl-data" / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise FileNotFoundError(f"matplotlib: expected the font {face} among its files, found no {path}")
    return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)


def _photograph(name: str) -> np.ndarray:
    path = _package("skimage") / "data" / name
    if not path.is_file():
        raise FileNotFoundError(f"scikit-image: expected the photograph {name} among its files, found no {path}")
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    rgb.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(rgb)


@cache
def _package(name: str) -> Path:
    """Where a package lies, found without importing it, which takes seconds."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(spec.origin).parent
