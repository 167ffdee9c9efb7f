"""spatial_attention_pool: every backend against the specification, the official code and its own contract."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashsloth_ops import spatial_attention_pool, use_backend
from flashsloth_ops.reference import spatial_pool as reference
from tests.support import (
    BACKENDS,
    CUDA,
    DTYPES,
    INTERPRETER,
    ISAS,
    PLACES,
    TRITON,
    Golden,
    Place,
    assert_error_rule,
    gradients,
    isa,
    needs_extension,
    poisoned,
    threads,
)


def make(
    tokens: tuple[int, ...], dim: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """x, w1, b1, w2, b2 with scores of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return [
        normal(*tokens, dim),
        normal(hidden, dim, scale=max(dim, 1) ** -0.5),
        normal(hidden, scale=0.3),
        normal(1, hidden, scale=3 * max(hidden, 1) ** -0.5),
        normal(1),
    ]


KERNELS = (pytest.param(Place("cpu"), marks=needs_extension, id="cpu"), *TRITON)  # all that is not the reference


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Dropout draws this seed, on every device."""
    with mock.patch("torch.randint", lambda *_, device, **__: torch.tensor([seed], device=device)):
        yield


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


# ---- dropout ----


@pytest.mark.parametrize("seed", [0, 5, -1, 2**31, -(2**62) + 12345])
@pytest.mark.parametrize("place", [*KERNELS, *CUDA])
def test_dropout_draws_the_bits_of_the_reference(place: Place, seed: int) -> None:
    """Where every unit is active, the mask that is saved is the dropout mask."""
    dtype = place.dtypes[0]
    x, w1, b1, w2, b2 = (t.to(place.device) for t in make((3, 64), 32, 75, dtype))
    key = torch.tensor([seed], device=place.device)
    for p in (0.1, 0.4, 0.62):
        _, _, mask = overload(place)(x, w1, b1 + 100, w2.view(-1), b2, None, 8, 8, 1, 8, 8, p, key, True)
        keep = reference.dropout_keep(torch.tensor([seed]), 3 * 64, 75, p)
        assert torch.equal(reference.unpack_mask(mask.cpu(), 75), keep)


def overload(place: Place, op: str = "spatial_pool") -> Any:
    """The op with the kernels of a place, below the public function."""
    return getattr(getattr(torch.ops.flashsloth, op), "default" if place.backend == "cpu" else place.backend)


def test_dropout_mask_is_philox_and_keeps_its_share() -> None:
    # Known answer of Philox4x32-10 for key 0 and counter 0 (Salmon et al., 2011): 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for word, p in product(range(4), (0.1, 0.4, 0.62, 0.9)):
        keep = reference.dropout_keep(torch.tensor([0]), 1, 4, p)
        assert keep[0, word].item() == (words[word] >= int(p * 2**32))
    share = reference.dropout_keep(torch.tensor([-(2**62) + 12345]), 2000, 50, 0.3).float().mean().item()
    assert abs(share - 0.7) < 5 * (0.21 / 100_000) ** 0.5


@pytest.mark.parametrize("place", PLACES)
def test_dropout_acts_in_training_only(place: Place) -> None:
    inputs = [t.to(place.device) for t in make((1, 36), 16, 64)]
    with place:
        plain = spatial_attention_pool(*inputs, grid=(6, 6))
        assert torch.equal(spatial_attention_pool(*inputs, grid=(6, 6), dropout_p=0.5), plain)
        assert not torch.equal(spatial_attention_pool(*inputs, grid=(6, 6), dropout_p=0.5, training=True), plain)
        torch.manual_seed(4)
        first = spatial_attention_pool(*inputs, grid=(6, 6), dropout_p=0.5, training=True)
        second = spatial_attention_pool(*inputs, grid=(6, 6), dropout_p=0.5, training=True)
        torch.manual_seed(4)
        assert torch.equal(spatial_attention_pool(*inputs, grid=(6, 6), dropout_p=0.5, training=True), first)
        assert not torch.equal(first, second), "each call draws a new mask"


# ---- the promises of the op ----


@needs_extension
def test_memory_kept_for_backward() -> None:
    """Besides its inputs the op keeps at most 1/16 of the hidden layer."""
    inputs = [t.requires_grad_() for t in make((2, 729), 64, 1152)]
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        spatial_attention_pool(*inputs, grid=(27, 27))
    for t in inputs:
        kept.pop(t.untyped_storage().data_ptr(), None)
    hidden_layer = 2 * 729 * 1152 * 4
    assert 0 < sum(kept.values()) <= hidden_layer / 16


@pytest.mark.parametrize("place", KERNELS)
def test_repeats_are_bitwise_equal(place: Place) -> None:
    height, width = (4, 6) if place == INTERPRETER else (20, 15)

    def run(*a: Tensor) -> Any:
        return spatial_attention_pool(*a, grid=(height, width))

    for dtype in place.dtypes[:2]:
        inputs = make((3, height * width), 64, 96, dtype)
        with place:
            out, grads = gradients(run, inputs, device=place.device)
            for _ in range(1 if place == INTERPRETER else 3):
                again, again_grads = gradients(run, inputs, device=place.device)
                assert torch.equal(out[0], again[0])
                assert all(torch.equal(a, b) for a, b in zip(grads, again_grads, strict=True))


@needs_extension
def test_one_and_two_threads_agree() -> None:
    inputs = make((2, 225), 64, 96)
    with threads(1):
        one = gradients(lambda *a: spatial_attention_pool(*a, grid=(15, 15)), inputs)
    with threads(2):
        two = gradients(lambda *a: spatial_attention_pool(*a, grid=(15, 15)), inputs)
    for a, b in zip([*one[0], *one[1]], [*two[0], *two[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ISAS)
def test_every_instruction_set(name: str, dtype: torch.dtype) -> None:
    inputs = make((1, 100), 40, 70, dtype)

    def run(*a: Tensor) -> Any:
        torch.manual_seed(2)
        return spatial_attention_pool(*a, grid=(10, 10), dropout_p=0.2, training=True)

    with isa(name):
        fused, fused_grads = gradients(run, inputs)
    with use_backend("reference"):
        plain, plain_grads = gradients(run, inputs)
        exact, exact_grads = gradients(run, [t.double() for t in inputs])
    assert_error_rule(fused[0], plain[0], exact[0], dtype, "y")
    for got, p, e in zip(fused_grads[:4], plain_grads, exact_grads, strict=False):
        assert_error_rule(got, p, e, dtype, "gradient")


@pytest.mark.parametrize("place", PLACES)
def test_nan_reaches_the_windows_that_hold_it_only(place: Place) -> None:
    x, *rest = (t.to(place.device) for t in make((1, 36), 8, 16))
    x[0, 0, 3] = torch.nan
    with place:
        y = spatial_attention_pool(x, *rest, grid=(6, 6))
    assert y[0, 0].isnan().all()
    assert y[0, 1:].isfinite().all()


def test_needs_no_gradient_saves_no_mask() -> None:
    inputs = make((1, 36), 8, 16)
    assert spatial_attention_pool(*inputs, grid=(6, 6)).grad_fn is None
    with torch.no_grad():
        assert spatial_attention_pool(*(t.requires_grad_() for t in inputs), grid=(6, 6)).grad_fn is None


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("place", KERNELS)
def test_gradient_of_one_input_alone(place: Place, which: int) -> None:
    inputs = make((2, 20), 12, 18)
    with place:
        _, every = gradients(lambda *a: spatial_attention_pool(*a, grid=(5, 4)), inputs, device=place.device)
        inputs = [t.to(place.device) for t in inputs]
        inputs[which].requires_grad_()
        out = spatial_attention_pool(*inputs, grid=(5, 4))
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
    torch.testing.assert_close(inputs[which].grad.cpu(), every[which])  # type: ignore[union-attr]


@pytest.mark.parametrize("place", KERNELS)
def test_loss_on_the_weights_alone(place: Place) -> None:
    sizes = torch.tensor([[4, 3], [2, 5]])
    inputs = make((22,), 12, 18)

    def run(*a: Tensor) -> Tensor:
        return spatial_attention_pool(*a, grid=sizes, return_weights=True)[1]  # type: ignore[return-value]

    with place:
        _, grads = gradients(run, inputs, device=place.device)
    with use_backend("reference"):
        _, want = gradients(run, inputs)
    for g, w in zip(grads, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


# ---- torch's machinery ----


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


# ---- errors: the argument, what was expected, what came ----

X, W1, B1, W2, B2 = make((2, 20), 8, 16)
GRID = {"grid": (5, 4)}


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (("x", W1, B1, W2, B2), GRID, TypeError, "x: expected a tensor, got str"),
        ((X.int(), W1, B1, W2, B2), GRID, TypeError, "x: expected float32, bfloat16, float16, float64, got int32"),
        ((X[0, 0], W1, B1, W2, B2), GRID, ValueError, "x: expected (B, H*W, D) or packed (T, D), got (8,)"),
        ((X, W1.double(), B1, W2, B2), GRID, TypeError, "w1: expected float32 as x, got float64"),
        ((X, W1, B1.to("meta"), W2, B2), GRID, ValueError, "b1: expected device cpu as x, got meta"),
        ((X, W1[:, 1:], B1, W2, B2), GRID, ValueError, "w1: expected shape (Dh, 8) with the D of x, got (16, 7)"),
        ((X, W1, B1[1:], W2, B2), GRID, ValueError, "b1: expected shape (16,), got (15,)"),
        ((X, W1, B1, W2[:, 1:], B2), GRID, ValueError, "w2: expected shape (1, 16), got (1, 15)"),
        ((X, W1, B1, W2[0, 1:], B2), GRID, ValueError, "w2: expected shape (16,), got (15,)"),
        ((X, W1, B1, W2, B2[0]), GRID, ValueError, "b2: expected shape (1,), got ()"),
        ((X, W1, B1, W2, B2), {"grid": (5, 5)}, ValueError, "x: expected 25 tokens for grid (5, 5), got 20"),
        ((X, W1, B1, W2, B2), {"grid": (-5, -4)}, ValueError, "grid: expected sides of 0 or more, got (-5, -4)"),
        ((X, W1, B1, W2, B2), {"grid": 20}, TypeError, "grid: expected (H, W), or an int tensor (B, 2)"),
        ((X[0], W1, B1, W2, B2), GRID, ValueError, "x: expected (B, 20, D) for grid (5, 4), got (20, 8)"),
        (
            (X, W1, B1, W2, B2),
            {**GRID, "window": 0},
            ValueError,
            "window: expected a positive int or two of them, got 0",
        ),
        ((X, W1, B1, W2, B2), {**GRID, "window": (3, 3, 3)}, ValueError, "window: expected a positive int or two"),
        ((X, W1, B1, W2, B2), {**GRID, "window": 2.5}, ValueError, "window: expected a positive int or two of them"),
        (
            (X, W1, B1, W2, B2),
            {**GRID, "dropout_p": 1.0, "training": True},
            ValueError,
            "dropout_p: expected a probability in [0, 1), got 1.0",
        ),
        (
            (X, W1, B1, W2, B2),
            {"grid": torch.tensor([[5, 4]])},
            ValueError,
            "x: expected packed (T, D) for a grid tensor",
        ),
        ((X[0], W1, B1, W2, B2), {"grid": torch.tensor([5, 4])}, ValueError, "grid: expected shape (B, 2), got (2,)"),
        ((X[0], W1, B1, W2, B2), {"grid": torch.tensor([[5.0, 4.0]])}, TypeError, "grid: expected an integer tensor"),
        (
            (X[0], W1, B1, W2, B2),
            {"grid": torch.tensor([[5, 4], [1, 1]])},
            ValueError,
            "grid: expected sizes with 20 tokens in all as x has, got 21",
        ),
        (
            (X[0], W1, B1, W2, B2),
            {"grid": torch.tensor([[-5, -4]])},
            ValueError,
            "grid: expected sides of 0 or more, got [[-5, -4]]",
        ),
        (
            (X[0], W1, B1, W2, B2),
            {"grid": torch.tensor([[5, 4]]), "num_windows": 9},
            ValueError,
            "num_windows: expected 4 for this grid, got 9",
        ),
    ],
)
def test_errors(args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        spatial_attention_pool(*args, **options)


@needs_extension
def test_raw_ops_refuse_what_would_be_read_out_of_bounds() -> None:
    """Even called below the checks of the public function."""
    x, w1, b1, w2, b2 = make((22,), 8, 16)
    good: dict[str, Any] = {"x": x, "w1": w1, "b1": b1, "w2": w2[0], "b2": b2, "grids": torch.tensor([[4, 3], [2, 5]])}
    rest = (0, 0, 4, 3, 3, 0.0, None, True)
    forward, backward = torch.ops.flashsloth.spatial_pool, torch.ops.flashsloth.spatial_pool_backward
    y, weights, mask = forward(*good.values(), *rest)
    for name, value in {
        "grids": torch.tensor([[4, 3], [200, 5]]), "grids ": torch.tensor([[-4, 3], [2, 5]]), "w1": w1[:, 1:],
        "b1": b1[1:], "w2": w2[0].double(), "x": x[None], "b2": b2[:0],
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError, match=f"spatial_pool: .*{name.strip()}.*: expected"):
            forward(*{**good, name.strip(): value}.values(), *rest)
    with pytest.raises(RuntimeError, match="num_windows: expected 4 in all for these grids, got 5"):
        forward(*good.values(), 0, 0, 5, 3, 3, 0.0, None, True)
    with pytest.raises(RuntimeError, match="seed: expected one int64 with dropout"):
        forward(*good.values(), 0, 0, 4, 3, 3, 0.5, None, True)
    inputs = (x, w1, b1, w2[0])
    geometry = (good["grids"], 0, 0, 3, 3, 0.0, True, True)
    for dy, saved, bits, name in (
        (y[1:], weights, mask, "dy"),
        (y, weights[1:], mask, "weights"),
        (y, weights, mask[:0], "mask"),
    ):
        with pytest.raises(RuntimeError, match=f"spatial_pool: {name}.*: expected"):
            backward(dy, None, *inputs, saved, bits, *geometry)
