"""token_sparse_prefill: every backend against the specification, SDPA and its own contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashsloth_ops import TokenIndex, token_sparse_prefill, use_backend
from flashsloth_ops.reference import sparse_prefill as reference
from tests.ops.sparse_prefill_support import (
    attend,
    check_against_reference,
    make,
    moved,
    pack,
    packed_index,
    random_mask,
)
from tests.support import (
    BACKENDS,
    CUDA,
    DTYPES,
    EPS,
    INTERPRETER,
    PLACES,
    TRITON,
    Place,
    assert_error_rule,
    gradients,
    needs_extension,
)

CPU = Place("cpu")
FUSED = (pytest.param(CPU, marks=needs_extension, id="cpu"), *TRITON)


# ---- against the specification ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed: bool, causal: bool, backend: str) -> None:
    """Of the output and of the log-sum-exp; some rows are not kept, the first query sees no key when causal."""
    inputs = make(2, (4, 2), (6, 6), 5, torch.float64)
    q_mask, k_mask = random_mask(2, 6, 0.7, 1), random_mask(2, 6, 0.7, 2)
    q_mask[:, 0], k_mask[:, 0] = True, False
    if packed:
        inputs = [pack(t, [6, 4]) for t in inputs]
        index = packed_index(q_mask, [6, 4]), packed_index(k_mask, [6, 4])
    else:
        index = TokenIndex.from_mask(q_mask), TokenIndex.from_mask(k_mask)

    def run(*args: Tensor) -> Any:
        out, lse = token_sparse_prefill(*args, index, causal=causal, return_lse=True)
        return out, lse.clamp(min=-100)  # gradcheck cannot subtract infinities

    with use_backend(backend):
        assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


def test_backward_specification_matches_autograd() -> None:
    q, k, v = (t.requires_grad_() for t in make(2, (4, 2), (7, 9), 6, torch.float64))
    index = TokenIndex.from_mask(random_mask(2, 7, 0.6, 1)).shifted(2), TokenIndex.from_mask(random_mask(2, 9, 0.6, 2))
    out, lse, _ = reference.token_sparse_prefill(q, k, v, *index, causal=True, scale=0.3)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    want = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    got = reference.token_sparse_prefill_backward(dout, dlse, q, k, v, out, lse, *index, causal=True, scale=0.3)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "rows", "dim", "share"),
    [
        ((4, 4), (300, 300), 80, 0.25),
        ((2, 2), (600, 600), 72, None),
        ((6, 2), (130, 700), 64, 0.9),
        ((1, 1), (9, 1100), 256, None),
        ((4, 2), (300, 300), 80, None),
        ((2, 1), (300, 400), 72, 0.5),
        ((2, 2), (200, 200), 96, 0.6),
        ((2, 1), (200, 200), 128, None),
        ((2, 2), (100, 300), 20, 0.5),
        ((1, 1), (100, 100), 160, None),
    ],
)
@pytest.mark.parametrize("place", [*FUSED, *CUDA])
def test_error_rule(
    place: Place, heads: tuple[int, int], rows: tuple[int, int], dim: int, share: float | None, dtype: torch.dtype
) -> None:
    if dtype not in place.dtypes:
        pytest.skip(f"{dtype} is not served at {place}")
    if place.backend == "cuda" and dim not in (72, 80):
        pytest.skip("CUDA C++ serves head sizes 72 and 80")
    if place is INTERPRETER and rows[0] > 64:  # a little more than a tile each way
        heads, rows = (heads[0] // heads[1], 1), (70, 140 if rows[1] > rows[0] else 70)
    inputs = make(1, heads, rows, dim, dtype)
    index: Any = None
    if share is not None:
        q_index = TokenIndex.from_mask(random_mask(1, rows[0], share, 1)).shifted(rows[1] - rows[0])
        index = q_index, TokenIndex.from_mask(random_mask(1, rows[1], share, 2))
    listed = torch.arange(rows[0] - 9, rows[0])

    def run(*args: Tensor) -> Any:
        out, lse, importance = token_sparse_prefill(
            *args,
            moved(index, args[0].device.type),
            return_lse=True,
            importance_rows=listed.to(args[0].device),
        )
        return out, lse.clamp(min=-1e3), importance

    with place:
        fused, fused_grads = gradients(run, inputs, device=place.device)
    with use_backend("reference"):
        plain, plain_grads = gradients(run, inputs)
        exact, exact_grads = gradients(run, [t.double() for t in inputs])
    assert [t.dtype for t in fused] == [dtype, torch.float32, torch.float32]
    # exp(score - lse) of an lse that was stored, and rounded, in fp32: half a unit in its last place is relative there.
    lse = exact[1][exact[1] > -1e3]
    stored = EPS[torch.float32] * lse.abs().max().item()
    for name, f, p, e in zip(("out", "lse", "importance"), fused, plain, exact, strict=True):
        assert_error_rule(f, p, e, f.dtype, name, stored if name == "importance" else 0.0)
    for name, f, p, e in zip(("dq", "dk", "dv"), fused_grads, plain_grads, exact_grads, strict=True):
        assert_error_rule(f, p, e, dtype, name, stored)


SHAPES: dict[str, Any] = {
    "batch": st.integers(0, 3),
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 4),
    "rows": st.tuples(st.integers(0, 40), st.integers(0, 40)),
    "dim": st.one_of(st.integers(1, 24), st.sampled_from([64, 72, 80, 128, 255, 256])),
    "shares": st.tuples(st.sampled_from([None, 0.0, 0.4, 1.0]), st.sampled_from([None, 0.0, 0.4, 1.0])),
    "causal": st.booleans(),
    "listed": st.lists(st.integers(-3, 45), max_size=12),
}


@needs_extension
@settings(max_examples=120)
@given(**SHAPES)
def test_shapes(**shape: Any) -> None:
    """Empty batches and sequences, all rows dropped, more queries than keys, every head size and group."""
    check_shape(CPU, **shape)


@pytest.mark.parametrize("place", TRITON)
@settings(max_examples=25)
@given(**SHAPES)
def test_shapes_in_triton(place: Place, **shape: Any) -> None:
    check_shape(place, **shape)


def check_shape(
    place: Place,
    batch: int,
    kv_heads: int,
    group: int,
    rows: tuple[int, int],
    dim: int,
    shares: tuple[float | None, float | None],
    causal: bool,
    listed: list[int],
) -> None:
    inputs = make(batch, (kv_heads * group, kv_heads), rows, dim)
    index = tuple(
        None if share is None else TokenIndex.from_mask(random_mask(batch, n, share, 3 + n))
        for share, n in zip(shares, rows, strict=True)
    )
    check_against_reference(place, inputs, index, causal, torch.tensor(listed, dtype=torch.int32))


PACKED_SHAPES: dict[str, Any] = {
    "lengths": st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4),
    "dim": st.sampled_from([1, 7, 32, 80]),
    "share": st.sampled_from([0.0, 0.5, 1.0]),
    "causal": st.booleans(),
    "group": st.integers(1, 3),
}


@needs_extension
@settings(max_examples=60)
@given(**PACKED_SHAPES)
def test_packed_shapes(**shape: Any) -> None:
    """Sequences of any length, none too, that lie end to end; queries and keys of different lengths."""
    check_packed_shape(CPU, **shape)


@pytest.mark.parametrize("place", TRITON)
@settings(max_examples=15)
@given(**PACKED_SHAPES)
def test_packed_shapes_in_triton(place: Place, **shape: Any) -> None:
    check_packed_shape(place, **shape)


def check_packed_shape(
    place: Place, lengths: list[tuple[int, int]], dim: int, share: float, causal: bool, group: int
) -> None:
    q_lengths, k_lengths = [n for n, _ in lengths], [n for _, n in lengths]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(sum(q_lengths), 2 * group, dim, generator=generator)
    k, v = (torch.randn(sum(k_lengths), 2, dim, generator=generator) for _ in range(2))
    masks = [random_mask(len(lengths), 20, share, seed) for seed in (1, 2)]
    index = packed_index(masks[0], q_lengths), packed_index(masks[1], k_lengths)
    check_against_reference(place, [q, k, v], index, causal, torch.tensor([0, 5, 19, 33, 70]))


@pytest.mark.parametrize("place", FUSED)
def test_packed_sequences_in_any_order(place: Place) -> None:
    """Rows ascend within a sequence, not across sequences; some rows are in none."""
    q, k, v = (pack(t, [30]) for t in make(1, (2, 1), (30, 30), 8))
    sequences = [[20, 22, 23, 29], [3, 5, 6], [], [10, 11, 12, 17, 19]]
    bounds = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0).int()
    index = TokenIndex(torch.tensor([row for s in sequences for row in s]).int(), bounds, 5)
    check_against_reference(place, [q, k, v], index, True, torch.tensor([29, 5, 12, 0]))


# ---- against other ways to compute the same ----


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("place", FUSED)
def test_equals_sdpa(place: Place, causal: bool, heads: tuple[int, int]) -> None:
    batch, length = (1, 70) if place is INTERPRETER else (2, 200)
    inputs = make(batch, heads, (length, length), 80)
    gqa = {"enable_gqa": True} if heads[0] != heads[1] else {}
    got = gradients(lambda *a: F.scaled_dot_product_attention(*a, is_causal=causal, **gqa), inputs)
    want = attend(place, inputs, causal=causal, return_lse=False)
    keep = random_mask(batch, length, 0.4)
    kept = attend(place, inputs, TokenIndex.from_mask(keep), causal=causal, return_lse=False)
    mask = keep[:, None, :, None] & keep[:, None, None, :]
    mask = mask & torch.ones(length, length, dtype=torch.bool).tril() if causal else mask.expand(-1, 1, -1, -1)

    def masked(*args: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*args, attn_mask=mask, **gqa)
        return out.masked_fill(~keep[:, None, :, None], 0.0)

    want_kept = gradients(masked, inputs)
    got_all, want_all = ([*every[0], *every[1], *some[0], *some[1]] for every, some in ((got, kept), (want, want_kept)))
    for g, w in zip(got_all, want_all, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("share", [None, 0.5])
def test_chunked_prefill_equals_whole(share: float | None, place: Place) -> None:
    """Queries that follow a cache of keys: their own index, shifted, against all keys so far."""
    inputs = make(2, (4, 2), (50, 50), 16)
    q, k, v = (t.to(place.device) for t in inputs)
    mask = None if share is None else random_mask(2, 50, share)
    parts = []
    with place:
        index: Any = None if mask is None else moved(TokenIndex.from_mask(mask), place.device)
        whole = token_sparse_prefill(q, k, v, index)
        for start, end in ((0, 20), (20, 21), (21, 50)):
            if mask is not None:
                index = (
                    TokenIndex.from_mask(mask[:, start:end]).shifted(start),
                    TokenIndex.from_mask(mask[:, :end]),
                )
            chunk = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
            parts.append(token_sparse_prefill(*chunk, moved(index, place.device)))
    torch.testing.assert_close(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("place", PLACES)
def test_one_index_alone(place: Place) -> None:
    """A pair may leave out either side, which then keeps every row."""
    inputs = make(2, (2, 2), (12, 12), 8)
    mask, every = random_mask(2, 12, 0.5), torch.ones(2, 12, dtype=torch.bool)
    some, whole = TokenIndex.from_mask(mask), TokenIndex.from_mask(every)
    for pair, full in (((None, some), (whole, some)), ((some, None), (some, whole))):
        (got, got_grads), (want, want_grads) = (attend(place, inputs, index) for index in (pair, full))
        for g, w in zip([*got, *got_grads], [*want, *want_grads], strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_batched(causal: bool, place: Place) -> None:
    lengths = [7, 0, 19, 1]
    inputs = make(4, (4, 2), (19, 19), 8)
    packed = [pack(t, lengths) for t in inputs]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ragged = TokenIndex.from_lengths(torch.tensor(lengths), 19)
    listed = torch.tensor([[6, 2], [0, 1], [18, 18], [0, -1]])  # in the packed tensor: 6 2 | | 25 25 | 26
    listed_packed = torch.tensor([6, 2, 25, 25, 26])
    (out, lse, importance), _ = attend(place, inputs, ragged, importance_rows=listed, causal=causal)
    index = TokenIndex.from_cu_seqlens(bounds, sum(lengths), 19)
    got, _ = attend(place, packed, index, importance_rows=listed_packed, causal=causal)
    torch.testing.assert_close(got[0], pack(out, lengths))
    torch.testing.assert_close(got[1], pack(lse[..., None], lengths)[..., 0])
    torch.testing.assert_close(got[2], torch.cat([importance[b, :n] for b, n in enumerate(lengths)]))
    one = attend(place, packed, causal=causal)[0][0]  # without an index, one sequence
    want = attend(place, [t.transpose(0, 1)[None] for t in packed], causal=causal)[0][0]
    torch.testing.assert_close(one, want[0].transpose(0, 1))


@pytest.mark.parametrize("place", PLACES)
def test_importance_is_the_mean_attention(place: Place) -> None:
    """Written as its users write it: eager attention, softmax, mean over heads and rows."""
    inputs = make(2, (6, 2), (33, 33), 16)
    q, k, _ = inputs
    mask = random_mask(2, 33, 0.6)
    rows = torch.tensor([[32, 31, 5, 99, -1], [7, 7, 2, 0, 1]])
    scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) / 4
    allowed = torch.ones(33, 33, dtype=torch.bool).tril() & mask[:, None, None, :]
    attention = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0).mean(1)
    want = torch.zeros(2, 33)
    for b in range(2):
        valid = [r for r in rows[b].tolist() if 0 <= r < 33 and mask[b, r]]
        if valid:
            want[b] = attention[b, valid].mean(0)
    (out, _, importance), _ = attend(place, inputs, TokenIndex.from_mask(mask), importance_rows=rows)
    torch.testing.assert_close(importance, want)
    assert importance.dtype == torch.float32
    shared = attend(place, inputs, TokenIndex.from_mask(mask), importance_rows=rows[1])[0][2]
    torch.testing.assert_close(shared[1], want[1])
    nothing = attend(place, inputs, importance_rows=torch.zeros(0, dtype=torch.int64))[0][2]
    assert torch.equal(nothing, torch.zeros(2, 33))
    assert out.shape == q.shape


@pytest.mark.parametrize("place", FUSED)
def test_importance_of_many_rows_and_keys(place: Place) -> None:
    length = 150 if place is INTERPRETER else 700
    inputs = make(1, (4, 2), (length, length), 16)
    with use_backend("reference"):
        want = token_sparse_prefill(*inputs, importance_rows=torch.arange(length))[1]
    got = attend(place, inputs, importance_rows=torch.arange(length))[0][2]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.sum(), torch.tensor(1.0))
