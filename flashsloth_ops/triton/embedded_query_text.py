"""The queries read the question: down-projection of query and text rows, layer norms, attention. Forward kernels.

Rows are the B*Q rows of the queries, then the B*T of the texts with their padding, which may hold NaN: a row of padding
is never multiplied, only replaced by zero.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from flashsloth_ops.triton.embedded_query_parts import hidden_row, row_product, rows_at


@triton.jit(do_not_specialize=["rows_of_query", "rows_of_text", "text_length"])
def query_down_kernel(
    query, text, lengths, weight, partial, rows_of_query, rows_of_text, text_length, model, inner, share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[s] = rows weight' over the s-th share of the model's dimensions. Blocks of padding alone are left out.

    Few rows against a wide weight: the sum is split so that enough programs stream the weight.
    """
    row_block, column_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    of_query = rows < rows_of_query
    of_text = tl.minimum(tl.maximum(rows - rows_of_query, 0), tl.maximum(rows_of_text - 1, 0))
    live = rows < rows_of_query + rows_of_text
    if lengths is not None:
        length = tl.load(lengths + of_text // text_length, mask=live & ~of_query, other=0)
        live = live & (of_query | (of_text % text_length < length))
    if tl.max(live.to(tl.int32), axis=0) == 0:
        return
    from_query = rows_at(query, rows, rows_of_query, model)
    from_text = rows_at(text, of_text, rows_of_text, model)
    source = tl.where((of_query | (rows_of_text == 0))[:, None], from_query, from_text)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * share
    last = tl.minimum(first + share, model)
    acc = row_product(source, rows_at(weight, columns, inner, model), acc, first, last, BLOCK_K, PRECISION)
    at = (split.to(tl.int64) * (rows_of_query + rows_of_text) + rows)[:, None] * inner + columns[None, :]
    tl.store(partial + at, acc, mask=live[:, None] & (columns < inner)[None, :])


@triton.jit(do_not_specialize=["rows_of_query", "rows_of_text", "text_length", "batch"])
def query_norm_kernel(
    partial, bias, lengths, gain_query, bias_query, gain_text, bias_text, hidden, normed,
    rows_of_query, rows_of_text, text_length, batch, inner, splits, eps,
    BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One row: adds up its shares, keeps it in ``hidden`` unless None, and normalises it; a row of padding is zero.

    ``partial`` None: the row is in ``hidden`` already.
    """
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    exists = columns < inner
    kept, live = hidden_row(lengths, row, rows_of_query, text_length, batch, BLOCK_B)
    if partial is None:
        x = tl.load(hidden + kept * inner + columns, mask=exists & live, other=0.0)
    else:
        rows = rows_of_query + rows_of_text
        x = tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)
        for split in range(splits):
            x += tl.load(partial + (tl.cast(split, tl.int64) * rows + row) * inner + columns, mask=exists, other=0.0)
        x = tl.where(exists & live, x, 0.0)
        if hidden is not None:
            tl.store(hidden + kept * inner + columns, x, mask=exists)

    mean = tl.sum(x, axis=0) / inner
    centred = tl.where(exists, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / inner + eps)
    gain, shift = gain_text, bias_text
    if row < rows_of_query:
        gain, shift = gain_query, bias_query
    g = tl.load(gain + columns, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(shift + columns, mask=exists, other=0.0).to(tl.float32)
    out = tl.where(live, centred * rstd * g + b, 0.0)
    tl.store(normed + row.to(tl.int64) * inner + columns, out.to(normed.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows_of_query", "text_length"])
def query_text_kernel(
    normed, lengths, wq, bq, wk, wv, bv, told, rows_of_query, queries, text_length, inner, head_dim, scale,
    HEADS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """told of one question and HEADS heads: projections, scores, online softmax and values, BLOCK_T texts at a time.

    The heads lie next to each other in BLOCK_C columns; rows are (head, query), zero outside the columns of their head.
    So one product serves all heads of the program, and a head of 18 columns need not be padded to 32.
    """
    question, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query_block = tl.program_id(2)
    QUERIES: tl.constexpr = BLOCK_R // HEADS
    row = tl.arange(0, BLOCK_R)
    head = row // QUERIES
    query = query_block * QUERIES + row % QUERIES
    column = tl.arange(0, BLOCK_C)
    units = group * HEADS * head_dim + column  # rows of the weights
    live_units = (column < HEADS * head_dim) & (units < inner)
    own = (column[None, :] // head_dim == head[:, None]) & live_units[None, :] & (query < queries)[:, None]

    asking = normed + (question * queries + tl.minimum(query, queries - 1))[:, None] * inner
    q = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    q = row_product(asking, rows_at(wq, units, inner, inner), q, 0, inner, BLOCK_K, PRECISION)
    q += tl.load(bq + units, mask=live_units, other=0.0).to(tl.float32)[None, :]
    q = tl.where(own, q, 0.0).to(normed.dtype.element_ty)

    length = text_length
    if lengths is not None:
        length = tl.load(lengths + question).to(tl.int32)
    weights_k, weights_v = rows_at(wk, units, inner, inner), rows_at(wv, units, inner, inner)
    first_text = normed + (rows_of_query + question * text_length) * inner
    inside = tl.arange(0, BLOCK_K)[None, :]
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, length, BLOCK_T):
        texts = start + tl.arange(0, BLOCK_T)
        read = rows_at(first_text, texts, length, inner)
        k = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        v = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for e in range(0, inner, BLOCK_K):
            live = inside < inner - e
            x = tl.load(read + e + inside, mask=live, other=0.0)
            k = tl.dot(x, tl.trans(tl.load(weights_k + e + inside, mask=live, other=0.0)), k, input_precision=PRECISION)
            v = tl.dot(x, tl.trans(tl.load(weights_v + e + inside, mask=live, other=0.0)), v, input_precision=PRECISION)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale
        scores = tl.where((texts < length)[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        p = tl.exp(scores - higher[:, None])
        shrink = tl.exp(peak - higher)
        mass = mass * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
        peak = higher
    out = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if length > 0:
        out = acc / mass[:, None] + tl.load(bv + units, mask=live_units, other=0.0).to(tl.float32)[None, :]
    at = (question * queries + query)[:, None] * inner + units[None, :]
    tl.store(told + at, out, mask=own)
