"""The one way kernels are launched: limits are checked before, and errors name the kernel and its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsloth_ops.backend import INTERPRETED, BackendError

MAX_GRID = (2**31 - 1, 65535, 65535)


class Launch(NamedTuple):
    """A launch as it was asked for: what ahead-of-time compilation needs to know."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a Triton kernel; ``options`` are its constants and num_warps, num_stages.

    An empty grid launches nothing. Raises BackendError for a grid beyond the limits of a GPU, before the launch, for
    tensors on a CPU outside the interpreter, and for whatever the compiler or the driver refuse.
    """
    for axis, (blocks, limit) in enumerate(zip(grid, MAX_GRID, strict=False)):
        if blocks > limit:
            raise BackendError(
                f"{kernel.__name__}: expected at most {limit} blocks along grid axis {axis}, got {blocks}"
            )
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cpu" and not INTERPRETED:
        raise BackendError(f"{kernel.__name__}: expected CUDA tensors, or TRITON_INTERPRET=1 for CPU tensors")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            kernel[grid](*args, **options)
        except Exception as error:
            raise BackendError(f"{kernel.__name__}{list(grid)} with {options}: {error}") from error


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; the ops may then be called with tensors of the meta device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def is_recording() -> bool:
    return _recorded is not None


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU, what split heuristics fill; those of an H200 where there is no GPU to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
