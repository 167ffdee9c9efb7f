"""Backward kernels of embedded-query attention.

Image, with P recomputed from the saved softmax, dP = dpooled x' and delta = sum of P dP / sum of P over a row:

    scores, dP and their sums          query_dscores_kernel
    P, ds = P (dP - delta), ds rstd        query_dsoftmax_kernel
    dy = rstd (ds' asked - y^ mean(ds S))   query_dy_kernel

Text: gradients of the attention to it (query_text_backward_kernel) and of the layer norms (query_norm_backward_kernel).
What is left are plain products, which the library computes.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from flashsloth_ops.triton.embedded_query_image import score_tile
from flashsloth_ops.triton.embedded_query_parts import hidden_row, row_product, rows_at


@triton.jit(do_not_specialize=["rows", "tokens"])
def query_dscores_kernel(
    asked, sums, y, mean, rstd, image_tokens, dpooled, softmax, scores, dprobs, parts,
    rows, tokens, width, inner, dim,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores and dP of a tile, in fp32, and the sums of P dP and of P over its tokens in ``parts``."""
    row_blocks, token_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(tokens, BLOCK_N)
    block = tl.program_id(0) // row_blocks % token_blocks
    image = (tl.program_id(0) // (row_blocks * token_blocks)).to(tl.int64)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    there, live = row < rows, token < tokens
    score = score_tile(
        asked, sums, y, mean, rstd, image, row, token, rows, tokens, inner, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    at = image * rows + row
    place = at[:, None] * width + token[None, :]
    tl.store(scores + place, score, mask=there[:, None])
    top = tl.load(softmax + at * 2, mask=there, other=0.0)
    total = tl.load(softmax + at * 2 + 1, mask=there, other=1.0)
    p = tl.where(live[None, :], tl.exp(score - top[:, None]) / total[:, None], 0.0)

    dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dp = row_product(
        rows_at(dpooled + image * rows * dim, row, rows, dim),
        rows_at(image_tokens + image * tokens * dim, token, tokens, dim),
        dp, 0, dim, BLOCK_K, PRECISION,
    )  # fmt: skip
    tl.store(dprobs + place, dp, mask=there[:, None])
    entry = parts + (at * token_blocks + block) * 2
    tl.store(entry, tl.sum(p * dp, axis=1), mask=there)
    tl.store(entry + 1, tl.sum(p, axis=1), mask=there)


@triton.jit(do_not_specialize=["rows", "tokens", "token_blocks"])
def query_dsoftmax_kernel(
    scores, dprobs, softmax, parts, rstd, probs, ds, along, rows, tokens, width, token_blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """P and ds rstd in the dtype of the inputs, and along = sum over the rows of a block of ds S, for each token.

    delta is the mean of the very dP it is subtracted from: a row of ds sums to zero, and so the gradient of the bias of
    y, a sum over tokens in which nearly all cancels, is not the rounding of another product.
    """
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(tokens, BLOCK_N)
    column_block = tl.program_id(0) % column_blocks
    row_block = tl.program_id(0) // column_blocks % row_blocks
    image = (tl.program_id(0) // (row_blocks * column_blocks)).to(tl.int64)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    there, live = row < rows, token < tokens
    exists = there[:, None] & live[None, :]
    at = image * rows + row
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, token_blocks, BLOCK_S):
        block = first + tl.arange(0, BLOCK_S)[None, :]
        entry = parts + (at[:, None] * token_blocks + block) * 2
        inside = there[:, None] & (block < token_blocks)
        weighted += tl.sum(tl.load(entry, mask=inside, other=0.0), axis=1)
        mass += tl.sum(tl.load(entry + 1, mask=inside, other=0.0), axis=1)
    delta = weighted / tl.where(there, mass, 1.0)

    top = tl.load(softmax + at * 2, mask=there, other=0.0)
    total = tl.load(softmax + at * 2 + 1, mask=there, other=1.0)
    place = at[:, None] * width + token[None, :]
    score = tl.load(scores + place, mask=exists, other=0.0)
    p = tl.where(exists, tl.exp(score - top[:, None]) / total[:, None], 0.0)
    d = p * (tl.load(dprobs + place, mask=exists, other=0.0) - delta[:, None])
    r = tl.load(rstd + image * tokens + token, mask=live, other=0.0)
    tl.store(probs + place, p.to(probs.dtype.element_ty), mask=exists)
    tl.store(ds + place, (d * r[None, :]).to(ds.dtype.element_ty), mask=exists)
    tl.store(along + (image * row_blocks + row_block) * tokens + token, tl.sum(d * score, axis=0), mask=live)


@triton.jit(do_not_specialize=["rows", "tokens", "along_blocks"])
def query_dy_kernel(
    ds, asked, along, y, mean, rstd, dy, rows, tokens, width, inner, along_blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dy of BLOCK_M tokens and BLOCK_N columns: the product over rows, less what goes through rstd."""
    token_blocks, column_blocks = tl.cdiv(tokens, BLOCK_M), tl.cdiv(inner, BLOCK_N)
    column = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(0) // column_blocks % token_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    image = (tl.program_id(0) // (token_blocks * column_blocks)).to(tl.int64)
    live, exists = token < tokens, column < inner
    ds += image * rows * width
    asked += image * rows * inner
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rows, BLOCK_K):
        row = (first + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
        left = tl.load(ds + row * width + token[None, :], mask=(row < rows) & live[None, :], other=0.0)
        right = tl.load(asked + row * inner + column[None, :], mask=(row < rows) & exists[None, :], other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
    sum_along = tl.zeros((BLOCK_M,), tl.float32)
    for block in range(along_blocks):
        sum_along += tl.load(along + (image * along_blocks + block) * tokens + token, mask=live, other=0.0)
    at = image * tokens + token
    r = tl.load(rstd + at, mask=live, other=0.0)
    center = tl.load(mean + at, mask=live, other=0.0)
    place = at[:, None] * inner + column[None, :]
    there = live[:, None] & exists[None, :]
    value = tl.load(y + place, mask=there, other=0.0).to(tl.float32)
    acc -= (sum_along * r * r / inner)[:, None] * (value - center[:, None])
    tl.store(dy + place, acc.to(dy.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["text_length"])
def query_text_backward_kernel(
    q, k, v, dtold, lengths, dq, dk, dv, queries, text_length, heads, head_dim, scale,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the attention to the text of one question and head; those of rows of padding are zero.

    The first pass over the text takes the softmax's sums and delta = sum of P dP, the second the gradients.
    """
    question, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inner = heads * head_dim
    query, unit = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    column = head * head_dim + unit
    own = (query < queries)[:, None] & (unit < head_dim)[None, :]
    at = (question * queries + query)[:, None] * inner + column[None, :]
    asks = tl.load(q + at, mask=own, other=0.0)
    d = tl.load(dtold + at, mask=own, other=0.0)
    length = text_length
    if lengths is not None:
        length = tl.load(lengths + question).to(tl.int32)
    peak = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    delta = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, length, BLOCK_T):
        text = start + tl.arange(0, BLOCK_T)
        place = (question * text_length + text)[:, None] * inner + column[None, :]
        live = (text < length)[:, None] & (unit < head_dim)[None, :]
        keys, values = tl.load(k + place, mask=live, other=0.0), tl.load(v + place, mask=live, other=0.0)
        scores = tl.dot(asks, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where((text < length)[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        p, shrink = tl.exp(scores - higher[:, None]), tl.exp(peak - higher)
        mass = mass * shrink + tl.sum(p, axis=1)
        dp = tl.dot(d, tl.trans(values), input_precision=PRECISION)
        delta = delta * shrink + tl.sum(p * dp, axis=1)
        peak = higher
    mass = tl.where(mass > 0, mass, 1.0)
    delta = delta / mass

    sum_dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, text_length, BLOCK_T):
        text = start + tl.arange(0, BLOCK_T)
        place = (question * text_length + text)[:, None] * inner + column[None, :]
        live = (text < length)[:, None] & (unit < head_dim)[None, :]
        keys, values = tl.load(k + place, mask=live, other=0.0), tl.load(v + place, mask=live, other=0.0)
        scores = tl.dot(asks, tl.trans(keys), input_precision=PRECISION) * scale
        both = (text < length)[None, :] & (query < queries)[:, None]
        p = tl.where(both, tl.exp(scores - peak[:, None]) / mass[:, None], 0.0)
        dp = tl.dot(d, tl.trans(values), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None]) * scale).to(asks.dtype)
        sum_dq = tl.dot(ds, keys, sum_dq, input_precision=PRECISION)
        there = (text < text_length)[:, None] & (unit < head_dim)[None, :]
        grad_k = tl.dot(tl.trans(ds), asks, input_precision=PRECISION)
        grad_v = tl.dot(tl.trans(p.to(asks.dtype)), d, input_precision=PRECISION)
        tl.store(dk + place, grad_k.to(dk.dtype.element_ty), mask=there)
        tl.store(dv + place, grad_v.to(dv.dtype.element_ty), mask=there)
    tl.store(dq + at, sum_dq.to(dq.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["rows_of_query", "rows_of_text", "text_length", "batch", "query_blocks"])
def query_norm_backward_kernel(
    hidden, lengths, gain_query, gain_text, dnormed, dhidden, parts,
    rows_of_query, rows_of_text, text_length, batch, inner, query_blocks, eps,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """dhidden of BLOCK_R rows, all of queries or all of texts, and their sums for gain and bias in ``parts``."""
    block = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    exists = columns < inner
    first, last, gain = rows_of_query + (block - query_blocks) * BLOCK_R, rows_of_query + rows_of_text, gain_text
    if block < query_blocks:
        first, last, gain = block * BLOCK_R, rows_of_query, gain_query
    g = tl.load(gain + columns, mask=exists, other=0.0).to(tl.float32)
    dgain = tl.zeros((BLOCK_E,), tl.float32)
    dbias = tl.zeros((BLOCK_E,), tl.float32)
    for row in range(first, tl.minimum(first + BLOCK_R, last)):
        kept, live = hidden_row(lengths, row, rows_of_query, text_length, batch, BLOCK_B)
        there = exists & live
        x = tl.load(hidden + kept * inner + columns, mask=there, other=0.0)
        mean = tl.sum(x, axis=0) / inner
        centred = tl.where(there, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / inner + eps)
        normal = centred * rstd
        at = tl.cast(row, tl.int64) * inner + columns
        d = tl.load(dnormed + at, mask=there, other=0.0).to(tl.float32)
        dgain += d * normal
        dbias += d
        d *= g
        dx = (d - tl.sum(d, axis=0) / inner - normal * (tl.sum(d * normal, axis=0) / inner)) * rstd
        tl.store(dhidden + at, tl.where(live, dx, 0.0).to(dhidden.dtype.element_ty), mask=exists)
    at = parts + tl.cast(block, tl.int64) * 2 * inner + columns
    tl.store(at, dgain, mask=exists)
    tl.store(at + inner, dbias, mask=exists)
