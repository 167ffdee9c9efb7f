"""Which backend serves which call, and why the others do not.

One table, :data:`RULES`, in order of preference. Dispatch reads it through :func:`select`,
``python -m flashsloth_ops env`` prints it, and errors quote it.

    with flashsloth_ops.use_backend("reference"):
        ...                                    # or FLASHSLOTH_BACKEND=reference in the environment

A forced backend that cannot serve a call raises :class:`BackendError`. An automatic choice takes the first rule
that fits; when that is not the one meant for the device, it warns once and says why.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsloth_ops import _extension

OPS = ("spatial_pool", "embedded_query", "sparse_prefill")
BACKENDS = ("cpu", "reference")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BackendError(RuntimeError):
    """A forced backend cannot serve this call."""


@dataclass(frozen=True)
class Rule:
    """A backend serves an op on some devices, dtypes and sizes."""

    op: str
    backend: str
    devices: tuple[str, ...] | None  # None: every device
    dtypes: tuple[torch.dtype, ...]
    missing: Callable[[], str | None] = lambda: None  # why the backend is absent from this installation
    max_head_dim: int | None = None

    def why_not(self, device: str, dtype: torch.dtype, head_dim: int = 0) -> str | None:
        """Why this rule does not serve such a call; None when it does."""
        if self.devices is not None and device not in self.devices:
            return f"serves {' and '.join(self.devices)} tensors, got {device}"
        if dtype not in self.dtypes:
            return f"serves {', '.join(short(d) for d in self.dtypes)}, got {short(dtype)}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"serves head sizes to {self.max_head_dim}, got {head_dim}"
        return self.missing()


def _extension_missing() -> str | None:
    return None if _extension.module is not None else f"the extension is {_extension.error}"


RULES: tuple[Rule, ...] = (
    Rule("spatial_pool", "cpu", ("cpu",), FLOATS, _extension_missing),
    Rule("embedded_query", "cpu", ("cpu",), FLOATS, _extension_missing),
    Rule("sparse_prefill", "cpu", ("cpu",), FLOATS, _extension_missing, max_head_dim=256),
    *(Rule(op, "reference", None, FLOATS) for op in OPS),
)


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


def select(op: str, tensor: Tensor, head_dim: int = 0) -> str:
    """The backend that serves ``op`` on tensors like this one."""
    device, dtype = tensor.device.type, tensor.dtype
    forced = getattr(_local, "forced", None) or _environment
    reasons: list[str] = []
    for rule in RULES:
        if rule.op != op or (forced is not None and rule.backend != forced):
            continue
        reason = rule.why_not(device, dtype, head_dim)
        if reason is None:
            slow = rule.backend == "reference" and forced is None and device != "meta"
            if slow and not torch.compiler.is_compiling():
                _warn_once(f"{op}: the reference backend (plain PyTorch) serves this call; {'; '.join(reasons)}")
            return rule.backend
        reasons.append(f"{rule.backend}: {reason}")
    wanted = f"backend {forced!r} was forced and cannot serve it" if forced else "no backend serves it"
    raise BackendError(f"{op} on {device} in {short(dtype)}: {wanted}: {'; '.join(reasons)}")


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
