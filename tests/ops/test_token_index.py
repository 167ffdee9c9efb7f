"""TokenIndex: what each constructor keeps, and that nothing wrong gets past its checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashsloth_ops import TokenIndex, token_sparse_prefill


def lists(index: TokenIndex, positions: bool = False) -> list[list[int]]:
    """The kept rows (or their positions) of each sequence."""
    bounds = index.cu_seqlens.tolist()
    values = index.positions if positions else index.indices
    assert values is not None
    return [values[a:b].tolist() for a, b in pairwise(bounds)]


# ---- constructors ----


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 9), st.randoms(use_true_random=False))
def test_from_mask(batch: int, length: int, random: Any) -> None:
    rows = [[random.random() < 0.5 for _ in range(length)] for _ in range(batch)]
    index = TokenIndex.from_mask(torch.tensor(rows, dtype=torch.bool).reshape(batch, length))
    assert lists(index) == [[i for i, kept in enumerate(row) if kept] for row in rows]
    assert index.indices.shape == (batch * length,)
    assert index.indices.dtype == index.cu_seqlens.dtype == torch.int32
    assert index.max_seqlen == length
    assert index.positions is None


def test_from_mask_takes_any_strides() -> None:
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    assert lists(TokenIndex.from_mask(mask.T)) == [[0, 2], [1, 2]]


def test_from_lengths_clamps() -> None:
    index = TokenIndex.from_lengths(torch.tensor([2, 0, -3, 9]), 4)
    assert lists(index) == [[0, 1], [], [], [0, 1, 2, 3]]
    assert index.max_seqlen == 4
    assert lists(TokenIndex.from_lengths(torch.tensor([1, 0]), 0)) == [[], []]


def test_from_topk() -> None:
    scores = torch.tensor([[0.1, 3.0, 2.0, -1.0], [5.0, 4.0, 4.5, 9.0]])
    assert lists(TokenIndex.from_topk(scores, 2)) == [[1, 2], [0, 3]]
    assert lists(TokenIndex.from_topk(scores, 0)) == [[], []]
    assert lists(TokenIndex.from_topk(scores, 4)) == [[0, 1, 2, 3]] * 2
    assert lists(TokenIndex.from_topk(scores[:0], 2)) == []
    assert TokenIndex.from_topk(scores, 2).max_seqlen == 2


def test_from_cu_seqlens_counts_positions_in_each_sequence() -> None:
    index = TokenIndex.from_cu_seqlens(torch.tensor([0, 3, 3, 5]), 7, 3)
    assert lists(index) == [[0, 1, 2], [], [3, 4]]
    assert lists(index, positions=True) == [[0, 1, 2], [], [0, 1]]
    assert index.indices.shape == (7,)


@pytest.mark.parametrize("offset", [10, torch.tensor(10), torch.tensor([10, 10], dtype=torch.int16)])
def test_shifted(offset: int | Tensor) -> None:
    index = TokenIndex.from_mask(torch.tensor([[True, False, True], [False, True, True]]))
    moved = index.shifted(offset)
    assert lists(moved) == lists(index)
    assert lists(moved, positions=True) == [[10, 12], [11, 12]]
    assert lists(moved.shifted(-10), positions=True) == lists(index)
    assert moved.positions is not None
    assert moved.positions.dtype == torch.int32


def test_shifted_by_sequence_passes_over_empty_ones() -> None:
    index = TokenIndex.from_mask(torch.tensor([[False, False], [True, True], [False, False], [False, True]]))
    assert lists(index.shifted(torch.tensor([1, 20, 300, 4000])), positions=True) == [[], [20, 21], [], [4001]]
    assert lists(TokenIndex.from_mask(torch.ones(0, 3, dtype=torch.bool)).shifted(torch.zeros(0, dtype=int))) == []


def test_compiles_without_graph_breaks() -> None:
    def build(mask: Tensor, scores: Tensor, bounds: Tensor) -> Any:
        ragged = TokenIndex.from_lengths(mask.sum(1), mask.shape[1])
        return (
            TokenIndex.from_mask(mask).shifted(3),
            ragged.shifted(mask.sum(1)),
            TokenIndex.from_topk(scores, 2),
            TokenIndex.from_cu_seqlens(bounds, 7, 4),
        )

    torch._dynamo.reset()
    args = (torch.rand(3, 5) < 0.5, torch.randn(3, 5), torch.tensor([0, 3, 7]))
    compiled = torch.compile(build, fullgraph=True, backend="aot_eager")(*args)
    for got, want in zip(compiled, build(*args), strict=True):
        assert isinstance(got, TokenIndex)
        assert lists(got) == lists(want)
        assert got.max_seqlen == want.max_seqlen
        assert (got.positions is None) == (want.positions is None)


# ---- errors of the constructors ----

INDEX = TokenIndex.from_mask(torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TokenIndex.from_mask([True]), TypeError, "mask: expected a tensor, got list"),
        (lambda: TokenIndex.from_mask(torch.ones(2, 3)), TypeError, "mask: expected bool, got float32"),
        (lambda: TokenIndex.from_mask(torch.ones(3).bool()), ValueError, "mask: expected shape (B, S), got (3,)"),
        (
            lambda: TokenIndex.from_mask(torch.ones(1, 1).bool().expand(2**16, 2**15)),
            ValueError,
            "mask: expected fewer than 2**31 rows in all, the range of int32, got 2147483648",
        ),
        (lambda: TokenIndex.from_lengths(torch.ones(2), 3), TypeError, "lengths: expected an integer tensor, got"),
        (
            lambda: TokenIndex.from_lengths(torch.ones(2, 2).int(), 3),
            ValueError,
            "lengths: expected shape (B,), got (2, 2)",
        ),
        (
            lambda: TokenIndex.from_lengths(torch.ones(2).int(), -1),
            ValueError,
            "max_seqlen: expected 0 or more, got -1",
        ),
        (lambda: TokenIndex.from_topk(torch.ones(3), 1), ValueError, "scores: expected shape (B, S), got (3,)"),
        (
            lambda: TokenIndex.from_topk(torch.ones(2, 3), 4),
            ValueError,
            "k: expected 0 to 3 (the rows of a sequence), got 4",
        ),
        (lambda: TokenIndex.from_topk(torch.ones(2, 3), -1), ValueError, "k: expected 0 to 3"),
        (lambda: TokenIndex.from_cu_seqlens([0, 3], 3, 3), TypeError, "cu_seqlens: expected a tensor, got list"),
        (
            lambda: TokenIndex.from_cu_seqlens(torch.zeros(2, 2).int(), 3, 3),
            ValueError,
            "cu_seqlens: expected shape (B + 1,), got (2, 2)",
        ),
        (
            lambda: TokenIndex.from_cu_seqlens(torch.zeros(0).int(), 3, 3),
            ValueError,
            "cu_seqlens: expected shape (B + 1,) with at least one entry, got (0,)",
        ),
        (
            lambda: TokenIndex.from_cu_seqlens(torch.zeros(2).int(), -3, 3),
            ValueError,
            "total: expected 0 or more, got -3",
        ),
        (lambda: INDEX.shifted(torch.ones(2)), TypeError, "offset: expected an integer tensor, got float32"),
        (
            lambda: INDEX.shifted(torch.ones(3).int()),
            ValueError,
            "offset: expected shape (2,) or one number, got (3,)",
        ),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


# ---- errors of an index built by hand, as the op that takes it reports them ----


def attend(index: Any, packed: bool = False) -> Any:
    """On two sequences of three rows, or on six packed rows."""
    q = torch.ones(6, 1, 4) if packed else torch.ones(2, 1, 3, 4)
    return token_sparse_prefill(q, q, q, index)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


GOOD = TokenIndex(ints(0, 2, 1, 2, -7), ints(0, 2, 4), 2, ints(5, 9, 0, 0, -7))


def test_an_index_built_by_hand() -> None:
    assert attend(GOOD)[0, 0].bool().any(1).tolist() == [True, False, True]
    wide = TokenIndex(GOOD.indices.long(), GOOD.cu_seqlens.long(), 2)
    assert attend(wide)[1, 0].bool().any(1).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (GOOD._replace(indices=[0, 1]), TypeError, "index.indices: expected a tensor, got list"),
        (GOOD._replace(indices=GOOD.indices.float()), TypeError, "index.indices: expected an integer tensor, got"),
        (GOOD._replace(cu_seqlens=None), TypeError, "index.cu_seqlens: expected a tensor, got NoneType"),
        (GOOD._replace(positions=GOOD.indices.bool()), TypeError, "index.positions: expected an integer tensor, got"),
        (
            GOOD._replace(indices=GOOD.indices[None]),
            ValueError,
            "index.indices: expected shape (capacity,), got (1, 5)",
        ),
        (
            GOOD._replace(cu_seqlens=ints(0, 2)),
            ValueError,
            "index.cu_seqlens: expected shape (3,) for 2 sequences, got (2,)",
        ),
        (GOOD._replace(positions=ints(1, 2)), ValueError, "index.positions: expected shape (5,) as indices, got (2,)"),
        (
            GOOD._replace(indices=GOOD.indices.to("meta")),
            ValueError,
            "index.indices: expected device cpu as q, got meta",
        ),
        (
            GOOD._replace(cu_seqlens=ints(0, 2, 6)),
            ValueError,
            "index.cu_seqlens: expected an ascending list from 0 to at most 5 (the capacity), got [0, 2, 6]",
        ),
        (GOOD._replace(cu_seqlens=ints(1, 2, 4)), ValueError, "index.cu_seqlens: expected an ascending list from 0"),
        (GOOD._replace(cu_seqlens=ints(0, 4, 2)), ValueError, "index.cu_seqlens: expected an ascending list from 0"),
        (GOOD._replace(max_seqlen=2.0), TypeError, "index.max_seqlen: expected an int, got float"),
        (GOOD._replace(max_seqlen=1), ValueError, "index.max_seqlen: expected at least 2 as cu_seqlens, got 1"),
        (GOOD._replace(indices=ints(0, 3, 1, 2, 0)), ValueError, "index.indices: expected rows in [0, 3), got 3"),
        (GOOD._replace(indices=ints(-1, 2, 1, 2, 0)), ValueError, "index.indices: expected rows in [0, 3), got -1"),
        (
            GOOD._replace(indices=ints(0, 2, 2, 1, 0)),
            ValueError,
            "index.indices: expected rows that ascend within a sequence, got 2 before 1",
        ),
        (GOOD._replace(indices=ints(2, 2, 1, 2, 0)), ValueError, "index.indices: expected rows that ascend within"),
        (
            GOOD._replace(positions=ints(5, 4, 0, 0, 0)),
            ValueError,
            "index.positions: expected positions that never fall within a sequence, got 5 before 4",
        ),
    ],
)
def test_index_errors(index: TokenIndex, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        attend(index)


def test_a_packed_row_belongs_to_one_sequence() -> None:
    twice = TokenIndex(ints(0, 2, 2, 5), ints(0, 2, 4), 2)
    with pytest.raises(ValueError, match=re.escape("index.indices: expected each packed row once, got 2 twice")):
        attend(twice, packed=True)


def test_wrong_contents_under_compile_are_ignored() -> None:
    """Contents are data there: entries out of range, out of order and beyond the capacity have no effect."""
    wrong = TokenIndex(ints(0, 70000, 2, 1, 2, 2), ints(0, 3, 90), 3)
    right = TokenIndex(ints(0, 2, 1, 2), ints(0, 2, 4), 3)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(wrong), attend(right))
