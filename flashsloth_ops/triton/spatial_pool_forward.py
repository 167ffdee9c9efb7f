"""Forward kernels of spatial attention pooling: scores of all tokens, then the windows.

A score is a sum over hidden units, so a program computes one tile of the hidden layer, reduces it to a partial score
a token and forgets it. The second kernel adds the partial scores in a fixed order. That makes small batches as parallel
as large ones: tiles of hidden units are programs too.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from flashsloth_ops.triton.spatial_pool_windows import window_box, window_tokens


@triton.jit
def dropout_keep(seed, threshold, rows, first_unit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """int8 (BLOCK_M, BLOCK_N): 1 where a unit is kept. Counters as ``reference.spatial_pool.dropout_keep`` has them."""
    QUADS: tl.constexpr = BLOCK_N // 4
    zero = tl.zeros((BLOCK_M, QUADS), tl.uint32)
    quad = (first_unit // 4 + tl.arange(0, QUADS)).to(tl.uint32)[None, :] + zero
    low = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None] + zero
    high = (rows >> 32).to(tl.uint32)[:, None] + zero
    k0, k1, k2, k3 = tl.philox(tl.load(seed), quad, low, high, zero)
    limit = threshold.to(tl.uint32)
    even = tl.join((k0 >= limit).to(tl.int8), (k2 >= limit).to(tl.int8))
    odd = tl.join((k1 >= limit).to(tl.int8), (k3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_N))


@triton.jit(do_not_specialize=["tokens", "threshold"])
def pool_scores_kernel(
    x, w1, b1, w2, seed, partial, mask, tokens, dim, hidden, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[h, n] = sum over the units of block h of w2 . dropout(relu(w1 x_n + b1)), and their bits in ``mask``.

    ``seed`` None: no dropout. ``mask`` None: bits are not wanted. Blocks of one token block are neighbours in launch
    order: they run together and share its rows of x in L2, where w1 stays all the time.
    """
    hidden_blocks = tl.cdiv(hidden, BLOCK_N)
    hidden_block = tl.program_id(0) % hidden_blocks
    rows = (tl.program_id(0) // hidden_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = hidden_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    # Rows beyond the end repeat the last one; their results are not stored.
    x += tl.minimum(rows, tokens - 1)[:, None] * dim + columns[None, :]
    w1 += tl.minimum(units, hidden - 1).to(tl.int64)[:, None] * dim + columns[None, :]

    pre = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, dim, BLOCK_K):
        live = columns[None, :] < dim - d
        left = tl.load(x + d, mask=live, other=0.0)
        right = tl.load(w1 + d, mask=live, other=0.0)
        pre = tl.dot(left, tl.trans(right), pre, input_precision=PRECISION)

    exists = units < hidden
    pre += tl.load(b1 + units, mask=exists, other=0.0).to(tl.float32)[None, :]
    on = (pre > 0) & exists[None, :]
    off = (pre <= 0) | ~exists[None, :]  # not the opposite of ``on``: NaN is neither, and goes through
    if seed is not None:
        keep = dropout_keep(seed, threshold, rows, hidden_block * BLOCK_N, BLOCK_M, BLOCK_N) != 0
        on = on & keep
        off = off | ~keep
    out = tl.load(w2 + units, mask=exists, other=0.0).to(tl.float32)
    score = tl.sum(tl.where(off, 0.0, pre) * out[None, :], axis=1) * scale
    tl.store(partial + hidden_block.to(tl.int64) * tokens + rows, score, mask=rows < tokens)

    if mask is not None:
        WORDS: tl.constexpr = BLOCK_N // 32
        bits = tl.where(on, tl.full((1, BLOCK_N), 1, tl.int32) << (tl.arange(0, BLOCK_N) % 32)[None, :], 0)
        packed = tl.sum(tl.reshape(bits, (BLOCK_M, WORDS, 32)), axis=2)
        words = tl.cdiv(hidden, 32)
        word = hidden_block * WORDS + tl.arange(0, WORDS)
        tl.store(
            mask + rows[:, None] * words + word[None, :],
            packed,
            mask=(rows < tokens)[:, None] & (word < words)[None, :],
        )


@triton.jit
def token_scores(partial, b2, token, live, tokens, splits, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr):
    """Scores of some tokens, -inf where there is none: the sum of their partial scores in a fixed order."""
    score = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        exists = (split < splits)[:, None] & live[None, :]
        part = tl.load(partial + split.to(tl.int64)[:, None] * tokens + token[None, :], mask=exists, other=0.0)
        score += tl.sum(part, axis=0)
    return tl.where(live, score + tl.load(b2).to(tl.float32), float("-inf"))


@triton.jit(do_not_specialize=["tokens", "windows", "images", "height", "width"])
def pool_windows_kernel(
    x, partial, b2, grids, y, weights, tokens, dim, splits,
    windows, images, height, width, window_height, window_width,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """y of one window and BLOCK_D columns: softmax of the window's scores, online in steps of BLOCK_T tokens.

    Programs go from the last window to the first: the rows of x that the scores read last are still in L2.
    """
    column_blocks = tl.maximum(tl.cdiv(dim, BLOCK_D), 1)
    column_block = tl.program_id(0) % column_blocks
    window = windows - 1 - (tl.program_id(0) // column_blocks).to(tl.int64)
    first, across, rows, cols = window_box(grids, images, height, width, window_height, window_width, window, BLOCK_B)
    columns = column_block * BLOCK_D + tl.arange(0, BLOCK_D)

    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    pooled = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, rows * cols, BLOCK_T):
        token, live = window_tokens(first, across, rows, cols, start, tokens, BLOCK_T)
        exists = live[:, None] & (columns < dim)[None, :]
        values = tl.load(x + token[:, None] * dim + columns[None, :], mask=exists, other=0.0).to(tl.float32)
        score = token_scores(partial, b2, token, live, tokens, splits, BLOCK_S, BLOCK_T)
        higher = tl.maximum(peak, tl.max(score, axis=0))
        mass = tl.exp(score - higher)
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(mass, axis=0)
        pooled = pooled * shrink + tl.sum(mass[:, None] * values, axis=0)
        peak = higher
    tl.store(y + window * dim + columns, (pooled / total).to(y.dtype.element_ty), mask=columns < dim)

    if column_block == 0:
        for start in range(0, rows * cols, BLOCK_T):
            token, live = window_tokens(first, across, rows, cols, start, tokens, BLOCK_T)
            score = token_scores(partial, b2, token, live, tokens, splits, BLOCK_S, BLOCK_T)
            tl.store(weights + token, tl.exp(score - peak) / total, mask=live)
