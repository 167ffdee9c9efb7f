"""token_sparse_prefill: every backend against the specification, SDPA and its own contract."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashsloth_ops import TokenIndex, token_sparse_prefill, use_backend
from flashsloth_ops.reference import sparse_prefill as reference
from tests.support import (
    BACKENDS,
    DTYPES,
    ISAS,
    assert_error_rule,
    gradients,
    isa,
    needs_extension,
    poisoned,
    threads,
)


def make(
    batch: int,
    heads: tuple[int, int],
    rows: tuple[int, int],
    dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """q (B, Hq, Sq, d), k and v (B, Hkv, Sk, d)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads[0], rows[0], dim), *[(batch, heads[1], rows[1], dim)] * 2]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def random_mask(batch: int, length: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


def pack(t: Tensor, lengths: list[int]) -> Tensor:
    """(B, H, S, d) to packed (T, H, d), the first lengths[b] rows of each."""
    return torch.cat([t[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])


def packed_index(mask: Tensor, lengths: list[int]) -> TokenIndex:
    """The kept rows of sequences that lie end to end."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    kept = [mask[b, :n].nonzero().flatten() for b, n in enumerate(lengths)]
    rows = torch.cat([r + starts[b] for b, r in enumerate(kept)] or [torch.zeros(0)]).int()
    bounds = torch.tensor([0, *(len(r) for r in kept)]).cumsum(0).int()
    return TokenIndex(rows, bounds, max([0, *(len(r) for r in kept)]))


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


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "rows", "dim", "share"),
    [
        ((4, 4), (300, 300), 80, 0.25),
        ((2, 2), (600, 600), 72, None),  # more than one tile of keys, in place
        ((6, 2), (130, 700), 64, 0.9),
        ((1, 1), (9, 1100), 256, None),
    ],
)
def test_error_rule(
    heads: tuple[int, int], rows: tuple[int, int], dim: int, share: float | None, dtype: torch.dtype
) -> None:
    inputs = make(1, heads, rows, dim, dtype)
    index: Any = None
    if share is not None:
        q_index = TokenIndex.from_mask(random_mask(1, rows[0], share, 1)).shifted(rows[1] - rows[0])
        index = q_index, TokenIndex.from_mask(random_mask(1, rows[1], share, 2))

    def run(*args: Tensor) -> Any:
        out, lse, importance = token_sparse_prefill(
            *args, index, return_lse=True, importance_rows=torch.arange(rows[0] - 9, rows[0])
        )
        return out, lse.clamp(min=-1e3), importance

    fused, fused_grads = gradients(run, inputs)
    with use_backend("reference"):
        plain, plain_grads = gradients(run, inputs)
        exact, exact_grads = gradients(run, [t.double() for t in inputs])
    assert [t.dtype for t in fused] == [dtype, torch.float32, torch.float32]
    for name, f, p, e in zip(("out", "lse", "importance"), fused, plain, exact, strict=True):
        assert_error_rule(f, p, e, f.dtype, name)
    for name, f, p, e in zip(("dq", "dk", "dv"), fused_grads, plain_grads, exact_grads, strict=True):
        assert_error_rule(f, p, e, dtype, name)


@needs_extension
@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    rows=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    dim=st.one_of(st.integers(1, 24), st.sampled_from([64, 72, 80, 128, 255, 256])),
    shares=st.tuples(st.sampled_from([None, 0.0, 0.4, 1.0]), st.sampled_from([None, 0.0, 0.4, 1.0])),
    causal=st.booleans(),
    listed=st.lists(st.integers(-3, 45), max_size=12),
)
def test_shapes(
    batch: int,
    kv_heads: int,
    group: int,
    rows: tuple[int, int],
    dim: int,
    shares: tuple[float | None, float | None],
    causal: bool,
    listed: list[int],
) -> None:
    """Empty batches and sequences, all rows dropped, more queries than keys, every head size and group."""
    inputs = make(batch, (kv_heads * group, kv_heads), rows, dim)
    index = tuple(
        None if share is None else TokenIndex.from_mask(random_mask(batch, n, share, 3 + n))
        for share, n in zip(shares, rows, strict=True)
    )
    check_against_reference(inputs, index, causal, torch.tensor(listed, dtype=torch.int32))


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4),
    dim=st.sampled_from([1, 7, 32, 80]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    causal=st.booleans(),
    group=st.integers(1, 3),
)
def test_packed_shapes(lengths: list[tuple[int, int]], dim: int, share: float, causal: bool, group: int) -> None:
    """Sequences of any length, none too, that lie end to end; queries and keys of different lengths."""
    q_lengths, k_lengths = [n for n, _ in lengths], [n for _, n in lengths]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(sum(q_lengths), 2 * group, dim, generator=generator)
    k, v = (torch.randn(sum(k_lengths), 2, dim, generator=generator) for _ in range(2))
    masks = [random_mask(len(lengths), 20, share, seed) for seed in (1, 2)]
    index = packed_index(masks[0], q_lengths), packed_index(masks[1], k_lengths)
    check_against_reference([q, k, v], index, causal, torch.tensor([0, 5, 19, 33, 70]))


def check_against_reference(inputs: list[Tensor], index: Any, causal: bool, listed: Tensor) -> None:
    def run(*args: Tensor) -> Any:
        return token_sparse_prefill(*args, index, causal=causal, return_lse=True, importance_rows=listed)

    with poisoned():
        got, got_grads = gradients(run, inputs)
    with use_backend("reference"):
        want, want_grads = gradients(run, [t.double() for t in inputs])
    q, k, _ = inputs
    assert got[0].shape == q.shape
    assert got[1].shape == q.shape[:-1]
    assert got[2].shape == (k.shape[:1] if k.dim() == 3 else (k.shape[0], k.shape[2]))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-4, atol=1e-5)
    for g, w in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-3, atol=1e-4)


@needs_extension
@pytest.mark.parametrize(("rows", "count"), [((127, 127), 1), ((129, 640), 2), ((513, 513), 1), ((1030, 1030), 1)])
def test_lengths_around_the_tiles(rows: tuple[int, int], count: int) -> None:
    inputs = make(count, (2, 1), rows, 16)
    check_against_reference(inputs, None, True, torch.tensor([0, rows[0] - 1]))
    index = tuple(TokenIndex.from_mask(random_mask(count, n, 0.8, n)) for n in rows)
    check_against_reference(inputs, index, True, torch.tensor([0, rows[0] - 1]))


# ---- against other ways to compute the same ----


@needs_extension
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_sdpa(causal: bool, heads: tuple[int, int]) -> None:
    inputs = make(2, heads, (200, 200), 80)
    gqa = {"enable_gqa": True} if heads[0] != heads[1] else {}
    got = gradients(lambda *a: token_sparse_prefill(*a, causal=causal), inputs)
    want = gradients(lambda *a: F.scaled_dot_product_attention(*a, is_causal=causal, **gqa), inputs)
    keep = random_mask(2, 200, 0.4)
    kept = gradients(lambda *a: token_sparse_prefill(*a, TokenIndex.from_mask(keep), causal=causal), inputs)
    mask = keep[:, None, :, None] & keep[:, None, None, :]
    mask = mask & torch.ones(200, 200, dtype=torch.bool).tril() if causal else mask.expand(2, 1, 200, 200)

    def masked(*args: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*args, attn_mask=mask, **gqa)
        return out.masked_fill(~keep[:, None, :, None], 0.0)

    want_kept = gradients(masked, inputs)
    got_all, want_all = ([*every[0], *every[1], *some[0], *some[1]] for every, some in ((got, kept), (want, want_kept)))
    for g, w in zip(got_all, want_all, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [None, 0.5])
def test_chunked_prefill_equals_whole(share: float | None, backend: str) -> None:
    """Queries that follow a cache of keys: their own index, shifted, against all keys so far."""
    q, k, v = make(2, (4, 2), (50, 50), 16)
    mask = None if share is None else random_mask(2, 50, share)
    parts = []
    with use_backend(backend):
        whole = token_sparse_prefill(q, k, v, None if mask is None else TokenIndex.from_mask(mask))
        for start, end in ((0, 20), (20, 21), (21, 50)):
            index = None
            if mask is not None:
                index = (
                    TokenIndex.from_mask(mask[:, start:end]).shifted(start),
                    TokenIndex.from_mask(mask[:, :end]),
                )
            parts.append(token_sparse_prefill(q[:, :, start:end], k[:, :, :end], v[:, :, :end], index))
    torch.testing.assert_close(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_index_alone(backend: str) -> None:
    """A pair may leave out either side, which then keeps every row."""
    q, k, v = make(2, (2, 2), (12, 12), 8)
    mask, every = random_mask(2, 12, 0.5), torch.ones(2, 12, dtype=torch.bool)
    some, whole = TokenIndex.from_mask(mask), TokenIndex.from_mask(every)
    with use_backend(backend):
        torch.testing.assert_close(
            token_sparse_prefill(q, k, v, (None, some)), token_sparse_prefill(q, k, v, (whole, some))
        )
        torch.testing.assert_close(
            token_sparse_prefill(q, k, v, (some, None)), token_sparse_prefill(q, k, v, (some, whole))
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_batched(causal: bool, backend: str) -> None:
    lengths = [7, 0, 19, 1]
    inputs = make(4, (4, 2), (19, 19), 8)
    packed = [pack(t, lengths) for t in inputs]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ragged = TokenIndex.from_lengths(torch.tensor(lengths), 19)
    listed = torch.tensor([[6, 2], [0, 1], [18, 18], [0, -1]])  # in the packed tensor: 6 2 | | 25 25 | 26
    listed_packed = torch.tensor([6, 2, 25, 25, 26])
    options: dict[str, Any] = {"causal": causal, "return_lse": True}
    with use_backend(backend):
        out, lse, importance = token_sparse_prefill(*inputs, ragged, importance_rows=listed, **options)
        index = TokenIndex.from_cu_seqlens(bounds, sum(lengths), 19)
        got = token_sparse_prefill(*packed, index, importance_rows=listed_packed, **options)
    torch.testing.assert_close(got[0], pack(out, lengths))
    torch.testing.assert_close(got[1], pack(lse[..., None], lengths)[..., 0])
    torch.testing.assert_close(got[2], torch.cat([importance[b, :n] for b, n in enumerate(lengths)]))
    one = token_sparse_prefill(*packed, causal=causal)  # without an index, one sequence
    want = token_sparse_prefill(*(t.transpose(0, 1)[None] for t in packed), causal=causal)
    torch.testing.assert_close(one, want[0].transpose(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_importance_is_the_mean_attention(backend: str) -> None:
    """Written as its users write it: eager attention, softmax, mean over heads and rows."""
    q, k, v = make(2, (6, 2), (33, 33), 16)
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
    with use_backend(backend):
        out, importance = token_sparse_prefill(q, k, v, TokenIndex.from_mask(mask), importance_rows=rows)
        torch.testing.assert_close(importance, want)
        assert importance.dtype == torch.float32
        shared = token_sparse_prefill(q, k, v, TokenIndex.from_mask(mask), importance_rows=rows[1])[1]
        torch.testing.assert_close(shared[1], want[1])
        nothing = token_sparse_prefill(q, k, v, importance_rows=torch.zeros(0, dtype=torch.int64))[1]
        assert torch.equal(nothing, torch.zeros(2, 33))
    assert out.shape == q.shape


@needs_extension
def test_importance_of_many_rows_and_keys() -> None:
    q, k, v = make(1, (4, 2), (700, 700), 16)
    with use_backend("reference"):
        want = token_sparse_prefill(q, k, v, importance_rows=torch.arange(700))[1]
    got = token_sparse_prefill(q, k, v, importance_rows=torch.arange(700))[1]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.sum(), torch.tensor(1.0))


# ---- the promises of the op ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_not_kept_may_hold_anything(packed: bool, backend: str) -> None:
    inputs = make(2, (4, 2), (40, 40), 8)
    mask = random_mask(2, 40, 0.5)
    index = packed_index(mask, [40, 40]) if packed else TokenIndex.from_mask(mask)
    spoiled = [t.masked_fill(~mask[:, None, :, None], torch.nan) for t in inputs]
    dropped = ~mask.reshape(-1) if packed else ~mask[:, None, :, None].transpose(1, 2)[..., 0, 0]
    if packed:
        inputs, spoiled = ([pack(t, [40, 40]) for t in ts] for ts in (inputs, spoiled))

    def run(*args: Tensor) -> Any:
        return token_sparse_prefill(*args, index, return_lse=True, importance_rows=torch.tensor([39, 38]))

    with use_backend(backend):
        want, want_grads = gradients(run, inputs)
        got, grads = gradients(run, spoiled)
    for g, w in zip([*got, *grads], [*want, *want_grads], strict=True):
        assert torch.equal(g, w)
    for t in (got[0], *grads):
        rows = t if packed else t.transpose(1, 2)
        assert (rows[dropped] == 0).all()
    assert (got[1] if packed else got[1].transpose(1, 2))[dropped].isneginf().all()


@needs_extension
def test_gradient_into_rows_not_kept_is_ignored() -> None:
    q, k, v = (t.requires_grad_() for t in make(1, (2, 2), (20, 20), 8))
    mask = random_mask(1, 20, 0.5)
    out, lse = token_sparse_prefill(q, k, v, TokenIndex.from_mask(mask), return_lse=True)
    dropped = ~mask[:, None, :]
    clean = [torch.randn_like(out), torch.randn_like(lse)]
    spoiled = [clean[0].masked_fill(dropped[..., None], torch.nan), clean[1].masked_fill(dropped, torch.nan)]
    want = torch.autograd.grad((out, lse), (q, k, v), clean, retain_graph=True)
    for g, w in zip(torch.autograd.grad((out, lse), (q, k, v), spoiled), want, strict=True):
        assert torch.equal(g, w)


def strided(name: str, t: Tensor) -> Tensor:
    """The same values in another memory layout."""
    if name == "token major":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if name == "head size outside":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if name == "every other row":
        return torch.stack([t, t * torch.nan], 3).flatten(2, 3)[:, :, ::2]
    assert name == "slice of a fused projection"
    return torch.cat([t, t * torch.nan, t * torch.nan], -1)[..., : t.shape[-1]]


@needs_extension
@pytest.mark.parametrize(
    "layout", ["token major", "head size outside", "every other row", "slice of a fused projection"]
)
@pytest.mark.parametrize("indexed", [False, True])
def test_strides(layout: str, indexed: bool) -> None:
    inputs = make(2, (4, 2), (70, 70), 12)
    index = TokenIndex.from_mask(random_mask(2, 70, 0.5)) if indexed else None
    others = [strided(layout, t) for t in inputs]
    assert not any(t.is_contiguous() for t in others)
    args = [t.requires_grad_() for t in inputs]
    out = token_sparse_prefill(*args, index)
    got = token_sparse_prefill(*(t.detach().requires_grad_() for t in others), index)
    torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-6)
    dout = torch.randn_like(out)
    leaves = [t.detach().requires_grad_() for t in others]
    grads = torch.autograd.grad(token_sparse_prefill(*leaves, index), leaves, strided(layout, dout))
    for g, w in zip(grads, torch.autograd.grad(out, args, dout), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@needs_extension
def test_expanded_inputs() -> None:
    q, k, v = make(3, (4, 1), (30, 30), 16)
    k, v = k[:1].expand(3, 4, 30, 16), v[:1].expand(3, 4, 30, 16)
    want = token_sparse_prefill(q, k.contiguous(), v.contiguous())
    torch.testing.assert_close(token_sparse_prefill(q, k, v), want, rtol=1e-5, atol=1e-6)
    flat = q[..., :1, :].expand(3, 4, 30, 16)
    torch.testing.assert_close(token_sparse_prefill(flat, k, v), token_sparse_prefill(flat.contiguous(), k, v))


@needs_extension
@pytest.mark.parametrize("heads", [(8, 8), (2, 1)])  # fewer heads than threads split the keys in backward
def test_repeats_are_bitwise_equal(heads: tuple[int, int]) -> None:
    inputs = make(1, heads, (700, 700), 16)
    index = TokenIndex.from_mask(random_mask(1, 700, 0.9))

    def run(*a: Tensor) -> Any:
        return token_sparse_prefill(*a, index, return_lse=True, importance_rows=torch.arange(690, 700))

    with threads(2):
        want, want_grads = gradients(run, inputs)
        for _ in range(3):
            again, again_grads = gradients(run, inputs)
            for a, b in zip([*again, *again_grads], [*want, *want_grads], strict=True):
                assert torch.equal(a, b)


@needs_extension
@pytest.mark.parametrize("heads", [(4, 4), (2, 1)])
def test_one_and_two_threads_agree(heads: tuple[int, int]) -> None:
    inputs = make(2 if heads[0] > 2 else 1, heads, (300, 300), 24)

    def run(*a: Tensor) -> Any:
        return token_sparse_prefill(*a, return_lse=True, importance_rows=torch.arange(291, 300))

    results = []
    for count in (1, 2):
        with threads(count):
            results.append(gradients(run, inputs))
    (one, one_grads), (two, two_grads) = results
    for a, b in zip([*one, *one_grads], [*two, *two_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ISAS)
def test_every_instruction_set(name: str, dtype: torch.dtype) -> None:
    inputs = make(1, (4, 2), (150, 150), 40, dtype)
    index = TokenIndex.from_mask(random_mask(1, 150, 0.7))

    def run(*a: Tensor) -> Any:
        out, lse, importance = token_sparse_prefill(*a, index, return_lse=True, importance_rows=torch.arange(150))
        return out, lse.clamp(min=-1e3), importance

    with isa(name):
        fused, fused_grads = gradients(run, inputs)
    with use_backend("reference"):
        plain, plain_grads = gradients(run, inputs)
        exact, exact_grads = gradients(run, [t.double() for t in inputs])
    for got, p, e in zip([*fused, *fused_grads], [*plain, *plain_grads], [*exact, *exact_grads], strict=True):
        assert_error_rule(got, p, e, got.dtype, "result")


def test_large_scores_do_not_overflow() -> None:
    q, k, v = make(1, (2, 2), (80, 80), 16)
    out, lse = token_sparse_prefill(100 * q, 100 * k, v, return_lse=True)
    with use_backend("reference"):
        want, want_lse = token_sparse_prefill(100 * q.double(), 100 * k.double(), v.double(), return_lse=True)
    assert want_lse.max() > 1e4
    torch.testing.assert_close(out, want.float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-2)


@needs_extension
def test_nan_reaches_the_queries_that_see_it_only() -> None:
    q, k, v = make(2, (2, 2), (30, 30), 8)
    q[0, 1, 4] = torch.nan
    v[1, 0, 29] = torch.nan
    out, lse = token_sparse_prefill(q, k, v, causal=False, return_lse=True)
    assert out[0, 1, 4].isnan().all()
    assert lse[0, 1, 4].isnan()
    assert out[1, 0].isnan().all()
    out[0, 1, 4], out[1, 0] = 0, 0
    assert out.isfinite().all()


def test_scale() -> None:
    q, k, v = make(1, (2, 2), (20, 20), 16)
    assert torch.equal(token_sparse_prefill(q, k, v), token_sparse_prefill(q, k, v, scale=0.25))
    torch.testing.assert_close(token_sparse_prefill(q, k, v, scale=-1), token_sparse_prefill(-q, k, v, scale=1.0))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)
    torch.testing.assert_close(token_sparse_prefill(q, k, v, scale=0.7), want)


@needs_extension
def test_forward_keeps_its_output_and_the_log_sum_exp_alone() -> None:
    inputs = [t.requires_grad_() for t in make(1, (2, 2), (256, 256), 16)]
    kept: dict[int, int] = {}

    def pack_hook(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        token_sparse_prefill(*inputs)
    for t in inputs:
        kept.pop(t.untyped_storage().data_ptr(), None)
    assert 0 < sum(kept.values()) <= 2 * 256 * (16 + 1) * 4


def test_what_is_returned() -> None:
    q, k, v = (t.requires_grad_() for t in make(1, (2, 2), (5, 5), 4))
    rows = torch.tensor([4])
    assert isinstance(token_sparse_prefill(q, k, v), Tensor)
    out, importance = token_sparse_prefill(q, k, v, importance_rows=rows)
    assert importance.shape == (1, 5)
    assert not importance.requires_grad
    assert len(token_sparse_prefill(q, k, v, return_lse=True, importance_rows=rows)) == 3
    assert out.requires_grad
    assert out.transpose(1, 2).is_contiguous(), "the projection that follows reads it as a matrix"


def test_loss_on_the_log_sum_exp_alone() -> None:
    inputs = make(1, (2, 1), (12, 12), 8)

    def run(*args: Tensor) -> Any:
        return token_sparse_prefill(*args, return_lse=True)[1]

    _, grads = gradients(run, inputs)
    with use_backend("reference"):
        _, want = gradients(run, inputs)
    for g, w in zip(grads, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    assert (grads[2] == 0).all()


# ---- torch's machinery ----


def raw_args(packed: bool, indexed: bool, listed: bool) -> tuple[Any, ...]:
    inputs = make(2, (4, 2), (9, 9), 8)
    mask = random_mask(2, 9, 0.6)
    index = TokenIndex.from_mask(mask)
    if packed:
        inputs, index = [pack(t, [9, 9]) for t in inputs], packed_index(mask, [9, 9])
    fields = (index.indices, index.cu_seqlens, None, index.max_seqlen) if indexed else (None, None, None, 0)
    moved = (*fields[:2], index.indices, fields[3]) if indexed else fields
    rows = torch.tensor([8, 3]) if listed else None
    return (*inputs, *moved, *fields, True, 0.3, rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("indexed", "listed"), [(True, True), (False, False)])
def test_opcheck(packed: bool, indexed: bool, listed: bool) -> None:
    args = raw_args(packed, indexed, listed)
    leaves = [t.requires_grad_() for t in args[:3]]
    torch.library.opcheck(torch.ops.flashsloth.sparse_prefill.default, (*leaves, *args[3:]))
    detached = [t.detach() for t in leaves]
    out, lse, _ = torch.ops.flashsloth.sparse_prefill(*detached, *args[3:])
    back = (torch.randn_like(out), torch.randn_like(lse), *detached, out, lse, *args[3:-1])
    torch.library.opcheck(torch.ops.flashsloth.sparse_prefill_backward.default, back)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("indexed", "listed"), [(True, True), (False, False)])
def test_without_the_compiled_kernel_the_op_still_works(packed: bool, indexed: bool, listed: bool) -> None:
    """The default kernels, which serve devices and installations without compiled ones."""
    from flashsloth_ops import sparse_prefill as module

    args = raw_args(packed, indexed, listed)
    plain, op = module._plain(*args), torch.ops.flashsloth.sparse_prefill(*args)
    for a, b in zip(plain, op, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()
    out, lse, _ = plain
    back = (torch.randn_like(out), torch.randn_like(lse), *args[:3], out, lse, *args[3:-1])
    backward = torch.ops.flashsloth.sparse_prefill_backward(*back)
    for a, b in zip(module._plain_backward(*back), backward, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_compile_equals_eager(inside: bool, dynamic: bool, backend: str) -> None:
    """With an index that is built in the compiled function, and with one that is handed to it."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, index: TokenIndex | None = None) -> Any:
        if index is None:
            index = TokenIndex.from_mask(mask)
        out, lse, importance = token_sparse_prefill(q, k, v, index, return_lse=True, importance_rows=mask.int()[0])
        return out, lse.clamp(min=-1e3), importance

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend(backend):
        for length in (17, 23):
            inputs, mask = make(2, (4, 2), (length, length), 16), random_mask(2, length, 0.6)
            given_ = None if inside else TokenIndex.from_mask(mask)
            want = gradients(lambda *a: run(*a, mask, given_), inputs)  # noqa: B023
            got = gradients(lambda *a: compiled(*a, mask, given_), inputs)  # noqa: B023
            for a, b in zip([*want[0], *want[1]], [*got[0], *got[1]], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@needs_extension
def test_compile_with_inductor() -> None:
    """Inside a layer: projections before and after, layouts decided by the compiler."""

    def layer(x: Tensor, w: Tensor, scores: Tensor) -> Any:
        q, k, v = (x @ w).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        out = token_sparse_prefill(q, k, v, TokenIndex.from_topk(scores, 9))
        return out.transpose(1, 2).flatten(2) @ w[:, :64].T

    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, generator=generator) for s in ((2, 21, 32), (32, 192), (2, 21))]
    want, got = gradients(layer, inputs), gradients(torch.compile(layer, fullgraph=True), inputs)
    torch._dynamo.reset()
    for a, b in zip([*want[0], *want[1]], [*got[0], *got[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_extension
def test_export() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
            return token_sparse_prefill(q, k, v, TokenIndex.from_mask(mask), return_lse=True)

    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        return (*make(batch, (4, 2), (length, length), 8), random_mask(batch, length, 0.5))

    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)
    shapes = (*({0: batch, 2: length} for _ in range(3)), {0: batch, 1: length})
    program = torch.export.export(Attention(), inputs(2, 11), dynamic_shapes=shapes)
    assert "flashsloth.sparse_prefill" in program.graph_module.code
    other = inputs(3, 30)
    for a, b in zip(program.module()(*other), Attention()(*other), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast() -> None:
    inputs = make(1, (2, 2), (10, 10), 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = token_sparse_prefill(*inputs)
        mixed = token_sparse_prefill(inputs[0].bfloat16(), *inputs[1:])
    want = token_sparse_prefill(*(t.bfloat16() for t in inputs))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    assert torch.equal(mixed, want)


# ---- bad input ----

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


@needs_extension
@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1]), max_size=12),
    bounds=st.lists(st.sampled_from([-(2**31), -1, 0, 2, 4, 6, 12, 13, 2**31 - 1]), min_size=3, max_size=3),
    positions=st.none() | st.lists(st.sampled_from([-(2**31), 0, 3, 2**31 - 1]), min_size=12, max_size=12),
    packed=st.booleans(),
)
def test_raw_op_stays_in_bounds(
    entries: list[int], bounds: list[int], positions: list[int] | None, packed: bool
) -> None:
    """Below the checks any index is served: what is wrong in it is ignored, and every output is written."""
    q, k, v = [t[0].transpose(0, 1).contiguous() for t in (Q, K, V)] if packed else [Q, K, V]
    rows = torch.tensor(entries, dtype=torch.int32)
    moved = None if positions is None else torch.tensor(positions[: len(entries)], dtype=torch.int32)
    index = (rows, torch.tensor(bounds, dtype=torch.int32), moved, 6)
    listed = torch.tensor([-(2**63), -1, 0, 5, 6, 2**63 - 1])
    with poisoned():
        out, lse, importance = torch.ops.flashsloth.sparse_prefill(q, k, v, *index, *index, True, 0.3, listed)
        grads = torch.ops.flashsloth.sparse_prefill_backward(
            torch.ones_like(out), None, q, k, v, out, lse, *index, *index, True, 0.3
        )
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
