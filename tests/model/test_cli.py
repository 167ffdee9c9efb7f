"""The command line, at small size: the demo and its picture, asking, inspecting, and every kind of wrong input."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from bench.cases import sparse_prefill
from flashsloth import cli, drawing, heatmaps, tiny
from flashsloth.chat_command import printable
from flashsloth.checkpoint import official_name
from flashsloth.cli import main
from flashsloth.comparison import FUSED, OFFICIAL, PLAIN
from flashsloth.data.sight import load_sources, make_sample
from flashsloth.data.sight.sample import Settings
from flashsloth.demo import ASKED, FULL_SIZE, SKETCH_QUESTION, Demo, run_demo
from flashsloth.inspection import inspect_checkpoint
from flashsloth.modeling import FlashSlothForConditionalGeneration
from tests.model.test_loading import full_size_names
from tests.support import threads

PARTS = ("vision tower", "spatial attention pooling", "projector", "embedded-query module", "learnable tokens")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its processor, in our layout."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny.tiny_config()
    tiny.random_model(config).save_pretrained(folder)
    tiny.processor_for(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(path)
    return path


# ---- demo ----


SMALL_DEMO: dict[str, Any] = {"config": tiny.tiny_config(), "sparse_size": sparse_prefill.SMALL, "budget": 0.01}


@pytest.fixture(scope="module")
def demo(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, str]:
    out = tmp_path_factory.mktemp("demo") / "picture.png"
    console = Console(file=io.StringIO(), width=200)
    with threads(1):
        found = run_demo(None, None, out, console=console, model=checkpoint, **SMALL_DEMO)
    assert isinstance(console.file, io.StringIO)
    return found, console.file.getvalue()


def test_demo_measures_each_op_on_three_paths_that_agree(demo: tuple[Demo, str]) -> None:
    found, shown = demo
    assert found.tokens == (36, 4)
    names = [op.name for op in found.ops]
    assert names == ["spatial_attention_pool", "embedded_query_attention", "token_sparse_prefill"]
    for op in found.ops:
        assert set(op.seconds) == {FUSED, PLAIN, OFFICIAL}
        assert all(seconds > 0 for seconds in op.seconds.values())
        assert 0 <= op.difference < 1e-5
        assert op.name in shown
    for times in found.first_token:
        assert set(times) == {FUSED, PLAIN}
        assert all(seconds > 0 for seconds in times.values())


def test_demo_asks_on_a_test_picture_and_on_another(demo: tuple[Demo, str]) -> None:
    found, shown = demo
    flat = " ".join(shown.split())
    assert FULL_SIZE in flat
    assert ASKED in flat
    assert "36 vision tokens -> 4 visual tokens (-89%)" in flat
    *tested, own = found.answers
    assert len({one.question for one in tested}) == 3
    assert len({one.picture for one in tested}) == 1
    index = int(tested[0].picture.removeprefix("test "))
    sample = make_sample(Settings(), "test", index, load_sources())
    asked = {question.text: question.answer for question in sample.questions}
    for one in tested:
        assert asked[one.question] == one.expected
        assert one.question in flat
    assert flat.count(" wrong ") + flat.count(" right ") >= 3
    assert (own.question, own.expected) == (SKETCH_QUESTION, None)
    assert str(found.picture) in shown.replace("\n", "")


def test_demo_writes_a_picture(demo: tuple[Demo, str]) -> None:
    path = demo[0].picture
    with Image.open(path) as picture:
        assert picture.size == tuple(round(side * drawing.DPI) for side in drawing.SIZE_INCHES)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert [*path.parent.iterdir()] == [path]  # nothing half written beside it
    saturation = pixels.max(-1) - pixels.min(-1)
    third = pixels.shape[1] // 3
    # The picture, the pooling weights, the queries: all three in colour, the first as far as its things go.
    for panel, least in enumerate((0.005, 0.1, 0.1)):
        assert (saturation[:, panel * third : (panel + 1) * third] > 60).mean() > least


def test_demo_of_an_image_of_ones_own(checkpoint: Path, photograph: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    with threads(1):
        found = run_demo(
            photograph, "What is it?", tmp_path / "own.jpg", console=console, model=checkpoint, **SMALL_DEMO
        )
    assert found.answers[-1][:2] == (str(photograph), "What is it?")
    with Image.open(found.picture) as picture:
        assert picture.format == "JPEG"


def test_demo_reaches_the_command_line(
    checkpoint: Path,
    photograph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("flashsloth.demo.run_demo", partial(run_demo, model=checkpoint, **SMALL_DEMO))
    out = tmp_path / "picture.png"
    with threads(1):
        assert main(["demo", "--image", str(photograph), "--question", "What is it?", "--out", str(out)]) == 0
    assert out.is_file()
    assert "What is it?" in capsys.readouterr().out


def test_full_size_demo_has_the_released_widths() -> None:
    config = tiny.demo_config()
    assert config.vision_grid == (27, 27)
    assert config.vision_config.hidden_size == 1152
    assert (config.text_config.hidden_size, config.text_config.num_attention_heads) == (2560, 32)
    assert (config.query_dim, config.num_queries) == (576, 9)
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(config)
    assert 2e8 < sum(p.numel() for p in model.parameters()) < 3e8  # about 1 GB in fp32


def test_pooling_weights_and_query_attention_are_distributions(photograph: Path) -> None:
    model = tiny.random_model(tiny.tiny_config())
    processor = tiny.processor_for(model.config)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    )
    batch = processor(images=photograph, text=prompt)
    with torch.inference_mode(), heatmaps.watching(model) as seen:
        features = model(**batch).image_context.features
        weights = heatmaps.pooling_weights(model, features)
        attention = heatmaps.query_attention(model, seen[0])
        model(**batch)
    windows = weights.view(2, 3, 2, 3).sum((1, 3))
    torch.testing.assert_close(windows, torch.ones(2, 2))
    assert attention.shape == (1, 9, 36)
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 9))
    assert len(seen) == 2
    model(**batch)
    assert len(seen) == 2  # the hook is gone


def test_random_model_follows_its_seed_and_leaves_torch_alone() -> None:
    state = torch.random.get_rng_state()
    one, two = (tiny.random_model(tiny.tiny_config(), seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = tiny.random_model(tiny.tiny_config(), seed=4)
    assert not torch.equal(one.projector[0].weight, other.projector[0].weight)


def test_byte_tokenizer_gives_back_what_it_got() -> None:
    tokenizer = tiny.byte_tokenizer()
    text = "Straße, 東京 and \U0001f9a5.\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text


# ---- ask ----


def test_ask_streams_what_generate_gives(
    checkpoint: Path, photograph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(photograph), "What is it?", "--model", str(checkpoint), "--max-new-tokens", "9", "--device", "cpu"]
    assert main(["ask", *arguments]) == 0
    shown = capsys.readouterr().out
    model = FlashSlothForConditionalGeneration.from_pretrained(checkpoint)
    processor = tiny.processor_for(model.config)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    )
    batch = processor(images=photograph, text=prompt)
    ids = model.generate(**batch, max_new_tokens=9, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert len(ids) == 9
    assert shown.strip() == printable(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def test_ask_in_hd_reads_five_tiles(
    checkpoint: Path, photograph: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = []
    encode = FlashSlothForConditionalGeneration.get_image_features

    def counted(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        tiles.append(pixel_values.shape[1])
        return encode(model, pixel_values)

    monkeypatch.setattr(FlashSlothForConditionalGeneration, "get_image_features", counted)
    arguments = ["ask", str(photograph), "What?", "--model", str(checkpoint), "--max-new-tokens", "2"]
    assert main(arguments) == 0
    assert main([*arguments, "--hd"]) == 0
    assert tiles == [1, 5]


# ---- inspect ----


def test_inspect_counts_every_part(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = FlashSlothForConditionalGeneration.from_pretrained(checkpoint)
    found = inspect_checkpoint(checkpoint)
    modules = (
        model.vision_tower, model.pooling, model.projector, model.embedded_query, model.learnable_tokens,
        model.language_model,
    )  # fmt: skip
    counts = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert list(found.parameters.values()) == counts
    assert found.total == sum(p.numel() for p in model.parameters())
    assert (found.layout, found.tensors) == ("flashsloth", len(model.state_dict()))
    assert (found.vision_tokens, found.visual_tokens, found.num_queries) == (36, 4, 9)
    assert found.weight_bytes("fp32") == 4 * found.total == 2 * found.weight_bytes("bf16")

    # The cache as the model really fills it: keys and values of 11 tokens.
    cache = model(input_ids=torch.arange(11)[None], use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert found.cache_bytes(11, "fp32") == 4 * held

    assert main(["inspect", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in (*PARTS, "language model", "key-value cache, 1000 tokens"))
    assert f"{found.total:,}" in shown
    assert "36 vision tokens, 4 after pooling (-89%)" in shown


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_inspect_reads_the_official_layout(tmp_path: Path, ending: str) -> None:
    config = tiny.tiny_config(text={"num_hidden_layers": 8, "vocab_size": 50300}, query_layer=7, query_dim=576)
    tiny.random_model(config).save_pretrained(tmp_path / "ours")
    ours = inspect_checkpoint(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    weights = {official_name(name): tensor.bfloat16() for name, tensor in stored.items()}
    if ending == ".bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "model.safetensors")
    flat = {**config.text_config.to_dict(), "model_type": "flashsloth", "mm_vision_tower": "vision_tower"}
    flat |= {"mm_hidden_size": 32, "image_hd": True}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    (tmp_path / "vision_tower").mkdir()
    (tmp_path / "vision_tower" / "config.json").write_text(json.dumps(config.vision_config.to_dict()))
    found = inspect_checkpoint(tmp_path)
    assert found.layout == "official"
    assert found.parameters == ours.parameters
    assert found.dtypes == {"bfloat16": ours.tensors}
    assert found.visual_tokens == 5 * ours.visual_tokens


def test_inspect_of_the_full_size_reads_no_weights(tmp_path: Path) -> None:
    """The released model's names and shapes in fp16, in a file that is all hole: 6.4 GB long, a few KB on disk."""
    shapes, _ = full_size_names()
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    flat = {
        "model_type": "flashsloth", "mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_hidden_size": 1152,
        "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "partial_rotary_factor": 0.4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(flat))
    before = _resident()
    found = inspect_checkpoint(tmp_path)
    assert _resident() - before < 100e6
    assert found.total == 3_196_373_985
    assert found.tensors == 905
    assert found.parameters["learnable tokens"] == 9 * 2560
    assert round(found.parameters["vision tower"] / 1e6, 1) == 397.7
    assert round(found.parameters["spatial attention pooling"] / 1e6, 2) == 1.33
    assert round(found.parameters["projector"] / 1e6, 1) == 9.5
    assert round(found.parameters["embedded-query module"] / 1e6, 2) == 8.08
    assert (found.vision_tokens, found.visual_tokens) == (729, 81)
    assert found.cache_bytes(1000, "bf16") == 2 * 1000 * 2 * 32 * 2560


def _resident() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096.0


# ---- wrong input: one line, exit code 2 ----


def _wrong(checkpoint: Path, photo: Path, scratch: Path) -> dict[str, tuple[list[str], str]]:
    text = scratch / "text.png"
    text.write_text("no image")
    cut = scratch / "cut.png"
    cut.write_bytes(photo.read_bytes()[:300])
    empty, other, torn = scratch / "empty", scratch / "other", scratch / "torn"
    for folder in (empty, other, torn):
        folder.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (torn / name).write_bytes((checkpoint / name).read_bytes())
    (torn / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:1000])
    model = ["--model", str(checkpoint)]
    return {
        "no model": (["ask", str(photo), "What?"], "no trained weights ship"),
        "image not there": (["ask", str(scratch / "none.png"), "What?", *model], "No such file"),
        "not an image": (["ask", str(text), "What?", *model], "cannot identify image file"),
        "image cut off": (["ask", str(cut), "What?", *model], "cannot decode the image"),
        "image is a folder": (["ask", str(empty), "What?", *model], "it is a directory"),
        "model not there": (["ask", str(photo), "What?", "--model", str(scratch / "none")], "expected a directory"),
        "not a checkpoint": (["ask", str(photo), "What?", "--model", str(empty)], "config.json"),
        "another model": (["ask", str(photo), "What?", "--model", str(other)], "expected"),
        "weights cut off": (["ask", str(photo), "What?", "--model", str(torn)], "expected a complete safetensors file"),
        "reserved token": (["ask", str(photo), "<image>", *model], "contains '<image>'"),
        "inspect nothing": (["inspect", str(scratch / "none")], "expected a directory with a checkpoint"),
        "inspect empty": (["inspect", str(empty)], "expected a checkpoint with config.json"),
        "inspect another": (["inspect", str(other)], "expected model_type 'flashsloth' in config.json, got 'bert'"),
        "inspect cut off": (["inspect", str(torn)], "expected a complete safetensors file"),
        "demo of no image": (["demo", "--image", str(text), "--question", "?"], "cannot identify image file"),
        "demo without a question": (["demo", "--image", str(photo)], "--question: expected a question on the picture"),
        "demo to nowhere": (["demo", "--out", str(scratch / "no" / "x.png")], "existing directory"),
        "demo to a folder": (["demo", "--out", str(_folder(scratch / "x.png"))], "expected a file, got the directory"),
        "demo as text": (["demo", "--out", str(scratch / "x.txt")], "expected a file ending in .png"),
    }


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_wrong_input_gives_one_line_and_writes_nothing(
    checkpoint: Path,
    photograph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("flashsloth.shipped.WEIGHTS", tmp_path / "nothing ships")
    cases = _wrong(checkpoint, photograph, tmp_path)
    files = sorted(tmp_path.rglob("*"))
    for name, (arguments, said) in cases.items():
        assert main(arguments) == 2, name
        captured = capfd.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("flashsloth: ")]
        assert len(lines) == 1, (name, captured.err)
        assert said in lines[0], name
        assert "Traceback" not in captured.err, name
        assert captured.out == "", name
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize(
    "arguments",
    [[], ["dance"], ["ask"], ["ask", "x.png"], ["inspect"], ["ask", "x.png", "q", "--max-new-tokens", "0"]],
)
def test_wrong_arguments_show_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: flashsloth" in capsys.readouterr().err


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(name: str) -> Callable[..., None]:
        def run(*_: Any, **__: Any) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return run

    monkeypatch.setattr("flashsloth.demo.run_demo", without("skimage"))
    assert main(["demo", "--out", str(tmp_path / "x.png")]) == 2
    assert "the package skimage is missing: pip install 'flashsloth[demo]'" in capsys.readouterr().err


def test_an_unavailable_device_is_named(
    checkpoint: Path, photograph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["ask", str(photograph), "What?", "--model", str(checkpoint), "--device", "cuda"]) == 2
    assert "--device: expected cpu" in capsys.readouterr().err


def test_the_picture_is_not_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"what was there")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left"):
        drawing.draw_attention(
            path, Image.new("RGB", (8, 8)), np.full((6, 6), 1 / 9), np.full((4, 6, 6), 1 / 36), window=3, caption=""
        )
    assert path.read_bytes() == b"what was there"
    assert [*tmp_path.iterdir()] == [path]


def test_uniform_maps_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    drawing.draw_attention(
        path, Image.new("L", (9, 5)), np.full((7, 6), 1 / 9), np.full((5, 7, 6), 1 / 42), window=3, caption="flat"
    )
    with Image.open(path) as picture:
        assert picture.size[0] > 1000


def test_entry_point_is_the_one_that_is_installed() -> None:
    text = (Path(cli.__file__).parent.parent / "pyproject.toml").read_text()
    assert 'flashsloth = "flashsloth.cli:main"' in text
    assert callable(cli.main)
