"""token_sparse_prefill: what rows hold, how memory lies, what is kept, what is returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashsloth_ops import TokenIndex, token_sparse_prefill, use_backend
from tests.ops.sparse_prefill_support import (
    attend,
    check_against_reference,
    make,
    moved,
    pack,
    packed_index,
    random_mask,
    strided,
)
from tests.support import (
    DTYPES,
    ISAS,
    PLACES,
    TRITON,
    Place,
    assert_error_rule,
    gradients,
    isa,
    needs_extension,
    threads,
)

FUSED = (pytest.param(Place("cpu"), marks=needs_extension, id="cpu"), *TRITON)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_not_kept_may_hold_anything(packed: bool, place: Place) -> None:
    inputs = make(2, (4, 2), (40, 40), 8)
    mask = random_mask(2, 40, 0.5)
    index = packed_index(mask, [40, 40]) if packed else TokenIndex.from_mask(mask)
    spoiled = [t.masked_fill(~mask[:, None, :, None], torch.nan) for t in inputs]
    dropped = ~mask.reshape(-1) if packed else ~mask[:, None, :, None].transpose(1, 2)[..., 0, 0]
    if packed:
        inputs, spoiled = ([pack(t, [40, 40]) for t in ts] for ts in (inputs, spoiled))
    listed = torch.tensor([39, 38])
    want, want_grads = attend(place, inputs, index, importance_rows=listed)
    got, grads = attend(place, spoiled, index, importance_rows=listed)
    for g, w in zip([*got, *grads], [*want, *want_grads], strict=True):
        assert torch.equal(g, w)
    for t in (got[0], *grads):
        rows = t if packed else t.transpose(1, 2)
        assert (rows[dropped] == 0).all()
    assert (got[1] if packed else got[1].transpose(1, 2))[dropped].isneginf().all()


@pytest.mark.parametrize("place", PLACES)
def test_keys_that_no_query_sees_may_hold_anything(place: Place) -> None:
    """Kept keys beyond the last query: dense, and with lists of their own."""
    inputs = make(1, (2, 1), (6, 20), 8)
    q_index = TokenIndex.from_mask(torch.ones(1, 6, dtype=torch.bool))  # at positions 0 to 5
    index = q_index, TokenIndex.from_mask(torch.ones(1, 20, dtype=torch.bool))
    spoiled = [inputs[0], *(t.masked_fill(torch.arange(20)[:, None] > 5, torch.nan) for t in inputs[1:])]
    for pair in (index, (q_index, None)):
        (want, want_grads), (got, grads) = (attend(place, ts, pair) for ts in (inputs, spoiled))
        for g, w in zip([*got, *grads], [*want, *want_grads], strict=True):
            assert torch.equal(g, w)
        assert (grads[1][:, :, 6:] == 0).all()
        assert (grads[2][:, :, 6:] == 0).all()


@pytest.mark.parametrize("place", FUSED)
def test_gradient_into_rows_not_kept_is_ignored(place: Place) -> None:
    q, k, v = (t.to(place.device).requires_grad_() for t in make(1, (2, 2), (20, 20), 8))
    mask = random_mask(1, 20, 0.5)
    dropped = ~mask[:, None, :].to(place.device)
    with place:
        out, lse = token_sparse_prefill(q, k, v, moved(TokenIndex.from_mask(mask), place.device), return_lse=True)
        clean = [torch.randn_like(out), torch.randn_like(lse)]
        spoiled = [clean[0].masked_fill(dropped[..., None], torch.nan), clean[1].masked_fill(dropped, torch.nan)]
        want = torch.autograd.grad((out, lse), (q, k, v), clean, retain_graph=True)
        for g, w in zip(torch.autograd.grad((out, lse), (q, k, v), spoiled), want, strict=True):
            assert torch.equal(g, w)


@pytest.mark.parametrize(
    "layout", ["token major", "head size outside", "every other row", "slice of a fused projection"]
)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("place", FUSED)
def test_strides(layout: str, indexed: bool, place: Place) -> None:
    inputs = make(2, (4, 2), (70, 70), 12)
    index = moved(TokenIndex.from_mask(random_mask(2, 70, 0.5)) if indexed else None, place.device)
    others = [strided(layout, t) for t in inputs]
    assert not any(t.is_contiguous() for t in others)
    args = [t.to(place.device).requires_grad_() for t in inputs]
    leaves = [strided(layout, t.detach()).requires_grad_() for t in args]
    with place:
        out = token_sparse_prefill(*args, index)
        got = token_sparse_prefill(*leaves, index)
        torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-6)
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(got, leaves, strided(layout, dout))
        for g, w in zip(grads, torch.autograd.grad(out, args, dout), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", FUSED)
def test_expanded_inputs(place: Place) -> None:
    q, k, v = (t.to(place.device) for t in make(3, (4, 1), (30, 30), 16))
    k, v = k[:1].expand(3, 4, 30, 16), v[:1].expand(3, 4, 30, 16)
    with place:
        want = token_sparse_prefill(q, k.contiguous(), v.contiguous())
        torch.testing.assert_close(token_sparse_prefill(q, k, v), want, rtol=1e-5, atol=1e-6)
        flat = q[..., :1, :].expand(3, 4, 30, 16)
        torch.testing.assert_close(token_sparse_prefill(flat, k, v), token_sparse_prefill(flat.contiguous(), k, v))


@pytest.mark.parametrize("place", PLACES)
def test_large_scores_do_not_overflow(place: Place) -> None:
    q, k, v = make(1, (2, 2), (80, 80), 16)
    (out, lse), _ = attend(place, [100 * q, 100 * k, v])
    with use_backend("reference"):
        want, want_lse = token_sparse_prefill(100 * q.double(), 100 * k.double(), v.double(), return_lse=True)
    assert want_lse.max() > 1e4
    torch.testing.assert_close(out, want.float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("place", FUSED)
def test_nan_reaches_the_queries_that_see_it_only(place: Place) -> None:
    q, k, v = make(2, (2, 2), (30, 30), 8)
    q[0, 1, 4] = torch.nan
    v[1, 0, 29] = torch.nan
    (out, lse), _ = attend(place, [q, k, v], causal=False)
    assert out[0, 1, 4].isnan().all()
    assert lse[0, 1, 4].isnan()
    assert out[1, 0].isnan().all()
    out[0, 1, 4], out[1, 0] = 0, 0
    assert out.isfinite().all()


@pytest.mark.parametrize("place", PLACES)
def test_scale(place: Place) -> None:
    inputs = make(1, (2, 2), (20, 20), 16)
    q, k, v = inputs
    (out, grads), (same, same_grads) = attend(place, inputs), attend(place, inputs, scale=0.25)
    assert all(torch.equal(a, b) for a, b in zip([*out, *grads], [*same, *same_grads], strict=True))
    (out, grads), (want, (dq, dk, dv)) = attend(place, inputs, scale=-1), attend(place, [-q, k, v], scale=1.0)
    for g, w in zip([*out, *grads], [*want, -dq, dk, dv], strict=True):
        torch.testing.assert_close(g, w)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)
    torch.testing.assert_close(attend(place, inputs, scale=0.7)[0][0], want)
    mean = attend(place, inputs, scale=0.0, causal=False)[0][0]
    torch.testing.assert_close(mean, v.mean(2, keepdim=True).expand_as(v))


@pytest.mark.parametrize("place", FUSED)
def test_forward_keeps_its_output_and_the_log_sum_exp_alone(place: Place) -> None:
    inputs = [t.to(place.device).requires_grad_() for t in make(1, (2, 2), (100, 100), 16)]
    kept: dict[int, int] = {}

    def pack_hook(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with place, torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        token_sparse_prefill(*inputs)
    for t in inputs:
        kept.pop(t.untyped_storage().data_ptr(), None)
    assert 0 < sum(kept.values()) <= 2 * 100 * (16 + 1) * 4


@pytest.mark.parametrize("place", PLACES)
def test_what_is_returned(place: Place) -> None:
    q, k, v = (t.to(place.device).requires_grad_() for t in make(1, (2, 2), (5, 5), 4))
    rows = torch.tensor([4], device=place.device)
    with place:
        assert isinstance(token_sparse_prefill(q, k, v), Tensor)
        out, importance = token_sparse_prefill(q, k, v, importance_rows=rows)
        assert len(token_sparse_prefill(q, k, v, return_lse=True, importance_rows=rows)) == 3
    assert importance.shape == (1, 5)
    assert not importance.requires_grad
    assert out.requires_grad
    if place.backend != "reference":
        assert out.transpose(1, 2).is_contiguous(), "the projection that follows reads it as a matrix"


@pytest.mark.parametrize("place", FUSED)
def test_loss_on_the_log_sum_exp_alone(place: Place) -> None:
    inputs = make(1, (2, 1), (12, 12), 8)

    def run(*args: Tensor) -> Any:
        return token_sparse_prefill(*args, return_lse=True)[1]

    with place:
        _, grads = gradients(run, inputs, device=place.device)
    with use_backend("reference"):
        _, want = gradients(run, inputs)
    for g, w in zip(grads, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    assert (grads[2] == 0).all()


# ---- kernels on a CPU ----


@needs_extension
@pytest.mark.parametrize(("rows", "count"), [((127, 127), 1), ((129, 640), 2), ((513, 513), 1), ((1030, 1030), 1)])
def test_lengths_around_the_tiles(rows: tuple[int, int], count: int) -> None:
    inputs = make(count, (2, 1), rows, 16)
    check_against_reference(Place("cpu"), inputs, None, True, torch.tensor([0, rows[0] - 1]))
    index = tuple(TokenIndex.from_mask(random_mask(count, n, 0.8, n)) for n in rows)
    check_against_reference(Place("cpu"), inputs, index, True, torch.tensor([0, rows[0] - 1]))


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
