"""The model that ships: its size, and what it answers on the test splits: docs/nano.json has what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn")

from flashsloth.evaluation import evaluate, generated_task
from flashsloth.loading import Loaded, load_model
from flashsloth.shipped import FILES, shipped_model
from tests.support import ROOT

MEASURED: dict[str, Any] = json.loads((ROOT / "docs" / "nano.json").read_text())
TURNED = 2  # answers that another processor, which rounds otherwise, may turn


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model(device="cpu")


def test_it_fits() -> None:
    folder = shipped_model()
    assert {*FILES} <= {path.name for path in folder.iterdir()}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert sum(weight.numel() for weight in weights.values()) <= 12e6


@pytest.mark.parametrize("task", ["sight", "sort-of-clevr"])
def test_the_first_questions_of_the_test_split(loaded: Loaded, task: str) -> None:
    """As many right as when all of the split was asked."""
    first = MEASURED[task]["first"]
    found = evaluate(
        loaded.model, loaded.processor, generated_task(task == "sort-of-clevr", limit=first["of"]), max_new_tokens=32
    )
    assert found.total.count == first["of"]
    assert abs(found.total.correct - first["right"]) <= TURNED


def test_hd_reads_small_print_that_the_plain_mode_cannot(loaded: Loaded) -> None:
    made = generated_task(limit=1600)
    task = replace(made, questions=tuple(one for one in made.questions if one.kind == "small-print"))
    plain, hd = (
        evaluate(loaded.model, loaded.processor, task, image_hd=hd, max_new_tokens=32).total for hd in (False, True)
    )
    assert plain.count == hd.count > 30
    assert hd.accuracy >= plain.accuracy + 0.10
