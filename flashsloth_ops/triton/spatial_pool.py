"""Spatial attention pooling on GPUs: what runs, with which tiles. Kernels: ``spatial_pool_forward``, ``_backward``.

Forward is two launches: partial scores of tiles of the hidden layer, then windows. Backward is four: gradient of the
scores, its product with w1 (dx), its product with x (G), and what follows from G. All results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashsloth_ops import _checks as check
from flashsloth_ops.backend import NARROW, short
from flashsloth_ops.triton.launch import launch, num_sms
from flashsloth_ops.triton.spatial_pool_backward import (
    pool_input_gradient_kernel,
    pool_score_gradient_kernel,
    pool_unit_sums_kernel,
    pool_weight_gradient_kernel,
)
from flashsloth_ops.triton.spatial_pool_forward import pool_scores_kernel, pool_windows_kernel
from flashsloth_ops.triton.tuning import Config, bucket, choose


def spatial_pool(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, grids: Tensor | None, height: int, width: int,
    num_windows: int, window_height: int, window_width: int, dropout_p: float, seed: Tensor | None, save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, weights and mask as ``flashsloth_ops.spatial_pool`` declares them."""
    check_inputs(x, w1, b1, w2)
    check.like("b2", b2, x, "x")
    hidden, dim = w1.shape
    grids = on_device(grids, x)
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

    tiles, key = scores_tiles(x, dropout_p > 0), tuning_key(x, w1)
    heuristic = best_tile(tiles, tokens, hidden, dim, x)
    partial = scores(choose("pool_scores_kernel", key, x.device, heuristic, lambda: space(tiles, x), scores))

    windows = y.shape[:-1].numel()
    block_d = column_block(windows, dim, x)
    launch(
        pool_windows_kernel, (windows * max(ceil_div(dim, block_d), 1),),
        x, partial, b2, grids, y, weights, tokens, dim, partial.shape[0],
        windows, 0 if grids is None else grids.shape[0], height, width, window_height, window_width,
        BLOCK_S=min(bucket(partial.shape[0]), 32), BLOCK_B=IMAGES, **window_block(window_height, window_width, block_d),
    )  # fmt: skip
    return y, weights, mask


def spatial_pool_backward(
    dy: Tensor, dweights: Tensor | None, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, weights: Tensor, mask: Tensor,
    grids: Tensor | None, height: int, width: int, window_height: int, window_width: int, dropout_p: float,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dw1, db1, dw2 as ``flashsloth_ops.spatial_pool`` declares them; empty where not needed."""
    check_inputs(x, w1, b1, w2)
    check.like("dy", dy, x, "x")
    check.shape("mask", mask, (x.shape[:-1].numel(), (w1.shape[0] + 31) // 32), ", what forward saves")
    hidden, dim = w1.shape
    grids = on_device(grids, x)
    dy, x, w1, b1, w2 = dy.contiguous(), x.contiguous(), w1.contiguous(), b1.contiguous(), w2.contiguous()
    weights, mask = weights.contiguous(), mask.contiguous()
    tokens, windows = x.shape[:-1].numel(), dy.shape[:-1].numel()
    ds = x.new_empty((tokens,), dtype=torch.float32)
    window_of = x.new_empty((tokens,), dtype=torch.int32)
    launch(
        pool_score_gradient_kernel, (windows,),
        x, dy, None if dweights is None else dweights.contiguous(), weights, grids, ds, window_of, tokens, dim,
        0 if grids is None else grids.shape[0], height, width, window_height, window_width,
        BLOCK_B=IMAGES, **window_block(window_height, window_width, min(bucket(max(dim, 128)), 512)),
    )  # fmt: skip

    dx = x.new_empty(x.shape if need_dx else (0, *x.shape[1:]))
    if need_dx:
        input_gradient(mask, w1, w2, ds, weights, dy, window_of, dx, dropout_p)
    rows = hidden if need_dw else 0
    dw1, db1, dw2 = x.new_empty((rows, dim)), x.new_empty((rows,)), x.new_empty((rows,))
    if need_dw:
        weight_gradients(mask, ds, x, w1, b1, w2, dw1, db1, dw2, dropout_p)
    return dx, dw1, db1, dw2


def check_inputs(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> None:
    """What would be read out of bounds, also for calls below the checks of the public function."""
    if x.dtype not in NARROW:
        raise TypeError(f"x: expected {', '.join(map(short, NARROW))}, got {short(x.dtype)}")
    for name, value in (("w1", w1), ("b1", b1), ("w2", w2)):
        check.like(name, value, x, "x")
    check.shape("w1", w1, ("Dh", x.shape[-1]), " with the D of x")
    check.shape("b1", b1, (w1.shape[0],))
    check.shape("w2", w2, (w1.shape[0],))


def on_device(grids: Tensor | None, x: Tensor) -> Tensor | None:
    """Sizes where the kernels read them; a copy that waits only if they are on the CPU and x is not."""
    return None if grids is None else grids.to(x.device).contiguous()


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

    tiles, key = gradient_tiles(dx), tuning_key(dx, w1)
    heuristic = best_tile(tiles, tokens, dim, hidden, dx)
    run(choose("pool_input_gradient_kernel", key, dx.device, heuristic, lambda: space(tiles, dx), run))


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

    tiles, key = gradient_tiles(x), tuning_key(x, w1)
    heuristic = tiles[0].config(x)  # the largest: splits fill the GPU
    sums, counts = unit_sums(
        choose("pool_unit_sums_kernel", key, x.device, heuristic, lambda: space(tiles, x), unit_sums)
    )
    launch(
        pool_weight_gradient_kernel, (ceil_div(hidden, 4),),
        sums, counts, w1, b1, w2, dw1, db1, dw2, dim, hidden, sums.shape[0], counts.shape[0], 1 / (1 - dropout_p),
        BLOCK_R=4, BLOCK_D=256, BLOCK_P=32,
    )  # fmt: skip


# ---- tiles: counted, not searched, unless FLASHSLOTH_AUTOTUNE=1 ----


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int
    stages: int

    def config(self, like: Tensor) -> Config:
        step = 128 // like.element_size()  # 128 bytes of a row, the widest swizzle
        sizes = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": step}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


# The largest first. Stages keep about 100 KB of loads under way, also where a small tile passes in 300 clocks.
SCORES = (Tile(256, 128, 8, 3), Tile(128, 128, 8, 3), Tile(64, 128, 4, 6), Tile(64, 64, 4, 6))
# Where the left operand is made in registers, two blocks a multiprocessor: one makes it while the other multiplies.
GRADIENTS = (Tile(128, 128, 4, 3), Tile(64, 128, 4, 4), Tile(64, 64, 4, 4))
# Three tf32 products need the registers of twice the operands, and so much arithmetic that small tiles cost nothing.
FP32 = (Tile(64, 128, 8, 3), Tile(64, 64, 4, 3))

IMAGES = 128  # sizes of packed images read at a time
CLOCKS_TO_START = 2000  # of a program: first loads, last stores, what a pipeline does not hide
BYTES_A_CLOCK = 64  # from L2, for one multiprocessor
FLOPS_A_CLOCK = {torch.float32: 550, torch.bfloat16: 3400, torch.float16: 3400}  # of one, fp32 as three tf32 products


def best_tile(tiles: tuple[Tile, ...], rows: int, columns: int, inner: int, like: Tensor) -> Config:
    """The tile with the least time by this count: waves of programs, each bound by arithmetic or by L2."""
    sms = num_sms(like.device)

    def clocks(tile: Tile) -> float:
        waves = ceil_div(ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns), sms)
        arithmetic = 2 * tile.rows * tile.columns / FLOPS_A_CLOCK[like.dtype]
        traffic = (tile.rows + tile.columns) * like.element_size() / BYTES_A_CLOCK
        return waves * (CLOCKS_TO_START + inner * max(arithmetic, traffic))

    return min(tiles, key=clocks).config(like)


def space(tiles: tuple[Tile, ...], like: Tensor) -> Iterator[Config]:
    """Candidates of a search."""
    for tile in tiles:
        for stages in (tile.stages, tile.stages + 1):
            yield tile._replace(stages=stages).config(like)


def scores_tiles(x: Tensor, dropout: bool) -> tuple[Tile, ...]:
    """Philox needs registers beside those of the sums: not the largest tile."""
    return aligned(FP32 if x.dtype == torch.float32 else SCORES[1:] if dropout else SCORES, x)


def gradient_tiles(x: Tensor) -> tuple[Tile, ...]:
    return aligned(FP32 if x.dtype == torch.float32 else GRADIENTS, x)


def aligned(tiles: tuple[Tile, ...], x: Tensor) -> tuple[Tile, ...]:
    """Rows that do not start at 16 bytes are loaded element by element, whose addresses fill the registers."""
    return tiles if x.shape[-1] * x.element_size() % 16 == 0 else tiles[-1:]


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


def window_block(window_height: int, window_width: int, block_d: int) -> Config:
    """Tokens of a window and columns at a time; a warp for 1024 elements."""
    block_t = min(max(bucket(window_height * window_width), 4), 32)
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": min(max(block_t * block_d // 1024, 1), 8)}


def precision(like: Tensor) -> str:
    """fp32 products as three tf32 ones, which keeps fp32's accuracy on tensor cores."""
    return "tf32x3" if like.dtype == torch.float32 else "tf32"


def tuning_key(x: Tensor, w1: Tensor) -> str:
    return f"{short(x.dtype)} D{w1.shape[1]} H{w1.shape[0]} T{bucket(x.shape[:-1].numel())}"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
