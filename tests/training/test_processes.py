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
from flashsloth.training import command
from flashsloth.training.checkpoints import STAGING, complete_checkpoints
from flashsloth.training.config import TrainConfig
from tests.support import ROOT
from tests.training.cases import curve, prepare, settings, train

STEADY = {"pool_dropout": 0.0, "text": {"resid_pdrop": 0.0}}  # two processes draw other masks than one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("run"), 22, **STEADY)  # the last step of an epoch is short


def torchrun(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command by two processes; one that hangs is ended."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    with subprocess.Popen(
        arguments,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            printed, said = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends both
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, printed, said)


def written(folder: Path, **changes: Any) -> str:
    """A configuration file of two processes."""
    values = settings(folder, **changes)
    if not torch.accelerator.is_available():
        del values["arguments"]["use_cpu"]  # found out
    config = folder / f"{values['out']}.yaml"
    config.write_text(yaml.safe_dump(values))
    return str(config)


def run_two(folder: Path, *arguments: str, **changes: Any) -> str:
    """``flashsloth train`` by torchrun; what it printed."""
    done = torchrun(folder, "-m", "flashsloth.cli", "train", "--config", written(folder, **changes), *arguments)
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


def apart(one: Path, other: Path) -> float:
    """By how much weights differ, on average.

    Adam divides by the size of a gradient, so one that is nearly nothing moves its weight by up to a whole step.
    """
    weights, others = (FlashSlothForConditionalGeneration.from_pretrained(path).state_dict() for path in (one, other))
    return float(torch.cat([(weights[name] - others[name]).flatten() for name in weights]).abs().mean())


@pytest.fixture(scope="module")
def single(folder: Path) -> Any:
    return train(folder, out="single", batch=8, micro_batch=4, arguments={"max_steps": 5})


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """Eight rows a step: 2 x 4 of one process, 2 x 2 x 2 of two; every fifth row has no image."""
    run_two(folder, out="two", batch=8, micro_batch=2, arguments={"max_steps": 5})
    return folder / "two"


def test_the_same_curve_as_one(folder: Path, single: Any, two: Path) -> None:
    close(logged(folder, "two"), [one[:3] for one in curve(single)])
    assert apart(folder / "single", folder / "two") < 1e-5
    last = complete_checkpoints(two)[-1]
    assert {"rng_state_0.pth", "rng_state_1.pth", "data_0.json", "data_1.json"} <= {one.name for one in last.iterdir()}


def test_one_goes_on_where_two_stopped(folder: Path, single: Any, two: Path) -> None:
    """Counts of both are taken over, and the order is the same."""
    shutil.copytree(two / "checkpoint-4", folder / "fewer" / "checkpoint-4")
    fewer = train(folder, out="fewer", resume=True, batch=8, micro_batch=4, arguments={"max_steps": 5})
    assert fewer.resumed_at == 4
    close([one[:3] for one in curve(fewer)], [one[:3] for one in curve(single)])
    assert fewer.broken.seen == single.broken.seen == 22 + 2 * 8


SHARDING = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["PhiDecoderLayer", "SiglipEncoderLayer"],
    "state_dict_type": "FULL_STATE_DICT",
}
FSDP = {"batch": 8, "micro_batch": 2, "arguments": {"max_steps": 5, "fsdp": True, "fsdp_config": SHARDING}}
LAUNCHER = str(ROOT / "tests" / "training" / "sharded.py")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # FSDP2 would take one


def test_fsdp(folder: Path, single: Any) -> None:
    """FSDP2: each holds a half; a disk that is full stops both, and a resumed run is where one process would be."""
    command = [LAUNCHER, "train", "--config", written(folder, out="fsdp", **FSDP)]
    out = folder / "fsdp"
    full = torchrun(folder, *command, FULL_DISK="checkpoint-4/pytorch_model_fsdp.bin", **NO_GPU)
    assert full.returncode != 0
    assert f"checkpoint of step 4: the disk of {out} is full" in full.stderr
    assert f"{out / 'checkpoint-2'} is the last complete one" in full.stderr
    assert [path.name for path in complete_checkpoints(out)] == ["checkpoint-2"]

    resumed = torchrun(folder, *command, "--resume", **NO_GPU)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"goes on from {out / 'checkpoint-2'}" in resumed.stdout
    close(logged(folder, "fsdp"), [one[:3] for one in curve(single)])
    assert apart(folder / "single", out) < 1e-5
    assert not (out / STAGING).exists()

    first, second = (json.loads((out / f"held-{i}.json").read_text()) for i in (0, 1))
    trained = sum(one.numel() for one in single.model.parameters() if one.requires_grad)
    whole = {"weights": single.model.num_parameters(), "gradients": trained, "moments": 2 * trained}
    for name, count in whole.items():
        (mine, of), (others, _) = first[name], second[name]
        assert mine + others == of == count
        assert 0.5 * count <= mine < 0.52 * count, name  # of an odd number of rows the first has one more

    with pytest.raises(
        ValueError, match=r"arguments\.fsdp: expected True, as in .*checkpoint-5, to resume it, got None"
    ):
        train(folder, out="fsdp", resume=True, batch=8, micro_batch=4, arguments={"max_steps": 7})


REFUSED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from flashsloth.cli import main
from tests.training.sharded import shard_on_cpus
codes = [main(["train", "--config", sys.argv[1]])]
shard_on_cpus()
codes.append(main(["train", "--config", sys.argv[2]]))
sys.exit(codes != [2, 2])
"""


def test_two_that_would_not_be_sharded_and_two_that_must_not(folder: Path) -> None:
    """On CPUs accelerate leaves weights whole; Muon needs them whole."""
    (folder / "refused.py").write_text(REFUSED)
    files = [written(folder, out="cpus", **FSDP), written(folder, out="muon", muon=0.02, **FSDP)]
    done = torchrun(folder, str(folder / "refused.py"), *files, **NO_GPU)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "flashsloth: arguments.fsdp: expected a process for each GPU, by torchrun" in done.stderr
    assert "as nothing is sharded elsewhere, got 2 on cpu" in done.stderr
    assert "flashsloth: muon: expected whole matrices, got FSDP or DeepSpeed, which shard them" in done.stderr
    assert not (folder / "cpus").exists()
    assert not (folder / "muon").exists()


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_one_that_would_not_be_sharded(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # accelerate sets it for all that follows
    real = command.training_arguments

    def asked(config: TrainConfig, world_size: int) -> Any:
        arguments = real(config, world_size)
        arguments.deepspeed = "zero.json" if name == "deepspeed" else None  # its package need not be here
        return arguments

    monkeypatch.setattr(command, "training_arguments", asked)
    said = rf"arguments\.{name}: expected a process for each GPU, by torchrun, .* got 1 on cpu"
    with pytest.raises(ValueError, match=said):
        train(folder, out=f"one-{name}", arguments={"fsdp": True} if name == "fsdp" else {})
    assert not (folder / f"one-{name}").exists()
