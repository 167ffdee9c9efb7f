"""spatial_attention_pool: errors name the argument, what was expected, what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from flashsloth_ops import spatial_attention_pool
from tests.ops.pool_cases import make
from tests.support import (
    needs_extension,
)

X, W1, B1, W2, B2 = make((2, 20), 8, 16)
GRID = {"grid": (5, 4)}


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (("x", W1, B1, W2, B2), GRID, TypeError, "x: expected a tensor, got str"),
        ((X.int(), W1, B1, W2, B2), GRID, TypeError, "x: expected float32, bfloat16, float16, float64, got int32"),
        ((X[0, 0], W1, B1, W2, B2), GRID, ValueError, "x: expected (B, H*W, D) or packed (T, D), got (8,)"),
        ((X, W1.double(), B1, W2, B2), GRID, TypeError, "w1: expected float32 as x, got float64"),
        ((X, W1, B1.to("meta"), W2, B2), GRID, ValueError, "b1: expected device cpu as x, got meta"),
        ((X, W1[:, 1:], B1, W2, B2), GRID, ValueError, "w1: expected shape (Dh, 8) with the D of x, got (16, 7)"),
        ((X, W1, B1[1:], W2, B2), GRID, ValueError, "b1: expected shape (16,), got (15,)"),
        ((X, W1, B1, W2[:, 1:], B2), GRID, ValueError, "w2: expected shape (1, 16), got (1, 15)"),
        ((X, W1, B1, W2[0, 1:], B2), GRID, ValueError, "w2: expected shape (16,), got (15,)"),
        ((X, W1, B1, W2, B2[0]), GRID, ValueError, "b2: expected shape (1,), got ()"),
        ((X, W1, B1, W2, B2), {"grid": (5, 5)}, ValueError, "x: expected 25 tokens for grid (5, 5), got 20"),
        ((X, W1, B1, W2, B2), {"grid": (-5, -4)}, ValueError, "grid: expected sides of 0 or more, got (-5, -4)"),
        ((X, W1, B1, W2, B2), {"grid": 20}, TypeError, "grid: expected (H, W), or an int tensor (B, 2)"),
        ((X[0], W1, B1, W2, B2), GRID, ValueError, "x: expected (B, 20, D) for grid (5, 4), got (20, 8)"),
        (
            (X, W1, B1, W2, B2),
            {**GRID, "window": 0},
            ValueError,
            "window: expected a positive int or two of them, got 0",
        ),
        ((X, W1, B1, W2, B2), {**GRID, "window": (3, 3, 3)}, ValueError, "window: expected a positive int or two"),
        ((X, W1, B1, W2, B2), {**GRID, "window": 2.5}, ValueError, "window: expected a positive int or two of them"),
        (
            (X, W1, B1, W2, B2),
            {**GRID, "dropout_p": 1.0, "training": True},
            ValueError,
            "dropout_p: expected a probability in [0, 1), got 1.0",
        ),
        (
            (X, W1, B1, W2, B2),
            {"grid": torch.tensor([[5, 4]])},
            ValueError,
            "x: expected packed (T, D) for a grid tensor",
        ),
        ((X[0], W1, B1, W2, B2), {"grid": torch.tensor([5, 4])}, ValueError, "grid: expected shape (B, 2), got (2,)"),
        ((X[0], W1, B1, W2, B2), {"grid": torch.tensor([[5.0, 4.0]])}, TypeError, "grid: expected an integer tensor"),
        (
            (X[0], W1, B1, W2, B2),
            {"grid": torch.tensor([[5, 4], [1, 1]])},
            ValueError,
            "grid: expected sizes with 20 tokens in all as x has, got 21",
        ),
        (
            (X[0], W1, B1, W2, B2),
            {"grid": torch.tensor([[-5, -4]])},
            ValueError,
            "grid: expected sides of 0 or more, got [[-5, -4]]",
        ),
        (
            (X[0], W1, B1, W2, B2),
            {"grid": torch.tensor([[5, 4]]), "num_windows": 9},
            ValueError,
            "num_windows: expected 4 for this grid, got 9",
        ),
    ],
)
def test_errors(args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        spatial_attention_pool(*args, **options)


@needs_extension
def test_raw_ops_refuse_what_would_be_read_out_of_bounds() -> None:
    """Even called below the checks of the public function."""
    x, w1, b1, w2, b2 = make((22,), 8, 16)
    good: dict[str, Any] = {"x": x, "w1": w1, "b1": b1, "w2": w2[0], "b2": b2, "grids": torch.tensor([[4, 3], [2, 5]])}
    rest = (0, 0, 4, 3, 3, 0.0, None, True)
    forward, backward = torch.ops.flashsloth.spatial_pool, torch.ops.flashsloth.spatial_pool_backward
    y, weights, mask = forward(*good.values(), *rest)
    for name, value in {
        "grids": torch.tensor([[4, 3], [200, 5]]), "grids ": torch.tensor([[-4, 3], [2, 5]]), "w1": w1[:, 1:],
        "b1": b1[1:], "w2": w2[0].double(), "x": x[None], "b2": b2[:0],
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError, match=f"spatial_pool: .*{name.strip()}.*: expected"):
            forward(*{**good, name.strip(): value}.values(), *rest)
    with pytest.raises(RuntimeError, match="num_windows: expected 4 in all for these grids, got 5"):
        forward(*good.values(), 0, 0, 5, 3, 3, 0.0, None, True)
    with pytest.raises(RuntimeError, match="seed: expected one int64 with dropout"):
        forward(*good.values(), 0, 0, 4, 3, 3, 0.5, None, True)
    inputs = (x, w1, b1, w2[0])
    geometry = (good["grids"], 0, 0, 3, 3, 0.0, True, True)
    for dy, saved, bits, name in (
        (y[1:], weights, mask, "dy"),
        (y, weights[1:], mask, "weights"),
        (y, weights, mask[:0], "mask"),
    ):
        with pytest.raises(RuntimeError, match=f"spatial_pool: {name}.*: expected"):
            backward(dy, None, *inputs, saved, bits, *geometry)
