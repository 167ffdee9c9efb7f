"""The queries read the image, absorbed: kernels of the image's state and of the forward pass.

    y = x Wd' + bd, with mean and rstd of its rows            query_state_kernel, query_statistics_kernel
    asked = (told Wq' + bq)_h K_h,  K = centred(Wk gain) scale   query_asked_kernel
    exp(score - largest of a block of tokens)                 query_scores_kernel
    pooled = softmax(score) x                                 query_pool_kernel
    seen = pooled_h Wv_h' + bv,  out = query + seen Wu' + bu      query_values_kernel, query_up_kernel

Rows of an image are (question, query, head), as in ``csrc/cpu``.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from flashsloth_ops.triton.embedded_query_parts import row_product, rows_at


@triton.jit(do_not_specialize=["rows"])
def query_state_kernel(
    image, weight, bias, y, partial, rows, dim, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a tile, and of each row the mean of its columns and the sum of their squared deviations: of y as rounded."""
    column_blocks = tl.cdiv(inner, BLOCK_N)
    column_block = tl.program_id(0) % column_blocks
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = row_product(
        rows_at(image, row, rows, dim), rows_at(weight, column, inner, dim), acc, 0, dim, BLOCK_K, PRECISION
    )
    exists = column < inner
    acc += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    rounded = acc.to(y.dtype.element_ty)
    tl.store(y + row[:, None] * inner + column[None, :], rounded, mask=(row < rows)[:, None] & exists[None, :])

    stored = rounded.to(tl.float32)
    count = tl.minimum(inner - column_block * BLOCK_N, BLOCK_N)
    mean = tl.sum(tl.where(exists[None, :], stored, 0.0), axis=1) / count
    deviation = tl.where(exists[None, :], stored - mean[:, None], 0.0)
    at = partial + (column_block.to(tl.int64) * rows + row) * 2
    tl.store(at, mean, mask=row < rows)
    tl.store(at + 1, tl.sum(deviation * deviation, axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def query_statistics_kernel(
    partial, mean, rstd, rows, inner, eps, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Mean and reciprocal deviation of rows from those of their blocks of BLOCK_N columns (Chan et al. 1979)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.arange(0, BLOCK_P)
    there = (row < rows)[:, None] & (block * BLOCK_N < inner)[None, :]
    at = partial + (block.to(tl.int64)[None, :] * rows + row[:, None]) * 2
    count = tl.where(block * BLOCK_N < inner, tl.minimum(inner - block * BLOCK_N, BLOCK_N), 0).to(tl.float32)[None, :]
    means = tl.load(at, mask=there, other=0.0)
    center = tl.sum(means * count, axis=1) / inner
    off = means - center[:, None]
    squares = tl.sum(tl.load(at + 1, mask=there, other=0.0) + off * off * count, axis=1)
    tl.store(mean + row, center, mask=row < rows)
    tl.store(rstd + row, 1.0 / tl.sqrt(squares / inner + eps), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def query_asked_kernel(
    told, wq, bq, wk, gain, asked, sums, rows, inner, heads, head_dim, scale,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """asked of one head, and the sums of its rows as rounded, which take the mean of y out of the scores."""
    head = tl.program_id(0) % heads
    row = (tl.program_id(0) // heads).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = tl.arange(0, BLOCK_D)
    is_unit = unit < head_dim
    units = head * head_dim + tl.minimum(unit, head_dim - 1)
    q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    q = row_product(rows_at(told, row, rows, inner), rows_at(wq, units, inner, inner), q, 0, inner, BLOCK_E, PRECISION)
    q += tl.load(bq + units, mask=is_unit, other=0.0).to(tl.float32)[None, :]
    q = tl.where(is_unit[None, :], q, 0.0).to(wk.dtype.element_ty)

    column = tl.arange(0, BLOCK_E)
    key = rows_at(wk, units, inner, inner)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for e in range(0, inner, BLOCK_E):
        live = column < inner - e
        g = tl.load(gain + e + column, mask=live, other=0.0).to(tl.float32)
        k = tl.load(key + e + column[None, :], mask=live[None, :], other=0.0).to(tl.float32)
        mean += tl.sum(k * g[None, :], axis=1)
    mean /= inner
    total = tl.zeros((BLOCK_M,), tl.float32)
    at = row * heads + head
    for e in range(0, inner, BLOCK_E):
        live = column < inner - e
        g = tl.load(gain + e + column, mask=live, other=0.0).to(tl.float32)
        k = tl.load(key + e + column[None, :], mask=live[None, :], other=0.0).to(tl.float32)
        absorbed = tl.where(live[None, :], (k * g[None, :] - mean[:, None]) * scale, 0.0)
        out = tl.dot(q, absorbed.to(q.dtype), input_precision=PRECISION).to(asked.dtype.element_ty)
        total += tl.sum(out.to(tl.float32), axis=1)
        there = (row < rows)[:, None] & live[None, :]
        tl.store(asked + at[:, None] * inner + e + column[None, :], out, mask=there)
    tl.store(sums + at, total, mask=row < rows)


@triton.jit
def score_tile(
    asked, sums, y, mean, rstd, image, row, token, rows, tokens, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores (BLOCK_M, BLOCK_N) of rows and tokens of an image: rstd (asked . y - mean sum(asked)).

    In exact arithmetic the sum is zero. Of asked as rounded it is not, and a token far from zero would show that.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = row_product(
        rows_at(asked + image * rows * inner, row, rows, inner),
        rows_at(y + image * tokens * inner, token, tokens, inner),
        acc, 0, inner, BLOCK_K, PRECISION,
    )  # fmt: skip
    live = token < tokens
    center = tl.load(mean + image * tokens + token, mask=live, other=0.0)
    total = tl.load(sums + image * rows + row, mask=row < rows, other=0.0)
    return (acc - total[:, None] * center[None, :]) * tl.load(rstd + image * tokens + token, mask=live, other=0.0)


@triton.jit(do_not_specialize=["rows", "tokens"])
def query_scores_kernel(
    asked, sums, y, mean, rstd, mass, blocks, rows, tokens, width, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mass = exp(score - peak) of a tile, with the peak and the sum of each row in ``blocks``.

    ``mass`` has rows of ``width`` numbers, whole blocks of tokens; beyond the last token they are zero.
    """
    row_blocks, token_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(tokens, BLOCK_N)
    block = tl.program_id(0) // row_blocks % token_blocks
    image = (tl.program_id(0) // (row_blocks * token_blocks)).to(tl.int64)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = score_tile(
        asked, sums, y, mean, rstd, image, row, token, rows, tokens, inner, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    scores = tl.where((token < tokens)[None, :], scores, float("-inf"))
    peak = tl.max(scores, axis=1)
    p = tl.exp(scores - peak[:, None])
    at = image * rows + row
    there = row < rows
    tl.store(mass + at[:, None] * width + token[None, :], p.to(mass.dtype.element_ty), mask=there[:, None])
    entry = blocks + (at * token_blocks + block) * 2
    tl.store(entry, peak, mask=there)
    tl.store(entry + 1, tl.sum(p, axis=1), mask=there)


@triton.jit
def softmax_row(blocks, at, there, token_blocks, BLOCK_S: tl.constexpr):
    """Largest score of rows and the sum of exp(score - largest), from those of their blocks; zeros without tokens."""
    top = tl.full(at.shape, float("-inf"), tl.float32)
    total = tl.zeros(at.shape, tl.float32)
    for first in range(0, token_blocks, BLOCK_S):
        block = first + tl.arange(0, BLOCK_S)[None, :]
        exists = there[:, None] & (block < token_blocks)
        entry = blocks + (at[:, None] * token_blocks + block) * 2
        peak = tl.load(entry, mask=exists, other=float("-inf"))
        higher = tl.maximum(top, tl.max(peak, axis=1))
        settled = tl.where(there, higher, 0.0)
        part = tl.load(entry + 1, mask=exists, other=0.0) * tl.exp(peak - settled[:, None])
        total = total * tl.exp(top - settled) + tl.sum(part, axis=1)
        top = higher
    return tl.where(there & (total > 0), top, 0.0), total


@triton.jit(do_not_specialize=["rows", "tokens", "images", "share"])
def query_pool_kernel(
    mass, blocks, image_tokens, pooled, softmax, images, rows, tokens, width, dim, share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pooled[s] = softmax x over the s-th share of the tokens, for BLOCK_M rows and BLOCK_N columns.

    The softmax's sum is known, so shares are simply added. TOKENS is the block of tokens of ``mass`` and ``blocks``.
    """
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(dim, BLOCK_N)
    place = tl.program_id(0) // row_blocks
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column_block = place % column_blocks
    image = (place // column_blocks).to(tl.int64)
    split = tl.program_id(1)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    token_blocks = tl.cdiv(tokens, TOKENS)
    there = row < rows
    at = image * rows + row
    top, total = softmax_row(blocks, at, there, token_blocks, BLOCK_S)
    if softmax is not None:  # noqa: SIM102 - this one is decided when compiling
        if (column_block == 0) & (split == 0):
            tl.store(softmax + at * 2, top, mask=there)
            tl.store(softmax + at * 2 + 1, total, mask=there)

    read = mass + (image * rows + tl.minimum(row, rows - 1))[:, None] * width
    exists = (column < dim)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(split * share, tl.minimum((split + 1) * share, tokens), BLOCK_K):
        token = first + tl.arange(0, BLOCK_K)
        peak = tl.load(blocks + (at * token_blocks + first // TOKENS) * 2, mask=there, other=0.0)
        p = tl.load(read + token[None, :]).to(tl.float32) * tl.exp(peak - top)[:, None]
        x = tl.load(
            rows_at(image_tokens + image * tokens * dim, token, tokens, dim) + column[None, :], mask=exists, other=0.0
        )
        acc = tl.dot(p.to(x.dtype), x, acc, input_precision=PRECISION)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out = pooled + (split.to(tl.int64) * images * rows + at)[:, None] * dim + column[None, :]
    tl.store(out, acc.to(pooled.dtype.element_ty), mask=there[:, None] & exists)


@triton.jit(do_not_specialize=["rows", "splits"])
def query_values_kernel(
    partial, weight, bias, pooled, seen, rows, heads, dim, value_dim, splits,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """seen of one head: its pooled image, added up over splits and kept in ``pooled`` unless None, projected.

    ``bias`` None: there are no tokens, and nothing is seen.
    """
    head = tl.program_id(0) % heads
    row = (tl.program_id(0) // heads).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = tl.arange(0, BLOCK_V)
    is_unit = unit < value_dim
    units = head * value_dim + tl.minimum(unit, value_dim - 1)
    there = (row < rows)[:, None]
    inside = tl.arange(0, BLOCK_K)[None, :]
    at = (row * heads + head)[:, None] * dim
    project = rows_at(weight, units, dim, dim)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for k in range(0, dim, BLOCK_K):
        live = inside < dim - k
        x = tl.load(partial + at + k + inside, mask=there & live, other=0.0).to(tl.float32)
        for split in range(1, splits):
            more = partial + tl.cast(split, tl.int64) * rows * heads * dim + at + k + inside
            x += tl.load(more, mask=there & live, other=0.0).to(tl.float32)
        if pooled is not None:
            tl.store(pooled + at + k + inside, x, mask=there & live)
        w = tl.load(project + k + inside, mask=live, other=0.0)
        acc = tl.dot(x.to(w.dtype), tl.trans(w), acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + units, mask=is_unit, other=0.0).to(tl.float32)[None, :]
    tl.store(seen + row[:, None] * heads * value_dim + units[None, :], acc, mask=there & is_unit[None, :])


@triton.jit(do_not_specialize=["rows"])
def query_up_kernel(
    seen, weight, bias, query, out, rows, dim, model,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = query + seen weight' + bias."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = row_product(
        rows_at(seen, row, rows, dim), rows_at(weight, column, model, dim), acc, 0, dim, BLOCK_K, PRECISION
    )
    exists = column < model
    there = (row < rows)[:, None] & exists[None, :]
    at = row[:, None] * model + column[None, :]
    acc += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    acc += tl.load(query + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows", "tokens"])
def query_weights_kernel(
    mass, blocks, weights, rows, tokens, width, heads, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Attention of one query row to TOKENS tokens, averaged over heads. ``rows``: of the whole batch, without heads."""
    token_blocks = tl.cdiv(tokens, TOKENS)
    block = tl.program_id(0) % token_blocks
    row = (tl.program_id(0) // token_blocks).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    mean = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        there = head < heads
        at = row * heads + head
        top, total = softmax_row(blocks, at, there, token_blocks, BLOCK_S)
        peak = tl.load(blocks + (at * token_blocks + block) * 2, mask=there, other=0.0)
        share = tl.where(there, tl.exp(peak - top) / tl.where(total > 0, total, 1.0), 0.0)
        p = tl.load(mass + at[:, None] * width + token[None, :], mask=there[:, None], other=0.0).to(tl.float32)
        mean += tl.sum(p * share[:, None], axis=0)
    tl.store(weights + row * tokens + token, mean / heads, mask=token < tokens)
