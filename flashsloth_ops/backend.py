"""Which backend serves which call, and why the others do not.

One table, :data:`RULES`, in order of preference. Dispatch reads it through :func:`select`,
``python -m flashsloth_ops env`` prints it, and errors quote it.

    with flashsloth_ops.use_backend("reference"):
        ...                                    # or FLASHSLOTH_BACKEND=reference in the environment

A forced backend that cannot serve a call raises :class:`BackendError`. An automatic choice takes the first rule
that fits; when that is not the one meant for the device, it warns once and says why. On a GPU it takes CUDA C++ kernels
where a check on such a GPU recorded them as faster (:mod:`flashsloth_ops.measured`), and Triton's otherwise.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsloth_ops import _extension, measured

OPS = ("spatial_pool", "embedded_query", "sparse_prefill")
BACKENDS = ("cpu", "cuda", "triton", "reference")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NARROW = FLOATS[:3]
HALVES = FLOATS[1:3]


class BackendError(RuntimeError):
    """A backend cannot serve this call, or a kernel of it could not be launched."""


@dataclass(frozen=True)
class Rule:
    """A backend serves an op on some devices, dtypes and sizes."""

    op: str
    backend: str
    devices: tuple[str, ...] | None  # None: every device
    dtypes: tuple[torch.dtype, ...]
    missing: Callable[[str], str | None] = lambda device: None  # why this installation or GPU has it not
    max_head_dim: int | None = None
    head_dims: tuple[int, ...] | None = None
    max_batch: int | None = None
    widths_divide_by: int = 1

    def why_not(
        self, device: str, dtype: torch.dtype, *, head_dim: int = 0, batch: int = 0, widths: tuple[int, ...] = ()
    ) -> str | None:
        """Why this rule does not serve such a call; None when it does."""
        if self.devices is not None and device not in self.devices:
            return self.missing(device) or f"serves {' and '.join(self.devices)} tensors, got {device}"
        if dtype not in self.dtypes:
            return f"serves {', '.join(short(d) for d in self.dtypes)}, got {short(dtype)}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"serves head sizes to {self.max_head_dim}, got {head_dim}"
        if self.head_dims is not None and head_dim not in self.head_dims:
            return f"serves head sizes {' and '.join(map(str, self.head_dims))}, got {head_dim}"
        if self.max_batch is not None and batch > self.max_batch:
            return f"serves batches to {self.max_batch}, got {batch}"
        if any(width % self.widths_divide_by for width in widths):
            return f"serves widths that divide by {self.widths_divide_by}, got {', '.join(map(str, widths))}"
        return self.missing(device)

    def limits(self) -> str:
        """What it serves beyond devices and dtypes, for the table."""
        found = []
        if self.head_dims is not None:
            found.append(f"head sizes {' and '.join(map(str, self.head_dims))}")
        if self.max_head_dim is not None:
            found.append(f"head size to {self.max_head_dim}")
        if self.max_batch is not None:
            found.append(f"batch to {self.max_batch}")
        if self.widths_divide_by > 1:
            found.append(f"widths that divide by {self.widths_divide_by}")
        return ", ".join(found)


def extension_missing(device: str) -> str | None:
    return None if _extension.module is not None else f"the extension is {_extension.error}"


def triton_missing(device: str) -> str | None:
    """Why Triton's kernels cannot run on tensors of a device. On CPUs they run under its interpreter."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device == "cpu" and not INTERPRETED:
        return "serves cpu tensors with TRITON_INTERPRET=1 only"
    return None


def cuda_missing(device: str) -> str | None:
    if device == "cpu":
        return None if _extension.emulated else "serves cuda tensors, got cpu"
    return _extension.cuda_missing()


def hopper_missing(device: str) -> str | None:
    """As :func:`cuda_missing`, for kernels that need wgmma."""
    reason = cuda_missing(device)
    if reason is None and device == "cuda" and torch.cuda.is_available():
        major, minor = gpu()[0]
        if (major, minor) != (9, 0):
            reason = f"serves GPUs of compute capability 9.0, got {major}.{minor}"
    return reason


HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton reads it when a kernel is defined

RULES: tuple[Rule, ...] = (
    Rule("spatial_pool", "cpu", ("cpu",), FLOATS, extension_missing),
    Rule("embedded_query", "cpu", ("cpu",), FLOATS, extension_missing),
    Rule("sparse_prefill", "cpu", ("cpu",), FLOATS, extension_missing, max_head_dim=256),
    Rule("spatial_pool", "cuda", ("cuda", "cpu"), HALVES, cuda_missing, max_batch=8),
    Rule(
        "embedded_query",
        "cuda",
        ("cuda", "cpu"),
        HALVES,
        cuda_missing,
        max_head_dim=128,
        max_batch=8,
        widths_divide_by=8,
    ),
    Rule("sparse_prefill", "cuda", ("cuda", "cpu"), HALVES, hopper_missing, head_dims=(72, 80)),
    Rule("spatial_pool", "triton", ("cuda", "cpu"), NARROW, triton_missing),
    Rule("embedded_query", "triton", ("cuda", "cpu"), NARROW, triton_missing),
    Rule("sparse_prefill", "triton", ("cuda", "cpu"), NARROW, triton_missing, max_head_dim=256),
    *(Rule(op, "reference", None, FLOATS) for op in OPS),
)


@torch.compiler.assume_constant_result
def gpu(index: int | None = None) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Compute capability of a GPU, and the ops whose CUDA kernels a check there recorded as the faster ones."""
    return torch.cuda.get_device_capability(index), measured.faster_in_cuda(torch.cuda.get_device_name(index))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# Thread-local rather than a ContextVar, because torch.compile traces and guards the former only.
_local = threading.local()
_environment = os.environ.get("FLASHSLOTH_BACKEND") or None
if _environment is not None:
    _checked(_environment, "FLASHSLOTH_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op called in this thread inside the ``with`` block.

    Raises ValueError for an unknown name; a call it cannot serve raises :class:`BackendError`.
    """
    before = getattr(_local, "forced", None)
    _local.forced = _checked(name, "backend")
    try:
        yield
    finally:
        _local.forced = before


def select(op: str, tensor: Tensor, *, head_dim: int = 0, batch: int = 0, widths: tuple[int, ...] = ()) -> str:
    """The backend that serves ``op`` on tensors like this one."""
    device, dtype = tensor.device.type, tensor.dtype
    forced = getattr(_local, "forced", None) or _environment
    reasons: list[str] = []
    for rule in RULES:
        if rule.op != op or (forced is not None and rule.backend != forced):
            continue
        reason = rule.why_not(device, dtype, head_dim=head_dim, batch=batch, widths=widths)
        if reason is None and forced is None:
            reason = _only_when_forced(rule, tensor)
        if reason is None:
            slow = rule.backend == "reference" and forced is None and device != "meta"
            if slow and not torch.compiler.is_compiling():
                _warn_once(f"{op}: the reference backend (plain PyTorch) serves this call; {'; '.join(reasons)}")
            return rule.backend
        reasons.append(f"{rule.backend}: {reason}")
    wanted = f"backend {forced!r} was forced and cannot serve it" if forced else "no backend serves it"
    raise BackendError(f"{op} on {device} in {short(dtype)}: {wanted}: {'; '.join(reasons)}")


def _only_when_forced(rule: Rule, tensor: Tensor) -> str | None:
    """Why an automatic choice passes over a backend that could serve a call."""
    if rule.backend in ("cuda", "triton") and tensor.device.type == "cpu":
        return "on CPUs for tests, when forced"
    if rule.backend == "cuda" and rule.op not in gpu(tensor.device.index)[1]:
        # Which of two kernels is faster is a fact about a GPU, known where it was measured.
        return "not recorded as faster on this GPU; force it to use it"
    return None


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


logger = logging.getLogger("flashsloth_ops")
LOGGING = os.environ.get("FLASHSLOTH_LOG", "0") not in ("", "0")
if LOGGING:
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    logger.handlers[-1].setFormatter(logging.Formatter("%(name)s %(message)s"))


def log_call(op: str, backend: str, **tensors: Tensor | None) -> None:
    """With FLASHSLOTH_LOG=1, one line a call: shapes, dtypes and the backend chosen."""
    if LOGGING and not torch.compiler.is_compiling():
        shapes = " ".join(f"{name}={short(t.dtype)}{list(t.shape)}" for name, t in tensors.items() if t is not None)
        logger.info("%s backend=%s %s", op, backend, shapes)
