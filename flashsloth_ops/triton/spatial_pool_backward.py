"""Backward kernels of spatial attention pooling, from the weights and one bit a hidden unit.

    da = <x, dy>,  ds = a (da - sum of a da in the window)            pool_score_gradient_kernel
    dx = a dy + ds * scale * ((bits * w2) w1)                         pool_input_gradient_kernel
    G = (ds * bits)' x,  g = (ds * bits)' 1                           pool_unit_sums_kernel
    dw1 = scale w2 G,  db1 = scale w2 g,  dw2 = scale (rowsum(w1 G) + b1 g)   pool_weight_gradient_kernel

with scale = 1 / (1 - p). The left operands of both products are made from the bits in registers. In dx, ds is taken out
of the product, so its left operand is w2 or 0: exact in every dtype. In G, ds is rounded to the dtype of x.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from flashsloth_ops.triton.spatial_pool_windows import window_box, window_tokens


@triton.jit(do_not_specialize=["tokens", "images", "height", "width"])
def pool_score_gradient_kernel(
    x, dy, dweights, weights, grids, ds, window_of, tokens, dim, images, height, width, window_height, window_width,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """ds, fp32, and the number of the window of every token of one window. ``dweights`` None: zero."""
    window = tl.program_id(0).to(tl.int64)
    first, across, rows, cols = window_box(grids, images, height, width, window_height, window_width, window, BLOCK_B)
    columns = tl.arange(0, BLOCK_D)
    mean = tl.zeros((), tl.float32)
    for start in range(0, rows * cols, BLOCK_T):
        token, live = window_tokens(first, across, rows, cols, start, tokens, BLOCK_T)
        da = tl.zeros((BLOCK_T,), tl.float32)
        for d in range(0, dim, BLOCK_D):
            exists = columns < dim - d
            there = live[:, None] & exists[None, :]
            values = tl.load(x + token[:, None] * dim + (d + columns)[None, :], mask=there, other=0.0)
            gradient = tl.load(dy + window * dim + d + columns, mask=exists, other=0.0).to(tl.float32)
            da += tl.sum(values.to(tl.float32) * gradient[None, :], axis=1)
        if dweights is not None:
            da += tl.load(dweights + token, mask=live, other=0.0)
        tl.store(ds + token, da, mask=live)
        mean += tl.sum(tl.load(weights + token, mask=live, other=0.0) * da, axis=0)
    tl.debug_barrier()  # da is read by other threads than those that wrote it
    for start in range(0, rows * cols, BLOCK_T):
        token, live = window_tokens(first, across, rows, cols, start, tokens, BLOCK_T)
        da = tl.load(ds + token, mask=live, other=0.0)
        tl.store(ds + token, tl.load(weights + token, mask=live, other=0.0) * (da - mean), mask=live)
        tl.store(window_of + token, (window + tl.zeros((BLOCK_T,), tl.int64)).to(tl.int32), mask=live)


@triton.jit(do_not_specialize=["tokens"])
def pool_input_gradient_kernel(
    mask, w1, w2, ds, weights, dy, window_of, dx, tokens, dim, hidden, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_M tokens and BLOCK_N columns, summed over BLOCK_K hidden units at a time."""
    WORDS: tl.constexpr = BLOCK_K // 32
    column_blocks = tl.cdiv(dim, BLOCK_N)
    rows = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.cdiv(hidden, 32)
    exists = (rows < tokens)[:, None]
    shifts = tl.arange(0, 32)[None, None, :]

    through = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # what reaches x through the hidden layer
    for j in range(0, hidden, BLOCK_K):
        word = j // 32 + tl.arange(0, WORDS)
        packed = tl.load(mask + rows[:, None] * words + word[None, :], mask=exists & (word < words)[None, :], other=0)
        bits = tl.reshape((packed[:, :, None] >> shifts) & 1, (BLOCK_M, BLOCK_K))
        units = j + tl.arange(0, BLOCK_K)
        out = tl.load(w2 + units, mask=units < hidden, other=0.0)
        left = tl.where(bits != 0, out[None, :], 0.0).to(w1.dtype.element_ty)
        live = (units < hidden)[:, None] & (columns < dim)[None, :]
        right = tl.load(w1 + units.to(tl.int64)[:, None] * dim + columns[None, :], mask=live, other=0.0)
        through = tl.dot(left, right, through, input_precision=PRECISION)

    slope = tl.load(ds + rows, mask=rows < tokens, other=0.0) * scale
    a = tl.load(weights + rows, mask=rows < tokens, other=0.0)
    window = tl.load(window_of + rows, mask=rows < tokens, other=0).to(tl.int64)
    live = exists & (columns < dim)[None, :]
    direct = tl.load(dy + window[:, None] * dim + columns[None, :], mask=live, other=0.0).to(tl.float32)
    gradient = a[:, None] * direct + slope[:, None] * through
    tl.store(dx + rows[:, None] * dim + columns[None, :], gradient.to(dx.dtype.element_ty), mask=live)


@triton.jit
def bits_of_units(mask, word, words, token, live, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bool (BLOCK_M, BLOCK_K): the bits of the units of some words for some tokens."""
    packed = tl.load(
        mask + token[None, :] * words + word[:, None], mask=live[None, :] & (word < words)[:, None], other=0
    )
    bits = (packed[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_K)) != 0


@triton.jit(do_not_specialize=["tokens", "share"])
def pool_unit_sums_kernel(
    mask, ds, x, sums, counts, tokens, dim, hidden, share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[s] = G and counts[s * column blocks + c] = g over the tokens of split s, and of part c of it.

    A program has BLOCK_M units, BLOCK_N columns of x and ``share`` tokens. g needs no x: the programs of the column
    blocks divide its tokens among themselves.
    """
    hidden_blocks, column_blocks = tl.cdiv(hidden, BLOCK_M), tl.maximum(tl.cdiv(dim, BLOCK_N), 1)
    column_block = tl.program_id(0) % column_blocks
    hidden_block = tl.program_id(0) // column_blocks % hidden_blocks
    split = (tl.program_id(0) // (column_blocks * hidden_blocks)).to(tl.int64)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    units = hidden_block * BLOCK_M + tl.arange(0, BLOCK_M)
    word = hidden_block * (BLOCK_M // 32) + tl.arange(0, BLOCK_M // 32)
    words = tl.cdiv(hidden, 32)
    begin = split * share
    end = tl.minimum(begin + share, tokens)

    G = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(begin, end, BLOCK_K):
        token = n + tl.arange(0, BLOCK_K)
        slope = tl.load(ds + token, mask=token < end, other=0.0).to(x.dtype.element_ty)
        bits = bits_of_units(mask, word, words, token, token < end, BLOCK_M, BLOCK_K)
        left = tl.where(bits, slope[None, :], 0.0).to(x.dtype.element_ty)
        live = (token < end)[:, None] & (columns < dim)[None, :]
        right = tl.load(x + token[:, None] * dim + columns[None, :], mask=live, other=0.0)
        G = tl.dot(left, right, G, input_precision=PRECISION)
    live = (units < hidden)[:, None] & (columns < dim)[None, :]
    tl.store(sums + (split * hidden + units)[:, None] * dim + columns[None, :], G, mask=live)

    part = tl.cdiv(tl.cdiv(share, column_blocks), BLOCK_K) * BLOCK_K
    begin += column_block * part
    end = tl.minimum(begin + part, end)
    g = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(begin, end, BLOCK_K):
        token = n + tl.arange(0, BLOCK_K)
        slope = tl.load(ds + token, mask=token < end, other=0.0)
        bits = bits_of_units(mask, word, words, token, token < end, BLOCK_M, BLOCK_K)
        g += tl.sum(tl.where(bits, slope[None, :], 0.0), axis=1)
    tl.store(counts + (split * column_blocks + column_block) * hidden + units, g, mask=units < hidden)


@triton.jit
def pool_weight_gradient_kernel(
    sums, counts, w1, b1, w2, dw1, db1, dw2, dim, hidden, splits, parts, scale,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dw1, db1, dw2 of BLOCK_R hidden units from G in ``splits`` and g in ``parts`` summands."""
    units = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = units < hidden
    columns = tl.arange(0, BLOCK_D)
    out = tl.load(w2 + units, mask=exists, other=0.0).to(tl.float32) * scale

    along = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for d in range(0, dim, BLOCK_D):
        live = exists[:, None] & (columns < dim - d)[None, :]
        at = units[:, None] * dim + (d + columns)[None, :]
        G = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for split in range(0, splits):
            G += tl.load(sums + (split * hidden + units)[:, None] * dim + (d + columns)[None, :], mask=live, other=0.0)
        along += G * tl.load(w1 + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dw1 + at, (out[:, None] * G).to(dw1.dtype.element_ty), mask=live)

    g = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        live = exists[:, None] & (part < parts)[None, :]
        g += tl.sum(tl.load(counts + part[None, :] * hidden + units[:, None], mask=live, other=0.0), axis=1)
    bias = tl.load(b1 + units, mask=exists, other=0.0).to(tl.float32)
    tl.store(db1 + units, (out * g).to(db1.dtype.element_ty), mask=exists)
    tl.store(dw2 + units, (scale * (tl.sum(along, axis=1) + bias * g)).to(dw2.dtype.element_ty), mask=exists)
