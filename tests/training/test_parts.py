"""Which parts learn, from what they start, and that how a step is computed does not change what is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

pytest.importorskip("accelerate")

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.tiny import random_model, tiny_config
from flashsloth.training.stages import PARTS, count_parameters, load_model, set_trained
from flashsloth.training.trainer import Diverged
from tests.training.cases import curve, prepare, train, weights, write_model

FEW = {"max_steps": 3, "save_strategy": "no"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("run"), 16)


@pytest.fixture(scope="module")
def second(folder: Path) -> Any:
    return train(folder, out="second", arguments=FEW)


def changed(one: Any, other: Any) -> set[str]:
    """Parts in which any weight differs."""
    before, after = weights(one), weights(other)
    names = {name for name in before if not torch.equal(before[name], after[name])}
    return {part for part, modules in PARTS.items() if any(name.split(".")[0] in modules for name in names)}


def losses(trainer: Any) -> list[float]:
    return [one[1] for one in curve(trainer)]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"stage": 1, "data": [{"records": "data/train.json", "captions": False}]}, {"pooling", "projector"}),
        ({"stage": 2}, {"pooling", "projector", "queries", "decoder"}),
        ({"train": ["tower"]}, {"tower"}),
        ({"train": ["queries"]}, {"queries"}),
    ],
    ids=["stage 1", "stage 2", "tower", "queries"],
)
def test_what_is_trained_and_nothing_else(folder: Path, changes: dict[str, Any], parts: set[str]) -> None:
    out = "_".join(sorted(parts))
    trained = train(folder, out=out, arguments=FEW, **changes)
    start = load_model(folder / "model")
    assert changed(start, trained.model) == parts
    assert changed(start, FlashSlothForConditionalGeneration.from_pretrained(folder / out)) == parts


def test_captions_are_the_rows_of_stage_1(folder: Path, tmp_path: Path) -> None:
    """A record of text alone is no caption."""
    trained = train(folder, stage=1, out=str(tmp_path), arguments=FEW, max_broken=0.5)
    assert set(trained.broken.reasons) == {"not_a_caption"}


def test_pooling_of_stage_1_survives_into_stage_2(folder: Path) -> None:
    one = [{"records": "data/train.json", "captions": False}]
    train(folder, stage=1, out="one", data=one, arguments=FEW)
    first = weights(FlashSlothForConditionalGeneration.from_pretrained(folder / "one"))
    start = weights(load_model(folder / "model"))
    train(folder, stage=2, model="one", out="two", arguments=FEW | {"learning_rate": 0.0})
    second = weights(FlashSlothForConditionalGeneration.from_pretrained(folder / "two"))
    pooling = [name for name in first if name.startswith("pooling.")]
    assert len(pooling) == 4
    # The last bias shifts all scores of a window alike, which a softmax does not see.
    assert {name for name in pooling if torch.equal(first[name], start[name])} <= {"pooling.mlp.3.bias"}
    assert all(torch.equal(second[name], first[name]) for name in first)


def test_the_tower_gets_gradients_in_hd(folder: Path) -> None:
    everything = ["tower", "pooling", "projector", "queries", "decoder"]
    hd = [{"records": "data/train.json", "image_hd": True}]
    trained = train(folder, train=everything, data=hd, out="hd", arguments=FEW)
    before, after = weights(load_model(folder / "model")), weights(trained.model)
    tower = [name for name in before if name.startswith("vision_tower.") and not name.endswith("k_proj.bias")]
    assert tower  # the bias of keys changes no attention
    assert not [name for name in tower if torch.equal(before[name], after[name])]


def test_a_frozen_tower_runs_without_gradients(folder: Path) -> None:
    model = load_model(folder / "model")
    set_trained(model, ["projector"])
    assert not model.get_image_features(torch.randn(1, 1, 3, 42, 42)).requires_grad
    set_trained(model, ["projector", "tower"])
    assert model.get_image_features(torch.randn(1, 1, 3, 42, 42)).requires_grad
    counts = count_parameters(model)
    assert {part for part, (_, trained) in counts.items() if trained} == {"projector", "tower"}
    assert sum(every for every, _ in counts.values()) == sum(weight.numel() for weight in model.parameters())


def test_the_tower_of_another_checkpoint(folder: Path, tmp_path: Path) -> None:
    """FlashSloth's, or SigLIP's own, which has one layer more and a head."""
    other = random_model(tiny_config(), seed=7)
    other.save_pretrained(tmp_path / "flashsloth")
    siglip = AutoModel.from_config(tiny_config().vision_config)
    siglip.save_pretrained(tmp_path / "siglip")
    plain = load_model(folder / "model")
    for name, source in (("flashsloth", other.vision_tower), ("siglip", siglip)):
        model = load_model(folder / "model", tower=tmp_path / name)
        assert changed(plain, model) == {"tower"}
        theirs = {key.removeprefix("vision_model."): value for key, value in source.state_dict().items()}
        for key, value in model.vision_tower.state_dict().items():
            assert torch.equal(value, theirs[key.removeprefix("vision_model.")])
    write_model(tmp_path / "wide", weights=True)
    wide = tiny_config()
    wide.vision_config.intermediate_size = 64
    AutoModel.from_config(wide.vision_config).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"tower: .*fc1\.\w+: expected \(48.*got \(64"):
        load_model(folder / "model", tower=tmp_path / "wide")


def test_drawn_weights_depend_on_the_seed_alone(folder: Path) -> None:
    torch.manual_seed(1)
    one = load_model(folder / "model", seed=3)
    torch.manual_seed(2)
    assert changed(one, load_model(folder / "model", seed=3)) == set()
    assert changed(one, load_model(folder / "model", seed=4)) == set(PARTS)


@pytest.mark.parametrize("parts", [["pooling", "projector"], list(PARTS)], ids=["behind a frozen decoder", "all"])
def test_recomputing_gives_the_same_bits(folder: Path, tmp_path: Path, parts: list[str]) -> None:
    """Dropout included; the norm of the gradients is part of the curve."""
    plain = train(folder, out=str(tmp_path / "plain"), train=parts, arguments=FEW)
    again = train(folder, out=str(tmp_path / "again"), train=parts, arguments=FEW | {"gradient_checkpointing": True})
    assert again.model.is_gradient_checkpointing
    assert not plain.model.is_gradient_checkpointing
    assert curve(again) == curve(plain)


def test_workers_change_nothing(folder: Path, second: Any) -> None:
    again = train(folder, out="workers", arguments=FEW | {"dataloader_num_workers": 2})
    assert losses(again) == losses(second)


@pytest.mark.parametrize("micro", [1, 4])
def test_accumulation_changes_nothing_but_rounding(tmp_path: Path, micro: int) -> None:
    """Rows have 1 to 30 learned tokens: a mean of means would be far off."""
    prepare(tmp_path, 16, pool_dropout=0.0, text={"resid_pdrop": 0.0})
    expected = losses(train(tmp_path, out="two", micro_batch=2, arguments=FEW))
    found = losses(train(tmp_path, out="other", micro_batch=micro, arguments=FEW))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_bfloat16(folder: Path, second: Any) -> None:
    """Products in bfloat16, weights in float32; then weights in bfloat16 too. 8 bits: 0.4 % of a loss of about 5."""
    mixed = train(folder, out="bf16", arguments=FEW | {"bf16": True})
    assert {weight.dtype for weight in mixed.model.parameters()} == {torch.float32}
    torch.testing.assert_close(losses(mixed), losses(second), rtol=1e-2, atol=0)
    assert losses(mixed) != losses(second)
    pure = train(folder, out="pure", dtype="bfloat16", arguments=FEW)
    assert {weight.dtype for weight in pure.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(losses(pure), losses(second), rtol=1e-2, atol=0)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    prepare(tmp_path, 8, weights=True)
    model = load_model(tmp_path / "model")
    with torch.no_grad():
        model.projector[0].weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(Diverged, match="the loss is nan at step 1"):
        train(tmp_path)
    with pytest.raises(Diverged, match="the loss is nan at step 2"):  # nothing was logged before, but is saved now
        train(tmp_path, out="quiet", arguments={"logging_steps": 50, "logging_first_step": False})
    assert not list((tmp_path / "quiet").glob("checkpoint-*"))


def test_dropout_in_attention_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path, 8, text={"attention_dropout": 0.1})
    with pytest.raises(ValueError, match="model: expected attention_dropout 0 in text_config"):
        train(tmp_path)


def test_rows_longer_than_the_decoder_has_positions_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path, 8)
    with pytest.raises(ValueError, match="max_length: expected at most 2048, the decoder's positions, got 4096"):
        train(tmp_path, max_length=4096)


def test_tensorboard(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    train(folder, out="board", arguments=FEW | {"report_to": "tensorboard"})
    assert list((folder / "board").rglob("events.out.tfevents.*"))
