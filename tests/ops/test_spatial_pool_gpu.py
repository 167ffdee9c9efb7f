"""spatial_attention_pool on a GPU: full size, graphs, no waiting for the device, tensors beyond 32-bit offsets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import spatial_attention_pool, use_backend
from tests.ops.pool_cases import fixed_seed, make
from tests.support import CUDA, GPU_MARKS, Place, assert_error_rule, gradients

pytestmark = GPU_MARKS
TRITON = Place("triton", "cuda")
PLACES = (pytest.param(TRITON, id="triton-gpu"), *CUDA)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def training_step(inputs: list[Tensor], dy: Tensor, da: Tensor, **options: Any) -> list[Tensor]:
    y, a = spatial_attention_pool(*inputs, return_weights=True, **options)
    return [y, a, *torch.autograd.grad((y, a), inputs, (dy, da))]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_error_rule_at_full_size(batch: int, dropout: float) -> None:
    """Batches for which different tiles are chosen. All of it on the GPU, the exact result too."""

    def run(*args: Tensor) -> Any:
        with fixed_seed(3):
            return spatial_attention_pool(*args, grid=(27, 27), dropout_p=dropout, training=True, return_weights=True)

    for dtype in TRITON.dtypes:
        inputs = make((batch, 729), 1152, 1152, dtype)
        with TRITON:
            fused, fused_grads = gradients(run, inputs, device="cuda")
        with use_backend("reference"):
            plain, plain_grads = gradients(run, inputs, device="cuda")
            exact, exact_grads = gradients(run, [t.double() for t in inputs], device="cuda")
        for name, f, p, e in zip(("y", "weights"), fused, plain, exact, strict=True):
            assert_error_rule(f, p, e, dtype, name)
        for name, f, p, e in zip(("dx", "dw1", "db1", "dw2"), fused_grads, plain_grads, exact_grads, strict=False):
            assert_error_rule(f, p, e, dtype, name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_graph_replays_with_new_data(place: Place, packed: bool) -> None:
    sizes = [[4, 30], [20, 5]]

    def data(seed: int, grid: list[list[int]]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        inputs = [t.cuda() for t in make((220,) if packed else (2, 220), 64, 80, torch.bfloat16, seed)]
        generator = torch.Generator("cuda").manual_seed(seed)
        rows = (34,) if packed else (2, 32)
        dy = torch.randn(*rows, 64, generator=generator, device="cuda").bfloat16()
        return (
            inputs,
            dy,
            torch.randn(inputs[0].shape[:-1], generator=generator, device="cuda"),
            torch.tensor(grid).cuda(),
        )

    inputs, dy, da, grid = data(1, sizes)
    inputs = [t.requires_grad_() for t in inputs]
    options: dict[str, Any] = {"grid": grid, "num_windows": 34} if packed else {"grid": (22, 10)}
    with place:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            training_step(inputs, dy, da, **options)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = training_step(inputs, dy, da, **options)

        others = data(2, sizes[::-1])
        with torch.no_grad():
            for old, new in zip((*inputs, dy, da, grid), (*others[0], *others[1:]), strict=True):
                old.copy_(new)
        graph.replay()
        want = training_step(inputs, dy, da, **options)
    for got, expected in zip(captured, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("place", PLACES)
def test_waits_for_nothing(place: Place) -> None:
    """Not even packed images, whose sizes stay on the device."""
    x, *rest = (t.cuda().requires_grad_() for t in make((220,), 64, 80, torch.bfloat16))
    grid = torch.tensor([[4, 30], [20, 5]]).cuda()
    dy, da = torch.ones(34, 64, dtype=x.dtype, device="cuda"), torch.ones(220, device="cuda")
    options: dict[str, Any] = {"grid": grid, "num_windows": 34, "dropout_p": 0.1, "training": True}
    with place:
        training_step([x, *rest], dy, da, **options)  # compiles
        with no_waiting():
            training_step([x, *rest], dy, da, **options)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_by_inductor_equals_eager(packed: bool) -> None:
    grid = torch.tensor([[4, 30], [20, 5]]).cuda()
    options: dict[str, Any] = {"grid": grid, "num_windows": 34} if packed else {"grid": (22, 10)}

    def run(*args: Tensor) -> Any:
        return spatial_attention_pool(*args, return_weights=True, **options)

    torch._dynamo.reset()
    inputs = make((220,) if packed else (2, 220), 64, 80, torch.bfloat16)
    with TRITON:
        want = gradients(run, inputs, device="cuda")
        got = gradients(torch.compile(run, fullgraph=True), inputs, device="cuda")
    for a, b in zip([*want[0], *want[1]], [*got[0], *got[1]], strict=True):
        torch.testing.assert_close(a, b)


def test_more_than_2_to_the_31_elements() -> None:
    """The last images of a batch that 32-bit offsets cannot reach equal the same images alone."""
    images, tokens, dim = 2570, 729, 1152
    assert images * tokens * dim > 2**31
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    _, *weights = (t.cuda().requires_grad_() for t in make((0,), dim, 64, torch.bfloat16))
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(images, tokens, dim, generator=generator, dtype=torch.bfloat16, device="cuda").requires_grad_()

    def run(x: Tensor) -> list[Tensor]:
        y, a = spatial_attention_pool(x, *weights, grid=(27, 27), return_weights=True)
        (dx,) = torch.autograd.grad((y, a), x, (torch.ones_like(y), torch.ones_like(a)))
        return [y, a, dx]

    with TRITON:
        whole = [t[-3:].clone() for t in run(x)]
        alone = run(x[-3:].detach().clone().requires_grad_())
    for got, want in zip(whole, alone, strict=True):
        torch.testing.assert_close(got, want)
