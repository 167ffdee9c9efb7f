"""What may be uploaded, and what is said about the rest."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashsloth.web.uploads import FORMATS, Limits, PictureError, read_picture
from tests.web.pictures import bomb, photo


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_of_cameras_and_browsers_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "without an ending"
    photo().save(path, format=kind)
    picture = read_picture(path, Limits())
    assert (picture.mode, picture.size) == ("RGB", (60, 40))


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "PPM", "ICO"])
def test_other_formats_are_refused_whatever_they_are_called(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.png"
    photo().save(path, format=kind)
    with pytest.raises(PictureError, match=r"not a picture that can be read. Please send PNG, JPEG, WEBP, GIF or BMP"):
        read_picture(path, Limits())


def test_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, :30] = (255, 0, 0)
    Image.fromarray(pixels).save(path, exif=exif)
    picture = read_picture(path, Limits())
    assert picture.size == (40, 60)
    top, bottom = np.asarray(picture)[5, 20], np.asarray(picture)[55, 20]
    assert top[0] > 200 > 50 > bottom[0]


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert read_picture(path, Limits()).getpixel((10, 10)) == (255, 0, 0)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    for width, height, said in ((30_000, 30_000, "too large; 40 megapixels"), (9_000, 9_000, "9000 x 9000 pixels")):
        path = tmp_path / "bomb.png"
        path.write_bytes(bomb(width, height))
        assert path.stat().st_size < 200
        with pytest.raises(PictureError, match=said):
            read_picture(path, Limits())


def test_limits_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo().save(path)
    size = path.stat().st_size
    assert read_picture(path, Limits(megabytes=size / 1e6, megapixels=60 * 40 / 1e6)).size == (60, 40)
    with pytest.raises(PictureError, match=r"The file has 0\.0 MB"):
        read_picture(path, Limits(megabytes=(size - 1) / 1e6))
    with pytest.raises(PictureError, match="60 x 40 pixels"):
        read_picture(path, Limits(megapixels=(60 * 40 - 1) / 1e6))


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo"
    photo().save(path, format=kind)
    data = path.read_bytes()
    for share in (0.02, 0.3, 0.8):
        path.write_bytes(data[: max(1, int(share * len(data)))])
        with pytest.raises(PictureError, match=r"(not a picture|damaged)"):
            read_picture(path, Limits())


def test_a_text_chunk_that_unpacks_to_a_lot_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo().save(path)
    data = path.read_bytes()
    body = b"zTXt" + b"note\0\0" + zlib.compress(bytes(80_000_000))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:33] + chunk + data[33:])
    with pytest.raises(PictureError, match="damaged"):
        read_picture(path, Limits())


def test_no_file_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="no longer there"):
        read_picture(tmp_path / "none.png", Limits())
    (tmp_path / "empty.png").touch()
    with pytest.raises(PictureError, match="is empty"):
        read_picture(tmp_path / "empty.png", Limits())


@pytest.mark.parametrize("wrong", [{"megabytes": 0}, {"megapixels": -1.0}, {"megabytes": float("nan")}])
def test_limits_are_positive(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a positive number"):
        Limits(**wrong)
