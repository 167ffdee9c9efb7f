"""Spatial attention pooling in plain PyTorch (FlashSloth, arXiv 2412.04317, section 3.2)."""

from __future__ import annotations

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
        keep = dropout_keep(seed, x.shape[:-1].numel(), w1.shape[0], dropout_p)
        hidden = hidden * keep.view(hidden.shape) / (1.0 - dropout_p)
    score = (hidden @ w2.reshape(-1) + b2).float() if x.dtype.itemsize < 4 else hidden @ w2.reshape(-1) + b2

    if isinstance(grid, Tensor):
        window_of, count = packed_window_index(grid, window)
        shape = (count,)
    else:
        batch = x.shape[0]
        one, per_image = window_index(*grid, window)
        image = torch.arange(batch).view(-1, 1) * per_image
        window_of, count = (image + one).reshape(-1), batch * per_image
        shape = (batch, per_image)

    window_of = window_of.to(x.device)
    flat, score = x.reshape(-1, x.shape[-1]), score.reshape(-1)
    peak = score.new_full((count,), -torch.inf).scatter_reduce(0, window_of, score.detach(), "amax")
    mass = torch.exp(score - peak[window_of])
    total = mass.new_zeros(count).index_add(0, window_of, mass)
    weights = mass / total[window_of]
    pooled = weights.new_zeros(count, x.shape[-1]).index_add(0, window_of, weights[:, None] * flat)
    return pooled.to(x.dtype).view(*shape, x.shape[-1]), weights.view(x.shape[:-1])


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
