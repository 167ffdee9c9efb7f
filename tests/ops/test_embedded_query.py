"""embedded_query_attention on every backend, against the official code, the specification and its own contract."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import EmbeddedQueryParams, ImageState, embedded_query_attention, use_backend
from flashsloth_ops import _library as library
from flashsloth_ops import embedded_query as module
from flashsloth_ops.reference import embedded_query as reference
from tests.ops.query_cases import (
    attend,
    check_errors,
    check_official,
    each_dtype,
    make,
    naive,
    official_inputs,
    raw_arguments,
)
from tests.support import (
    BACKENDS,
    CUDA,
    INTERPRETER,
    PLACES,
    TRITON,
    Golden,
    Place,
    assert_error_rule,
    assert_within,
    gradients,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- against the official code and the specification ----


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "case", ["embq_small_nomask", "embq_small_garbage", "embq_notext", "embq_729", "embq_3645", "embq_small_emptyrow"]
)
def test_official(case: str, place: Place) -> None:
    if place == INTERPRETER and case in ("embq_729", "embq_3645"):
        pytest.skip("full size takes the interpreter minutes")
    golden = Golden(case)
    lengths = golden.meta["valid_text_lens"]
    if case == "embq_small_emptyrow":
        # In a batch with text the official code reads a row without any as its zero padding. So does the op, when told.
        lengths = [length or golden.meta["text_len"] for length in lengths]
    with place:
        check_official(golden, official_inputs(golden, place.device), None if "nomask" in case else lengths)


@pytest.mark.parametrize("place", PLACES)
def test_official_rows_beside_a_row_without_text(place: Place) -> None:
    golden = Golden("embq_small_emptyrow")
    lengths = golden.meta["valid_text_lens"]
    rows = [i for i, length in enumerate(lengths) if length]
    assert len(rows) < len(lengths)
    inputs = official_inputs(golden, place.device)
    with place:
        out, weights = attend(*inputs, text_lengths=torch.tensor(lengths), return_weights=True)
    dquery, dtext = (g.cpu() for g in torch.autograd.grad(out, inputs[:2], golden.io["g"].to(out.device)))
    for name, got in (("out", out), ("attention_map", weights)):
        assert_within(got.cpu()[rows], golden.io[name][rows], 1e-5, name)
    for name, got in (("grad.learnable_tokens", dquery), ("grad.text_tokens", dtext)):
        assert_within(got[rows], golden.io[name][rows], 2e-5, name)
    empty = lengths.index(0)
    assert not torch.allclose(out[empty].cpu(), golden.io["out"][empty], atol=1e-5), (
        "here the official code averages padding"
    )
    assert not dtext[empty].any()


@pytest.mark.parametrize("place", PLACES)
def test_naive_loops(place: Place) -> None:
    inputs = make(4, 2, 11, queries=2, text=5)
    lengths = [5, 0, 2, 1]
    out, maps = naive(inputs, 4, lengths)
    with place:
        on = [t.to(place.device) for t in inputs]
        got, weights = attend(*on, text_lengths=torch.tensor(lengths), return_weights=True)
    assert_within(got.cpu(), out.float(), 2e-6, "out")
    assert_within(weights.cpu(), maps.float(), 2e-6, "weights")


@pytest.mark.parametrize("backend", BACKENDS)
def test_naive_loops_in_fp64(backend: str) -> None:
    inputs = make(4, 2, 11, queries=2, text=5, dtype=torch.float64)
    lengths = [5, 0, 2, 1]
    with use_backend(backend):
        out = attend(*inputs, text_lengths=torch.tensor(lengths))
    torch.testing.assert_close(out, naive(inputs, 4, lengths)[0], rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize(("place", "dtype"), each_dtype(PLACES[1:] + CUDA))
@pytest.mark.parametrize(("batch", "images", "tokens"), [(4, 4, 60), (6, 1, 37), (2, 1, 300)])
def test_error_rule(place: Place, dtype: torch.dtype, batch: int, images: int, tokens: int) -> None:
    lengths = torch.tensor([6, 4, 0, 1, 6, 2][:batch])
    sizes: dict[str, int] = {"queries": 5, "model": 48, "inner": 64, "dim": 96}
    count = 2 if place == INTERPRETER else 8
    draws = [make(batch, images, tokens, dtype=dtype, seed=seed, **sizes) for seed in range(count)]
    run = partial(attend, text_lengths=lengths, return_weights=True)
    check_errors(run, draws, dtype, place, place.device)


@pytest.mark.parametrize("place", PLACES)
def test_several_questions_an_image_equal_separate_calls(place: Place) -> None:
    """Few questions, which are absorbed, and many, for which keys and values are formed."""
    for batch in (4,) if place == INTERPRETER else (4, 18):
        query, text, image, *weights = make(batch, 2, 40)
        lengths = torch.arange(batch) % 7

        def separate(query: Tensor, text: Tensor, image: Tensor, *weights: Tensor, lengths: Tensor = lengths) -> Any:
            per_image = len(query) // 2
            return torch.cat([
                attend(query[i : i + 1], text[i : i + 1], image[i // per_image][None], *weights,
                       text_lengths=lengths[i : i + 1])
                for i in range(len(query))
            ])  # fmt: skip

        inputs = [query, text, image, *weights]
        with place:
            together = gradients(lambda *a, n=lengths: attend(*a, text_lengths=n), inputs, device=place.device)
            apart = gradients(separate, inputs, device=place.device)
            with torch.no_grad():
                forward_only = attend(*(t.to(place.device) for t in inputs), text_lengths=lengths).cpu()
        torch.testing.assert_close(together[0][0], apart[0][0])
        torch.testing.assert_close(forward_only, apart[0][0])
        for got, want in zip(together[1], apart[1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- texts of different lengths ----


@pytest.mark.parametrize("place", PLACES)
def test_padding_may_hold_anything(place: Place) -> None:
    inputs = make()
    lengths = torch.tensor([2, 6, 0, 5])
    padding = torch.arange(6) >= lengths.view(-1, 1)
    clean = [inputs[0], inputs[1].masked_fill(padding[..., None], 0.0), *inputs[2:]]
    dirty = [inputs[0], inputs[1].masked_fill(padding[..., None], torch.nan), *inputs[2:]]
    with place:
        want, want_grads = gradients(lambda *a: attend(*a, text_lengths=lengths), clean, device=place.device)
        got, grads = gradients(lambda *a: attend(*a, text_lengths=lengths), dirty, device=place.device)
    assert torch.equal(got[0], want[0])
    for a, b in zip(grads, want_grads, strict=True):
        assert torch.equal(a, b)
    assert not grads[1][padding].any()
    assert grads[1][~padding].any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_lengths_of_any_integer_dtype(dtype: torch.dtype, backend: str) -> None:
    inputs, lengths = make(), torch.tensor([2, 6, 0, 5])
    with use_backend(backend):
        assert torch.equal(attend(*inputs, text_lengths=lengths.to(dtype)), attend(*inputs, text_lengths=lengths))


@pytest.mark.parametrize("place", PLACES)
def test_row_without_text_is_the_same_alone_or_in_a_batch(place: Place) -> None:
    query, text, image, *weights = (t.to(place.device) for t in make(2, 2))
    with place:
        batch = attend(query, text, image, *weights, text_lengths=torch.tensor([0, 6]))
        no_rows = attend(query[:1], text[:1, :0], image[:1], *weights)
        no_length = attend(query[:1], text[:1], image[:1], *weights, text_lengths=torch.tensor([0]))
    torch.testing.assert_close(batch[:1], no_rows)
    torch.testing.assert_close(no_length, no_rows)


# ---- the image's state ----


@pytest.mark.parametrize("place", PLACES)
def test_state_reused_equals_computed_anew(place: Place) -> None:
    first, second = make(4, 2), make(4, 2, seed=1)

    def ask(reuse: bool) -> Any:
        def run(q1: Tensor, t1: Tensor, q2: Tensor, t2: Tensor, image: Tensor, *weights: Tensor) -> Any:
            state = ImageState.from_image(image, EmbeddedQueryParams(*weights)) if reuse else None
            return [attend(q, t, image, *weights, image_state=state) for q, t in ((q1, t1), (q2, t2))]

        return gradients(run, [*first[:2], *second[:2], *first[2:]], device=place.device)

    with place:
        reused, anew = ask(True), ask(False)
    assert all(torch.equal(a, b) for a, b in zip(reused[0], anew[0], strict=True))
    for got, want in zip(reused[1], anew[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("place", "dtype"), each_dtype(PLACES))
def test_state_is_the_projection_and_its_statistics(place: Place, dtype: torch.dtype) -> None:
    _, _, image, *weights = make(tokens=150 if place == INTERPRETER else 600, inner=104, dtype=dtype)
    params = EmbeddedQueryParams(*weights)
    with place:
        on = EmbeddedQueryParams(*(p.to(place.device) for p in params))
        y, mean, rstd = (t.cpu() for t in ImageState.from_image(image.to(place.device), on, eps=1e-3))
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


# ---- numbers at the edge ----


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_reaches_the_questions_that_see_it_only(where: int, place: Place) -> None:
    inputs = make(4, 2, 9)
    inputs[where][1, 0, 0] = torch.nan
    hit = [2, 3] if where == 2 else [1]  # the second image is read by the last two questions
    with place:
        out = attend(*(t.to(place.device) for t in inputs))
    assert out[hit].isnan().any(-1).any(-1).all()
    assert out[[i for i in range(4) if i not in hit]].isfinite().all()


@pytest.mark.parametrize("place", PLACES)
def test_large_scores_do_not_overflow(place: Place) -> None:
    inputs = make(2, 1, 300 if place == INTERPRETER else 2100)
    inputs[3 + EmbeddedQueryParams._fields.index("i2q_q_weight")] *= 300
    with place:
        out, weights = (t.cpu() for t in attend(*(t.to(place.device) for t in inputs), return_weights=True))
    with use_backend("reference"):
        want, _ = attend(*(t.double() for t in inputs), return_weights=True)
    assert weights.sort(-1).values[..., -4:].sum(-1).mean() > 0.95, "each of the four heads looks at one token"
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)


# ---- torch's machinery ----


@pytest.mark.parametrize("place", TRITON)
@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 0, 1, 3])], ids=["whole", "padded"])
def test_what_forward_saves_is_that_of_the_reference(place: Place, lengths: Tensor | None) -> None:
    """All backends keep the same tensors: the backward of one serves the forward of another."""
    with torch.no_grad(), place:
        args = raw_arguments(lengths, place.device)
        got = library.kernel("embedded_query", place.backend)(*args, True, True)
        want = module._plain(*args, True, True)
        for name, a, b in zip(
            ("out", "weights", "hidden", "told", "pooled", "seen", "softmax"), got, want, strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("place", PLACES[1:])
@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 0, 1, 3])], ids=["whole", "padded"])
def test_opcheck(lengths: Tensor | None, place: Place) -> None:
    with place:
        args = raw_arguments(lengths, place.device, heads=2, model=16, inner=16, dim=16)
    state, forward, backward = (
        library.kernel(op, place.backend) for op in ("image_state", "embedded_query", "embedded_query_backward")
    )
    torch.library.opcheck(forward, (*args, True, True))
    torch.library.opcheck(state, (args[3], *args[7][14:16], 1e-5))
    detached = [[p.detach() for p in a] if isinstance(a, list) else a.detach() if isinstance(a, Tensor) else a
                for a in args]  # fmt: skip
    out, _, *saved = forward(*detached, False, True)
    for needs in ((True, True, True), (False, False, True), (True, False, False)):
        back = (torch.randn_like(out), *detached[:8], *saved, 4, 1e-5, *needs)
        torch.library.opcheck(backward, back)


@pytest.mark.parametrize(
    ("place", "dynamic"),
    [
        pytest.param(*p.values, dynamic, marks=p.marks, id=f"{p.id}-{'dynamic' if dynamic else 'static'}")
        for dynamic in (False, True)
        for p in PLACES[dynamic:]
    ],
)
def test_compile_equals_eager(place: Place, dynamic: bool) -> None:
    def run(lengths: Tensor, *args: Tensor) -> Any:
        return attend(*args, text_lengths=lengths, return_weights=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with place:
        for batch in (2, 4):
            inputs = [torch.tensor([6, 0, 1, 3][:batch]), *make(batch, 2, 9)]
            want, got = (gradients(f, inputs, device=place.device) for f in (run, compiled))
            for a, b in zip([*want[0], *want[1]], [*got[0], *got[1]], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
