"""token_sparse_prefill under torch's machinery: opcheck, compile, export, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import TokenIndex, token_sparse_prefill
from flashsloth_ops import _library as library
from tests.ops.sparse_prefill_support import make, moved, random_mask, raw_args
from tests.support import PLACES, TRITON, Place, gradients, needs_extension


@pytest.mark.parametrize("place", [pytest.param(Place("cpu"), id="default"), *TRITON])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("indexed", "listed"), [(True, True), (False, False)])
def test_opcheck(packed: bool, indexed: bool, listed: bool, place: Place) -> None:
    args = tuple(moved(a, place.device) if isinstance(a, Tensor) else a for a in raw_args(packed, indexed, listed))
    forward, backward = (library.kernel(op, place.backend) for op in ("sparse_prefill", "sparse_prefill_backward"))
    leaves = [t.requires_grad_() for t in args[:3]]
    torch.library.opcheck(forward, (*leaves, *args[3:]))
    detached = [t.detach() for t in leaves]
    out, lse, _ = forward(*detached, *args[3:])
    back = (torch.randn_like(out), torch.randn_like(lse), *detached, out, lse, *args[3:-1])
    torch.library.opcheck(backward, back)


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


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_compile_equals_eager(inside: bool, dynamic: bool, place: Place) -> None:
    """With an index that is built in the compiled function, and with one that is handed to it."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, index: TokenIndex | None = None) -> Any:
        if index is None:
            index = TokenIndex.from_mask(mask)
        out, lse, importance = token_sparse_prefill(q, k, v, index, return_lse=True, importance_rows=mask.int()[0])
        return out, lse.clamp(min=-1e3), importance

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with place:
        for length in (17, 23):
            inputs, mask = make(2, (4, 2), (length, length), 16), random_mask(2, length, 0.6).to(place.device)
            given_ = None if inside else TokenIndex.from_mask(mask)
            want = gradients(lambda *a: run(*a, mask, given_), inputs, device=place.device)  # noqa: B023
            got = gradients(lambda *a: compiled(*a, mask, given_), inputs, device=place.device)  # noqa: B023
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
