"""token_sparse_prefill in CUDA C++: on the CPU over the emulator of an H200, and on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashsloth_ops import BackendError, TokenIndex, _extension, token_sparse_prefill, use_backend
from tests.emulator import build
from tests.ops.sparse_prefill_support import make, pack, packed_index, random_mask, strided
from tests.support import EPS, GPU_MARKS, Place, assert_error_rule, needs_extension

EMULATOR, GPU = Place("cuda"), Place("cuda", "cuda")
DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (72, 80)
Index = TokenIndex | tuple[TokenIndex | None, TokenIndex | None] | None


@pytest.fixture(
    params=[pytest.param(EMULATOR, id="emulator"), pytest.param(GPU, marks=GPU_MARKS, id="gpu")], scope="module"
)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Where the kernels run, with the backend forced."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param is EMULATOR:
            if missing := build.load():
                pytest.skip(missing)
            patch.setattr(_extension, "emulated", True)
        elif torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the kernels are for GPUs of compute capability 9.0")
        with request.param:
            yield request.param


def on(device: str, index: Any) -> Any:
    if isinstance(index, Tensor):
        return index.to(device)
    if isinstance(index, TokenIndex):
        return TokenIndex(*(on(device, field) for field in index))
    return tuple(on(device, one) for one in index) if isinstance(index, tuple) else index


def run(place: Place, inputs: list[Tensor], index: Index = None, listed: Tensor | None = None, **options: Any) -> Any:
    """out, lse and importance (None without listed rows), on the CPU; every new tensor starts as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        result = token_sparse_prefill(
            *(t.to(place.device) for t in inputs),
            on(place.device, index),
            return_lse=True,
            importance_rows=on(place.device, listed),
            **options,
        )
        return [*(t.cpu() for t in result), *([None] if listed is None else [])]
    finally:
        torch.use_deterministic_algorithms(False)


def expect(
    place: Place, inputs: list[Tensor], index: Index = None, listed: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """What the kernels return obeys the error rule against the specification; rows without a key are 0 and -inf."""
    got = run(place, inputs, index, listed, **options)
    if listed is not None:
        options["importance_rows"] = listed
    with use_backend("reference"):
        plain = token_sparse_prefill(*inputs, index, return_lse=True, **options)
        exact = token_sparse_prefill(*(t.double() for t in inputs), index, return_lse=True, **options)
    assert torch.equal(got[1].isneginf(), exact[1].isneginf())
    assert (got[0][exact[1].isneginf()] == 0).all()
    assert [t.dtype for t in got[:2]] == [inputs[0].dtype, torch.float32]
    finite = exact[1][exact[1].isfinite()]
    # exp(score - lse) of an lse that was stored, and rounded, in fp32: half a unit in its last place is relative here.
    stored = EPS[torch.float32] * finite.abs().max().item() if finite.numel() else 0.0
    for name, g, p, e in zip(("out", "lse", "importance"), got, plain, exact, strict=False):
        if g is not None:
            between = stored if name == "importance" else 0.0
            assert_error_rule(*(t.clamp(min=-1e4) for t in (g, p, e)), g.dtype, name, between)
    return got


# ---- against the specification ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "rows", "shares"),
    [
        ((2, 2), (300, 300), (None, None)),  # a tile of 192 queries and a part of one, four of 96 keys
        ((2, 1), (200, 500), (0.6, 0.8)),
        ((3, 1), (70, 260), (0.5, None)),
        ((1, 1), (260, 130), (None, 0.4)),  # more queries than keys: the first see none
    ],
)
def test_error_rule(
    heads: tuple[int, int],
    rows: tuple[int, int],
    shares: tuple[float | None, float | None],
    causal: bool,
    dim: int,
    dtype: torch.dtype,
    place: Place,
) -> None:
    inputs = make(2, heads, rows, dim, dtype)
    q_index, k_index = (
        None if share is None else TokenIndex.from_mask(random_mask(2, n, share, n))
        for n, share in zip(rows, shares, strict=True)
    )
    if q_index is not None:
        q_index = q_index.shifted(rows[1] - rows[0])
    expect(place, inputs, (q_index, k_index), torch.arange(rows[0] - 9, rows[0]), causal=causal)


@pytest.mark.parametrize("rows", [1, 15, 16, 63, 64, 65, 95, 96, 97, 191, 192, 193, 384, 385])
def test_lengths_around_the_tiles(rows: int, place: Place) -> None:
    for dim in HEAD_SIZES:
        expect(place, make(1, (1, 1), (rows, rows), dim, torch.bfloat16), causal=True)
    expect(place, make(1, (1, 1), (2, rows), 80, torch.bfloat16), causal=False)
    index = TokenIndex.from_mask(random_mask(1, rows, 0.8, rows))
    expect(place, make(1, (1, 1), (rows, rows), 72, torch.float16), index, torch.tensor([0, rows - 1]))


@settings(max_examples=40)
@given(
    batch=st.integers(0, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    rows=st.tuples(st.integers(0, 230), st.integers(0, 230)),
    dim=st.sampled_from(HEAD_SIZES),
    dtype=st.sampled_from(DTYPES),
    shares=st.tuples(st.sampled_from([None, 0.0, 0.4, 1.0]), st.sampled_from([None, 0.0, 0.4, 1.0])),
    causal=st.booleans(),
    listed=st.lists(st.integers(-3, 240), max_size=20),
)
def test_shapes(
    place: Place,
    batch: int,
    kv_heads: int,
    group: int,
    rows: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    shares: tuple[float | None, float | None],
    causal: bool,
    listed: list[int],
) -> None:
    """Empty batches and sequences, all rows dropped, more queries than keys."""
    inputs = make(batch, (kv_heads * group, kv_heads), rows, dim, dtype)
    q_index, k_index = (
        None if share is None else TokenIndex.from_mask(random_mask(batch, n, share, 3 + n))
        for share, n in zip(shares, rows, strict=True)
    )
    expect(place, inputs, (q_index, k_index), torch.tensor(listed, dtype=torch.int64), causal=causal)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=4),
    dim=st.sampled_from(HEAD_SIZES),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    causal=st.booleans(),
)
def test_packed_shapes(place: Place, lengths: list[tuple[int, int]], dim: int, share: float, causal: bool) -> None:
    q_lengths, k_lengths = [n for n, _ in lengths], [n for _, n in lengths]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(sum(q_lengths), 4, dim, generator=generator).bfloat16()
    k, v = (torch.randn(sum(k_lengths), 2, dim, generator=generator).bfloat16() for _ in range(2))
    masks = [random_mask(len(lengths), 100, share, seed) for seed in (1, 2)]
    index = packed_index(masks[0], q_lengths), packed_index(masks[1], k_lengths)
    expect(place, [q, k, v], index, torch.tensor([0, 5, 99, 133, 500]), causal=causal)


def test_packed_sequences_in_any_order(place: Place) -> None:
    """The second sequence lies before the first, and between its rows."""
    inputs = [torch.randn(100, 2, 80, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3)]
    rows = torch.cat([torch.arange(1, 100, 3), torch.arange(0, 60, 3)]).int()
    expect(place, inputs, TokenIndex(rows, torch.tensor([0, 33, 53], dtype=torch.int32), 33), torch.tensor([4, 7, 3]))


def test_more_tiles_than_multiprocessors(place: Place) -> None:
    """Blocks take several tiles, of several sections of 32 lists, and run ahead from one into the next."""
    inputs = make(2, (70, 35), (40, 250), 80, torch.bfloat16)
    index = TokenIndex.from_mask(random_mask(2, 40, 0.7)).shifted(100), None
    expect(place, inputs, index)


# ---- against other ways to compute the same ----


def test_chunked_prefill_equals_whole(place: Place) -> None:
    q, k, v = make(2, (4, 2), (210, 210), 80, torch.float16)
    mask = random_mask(2, 210, 0.5)
    whole = run(place, [q, k, v], TokenIndex.from_mask(mask))
    for start, end in ((0, 20), (20, 21), (21, 210)):
        index = TokenIndex.from_mask(mask[:, start:end]).shifted(start), TokenIndex.from_mask(mask[:, :end])
        part = run(place, [q[:, :, start:end], k[:, :, :end], v[:, :, :end]], index)
        for got, want in zip(part[:2], whole[:2], strict=True):
            torch.testing.assert_close(got, want[:, :, start:end], rtol=1e-3, atol=1e-3)


def test_packed_equals_batched(place: Place) -> None:
    lengths = [97, 0, 210, 1]
    inputs = make(4, (4, 2), (210, 210), 72, torch.float16)
    packed = [pack(t, lengths) for t in inputs]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    listed = torch.tensor([[6, 2], [0, 1], [18, 18], [0, -1]])
    out, lse, importance = run(place, inputs, TokenIndex.from_lengths(torch.tensor(lengths), 210), listed)
    index = TokenIndex.from_cu_seqlens(bounds, sum(lengths), 210)
    got = run(place, packed, index, torch.tensor([6, 2, 97 + 18, 97 + 18, 97 + 210]))
    assert torch.equal(got[0], pack(out, lengths))
    assert torch.equal(got[1], pack(lse[..., None], lengths)[..., 0])
    torch.testing.assert_close(got[2], torch.cat([importance[b, :n] for b, n in enumerate(lengths)]))


def test_importance_of_many_rows(place: Place) -> None:
    inputs = make(2, (10, 5), (150, 150), 80, torch.bfloat16)
    importance = expect(place, inputs, None, torch.arange(150))[2]
    torch.testing.assert_close(importance.sum(1), torch.ones(2), rtol=1e-3, atol=1e-3)
    listed = torch.tensor([[149, 3, 3], [-1, 400, 20]])
    expect(place, inputs, TokenIndex.from_mask(random_mask(2, 150, 0.5)), listed)


@needs_extension
def test_cpu_backward_takes_what_forward_saved(place: Place) -> None:
    inputs = make(1, (4, 2), (120, 120), 80, torch.bfloat16)
    index = TokenIndex.from_mask(random_mask(1, 120, 0.5))
    fields = (index.indices, index.cu_seqlens, None, index.max_seqlen) * 2
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    def gradients(out: Tensor, lse: Tensor) -> Any:
        back = torch.ops.flashsloth.sparse_prefill_backward.default
        return back(dout, None, *inputs, out, lse, *fields, True, 80**-0.5)

    want = torch.ops.flashsloth.sparse_prefill.default(*inputs, *fields, True, 80**-0.5, None)
    got = run(place, inputs, index)
    for ours, theirs in zip(gradients(*got[:2]), gradients(*want[:2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


# ---- the contract ----


@pytest.mark.parametrize("packed", [False, True])
def test_rows_not_kept_may_hold_anything(packed: bool, place: Place) -> None:
    inputs = make(2, (4, 2), (240, 240), 72, torch.bfloat16)
    mask = random_mask(2, 240, 0.5)
    index = packed_index(mask, [240, 240]) if packed else TokenIndex.from_mask(mask)
    spoiled = [t.masked_fill(~mask[:, None, :, None], torch.nan) for t in inputs]
    if packed:
        inputs, spoiled = ([pack(t, [240, 240]) for t in ts] for ts in (inputs, spoiled))
    listed = torch.tensor([239, 238, 200])
    for got, want in zip(run(place, spoiled, index, listed), run(place, inputs, index, listed), strict=True):
        assert torch.equal(got, want)


def test_keys_that_no_query_sees_may_hold_anything(place: Place) -> None:
    """They are in the last tile of keys, among keys that are seen."""
    q, k, v = make(1, (2, 2), (30, 120), 80, torch.float16)
    index = TokenIndex.from_mask(torch.ones(1, 30, dtype=torch.bool)).shifted(20), None
    want = run(place, [q, k, v], index)
    k[:, :, 50:], v[:, :, 50:] = torch.nan, torch.nan
    for got, expected in zip(run(place, [q, k, v], index)[:2], want[:2], strict=True):
        assert torch.equal(got, expected)


def test_nan_reaches_the_queries_that_see_it_only(place: Place) -> None:
    q, k, v = make(2, (2, 2), (130, 130), 80, torch.bfloat16)
    q[0, 1, 4], v[1, 0, 129] = torch.nan, torch.nan
    out, lse, _ = run(place, [q, k, v], causal=False)
    assert out[0, 1, 4].isnan().all()
    assert lse[0, 1, 4].isnan()
    assert out[1, 0].isnan().all()
    out[0, 1, 4], out[1, 0] = 0, 0
    assert out.isfinite().all()


def test_an_index_is_not_trusted(place: Place) -> None:
    """Below the checks: entries out of range are ignored, bounds are clamped, nothing is read outside the tensors."""
    inputs = make(1, (2, 1), (130, 130), 80, torch.bfloat16)
    rows = torch.arange(0, 130, 2, dtype=torch.int32)
    clean = TokenIndex(rows, torch.tensor([0, 65], dtype=torch.int32), 130)
    want = run(place, inputs, clean, torch.arange(100, 130))

    def raw(*fields: Any) -> Any:
        device = [t.to(place.device) for t in inputs]
        index = [on(place.device, field) for field in fields]
        listed = torch.arange(100, 130, device=place.device)
        return torch.ops.flashsloth.sparse_prefill.cuda(*device, *index, *index, True, 80**-0.5, listed)

    wrong = torch.cat([torch.tensor([-7]), rows[:40], torch.tensor([2**31 - 1]), rows[40:], torch.tensor([130, 500])])
    spoiled = wrong.int()
    positions = torch.where((wrong >= 0) & (wrong < 130), wrong, 60).int()
    positions[0] = -7
    positions[41] = positions[40]
    positions[-2:] = 128
    for bounds in ([0, 68], [-5, 1000]):
        got = raw(spoiled, torch.tensor(bounds, dtype=torch.int32), positions, 130)
        for ours, expected in zip(got, want, strict=True):
            torch.testing.assert_close(ours.cpu(), expected, rtol=1e-2, atol=1e-3)
    nothing = raw(rows, torch.tensor([50, 20], dtype=torch.int32), None, 130)
    assert (nothing[0] == 0).all()
    assert nothing[1].isneginf().all()
    assert (nothing[2] == 0).all()


@pytest.mark.parametrize(
    "layout", ["token major", "head size outside", "every other row", "slice of a fused projection"]
)
def test_strides(layout: str, place: Place) -> None:
    inputs = [t.to(place.device) for t in make(2, (4, 2), (100, 100), 80, torch.bfloat16)]
    index = TokenIndex.from_mask(random_mask(2, 100, 0.5))
    want = run(place, inputs, index)
    for got, expected in zip(run(place, [strided(layout, t) for t in inputs], index)[:2], want[:2], strict=True):
        assert torch.equal(got, expected)


def test_expanded_and_unaligned_inputs(place: Place) -> None:
    q, k, v = (t.to(place.device) for t in make(3, (4, 1), (30, 30), 72, torch.float16))
    want = run(place, [q, k, v])[0]
    expanded = [q, k.expand(3, 4, 30, 72), v.expand(3, 4, 30, 72)]
    shifted = [torch.empty(t.numel() + 3, dtype=t.dtype, device=t.device)[3:].view(t.shape).copy_(t) for t in (q, k, v)]
    assert shifted[0].data_ptr() % 16
    wide = [torch.cat([t, t[..., :3] * torch.nan], -1)[..., :72] for t in (q, k, v)]
    for others in (expanded, shifted, wide):
        assert torch.equal(run(place, others)[0], want)


def test_scale(place: Place) -> None:
    q, k, v = make(1, (2, 2), (120, 120), 80, torch.float16)
    for scale in (0.7, -0.3, 0.0):
        expect(place, [q, k, v], scale=scale)
    flipped = run(place, [-q, k, v], scale=0.3)
    for got, want in zip(run(place, [q, k, v], None, torch.tensor([9]), scale=-0.3)[:2], flipped[:2], strict=True):
        assert torch.equal(got, want)
    negative = expect(place, [q, k, v], None, torch.tensor([119, 9]), scale=-0.3)
    assert negative[2].isfinite().all()


def test_large_scores_do_not_overflow(place: Place) -> None:
    q, k, v = make(1, (2, 2), (120, 120), 80, torch.bfloat16)
    inputs = [100 * q, 100 * k, v]
    out, lse, _ = run(place, inputs)
    with use_backend("reference"):
        want, want_lse = token_sparse_prefill(*(t.double() for t in inputs), return_lse=True)
    assert want_lse.max() > 1e4
    torch.testing.assert_close(out, want.bfloat16(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-2)


def test_output_is_token_major(place: Place) -> None:
    tensors = [t.to(place.device) for t in make(2, (4, 2), (9, 9), 80, torch.bfloat16)]
    out, lse = token_sparse_prefill(*tensors, return_lse=True)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


def test_repeats_are_bitwise_equal(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order of warps, where the emulator shuffles them."""
    inputs = make(1, (2, 1), (300, 300), 80, torch.bfloat16)
    index = TokenIndex.from_mask(random_mask(1, 300, 0.8))
    first = run(place, inputs, index, torch.arange(280, 300))
    for order in ("1", "2", "3", "4"):
        monkeypatch.setenv("FLASHSLOTH_EMULATE_SEED", order)
        for got, want in zip(run(place, inputs, index, torch.arange(280, 300)), first, strict=True):
            assert torch.equal(got, want)


def test_errors_come_before_the_launch(place: Place) -> None:
    q, k, v = (t.to(place.device) for t in make(2, (2, 1), (9, 9), 80, torch.bfloat16))
    with pytest.raises(BackendError, match="cuda: serves bfloat16, float16, got float32"):
        token_sparse_prefill(q.float(), k.float(), v.float())
    with pytest.raises(BackendError, match="cuda: serves head sizes 72 and 80, got 64"):
        token_sparse_prefill(q[..., :64], k[..., :64], v[..., :64])
    nothing = (None, None, None, 0)
    rest = (*nothing, *nothing, True, 0.1, None)
    rows, bounds = (torch.zeros(n, dtype=torch.int32, device=q.device) for n in (4, 3))
    op = torch.ops.flashsloth.sparse_prefill.cuda
    for arguments, message in (
        ((q[..., :64], k[..., :64], v[..., :64], *rest), "q: expected a head size of 72 or 80, got 64"),
        ((q.float(), k.float(), v.float(), *rest), "q: expected bfloat16 or float16"),
        ((q, k, v.half(), *rest), "expected q, k and v of one dtype"),
        ((q, k, v[:, :, :8], *rest), "q, k and v do not fit each other"),
        ((q[0], k, v, *rest), "expected q, k and v of four dimensions"),
        ((q, k.expand(2, 3, 9, 80), v.expand(2, 3, 9, 80), *rest), "key heads must divide heads"),
        ((q, k, v, rows, None, None, 9, *nothing, True, 0.1, None), "indices and cu_seqlens go together"),
        ((q, k, v, rows.long(), bounds, None, 9, *nothing, True, 0.1, None), "expected int32 index tensors"),
        ((q, k, v, rows, bounds[:2], None, 9, *nothing, True, 0.1, None), "the indices do not have the sequences"),
        ((q, k, v, rows, bounds, rows[:2], 9, *nothing, True, 0.1, None), "expected positions as indices"),
        ((q, k, v, *nothing, *nothing, True, 0.1, rows), "expected int64 importance_rows"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            op(*arguments)


def test_on_an_emulated_a100() -> None:
    """The launcher says what it needs."""
    if missing := build.load():
        pytest.skip(missing)
    program = """
import torch
from tests.emulator import build
build.load()
import flashsloth_ops
q = torch.zeros(1, 1, 4, 80).bfloat16()
nothing = (None, None, None, 0)
torch.ops.flashsloth.sparse_prefill.cuda(q, q, q, *nothing, *nothing, True, 0.1, None)
"""
    environment = {**os.environ, "FLASHSLOTH_EMULATE_ARCH": "80"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=build.ROOT, env=environment, capture_output=True, text=True
    )
    assert "sparse_prefill: expected a GPU of compute capability 9.0, got 8.0" in done.stderr


# ---- on a GPU alone: sizes the emulator takes too long for ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "rows", "dim", "causal", "share"),
    [
        (1, (32, 32), 2048, 80, True, None),
        (1, (8, 2), 8192, 80, True, 0.25),
        (8, (16, 16), 729, 72, False, None),
        (40, (8, 8), 200, 80, True, 0.9),
    ],
)
def test_large(
    batch: int, heads: tuple[int, int], rows: int, dim: int, causal: bool, share: float | None, dtype: torch.dtype,
    place: Place,
) -> None:  # fmt: skip
    """Against the specification in fp32 on the GPU: many tiles a block, long pipelines."""
    if place is EMULATOR:
        pytest.skip("takes the emulator too long")
    inputs = [t.cuda() for t in make(batch, heads, (rows, rows), dim, dtype)]
    index = None if share is None else on("cuda", TokenIndex.from_mask(random_mask(batch, rows, share)))
    options: dict[str, Any] = {"causal": causal, "return_lse": True, "importance_rows": torch.arange(9, device="cuda")}
    for _ in range(3):
        out, lse, importance = token_sparse_prefill(*inputs, index, **options)
        for b in range(0, batch, max(1, batch // 3)):
            one = None
            if share is not None:
                one = on("cuda", TokenIndex.from_mask(random_mask(batch, rows, share)[b : b + 1]))
            with use_backend("reference"):
                want = token_sparse_prefill(*(t[b : b + 1].float() for t in inputs), one, **options)
            tolerance = 1e-2 if dtype is torch.bfloat16 else 2e-3
            torch.testing.assert_close(out[b].float(), want[0][0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(lse[b], want[1][0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(importance[b], want[2][0], rtol=1e-2, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_captured_in_a_graph(place: Place) -> None:
    if place is EMULATOR:
        pytest.skip("graphs are CUDA's")
    inputs = [t.cuda() for t in make(2, (8, 8), (500, 500), 80, torch.bfloat16)]
    index = on("cuda", TokenIndex.from_mask(random_mask(2, 500, 0.5)))
    rows = torch.arange(9, device="cuda")
    token_sparse_prefill(*inputs, index, importance_rows=rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_sparse_prefill(*inputs, index, importance_rows=rows)
    inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    for got, want in zip(captured, token_sparse_prefill(*inputs, index, importance_rows=rows), strict=True):
        assert torch.equal(got, want)
