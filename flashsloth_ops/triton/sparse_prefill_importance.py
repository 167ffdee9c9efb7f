"""The attention that keys receive from listed rows: a second pass over those rows, once their log-sum-exp is known.

A program owns a tile of keys of one key/value head and adds up exp(score - lse) over the listed rows and the heads of
its group; a second launch adds the key/value heads in order, so results are deterministic.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from flashsloth_ops.triton.sparse_prefill_rows import (
    count_below,
    entries,
    keys_seen,
    load_tile,
    locate,
    rows_of,
)

INTEGERS = [
    "q_capacity", "q_bound", "q_length", "k_capacity", "k_bound", "k_length",
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "lse_batch", "lse_head", "lse_row",
    "listed_batch", "listed", "received_batch", "blocks", "heads", "lists", "section", "sequences",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def importance_kernel(
    q, k, lse, asking, partial,
    q_indices, q_cu_seqlens, q_positions, q_capacity, q_bound, q_length,
    k_indices, k_cu_seqlens, k_positions, k_capacity, k_bound, k_length,
    q_batch, q_head, q_row, k_batch, k_head, k_row, lse_batch, lse_head, lse_row,
    listed_batch, listed, blocks, heads, lists, section, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``partial`` (heads, sequences, k_bound): what the entries of a sequence receive through one key/value head,
    divided by the number of rows and heads that ask."""
    block, head, sequence = locate(tl.program_id(0), blocks, heads, lists, section)
    k_begin, k_count = entries(sequence, k_indices, k_cu_seqlens, k_capacity, k_bound, k_length)
    if block * BLOCK_N >= k_count:
        return
    q_begin, q_count = entries(sequence, q_indices, q_cu_seqlens, q_capacity, q_bound, q_length)
    item = (sequence * 0 if PACKED else sequence).to(tl.int64)
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, exists = rows_of(k_indices, k_begin, key, key < k_count, k_length)
    offsets = (item * k_batch + head.to(tl.int64) * k_head + rows.to(tl.int64) * k_row) * ALIGN
    k0 = load_tile(k, offsets, exists, 0, D0, DIM)
    k1 = load_tile(k, offsets, exists, D0, D1, DIM) if D1 else k0

    received = tl.zeros([BLOCK_N], tl.float32)
    taking_part = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, listed * GROUP, BLOCK_M):
        member = start + tl.arange(0, BLOCK_M)
        q_heads = (head * GROUP + member % GROUP).to(tl.int64)
        inside = member < listed * GROUP
        place = sequence.to(tl.int64) * listed_batch + member // GROUP
        row = tl.load(asking + place, mask=inside, other=-1)
        asks = (row >= 0) & (row < q_length)
        row = tl.where(asks, row, 0).to(tl.int32)
        entry = row
        if q_indices is not None:
            entry = count_below(q_indices, q_begin, q_count, row, False)
            asks = asks & (entry < q_count)
            asks = asks & (tl.load(q_indices + q_begin + entry, mask=asks, other=-1) == row)
        taking_part += asks.to(tl.int32)
        seen = keys_seen(
            entry, asks, q_indices, q_positions, q_begin, k_length - q_length, k_indices, k_positions, k_begin, k_count,
            CAUSAL, SAME,
        )  # fmt: skip
        row = row.to(tl.int64)
        q_offsets = (item * q_batch + q_heads * q_head + row * q_row) * ALIGN
        scores = tl.dot(load_tile(q, q_offsets, asks, 0, D0, DIM), k0.T, input_precision=PRECISION)
        if D1:
            scores = tl.dot(load_tile(q, q_offsets, asks, D0, D1, DIM), k1.T, scores, input_precision=PRECISION)
        log = tl.load(lse + item * lse_batch + q_heads * lse_head + row * lse_row, mask=asks, other=float("inf"))
        probs = tl.exp(scores * scale - log[:, None])
        sees = asks[:, None] & (key[None, :] < seen[:, None])
        received += tl.sum(tl.where(sees, probs, 0.0), 0)

    asked = tl.maximum(tl.sum(taking_part, 0) * heads, 1)
    place = (head.to(tl.int64) * (lists // heads) + sequence) * k_bound + key
    tl.store(partial + place, received / asked, mask=key < k_count)


@triton.jit(do_not_specialize=INTEGERS)
def importance_sum_kernel(
    partial, received, k_indices, k_cu_seqlens, k_positions, k_capacity, k_bound, k_length,
    received_batch, blocks, heads, sequences,
    PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the key/value heads and puts the sums where the rows of the entries are."""
    sequence = tl.program_id(0) // blocks
    begin, count = entries(sequence, k_indices, k_cu_seqlens, k_capacity, k_bound, k_length)
    key = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, exists = rows_of(k_indices, begin, key, key < count, k_length)
    place = sequence.to(tl.int64) * k_bound + key
    total = tl.zeros([BLOCK_N], tl.float32)
    for _ in range(heads):
        total += tl.load(partial + place, mask=exists, other=0.0)
        place += sequences.to(tl.int64) * k_bound
    item = (sequence * 0 if PACKED else sequence).to(tl.int64)
    tl.store(received + item * received_batch + rows, total, mask=exists)
