"""A run from a configuration file to a model that answers: curve, parts that are trained, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor
from tests.training.cases import STEADY, curve, prepare, train, weights

LONG = {"max_steps": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    """Eight steps, an epoch has six; with dropout."""
    return train(folder, out="whole", arguments=LONG | {"save_total_limit": None})


def test_the_trained_model_is_a_checkpoint_like_any_other(folder: Path, whole: Any) -> None:
    loaded = FlashSlothForConditionalGeneration.from_pretrained(folder / "whole")
    processor = FlashSlothProcessor.from_pretrained(folder / "whole")
    trained = weights(whole.model)
    assert all(torch.equal(trained[name], tensor) for name, tensor in weights(loaded).items())
    assert not hasattr(loaded.config, "use_cache")
    inputs = processor(text=processor.apply_chat_template([{"role": "user", "content": "Hello"}]))
    assert loaded.eval().generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_the_loss_falls_and_is_logged(folder: Path, whole: Any) -> None:
    losses = [loss for _, loss, _, _ in curve(whole)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    lines = [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == losses
    assert all(line["tokens_per_second"] > 0 and line["memory_gib"] > 0 for line in lines if "loss" in line)


def test_the_same_seed_gives_the_same_bits(folder: Path, whole: Any) -> None:
    again = train(folder, out="again", arguments=LONG)
    assert curve(again) == curve(whole)
    other = train(folder, out="other", seed=1, arguments=LONG)
    assert curve(other) != curve(whole)


@pytest.mark.parametrize("step", [2, 6])  # within an epoch, and at its end
def test_resuming_continues_the_same_curve(folder: Path, whole: Any, step: int) -> None:
    out = folder / f"resumed-{step}"
    shutil.copytree(folder / "whole" / f"checkpoint-{step}", out / f"checkpoint-{step}")
    resumed = train(folder, resume=True, out=out.name, arguments=LONG)
    assert curve(resumed) == curve(whole)
    assert resumed.resumed_at == step
    trained = weights(whole.model)
    assert all(torch.equal(trained[name], tensor) for name, tensor in weights(resumed.model).items())


def test_compiled_layers_change_nothing_but_rounding(tmp_path: Path) -> None:
    prepare(tmp_path, pool_dropout=0.0, text=STEADY)
    plain, compiled = (
        curve(train(tmp_path, out=f"out-{on}", compile=on, arguments={"max_steps": 2, "save_steps": 2}))
        for on in (False, True)
    )
    assert [step for step, *_ in compiled] == [1, 2]
    for (_, loss, norm, _), (_, expected, expected_norm, _) in zip(compiled, plain, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
