"""Attention over gathered rows: FlashAttention-2 (arXiv 2307.08691) for the output and its log-sum-exp.

A program owns a tile of queries of one key/value head and goes through the keys they see: first the tiles that every
query sees whole, without a mask, then those at the border. Head sizes are two tiles, D0 + D1 columns, so that 72 and 80
are 64 + 16 instead of 128; D1 is 0 where one power of two fits.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from flashsloth_ops.triton.sparse_prefill_rows import (
    entries,
    exponential,
    from_base,
    keys_seen,
    load_tile,
    locate,
    logarithm,
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
    "out_batch", "out_head", "out_row", "lse_batch", "lse_head", "lse_row",
    "blocks", "heads", "lists", "section", "fill_blocks", "splits",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def attention_kernel(
    q, k, v, out, lse, partial, partial_lse,
    q_indices, q_cu_seqlens, q_positions, q_capacity, q_bound, q_length,
    k_indices, k_cu_seqlens, k_positions, k_capacity, k_bound, k_length,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, lse_batch, lse_head, lse_row,
    blocks, heads, lists, section, fill_blocks, scale, splits,
    GROUP: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, SAME: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BASE2: tl.constexpr, FILL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Strides count ALIGN elements, which tells the compiler that rows are aligned for wide loads.

    Programs beyond ``blocks * lists`` write the rows that are not kept (FILL). With SPLIT, axis 1 divides the keys and
    results go to ``partial`` for :func:`combine_kernel`.
    """
    program = tl.program_id(0)
    if FILL:  # noqa: SIM102 - decided when compiled
        if program >= blocks * lists:
            if tl.program_id(1) > 0:
                return
            item, rows, missing = rows_not_kept(
                program - blocks * lists, fill_blocks, q_indices, q_cu_seqlens, q_capacity, q_bound, q_length, BLOCK_M
            )
            offsets = (item * out_batch + rows * out_row) * ALIGN
            zero_rows(out, offsets, missing, out_head * ALIGN, heads * GROUP, DIM, D0, D1)
            place = lse + item * lse_batch + rows * lse_row
            for _ in range(heads * GROUP):
                tl.store(place, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=missing)
                place += lse_head
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
    offsets = (item * q_batch + q_heads * q_head + rows * q_row) * ALIGN
    q0 = load_tile(q, offsets, exists, 0, D0, DIM)
    q1 = load_tile(q, offsets, exists, D0, D1, DIM) if D1 else q0

    low = 0
    high = tl.max(tl.where(exists, seen, 0))
    if SPLIT:
        share = tl.cdiv(tl.cdiv(high, BLOCK_N), splits) * BLOCK_N
        low = tl.minimum(tl.program_id(1) * share, high)
        high = tl.minimum(low + share, high)
    border = tl.maximum(tl.minimum(tl.min(seen) // BLOCK_N * BLOCK_N, high // BLOCK_N * BLOCK_N), low)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 else 1], tl.float32)
    peak, total, acc0, acc1 = through_keys(
        low, border, q0, q1, peak, total, acc0, acc1, k, v, k_row, v_row, k_indices, k_begin, k_length, seen,
        to_base(scale, BASE2), DIM, D0, D1, ALIGN, WIDE, False, PRECISION, BASE2, BLOCK_N,
    )  # fmt: skip
    peak, total, acc0, acc1 = through_keys(
        border, high, q0, q1, peak, total, acc0, acc1, k, v, k_row, v_row, k_indices, k_begin, k_length, seen,
        to_base(scale, BASE2), DIM, D0, D1, ALIGN, WIDE, True, PRECISION, BASE2, BLOCK_N,
    )  # fmt: skip

    empty = total == 0.0  # also keeps NaN, which is not 0
    total = tl.where(empty, 1.0, total)
    log = tl.where(empty, float("-inf"), peak + logarithm(total, BASE2))
    inverse = (1.0 / total)[:, None]
    if SPLIT:
        place = ((tl.program_id(1) * blocks * lists + program) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        tl.store(partial_lse + place, log)
        store_tile(partial, place * (D0 + D1), exists, acc0 * inverse, 0, D0, D0 + D1)
        if D1:
            store_tile(partial, place * (D0 + D1), exists, acc1 * inverse, D0, D1, D0 + D1)
    else:
        offsets = (item * out_batch + q_heads * out_head + rows * out_row) * ALIGN
        store_tile(out, offsets, exists, acc0 * inverse, 0, D0, DIM)
        if D1:
            store_tile(out, offsets, exists, acc1 * inverse, D0, D1, DIM)
        tl.store(lse + item * lse_batch + q_heads * lse_head + rows * lse_row, from_base(log, BASE2), mask=exists)


@triton.jit
def through_keys(
    low, high, q0, q1, peak, total, acc0, acc1, k, v, k_row, v_row, k_indices, k_begin, k_length, seen, scale,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BASE2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys low .. high; MASKED where not every query sees them all."""
    for start in range(low, high, BLOCK_N):
        entry = start + tl.arange(0, BLOCK_N)
        inside = entry < high if MASKED else tl.full([BLOCK_N], True, tl.int1)
        rows, exists = rows_of(k_indices, k_begin, entry, inside, k_length)
        k_offsets = to_offset(rows, WIDE) * k_row * ALIGN
        v_offsets = to_offset(rows, WIDE) * v_row * ALIGN
        scores = tl.dot(q0, load_tile(k, k_offsets, exists, 0, D0, DIM).T, input_precision=PRECISION)
        if D1:
            k1 = load_tile(k, k_offsets, exists, D0, D1, DIM)
            scores = tl.dot(q1, k1.T, scores, input_precision=PRECISION)
        scores *= scale
        if MASKED:
            scores = tl.where(entry[None, :] < seen[:, None], scores, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest  # a row that has seen no key yet
        probs = exponential(scores - base[:, None], BASE2)
        decay = exponential(peak - base, BASE2)
        total = total * decay + tl.sum(probs, 1)
        peak = highest
        probs = probs.to(v.dtype.element_ty)
        acc0 *= decay[:, None]
        v0 = load_tile(v, v_offsets, exists, 0, D0, DIM)
        acc0 = tl.dot(probs, v0, acc0, input_precision=PRECISION)
        if D1:
            acc1 *= decay[:, None]
            v1 = load_tile(v, v_offsets, exists, D0, D1, DIM)
            acc1 = tl.dot(probs, v1, acc1, input_precision=PRECISION)
    return peak, total, acc0, acc1


@triton.jit(do_not_specialize=INTEGERS)
def combine_kernel(
    out, lse, partial, partial_lse,
    q_indices, q_cu_seqlens, q_positions, q_capacity, q_bound, q_length,
    out_batch, out_head, out_row, lse_batch, lse_head, lse_row,
    blocks, heads, lists, section, splits,
    GROUP: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    PACKED: tl.constexpr, BASE2: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Weighted sum of the splits of one tile of queries."""
    program = tl.program_id(0)
    block, head, sequence = locate(program, blocks, heads, lists, section)
    begin, count = entries(sequence, q_indices, q_cu_seqlens, q_capacity, q_bound, q_length)
    if block * BLOCK_M >= count * GROUP:
        return
    item = (sequence * 0 if PACKED else sequence).to(tl.int64)
    member = block * BLOCK_M + tl.arange(0, BLOCK_M)
    heads_of = (head * GROUP + member % GROUP).to(tl.int64)
    rows, exists = rows_of(q_indices, begin, member // GROUP, member // GROUP < count, q_length)
    rows = rows.to(tl.int64)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 else 1], tl.float32)
    for split in range(splits):
        place = ((split * blocks * lists + program) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        log = tl.load(partial_lse + place)
        some = exists & (log != float("-inf"))  # NaN too
        highest = tl.maximum(peak, log)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        decay, weight = exponential(peak - base, BASE2), exponential(log - base, BASE2)
        total = total * decay + weight
        peak = highest
        part0 = load_tile(partial, place * (D0 + D1), some, 0, D0, D0 + D1)
        acc0 = acc0 * decay[:, None] + part0 * weight[:, None]
        if D1:
            part1 = load_tile(partial, place * (D0 + D1), some, D0, D1, D0 + D1)
            acc1 = acc1 * decay[:, None] + part1 * weight[:, None]

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    log = tl.where(empty, float("-inf"), peak + logarithm(total, BASE2))
    inverse = (1.0 / total)[:, None]
    offsets = (item * out_batch + heads_of * out_head + rows * out_row) * ALIGN
    store_tile(out, offsets, exists, acc0 * inverse, 0, D0, DIM)
    if D1:
        store_tile(out, offsets, exists, acc1 * inverse, D0, D1, DIM)
    tl.store(lse + item * lse_batch + heads_of * lse_head + rows * lse_row, from_base(log, BASE2), mask=exists)
