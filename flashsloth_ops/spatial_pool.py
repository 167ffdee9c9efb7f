"""Spatial attention pooling: a learned softmax over each window of a token grid (729 vision tokens to 81)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashsloth_ops import _checks as check
from flashsloth_ops import _library as library
from flashsloth_ops import backend
from flashsloth_ops.reference import spatial_pool as reference


def spatial_attention_pool(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    grid: tuple[int, int] | Tensor,
    window: int | tuple[int, int] = 3,
    dropout_p: float = 0.0,
    training: bool = False,
    return_weights: bool = False,
    num_windows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pool each window of a token grid by a softmax over learned scores (arXiv 2412.04317, "SAP").

        s_n = w2 . dropout(relu(w1 x_n + b1)) + b2      one score a token
        a   = softmax of s within a window              windows at an edge are smaller
        y   = sum_n a_n x_n                             over the window's own, un-projected tokens

    Args:
        x: ``(B, H*W, D)``, or packed images of different sizes ``(T, D)``; fp32, bf16, fp16 (fp64 for checks).
        w1, b1: ``(Dh, D)`` and ``(Dh,)``, dtype and device of x, like w2 and b2.
        w2, b2: ``(1, Dh)`` or ``(Dh,)``, and ``(1,)``.
        grid: ``(H, W)``; for packed x an int tensor ``(B, 2)`` whose products sum to T.
        window: side of a window in tokens, or ``(ph, pw)``.
        dropout_p: probability of dropping a hidden unit; acts only when ``training``.
        return_weights: also return the weights a.
        num_windows: rows of a packed result. Counted from ``grid`` when None, which waits for the device if
            ``grid`` is on one. Where it is given and ``grid`` is on a device, or under torch.compile, it is trusted.

    Returns:
        y ``(B, ceil(H/ph) * ceil(W/pw), D)``, windows row-major, or ``(windows, D)`` packed; then, on request, the
        weights ``(B, H*W)`` or ``(T,)`` in fp32, differentiable like y.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, grid, window or probability.
        BackendError: a forced backend cannot serve the call.

    Work is 2 T D Dh flops. Backward keeps the weights and one bit a hidden unit, and recomputes nothing.
    """
    check.floating("x", x)
    x, w1, b1, w2, b2 = check.autocast(x, w1, b1, w2, b2)  # type: ignore[assignment]
    window = _window(window)
    p = check.probability("dropout_p", dropout_p) if training else 0.0
    _check_weights(x, w1, b1, w2, b2)
    w2 = w2.reshape(-1)
    if isinstance(grid, Tensor):
        grids, height, width, num_windows = _check_packed(x, grid, window, num_windows)
    else:
        grids, (height, width) = None, _check_grid(x, grid)
        num_windows = -(-height // window[0]) * -(-width // window[1])
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device) if p > 0.0 else None

    chosen = backend.select("spatial_pool", x, batch=x.shape[0] if grids is None else grids.shape[0])
    backend.log_call("spatial_pool", chosen, x=x, w1=w1)
    if chosen == "reference":
        size = (height, width) if grids is None else grids
        y, weights = reference.spatial_attention_pool(
            x, w1, b1, w2, b2, grid=size, window=window, dropout_p=p, seed=seed
        )
    else:
        save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, b1, w2, b2))
        y, weights, _ = library.kernel("spatial_pool", chosen)(
            x, w1, b1, w2, b2, grids, height, width, num_windows, *window, p, seed, save
        )
    return (y, weights) if return_weights else y


def _window(window: int | tuple[int, int]) -> tuple[int, int]:
    pair = window if isinstance(window, (tuple, list)) else (window, window)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise ValueError(f"window: expected a positive int or two of them, got {window!r}")
    return pair[0], pair[1]


def _check_weights(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    for name, value in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        check.like(name, value, x, "x")
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected (B, H*W, D) or packed (T, D), got {tuple(x.shape)}")
    check.shape("w1", w1, ("Dh", x.shape[-1]), " with the D of x")
    hidden = w1.shape[0]
    check.shape("b1", b1, (hidden,))
    check.shape("w2", w2, (1, hidden) if w2.dim() == 2 else (hidden,))
    check.shape("b2", b2, (1,))


def _check_grid(x: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"grid: expected (H, W), or an int tensor (B, 2) for packed x, got {grid!r}")
    height, width = grid
    if height < 0 or width < 0:
        raise ValueError(f"grid: expected sides of 0 or more, got {tuple(grid)}")
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, {height * width}, D) for grid {tuple(grid)}, got {tuple(x.shape)}")
    if x.shape[1] != height * width:
        raise ValueError(f"x: expected {height * width} tokens for grid {tuple(grid)}, got {x.shape[1]}")
    return height, width


def _check_packed(
    x: Tensor, grid: Tensor, window: tuple[int, int], num_windows: int | None
) -> tuple[Tensor, int, int, int]:
    check.integral("grid", grid)
    check.shape("grid", grid, ("B", 2))
    if x.dim() != 2:
        raise ValueError(f"x: expected packed (T, D) for a grid tensor, got {tuple(x.shape)}")
    if num_windows is not None and (torch.compiler.is_compiling() or grid.device.type != "cpu"):
        return grid.to(torch.int64), 0, 0, num_windows
    sizes = grid.tolist()
    if any(height < 0 or width < 0 for height, width in sizes):
        raise ValueError(f"grid: expected sides of 0 or more, got {sizes}")
    tokens = sum(height * width for height, width in sizes)
    if tokens != x.shape[0]:
        raise ValueError(f"grid: expected sizes with {x.shape[0]} tokens in all as x has, got {tokens}")
    counted = sum(-(-height // window[0]) * -(-width // window[1]) for height, width in sizes)
    if num_windows is not None and num_windows != counted:
        raise ValueError(f"num_windows: expected {counted} for this grid, got {num_windows}")
    return grid.to(torch.int64), 0, 0, counted


# ---- the op: fake, autograd, default implementation, schema ----


def _fake(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, grids: Tensor | None, height: int, width: int,
    num_windows: int, window_height: int, window_width: int, dropout_p: float, seed: Tensor | None, save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens = math.prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-2], num_windows, x.shape[-1]))
    weights = x.new_empty(x.shape[:-1], dtype=check.wide(x.dtype))
    mask = x.new_empty((tokens if save_mask else 0, (w1.shape[0] + 31) // 32), dtype=torch.int32)
    return y, weights, mask


def _fake_backward(
    dy: Tensor, dweights: Tensor | None, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, weights: Tensor, mask: Tensor,
    grids: Tensor | None, height: int, width: int, window_height: int, window_width: int, dropout_p: float,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    hidden, dim = w1.shape
    rows = hidden if need_dw else 0
    return (
        x.new_empty(x.shape if need_dx else (0, *x.shape[1:])),
        x.new_empty(rows, dim),
        x.new_empty(rows),
        x.new_empty(rows),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w1, b1, w2, _, grids, *geometry, p, _, save_mask = inputs
    _, weights, mask = output
    if save_mask:
        ctx.save_for_backward(x, w1, b1, w2, weights, mask, grids)
    ctx.geometry, ctx.dropout_p = geometry, p
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dweights, _):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: checkpointing unpacks a second time by recomputing
    if not saved:
        raise RuntimeError("spatial_pool: no gradient without the mask; call the op with save_mask=True")
    x, w1, b1, w2, weights, mask, grids = saved
    height, width, num_windows, ph, pw = ctx.geometry
    need_dx, need_dw, need_db2 = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4]), ctx.needs_input_grad[4]
    if dy is None:  # only the weights are used
        dy = x.new_zeros((*x.shape[:-2], num_windows, x.shape[-1]))
    dx, dw1, db1, dw2 = library.backward_kernel("spatial_pool_backward", ctx.overload, x.device.type)(
        dy, dweights, x, w1, b1, w2, weights, mask, grids, height, width, ph, pw, ctx.dropout_p, need_dx, need_dw
    )
    db2 = w2.new_zeros(1) if need_db2 else None  # the softmax does not see a shift of all scores
    return dx if need_dx else None, *((dw1, db1, dw2) if need_dw else (None,) * 3), db2, *(None,) * 9


def _plain(x, w1, b1, w2, b2, grids, height, width, num_windows, ph, pw, p, seed, save_mask):  # type: ignore[no-untyped-def]
    grid = (height, width) if grids is None else grids
    y, weights = reference.spatial_attention_pool(x, w1, b1, w2, b2, grid=grid, window=(ph, pw), dropout_p=p, seed=seed)
    mask = reference.activation_mask(x, w1, b1, dropout_p=p, seed=seed)
    return y, weights, mask if save_mask else mask[:0].clone()


def _plain_backward(dy, dweights, x, w1, b1, w2, weights, mask, grids, height, width, ph, pw, p, need_dx, need_dw):  # type: ignore[no-untyped-def]
    grid = (height, width) if grids is None else grids
    grads = reference.spatial_attention_pool_backward(
        dy, dweights, x, w1, b1, w2, weights, mask, grid=grid, window=(ph, pw), dropout_p=p
    )
    wanted = (need_dx, need_dw, need_dw, need_dw)
    return tuple(g if want else g[:0].clone() for g, want in zip(grads, wanted, strict=True))


library.define(
    "spatial_pool",
    "spatial_pool",
    "(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? grids, SymInt height, SymInt width, "
    "SymInt num_windows, int window_height, int window_width, float dropout_p, Tensor? seed, bool save_mask)"
    " -> (Tensor y, Tensor weights, Tensor mask)",
    fake=_fake,
    plain=_plain,
    setup_context=_setup_context,
    backward=_backward,
)
library.define(
    "spatial_pool",
    "spatial_pool_backward",
    "(Tensor dy, Tensor? dweights, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor weights, Tensor mask, "
    "Tensor? grids, SymInt height, SymInt width, int window_height, int window_width, float dropout_p, "
    "bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2)",
    fake=_fake_backward,
    plain=_plain_backward,
    overloads=("default", "triton"),
)
