"""Bad input of token_sparse_prefill: messages of the public op, and the raw op below its checks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashsloth_ops import TokenIndex, token_sparse_prefill
from flashsloth_ops import _library as library
from tests.ops.sparse_prefill_support import make, moved
from tests.support import TRITON, Place, needs_extension, poisoned

Q, K, V = make(2, (4, 2), (6, 6), 8)
INDEX = TokenIndex.from_mask(torch.ones(2, 6, dtype=torch.bool))
THREE = TokenIndex.from_mask(torch.ones(3, 6, dtype=torch.bool))
PACKED = (Q[0].transpose(0, 1), K[0].transpose(0, 1), V[0].transpose(0, 1))
ROWS = {"importance_rows": torch.tensor([1])}


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((None, K, V), {}, TypeError, "q: expected a tensor, got NoneType"),
        ((Q.int(), K, V), {}, TypeError, "q: expected float32, bfloat16, float16, float64, got int32"),
        ((Q, K.double(), V), {}, TypeError, "k: expected float32 as q, got float64"),
        ((Q, K, V.half()), {}, TypeError, "v: expected float32 as q, got float16"),
        ((Q, K.to("meta"), V), {}, ValueError, "k: expected device cpu as q, got meta"),
        ((Q[0, 0], K, V), {}, ValueError, "q: expected (B, Hq, Sq, d) or packed (Tq, Hq, d), got (6, 8)"),
        ((Q[..., :0], K[..., :0], V), {}, ValueError, "q: expected a head size of 1 or more, got (2, 4, 6, 0)"),
        ((Q, K[0], V), {}, ValueError, "k: expected shape (2, Hkv, Sk, 8) with the B and d of q, got (2, 6, 8)"),
        ((Q, K[:1], V), {}, ValueError, "k: expected shape (2, Hkv, Sk, 8) with the B and d of q, got (1, 2, 6, 8)"),
        ((Q, K[..., 1:], V), {}, ValueError, "k: expected shape (2, Hkv, Sk, 8) with the B and d of q"),
        ((PACKED[0], PACKED[1][..., 1:], PACKED[2]), {}, ValueError, "k: expected shape (Tk, Hkv, 8) with the d of q"),
        ((Q, K, V[:, :, 1:]), {}, ValueError, "v: expected shape (2, 2, 6, 8) as k, got (2, 2, 5, 8)"),
        (
            (Q[:, :3], K, V),
            {},
            ValueError,
            "k: expected a number of heads that divides the 3 of q, got 2",
        ),
        ((Q, K[:, :0], V[:, :0]), {}, ValueError, "k: expected a number of heads that divides the 4 of q, got 0"),
        ((Q, K, V, [INDEX]), {}, TypeError, "index: expected a TokenIndex, a pair of them or None, got list"),
        ((Q, K, V, (INDEX,)), {}, TypeError, "index: expected a TokenIndex, a pair of them or None, got tuple"),
        ((Q, K, V, (INDEX, Q)), {}, TypeError, "k_index: expected a TokenIndex or None, got Tensor"),
        (
            (Q[:, :, 2:], K, V, INDEX),
            {},
            ValueError,
            "index: expected a pair (q_index, k_index), as q has 4 rows and k 6, got one TokenIndex",
        ),
        ((Q, K, V, THREE), {}, ValueError, "index.cu_seqlens: expected shape (3,) for 2 sequences, got (4,)"),
        ((Q, K, V, (None, THREE)), {}, ValueError, "k_index.cu_seqlens: expected shape (3,) for 2 sequences"),
        ((Q[:, :, 2:], K, V, (INDEX, None)), {}, ValueError, "q_index.indices: expected rows in [0, 4), got 4"),
        (
            (*PACKED, (INDEX, None)),
            {},
            ValueError,
            "k_index: expected a TokenIndex of 2 sequences as the other has, got None (one sequence)",
        ),
        ((*PACKED, (None, INDEX)), {}, ValueError, "q_index: expected a TokenIndex of 2 sequences as the other has"),
        ((*PACKED, (INDEX, THREE)), {}, ValueError, "q_index.indices: expected each packed row once, got 0 twice"),
        ((Q, K, V), {"scale": "1"}, TypeError, "scale: expected a number or None, got str"),
        ((Q, K, V), {"importance_rows": [1]}, TypeError, "importance_rows: expected a tensor, got list"),
        (
            (Q, K, V),
            {"importance_rows": torch.tensor([1.0])},
            TypeError,
            "importance_rows: expected an integer tensor, got float32",
        ),
        (
            (Q, K, V),
            {"importance_rows": torch.tensor([True])},
            TypeError,
            "importance_rows: expected an integer tensor, got bool",
        ),
        (
            (Q, K, V),
            {"importance_rows": torch.zeros(3, 1, dtype=torch.int64)},
            ValueError,
            "importance_rows: expected shape (2, R) or (R,), got (3, 1)",
        ),
        (
            PACKED,
            {"importance_rows": torch.zeros(1, 1, dtype=torch.int64)},
            ValueError,
            "importance_rows: expected shape (R,) of rows of packed q, got (1, 1)",
        ),
        (
            (Q, K, V),
            {"importance_rows": torch.zeros(1, dtype=torch.int64, device="meta")},
            ValueError,
            "importance_rows: expected device cpu as q, got meta",
        ),
    ],
)
def test_errors(args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        token_sparse_prefill(*args, **options)


ANY_INDEX: dict[str, Any] = {
    "entries": st.lists(st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1]), max_size=12),
    "bounds": st.lists(st.sampled_from([-(2**31), -1, 0, 2, 4, 6, 12, 13, 2**31 - 1]), min_size=3, max_size=3),
    "positions": st.none() | st.lists(st.sampled_from([-(2**31), 0, 3, 2**31 - 1]), min_size=12, max_size=12),
    "packed": st.booleans(),
}


@needs_extension
@settings(max_examples=150)
@given(**ANY_INDEX)
def test_raw_op_stays_in_bounds(**index: Any) -> None:
    """Below the checks any index is served: what is wrong in it is ignored, and every output is written."""
    check_bounds(Place("cpu"), **index)


@pytest.mark.parametrize("place", TRITON)
@settings(max_examples=40)
@given(**ANY_INDEX)
def test_raw_op_stays_in_bounds_in_triton(place: Place, **index: Any) -> None:
    check_bounds(place, **index)


def check_bounds(
    place: Place, entries: list[int], bounds: list[int], positions: list[int] | None, packed: bool
) -> None:
    q, k, v = [t[0].transpose(0, 1).contiguous() for t in (Q, K, V)] if packed else [Q, K, V]
    rows = torch.tensor(entries, dtype=torch.int32)
    shifted = None if positions is None else torch.tensor(positions[: len(entries)], dtype=torch.int32)
    listed = torch.tensor([-(2**63), -1, 0, 5, 6, 2**63 - 1])
    q, k, v, rows, where, shifted, listed = (
        moved(t, place.device) for t in (q, k, v, rows, torch.tensor(bounds, dtype=torch.int32), shifted, listed)
    )
    index = (rows, where, shifted, 6)
    forward, backward = (library.kernel(op, place.backend) for op in ("sparse_prefill", "sparse_prefill_backward"))
    with poisoned():
        out, lse, importance = forward(q, k, v, *index, *index, True, 0.3, listed)
        grads = backward(torch.ones_like(out), None, q, k, v, out, lse, *index, *index, True, 0.3)
    for t in (out, importance, *grads):
        assert t.isfinite().all()
    assert not lse.isnan().any()
    kept = {e for e in entries if 0 <= e < 6}
    for row in set(range(6)) - kept:
        assert (out[row] == 0).all() if packed else (out[:, :, row] == 0).all()


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: Q[0]}, "q, k and v of four dimensions, or of three when packed"),
        ({1: K[:1]}, "q, k and v do not fit each other"),
        ({2: V[..., 1:]}, "q, k and v do not fit each other"),
        ({2: V.double()}, "q, k and v of one dtype"),
        ({0: Q[:, :3]}, "key heads must divide heads"),
        ({3: None}, "indices and cu_seqlens go together"),
        ({3: INDEX.indices.long()}, "int32 index tensors of one dimension"),
        ({5: INDEX.indices[1:]}, "positions as indices"),
        ({4: INDEX.cu_seqlens[1:]}, "the indices do not have the sequences of q and k"),
        ({8: INDEX.cu_seqlens[:0]}, "cu_seqlens with at least one entry"),
        ({13: torch.tensor([1], dtype=torch.int32)}, "int64 importance_rows (R,) or (B, R)"),
        ({13: torch.tensor([[1]])}, "expected importance_rows (B, R)"),
    ],
)
def test_raw_op_errors(change: dict[int, Any], message: str) -> None:
    args = [Q, K, V, *INDEX[:2], None, 6, *INDEX[:2], None, 6, True, 0.3, None]
    for at, value in change.items():
        args[at] = value
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.flashsloth.sparse_prefill(*args)


@needs_extension
@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, Q[:, :, 1:], "dout, dlse, out and lse do not fit q"),
        (1, torch.zeros(2, 4, 5), "dout, dlse, out and lse do not fit q"),
        (6, torch.zeros(2, 4, 7), "dout, dlse, out and lse do not fit q"),
        (5, Q.half(), "expected dout and out in the dtype of q"),
        (6, torch.zeros(2, 4, 6).double(), "lse and dlse in fp32"),
    ],
)
def test_raw_backward_errors(at: int, value: Tensor, message: str) -> None:
    none = (None, None, None, 0)
    args = [Q, None, Q, K, V, Q, torch.zeros(2, 4, 6), *none, *none, True, 0.3]
    args[at] = value
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.flashsloth.sparse_prefill_backward(*args)
