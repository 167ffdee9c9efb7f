"""Memory of a call: the most it holds while it runs, and what autograd keeps between forward and backward."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.case import Case, Inputs, Provider, prepared, with_leaves


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Most bytes above what was in use before the call.

    On a GPU as its allocator counts. On a CPU the growth of the resident set to its high-water mark, which counts whole
    pages and buffers of libraries too; None where the system does not tell (it is read from Linux's /proc).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
        resident = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - resident)
    except OSError:
        return None


def _give_back() -> None:
    """Return freed memory to the system, or a call would be served from pages that are resident already."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status. Raises OSError where there is none."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found.group(1)) << 10


def kept_bytes(case: Case, provider: Provider, inputs: Inputs) -> int:
    """Bytes of the tensors autograd keeps between forward and backward, without the inputs. Storage counts once."""
    inputs, _ = with_leaves(inputs, case.differentiable)
    given = {t.untyped_storage().data_ptr() for value in inputs.values() for t in _tensors(value)}
    kept: list[Tensor] = []  # holds them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = provider.run(prepared(provider, inputs))
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del outputs
    return sum(size for address, size in sizes.items() if address not in given)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []
