"""Spatial attention pooling on GPUs: what runs, with which tiles. Kernels: ``spatial_pool_forward``, ``_backward``.

Forward is two launches: partial scores of tiles of the hidden layer, then windows. Backward is four: gradient of the
scores, its product with w1 (dx), its product with x (G), and what follows from G. All results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flashsloth_ops.backend import short
from flashsloth_ops.triton.launch import launch, num_sms
from flashsloth_ops.triton.spatial_pool_backward import (
    pool_input_gradient_kernel,
    pool_score_gradient_kernel,
    pool_unit_sums_kernel,
    pool_weight_gradient_kernel,
)
from flashsloth_ops.triton.spatial_pool_forward import pool_scores_kernel, pool_windows_kernel
from flashsloth_ops.triton.tuning import Config, bucket, choose

# Tiles of a product, the largest first, with warps: registers hold 128 fp32 sums a thread at most.
TILES = ((256, 128, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4))


def spatial_pool(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, grids: Tensor | None, height: int, width: int,
    num_windows: int, window_height: int, window_width: int, dropout_p: float, seed: Tensor | None, save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, weights and mask as ``flashsloth_ops.spatial_pool`` declares them."""
    hidden, dim = w1.shape
    x, w1, b1, w2 = x.contiguous(), w1.contiguous(), b1.contiguous(), w2.contiguous()
    tokens = x.shape[:-1].numel()
    y = x.new_empty((*x.shape[:-2], num_windows, dim))
    weights = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mask = x.new_empty((tokens if save_mask else 0, (hidden + 31) // 32), dtype=torch.int32)

    def scores(tile: Config) -> Tensor:
        blocks = ceil_div(hidden, tile["BLOCK_N"])
        partial = x.new_empty((blocks, tokens), dtype=torch.float32)
        launch(
            pool_scores_kernel, (ceil_div(tokens, tile["BLOCK_M"]) * blocks,),
            x, w1, b1, w2, seed if dropout_p > 0 else None, partial, mask if save_mask else None,
            tokens, dim, hidden, int(dropout_p * 2**32), 1 / (1 - dropout_p), PRECISION=precision(x), **tile,
        )  # fmt: skip
        return partial

    heuristic = product_tile(tokens, hidden, dim, x)
    key = f"{short(x.dtype)} D{dim} H{hidden} T{bucket(tokens)}"
    partial = scores(choose("pool_scores_kernel", key, x.device, heuristic, lambda: _space(x), scores))

    windows = y.shape[:-1].numel()
    block_d = column_block(windows, dim, x)
    launch(
        pool_windows_kernel, (windows * max(ceil_div(dim, block_d), 1),),
        x, partial, b2, None if grids is None else grids.contiguous(), y, weights, tokens, dim, partial.shape[0],
        windows, 0 if grids is None else grids.shape[0], height, width, window_height, window_width,
        BLOCK_S=min(bucket(partial.shape[0]), 32), BLOCK_T=token_block(window_height, window_width),
        BLOCK_D=block_d, BLOCK_B=IMAGES, num_warps=2 if block_d == 128 else 4,
    )  # fmt: skip
    return y, weights, mask


def spatial_pool_backward(
    dy: Tensor, dweights: Tensor | None, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, weights: Tensor, mask: Tensor,
    grids: Tensor | None, height: int, width: int, window_height: int, window_width: int, dropout_p: float,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dw1, db1, dw2 as ``flashsloth_ops.spatial_pool`` declares them; empty where not needed."""
    hidden, dim = w1.shape
    dy, x, w1, b1, w2 = dy.contiguous(), x.contiguous(), w1.contiguous(), b1.contiguous(), w2.contiguous()
    weights, mask = weights.contiguous(), mask.contiguous()
    tokens, windows = x.shape[:-1].numel(), dy.shape[:-1].numel()
    ds = x.new_empty((tokens,), dtype=torch.float32)
    window_of = x.new_empty((tokens,), dtype=torch.int32)
    launch(
        pool_score_gradient_kernel, (windows,),
        x, dy, None if dweights is None else dweights.contiguous(), weights,
        None if grids is None else grids.contiguous(), ds, window_of, tokens, dim,
        0 if grids is None else grids.shape[0], height, width, window_height, window_width,
        BLOCK_T=token_block(window_height, window_width), BLOCK_D=min(bucket(max(dim, 16)), 512), BLOCK_B=IMAGES,
    )  # fmt: skip

    dx = x.new_empty(x.shape if need_dx else (0, *x.shape[1:]))
    if need_dx:
        input_gradient(mask, w1, w2, ds, weights, dy, window_of, dx, dropout_p)
    rows = hidden if need_dw else 0
    dw1, db1, dw2 = x.new_empty((rows, dim)), x.new_empty((rows,)), x.new_empty((rows,))
    if need_dw:
        weight_gradients(mask, ds, x, w1, b1, w2, dw1, db1, dw2, dropout_p)
    return dx, dw1, db1, dw2


def input_gradient(
    mask: Tensor, w1: Tensor, w2: Tensor, ds: Tensor, weights: Tensor, dy: Tensor, window_of: Tensor, dx: Tensor,
    dropout_p: float,
) -> None:  # fmt: skip
    (hidden, dim), tokens = w1.shape, ds.numel()

    def run(tile: Config) -> None:
        launch(
            pool_input_gradient_kernel, (ceil_div(tokens, tile["BLOCK_M"]) * ceil_div(dim, tile["BLOCK_N"]),),
            mask, w1, w2, ds, weights, dy, window_of, dx, tokens, dim, hidden, 1 / (1 - dropout_p),
            PRECISION=precision(w1), **tile,
        )  # fmt: skip

    heuristic = product_tile(tokens, dim, hidden, w1)
    key = f"{short(w1.dtype)} D{dim} H{hidden} T{bucket(tokens)}"
    run(choose("pool_input_gradient_kernel", key, w1.device, heuristic, lambda: _space(w1), run))


def weight_gradients(
    mask: Tensor, ds: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, dw1: Tensor, db1: Tensor, dw2: Tensor,
    dropout_p: float,
) -> None:  # fmt: skip
    (hidden, dim), tokens = w1.shape, ds.numel()

    def unit_sums(tile: Config) -> tuple[Tensor, Tensor]:
        hidden_blocks, column_blocks = ceil_div(hidden, tile["BLOCK_M"]), max(ceil_div(dim, tile["BLOCK_N"]), 1)
        splits, share = token_splits(tokens, hidden_blocks * column_blocks, x)
        sums = x.new_empty((splits, hidden, dim), dtype=torch.float32)
        counts = x.new_empty((splits * column_blocks, hidden), dtype=torch.float32)
        launch(
            pool_unit_sums_kernel, (splits * hidden_blocks * column_blocks,),
            mask, ds, x, sums, counts, tokens, dim, hidden, share, PRECISION=precision(x), **tile,
        )  # fmt: skip
        return sums, counts

    heuristic = {"BLOCK_M": 128, "BLOCK_N": 128, **_step(x), "num_warps": 8}
    key = f"{short(x.dtype)} D{dim} H{hidden} T{bucket(tokens)}"
    sums, counts = unit_sums(choose("pool_unit_sums_kernel", key, x.device, heuristic, lambda: _space(x), unit_sums))
    launch(
        pool_weight_gradient_kernel, (ceil_div(hidden, 4),),
        sums, counts, w1, b1, w2, dw1, db1, dw2, dim, hidden, sums.shape[0], counts.shape[0], 1 / (1 - dropout_p),
        BLOCK_R=4, BLOCK_D=256, BLOCK_P=32,
    )  # fmt: skip


# ---- tiles: counted, not searched, unless FLASHSLOTH_AUTOTUNE=1 ----

IMAGES = 128  # sizes of packed images read at a time
CLOCKS_TO_START = 2000  # of a program: first loads, last stores, what a pipeline does not hide
BYTES_A_CLOCK = 64  # from L2, for one multiprocessor
FLOPS_A_CLOCK = {torch.float32: 550, torch.bfloat16: 3400, torch.float16: 3400}  # of one, fp32 as three tf32 products


def product_tile(rows: int, columns: int, inner: int, like: Tensor) -> Config:
    """The tile with the least time by this count: waves of programs, each bound by arithmetic or by L2."""
    sms = num_sms(like.device)

    def clocks(tile: tuple[int, int, int]) -> float:
        m, n, _ = tile
        waves = ceil_div(ceil_div(rows, m) * ceil_div(columns, n), sms)
        arithmetic, traffic = 2 * m * n / FLOPS_A_CLOCK[like.dtype], (m + n) * like.element_size() / BYTES_A_CLOCK
        return waves * (CLOCKS_TO_START + inner * max(arithmetic, traffic))

    m, n, warps = min(_tiles(like), key=clocks)
    return {"BLOCK_M": m, "BLOCK_N": n, **_step(like), "num_warps": warps}


def token_splits(tokens: int, tiles: int, like: Tensor) -> tuple[int, int]:
    """Into how many parts of how many tokens a sum over tokens is split so that its tiles fill the GPU, two a
    multiprocessor; parts have at least 512 tokens, since each costs a pass over a result in fp32."""
    splits = max(min(2 * num_sms(like.device) // max(tiles, 1), tokens // 512), 1)
    share = ceil_div(ceil_div(tokens, splits), 128) * 128
    return max(ceil_div(tokens, share), 1) if share else 1, share


def column_block(windows: int, dim: int, like: Tensor) -> int:
    """Columns of one program of the windows: few while that makes programs for every multiprocessor, then more."""
    if windows * ceil_div(dim, 128) <= 32 * num_sms(like.device):
        return 128
    return 512


def token_block(window_height: int, window_width: int) -> int:
    """Tokens of a window at a time."""
    return min(max(bucket(window_height * window_width), 4), 32)


def precision(like: Tensor) -> str:
    """fp32 products as three tf32 ones, which keeps fp32's accuracy on tensor cores."""
    return "tf32x3" if like.dtype == torch.float32 else "tf32"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _tiles(like: Tensor) -> tuple[tuple[int, int, int], ...]:
    return TILES[1:] if like.dtype == torch.float32 else TILES


def _step(like: Tensor) -> Config:
    """Bytes of a row in a stage: 128, the widest swizzle."""
    return {"BLOCK_K": 32 if like.dtype == torch.float32 else 64, "num_stages": 3}


def _space(like: Tensor) -> Iterable[Config]:
    for m, n, warps in _tiles(like):
        for stages in (3, 4):
            yield {"BLOCK_M": m, "BLOCK_N": n, **_step(like), "num_warps": warps, "num_stages": stages}
