"""What was measured on each kind of GPU: ``configs/<gpu>.json``, shipped with the package.

    {"gpu": "NVIDIA H200",
     "faster_in_cuda": ["spatial_pool"],                            ops whose CUDA C++ kernels beat Triton's
     "configs": {"pool_scores_kernel": {"bf16 D1152": {...}}}}      kernel -> key -> what to launch it with

A GPU without a file gets heuristics. ``FLASHSLOTH_AUTOTUNE=1`` searches instead, once a key, and keeps what it found
in the folder ``FLASHSLOTH_CONFIG_DIR`` (default ``~/.cache/flashsloth``), whose files come before the shipped ones.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "configs"


def faster_in_cuda(gpu: str) -> tuple[str, ...]:
    """Ops for which a check on this GPU recorded CUDA C++ kernels as faster than Triton's."""
    return tuple(table(gpu).get("faster_in_cuda", ()))


def config(gpu: str, kernel: str, key: str) -> dict[str, int] | None:
    """The tuned configuration of a kernel, if there is one."""
    return table(gpu).get("configs", {}).get(kernel, {}).get(key)


def keep(gpu: str, kernel: str, key: str, found: dict[str, int]) -> None:
    """Store a tuned configuration in the user's folder; where that cannot be written to, for this process only."""
    path = _own_folder() / file_name(gpu)
    own = _read(path)
    own.setdefault("gpu", gpu)
    own.setdefault("configs", {}).setdefault(kernel, {})[key] = found
    try:
        _write(path, own)
    except OSError as error:
        warnings.warn(f"tuned configurations are not kept: {error}; set FLASHSLOTH_CONFIG_DIR", stacklevel=2)
    table(gpu)["configs"].setdefault(kernel, {})[key] = found


def ship(gpu: str, faster: list[str]) -> Path:
    """Record in the package which ops' CUDA C++ kernels are the faster ones on a GPU; returns the file."""
    path = SHIPPED / file_name(gpu)
    shipped = {"gpu": gpu, "configs": {}, **_read(path), "faster_in_cuda": sorted(faster)}
    _write(path, shipped)
    return path


@functools.cache
def table(gpu: str) -> dict[str, Any]:
    """The shipped file of a GPU with the user's own on top."""
    merged = _read(SHIPPED / file_name(gpu))
    own = _read(_own_folder() / file_name(gpu))
    configs = {k: dict(v) for k, v in merged.get("configs", {}).items()}
    for kernel, found in own.get("configs", {}).items():
        configs.setdefault(kernel, {}).update(found)
    return {**merged, **own, "configs": configs}


def file_name(gpu: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def _own_folder() -> Path:
    return Path(os.environ.get("FLASHSLOTH_CONFIG_DIR") or Path.home() / ".cache" / "flashsloth")


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
    table.cache_clear()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected tuned configurations as JSON, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
