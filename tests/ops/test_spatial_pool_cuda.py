"""spatial_attention_pool in CUDA C++: on the CPU over the emulator, as an H200 and as an A100, and on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import BackendError, _extension, spatial_attention_pool
from flashsloth_ops.reference import spatial_pool as reference
from tests.emulator import build
from tests.ops.pool_cases import make
from tests.support import GPU_MARKS, Golden, Place, assert_error_rule, needs_extension

EMULATOR, GPU = Place("cuda"), Place("cuda", "cuda")
DTYPES = (torch.bfloat16, torch.float16)
ARCHITECTURE = int(os.environ.get("FLASHSLOTH_EMULATE_ARCH", "90"))  # of the emulator, for the whole process


@pytest.fixture(params=[pytest.param(EMULATOR, id="emulator"), pytest.param(GPU, marks=GPU_MARKS, id="gpu")])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Where the kernels run, with the backend forced."""
    if request.param is EMULATOR:
        if missing := build.load():
            pytest.skip(missing)
        monkeypatch.setattr(_extension, "emulated", True)
    with request.param:
        yield request.param


def pool(inputs: list[Tensor], place: Place, **options: Any) -> list[Tensor]:
    """y and the weights, computed at a place, on the CPU; every new tensor starts as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        result = spatial_attention_pool(*(t.to(place.device) for t in inputs), return_weights=True, **options)
        return [t.cpu() for t in result]
    finally:
        torch.use_deterministic_algorithms(False)


def forward(
    inputs: list[Tensor], place: Place, grid: tuple[int, int] | Tensor, window: tuple[int, int] = (3, 3),
    p: float = 0.0, seed: int | None = None, num_windows: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """The op itself with a seed of ours: y, the weights and the mask, on the CPU."""
    x, w1, b1, w2, b2 = (t.to(place.device) for t in inputs)
    packed = isinstance(grid, Tensor)
    sizes = grid.tolist() if isinstance(grid, Tensor) else [grid]
    windows = sum(-(-h // window[0]) * -(-w // window[1]) for h, w in sizes) if num_windows is None else num_windows
    result = torch.ops.flashsloth.spatial_pool.cuda(
        x, w1, b1, w2.reshape(-1), b2, grid.to(place.device) if isinstance(grid, Tensor) else None,
        *((0, 0) if packed else sizes[0]), windows, *window, p,
        None if seed is None else torch.tensor([seed], device=place.device), True,
    )  # fmt: skip
    return [t.cpu() for t in result]


def expect(
    got: list[Tensor], inputs: list[Tensor], grid: tuple[int, int] | Tensor, window: tuple[int, int] = (3, 3),
    **dropout: Any,
) -> None:  # fmt: skip
    """y and the weights obey the error rule against the specification."""
    options: dict[str, Any] = {"grid": grid, "window": window, **dropout}
    plain = reference.spatial_attention_pool(*inputs, **options)
    exact = reference.spatial_attention_pool(*(t.double() for t in inputs), **options)
    for name, ours, theirs, truth in zip(("y", "weights"), got, plain, exact, strict=False):
        assert_error_rule(ours, theirs, truth, inputs[0].dtype, name)
    assert got[0].dtype == inputs[0].dtype
    assert got[1].dtype == torch.float32


def integers(tokens: tuple[int, ...], dim: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs whose pre-activations are exact in every order of additions, many of them exactly zero."""
    generator = torch.Generator().manual_seed(3)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).to(dtype)

    return [whole(*tokens, dim), whole(hidden, dim), whole(hidden), whole(1, hidden) / 8, whole(1)]


# ---- against the specification ----

# Window areas that fill a tile and that do not, ragged edges, windows wider than tiles and than the grid; D and Dh
# that no tile divides, that go round the stages of a pipeline, that need several passes over the units, and that no
# 16-byte copy divides.
SHAPES: tuple[tuple[tuple[int, int], tuple[int, int], int, int], ...] = (
    ((9, 9), (3, 3), 64, 128),
    ((10, 7), (3, 3), 72, 80),
    ((8, 8), (2, 2), 136, 40),
    ((7, 12), (2, 5), 64, 1000),
    ((12, 12), (4, 4), 8, 1300),
    ((5, 40), (1, 1), 200, 96),
    ((9, 18), (8, 8), 64, 64),
    ((9, 18), (9, 9), 64, 64),
    ((3, 4), (50, 50), 40, 72),
    ((1, 1), (3, 3), 16, 8),
    ((6, 6), (3, 3), 1032, 200),
    ((6, 5), (3, 3), 328, 1900),
    ((6, 6), (3, 3), 9, 37),
    ((6, 5), (3, 2), 1, 1),
    ((27, 27), (3, 3), 64, 64),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "window", "dim", "hidden"), SHAPES)
def test_error_rule(
    grid: tuple[int, int], window: tuple[int, int], dim: int, hidden: int, dtype: torch.dtype, place: Place
) -> None:
    inputs = make((2, grid[0] * grid[1]), dim, hidden, dtype)
    expect(pool(inputs, place, grid=grid, window=window), inputs, grid, window)


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_batches(batch: int, place: Place) -> None:
    inputs = make((batch, 14 * 15), 72, 136, torch.bfloat16)
    expect(pool(inputs, place, grid=(14, 15)), inputs, (14, 15))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "window", "dim", "hidden"), SHAPES)
def test_mask_has_the_bits_of_the_reference(
    grid: tuple[int, int], window: tuple[int, int], dim: int, hidden: int, dtype: torch.dtype, place: Place
) -> None:
    inputs = integers((2, grid[0] * grid[1]), dim, hidden, dtype)
    got = forward(inputs, place, grid, window)
    assert torch.equal(got[2], reference.activation_mask(*(t.double() for t in inputs[:3])))
    expect(got, inputs, grid, window)


@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize(("dim", "hidden"), [(64, 1300), (40, 72), (9, 37)])
def test_dropout_is_the_reference_s(dim: int, hidden: int, p: float, place: Place) -> None:
    seed = -0x0123456789ABCDEF
    inputs = integers((2, 7 * 8), dim, hidden, torch.bfloat16)
    got = forward(inputs, place, (7, 8), (3, 2), p, seed)
    keyed: dict[str, Any] = {"dropout_p": p, "seed": torch.tensor([seed])}
    assert torch.equal(got[2], reference.activation_mask(*(t.double() for t in inputs[:3]), **keyed))
    expect(got, inputs, (7, 8), (3, 2), **keyed)


@pytest.mark.parametrize("dim", [64, 9])
def test_packed(dim: int, place: Place) -> None:
    sizes = torch.tensor([[4, 6], [7, 3], [0, 5], [1, 1], [9, 9]])
    inputs = make((sum(h * w for h, w in sizes.tolist()),), dim, 80, torch.float16)
    expect(pool(inputs, place, grid=sizes), inputs, sizes)
    mask = forward(inputs, place, sizes)[2]
    assert mask.shape == (inputs[0].shape[0], 3)


def test_packed_grids_are_not_trusted(place: Place) -> None:
    """Their values stay on the device: what they claim beyond x is not read, and its windows are zero."""
    inputs = make((9,), 16, 24, torch.bfloat16)
    honest = forward(inputs, place, torch.tensor([[3, 3]]))
    for sizes in ([[3, 3], [90, 90]], [[3, 3], [-4, -7]], [[3, 3]]):
        y, weights, mask = forward(inputs, place, torch.tensor(sizes), num_windows=3)
        assert torch.equal(y[:1], honest[0])
        assert (y[1:] == 0).all()
        assert torch.equal(weights, honest[1])
        assert torch.equal(mask, honest[2])


@needs_extension
def test_cpu_backward_takes_what_forward_saved(place: Place) -> None:
    inputs = make((2, 10 * 7), 72, 80, torch.bfloat16)
    inputs[3] = inputs[3].reshape(-1)
    y, weights, mask = forward(inputs, place, (10, 7))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)

    def gradients(weights: Tensor, mask: Tensor) -> Any:
        return torch.ops.flashsloth.spatial_pool_backward(
            dy, None, *inputs[:4], weights, mask, None, 10, 7, 3, 3, 0.0, True, True
        )

    rest = (None, 10, 7, 12, 3, 3, 0.0, None, True)
    _, want_weights, want_mask = torch.ops.flashsloth.spatial_pool.default(*inputs, *rest)
    for got, want in zip(gradients(weights, mask), gradients(want_weights, want_mask), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_official_case(place: Place) -> None:
    golden = Golden("sap_10x10_d48_p3_ragged")
    names = ("mlp.0.weight", "mlp.0.bias", "mlp.3.weight", "mlp.3.bias")
    inputs = [t.to(torch.float16) for t in (golden.io["x"], *(golden.weights[n] for n in names))]
    y, _ = pool(inputs, place, grid=(10, 10), window=3)
    golden.check("out", y.float(), 2e-3)


# ---- the contract ----


def test_empty_inputs(place: Place) -> None:
    for batch, grid, dim, hidden in ((0, (6, 6), 8, 8), (2, (0, 6), 8, 8), (2, (3, 3), 0, 8), (2, (3, 3), 8, 0)):
        inputs = make((batch, grid[0] * grid[1]), dim, hidden, torch.bfloat16)
        y, weights = pool(inputs, place, grid=grid)
        assert y.shape == (batch, -(-grid[0] // 3) * -(-grid[1] // 3), dim)
        if dim > 0:
            expect([y, weights], inputs, grid)
        else:
            torch.testing.assert_close(weights.sum(1), torch.ones(batch))


def test_views_and_unaligned_rows(place: Place) -> None:
    x, *rest = make((3, 36), 24, 40, torch.bfloat16)
    want = pool([x[1:], *rest], place, grid=(6, 6))
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    shifted = torch.empty(x.numel() + 3, dtype=x.dtype, device=place.device)[3:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16
    for view in (transposed[1:], shifted[1:]):
        for got, expected in zip(pool([view, *rest], place, grid=(6, 6)), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)


def test_nan_reaches_the_windows_that_hold_it_only(place: Place) -> None:
    x, *rest = make((1, 81), 64, 64, torch.bfloat16)
    x[0, 0, 3] = torch.nan
    y, weights = pool([x, *rest], place, grid=(9, 9))
    assert y[0, 0].isnan().all()
    assert y[0, 1:].isfinite().all()
    assert weights[0, 0].isnan()


def test_repeats_are_bitwise_equal(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order of blocks and warps, where the emulator shuffles them."""
    inputs = make((2, 10 * 7), 648, 200, torch.bfloat16)
    first = forward(inputs, place, (10, 7))
    for order in ("1", "2", "3"):
        monkeypatch.setenv("FLASHSLOTH_EMULATE_SEED", order)
        for got, want in zip(forward(inputs, place, (10, 7)), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_captured_in_a_graph() -> None:
    inputs = [t.cuda() for t in make((1, 729), 1152, 1152, torch.bfloat16)]
    with GPU:
        spatial_attention_pool(*inputs, grid=(27, 27))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = spatial_attention_pool(*inputs, grid=(27, 27))
        inputs[0].copy_(torch.randn_like(inputs[0]))
        graph.replay()
        assert torch.equal(y, spatial_attention_pool(*inputs, grid=(27, 27)))


def test_errors_come_before_the_launch(place: Place) -> None:
    x, w1, b1, w2, b2 = (t.to(place.device) for t in make((1, 9), 8, 16, torch.bfloat16))
    rest = (None, 3, 3, 1, 3, 3, 0.0, None, True)
    op = torch.ops.flashsloth.spatial_pool.cuda
    with pytest.raises(BackendError, match="cuda: serves bfloat16, float16, got float32"):
        spatial_attention_pool(*(t.float() for t in (x, w1, b1, w2, b2)), grid=(3, 3))
    with pytest.raises(BackendError, match="cuda: serves batches to 8, got 9"):
        spatial_attention_pool(x.expand(9, 9, 8), w1, b1, w2, b2, grid=(3, 3))
    with pytest.raises(RuntimeError, match="spatial_pool: x: the CUDA kernels serve bfloat16 and float16"):
        op(*(t.float() for t in (x, w1, b1, w2[0], b2)), *rest)
    for change, message in (
        ({"w1": w1[:, 1:]}, "w1: expected (Dh, D)"),
        ({"b1": b1[1:]}, "b1, w2: expected Dh elements"),
        ({"w2": w2[0].half()}, "expected the dtype of x"),
        ({"x": x[0]}, "x: expected (B, N, D)"),
        ({"b2": b2[:0]}, "b2: expected one element"),
    ):
        tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2[0], "b2": b2, **change}
        with pytest.raises(RuntimeError, match=re.escape(message)):
            op(*tensors.values(), *rest)
    for geometry, message in (
        ((None, 3, 4, 1, 3, 3, 0.0, None, True), "grid: expected 9 tokens as x has, got 12"),
        ((None, 3, 3, 2, 3, 3, 0.0, None, True), "num_windows: expected as many as the grid has, got 2"),
        ((None, 3, 3, 1, 3, 3, 0.5, None, True), "seed: expected one int64 with dropout"),
        ((None, 3, 3, 1, 0, 3, 0.0, None, True), "window: expected sides of 1 or more"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            op(x, w1, b1, w2[0], b2, *geometry)


@pytest.mark.parametrize(
    ("dim", "hidden", "message"),
    [(1, 8388481, "w1: expected Dh to 8388480, got 8388481"), (16776961, 1, "x: expected D to 16776960, got 16776961")],
)
def test_limits_are_named(dim: int, hidden: int, message: str, place: Place) -> None:
    inputs = [torch.zeros(shape, dtype=torch.float16) for shape in ((1, 1, dim), (hidden, dim), (hidden,), (hidden,))]
    with pytest.raises(RuntimeError, match=f"spatial_pool: {message}"):
        pool([*inputs, torch.zeros(1, dtype=torch.float16)], place, grid=(1, 1))


@pytest.mark.skipif(ARCHITECTURE != 90, reason="runs the others")
def test_on_an_emulated_a100() -> None:
    """As an sm_80 GPU, where every instruction of sm_90 is an error."""
    if missing := build.load():
        pytest.skip(missing)
    tests = "emulator and (mask or packed or dropout or empty or views or nan)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", tests, str(Path(__file__).resolve())]
    environment = {**os.environ, "FLASHSLOTH_EMULATE_ARCH": "80"}
    done = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
