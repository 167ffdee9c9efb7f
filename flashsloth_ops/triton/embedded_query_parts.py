"""What the kernels of embedded-query attention share: a product of rows, and where ``hidden`` keeps a row."""

# mypy: allow-untyped-defs
import triton
import triton.language as tl


@triton.jit
def row_product(a, b, acc, first, last, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """acc + sum over k in [first, last) of a[m, k] b[n, k]. ``a`` (M, 1) and ``b`` (N, 1) point to rows.

    ``a`` is rounded to the dtype of ``b``: what forward keeps in fp32 meets weights in their own dtype.
    """
    columns = tl.arange(0, BLOCK_K)[None, :]
    for k in range(first, last, BLOCK_K):
        live = columns < last - k
        left = tl.load(a + k + columns, mask=live, other=0.0)
        right = tl.load(b + k + columns, mask=live, other=0.0)
        acc = tl.dot(left.to(right.dtype), tl.trans(right), acc, input_precision=PRECISION)
    return acc


@triton.jit
def rows_at(base, rows, count, width):
    """(M, 1) pointers to rows of a matrix. Rows beyond the end repeat the last; their results are not stored."""
    return base + tl.minimum(rows, count - 1).to(tl.int64)[:, None] * width


@triton.jit
def hidden_row(lengths, row, rows_of_query, text_length, batch, BLOCK_B: tl.constexpr):
    """Where ``hidden`` keeps a row, and whether it is one of padding.

    Query rows come first, then the valid rows of all texts, packed, then padding, which is zero there. How many valid
    rows lie before a text is summed here: the lengths are on the device.
    """
    row = tl.cast(row, tl.int64)
    kept = row
    live = row >= 0
    if lengths is not None:  # noqa: SIM102 - this one is decided when compiling
        if row >= rows_of_query:
            question = (row - rows_of_query) // text_length
            position = (row - rows_of_query) % text_length
            length = tl.load(lengths + question)
            before = tl.zeros((BLOCK_B,), tl.int64)
            total = tl.zeros((BLOCK_B,), tl.int64)
            for first in range(0, batch, BLOCK_B):
                others = first + tl.arange(0, BLOCK_B)
                valid = tl.load(lengths + others, mask=others < batch, other=0)
                before += tl.where(others < question, valid, 0)
                total += valid
            live = position < length
            # Rows of padding before this one: those of questions before it, and of its own.
            ahead = tl.sum(before, axis=0)
            padding = question * text_length - ahead + position - length
            kept = rows_of_query + tl.where(live, ahead + position, tl.sum(total, axis=0) + padding)
    return kept, live
