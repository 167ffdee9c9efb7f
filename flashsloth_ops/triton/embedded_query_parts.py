"""What the kernels of embedded-query attention share: a product of rows, and where rows of text lie."""

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
def text_spans(lengths, question, batch, text, BLOCK_B: tl.constexpr):
    """Of question b (a tensor of them): its length, the valid rows of text before it, and those of the whole batch."""
    if lengths is None:
        length = tl.zeros_like(question) + text
        before = question * text
        total = tl.zeros_like(question) + batch * text
    else:
        length = tl.load(lengths + question)
        before = tl.zeros_like(question)
        total = tl.zeros_like(question)
        for first in range(0, batch, BLOCK_B):
            others = first + tl.arange(0, BLOCK_B)[None, :]
            valid = tl.load(lengths + others, mask=others < batch, other=0)
            before += tl.sum(tl.where(others < question[:, None], valid, 0), axis=1)
            total += tl.sum(valid, axis=1)
    return length, before, total


@triton.jit
def packed_row(position, length, before, total, question, text):
    """Where ``hidden`` keeps a row of text: the valid rows of all questions first, then padding, which is zero there."""
    padding = total + question * text - before + position - length
    return tl.where(position < length, before + position, padding)
