"""Checkpoints: the official layout and ours, whole and sharded, and every way in which one can be broken."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration
from flashsloth.checkpoint import convert_config, is_official, official_name, rename
from tests.model.support import PHI, QWEN2, VISION, Row, batch, small_model
from tests.support import golden_path

FLAT = {
    **{k: v for k, v in PHI.items() if k != "model_type"},
    "vocab_size": 50300,
    "num_hidden_layers": 9,
    "hidden_size": 16,
    "num_attention_heads": 4,
}
OFFICIAL = {
    "model_type": "flashsloth",
    "architectures": ["FlashSlothForCausalLM"],
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_hidden_size": 24,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "use_mm_proj": True,
    "image_aspect_ratio": "square",
    "tokenizer_padding_side": "right",
    "torch_dtype": "float32",
    **FLAT,
}
TOWER = {**VISION, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Weights of a small model under their official names."""
    torch.manual_seed(0)
    config = FlashSlothConfig(vision_config=TOWER, text_config={"model_type": "phi", **FLAT})
    model = FlashSlothForConditionalGeneration(config)
    return {official_name(name): tensor.clone() for name, tensor in model.state_dict().items()}


def describe(directory: Path, **changes: Any) -> None:
    (directory / "vision_tower").mkdir(parents=True, exist_ok=True)
    tower = {"model_type": "siglip_vision_model", **TOWER}
    (directory / "vision_tower" / "config.json").write_text(json.dumps(tower))
    (directory / "config.json").write_text(json.dumps({**OFFICIAL, **changes}))


def write(directory: Path, weights: dict[str, Tensor], ending: str, shards: int) -> None:
    """An official checkpoint as the official code would have written it."""
    describe(directory)
    stem = "model" if ending == "safetensors" else "pytorch_model"

    def put(part: dict[str, Tensor], file: Path) -> None:
        save_file(part, file) if ending == "safetensors" else torch.save(part, file)

    if shards == 1:
        put(weights, directory / f"{stem}.{ending}")
        return
    names = list(weights)
    index = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{ending}"
        part = {name: weights[name] for name in names[i::shards]}
        put(part, directory / file)
        index.update(dict.fromkeys(part, file))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / f"{stem}.{ending}.index.json").write_text(text)


def load(directory: Path, **kwargs: Any) -> FlashSlothForConditionalGeneration:
    return FlashSlothForConditionalGeneration.from_pretrained(directory, **kwargs)


def same(model: FlashSlothForConditionalGeneration, weights: dict[str, Tensor]) -> bool:
    found = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_official_layout_loads_bitwise(tmp_path: Path, weights: dict[str, Tensor], ending: str, shards: int) -> None:
    write(tmp_path, weights, ending, shards)
    model = load(tmp_path)
    with torch.no_grad():
        model.learnable_tokens.token.add_(1)  # tensors are mapped from the files, which must not change with them
    model = load(tmp_path)
    assert same(model, weights)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.vision_layers == 2
    assert model.config.text_config.hidden_size == 16
    assert model.generation_config.eos_token_id == 50296
    assert model.generation_config.pad_token_id == 50256


def test_official_layout_loads_through_the_auto_classes(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    write(tmp_path, weights, "safetensors", 1)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, FlashSlothConfig)
    assert config.vision_config.hidden_size == 24
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="flashsloth"
    )
    assert isinstance(model, FlashSlothForConditionalGeneration)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert same(model, {name: tensor.bfloat16() for name, tensor in weights.items()})
    assert model.config.text_config._attn_implementation == "token_sparse"


def test_image_hd_selects_hd(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    write(tmp_path, weights, "safetensors", 1)
    assert load(tmp_path).config.num_tiles == 1
    assert load(tmp_path, image_hd=True).config.num_visual_tokens == 5 * 4
    assert AutoConfig.from_pretrained(tmp_path, image_hd=True).num_tiles == 5
    describe(tmp_path, image_hd=True)
    assert load(tmp_path).config.num_tiles == 5


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what loading notes in it."""
    noted = ("_name_or_path", "dtype", "architectures", "transformers_version")
    return {k: settings(v) if isinstance(v, dict) else v for k, v in config.items() if k not in noted}


@pytest.mark.parametrize("text", [PHI, QWEN2], ids=["phi", "qwen2-tied"])
def test_our_layout_goes_through_disk_bitwise(tmp_path: Path, text: dict[str, Any]) -> None:
    model = small_model(text, image_hd=True)
    inputs = batch([Row(4, seed=1), Row(3, seed=2, image=False)])
    target = tmp_path / "saved"
    model.save_pretrained(target, max_shard_size="20KB")
    assert len(list(target.glob("model-*.safetensors"))) > 1
    again = load(target)
    assert settings(again.config.to_dict()) == settings(model.config.to_dict())
    want, got = model.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    # Saving over the files that are mapped, in fewer shards, leaves no shard of before.
    again.save_pretrained(target)
    assert [file.name for file in target.glob("*.safetensors*")] == ["model.safetensors"]
    assert all(torch.equal(want[name], tensor) for name, tensor in load(target).state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_official_to_ours_and_back_from_disk(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    write(tmp_path / "official", weights, "bin", 2)
    load(tmp_path / "official").save_pretrained(tmp_path / "ours")
    assert not is_official(json.loads((tmp_path / "ours" / "config.json").read_text()))
    again = load(tmp_path / "ours")
    assert same(again, weights)
    assert again.generation_config.eos_token_id == 50296


def test_a_failed_save_leaves_the_target_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    target = tmp_path / "saved"
    model.save_pretrained(target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with torch.no_grad():
        model.learnable_tokens.token.add_(1)

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("No space left on device")

    import transformers.modeling_utils as modeling_utils

    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory: expected a directory"):
        model.save_pretrained(tmp_path / "file")


class Touch:
    """A pickle that, were it run, would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [True, False], ids=["plain", "zip"])
def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path, weights: dict[str, Tensor], legacy: bool) -> None:
    describe(tmp_path)
    trap, file = tmp_path / "trap", tmp_path / "pytorch_model.bin"
    if legacy:
        file.write_bytes(pickle.dumps(Touch(trap)))
    else:
        torch.save({**weights, "x": Touch(trap)}, file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected a pickle of tensors alone"):
        load(tmp_path)
    assert not trap.exists()


def test_names_that_do_not_fit_are_listed(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    missing = {name: tensor for name, tensor in weights.items() if "ln_kv" not in name}
    write(tmp_path, missing, "safetensors", 1)
    with pytest.raises(ValueError, match=r"missing names: model\.lqformer\.layers\.0\.ln_kv\.bias, .*ln_kv\.weight$"):
        load(tmp_path)
    write(tmp_path, {**weights, "model.other.weight": torch.zeros(2)}, "safetensors", 1)
    with pytest.raises(ValueError, match=r"got unexpected names: model\.other\.weight$"):
        load(tmp_path)
    write(tmp_path, {"model.other.weight": torch.zeros(2)}, "safetensors", 1)
    with pytest.raises(ValueError, match=r"and \d+ more; unexpected names: model\.other\.weight$"):
        load(tmp_path)


def test_names_of_our_layout_are_checked_too(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    token = tensors.pop("learnable_tokens.token")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing names: learnable_tokens\.token"):
        load(tmp_path)
    save_file({**tensors, "learnable_tokens.token": token, "more": token.clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected names: more"):
        load(tmp_path)
    save_file({**tensors, "learnable_tokens.token": token[:, :5].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"wrong shapes: learnable_tokens\.token: expected \(3, 32\), got \(3, 5\)"):
        load(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a complete safetensors file"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint with config\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected a directory with config\.json, or a hub id"):
        load(tmp_path / "nowhere")


def test_a_missing_shard_is_named(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    write(tmp_path, weights, "safetensors", 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected 3 shards, missing model-00002-of-00003\.safetensors$"):
        load(tmp_path)
    small_model().save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    gone = sorted((tmp_path / "ours").glob("model-*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=rf"missing {gone.name}$"):
        load(tmp_path / "ours")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_wrong_shape_is_named(tmp_path: Path, weights: dict[str, Tensor], ending: str) -> None:
    wrong = {**weights, "model.learnable_tokens.token": torch.zeros(8, 16), "lm_head.bias": torch.zeros(3)}
    write(tmp_path, wrong, ending, 1)
    message = r"lm_head\.bias: expected \(50300,\), got \(3,\)"
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path)
    assert "model.learnable_tokens.token: expected (9, 16), got (8, 16)" in str(raised.value)


def test_broken_files_are_named(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    write(tmp_path, weights, "safetensors", 2)
    first = tmp_path / "model-00001-of-00002.safetensors"
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors: expected a complete"):
        load(tmp_path)
    save_file({"model.norm": torch.zeros(1)}, first)
    with pytest.raises(ValueError, match="expected the names the index puts there, missing"):
        load(tmp_path)
    first.write_bytes((tmp_path / "model-00002-of-00002.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"expected (names no other shard has|the names the index puts there)"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match=r"expected files in the same directory, got '\.\./outside"):
        load(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: expected JSON"):
        load(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        load(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(weights, file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected"):
        load(tmp_path)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="expected a dict of names to tensors, got list"):
        load(tmp_path)


def test_the_vision_configuration_is_found(tmp_path: Path) -> None:
    built_in = convert_config(OFFICIAL | {"mm_hidden_size": 1152}, None)
    assert built_in["vision_config"]["num_hidden_layers"] == 27
    describe(tmp_path)
    assert convert_config(OFFICIAL, tmp_path)["vision_config"]["hidden_size"] == 24
    moved = tmp_path / "tower"
    (tmp_path / "vision_tower").rename(moved)
    nested = {"model_type": "siglip", "vision_config": json.loads((moved / "config.json").read_text())}
    (moved / "config.json").write_text(json.dumps(nested))
    for where in (str(moved), "tower"):
        converted = convert_config({**OFFICIAL, "mm_vision_tower": where}, tmp_path)
        assert converted["vision_config"]["patch_size"] == 7
    with pytest.raises(ValueError, match="mm_hidden_size: expected 1152, the width of the vision tower, got 24"):
        convert_config(OFFICIAL, None)
    with pytest.raises(ValueError, match="mm_projector_type: expected 'mlp2x_gelu', got 'linear'"):
        convert_config({**OFFICIAL, "mm_projector_type": "linear"}, tmp_path)
    with pytest.raises(ValueError, match="expected mm_vision_tower, or vision_tower/config"):
        convert_config({k: v for k, v in OFFICIAL.items() if k != "mm_vision_tower"}, None)


def full_size_names() -> tuple[dict[str, list[int]], dict[str, Any]]:
    compact = json.loads(golden_path("keys_compact.json").read_text())
    names = {}
    for name, shape in compact["keys"].items():
        prefix = name.split(".*.")[0]
        count = compact["layers"].get(prefix)
        for i in range(count or 1):
            names[name.replace(".*.", f".{i}.")] = shape
    return names, compact


def test_full_size_model_has_the_official_names_and_shapes() -> None:
    names, compact = full_size_names()
    official = {"model_type": "flashsloth", **compact["llm_config"]}
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(FlashSlothConfig.from_dict(official))
    found = {official_name(name): list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == names
    assert len(found) == compact["num_tensors"] == 905
    assert sum(p.numel() for p in model.parameters()) == compact["num_parameters"] == 3_196_373_985
    assert FlashSlothConfig().to_dict()["text_config"] == model.config.to_dict()["text_config"]


def test_the_compact_list_of_names_is_the_whole_one() -> None:
    whole = json.loads(golden_path("keys.json").read_text())
    assert full_size_names()[0] == whole["keys"]


def test_renaming_has_an_inverse() -> None:
    names, _ = full_size_names()
    assert all(official_name(rename(name)) == name for name in names)
    assert len({rename(name) for name in names}) == len(names)
    assert not any(rename(name).startswith("model.") for name in names)
