"""Images to pixel values: bit-exact views, every kind of image, clear errors."""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flashsloth import image_processing
from flashsloth.image_processing import FlashSlothImageProcessor, load_rgb
from tests.model.prompting import golden_json, photo
from tests.support import golden_path

VIEWS = {"hd": {"image_hd": True}, "square": {}, "pad": {"image_aspect_ratio": "pad"}}


def rgb(source: Any) -> np.ndarray:
    return np.asarray(load_rgb(source))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("view", list(VIEWS))
@pytest.mark.parametrize("name", ["landscape", "portrait"])
def test_views_are_bit_exact(name: str, view: str) -> None:
    """Against hashes of what the official code made: of the pixels after resizing, and of float rows as they are."""
    expected = golden_json("prompt_hd.json")[name][view]
    out = FlashSlothImageProcessor()(golden_path(f"prompt_hd_{name}.png"), **VIEWS[view])["pixel_values"]
    assert out.dtype == torch.float32
    values = out[0] if view == "hd" else out[0, 0]
    assert list(values.shape) == expected["shape"]
    pixels = torch.round((values * 0.5 + 0.5) * 255).to(torch.uint8)
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == expected["u8_sha256"]
    rows = np.ascontiguousarray(values[..., 5::61, :].numpy())
    assert hashlib.sha256(rows.tobytes()).hexdigest() == expected["rows_sha256"]


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 50), (97, 5), (5, 98), (1, 77), (77, 1), (33, 200), (32, 9)])
@pytest.mark.parametrize("strip", [1, 300, 1 << 24])
def test_padding_in_strips_equals_resizing_the_whole_square(
    size: tuple[int, int], strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_processing, "_STRIP_PIXELS", strip)
    image = Image.fromarray(photo(1, *reversed(size)))
    side = max(size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    whole = np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC))
    got = FlashSlothImageProcessor(image_size=32, image_aspect_ratio="pad")(image)["pixel_values"][0, 0]
    assert np.array_equal(np.rint((got.numpy().transpose(1, 2, 0) * 0.5 + 0.5) * 255), whole)


@pytest.mark.parametrize("size", [(200_000, 1), (1, 60_000), (40_000, 3)])
def test_huge_aspect_ratios_need_no_huge_square(size: tuple[int, int]) -> None:
    out = FlashSlothImageProcessor(image_size=16, image_hd=True)(Image.new("RGB", size, (255, 0, 0)))["pixel_values"]
    assert out.shape == (1, 5, 3, 16, 16)
    assert torch.equal(out[0, 0, 0], torch.ones(16, 16))  # squashed, all of it is red
    grey = torch.tensor((np.float32(127 * (1 / 255)) - np.float32(0.5)) / np.float32(0.5))
    assert torch.equal(out[0, 1, :, 0, 0], grey.expand(3))  # the padded square is grey in its corner


def test_hd_tiles_are_the_quarters_in_reading_order() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    for i, (y, x) in enumerate([(0, 0), (0, 20), (20, 0), (20, 20)]):
        image[y : y + 20, x : x + 20] = 50 * (i + 1)
    out = FlashSlothImageProcessor(image_size=10, image_hd=True)(image)["pixel_values"][0]
    middle = torch.round((out[1:, 0, 2, 2] * 0.5 + 0.5) * 255)
    assert middle.tolist() == [50, 100, 150, 200]
    assert torch.round((out[0, 0, ::9, ::9] * 0.5 + 0.5) * 255).flatten().tolist() == [50, 100, 150, 200]


def test_every_mode_keeps_its_colours() -> None:
    """Colours survive each mode that can hold them; alpha is dropped, as the official ``convert("RGB")`` does."""
    base = Image.fromarray(photo(2))
    expected = np.asarray(base)
    for mode in ("RGBA", "RGBX", "RGBa"):
        assert np.array_equal(rgb(base.convert("RGBA").convert(mode)), expected), mode
    for mode in ("CMYK", "YCbCr", "HSV"):
        assert np.array_equal(rgb(base.convert(mode)), np.asarray(base.convert(mode).convert("RGB"))), mode
    transparent = base.convert("RGBA")
    transparent.putalpha(0)
    assert np.array_equal(rgb(transparent), expected)
    grey = base.convert("L")
    three = np.repeat(np.asarray(grey)[..., None], 3, 2)
    for mode in ("L", "LA", "La", "F", "I"):
        assert np.array_equal(rgb(grey.convert("LA").convert(mode) if mode == "La" else grey.convert(mode)), three), (
            mode
        )
    one = grey.convert("1")
    assert set(np.unique(rgb(one))) == {0, 255}


def test_palettes_with_transparency_drop_it_without_a_warning() -> None:
    palette = Image.fromarray(photo(3)).quantize(16)
    opaque = np.asarray(palette.convert("RGB"))
    for transparency in (3, bytes(range(0, 256, 16))):
        stored = Image.open(io.BytesIO(encoded(palette, transparency=transparency)))
        assert stored.mode == "P"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(rgb(stored), opaque)
    assert np.array_equal(rgb(palette.convert("PA")), opaque)


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    three = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2)
    for image in (Image.fromarray(values), Image.open(io.BytesIO(encoded(Image.fromarray(values))))):
        assert image.mode.startswith("I")
        assert np.array_equal(rgb(image), three)
    assert np.array_equal(rgb(values), three)
    assert np.array_equal(rgb(Image.fromarray(values.astype(np.int32))), three)
    big_endian = Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes())
    assert np.array_equal(rgb(big_endian), three)
    with pytest.raises(ValueError, match=r"image: cannot decode.*0..65535, got -1..7"):
        load_rgb(Image.fromarray(np.array([[-1, 7]], np.int32)))
    with pytest.raises(ValueError, match="finite"):
        load_rgb(Image.fromarray(np.array([[0, np.nan]], np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = Image.fromarray(photo(4, 16, 32))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    stored.save(path, exif=exif)
    assert np.array_equal(rgb(path), np.asarray(upright))
    assert np.array_equal(rgb(Image.open(path)), np.asarray(upright))


def test_a_jpeg_with_exif_has_its_sides_swapped(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.fromarray(photo(5, 20, 30)).save(path, exif=exif)
    assert load_rgb(path).size == (20, 30)


def test_arrays_and_tensors_of_every_layout() -> None:
    image = photo(6)
    chw = np.ascontiguousarray(image.transpose(2, 0, 1))
    alike: list[Any] = [image, chw, torch.from_numpy(image), torch.from_numpy(chw), image.astype(np.int64)]
    alike += [
        image.astype(np.float32) / 255,
        image / 255,
        torch.from_numpy(chw).double() / 255,
        chw.astype(np.float16) / 255,
    ]
    alike += [
        np.dstack([image, image[..., :1]]),
        Image.fromarray(image),
        torch.from_numpy(image)[..., [2, 1, 0]].flip(-1),
    ]
    for i, one in enumerate(alike):
        assert np.array_equal(rgb(one), image), i
    coarse = torch.arange(0, 256, 16).reshape(1, 2, 8)
    assert np.array_equal(rgb(coarse.bfloat16() / 256), rgb((coarse.float() / 256).numpy()))
    grey = image[..., 0]
    three = np.repeat(grey[..., None], 3, 2)
    for one in (grey, grey[..., None], grey[None], torch.from_numpy(grey)[None], np.dstack([grey, grey // 2])):
        assert np.array_equal(rgb(one), three)
    assert rgb(grey > 100).max() == 255
    ambiguous = photo(7, 3, 3)
    assert np.array_equal(rgb(ambiguous), ambiguous)
    assert np.array_equal(rgb(torch.from_numpy(ambiguous)), ambiguous.transpose(1, 2, 0))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (384, 384), (7, 3)])
@pytest.mark.parametrize("view", list(VIEWS))
def test_any_size_gives_the_same_shape(size: tuple[int, int], view: str) -> None:
    out = FlashSlothImageProcessor()(Image.new("RGB", size, (9, 99, 199)), **VIEWS[view])["pixel_values"]
    assert out.shape == (1, 5 if view == "hd" else 1, 3, 384, 384)
    assert torch.isfinite(out).all()
    assert out.abs().max() <= 1


def test_paths_urls_and_base64(tmp_path: Path) -> None:
    image = photo(8)
    data = encoded(Image.fromarray(image))
    path = tmp_path / "a photo é.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    for source in (path, str(path), text, f"data:image/png;base64,{text}"):
        assert np.array_equal(rgb(source), image)


def test_batches_and_return_types() -> None:
    processor = FlashSlothImageProcessor(image_size=8)
    images = [photo(i) for i in range(3)]
    batch = processor(images)["pixel_values"]
    assert batch.shape == (3, 1, 3, 8, 8)
    for i, image in enumerate(images):
        assert torch.equal(processor(image)["pixel_values"][0], batch[i])
    assert torch.equal(processor([[images[0]], images[1:]])["pixel_values"], batch)
    assert torch.equal(processor(np.stack(images))["pixel_values"], batch)
    assert isinstance(processor(images, return_tensors="np")["pixel_values"], np.ndarray)
    assert np.array_equal(np.stack(processor(images, return_tensors=None)["pixel_values"]), batch.numpy())
    assert (
        FlashSlothImageProcessor(image_size=8, image_mean=(0, 0, 0), image_std=(1, 1, 1))(images)["pixel_values"].min()
        >= 0
    )


def test_settings_survive_saving(tmp_path: Path) -> None:
    saved = FlashSlothImageProcessor(image_size=28, image_hd=True, image_mean=(0.1, 0.2, 0.3))
    saved.save_pretrained(tmp_path)
    loaded = FlashSlothImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    assert torch.equal(loaded(photo())["pixel_values"], saved(photo())["pixel_values"])
    assert FlashSlothImageProcessor.from_pretrained(tmp_path, image_hd=False).num_tiles() == 1


def broken_files(folder: Path) -> dict[str, Path]:
    data = encoded(Image.fromarray(photo(9, 200, 200)), "JPEG")
    png = encoded(Image.fromarray(photo(9, 200, 200)))
    files = {
        "truncated.jpg": data[: len(data) // 2], "truncated.png": png[: len(png) // 2], "text.png": b"no image at all",
        "empty.png": b"", "header.png": png[:20], "flipped.png": png[:60] + bytes(80) + png[140:],
    }  # fmt: skip
    paths = {}
    for name, content in files.items():
        paths[name] = folder / name
        paths[name].write_bytes(content)
    return paths


def test_damaged_files_are_named_by_position(tmp_path: Path) -> None:
    processor = FlashSlothImageProcessor(image_size=8)
    for name, path in broken_files(tmp_path).items():
        with pytest.raises(ValueError, match=r"^images\[1\]: cannot (read|decode)") as caught:
            processor([photo(), path])
        assert name in str(caught.value) or "decode" in str(caught.value)
    with pytest.raises(ValueError, match=r"^images\[0\]: cannot decode.*truncated"):
        processor([tmp_path / "truncated.jpg"])


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (400, 400)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"images\[1\]\[0\]: cannot read.*decompression bomb"):
        FlashSlothImageProcessor()([[photo()], [path]])


@pytest.mark.parametrize(
    ("image", "error", "match"),
    [
        ("nowhere.png", ValueError, r"images\[0\]: cannot read an image from 'nowhere.png': no such file"),
        ("data:image/png;base64,!!!", ValueError, r"images\[0\]: cannot read"),
        (".", ValueError, r"images\[0\]: cannot read.*directory"),
        ("a\0b", ValueError, r"images\[0\]: cannot read"),
        ("x" * 5000, ValueError, r"images\[0\]: cannot read"),
        (Image.new("RGB", (0, 5)), ValueError, r"at least one pixel, got size 0 x 5"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, r"at least one pixel, got shape \(0, 5, 3\)"),
        (np.zeros((5, 5, 7), np.uint8), ValueError, r"1 to 4 channels.*\(5, 5, 7\)"),
        (np.zeros(5, np.uint8), ValueError, r"expected shape \(H, W\).*\(5,\)"),
        (np.full((4, 4, 3), 1.5), ValueError, r"floats in \[0, 1\], got values from 1.5 to 1.5"),
        (np.full((4, 4, 3), np.nan), ValueError, r"floats in \[0, 1\], got values from nan"),
        (torch.full((3, 4, 4), 300), ValueError, r"integers in 0..255, got values from 300"),
        (np.zeros((4, 4), complex), TypeError, r"images\[0\]: expected integers, floats or bool, got dtype complex"),
        (None, TypeError, r"images\[0\]: expected a path.*NoneType"),
        (3, TypeError, r"images\[0\]: expected a path.*int"),
    ],
)
def test_what_is_no_image_is_named(image: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        FlashSlothImageProcessor(image_size=8)([image])


def test_a_failed_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> Image.Image:
        raise ConnectionError("refused")

    monkeypatch.setattr(image_processing, "download_image", refuse)
    with pytest.raises(
        ValueError, match=r"images\[0\]: cannot read an image from 'https://example.invalid/a.png': refused"
    ):
        FlashSlothImageProcessor()(["https://example.invalid/a.png"])


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"image_size": 0}, ValueError, "image_size: expected a positive int, got 0"),
        ({"image_size": True}, ValueError, "image_size"),
        ({"image_hd": 1}, TypeError, "image_hd: expected a bool, got 1"),
        ({"image_aspect_ratio": "anyres"}, ValueError, "image_aspect_ratio: expected one of.*'anyres'"),
        ({"image_mean": (0.5,)}, ValueError, "image_mean: expected 3 numbers, got 1"),
        ({"image_std": (0.5, 0, 0.5)}, ValueError, "image_std: expected positive"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        FlashSlothImageProcessor(**settings)


def test_wrong_calls_are_named() -> None:
    processor = FlashSlothImageProcessor(image_size=8)
    with pytest.raises(ValueError, match="at least one image, got none"):
        processor([])
    with pytest.raises(ValueError, match=r"return_tensors.*'tf'"):
        processor(photo(), return_tensors="tf")
    with pytest.raises(ValueError, match="image_aspect_ratio"):
        processor(photo(), image_aspect_ratio="wide")
