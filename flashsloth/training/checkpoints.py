"""Checkpoints of a run: written beside their place and moved there when they are whole and on the disk."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from flashsloth.checkpoint import official_name, read_tensors
from flashsloth.files import sync

STAGING = ".partial"  # no name that is ever looked for
MANIFEST = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LITTLE = 16 * 2**20  # bytes left on a disk that is called full where a library does not say why writing failed


class CheckpointError(OSError):
    """A checkpoint could not be written or read."""


def finish(staged: Path, target: Path) -> None:
    """Make ``staged`` the checkpoint ``target``: list its files, wait for the disk, move it.

    A power cut at any moment leaves ``target`` as it was or as it shall be.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    listed = {str(path.relative_to(staged)): path.stat().st_size for path in files}
    (staged / MANIFEST).write_text(json.dumps({"files": listed}, indent=1))
    for path in [*files, staged / MANIFEST, *(path for path in staged.rglob("*") if path.is_dir()), staged]:
        sync(path)
    if target.exists():  # of the same step, and not whole, or a resumed run would have begun with it
        aside = staged.with_name(f"{target.name}.old")
        os.replace(target, aside)
        os.replace(staged, target)
        shutil.rmtree(aside)
    else:
        os.replace(staged, target)
    sync(target.parent)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file is there in its full size."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in listed.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def step_of(checkpoint: Path) -> int:
    """The step behind which a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint}: expected a directory checkpoint-N, got another name")
    return int(match[1])


def complete_checkpoints(out: Path) -> list[Path]:
    """Those in ``out``, the newest last."""
    found = []
    for path in out.iterdir() if out.is_dir() else ():
        if _NAME.fullmatch(path.name) and is_complete(path):
            found.append(path)
    return sorted(found, key=step_of)


def any_checkpoint(out: Path) -> bool:
    """Whether ``out`` has one, complete or not."""
    return out.is_dir() and any(_NAME.fullmatch(path.name) for path in out.iterdir())


def keep_newest(out: Path, limit: int | None) -> None:
    """Delete all but the newest ``limit`` complete checkpoints; None keeps all."""
    if limit is None or limit < 1:
        return
    for path in complete_checkpoints(out)[:-limit]:
        (path / MANIFEST).unlink()  # a half deleted one is none
        shutil.rmtree(path, ignore_errors=True)


def fail(error: Exception, out: Path, what: str) -> NoReturn:
    """Raise what happened while ``what`` was written to ``out``: one line where the disk is full, else ``error``."""
    # Libraries wrap what the system said, or drop it.
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    codes = [getattr(one, "errno", None) for one in chain]
    said = "no space left" in str(error).lower() or "os error 28" in str(error).lower()
    free = shutil.disk_usage(out).free
    if not (any(code in _FULL for code in codes) or said or free < _LITTLE):
        raise error
    last = complete_checkpoints(out)
    kept = f"{last[-1]} is the last complete one, and --resume goes on from it" if last else "there is no earlier one"
    raise CheckpointError(f"{what}: the disk of {out} is full ({free / 2**20:.0f} MiB left); {kept}") from error


def read_json(path: Path) -> Any:
    """Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected JSON of a checkpoint: {error}") from error


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Fill ``model``, and fail on any name or shape that does not fit. Raises CheckpointError, ValueError."""
    found = {official_name(name): tensor for name, tensor in read_tensors(checkpoint).items()}
    own = {official_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    filled = {tensor.data_ptr() for key, (_, tensor) in own.items() if key in found}
    missing = [name for key, (name, tensor) in own.items() if key not in found and tensor.data_ptr() not in filled]
    unexpected = sorted(found.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{checkpoint}: expected exactly the weights of the model; missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}"
        )
    for key, tensor in found.items():
        name, target = own[key]
        if tensor.shape != target.shape:
            raise CheckpointError(f"{checkpoint}: {name}: expected {tuple(target.shape)}, got {tuple(tensor.shape)}")
    with torch.no_grad():
        for key, tensor in found.items():
            own[key][1].copy_(tensor)
