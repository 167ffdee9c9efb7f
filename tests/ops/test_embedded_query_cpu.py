"""embedded_query_attention on a CPU: shapes, memory, threads and instruction sets, and what torch does around it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashsloth_ops import EmbeddedQueryParams, ImageState, use_backend
from flashsloth_ops import embedded_query as module
from tests.ops.query_cases import NAMES, attend, check_errors, make, raw_arguments
from tests.support import (
    BACKENDS,
    DTYPES,
    ISAS,
    assert_within,
    gradients,
    isa,
    needs_extension,
    poisoned,
    threads,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_extension
@settings(max_examples=50, deadline=None)
@given(
    images=st.integers(0, 3),
    questions=st.integers(0, 3),
    queries=st.integers(0, 5),
    lengths=st.lists(st.integers(0, 7), min_size=9, max_size=9) | st.none(),
    tokens=st.sampled_from([0, 1, 2, 7, 63, 130, 257, 1100, 2500]),
    heads=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9)),
    count=st.integers(1, 2),
)
def test_shapes(
    images: int,
    questions: int,
    queries: int,
    lengths: list[int] | None,
    tokens: int,
    heads: int,
    sizes: tuple[int, int, int],
    count: int,
) -> None:
    """Empty batches, texts, images; one token; more tokens than a tile; more questions than absorbing pays for."""
    batch, (d, dv, model) = images * questions, sizes
    text = 4 if lengths is None else max(lengths[:batch], default=0)
    inputs = make(batch, images, tokens, queries=queries, text=text, model=model, inner=heads * d, dim=heads * dv)
    text_lengths = None if lengths is None else torch.tensor(lengths[:batch], dtype=torch.int32)

    def run(*args: Tensor) -> Any:
        return attend(*args, heads=heads, text_lengths=text_lengths, return_weights=True)

    with poisoned(), threads(count):
        (out, weights), grads = gradients(run, inputs)
        forward_only, _ = run(*inputs)
    with use_backend("reference"):
        want, want_grads = gradients(run, [t.double() for t in inputs])
    assert weights.shape == (batch, queries, tokens)
    torch.testing.assert_close(out, want[0].float(), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(forward_only, want[0].float(), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(weights, want[1].float(), rtol=1e-4, atol=2e-5)
    for name, got, expected in zip(NAMES, grads, want_grads, strict=True):
        scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(got / scale, expected.float() / scale, rtol=1e-3, atol=1e-4, msg=name)


@needs_extension
def test_non_contiguous() -> None:
    query, text, image, *weights = make()
    lengths = torch.tensor([1, 6, 9, 0, 9, 3, 9, 6])
    strided = [
        query.transpose(1, 2).contiguous().transpose(1, 2),
        text.repeat_interleave(2, 1)[:, ::2],
        image.transpose(0, 1).contiguous().transpose(0, 1),
        *(w.T.contiguous().T if w.dim() == 2 else w.repeat_interleave(3)[::3] for w in weights),
    ]
    assert sum(not t.is_contiguous() for t in strided) == 27
    got = attend(*strided, text_lengths=lengths[::2].clamp(max=6))
    assert not lengths[::2].is_contiguous()
    want = attend(query, text, image, *weights, text_lengths=torch.tensor([1, 6, 6, 6]))
    assert torch.equal(got, want)
    leaves = [t.clone().requires_grad_() for t in (query, text, image, *weights)]
    out = attend(*leaves)
    expanded = torch.ones(1).expand_as(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, expanded, retain_graph=True),
        torch.autograd.grad(out, leaves, torch.ones_like(out)),
        strict=True,
    ):
        assert torch.equal(a, b)


@needs_extension
def test_memory_kept_for_backward() -> None:
    """Besides inputs and the image's state, only what grows with queries and text, not with image tokens."""
    kept: list[int] = []
    for tokens in (64, 640):
        inputs = [t.requires_grad_() for t in make(tokens=tokens)]
        state = ImageState.from_image(inputs[2], EmbeddedQueryParams(*inputs[3:]))
        own = {t.untyped_storage().data_ptr() for t in (*inputs, *state)}
        sizes: dict[int, int] = {}

        def pack(t: Tensor, own: set[int] = own, sizes: dict[int, int] = sizes) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            attend(*inputs, image_state=state)
        kept.append(sum(sizes.values()))
    assert kept[0] == kept[1] == 4 * 4 * ((3 + 6) * 24 + 3 * 24 + 3 * 4 * 32 + 3 * 32 + 3 * 4 * 2)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 3])
def test_repeats_are_bitwise_equal(dtype: torch.dtype, images: int) -> None:
    inputs = make(3, images, 700, dtype=dtype)
    out, grads = gradients(attend, inputs)
    for _ in range(3):
        again, again_grads = gradients(attend, inputs)
        assert torch.equal(out[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, again_grads, strict=True))


@needs_extension
@pytest.mark.parametrize(("batch", "images"), [(1, 1), (3, 3), (8, 1)])
def test_one_and_two_threads_agree(batch: int, images: int) -> None:
    inputs = make(batch, images, 700)
    with threads(1):
        one = gradients(attend, inputs)
    with threads(2):
        two = gradients(attend, inputs)
    for a, b in zip([*one[0], *one[1]], [*two[0], *two[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ISAS)
def test_every_instruction_set(name: str, dtype: torch.dtype) -> None:
    draws = [make(model=40, inner=48, dim=40, dtype=dtype, seed=seed) for seed in range(8)]
    run = partial(attend, text_lengths=torch.tensor([6, 2, 0, 1]), return_weights=True)
    check_errors(run, draws, dtype, isa(name))


@needs_extension
def test_needs_no_gradient_saves_nothing() -> None:
    inputs = make()
    assert attend(*inputs).grad_fn is None
    with torch.no_grad():
        assert attend(*(t.requires_grad_() for t in inputs)).grad_fn is None
    out, weights = attend(*inputs, return_weights=True)
    assert out.requires_grad
    assert not weights.requires_grad, "the weights are for looking at"
    detached = [t.detach() for t in inputs]
    params = EmbeddedQueryParams(*detached[3:])
    state = ImageState.from_image(detached[2], params)
    raw = (*detached[:2], None, detached[2], *state, [p.requires_grad_() for p in params._kernel_params()], 4, 1e-5)
    raw_out = torch.ops.flashsloth.embedded_query(*raw, False, False)[0]
    with pytest.raises(RuntimeError, match="call the op with save=True"):
        raw_out.sum().backward()


@pytest.mark.parametrize("which", range(27), ids=NAMES)
def test_gradient_of_one_input_alone(which: int) -> None:
    inputs = make(2, 1, 9)
    _, every = gradients(attend, inputs)
    inputs[which].requires_grad_()
    out = attend(*inputs)
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).float())
    torch.testing.assert_close(inputs[which].grad, every[which])


# ---- torch's machinery ----


@needs_extension
def test_compile_with_inductor_and_a_state() -> None:
    def run(*args: Tensor) -> Any:
        state = ImageState.from_image(args[2], EmbeddedQueryParams(*args[3:]))
        return attend(*args, image_state=state) * 2

    inputs = make()
    # A graph compiled for an older version of the op would be taken from the cache as it is.
    with torch._inductor.config.patch(force_disable_caches=True):
        want, got = gradients(run, inputs), gradients(torch.compile(run, fullgraph=True), inputs)
    for a, b in zip([*want[0], *want[1]], [*got[0], *got[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs_extension
def test_export() -> None:
    class Ask(torch.nn.Module):
        def __init__(self, weights: list[Tensor]) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(weights)

        def forward(self, query: Tensor, text: Tensor, image: Tensor, lengths: Tensor) -> Any:
            return attend(query, text, image, *self.weights, text_lengths=lengths)

    query, text, image, *weights = make(2, 2, 9)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes = (batch, batch, batch, batch)
    ask = Ask(weights)
    program = torch.export.export(ask, (query, text, image, torch.tensor([6, 2])), dynamic_shapes=shapes)
    assert "flashsloth.embedded_query" in program.graph_module.code
    other = (*make(5, 5, 9, seed=3)[:3], torch.tensor([1, 0, 6, 2, 5]))
    torch.testing.assert_close(program.module()(*other), ask(*other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    inputs = make()
    with use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*inputs)
            mixed = attend(inputs[0].bfloat16(), *inputs[1:])
            state = ImageState.from_image(inputs[2], EmbeddedQueryParams(*inputs[3:]))
            reused = attend(*inputs, image_state=state)
        want = attend(*(t.bfloat16() for t in inputs))
    assert out.dtype == torch.bfloat16
    for got in (out, mixed, reused):
        if backend == "cpu":
            assert torch.equal(got, want)
        else:  # within autocast, layer norms and softmaxes of the reference are in fp32
            assert_within(got, want, 2**-7, "out")


@needs_extension
def test_without_the_compiled_kernel_the_ops_still_work() -> None:
    """The default kernels, which serve devices and installations without compiled ones."""
    lengths = torch.tensor([6, 0, 1, 3])
    with torch.no_grad():
        args = raw_arguments(lengths)
        for a, b in zip(
            module._plain(*args, True, True), torch.ops.flashsloth.embedded_query(*args, True, True), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        dout, *_ = out = torch.ops.flashsloth.embedded_query(*args, False, True)
        assert out[1].shape == module._plain(*args, False, True)[1].shape
        for needs in ((True, True, True), (False, True, False)):
            back = (dout, *args[:8], *out[2:], 4, 1e-5, *needs)
            *plain, plain_params = module._plain_backward(*back)
            *fused, fused_params = torch.ops.flashsloth.embedded_query_backward(*back)
            for a, b in zip([*plain, *plain_params], [*fused, *fused_params], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert [t.shape[0] for t in module._plain(*args, False, False)[1:]] == [0] * 6
