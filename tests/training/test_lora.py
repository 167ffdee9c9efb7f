"""Low-rank updates: what learns, what is saved, resuming."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.training.config import Lora
from flashsloth.training.lora import add_lora
from flashsloth.training.stages import load_model
from tests.training.cases import curve, prepare, train, weights

LORA = {"rank": 2, "alpha": 8, "dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("run"), 16)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return train(folder, out="whole", lora=LORA)


def test_the_decoder_learns_by_its_updates_alone(folder: Path, whole: Any) -> None:
    start = weights(load_model(folder / "model"))
    learned = {name for name, weight in whole.model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in learned if name.startswith("language_model."))
    assert {name.split(".")[0] for name in learned} == {
        "pooling", "projector", "learnable_tokens", "embedded_query", "language_model",
    }  # fmt: skip
    for name, weight in weights(whole.model).items():
        if name.startswith("language_model.") and "lora_" not in name:
            assert torch.equal(weight, start[name.replace(".base_layer", "")]), name


def test_what_is_saved_is_a_plain_model_that_computes_the_same(folder: Path, whole: Any) -> None:
    saved = FlashSlothForConditionalGeneration.from_pretrained(folder / "whole")
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected, found = whole.model.eval()(ids).logits, saved.eval()(ids).logits
        start = load_model(folder / "model").eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - start).abs().max() > 1e-3


def test_resuming(folder: Path, whole: Any) -> None:
    shutil.copytree(folder / "whole" / "checkpoint-4", folder / "resumed" / "checkpoint-4")
    assert curve(train(folder, out="resumed", lora=LORA, resume=True)) == curve(whole)
    with pytest.raises(ValueError, match=r"lora: expected .*'rank': 2.* got .*'rank': 3"):
        train(folder, out="whole", lora=LORA | {"rank": 3}, resume=True)


def test_targets(folder: Path) -> None:
    model = load_model(folder / "model")
    chosen = add_lora(model, Lora(rank=2, alpha=2.0, targets=("q_proj", "fc1")))
    assert len(chosen) == 6
    with pytest.raises(ValueError, match=r"lora\.targets: expected linear layers out of dense, fc1, .*got 'query'"):
        add_lora(load_model(folder / "model"), Lora(rank=2, alpha=2.0, targets=("query",)))
