"""What the kernels of sparse_prefill share: which rows take part, which keys a query sees, and tiles of them.

The queries of a sequence that share a key/value head are one list, entry by entry, with the heads of the group inside:
a tile of it has one key tile and a tight causal bound, and a single query of a GQA model is a tile of GROUP rows.
Positions ascend, so what a query sees is a prefix of the sequence's keys: one number a row, found by bisection,
replaces the mask and bounds the loops.

An index is data. Entries out of range at the ends of a list are left out; in a list that does not ascend results are
unspecified, but nothing is read or written outside the tensors.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(program, blocks, heads, lists, section):
    """Block of a list, key/value head and sequence of a program. There are ``heads`` lists a sequence.

    Lists go in sections whose keys and values stay in L2. Inside one the last blocks come first: under causality
    they are the longest, and what starts last should be short.
    """
    start = program // (section * blocks) * section
    inside = tl.minimum(section, lists - start)
    rest = program - start * blocks
    one = start + rest % inside
    return blocks - 1 - rest // inside, one % heads, one // heads


@triton.jit
def entries(sequence, indices, cu_seqlens, capacity, bound, length):
    """Where a sequence's list begins and how long it is; without an index, every row."""
    if cu_seqlens is None:
        begin = 0
        count = length
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), capacity)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), begin), capacity)
        count = tl.minimum(end - begin, bound)
        if tl.load(indices + begin + count - 1, mask=count > 0, other=-1) >= length:
            count = count_below(indices, begin, count, length, False)
        if tl.load(indices + begin, mask=count > 0, other=0) < 0:
            wrong = count_below(indices, begin, count, 0, False)
            begin += wrong
            count -= wrong
    return begin, count


@triton.jit
def count_below(values, begin, count, limit, INCLUDED: tl.constexpr):
    """How many of the ascending ``values[begin : begin + count]`` are below ``limit``, a number or a vector of them."""
    step = 1
    while step <= count // 2:
        step *= 2
    found = limit * 0
    while step > 0:
        further = found + step
        inside = further <= count
        value = tl.load(values + begin + further - 1, mask=inside, other=0)
        below = value <= limit if INCLUDED else value < limit
        found = tl.where(inside & below, further, found)
        step //= 2
    return found


@triton.jit
def rows_of(indices, begin, entry, inside, length):
    """Rows of some entries of a list, and which of them exist."""
    if indices is None:
        rows = entry
        exists = inside
    else:
        rows = tl.load(indices + begin + entry, mask=inside, other=-1)
        exists = (rows >= 0) & (rows < length)
    return rows, exists


@triton.jit
def to_offset(value, WIDE: tl.constexpr):
    """64 bits where a batch item spans 2**31 elements; else 32, which saves the registers that loops lack."""
    return value.to(tl.int64) if WIDE else value


@triton.jit
def positions_of(indices, positions, begin, entry, inside, first):
    """Positions of some entries; without an index, entry e is at position ``first + e``."""
    if indices is None:
        found = first + entry
    elif positions is None:
        found = tl.load(indices + begin + entry, mask=inside, other=0)
    else:
        found = tl.load(positions + begin + entry, mask=inside, other=0)
    return found


@triton.jit
def keys_seen(
    entry, inside, q_indices, q_positions, q_begin, first, k_indices, k_positions, k_begin, k_count,
    CAUSAL: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """How many of a sequence's keys each query entry sees; all, which bounds nothing, where it is not ``inside``."""
    if not CAUSAL:
        seen = entry * 0 + k_count
    elif SAME:
        seen = entry + 1
    else:
        position = positions_of(q_indices, q_positions, q_begin, entry, inside, first)
        if k_indices is None:
            seen = tl.minimum(tl.maximum(position, -1) + 1, k_count)
        elif k_positions is None:
            seen = count_below(k_indices, k_begin, k_count, position, True)
        else:
            seen = count_below(k_positions, k_begin, k_count, position, True)
    return tl.where(inside, seen, k_count)


@triton.jit
def first_query(
    entry, inside, k_indices, k_positions, k_begin, first, q_indices, q_positions, q_begin, q_count,
    CAUSAL: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The first query entry that sees each key entry: :func:`keys_seen` from the other side. 0 where not ``inside``."""
    if not CAUSAL:
        found = entry * 0
    elif SAME:
        found = entry
    else:
        position = positions_of(k_indices, k_positions, k_begin, entry, inside, 0)
        if q_indices is None:
            found = tl.minimum(tl.maximum(position, first) - first, q_count)
        elif q_positions is None:
            found = count_below(q_indices, q_begin, q_count, position, False)
        else:
            found = count_below(q_positions, q_begin, q_count, position, False)
    return tl.where(inside, found, 0)


@triton.jit
def exponential(x, BASE2: tl.constexpr):
    """Scores of 16-bit inputs are in base 2, which folds a product into the scale. In fp32 that would cost digits."""
    return tl.exp2(x) if BASE2 else tl.exp(x)


@triton.jit
def logarithm(x, BASE2: tl.constexpr):
    return tl.log2(x) if BASE2 else tl.log(x)


@triton.jit
def to_base(x, BASE2: tl.constexpr):
    return x * LOG2E if BASE2 else x


@triton.jit
def from_base(x, BASE2: tl.constexpr):
    return x * LN2 if BASE2 else x


@triton.jit
def load_tile(tensor, offsets, exists, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Columns FIRST .. FIRST + WIDTH of the rows at ``offsets``; zeros beyond DIM and where a row does not exist."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = exists[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (column < DIM)[None, :]
    return tl.load(tensor + offsets[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(tensor, offsets, exists, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)
    mask = exists[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (column < DIM)[None, :]
    tl.store(tensor + offsets[:, None] + column[None, :], tile.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def rows_not_kept(program, blocks, indices, cu_seqlens, capacity, bound, length, BLOCK: tl.constexpr):
    """A block of the rows of a batch item: the item, the rows, and which of them its list lacks.

    Whoever owns a row that is listed writes it; these are for one of the programs behind those.
    """
    sequence = program // blocks
    begin, count = entries(sequence, indices, cu_seqlens, capacity, bound, length)
    rows = program % blocks * BLOCK + tl.arange(0, BLOCK)
    place = count_below(indices, begin, count, rows, False)
    listed = tl.load(indices + begin + place, mask=place < count, other=-1) == rows
    return sequence.to(tl.int64), rows.to(tl.int64), (rows < length) & ~listed


@triton.jit
def zero_rows(
    tensor, offsets, which, head_stride, heads, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):  # fmt: skip
    """Zeros in some rows of all heads."""
    for _ in range(heads):
        store_tile(tensor, offsets, which, tl.zeros([offsets.shape[0], D0], tl.float32), 0, D0, DIM)
        if D1:
            store_tile(tensor, offsets, which, tl.zeros([offsets.shape[0], D1], tl.float32), D0, D1, DIM)
        offsets += head_stride
