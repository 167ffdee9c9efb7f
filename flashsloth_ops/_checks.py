"""Argument checks (every message names the argument, what was expected and what came) and dtypes of the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsloth_ops.backend import FLOATS, short


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


def floating(name: str, value: object) -> Tensor:
    t = tensor(name, value)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: expected {', '.join(short(d) for d in FLOATS)}, got {short(t.dtype)}")
    return t


def like(name: str, value: object, first: Tensor, first_name: str) -> Tensor:
    """A tensor of the dtype and device of another."""
    t = tensor(name, value)
    if t.dtype != first.dtype:
        raise TypeError(f"{name}: expected {short(first.dtype)} as {first_name}, got {short(t.dtype)}")
    if t.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} as {first_name}, got {t.device}")
    return t


def integral(name: str, value: object) -> Tensor:
    t = tensor(name, value)
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {short(t.dtype)}")
    return t


def shape(name: str, value: Tensor, expected: tuple[int | str, ...], why: str = "") -> None:
    """Sizes must match; a string names a size that may be anything."""
    fits = value.dim() == len(expected)
    fits = fits and all(isinstance(e, str) or e == s for e, s in zip(expected, value.shape, strict=True))
    if not fits:
        wanted = ", ".join(str(e) for e in expected) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name}: expected shape ({wanted}){why}, got {tuple(value.shape)}")


def probability(name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value}")
    return float(value)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums, softmax and statistics are kept in: fp32, and fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, floating-point inputs in its dtype, as matrix products are; else unchanged."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if t is not None and t.dtype in narrow else t for t in tensors)
