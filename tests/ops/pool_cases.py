"""What the tests of spatial_attention_pool share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.support import (
    TRITON,
    Place,
    needs_extension,
)


def make(
    tokens: tuple[int, ...], dim: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """x, w1, b1, w2, b2 with scores of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return [
        normal(*tokens, dim),
        normal(hidden, dim, scale=max(dim, 1) ** -0.5),
        normal(hidden, scale=0.3),
        normal(1, hidden, scale=3 * max(hidden, 1) ** -0.5),
        normal(1),
    ]


KERNELS = (pytest.param(Place("cpu"), marks=needs_extension, id="cpu"), *TRITON)  # all that is not the reference


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Dropout draws this seed, on every device."""
    with mock.patch("torch.randint", lambda *_, device, **__: torch.tensor([seed], device=device)):
        yield


def overload(place: Place, op: str = "spatial_pool") -> Any:
    """The op with the kernels of a place, below the public function."""
    return getattr(getattr(torch.ops.flashsloth, op), "default" if place.backend == "cpu" else place.backend)
