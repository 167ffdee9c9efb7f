"""A checkpoint is there whole or not at all: interruptions, full disks, files that were cut short."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from flashsloth.tiny import random_model, tiny_config
from flashsloth.training import checkpoints, progress, trainer
from flashsloth.training.checkpoints import CheckpointError, complete_checkpoints, is_complete
from tests.training.cases import curve, prepare, train, weights


class Stopped(BaseException):
    """As a kill: nothing catches it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("run"), 12)


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[tuple[Any, ...]]:
    return curve(train(folder, out="whole"))


def names(out: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(out)]


def failing(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int, error: BaseException) -> None:
    """The function fails behind ``after`` calls."""
    real, calls = getattr(module, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


# Each checkpoint of this run writes 4 files with torch.save and 2 with write_json,
# and waits for 13 files and folders. The points are in the second checkpoint, that of step 4.
POINTS = [
    (torch, "save", 5, ["checkpoint-2"]),
    (torch, "save", 7, ["checkpoint-2"]),
    (trainer, "write_json", 2, ["checkpoint-2"]),
    (checkpoints, "sync", 15, ["checkpoint-2"]),
    (checkpoints, "finish", 1, ["checkpoint-2"]),
    (checkpoints, "keep_newest", 1, ["checkpoint-2", "checkpoint-4"]),
]


@pytest.mark.parametrize(("module", "name", "after", "left"), POINTS, ids=lambda value: str(value)[:20])
def test_an_interrupted_checkpoint_is_none(
    folder: Path,
    whole: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    module: Any,
    name: str,
    after: int,
    left: list[str],
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, module, name, after, Stopped())
        with pytest.raises(Stopped):
            train(folder, out=str(out))
    assert names(out) == left
    resumed = train(folder, out=str(out), resume=True)
    assert resumed.resumed_at == int(left[-1].split("-")[1])
    assert curve(resumed) == whole
    assert names(out) == ["checkpoint-4", "checkpoint-6"]
    assert not (out / checkpoints.STAGING).exists()


def test_a_kill_before_the_first_checkpoint_starts_again(
    folder: Path, whole: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, torch, "save", 0, Stopped())
        with pytest.raises(Stopped):
            train(folder, out=str(out))
    assert names(out) == []
    assert curve(train(folder, out=str(out), resume=True)) == whole


def test_only_the_newest_are_kept_and_an_old_one_goes_last(folder: Path, whole: list[Any]) -> None:
    out = folder / "whole"
    assert names(out) == ["checkpoint-4", "checkpoint-6"]  # two, by default
    assert not (out / "checkpoint-2").exists()


@pytest.mark.parametrize("damage", ["cut", "gone", "no list", "list cut"])
def test_a_damaged_checkpoint_is_none(folder: Path, whole: list[Any], tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "whole", out)
    (out / "config.json").unlink()
    newest = out / "checkpoint-6"
    assert is_complete(newest)
    if damage == "cut":
        os.truncate(newest / "optimizer.pt", 100)
    elif damage == "gone":
        (newest / "model.safetensors").unlink()
    elif damage == "no list":
        (newest / checkpoints.MANIFEST).unlink()
    else:
        os.truncate(newest / checkpoints.MANIFEST, 20)
    assert names(out) == ["checkpoint-4"]
    resumed = train(folder, out=str(out), resume=True)
    assert resumed.resumed_at == 4
    assert curve(resumed) == whole
    assert names(out) == ["checkpoint-4", "checkpoint-6"]  # the damaged one was replaced


@pytest.mark.parametrize(
    ("module", "name", "after", "error"),
    [
        (torch, "save", 5, OSError(errno.ENOSPC, "No space left on device")),
        (torch, "save", 5, RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        (checkpoints, "sync", 15, OSError(errno.EDQUOT, "Disk quota exceeded")),
    ],
    ids=["said", "hidden", "at the end"],
)
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(
    folder: Path,
    whole: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    module: Any,
    name: str,
    after: int,
    error: Exception,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, module, name, after, error)
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        message = r"checkpoint of step 4: the disk of .* is full \(0 MiB left\); .*checkpoint-2 is the last complete"
        with pytest.raises(CheckpointError, match=message):
            train(folder, out=str(out))
    assert names(out) == ["checkpoint-2"]
    assert not (out / checkpoints.STAGING).exists()
    assert curve(train(folder, out=str(out), resume=True)) == whole


def test_a_disk_too_full_for_a_line_of_the_log(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, progress, "line", 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"the disk of .* is full"):
        train(folder, out=str(tmp_path / "out"))


def test_another_failure_is_no_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, torch, "save", 5, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(PermissionError):
        train(folder, out=str(tmp_path / "out"))
    assert names(tmp_path / "out") == ["checkpoint-2"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip("a file system of its own needs the right to mount one")
        mounted.append(place)
        return place

    yield mount
    for one in mounted:
        subprocess.run(["umount", str(one)], check=True)


def test_a_disk_that_is_really_full(
    folder: Path, whole: list[Any], small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """Room for one checkpoint and a half; with more room the run goes on."""
    size = sum(path.stat().st_size for path in (folder / "whole" / "checkpoint-6").iterdir())
    disk = small_disk(int(size * 1.5) // 1024)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 4: the disk of .* is full"):
        train(folder, out=str(disk / "out"))
    assert names(disk / "out") == ["checkpoint-2"]
    shutil.copytree(disk / "out", tmp_path / "more")
    assert curve(train(folder, out=str(tmp_path / "more"), resume=True)) == whole


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    model.save_pretrained(tmp_path / "one")
    other = random_model(tiny_config(), seed=1)
    checkpoints.load_weights(other, tmp_path / "one")
    assert all(torch.equal(weights(model)[name], tensor) for name, tensor in weights(other).items())
    with pytest.raises(CheckpointError, match="expected exactly the weights of the model"):
        checkpoints.load_weights(random_model(tiny_config(text={"num_hidden_layers": 2})), tmp_path / "one")
    with pytest.raises(CheckpointError, match=r"one: embedded_query\.\S+: expected \(24,.*, got \(16,"):
        checkpoints.load_weights(random_model(tiny_config(query_dim=24)), tmp_path / "one")


def test_tied_weights_are_restored(tmp_path: Path) -> None:
    text = {"model_type": "phi", "tie_word_embeddings": True}
    model = random_model(tiny_config(text=text))
    model.save_pretrained(tmp_path / "one")
    other = random_model(tiny_config(text=text), seed=1)
    checkpoints.load_weights(other, tmp_path / "one")
    assert torch.equal(other.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_what_must_not_change(folder: Path, whole: list[Any]) -> None:
    """A run that resumes with other settings would be another run under the old name."""
    for changes, message in [
        ({"seed": 5}, "seed: expected 0, as in"),
        ({"stage": 1}, "arguments.learning_rate|stage: expected 2|batch|captions"),
        ({"arguments": {"weight_decay": 0.5}}, r"arguments\.weight_decay: expected 0\.0, as in"),
        ({"data": [{"records": "data/train.json", "repeat": 2}]}, "data: expected the number of records"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(folder, out="whole", resume=True, **changes)
    trained = train(folder, out="whole", resume=True, micro_batch=1)  # how a step is made up may
    assert trained.state.global_step == 6
    with pytest.raises(ValueError, match="out: expected a directory without a run"):
        train(folder, out="whole")


def test_the_manifest_lists_every_file(folder: Path, whole: list[Any]) -> None:
    checkpoint = folder / "whole" / "checkpoint-6"
    listed = json.loads((checkpoint / checkpoints.MANIFEST).read_text())["files"]
    assert sorted(listed) == sorted(path.name for path in checkpoint.iterdir() if path.name != checkpoints.MANIFEST)
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "data_0.json", "run.json"} <= set(listed)
