"""What a call of embedded-query attention on GPUs is made of: weights, sizes, and tiles of its products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from flashsloth_ops.triton.embedded_query_image import query_asked_kernel
from flashsloth_ops.triton.launch import gpu, launch
from flashsloth_ops.triton.tuning import Config, bucket


class Params(NamedTuple):
    """The weights that the op takes, in the order of its schema."""

    down: Tensor
    down_bias: Tensor
    norm_query: Tensor
    norm_query_bias: Tensor
    norm_text: Tensor
    norm_text_bias: Tensor
    norm_image: Tensor
    norm_image_bias: Tensor
    text_q: Tensor
    text_q_bias: Tensor
    text_k: Tensor
    text_k_bias: Tensor
    text_v: Tensor
    text_v_bias: Tensor
    image_q: Tensor
    image_q_bias: Tensor
    image_k: Tensor
    image_k_bias: Tensor
    image_v: Tensor
    image_v_bias: Tensor
    up: Tensor
    up_bias: Tensor


class Sizes(NamedTuple):
    """Sizes of a call: B, Q, T, Dm; Bi, N, Di, E; heads."""

    batch: int
    queries: int
    text: int
    model: int
    images: int
    tokens: int
    dim: int
    inner: int
    heads: int

    @staticmethod
    def of(query: Tensor, text: Tensor, image: Tensor, y: Tensor, heads: int) -> Sizes:
        batch, queries, model = query.shape
        images, tokens, dim = image.shape
        return Sizes(batch, queries, text.shape[1], model, images, tokens, dim, y.shape[2], heads)

    @property
    def rows(self) -> int:
        """Query rows of the batch."""
        return self.batch * self.queries

    @property
    def image_rows(self) -> int:
        """Rows that read one image: (question, query, head)."""
        return self.batch // max(self.images, 1) * self.queries * self.heads

    @property
    def head_dim(self) -> int:
        return self.inner // self.heads

    @property
    def value_dim(self) -> int:
        return self.dim // self.heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


def ask(told: Tensor, p: Params, s: Sizes) -> tuple[Tensor, Tensor]:
    """What is asked of the image (B, Q, h, E), in the dtype of the weights, and the sums of its rows."""
    asked = p.image_k.new_empty((s.batch, s.queries, s.heads, s.inner))
    sums = told.new_empty((s.batch, s.queries, s.heads))
    block_m = 16 if s.rows <= 16 else 64
    launch(
        query_asked_kernel, (ceil_div(s.rows, block_m) * s.heads,),
        told, p.image_q, p.image_q_bias, p.image_k, p.norm_image, asked, sums,
        s.rows, s.inner, s.heads, s.head_dim, s.scale,
        BLOCK_M=block_m, BLOCK_D=max(bucket(s.head_dim), 16), BLOCK_E=64, PRECISION=precision(asked), num_warps=4,
    )  # fmt: skip
    return asked, sums


# ---- tiles: counted, not searched, unless FLASHSLOTH_AUTOTUNE=1 ----

# Tiles of a product, with warps: a head count of 32 makes 288 rows, which are nine blocks of 32.
TILES = ((128, 128, 8), (64, 128, 4), (32, 128, 4), (64, 64, 4), (32, 64, 4))
CLOCKS_TO_START = 2000  # of a program: first loads, last stores, what a pipeline does not hide
BYTES_A_CLOCK = 64  # from L2, for one multiprocessor
FLOPS_A_CLOCK = {torch.float32: 550, torch.bfloat16: 3400, torch.float16: 3400}  # of one, fp32 as three tf32 products


def product_tile(rows: int, columns: int, inner: int, like: Tensor, batch: int = 1, least: int | None = None) -> Config:
    """The tile with the least time by this count: waves of programs, each bound by arithmetic or by L2.

    ``least``: the sum over ``inner`` may be split into shares of whole multiples of it, which are written in fp32.
    """
    multiprocessors = gpu(like.device).multiprocessors

    def clocks(tile: tuple[int, int, int]) -> float:
        m, n, _ = tile
        programs = batch * ceil_div(rows, m) * ceil_div(columns, n)
        share, splits = (inner, 1) if least is None else shares(inner, programs, least, like)
        rate = FLOPS_A_CLOCK[like.dtype] * (1.0 if m >= 64 else 0.5)  # wgmma has 64 rows; fewer take mma.sync
        arithmetic, traffic = 2 * m * n / rate, (m + n) * like.element_size() / BYTES_A_CLOCK
        partial = 0.0 if splits == 1 else 2 * 4 * m * n / BYTES_A_CLOCK  # written, and read by the next kernel
        waves = ceil_div(programs * splits, multiprocessors)
        return waves * (CLOCKS_TO_START + share * max(arithmetic, traffic) + partial)

    m, n, warps = min(_tiles(like), key=clocks)
    return {"BLOCK_M": m, "BLOCK_N": n, **step(like), "num_warps": warps}


def shares(length: int, programs: int, least: int, like: Tensor) -> tuple[int, int]:
    """(share, splits): a sum over ``length`` in whole multiples of ``least``, split until programs fill the GPU."""
    most = max(gpu(like.device).multiprocessors // max(programs, 1), 1)
    share = ceil_div(ceil_div(length, most), least) * least
    return max(share, least), max(ceil_div(length, max(share, least)), 1)


def softmax_block(token_blocks: int) -> int:
    """Blocks of tokens whose peaks are read at a time."""
    return min(bucket(token_blocks), 16)


def step(like: Tensor) -> Config:
    """Bytes of a row in a stage: 128, the widest swizzle."""
    return {"BLOCK_K": 32 if like.dtype == torch.float32 else 64, "num_stages": 3}


def precision(like: Tensor) -> str:
    """fp32 products as three tf32 ones, which keeps fp32's accuracy on tensor cores."""
    return "tf32x3" if like.dtype == torch.float32 else "tf32"


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _tiles(like: Tensor) -> tuple[tuple[int, int, int], ...]:
    if like.dtype != torch.float32:
        return TILES
    # Three tf32 products keep both parts of their operands: half the registers are left for sums.
    return tuple((m, n, 8 if m * n > 64 * 64 else 4) for m, n, _ in TILES[1:])


def space(like: Tensor) -> Iterable[Config]:
    for m, n, warps in _tiles(like):
        for stages in (3, 4):
            yield {"BLOCK_M": m, "BLOCK_N": n, **step(like), "num_warps": warps, "num_stages": stages}
