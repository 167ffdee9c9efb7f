"""embedded_query_attention: every backend against the official code, the specification and its own contract."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashsloth_ops import EmbeddedQueryParams, ImageState, embedded_query_attention, use_backend
from flashsloth_ops import embedded_query as module
from flashsloth_ops.reference import embedded_query as reference
from tests.support import (
    BACKENDS,
    DTYPES,
    ISAS,
    Golden,
    assert_error_rule,
    assert_within,
    gradients,
    isa,
    needs_extension,
    poisoned,
    threads,
)

# The softmax does not see a shift of all scores of a row: these gradients are exactly zero.
UNSEEN = ("t2q_k_bias", "i2q_k_bias", "ln_kv_bias")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(
    batch: int = 4,
    images: int = 2,
    tokens: int = 50,
    *,
    queries: int = 3,
    text: int = 6,
    heads: int = 4,
    model: int = 20,
    inner: int = 24,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """query, text, image and the 24 weights, with scores of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    def linear(out: int, into: int) -> list[Tensor]:
        return [normal(out, into, scale=max(into, 1) ** -0.5), normal(out, scale=0.3)]

    inputs = [normal(batch, queries, model), normal(batch, text, model), normal(images, tokens, dim)]
    weights = [*linear(inner, model), *linear(inner, dim)]
    for _ in range(3):
        weights += [normal(inner, scale=0.3, shift=1.0), normal(inner, scale=0.3)]
    for _ in range(5):
        weights += linear(inner, inner)
    return [*inputs, *weights, *linear(dim, dim), *linear(model, dim)]


def attend(*args: Tensor, heads: int = 4, **options: Any) -> Any:
    query, text, image, *weights = args
    return embedded_query_attention(query, text, image, EmbeddedQueryParams(*weights), num_heads=heads, **options)


NAMES = ("query", "text", "image", *EmbeddedQueryParams._fields)


# ---- against the official code and the specification ----


def official_inputs(golden: Golden) -> list[Tensor]:
    io = golden.io
    if "image_tokens" in io:
        image = io["image_tokens"]
    else:  # five tiles made of one, as the case's meta.json says
        scales = (1, -0.5, 0.75, 1.25, -1.5)
        parts = [torch.roll(io["image_base"], 7 * k, dims=-1) * scale for k, scale in enumerate(scales)]
        image = torch.cat(parts, dim=1)
    params = EmbeddedQueryParams.from_state_dict(golden.weights)
    return [t.clone().requires_grad_() for t in (io["learnable_tokens"], io["text_tokens"], image, *params)]


def check_official(golden: Golden, inputs: list[Tensor], lengths: list[int] | None) -> None:
    text_lengths = None if lengths is None else torch.tensor(lengths)
    out, weights = attend(*inputs, text_lengths=text_lengths, return_weights=True)
    golden.check("out", out, 1e-5)
    golden.check("attention_map", weights, 1e-5)
    grads = dict(zip(NAMES, torch.autograd.grad(out, inputs, golden.io["g"]), strict=True))
    golden.check("grad.learnable_tokens", grads["query"], 2e-5)
    golden.check("grad.text_tokens", grads["text"], 2e-5)
    golden.check("grad.image_tokens", grads["image"], 2e-5)
    for field in EmbeddedQueryParams._fields:
        step, _, kind = field.rpartition("_")
        if field in UNSEEN:  # the official code leaves its rounding there
            weight = grads[f"{step}_weight"]
            assert grads[field].abs().max() <= 2e-5 * weight.abs().max() if weight.any() else not grads[field].any()
        else:
            golden.check(f"grad.{module._MODULES[step]}.{kind}", grads[field], 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", ["embq_small_nomask", "embq_small_garbage", "embq_notext", "embq_729", "embq_3645", "embq_small_emptyrow"]
)
def test_official(case: str, backend: str) -> None:
    golden = Golden(case)
    lengths = golden.meta["valid_text_lens"]
    if case == "embq_small_emptyrow":
        # In a batch with text the official code reads a row without any as its zero padding. So does the op, when told.
        lengths = [length or golden.meta["text_len"] for length in lengths]
    with use_backend(backend):
        check_official(golden, official_inputs(golden), None if "nomask" in case else lengths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_official_rows_beside_a_row_without_text(backend: str) -> None:
    golden = Golden("embq_small_emptyrow")
    lengths = golden.meta["valid_text_lens"]
    rows = [i for i, length in enumerate(lengths) if length]
    assert len(rows) < len(lengths)
    inputs = official_inputs(golden)
    with use_backend(backend):
        out, weights = attend(*inputs, text_lengths=torch.tensor(lengths), return_weights=True)
    dquery, dtext = torch.autograd.grad(out, inputs[:2], golden.io["g"])
    for name, got in (("out", out), ("attention_map", weights)):
        assert_within(got[rows], golden.io[name][rows], 1e-5, name)
    for name, got in (("grad.learnable_tokens", dquery), ("grad.text_tokens", dtext)):
        assert_within(got[rows], golden.io[name][rows], 2e-5, name)
    empty = lengths.index(0)
    assert not torch.allclose(out[empty], golden.io["out"][empty], atol=1e-5), "here the official code averages padding"
    assert not dtext[empty].any()


def naive(args: list[Tensor], heads: int, lengths: list[int], eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Numbers, loops and sums in fp64: nothing shared with the code under test."""
    query, text, image, *weights = (t.double() for t in args)
    p = EmbeddedQueryParams(*weights)
    batch, queries, _ = query.shape
    images, tokens, dim = image.shape
    inner = len(p.down_text_bias)
    d, dv = inner // heads, dim // heads

    def project(row: Tensor, name: str) -> Tensor:
        return getattr(p, name + "_weight") @ row + getattr(p, name + "_bias")

    def norm(row: Tensor, name: str) -> Tensor:
        mean = row.sum() / inner
        spread = ((row - mean) ** 2).sum() / inner
        return (row - mean) / torch.sqrt(spread + eps) * getattr(p, name + "_weight") + getattr(p, name + "_bias")

    def look(q: Tensor, keys: list[Tensor], values: list[Tensor], size: int, width: int) -> tuple[Tensor, Tensor]:
        out, mean = torch.zeros(heads * width, dtype=torch.float64), torch.zeros(len(keys), dtype=torch.float64)
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = torch.tensor([float(q[part] @ k[part]) / size**0.5 for k in keys], dtype=torch.float64).exp()
            for weight, value in zip(weights / weights.sum(), values, strict=True):
                out[h * width : (h + 1) * width] += weight * value[h * width : (h + 1) * width]
            mean += weights / weights.sum() / heads
        return out, mean

    out, maps = torch.zeros_like(query), torch.zeros(batch, queries, tokens, dtype=torch.float64)
    for b in range(batch):
        told_rows = [norm(project(row, "down_text"), "ln_text") for row in text[b, : lengths[b]]]
        pixels = image[b // (batch // images)]
        keys = [project(norm(project(row, "down_image"), "ln_kv"), "i2q_k") for row in pixels]
        values = [project(row, "i2q_v") for row in pixels]
        for i in range(queries):
            q = project(norm(project(query[b, i], "down_text"), "ln_q"), "t2q_q")
            told, _ = look(q, [project(r, "t2q_k") for r in told_rows], [project(r, "t2q_v") for r in told_rows], d, d)
            seen, maps[b, i] = look(project(told, "i2q_q"), keys, values, d, dv)
            out[b, i] = query[b, i] + project(seen, "up")
    return out, maps


@pytest.mark.parametrize("backend", BACKENDS)
def test_naive_loops(backend: str) -> None:
    inputs = make(4, 2, 11, queries=2, text=5)
    lengths = [5, 0, 2, 1]
    out, maps = naive(inputs, 4, lengths)
    with use_backend(backend):
        got, weights = attend(*inputs, text_lengths=torch.tensor(lengths), return_weights=True)
        exact = attend(*(t.double() for t in inputs), text_lengths=torch.tensor(lengths))
    assert_within(got, out.float(), 2e-6, "out")
    assert_within(weights, maps.float(), 2e-6, "weights")
    torch.testing.assert_close(exact, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "images", "tokens"), [(2, 2, 7), (4, 1, 5), (2, 1, 0)])
def test_gradcheck(batch: int, images: int, tokens: int, backend: str) -> None:
    sizes: dict[str, int] = {"queries": 2, "text": 3, "heads": 2, "model": 5, "inner": 6, "dim": 4}
    inputs = [t.requires_grad_() for t in make(batch, images, tokens, dtype=torch.float64, **sizes)]
    lengths = torch.tensor([3, 1, 0, 2][:batch])
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *a: attend(*a, heads=2, text_lengths=lengths), inputs, fast_mode=False)


@pytest.mark.parametrize(
    ("batch", "images", "tokens", "lengths"),
    [(4, 2, 7, [5, 0, 2, 1]), (2, 2, 0, None), (0, 0, 3, None), (0, 2, 3, None), (3, 3, 4, [0, 0, 0])],
)
def test_absorbed_specification_matches_autograd(
    batch: int, images: int, tokens: int, lengths: list[int] | None
) -> None:
    """The absorbed form, forward and backward, as the reference writes it, is the function the paper describes."""
    query, text, image, *weights = (
        t.requires_grad_() for t in make(batch, images, tokens, text=5, dtype=torch.float64)
    )
    params = EmbeddedQueryParams(*weights)
    text_lengths = None if lengths is None else torch.tensor(lengths)
    y, mean, rstd = (t.detach() for t in module._plain_state(image, *params[2:4], 1e-5))
    y.requires_grad_()
    options: dict[str, Any] = {"num_heads": 4, "text_lengths": text_lengths, "image_y": y}
    want, want_weights = reference.embedded_query_attention(query, text, image, params, **options)
    dout = torch.randn_like(want)
    used = [query, text, image, y, *params._kernel_params()]
    want_grads = torch.autograd.grad(want, used, dout, materialize_grads=True)
    with torch.no_grad():
        inputs = (query, text, text_lengths, image, y)
        out, got_weights, *saved = reference.absorbed_forward(*inputs, rstd, used[4:], 4, 1e-5)
        *grads, dparams = reference.absorbed_backward(dout, *inputs, mean, rstd, used[4:], *saved, 4, 1e-5)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got_weights, want_weights, rtol=1e-11, atol=1e-11)
    for got, expected in zip([*grads, *dparams], want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def check_errors(run: Any, draws: list[list[Tensor]], dtype: torch.dtype, kernels: Any) -> None:
    """The error rule for outputs and gradients, over several draws: the largest error of one is a matter of luck."""
    with kernels:
        fused = [gradients(run, inputs) for inputs in draws]
    with use_backend("reference"):
        plain = [gradients(run, inputs) for inputs in draws]
        exact = [gradients(run, [t.double() for t in inputs]) for inputs in draws]
    for i, name in enumerate(("out", "weights")):
        f, p, e = (torch.stack([outputs[i] for outputs, _ in results]) for results in (fused, plain, exact))
        assert f.dtype == (torch.float32 if name == "weights" else dtype)
        assert_error_rule(f, p, e, f.dtype, name)
    for i, name in enumerate(NAMES):
        f, p, e = (torch.stack([grads[i] for _, grads in results]) for results in (fused, plain, exact))
        assert f.dtype == dtype
        assert_error_rule(f, p, e, dtype, name)
        if name in UNSEEN:
            assert not f.any(), f"{name} is exactly zero"


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "images", "tokens"), [(4, 4, 60), (6, 1, 37), (2, 1, 300)])
def test_error_rule(dtype: torch.dtype, batch: int, images: int, tokens: int) -> None:
    lengths = torch.tensor([6, 4, 0, 1, 6, 2][:batch])
    sizes: dict[str, int] = {"queries": 5, "model": 48, "inner": 64, "dim": 96}
    draws = [make(batch, images, tokens, dtype=dtype, seed=seed, **sizes) for seed in range(8)]
    run = partial(attend, text_lengths=lengths, return_weights=True)
    check_errors(run, draws, dtype, nullcontext())


# ---- shapes ----


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_questions_an_image_equal_separate_calls(backend: str) -> None:
    """Few questions, which are absorbed, and many, for which keys and values are formed."""
    for batch in (4, 18):
        query, text, image, *weights = make(batch, 2, 40)
        lengths = torch.arange(batch) % 7

        def separate(query: Tensor, text: Tensor, image: Tensor, *weights: Tensor, lengths: Tensor = lengths) -> Any:
            per_image = len(query) // 2
            return torch.cat([
                attend(query[i : i + 1], text[i : i + 1], image[i // per_image][None], *weights,
                       text_lengths=lengths[i : i + 1])
                for i in range(len(query))
            ])  # fmt: skip

        with use_backend(backend):
            together = gradients(lambda *a, n=lengths: attend(*a, text_lengths=n), [query, text, image, *weights])
            apart = gradients(separate, [query, text, image, *weights])
            with torch.no_grad():
                forward_only = attend(query, text, image, *weights, text_lengths=lengths)
        torch.testing.assert_close(together[0][0], apart[0][0])
        torch.testing.assert_close(forward_only, apart[0][0])
        for got, want in zip(together[1], apart[1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


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


# ---- texts of different lengths ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_padding_may_hold_anything(dtype: torch.dtype, backend: str) -> None:
    inputs = make()
    lengths = torch.tensor([2, 6, 0, 5], dtype=dtype)
    padding = torch.arange(6) >= lengths.view(-1, 1)
    clean = [inputs[0], inputs[1].masked_fill(padding[..., None], 0.0), *inputs[2:]]
    dirty = [inputs[0], inputs[1].masked_fill(padding[..., None], torch.nan), *inputs[2:]]
    with use_backend(backend):
        want, want_grads = gradients(lambda *a: attend(*a, text_lengths=lengths), clean)
        got, grads = gradients(lambda *a: attend(*a, text_lengths=lengths), dirty)
    assert torch.equal(got[0], want[0])
    for a, b in zip(grads, want_grads, strict=True):
        assert torch.equal(a, b)
    assert not grads[1][padding].any()
    assert grads[1][~padding].any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_without_text_is_the_same_alone_or_in_a_batch(backend: str) -> None:
    query, text, image, *weights = make(2, 2)
    with use_backend(backend):
        batch = attend(query, text, image, *weights, text_lengths=torch.tensor([0, 6]))
        no_rows = attend(query[:1], text[:1, :0], image[:1], *weights)
        no_length = attend(query[:1], text[:1], image[:1], *weights, text_lengths=torch.tensor([0]))
    torch.testing.assert_close(batch[:1], no_rows)
    torch.testing.assert_close(no_length, no_rows)


# ---- the image's state ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_reused_equals_computed_anew(backend: str) -> None:
    first, second = make(4, 2), make(4, 2, seed=1)

    def ask(reuse: bool) -> Any:
        def run(q1: Tensor, t1: Tensor, q2: Tensor, t2: Tensor, image: Tensor, *weights: Tensor) -> Any:
            state = ImageState.from_image(image, EmbeddedQueryParams(*weights)) if reuse else None
            return [attend(q, t, image, *weights, image_state=state) for q, t in ((q1, t1), (q2, t2))]

        return gradients(run, [*first[:2], *second[:2], *first[2:]])

    with use_backend(backend):
        reused, anew = ask(True), ask(False)
    assert all(torch.equal(a, b) for a, b in zip(reused[0], anew[0], strict=True))
    for got, want in zip(reused[1], anew[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_is_the_projection_and_its_statistics(dtype: torch.dtype, backend: str) -> None:
    _, _, image, *weights = make(tokens=600, dtype=dtype)
    params = EmbeddedQueryParams(*weights)
    with use_backend(backend):
        y, mean, rstd = ImageState.from_image(image, params, eps=1e-3)
    want = torch.nn.functional.linear(image.double(), *(p.double() for p in params[2:4]))
    plain = torch.nn.functional.linear(image, *params[2:4])
    assert_error_rule(y, plain, want, dtype, "y")
    var, center = torch.var_mean(y.double(), -1, correction=0)
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), center, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (var + 1e-3).rsqrt(), rtol=1e-5, atol=1e-6)


def test_state_without_gradient_stops_it() -> None:
    query, text, image, *weights = make()
    params = EmbeddedQueryParams(*(w.requires_grad_() for w in weights))
    with torch.no_grad():
        state = ImageState.from_image(image, params)
    out = embedded_query_attention(query, text, image, params, num_heads=4, image_state=state)
    out.sum().backward()
    assert params.down_image_weight.grad is None
    assert params.i2q_v_weight.grad is not None


# ---- the promises of the op ----


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_reaches_the_questions_that_see_it_only(where: int, backend: str) -> None:
    inputs = make(4, 2)
    inputs[where][1, 0, 0] = torch.nan
    hit = [2, 3] if where == 2 else [1]  # the second image is read by the last two questions
    with use_backend(backend):
        out = attend(*inputs)
    assert out[hit].isnan().any(-1).any(-1).all()
    assert out[[i for i in range(4) if i not in hit]].isfinite().all()


def test_large_scores_do_not_overflow() -> None:
    inputs = make(2, 1, 2100)
    inputs[3 + EmbeddedQueryParams._fields.index("i2q_q_weight")] *= 300
    out, weights = attend(*inputs, return_weights=True)
    with use_backend("reference"):
        want, _ = attend(*(t.double() for t in inputs), return_weights=True)
    assert weights.sort(-1).values[..., -4:].sum(-1).mean() > 0.95, "each of the four heads looks at one token"
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)


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


def raw_arguments(lengths: Tensor | None) -> tuple[Any, ...]:
    query, text, image, *weights = (t.requires_grad_() for t in make(4, 2, 9))
    params = EmbeddedQueryParams(*weights)
    state = [t.detach() for t in ImageState.from_image(image, params)]
    state[0].requires_grad_()
    return query, text, lengths, image, *state, params._kernel_params(), 4, 1e-5


@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 0, 1, 3])], ids=["whole", "padded"])
def test_opcheck(lengths: Tensor | None) -> None:
    args = raw_arguments(lengths)
    torch.library.opcheck(torch.ops.flashsloth.embedded_query.default, (*args, True, True))
    torch.library.opcheck(torch.ops.flashsloth.image_state.default, (args[3], *make()[5:7], 1e-5))
    detached = [[p.detach() for p in a] if isinstance(a, list) else a.detach() if isinstance(a, Tensor) else a
                for a in args]  # fmt: skip
    out, _, *saved = torch.ops.flashsloth.embedded_query(*detached, False, True)
    for needs in ((True, True, True), (False, False, True), (True, False, False)):
        back = (torch.randn_like(out), *detached[:8], *saved, 4, 1e-5, *needs)
        torch.library.opcheck(torch.ops.flashsloth.embedded_query_backward.default, back)


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("reference", False), *(pytest.param("cpu", d, marks=needs_extension) for d in (False, True))],
)
def test_compile_equals_eager(backend: str, dynamic: bool) -> None:
    def run(lengths: Tensor, *args: Tensor) -> Any:
        return attend(*args, text_lengths=lengths, return_weights=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend(backend):
        for batch in (2, 4):
            inputs = [torch.tensor([6, 0, 1, 3][:batch]), *make(batch, 2, 9)]
            want, got = gradients(run, inputs), gradients(compiled, inputs)
            for a, b in zip([*want[0], *want[1]], [*got[0], *got[1]], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


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


# ---- weights by their official names ----


def state_dict(prefix: str = "") -> dict[str, Tensor]:
    names = [f"{prefix}{module._MODULES[f.rpartition('_')[0]]}.{f.rpartition('_')[2]}" for f in NAMES[3:]]
    return dict(zip(names, make()[3:], strict=True))


def test_from_state_dict() -> None:
    weights = state_dict("model.lqformer.")
    assert "model.lqformer.layers.0.t2q_attn.k_proj.bias" in weights
    params = EmbeddedQueryParams.from_state_dict({**weights, "other": torch.ones(1)}, "model.lqformer.")
    for got, want in zip(params, make()[3:], strict=True):
        assert torch.equal(got, want)


def test_from_state_dict_lists_what_is_wrong() -> None:
    weights = state_dict()
    for name in ("up_projector.bias", "layers.0.ln_q.weight"):
        del weights[name]
    with pytest.raises(KeyError, match=r"missing 2 of 24 names: layers.0.ln_q.weight, up_projector.bias"):
        EmbeddedQueryParams.from_state_dict(weights)
    with pytest.raises(KeyError, match=r"missing 24 of 24 names: x.down_projector_learnable_text.weight, "):
        EmbeddedQueryParams.from_state_dict(weights, "x.")
    weights = {**state_dict(), "up_projector.bias": torch.ones(7), "layers.0.ln_q.weight": torch.ones(24, 1)}
    message = "layers.0.ln_q.weight: expected (24,), got (24, 1); up_projector.bias: expected (20,), got (7,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        EmbeddedQueryParams.from_state_dict(weights)
    with pytest.raises(ValueError, match=r"down_projector_learnable_text.weight: expected \(0, 0\), got \(\)"):
        EmbeddedQueryParams.from_state_dict({**weights, "down_projector_learnable_text.weight": torch.ones(())})


# ---- errors: the argument, what was expected, what came ----

Q, T, X, *W = make(4, 2, 9)
P = EmbeddedQueryParams(*W)
STATE = ImageState(torch.ones(2, 9, 24), torch.ones(2, 9), torch.ones(2, 9))
H = {"num_heads": 4}


def replaced(**fields: Any) -> EmbeddedQueryParams:
    return P._replace(**fields)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (("q", T, X, P), H, TypeError, "query: expected a tensor, got str"),
        ((Q, None, X, P), H, TypeError, "text: expected a tensor, got NoneType"),
        ((Q, T, [1], P), H, TypeError, "image: expected a tensor, got list"),
        ((Q.int(), T, X, P), H, TypeError, "query: expected float32, bfloat16, float16, float64, got int32"),
        ((Q, T.double(), X, P), H, TypeError, "text: expected float32 as query, got float64"),
        ((Q, T, X.half(), P), H, TypeError, "image: expected float32 as query, got float16"),
        ((Q, T, X.to("meta"), P), H, ValueError, "image: expected device cpu as query, got meta"),
        ((Q[0], T, X, P), H, ValueError, "query: expected shape (B, Q, Dm), got (3, 20)"),
        ((Q, T[:3], X, P), H, ValueError, "text: expected shape (4, T, 20) with the B and Dm of query, got (3, 6, 20)"),
        ((Q, T[..., 1:], X, P), H, ValueError, "text: expected shape (4, T, 20) with the B and Dm of query"),
        ((Q, T, X[0], P), H, ValueError, "image: expected shape (Bi, N, Di), got (9, 32)"),
        ((Q[:3], T[:3], X, P), H, ValueError, "image: expected a batch that divides the 3 of query, got 2"),
        ((Q, T, X[:0], P), H, ValueError, "image: expected a batch that divides the 4 of query, got 0"),
        ((Q, T, X, W), H, TypeError, "params: expected EmbeddedQueryParams, got list"),
        ((Q, T, X, replaced(up_bias=None)), H, TypeError, "up_bias: expected a tensor, got NoneType"),
        ((Q, T, X, replaced(up_bias=P.up_bias.double())), H, TypeError, "up_bias: expected float32 as query"),
        (
            (Q, T, X, replaced(down_text_weight=P.down_text_weight[:, 1:])),
            H,
            ValueError,
            "down_text_weight: expected shape (E, 20) with the Dm of query, got (24, 19)",
        ),
        (
            (Q, T, X, replaced(down_image_weight=P.down_image_weight[1:])),
            H,
            ValueError,
            "down_image_weight: expected shape (24, 32) with the Di of image, got (23, 32)",
        ),
        ((Q, T, X, replaced(t2q_k_bias=P.up_bias)), H, ValueError, "t2q_k_bias: expected shape (24,), got (20,)"),
        (
            (Q, T, X, replaced(i2q_v_weight=P.i2q_v_weight[1:])),
            H,
            ValueError,
            "i2q_v_weight: expected shape (32, 32), got (31, 32)",
        ),
        ((Q, T, X, P), {"num_heads": 3}, ValueError, "num_heads: expected a divisor of 24 and 32, got 3"),
        ((Q, T, X, P), {"num_heads": 0}, ValueError, "num_heads: expected a divisor of 24 and 32, got 0"),
        ((Q, T, X, P), {"num_heads": 4.0}, ValueError, "num_heads: expected a divisor of 24 and 32, got 4.0"),
        ((Q, T, X, P), {**H, "text_lengths": [1]}, TypeError, "text_lengths: expected a tensor, got list"),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.ones(4)},
            TypeError,
            "text_lengths: expected an integer tensor, got float32",
        ),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.ones(4, dtype=torch.bool)},
            TypeError,
            "text_lengths: expected an integer tensor, got bool",
        ),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.ones(3, dtype=torch.int32)},
            ValueError,
            "text_lengths: expected shape (4,), got (3,)",
        ),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.tensor([0, 6, 7, 1])},
            ValueError,
            "text_lengths: expected lengths in [0, 6], got 7",
        ),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.tensor([0, 6, -1, 1])},
            ValueError,
            "text_lengths: expected lengths in [0, 6], got -1",
        ),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.ones(4, dtype=torch.int64, device="meta")},
            ValueError,
            "text_lengths: expected device cpu as text, got meta",
        ),
        ((Q, T, X, P), {**H, "image_state": X}, TypeError, "image_state: expected ImageState, got Tensor"),
        (
            (Q, T, X, P),
            {**H, "image_state": STATE._replace(y=None)},
            TypeError,
            "image_state.y: expected a tensor, got NoneType",
        ),
        (
            (Q, T, X, P),
            {**H, "image_state": STATE._replace(y=STATE.y[:1])},
            ValueError,
            "image_state.y: expected shape (2, 9, 24) with the Bi and N of image, got (1, 9, 24)",
        ),
        (
            (Q, T, X, P),
            {**H, "image_state": STATE._replace(rstd=STATE.rstd.double())},
            TypeError,
            "image_state.rstd: expected float32 on cpu, got float64 on cpu",
        ),
        (
            (Q, T, X, P),
            {**H, "image_state": STATE._replace(mean=STATE.mean[:, 1:])},
            ValueError,
            "image_state.mean: expected shape (2, 9) with the Bi and N of image, got (2, 8)",
        ),
    ],
)
def test_errors(args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        embedded_query_attention(*args, **options)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((3, P), TypeError, "image: expected a tensor, got int"),
        ((X, None), TypeError, "params: expected EmbeddedQueryParams, got NoneType"),
        ((X[0], P), ValueError, "image: expected shape (Bi, N, Di), got (9, 32)"),
        ((X.double(), P), TypeError, "down_image_weight: expected float64 as image, got float32"),
        ((X[..., 1:], P), ValueError, "down_image_weight: expected shape (E, 31) with the Di of image, got (24, 32)"),
        ((X, replaced(down_image_bias=P.up_bias)), ValueError, "down_image_bias: expected shape (24,), got (20,)"),
    ],
)
def test_errors_of_the_state(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ImageState.from_image(*args)


@needs_extension
def test_raw_ops_refuse_what_does_not_fit() -> None:
    """Even called below the checks, no shape and no length makes the kernel read out of bounds."""
    good = list(raw_arguments(torch.tensor([6, 0, 1, 3])))
    op = torch.ops.flashsloth.embedded_query
    assert op(*good, True, False)[0].shape == (4, 3, 20)
    bad: list[tuple[int, Any, str]] = [
        (0, Q[0], "three dimensions"),
        (0, Q.double(), "one dtype"),
        (1, T[:2], "like query"),
        (2, torch.tensor([6, 0, 1, 7]), r"lengths in \[0, 6\], got 7"),
        (2, torch.tensor([6, 0, 1, 3], dtype=torch.int32), "int64"),
        (3, X[:, 1:], "like image"),
        (6, STATE.rstd[:1], "mean and rstd"),
        (7, good[7][:-1], "22 params, got 21"),
        (7, [*good[7][:-1], Q[0]], r"params\[21\]: expected 20 numbers"),
        (8, 5, "divides E and Di"),
        (8, 0, "divides E and Di"),
    ]
    for position, value, message in bad:
        args = [*good[:position], value, *good[position + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            op(*args, True, False)
    with pytest.raises(RuntimeError, match="multiple of the images"):
        op(Q[:3], T[:3], None, *good[3:], True, False)
    saved = op(*good, False, False)[2:]
    with pytest.raises(RuntimeError, match="what forward saved with save=True"):
        torch.ops.flashsloth.embedded_query_backward(Q, *good[:8], *saved, 4, 1e-5, True, True, True)
    with pytest.raises(RuntimeError, match=r"expected image \(Bi, N, Di\)"):
        torch.ops.flashsloth.image_state(X, W[2][1:], W[3], 1e-5)


def test_fields_are_in_the_order_of_the_kernel() -> None:
    """csrc/cpu/embedded_query.h numbers the weights; these pairs must stay neighbours in both lists."""
    assert len(P._kernel_params()) == 22
    fields = [f for f in EmbeddedQueryParams._fields if not f.startswith("down_image")]
    assert all(a.replace("_weight", "_bias") == b for a, b in list(pairwise(fields))[::2])
    assert fields[::2] == [
        f"{step}_weight"
        for step in (
            "down_text", "ln_q", "ln_text", "ln_kv", "t2q_q", "t2q_k", "t2q_v", "i2q_q", "i2q_k", "i2q_v", "up",
        )
    ]  # fmt: skip
