"""Registers an op once a backend: ``torch.ops.flashsloth.<op>`` and its overloads ``.triton`` and ``.cuda``.

The overload is the backend. All share one schema, one fake and one autograd formula:

========== ============================================ ===============================================
overload   kernels                                      where
========== ============================================ ===============================================
default    ``csrc/cpu`` on CPUs, the reference elsewhere ``csrc/bindings``, and ``plain`` below
triton     ``flashsloth_ops/triton/<column>.py``        the function there that has the name of the op
cuda       ``csrc/cuda``                                ``csrc/bindings``
========== ============================================ ===============================================

So a choice made when an op is called also holds in its backward, on another thread, and in a compiled graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from flashsloth_ops import backend

OVERLOADS = ("default", "triton", "cuda")


def define(
    column: str,
    op: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    plain: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    overloads: tuple[str, ...] = OVERLOADS,
) -> None:
    """Define an op of one column. ``backward`` finds the overload that was called in ``ctx.overload``."""
    for overload in overloads:
        name = f"flashsloth::{op}" if overload == "default" else f"flashsloth::{op}.{overload}"
        torch.library.define(name, schema)
        torch.library.register_fake(name, fake)
        if backward is not None:
            torch.library.register_autograd(name, backward, setup_context=_remember(overload, setup_context))
        if overload == "default":
            # Compiled kernels override this on their devices; elsewhere, and without the extension, it still works.
            torch.library.impl(name, "CompositeExplicitAutograd", plain)
        if overload == "triton":
            for device in ("CUDA", "CPU"):  # on CPUs under Triton's interpreter
                torch.library.impl(name, device, _triton(column, op))


def kernel(op: str, chosen: str) -> Any:
    """The overload of ``op`` with the kernels of a backend."""
    packet = getattr(torch.ops.flashsloth, op)
    return getattr(packet, chosen if chosen in OVERLOADS else "default")


def backward_kernel(op: str, overload: str, device: str) -> Any:
    """The overload that computes the gradients of a forward overload: CUDA C++ has none, Triton's serve there."""
    if overload == "cuda":
        overload = "triton" if backend.triton_missing(device) is None else "default"
    return kernel(op, overload)


def _remember(overload: str, setup_context: Callable[..., None] | None) -> Callable[..., None]:
    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.overload = overload
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    return setup


def _triton(column: str, op: str) -> Callable[..., Any]:
    """Imports Triton at the first call, so that importing the package does not wait for it."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"flashsloth_ops.triton.{column}"), op)(*args)

    return call
