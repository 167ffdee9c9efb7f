"""The training step: what learns is compared, the plain path runs no op of ours, and a wrong gradient is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.case import Inputs, Outputs, Provider, callable_of, widened
from bench.cases import train
from bench.check import run_checks
from bench.memory import kept_bytes
from bench.runner import CPU, run_point
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth_ops import backend
from tests.bench.toys import FAST
from tests.support import needs_extension

STEP = train.CASES[0]
OURS = "flashsloth/cpu"


def test_every_weight_that_learns_is_compared() -> None:
    model = FlashSlothForConditionalGeneration(train.config_of(STEP.small))
    names = {name for name, _ in model.named_parameters() if not name.startswith("vision_tower.")}
    declared = {name.replace("/", ".") for name in STEP.differentiable}
    assert declared == {name for name in names if not name.endswith(train._STILL)}
    assert {name for name in STEP.inputs(STEP.small) if "/" in name} > set(STEP.differentiable)


def test_what_is_left_out_has_no_gradient() -> None:
    given = widened(STEP.inputs(STEP.small))
    still = tuple(name for name in given if "/" in name and name.replace("/", ".").endswith(train._STILL))
    assert len(still) == 4
    case = replace(STEP, differentiable=still)
    outputs = callable_of(case, Provider("exact", case.exact), given)()
    assert all(float(outputs[f"d{name}"].abs().max()) < 1e-15 for name in still)


def test_the_plain_path_runs_no_op_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    select = backend.select
    monkeypatch.setattr(backend, "select", lambda op, *rest, **more: asked.append(op) or select(op, *rest, **more))
    given = STEP.inputs(STEP.small)
    train.plain(given)
    assert asked == []
    train.fused(given)
    assert set(asked) == set(backend.OPS)


@pytest.mark.parametrize("case", train.CASES, ids=lambda case: case.name)
def test_a_wrong_gradient_fails_the_check(case: train.Case) -> None:
    """In the cases for both devices: of one weight, a hundredth off."""

    def wrong(given: Inputs) -> Outputs:
        weight = "pooling/mlp/0/weight"
        off = given[weight] + 0.01 * (given[weight] - given[weight].detach())  # the same value, another gradient
        return train.plain({**given, weight: off})

    wrong_one = Provider("wrong", wrong, ours=True, backend="reference")
    case = replace(case, providers=(wrong_one, case.provider(train.PLAIN)))
    found = run_checks(case, case.inputs(case.small), "cpu", torch.float32, case.small)
    failure = found["wrong"].failure
    assert failure is not None
    assert "pooling" in failure
    assert found[train.PLAIN].failure is None


@needs_extension
def test_time_and_memory_stand_beside_the_check() -> None:
    rows = {row.provider: row for row in run_point(replace(STEP, sizes=(STEP.small,)), STEP.small, CPU, FAST)}
    ours, plain = rows[OURS], rows[train.PLAIN]
    assert ours.passed
    assert plain.passed
    assert ours.ratios[train.PLAIN]["p50"] > 0
    given = STEP.inputs(STEP.small)
    assert ours.kept_bytes == kept_bytes(STEP, STEP.provider(OURS), given)
    assert ours.kept_bytes is not None
    assert plain.kept_bytes is not None
    assert ours.kept_bytes < plain.kept_bytes
