"""A run that is killed by the system, in another process, continues where its last checkpoint was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from flashsloth.training.checkpoints import STAGING, complete_checkpoints
from tests.support import ROOT
from tests.training.cases import curve, prepare, train

# Runs a tiny training and kills itself: `call` counts the calls of `name` in `module`.
KILLED = """
import importlib, os, signal, sys
from pathlib import Path
from tests.training.cases import train
module, name, after, folder = sys.argv[1:]
module = importlib.import_module(module)
*outer, last = name.split(".")
for part in outer:
    module = getattr(module, part)
real, calls = getattr(module, last), []
def wrapped(*args, **kwargs):
    calls.append(1)
    if len(calls) > int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(module, last, wrapped)
train(Path(folder), out="killed")
"""


@pytest.mark.parametrize(
    ("module", "name", "after", "last"),
    [
        ("flashsloth.training.trainer", "FlashSlothTrainer.training_step", 7, "checkpoint-2"),  # within step 4
        ("torch", "save", 5, "checkpoint-2"),  # within the checkpoint of step 4
    ],
    ids=["in a step", "in a checkpoint"],
)
def test_killed_and_resumed(tmp_path: Path, module: str, name: str, after: int, last: str) -> None:
    prepare(tmp_path)
    whole = curve(train(tmp_path, out="whole"))
    command = [sys.executable, "-c", KILLED, module, name, str(after), str(tmp_path)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    out = tmp_path / "killed"
    assert [one.name for one in complete_checkpoints(out)] == [last]
    assert not (out / "config.json").exists()
    resumed = train(tmp_path, out="killed", resume=True)
    assert resumed.resumed_at == 2
    assert curve(resumed) == whole
    assert not (out / STAGING).exists()
