"""The one way kernels are launched: limits are checked before, and errors name the kernel and its configuration."""

from __future__ import annotations

import functools
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
_recorded_for: tuple[int, int] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a Triton kernel; ``options`` are its constants and num_warps, num_stages.

    An empty grid launches nothing. Raises BackendError for a grid beyond the limits of a GPU, before the launch, for
    tensors on a CPU outside the interpreter, and for whatever the compiler or the driver refuse.
    """
    if 0 in grid:
        return
    for axis, blocks in enumerate(grid):
        if blocks > MAX_GRID[axis]:
            raise BackendError(
                f"{kernel.__name__}: expected at most {MAX_GRID[axis]} blocks along grid axis {axis}, got {blocks}"
            )
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cpu" and not INTERPRETED:
        raise BackendError(f"{kernel.__name__}: expected CUDA tensors, or TRITON_INTERPRET=1 for CPU tensors")
    if INTERPRETED:
        _repair_interpreter()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            kernel[grid](*args, **options)
        except Exception as error:
            raise BackendError(f"{kernel.__name__}{list(grid)} with {options}: {error}") from error


@functools.cache
def _repair_interpreter() -> None:
    """Triton 3.6's interpreter reads the bounds of a loop with int(array of one element), which NumPy 2.4 refuses; and
    it patches the language anew at every call of a function inside a kernel, which is half of its time."""
    from triton.language import core
    from triton.runtime import interpreter

    patch, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor

    def patch_lang(function: Any) -> Any:
        languages = [v for v in function.__globals__.values() if v is interpreter.tl or v is core]
        if languages and not any(core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()  # the kernel around it did
        return patch(function)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang, interpreter._patch_lang_tensor = patch_lang, patch_lang_tensor


@contextmanager
def recording(capability: tuple[int, int] = (9, 0)) -> Iterator[list[Launch]]:
    """Collect launches instead of running them; the ops may then be called with tensors of the meta device.

    ``capability`` is that of the GPU they are meant for, on which configurations may depend.
    """
    global _recorded, _recorded_for
    before = _recorded, _recorded_for
    _recorded, _recorded_for = [], capability
    try:
        yield _recorded
    finally:
        _recorded, _recorded_for = before


def is_recording() -> bool:
    return _recorded is not None


class Gpu(NamedTuple):
    """What heuristics ask of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # the most shared memory that one block may have


def gpu(device: torch.device) -> Gpu:
    """The GPU of a tensor; where there is none, the usual one of the capability that is recorded for, or an H200."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return Gpu((properties.major, properties.minor), properties.multi_processor_count, shared)
    return _USUAL[_recorded_for or (9, 0)]


_USUAL = {
    (8, 0): Gpu((8, 0), 108, 163 * 1024),  # A100
    (9, 0): Gpu((9, 0), 132, 227 * 1024),  # H100, H200
    (10, 0): Gpu((10, 0), 148, 227 * 1024),  # B200
}


def num_sms(device: torch.device) -> int:
    """Multiprocessors of the GPU of a tensor, what split heuristics fill."""
    return gpu(device).multiprocessors
