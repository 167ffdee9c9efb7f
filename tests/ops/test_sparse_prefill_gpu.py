"""token_sparse_prefill on a GPU: full size, lengths beside the tiles, repeats, graphs, offsets beyond 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import TokenIndex, token_sparse_prefill, use_backend
from flashsloth_ops.triton.sparse_prefill_call import head_tiles
from tests.ops.sparse_prefill_support import check_against_reference, make, moved, random_mask
from tests.support import CUDA, GPU_MARKS, Place, assert_error_rule, gradients

TRITON = Place("triton", "cuda")
PLACES = (pytest.param(TRITON, id="triton-gpu", marks=GPU_MARKS), *CUDA)


def test_head_tiles() -> None:
    """No head size takes more columns than the next power of two, and those of vision towers take fewer."""
    assert [head_tiles(d) for d in (64, 72, 80, 96, 128, 256)] == [
        (64, 0),
        (64, 16),
        (64, 16),
        (64, 32),
        (128, 0),
        (256, 0),
    ]
    for dim in range(1, 257):
        first, second = head_tiles(dim)
        assert dim <= first + second <= max(16, 1 << (dim - 1).bit_length())
        assert all(tile == 0 or (tile >= 16 and tile & (tile - 1) == 0) for tile in (first, second))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "dim", "share", "causal"),
    [
        ((32, 32), 80, 0.25, True),
        ((32, 32), 80, None, True),
        ((16, 16), 72, None, False),
        ((16, 4), 128, 0.5, True),
        ((8, 8), 64, None, True),
        ((8, 2), 96, 0.9, True),
        ((4, 4), 256, None, True),
    ],
)
def test_error_rule_at_full_size(
    place: Place, dtype: torch.dtype, heads: tuple[int, int], dim: int, share: float | None, causal: bool
) -> None:
    """All of it on the GPU, the exact result too."""
    if dtype not in place.dtypes or (place.backend == "cuda" and dim not in (72, 80)):
        pytest.skip(f"{dtype} with heads of {dim} is not served at {place}")
    inputs = make(1, heads, (2048, 2048), dim, dtype)
    index = None if share is None else moved(TokenIndex.from_mask(random_mask(1, 2048, share)), "cuda")
    listed = torch.arange(2039, 2048, device="cuda")

    def run(*args: Tensor) -> Any:
        out, lse, importance = token_sparse_prefill(
            *args, index, causal=causal, return_lse=True, importance_rows=listed
        )
        return out, lse.clamp(min=-1e3), importance

    with place:
        fused, fused_grads = gradients(run, inputs, device="cuda")
    with use_backend("reference"):
        plain, plain_grads = gradients(run, inputs, device="cuda")
        exact, exact_grads = gradients(run, [t.double() for t in inputs], device="cuda")
    for name, f, p, e in zip(("out", "lse", "importance"), fused, plain, exact, strict=True):
        assert_error_rule(f, p, e, f.dtype, name)
    for name, f, p, e in zip(("dq", "dk", "dv"), fused_grads, plain_grads, exact_grads, strict=True):
        assert_error_rule(f, p, e, dtype, name)


@pytest.mark.parametrize("place", PLACES[:1])
@pytest.mark.parametrize("rows", [(1, 4096), (15, 3000), (33, 513), (64, 64), (127, 127), (129, 640), (1030, 1030)])
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (32, 32)])
def test_lengths_around_the_tiles(place: Place, rows: tuple[int, int], heads: tuple[int, int]) -> None:
    """Few queries against many keys, where keys are split, to many tiles of both."""
    inputs = make(2, heads, rows, 16)
    listed = torch.tensor([0, rows[0] - 1])
    check_against_reference(place, inputs, None, True, listed)
    index = tuple(TokenIndex.from_mask(random_mask(2, n, 0.8, n)) for n in rows)
    check_against_reference(place, inputs, index, True, listed)


def training_step(inputs: list[Tensor], index: TokenIndex, listed: Tensor, dout: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse, importance = token_sparse_prefill(*leaves, index, return_lse=True, importance_rows=listed)
    grads = torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))
    return [out.detach(), lse.detach(), importance, *grads]


def data(seed: int) -> tuple[list[Tensor], TokenIndex, Tensor, Tensor]:
    inputs = [t.cuda() for t in make(2, (8, 4), (300, 300), 80, torch.bfloat16, seed)]
    index = moved(TokenIndex.from_mask(random_mask(2, 300, 0.3 + 0.4 * (seed % 2), seed)), "cuda")
    listed = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(seed)).cuda()
    return inputs, index, listed, make(2, (8, 4), (300, 300), 80, torch.bfloat16, seed + 9)[0].cuda()


@pytest.mark.parametrize("place", PLACES)
def test_graph_replays_with_new_data(place: Place) -> None:
    """Other values, other kept rows and another number of them: no shape or launch depends on any."""
    (inputs, index, listed, dout), (new, new_index, new_listed, new_dout) = data(0), data(1)
    with place:
        want = training_step(new, new_index, new_listed, new_dout)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels compile before the capture
            training_step(inputs, index, listed, dout)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = training_step(inputs, index, listed, dout)
    pairs = (*zip(inputs, new, strict=True), *zip(index[:2], new_index[:2], strict=True))
    for to, value in (*pairs, (listed, new_listed), (dout, new_dout)):
        to.copy_(value)
    graph.replay()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("place", PLACES)
def test_repeats_are_bitwise_equal_and_wait_for_nothing(place: Place) -> None:
    args = data(2)
    pairs: list[tuple[Tensor, Tensor]] = []
    with place:
        want = training_step(*args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                pairs += zip(training_step(*args), want, strict=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("place", PLACES)
def test_compile_equals_eager(place: Place) -> None:
    inputs, index, listed, _ = data(3)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, importance = token_sparse_prefill(q * 2, k, v, index, importance_rows=listed)
        return out.transpose(1, 2).flatten(2) @ out.new_ones(8 * 80, 3), importance

    with place:
        torch._dynamo.reset()
        want = gradients(layer, inputs, device="cuda")
        got = gradients(torch.compile(layer, fullgraph=True), inputs, device="cuda")
        torch._dynamo.reset()
    for g, w in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_more_than_two_to_the_31_elements(place: Place, side: str) -> None:
    """In one batch item. Kept rows lie at both ends; the same rows without the others give the same."""
    heads, dim, few = 32, 80, 200
    many = 2**31 // (heads * dim) + 4096
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    near = [t.cuda() for t in make(1, (heads, heads), (few, few), dim, torch.bfloat16)]
    rows = torch.cat([torch.arange(few // 2), torch.arange(many - few // 2, many)]).int().cuda()
    bounds = torch.tensor([0, few], dtype=torch.int32, device="cuda")
    entry = torch.arange(few, dtype=torch.int32, device="cuda")
    far_index, near_index = TokenIndex(rows, bounds, few, entry), TokenIndex(entry, bounds, few, entry)

    def spread(t: Tensor) -> Tensor:
        """Token-major memory in which only the kept rows are defined."""
        far = t.new_empty(1, many, heads, dim)
        far[:, rows.long()] = t.transpose(1, 2)
        return far.transpose(1, 2)

    far = [spread(t) if (i == 0) == (side == "queries") else t for i, t in enumerate(near)]
    index = (far_index, near_index) if side == "queries" else (near_index, far_index)
    assert max(t.numel() for t in far) > 2**31

    def run(inputs: list[Tensor], index: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = token_sparse_prefill(*leaves, index)
        assert isinstance(out, Tensor)
        found = [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]
        return [t[:, :, rows.long()] if t.shape[2] == many else t for t in found]

    with place:
        for g, w in zip(run(far, index), run(near, (near_index, near_index)), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-2, atol=1e-3)
