"""spatial_attention_pool: dropout, memory, determinism, NaN, gradients of single inputs."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import spatial_attention_pool, use_backend
from flashsloth_ops.reference import spatial_pool as reference
from tests.ops.pool_cases import KERNELS, make, overload
from tests.support import (
    CUDA,
    DTYPES,
    INTERPRETER,
    ISAS,
    PLACES,
    Place,
    assert_error_rule,
    gradients,
    isa,
    needs_extension,
    threads,
)

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
