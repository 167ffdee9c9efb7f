"""Gradients of attention over gathered rows: FlashAttention-2 (arXiv 2307.08691), algorithm 2, in two launches.

    delta = rowsum(dout * out) - dlse        dS = P * (dout v^T - delta)
    dq = scale dS k                          dk = scale dS^T q          dv = P^T dout

The first owns tiles of queries: it computes delta, which the second reads, and dq. The second owns tiles of keys and
goes through all queries of the group that see them. P is computed twice (seven products instead of five), and no
gradient is added to by two programs: results are deterministic, with no atomics and no partial sums in memory.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from flashsloth_ops.triton.sparse_prefill_rows import (
    entries,
    exponential,
    first_query,
    keys_seen,
    load_tile,
    locate,
    rows_not_kept,
    rows_of,
    store_tile,
    to_base,
    to_offset,
    zero_rows,
)

INTEGERS = [
    "q_capacity", "q_bound", "q_length", "k_capacity", "k_bound", "k_length",
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "out_batch", "out_head", "out_row", "dout_batch", "dout_head", "dout_row", "dq_batch", "dq_head", "dq_row",
    "dk_batch", "dk_head", "dk_row", "lse_batch", "lse_head", "lse_row",
    "blocks", "heads", "lists", "section", "fill_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def dq_kernel(
    q, k, v, out, dout, lse, dlse, delta, dq,
    q_indices, q_cu_seqlens, q_positions, q_capacity, q_bound, q_length,
    k_indices, k_cu_seqlens, k_positions, k_capacity, k_bound, k_length,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, dout_batch, dout_head, dout_row, dq_batch, dq_head, dq_row,
    lse_batch, lse_head, lse_row, blocks, heads, lists, section, fill_blocks, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr,
    BASE2: tl.constexpr, FILL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta, with the strides of lse, and dq. Programs beyond ``blocks * lists`` zero the rows that are not kept."""
    program = tl.program_id(0)
    if FILL:  # noqa: SIM102 - decided when compiled
        if program >= blocks * lists:
            item, rows, missing = rows_not_kept(
                program - blocks * lists, fill_blocks, q_indices, q_cu_seqlens, q_capacity, q_bound, q_length, BLOCK_M
            )
            offsets = (item * dq_batch + rows * dq_row) * ALIGN
            zero_rows(dq, offsets, missing, dq_head * ALIGN, heads * GROUP, DIM, D0, D1)
            return
    block, head, sequence = locate(program, blocks, heads, lists, section)
    q_begin, q_count = entries(sequence, q_indices, q_cu_seqlens, q_capacity, q_bound, q_length)
    if block * BLOCK_M >= q_count * GROUP:
        return
    k_begin, k_count = entries(sequence, k_indices, k_cu_seqlens, k_capacity, k_bound, k_length)
    item = (sequence * 0 if PACKED else sequence).to(tl.int64)
    k += item * k_batch * ALIGN + head.to(tl.int64) * k_head * ALIGN
    v += item * v_batch * ALIGN + head.to(tl.int64) * v_head * ALIGN

    member = block * BLOCK_M + tl.arange(0, BLOCK_M)
    entry = member // GROUP
    q_heads = (head * GROUP + member % GROUP).to(tl.int64)
    rows, exists = rows_of(q_indices, q_begin, entry, entry < q_count, q_length)
    seen = keys_seen(
        entry, exists, q_indices, q_positions, q_begin, k_length - q_length, k_indices, k_positions, k_begin, k_count,
        CAUSAL, SAME,
    )  # fmt: skip
    rows = rows.to(tl.int64)
    offsets = (item * dout_batch + q_heads * dout_head + rows * dout_row) * ALIGN
    out_offsets = (item * out_batch + q_heads * out_head + rows * out_row) * ALIGN
    do0 = load_tile(dout, offsets, exists, 0, D0, DIM)
    shift = tl.sum(do0.to(tl.float32) * load_tile(out, out_offsets, exists, 0, D0, DIM).to(tl.float32), 1)
    do1 = do0
    if D1:
        do1 = load_tile(dout, offsets, exists, D0, D1, DIM)
        shift += tl.sum(do1.to(tl.float32) * load_tile(out, out_offsets, exists, D0, D1, DIM).to(tl.float32), 1)
    place = item * lse_batch + q_heads * lse_head + rows * lse_row
    if dlse is not None:
        shift -= tl.load(dlse + place, mask=exists, other=0.0)
    tl.store(delta + place, shift, mask=exists)
    log = load_log(lse + place, exists, BASE2)
    offsets = (item * q_batch + q_heads * q_head + rows * q_row) * ALIGN
    q0 = load_tile(q, offsets, exists, 0, D0, DIM)
    q1 = load_tile(q, offsets, exists, D0, D1, DIM) if D1 else q0

    high = tl.max(tl.where(exists, seen, 0))
    border = tl.minimum(tl.min(seen), high) // BLOCK_N * BLOCK_N
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 else 1], tl.float32)
    acc0, acc1 = dq_through_keys(
        0, border, q0, q1, do0, do1, log, shift, acc0, acc1, k, v, k_row, v_row, k_indices, k_begin, k_length, seen,
        to_base(scale, BASE2), DIM, D0, D1, ALIGN, WIDE, False, PRECISION, BASE2, BLOCK_N,
    )  # fmt: skip
    acc0, acc1 = dq_through_keys(
        border, high, q0, q1, do0, do1, log, shift, acc0, acc1, k, v, k_row, v_row, k_indices, k_begin, k_length, seen,
        to_base(scale, BASE2), DIM, D0, D1, ALIGN, WIDE, True, PRECISION, BASE2, BLOCK_N,
    )  # fmt: skip
    offsets = (item * dq_batch + q_heads * dq_head + rows * dq_row) * ALIGN
    store_tile(dq, offsets, exists, acc0 * scale, 0, D0, DIM)
    if D1:
        store_tile(dq, offsets, exists, acc1 * scale, D0, D1, DIM)


@triton.jit
def load_log(places, exists, BASE2: tl.constexpr):
    """Log-sum-exps; infinity, so that probabilities are zero, for rows that see nothing or do not exist."""
    log = to_base(tl.load(places, mask=exists, other=float("inf")), BASE2)
    return tl.where(log == float("-inf"), float("inf"), log)


@triton.jit
def dq_through_keys(
    low, high, q0, q1, do0, do1, log, shift, acc0, acc1, k, v, k_row, v_row, k_indices, k_begin, k_length, seen,
    scale, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BASE2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what keys low .. high give; MASKED where not every query sees them all."""
    for start in range(low, high, BLOCK_N):
        entry = start + tl.arange(0, BLOCK_N)
        inside = entry < high if MASKED else tl.full([BLOCK_N], True, tl.int1)
        rows, exists = rows_of(k_indices, k_begin, entry, inside, k_length)
        k_offsets = to_offset(rows, WIDE) * k_row * ALIGN
        v_offsets = to_offset(rows, WIDE) * v_row * ALIGN
        k0 = load_tile(k, k_offsets, exists, 0, D0, DIM)
        v0 = load_tile(v, v_offsets, exists, 0, D0, DIM)
        scores = tl.dot(q0, k0.T, input_precision=PRECISION)
        dprobs = tl.dot(do0, v0.T, input_precision=PRECISION)
        if D1:
            k1 = load_tile(k, k_offsets, exists, D0, D1, DIM)
            v1 = load_tile(v, v_offsets, exists, D0, D1, DIM)
            scores = tl.dot(q1, k1.T, scores, input_precision=PRECISION)
            dprobs = tl.dot(do1, v1.T, dprobs, input_precision=PRECISION)
        probs = exponential(scores * scale - log[:, None], BASE2)
        dscores = probs * (dprobs - shift[:, None])
        if MASKED:
            dscores = tl.where(entry[None, :] < seen[:, None], dscores, 0.0)
        dscores = dscores.to(k.dtype.element_ty)
        acc0 = tl.dot(dscores, k0, acc0, input_precision=PRECISION)
        if D1:
            acc1 = tl.dot(dscores, k1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit(do_not_specialize=INTEGERS)
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv,
    q_indices, q_cu_seqlens, q_positions, q_capacity, q_bound, q_length,
    k_indices, k_cu_seqlens, k_positions, k_capacity, k_bound, k_length,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dout_batch, dout_head, dout_row, dk_batch, dk_head, dk_row,
    lse_batch, lse_head, lse_row, blocks, heads, lists, section, fill_blocks, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr,
    BASE2: tl.constexpr, FILL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv, which have the same strides. Programs beyond ``blocks * lists`` zero the rows that are not kept."""
    program = tl.program_id(0)
    if FILL:  # noqa: SIM102 - decided when compiled
        if program >= blocks * lists:
            item, rows, missing = rows_not_kept(
                program - blocks * lists, fill_blocks, k_indices, k_cu_seqlens, k_capacity, k_bound, k_length, BLOCK_N
            )
            offsets = (item * dk_batch + rows * dk_row) * ALIGN
            zero_rows(dk, offsets, missing, dk_head * ALIGN, heads, DIM, D0, D1)
            zero_rows(dv, offsets, missing, dk_head * ALIGN, heads, DIM, D0, D1)
            return
    block, head, sequence = locate(program, blocks, heads, lists, section)
    block = blocks - 1 - block  # under causality the first keys are seen by the most queries
    k_begin, k_count = entries(sequence, k_indices, k_cu_seqlens, k_capacity, k_bound, k_length)
    if block * BLOCK_N >= k_count:
        return
    q_begin, q_count = entries(sequence, q_indices, q_cu_seqlens, q_capacity, q_bound, q_length)
    item = (sequence * 0 if PACKED else sequence).to(tl.int64)
    q += item * q_batch * ALIGN
    dout += item * dout_batch * ALIGN
    lse += item * lse_batch
    delta += item * lse_batch

    entry = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, exists = rows_of(k_indices, k_begin, entry, entry < k_count, k_length)
    first = first_query(
        entry, exists, k_indices, k_positions, k_begin, k_length - q_length, q_indices, q_positions, q_begin, q_count,
        CAUSAL, SAME,
    )  # fmt: skip
    rows = rows.to(tl.int64)
    offsets = (item * k_batch + head.to(tl.int64) * k_head + rows * k_row) * ALIGN
    k0 = load_tile(k, offsets, exists, 0, D0, DIM)
    k1 = load_tile(k, offsets, exists, D0, D1, DIM) if D1 else k0
    offsets = (item * v_batch + head.to(tl.int64) * v_head + rows * v_row) * ALIGN
    v0 = load_tile(v, offsets, exists, 0, D0, DIM)
    v1 = load_tile(v, offsets, exists, D0, D1, DIM) if D1 else v0

    high = q_count * GROUP
    low = tl.min(tl.where(exists, first, q_count)) * GROUP // BLOCK_M * BLOCK_M
    border = tl.minimum(tl.maximum(tl.cdiv(tl.max(first) * GROUP, BLOCK_M) * BLOCK_M, low), high)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, D1 if D1 else 1], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1 if D1 else 1], tl.float32)
    dk0, dk1, dv0, dv1 = dkdv_through_queries(
        low, border, k0, k1, v0, v1, dk0, dk1, dv0, dv1, q, dout, lse, delta, q_head, q_row, dout_head, dout_row,
        lse_head, lse_row, head, q_indices, q_begin, q_count, q_length, first, to_base(scale, BASE2),
        GROUP, DIM, D0, D1, ALIGN, WIDE, True, PRECISION, BASE2, BLOCK_M,
    )  # fmt: skip
    dk0, dk1, dv0, dv1 = dkdv_through_queries(
        border, high, k0, k1, v0, v1, dk0, dk1, dv0, dv1, q, dout, lse, delta, q_head, q_row, dout_head, dout_row,
        lse_head, lse_row, head, q_indices, q_begin, q_count, q_length, first, to_base(scale, BASE2),
        GROUP, DIM, D0, D1, ALIGN, WIDE, False, PRECISION, BASE2, BLOCK_M,
    )  # fmt: skip
    offsets = (item * dk_batch + head.to(tl.int64) * dk_head + rows * dk_row) * ALIGN
    store_tile(dk, offsets, exists, dk0 * scale, 0, D0, DIM)
    store_tile(dv, offsets, exists, dv0, 0, D0, DIM)
    if D1:
        store_tile(dk, offsets, exists, dk1 * scale, D0, D1, DIM)
        store_tile(dv, offsets, exists, dv1, D0, D1, DIM)


@triton.jit
def dkdv_through_queries(
    low, high, k0, k1, v0, v1, dk0, dk1, dv0, dv1, q, dout, lse, delta, q_head, q_row, dout_head, dout_row,
    lse_head, lse_row, head, q_indices, q_begin, q_count, q_length, first, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BASE2: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds what members low .. high of the list of queries give; MASKED where not all of them see every key.

    Scores are transposed, keys by queries, so that they are the left operand of both products that follow.
    """
    for start in range(low, high, BLOCK_M):
        member = start + tl.arange(0, BLOCK_M)
        entry = member // GROUP
        q_heads = to_offset(head * GROUP + member % GROUP, WIDE)
        rows, exists = rows_of(q_indices, q_begin, entry, entry < q_count, q_length)
        rows = to_offset(rows, WIDE)
        q_offsets = (q_heads * q_head + rows * q_row) * ALIGN
        offsets = (q_heads * dout_head + rows * dout_row) * ALIGN
        place = q_heads * lse_head + rows * lse_row
        log = load_log(lse + place, exists, BASE2)
        shift = tl.load(delta + place, mask=exists, other=0.0)
        q0 = load_tile(q, q_offsets, exists, 0, D0, DIM)
        do0 = load_tile(dout, offsets, exists, 0, D0, DIM)
        scores = tl.dot(k0, q0.T, input_precision=PRECISION)
        dprobs = tl.dot(v0, do0.T, input_precision=PRECISION)
        if D1:
            q1 = load_tile(q, q_offsets, exists, D0, D1, DIM)
            do1 = load_tile(dout, offsets, exists, D0, D1, DIM)
            scores = tl.dot(k1, q1.T, scores, input_precision=PRECISION)
            dprobs = tl.dot(v1, do1.T, dprobs, input_precision=PRECISION)
        probs = exponential(scores * scale - log[None, :], BASE2)
        dscores = probs * (dprobs - shift[None, :])
        if MASKED:
            sees = exists[None, :] & (entry[None, :] >= first[:, None])
            probs = tl.where(sees, probs, 0.0)
            dscores = tl.where(sees, dscores, 0.0)
        probs = probs.to(q.dtype.element_ty)
        dscores = dscores.to(q.dtype.element_ty)
        dv0 = tl.dot(probs, do0, dv0, input_precision=PRECISION)
        dk0 = tl.dot(dscores, q0, dk0, input_precision=PRECISION)
        if D1:
            dv1 = tl.dot(probs, do1, dv1, input_precision=PRECISION)
            dk1 = tl.dot(dscores, q1, dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1
