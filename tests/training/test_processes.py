"""Two processes train as one does on the same batches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("accelerate")

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.training.checkpoints import complete_checkpoints
from tests.support import ROOT
from tests.training.cases import curve, prepare, settings, train

STEADY = {"pool_dropout": 0.0, "text": {"resid_pdrop": 0.0}}  # two processes draw other masks than one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("run"), 22, **STEADY)  # the last step of an epoch is short


def run_two(folder: Path, *arguments: str, **changes: Any) -> str:
    """``flashsloth train`` by torchrun; what it printed."""
    values = settings(folder, **changes)
    if not torch.accelerator.is_available():
        del values["arguments"]["use_cpu"]  # found out
    config = folder / f"{values['out']}.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "flashsloth.cli", "train", "--config", str(config), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def logged(folder: Path, out: str) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def close(found: list[Any], expected: list[Any]) -> None:
    """Sums in another order: 8 steps of float32 apart at most 1e-4 of a loss of 5."""
    assert [one[0] for one in found] == [one[0] for one in expected]
    torch.testing.assert_close([one[1] for one in found], [one[1] for one in expected], rtol=2e-5, atol=0)
    torch.testing.assert_close([one[2] for one in found], [one[2] for one in expected], rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def single(folder: Path) -> Any:
    return train(folder, out="single", batch=8, micro_batch=4, arguments={"max_steps": 5})


def test_the_same_curve_as_one(folder: Path, single: Any) -> None:
    """Eight rows a step: 2 x 4 of one process, 2 x 2 x 2 of two; every fifth row has no image."""
    run_two(folder, out="two", batch=8, micro_batch=2, arguments={"max_steps": 5})
    close(logged(folder, "two"), [one[:3] for one in curve(single)])
    one = FlashSlothForConditionalGeneration.from_pretrained(folder / "single").state_dict()
    two = FlashSlothForConditionalGeneration.from_pretrained(folder / "two").state_dict()
    # Adam divides by the size of a gradient, so one that is nearly nothing moves its weight by up to a whole step.
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert apart.abs().mean() < 1e-5
    last = complete_checkpoints(folder / "two")[-1]
    assert {"rng_state_0.pth", "rng_state_1.pth", "data_0.json", "data_1.json"} <= {one.name for one in last.iterdir()}


def test_one_goes_on_where_two_stopped(folder: Path, single: Any) -> None:
    """Counts of both are taken over, and the order is the same."""
    shutil.copytree(folder / "two" / "checkpoint-4", folder / "fewer" / "checkpoint-4")
    fewer = train(folder, out="fewer", resume=True, batch=8, micro_batch=4, arguments={"max_steps": 5})
    assert fewer.resumed_at == 4
    close([one[:3] for one in curve(fewer)], [one[:3] for one in curve(single)])
    assert fewer.broken.seen == single.broken.seen == 22 + 2 * 8


def test_fsdp(folder: Path, single: Any) -> None:
    """FSDP2: the weights are shared out; the curve, what is saved and where a resumed run goes on are the same."""
    sharding = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["PhiDecoderLayer", "SiglipEncoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
    }
    options = {"batch": 8, "micro_batch": 2, "arguments": {"max_steps": 5, "fsdp": True, "fsdp_config": sharding}}
    run_two(folder, out="fsdp", **options)
    found = logged(folder, "fsdp")
    close(found, [one[:3] for one in curve(single)])
    one = FlashSlothForConditionalGeneration.from_pretrained(folder / "single").state_dict()
    two = FlashSlothForConditionalGeneration.from_pretrained(folder / "fsdp").state_dict()
    assert torch.cat([(one[name] - two[name]).flatten() for name in one]).abs().mean() < 1e-5
    shutil.copytree(folder / "fsdp" / "checkpoint-4", folder / "fsdp-resumed" / "checkpoint-4")
    assert "goes on from" in run_two(folder, "--resume", out="fsdp-resumed", **options)
    close(logged(folder, "fsdp-resumed"), found)
