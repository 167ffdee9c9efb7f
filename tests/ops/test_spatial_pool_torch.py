"""spatial_attention_pool under opcheck, torch.compile, torch.export and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import spatial_attention_pool, use_backend
from tests.ops.pool_cases import make, overload
from tests.support import (
    PLACES,
    TRITON,
    Place,
    gradients,
    needs_extension,
)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", [pytest.param(Place("cpu"), id="default"), *TRITON])
def test_opcheck(place: Place, packed: bool, dropout: float) -> None:
    x, w1, b1, w2, b2 = (t.to(place.device) for t in make((22,) if packed else (2, 20), 12, 45))
    grids = torch.tensor([[4, 3], [2, 5]], device=place.device) if packed else None
    geometry = (grids, 0, 0, 4, 3, 3) if packed else (None, 5, 4, 4, 3, 3)
    seed = torch.tensor([9], device=place.device) if dropout else None
    args = (*(t.requires_grad_() for t in (x, w1, b1, w2.view(-1), b2)), *geometry, dropout, seed, True)
    torch.library.opcheck(overload(place), args)
    y, weights, mask = overload(place)(*args)
    detached = [t.detach() for t in (x, w1, b1, w2.view(-1), weights)]
    back = (torch.randn_like(y), None, *detached, mask, grids, *geometry[1:3], 3, 3, dropout, True, True)
    torch.library.opcheck(overload(place, "spatial_pool_backward"), back)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(place: Place, dynamic: bool) -> None:
    def run(*args: Tensor) -> Any:
        return spatial_attention_pool(*args, grid=(6, 6), return_weights=True)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with place:
        for batch in (2, 3):
            inputs = make((batch, 36), 16, 40)
            want = gradients(run, inputs, device=place.device)
            got = gradients(compiled, inputs, device=place.device)
            for a, b in zip([*want[0], *want[1]], [*got[0], *got[1]], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@needs_extension
def test_compile_with_inductor_and_dropout() -> None:
    def run(*args: Tensor) -> Any:
        return spatial_attention_pool(*args, grid=(6, 6), dropout_p=0.5, training=True) * 2

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    inputs = make((2, 36), 16, 40)
    _, first = gradients(compiled, inputs)
    _, second = gradients(compiled, inputs)
    assert not torch.equal(first[1], second[1]), "a compiled call draws a new mask each time"
    torch._dynamo.reset()


@needs_extension
def test_compile_packed() -> None:
    grid = torch.tensor([[4, 3], [2, 5]])

    def run(*args: Tensor) -> Any:
        return spatial_attention_pool(*args, grid=grid, num_windows=4)

    torch._dynamo.reset()
    inputs = make((22,), 16, 40)
    want, got = gradients(run, inputs), gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip([*want[0], *want[1]], [*got[0], *got[1]], strict=True):
        torch.testing.assert_close(a, b)


@needs_extension
def test_compile_follows_the_backend_in_force() -> None:
    torch._dynamo.reset()
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append("cpu" if "flashsloth.spatial_pool" in graph.code else "reference")
        return graph

    compiled = torch.compile(lambda *a: spatial_attention_pool(*a, grid=(6, 6)), fullgraph=True, backend=spy)
    inputs = make((2, 36), 16, 40)
    compiled(*inputs)
    with use_backend("reference"):
        compiled(*inputs)
    assert seen == ["cpu", "reference"]


@needs_extension
def test_export() -> None:
    class Pool(torch.nn.Module):
        def forward(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Any:
            return spatial_attention_pool(x, w1, b1, w2, b2, grid=(6, 6))

    inputs = make((2, 36), 16, 40)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Pool(), tuple(inputs), dynamic_shapes=({0: batch}, None, None, None, None))
    assert "flashsloth.spatial_pool" in program.graph_module.code
    other = make((5, 36), 16, 40, seed=3)
    torch.testing.assert_close(program.module()(*other), spatial_attention_pool(*other, grid=(6, 6)))


def test_autocast() -> None:
    inputs = make((2, 36), 16, 40)
    with torch.autocast("cpu", torch.bfloat16):
        out = spatial_attention_pool(*inputs, grid=(6, 6))
        mixed = spatial_attention_pool(inputs[0].bfloat16(), *inputs[1:], grid=(6, 6))
    want = spatial_attention_pool(*(t.bfloat16() for t in inputs), grid=(6, 6))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    assert torch.equal(mixed, want)


def test_without_the_compiled_kernel_the_op_still_works() -> None:
    """The default kernels, which serve devices and installations without compiled ones."""
    from flashsloth_ops import spatial_pool as module

    x, w1, b1, w2, b2 = make((2, 20), 12, 45)
    geometry = (None, 5, 4, 4, 3, 3)
    seed = torch.tensor([9])
    y, weights, mask = module._plain(x, w1, b1, w2.view(-1), b2, *geometry, 0.2, seed, True)
    op = torch.ops.flashsloth.spatial_pool(x, w1, b1, w2.view(-1), b2, *geometry, 0.2, seed, True)
    torch.testing.assert_close(y, op[0])
    torch.testing.assert_close(weights, op[1])
    assert torch.equal(mask, op[2])
    dy = torch.randn_like(y)
    args = (dy, None, x, w1, b1, w2.view(-1), weights, mask, None, 5, 4, 3, 3, 0.2, True, True)
    for a, b in zip(module._plain_backward(*args), torch.ops.flashsloth.spatial_pool_backward(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
