"""spatial_attention_pool: every backend against the specification and the official code, at every shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashsloth_ops import spatial_attention_pool, use_backend
from flashsloth_ops.reference import spatial_pool as reference
from tests.ops.pool_cases import KERNELS, fixed_seed, make
from tests.support import (
    BACKENDS,
    CUDA,
    INTERPRETER,
    PLACES,
    TRITON,
    Golden,
    Place,
    assert_error_rule,
    gradients,
    needs_extension,
    poisoned,
)

# ---- against the official code and the specification ----


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "case", ["sap_8x8_d32_p2", "sap_10x10_d48_p3_ragged", "sap_12x12_d64_p3", "sap_27x27_d1152_p3"]
)
def test_official(case: str, place: Place) -> None:
    if place == INTERPRETER and case.startswith("sap_27x27"):
        pytest.skip("minutes under the interpreter; its programs are those of the smaller cases")
    golden = Golden(case)
    names = ("mlp.0.weight", "mlp.0.bias", "mlp.3.weight", "mlp.3.bias")
    inputs = [golden.io["x"], *(golden.weights[n] for n in names)]
    inputs = [t.to(place.device).requires_grad_() for t in inputs]
    side, window = golden.meta["grid"], golden.meta["pool"]
    with place:
        out = spatial_attention_pool(*inputs, grid=(side, side), window=window)
    golden.check("out", out.cpu(), 1e-5)
    grads = [g.cpu() for g in torch.autograd.grad(out, inputs, golden.io["g"].to(place.device))]
    for name, grad in zip(("x", *names[:3]), grads[:4], strict=True):
        golden.check(f"grad.{name}", grad, 2e-5)
    # The exact gradient of b2 is zero; the official code leaves its rounding there.
    assert grads[4].abs().item() <= 2e-5 * grads[3].abs().max().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(backend: str, training: bool) -> None:
    def run(*inputs: Tensor) -> Any:
        torch.manual_seed(5)  # the same dropout mask at every evaluation
        return spatial_attention_pool(
            *inputs, grid=(5, 4), window=(3, 2), dropout_p=0.3, training=training, return_weights=True
        )

    inputs = [t.requires_grad_() for t in make((2, 20), 9, 37, torch.float64)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(run, inputs)


def test_backward_specification_matches_autograd() -> None:
    """The one-bit backward, as the reference writes it, is the derivative of the reference forward."""
    seed = torch.tensor([11])
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in make((2, 20), 9, 37, torch.float64))
    options: dict[str, Any] = {"grid": (5, 4), "window": (3, 3), "dropout_p": 0.2}
    y, weights = reference.spatial_attention_pool(x, w1, b1, w2, b2, seed=seed, **options)
    dy, dweights = torch.randn_like(y), torch.randn_like(weights)
    want = torch.autograd.grad((y, weights), (x, w1, b1, w2), (dy, dweights))
    mask = reference.activation_mask(x, w1, b1, dropout_p=0.2, seed=seed)
    got = reference.spatial_attention_pool_backward(dy, dweights, x, w1, b1, w2, weights, mask, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.view_as(g), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("grid", [(9, 9), (10, 7), (27, 27)])
@pytest.mark.parametrize("place", [*KERNELS, *CUDA])
def test_error_rule(place: Place, grid: tuple[int, int], dropout: float) -> None:
    """In every dtype of a place; with dropout, whose mask then is that of the reference."""
    if place == INTERPRETER and grid == (27, 27):
        pytest.skip("minutes under the interpreter; its programs are those of the smaller grids")

    def run(*args: Tensor) -> Any:
        with fixed_seed(-(2**60) - 17):
            return spatial_attention_pool(*args, grid=grid, dropout_p=dropout, training=True)

    for dtype in place.dtypes:
        inputs = make((2, grid[0] * grid[1]), 96, 80, dtype)
        with place:
            fused, fused_grads = gradients(run, inputs, device=place.device)
        with use_backend("reference"):
            plain, plain_grads = gradients(run, inputs)
            exact, exact_grads = gradients(run, [t.double() for t in inputs])
        assert fused[0].dtype == dtype
        assert_error_rule(fused[0], plain[0], exact[0], dtype, "y")
        for name, f, p, e in zip(("dx", "dw1", "db1", "dw2"), fused_grads, plain_grads, exact_grads, strict=False):
            assert_error_rule(f, p, e, dtype, name)
        assert (fused_grads[4] == 0).all(), "db2 is exactly zero"


# ---- shapes ----


SHAPES: dict[str, st.SearchStrategy[Any]] = {
    "batch": st.integers(0, 3),
    "height": st.integers(0, 11),
    "width": st.integers(0, 11),
    "window": st.tuples(st.integers(1, 13), st.integers(1, 13)),
    "dim": st.integers(1, 40),
    "hidden": st.integers(1, 70),
}


@needs_extension
@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_shapes(batch: int, height: int, width: int, window: tuple[int, int], dim: int, hidden: int) -> None:
    """Empty batches and grids, one token, windows larger than the grid, sizes no tile divides."""
    check_shape(Place("cpu"), batch, height, width, window, dim, hidden)


@needs_extension
@pytest.mark.parametrize("place", TRITON)
@settings(max_examples=60 if torch.cuda.is_available() else 12, deadline=None)
@given(**SHAPES)
def test_shapes_of_triton(
    place: Place, batch: int, height: int, width: int, window: tuple[int, int], dim: int, hidden: int
) -> None:
    check_shape(place, batch, height, width, window, dim, hidden)


@needs_extension
@pytest.mark.parametrize("place", TRITON)
@pytest.mark.parametrize(
    ("batch", "height", "width", "window", "dim", "hidden"),
    [(0, 5, 4, (3, 3), 8, 16), (2, 0, 4, (3, 3), 8, 16), (1, 1, 1, (1, 1), 1, 1), (1, 12, 11, (13, 9), 9, 33),
     (1, 10, 7, (4, 5), 130, 300)],
)  # fmt: skip
def test_shapes_that_matter(
    place: Place, batch: int, height: int, width: int, window: tuple[int, int], dim: int, hidden: int
) -> None:
    """Nothing at all, one of everything, a window of more tokens than a step of the kernel, several tiles each way."""
    check_shape(place, batch, height, width, window, dim, hidden)


def check_shape(
    place: Place, batch: int, height: int, width: int, window: tuple[int, int], dim: int, hidden: int
) -> None:
    inputs = make((batch, height * width), dim, hidden)

    def run(*args: Tensor) -> Any:
        return spatial_attention_pool(*args, grid=(height, width), window=window, return_weights=True)

    with place, poisoned():
        (y, weights), grads = gradients(run, inputs, device=place.device)
    with use_backend("reference"):
        want, want_grads = gradients(run, [t.double() for t in inputs])
    assert y.shape == (batch, -(-height // window[0]) * -(-width // window[1]), dim)
    torch.testing.assert_close(y, want[0].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, want[1].float(), rtol=1e-4, atol=1e-5)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", TRITON)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_tile(place: Place, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heuristics choose the large ones for batches that no interpreter finishes."""
    from flashsloth_ops.triton import spatial_pool as module

    inputs = make((2, 70), 48, 150, torch.float16)

    def run(*args: Tensor) -> Any:
        with fixed_seed(5):
            return spatial_attention_pool(*args, grid=(10, 7), window=6, dropout_p=dropout, training=True)

    with use_backend("reference"):
        plain, plain_grads = gradients(run, inputs)
        exact, exact_grads = gradients(run, [t.double() for t in inputs])
    for tile in {*module.SCORES, *module.GRADIENTS}:
        monkeypatch.setattr(module, "choose", lambda *args, tile=tile: tile.config(inputs[0]))
        with place:
            fused, grads = gradients(run, inputs, device=place.device)
        assert_error_rule(fused[0], plain[0], exact[0], torch.float16, f"y, {tile}")
        for got, p, e in zip(grads[:4], plain_grads, exact_grads, strict=False):
            assert_error_rule(got, p, e, torch.float16, f"gradient, {tile}")


@pytest.mark.parametrize("place", PLACES)
def test_packed_equals_images_one_by_one(place: Place) -> None:
    sizes = [(4, 6), (7, 3), (0, 5), (1, 1)]
    x, *weights = make((sum(h * w for h, w in sizes),), 24, 33)
    grid = torch.tensor(sizes, dtype=torch.int32, device=place.device)
    with place:
        (packed, a), grads = gradients(
            lambda *args: spatial_attention_pool(*args, grid=grid, return_weights=True),
            [x, *weights],
            device=place.device,
        )

        def one_by_one(x: Tensor, *rest: Tensor) -> Any:
            parts = x.split([h * w for h, w in sizes])
            pairs = [
                spatial_attention_pool(part[None], *rest, grid=size, return_weights=True)
                for part, size in zip(parts, sizes, strict=True)
            ]
            return torch.cat([y[0] for y, _ in pairs]), torch.cat([w[0] for _, w in pairs])

        (want, want_a), want_grads = gradients(one_by_one, [x, *weights], device=place.device)
    assert packed.shape == (4 + 3 + 0 + 1, 24)
    torch.testing.assert_close(packed, want)
    torch.testing.assert_close(a, want_a)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", TRITON)
def test_packed_more_images_than_a_step_of_the_kernel(place: Place) -> None:
    sizes = torch.tensor([[1 + i % 3, int(i % 11 == 0)] for i in range(150)])  # most of them empty
    x, *weights = make((int(sizes.prod(1).sum()),), 8, 16)

    def run(*args: Tensor) -> Any:
        return spatial_attention_pool(*args, grid=sizes.to(args[0].device), window=(2, 1), return_weights=True)

    with place:
        (y, a), grads = gradients(run, [x, *weights], device=place.device)
    with use_backend("reference"):
        (want, want_a), want_grads = gradients(run, [x, *weights])
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(a, want_a)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", KERNELS)
def test_non_contiguous(place: Place) -> None:
    x, w1, b1, w2, b2 = (t.to(place.device) for t in make((4, 36), 24, 40))

    def strided() -> list[Tensor]:
        tensors = [x.transpose(0, 1).contiguous().transpose(0, 1)[::2], w1.T.contiguous().T, b1.repeat(2)[:40], w2, b2]
        assert not any(t.is_contiguous() for t in tensors[:2])
        return [t.detach().requires_grad_() for t in tensors]

    def run(inputs: list[Tensor]) -> list[Tensor]:
        y, a = spatial_attention_pool(*inputs, grid=(6, 6), return_weights=True)
        # Gradients that are no plain tensors either.
        dy, da = (
            torch.ones_like(y).transpose(1, 2).contiguous().transpose(1, 2),
            torch.ones_like(a[:, :1]).expand(2, 36),
        )
        return [y, a, *torch.autograd.grad((y, a), inputs, (dy, da))]

    with place:
        got, want = run(strided()), run([t.detach().contiguous().requires_grad_() for t in strided()])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("place", PLACES)
def test_window_larger_than_grid_is_one_window(place: Place) -> None:
    inputs = [t.to(place.device) for t in make((2, 12), 8, 16)]
    with place:
        y, a = spatial_attention_pool(*inputs, grid=(3, 4), window=50, return_weights=True)
    assert y.shape == (2, 1, 8)
    torch.testing.assert_close(a.sum(1).cpu(), torch.ones(2))
