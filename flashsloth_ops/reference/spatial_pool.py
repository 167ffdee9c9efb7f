"""Spatial attention pooling in plain PyTorch (FlashSloth, arXiv 2412.04317, "SAP")."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spatial_attention_pool(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    grid: tuple[int, int] | Tensor,
    window: tuple[int, int] = (3, 3),
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool every window of a token grid by a learned softmax.

    s_n = w2 . relu(w1 x_n + b1) + b2,  a = softmax of s within a window,  y = sum_n a_n x_n

    x ``(B, H*W, D)`` with ``grid=(H, W)``, or packed ``(T, D)`` with ``grid`` an int tensor ``(B, 2)``.
    Returns y ``(B, windows, D)`` or ``(windows, D)``, and the weights a, shaped as x without D.
    """
    hidden = torch.relu(x @ w1.T + b1)
    if dropout_p > 0.0:
        assert seed is not None
        keep = dropout_keep(seed, x.shape[:-1].numel(), w1.shape[0], dropout_p)
        hidden = hidden * keep.view(hidden.shape) / (1.0 - dropout_p)
    score = (hidden @ w2.reshape(-1) + b2).to(torch.promote_types(x.dtype, torch.float32)).reshape(-1)

    window_of, shape = windows_of_tokens(x, grid, window)
    count = math.prod(shape)
    peak = score.new_full((count,), -torch.inf).scatter_reduce(0, window_of, score.detach(), "amax")
    mass = torch.exp(score - peak[window_of])
    weights = mass / window_sum(mass, window_of, count)[window_of]
    pooled = window_sum(weights[:, None] * x.reshape(-1, x.shape[-1]), window_of, count)
    return pooled.to(x.dtype).view(*shape, x.shape[-1]), weights.view(x.shape[:-1])


def spatial_attention_pool_backward(
    dy: Tensor,
    dweights: Tensor | None,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    grid: tuple[int, int] | Tensor,
    window: tuple[int, int],
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact gradients dx, dw1, db1, dw2 from the weights and one bit a hidden unit; db2 is zero.

    With m_nj = [unit j of token n active and kept] / (1 - p), and sums over n within windows for da and a:

    da_n = <x_n, dy> + dweights_n,  ds_n = a_n (da_n - sum a da)
    G_j = sum_n ds_n m_nj x_n,      g_j = sum_n ds_n m_nj
    dw1_j = w2_j G_j,  db1_j = w2_j g_j,  dw2_j = <w1_j, G_j> + b1_j g_j
    dx_n = a_n dy + sum_j ds_n m_nj w2_j w1_j
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    window_of, shape = windows_of_tokens(x, grid, window)
    count, dim = math.prod(shape), x.shape[-1]
    flat, dy_of = x.reshape(-1, dim).to(wide), dy.reshape(-1, dim).to(wide)[window_of]
    w1, b1, w2, a = w1.to(wide), b1.to(wide), w2.reshape(-1).to(wide), weights.reshape(-1)

    da = (flat * dy_of).sum(-1)
    if dweights is not None:
        da = da + dweights.reshape(-1)
    ds = a * (da - window_sum(a * da, window_of, count)[window_of])
    m = unpack_mask(mask, w1.shape[0]).to(wide) / (1.0 - dropout_p)
    G, g = (ds[:, None] * m).T @ flat, (ds[:, None] * m).sum(0)
    dx = a[:, None] * dy_of + (ds[:, None] * m * w2) @ w1
    grads = (dx.view(x.shape), w2[:, None] * G, w2 * g, (w1 * G).sum(1) + b1 * g)
    return tuple(t.to(x.dtype) for t in grads)  # type: ignore[return-value]


def activation_mask(x: Tensor, w1: Tensor, b1: Tensor, *, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """What forward keeps for backward: bit j % 32 of int32 word ``[n, j // 32]`` is [unit j active and kept]."""
    active = (x.reshape(-1, x.shape[-1]) @ w1.T + b1) > 0
    if dropout_p > 0.0:
        assert seed is not None
        active = active & dropout_keep(seed, active.shape[0], active.shape[1], dropout_p)
    rows, hidden = active.shape
    words = -(-hidden // 32)
    bits = torch.nn.functional.pad(active, (0, 32 * words - hidden)).view(rows, words, 32).long()
    packed = (bits << torch.arange(32, device=x.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_mask(mask: Tensor, hidden: int) -> Tensor:
    """Bool ``(tokens, hidden)`` from the words of :func:`activation_mask`."""
    bits = (mask[:, :, None] >> torch.arange(32, device=mask.device)) & 1
    return bits.bool().view(mask.shape[0], -1)[:, :hidden]


def window_sum(values: Tensor, window_of: Tensor, count: int) -> Tensor:
    """Sum of the values of each window's tokens."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, window_of, values)


def windows_of_tokens(
    x: Tensor, grid: tuple[int, int] | Tensor, window: tuple[int, int]
) -> tuple[Tensor, tuple[int, ...]]:
    """Number of the window each token of the batch is in, and the shape of the windows, ``(B, n)`` or ``(n,)``."""
    if isinstance(grid, Tensor):
        index, count = packed_window_index(grid, window)
        return index.to(x.device), (count,)
    one, per_image = window_index(*grid, window)
    first = torch.arange(x.shape[0]).view(-1, 1) * per_image
    return (first + one).reshape(-1).to(x.device), (x.shape[0], per_image)


def window_index(height: int, width: int, window: tuple[int, int]) -> tuple[Tensor, int]:
    """Number of the window each token of a row-major grid is in, and how many windows there are.

    Windows are row-major. Those at the right and bottom edge are smaller where a side does not divide.
    """
    ph, pw = window
    rows, columns = -(-height // ph), -(-width // pw)
    row = torch.arange(height) // ph
    column = torch.arange(width) // pw
    return (row[:, None] * columns + column).reshape(-1), rows * columns


def packed_window_index(grids: Tensor, window: tuple[int, int]) -> tuple[Tensor, int]:
    """:func:`window_index` over images of different sizes laid end to end."""
    index, count = [torch.empty(0, dtype=torch.int64)], 0
    for height, width in grids.tolist():
        one, windows = window_index(height, width, window)
        index.append(one + count)
        count += windows
    return torch.cat(index), count


def dropout_keep(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The dropout mask every backend draws: bool ``(rows, columns)``, True with probability 1 - p.

    Philox4x32-10 (Salmon et al., 2011) keyed by ``seed``, an int64 tensor of one element. The counter of
    unit ``(n, j)`` is ``(j // 4, n mod 2^32, n div 2^32, 0)`` and word ``j % 4`` of the output decides it, so
    the mask depends on nothing but the seed and the position, whatever the tiling or the thread count.
    """
    quads = -(-columns // 4)
    low = 0xFFFFFFFF
    n = torch.arange(rows, dtype=torch.int64, device=seed.device).view(-1, 1).expand(rows, quads)
    j = torch.arange(quads, dtype=torch.int64, device=seed.device).expand(rows, quads)
    c = [j, n & low, n >> 32, torch.zeros_like(n)]
    k0, k1 = seed.reshape(()) & low, (seed.reshape(()) >> 32) & low
    for _ in range(10):
        # A 64-bit product of two 32-bit words wraps as a signed number; its halves are still right.
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [((p1 >> 32) & low) ^ c[1] ^ k0, p1 & low, ((p0 >> 32) & low) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack(c, dim=-1).view(rows, quads * 4)[:, :columns]
    return words >= int(p * 2**32)
