"""embedded_query_attention in CUDA C++: on the CPU over the emulator, as an H200 and as an A100, and on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import BackendError, EmbeddedQueryParams, ImageState, _extension, backend, use_backend
from flashsloth_ops.reference import embedded_query as reference
from tests.emulator import build
from tests.ops.query_cases import NAMES, UNSEEN, attend, make
from tests.support import EPS, GPU_MARKS, Place, assert_error_rule, assert_within, gradients

EMULATOR, GPU = Place("cuda"), Place("cuda", "cuda")
DTYPES = (torch.bfloat16, torch.float16)
ARCHITECTURE = int(os.environ.get("FLASHSLOTH_EMULATE_ARCH", "90"))  # of the emulator, for the whole process


@pytest.fixture(params=[pytest.param(EMULATOR, id="emulator"), pytest.param(GPU, marks=GPU_MARKS, id="gpu")])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Where the kernels run, with the backend forced. Every new tensor starts as NaN."""
    if request.param is EMULATOR:
        if missing := build.load():
            pytest.skip(missing)
        monkeypatch.setattr(_extension, "emulated", True)
    torch.use_deterministic_algorithms(True)
    try:
        with request.param:
            yield request.param
    finally:
        torch.use_deterministic_algorithms(False)


def small(batch: int, images: int, tokens: int, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> list[Tensor]:
    return make(batch, images, tokens, dtype=dtype, **{"model": 24, "inner": 40, "dim": 48, **sizes})


def ask(inputs: list[Tensor], place: Place, lengths: list[int] | None = None, **options: Any) -> list[Tensor]:
    """The result and the weights, computed at a place, on the CPU."""
    on = place.device
    text_lengths = None if lengths is None else torch.tensor(lengths, device=on)
    result = attend(*(t.to(on) for t in inputs), text_lengths=text_lengths, return_weights=True, **options)
    return [t.cpu() for t in result]


def expect(got: list[Tensor], inputs: list[Tensor], lengths: list[int] | None = None, **options: Any) -> None:
    """The result and the weights obey the error rule against the specification."""
    with use_backend("reference"):
        plain = ask(inputs, Place("reference"), lengths, **options)
        exact = ask([t.double() for t in inputs], Place("reference"), lengths, **options)
    assert got[0].dtype == inputs[0].dtype
    assert got[1].dtype == torch.float32
    for name, ours, theirs, truth in zip(("out", "weights"), got, plain, exact, strict=True):
        assert_error_rule(ours, theirs, truth, inputs[0].dtype, name)


def raw(inputs: list[Tensor], place: Place, lengths: list[int] | None, heads: int = 4) -> list[Tensor]:
    """The op itself, with all that it saves."""
    query, text, image, *weights = (t.to(place.device) for t in inputs)
    params = EmbeddedQueryParams(*weights)
    state = torch.ops.flashsloth.image_state.cuda(image, *params[2:4], 1e-5)
    text_lengths = None if lengths is None else torch.tensor(lengths, device=place.device)
    return list(
        torch.ops.flashsloth.embedded_query.cuda(
            query, text, text_lengths, image, *state, params._kernel_params(), heads, 1e-5, True, True
        )
    )


# ---- against the specification ----

# (questions, images, tokens), lengths, sizes: heads that are no multiple of 8 wide, rows and columns that no tile
# divides, more than one tile of keys, of queries, of text rows; text rows enough for the kernel of many rows.
CASES: tuple[tuple[tuple[int, int, int], list[int] | None, dict[str, int], int], ...] = (
    ((1, 1, 70), None, {"queries": 9, "text": 33, "inner": 72, "dim": 144, "model": 80}, 4),
    ((2, 1, 130), [6, 4], {"queries": 5, "model": 600, "inner": 64, "dim": 96}, 4),
    ((4, 2, 50), [0, 6, 3, 6], {"inner": 24, "dim": 32}, 4),
    ((1, 1, 65), [70], {"queries": 18, "text": 70, "inner": 96, "dim": 72}, 2),
    ((3, 3, 9), [60, 0, 64], {"text": 64, "inner": 40, "dim": 64}, 8),
    ((2, 2, 1), None, {"queries": 1, "text": 1, "model": 8, "inner": 8, "dim": 8}, 8),
    ((1, 1, 40), [3], {"inner": 256, "dim": 256, "queries": 17}, 2),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "lengths", "sizes", "heads"), CASES)
def test_error_rule(
    shape: tuple[int, int, int], lengths: list[int] | None, sizes: dict[str, int], heads: int, dtype: torch.dtype,
    place: Place,
) -> None:  # fmt: skip
    draws = [small(*shape, dtype=dtype, seed=seed, **sizes) for seed in range(3)]
    got, plain, exact = ([ask(inputs, place, lengths, heads=heads) for inputs in draws], [], [])
    with use_backend("reference"):
        plain = [ask(inputs, Place("reference"), lengths, heads=heads) for inputs in draws]
        exact = [ask([t.double() for t in inputs], Place("reference"), lengths, heads=heads) for inputs in draws]
    for i, name in enumerate(("out", "weights")):
        ours, theirs, truth = (torch.stack([r[i] for r in results]) for results in (got, plain, exact))
        assert_error_rule(ours, theirs, truth, dtype, name)


@pytest.mark.parametrize("batch", range(1, 9))
def test_batches(batch: int, place: Place) -> None:
    inputs = small(batch, batch, 20)
    lengths = [6, 0, 3, 1, 6, 2, 5, 4][:batch]
    expect(ask(inputs, place, lengths), inputs, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_is_the_projection_and_its_statistics(dtype: torch.dtype, place: Place) -> None:
    for tokens, inner, dim in ((1, 8, 8), (70, 72, 136), (130, 200, 64), (3, 784, 16)):
        _, _, image, *weights = small(2, 2, tokens, dtype=dtype, inner=inner, dim=dim, seed=inner)
        params = EmbeddedQueryParams(*weights)
        on_device = EmbeddedQueryParams(*(p.to(place.device) for p in params))
        y, mean, rstd = (t.cpu() for t in ImageState.from_image(image.to(place.device), on_device, eps=1e-3))
        exact = torch.nn.functional.linear(image.double(), *(p.double() for p in params[2:4]))
        assert_error_rule(y, torch.nn.functional.linear(image, *params[2:4]), exact, dtype, "y")
        var, center = torch.var_mean(y.double(), -1, correction=0)
        torch.testing.assert_close(mean.double(), center, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rstd.double(), (var + 1e-3).rsqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [6, 0, 2, 5]])
def test_saves_what_the_reference_saves(lengths: list[int] | None, dtype: torch.dtype, place: Place) -> None:
    inputs = small(4, 2, 70, dtype=dtype)
    _, _, *saved = (t.cpu() for t in raw(inputs, place, lengths))
    query, text, image, *weights = (t.double() for t in inputs)
    params = EmbeddedQueryParams(*weights)
    y = torch.nn.functional.linear(image, *params[2:4])
    rstd = (y.var(-1, correction=0) + 1e-5).rsqrt()
    text_lengths = None if lengths is None else torch.tensor(lengths)
    _, _, *exact = reference.absorbed_forward(
        query, text, text_lengths, image, y, rstd, params._kernel_params(), 4, 1e-5
    )
    for name, got, want in zip(("hidden", "told", "pooled", "seen", "softmax"), saved, exact, strict=True):
        assert got.dtype == torch.float32
        # Each rounding of an operand is 2^-9 (bf16) or 2^-12 of a value of order one; some add up on the way.
        assert_within(got.double(), want, 12 * EPS[dtype], name)
    if lengths is not None:
        assert not saved[0][-(24 - sum(lengths)) :].any(), "past the last text row: zeros"
        assert not saved[1][1].any(), "a question without text is told nothing"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "images", "lengths"), [(2, 2, [6, 2]), (2, 1, None)])
def test_backward_from_what_forward_saved(
    batch: int,
    images: int,
    lengths: list[int] | None,
    dtype: torch.dtype,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if place is EMULATOR and dtype == torch.bfloat16:  # which Triton's interpreter cannot add: the CPU kernels serve
        monkeypatch.setattr(backend, "triton_missing", lambda device: "not asked")
    draws = [small(batch, images, 33, dtype=dtype, seed=seed) for seed in range(3)]

    def run(*args: Tensor) -> Any:
        return attend(*args, text_lengths=None if lengths is None else torch.tensor(lengths, device=args[0].device))

    fused = [gradients(run, inputs, device=place.device)[1] for inputs in draws]
    with use_backend("reference"):
        plain = [gradients(run, inputs)[1] for inputs in draws]
        exact = [gradients(run, [t.double() for t in inputs])[1] for inputs in draws]
    for i, name in enumerate(NAMES):
        ours, theirs, truth = (torch.stack([grads[i] for grads in results]) for results in (fused, plain, exact))
        assert_error_rule(ours, theirs, truth, dtype, name)
        if name in UNSEEN:
            assert not ours.any(), f"{name} is exactly zero"


# ---- the contract ----


def test_several_questions_an_image_equal_separate_calls(place: Place) -> None:
    query, text, image, *weights = small(6, 2, 70)
    together, _ = ask([query, text, image, *weights], place, [6, 0, 3, 1, 5, 6])
    for i, length in enumerate([6, 0, 3, 1, 5, 6]):
        alone, _ = ask([query[i : i + 1], text[i : i + 1], image[i // 3 : i // 3 + 1], *weights], place, [length])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=0)


def test_state_reused_equals_computed_anew(place: Place) -> None:
    inputs = small(2, 1, 70)
    query, text, image, *weights = (t.to(place.device) for t in inputs)
    state = ImageState.from_image(image, EmbeddedQueryParams(*weights))
    reused = attend(query, text, image, *weights, image_state=state)
    assert torch.equal(reused.cpu(), ask(inputs, place)[0])


@pytest.mark.parametrize("lengths", [[4, 0], [0, 0]])
def test_padding_may_hold_anything(lengths: list[int], place: Place) -> None:
    inputs = small(2, 2, 20)
    clean = ask(inputs, place, lengths)
    for b, length in enumerate(lengths):
        inputs[1][b, length:] = torch.nan
    for got, want in zip(ask(inputs, place, lengths), clean, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("lengths", [[-3, 7], [2**40, -(2**40)]])
def test_lengths_outside_the_text_count_as_the_nearest_within(lengths: list[int], place: Place) -> None:
    inputs = small(2, 2, 9)
    got = raw(inputs, place, lengths)
    for a, b in zip(got, raw(inputs, place, [min(max(n, 0), 6) for n in lengths]), strict=True):
        assert torch.equal(a, b)


def test_row_without_text_is_the_same_alone_or_in_a_batch(place: Place) -> None:
    query, text, image, *weights = small(2, 2, 20)
    batch, _ = ask([query, text, image, *weights], place, [0, 6])
    no_rows, _ = ask([query[:1], text[:1, :0], image[:1], *weights], place)
    no_length, _ = ask([query[:1], text[:1], image[:1], *weights], place, [0])
    assert torch.equal(batch[:1], no_rows)
    assert torch.equal(no_length, no_rows)


@pytest.mark.parametrize(("batch", "images", "tokens", "queries", "text"), [
    (2, 2, 0, 3, 6), (2, 2, 9, 3, 0), (2, 2, 0, 3, 0), (2, 2, 9, 0, 6), (0, 0, 9, 3, 6), (0, 2, 9, 3, 6),
])  # fmt: skip
def test_empty(batch: int, images: int, tokens: int, queries: int, text: int, place: Place) -> None:
    inputs = small(batch, images, tokens, torch.float16, queries=queries, text=text)
    expect(ask(inputs, place), inputs)
    saved = raw(inputs, place, None)
    assert all(t.isfinite().all() for t in saved), "all of it is written"
    grads = gradients(attend, inputs, device=place.device)[1]
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_reaches_the_questions_that_see_it_only(where: int, place: Place) -> None:
    inputs = small(4, 2, 50)
    inputs[where][1, 0, 0] = torch.nan
    hit = [2, 3] if where == 2 else [1]  # the second image is read by the last two questions
    out, _ = ask(inputs, place)
    assert out[hit].isnan().any(-1).any(-1).all()
    assert out[[i for i in range(4) if i not in hit]].isfinite().all()


def test_large_scores_do_not_overflow(place: Place) -> None:
    inputs = small(2, 1, 300)
    inputs[3 + EmbeddedQueryParams._fields.index("i2q_q_weight")] *= 300
    out, weights = ask(inputs, place)
    assert weights.sort(-1).values[..., -4:].sum(-1).mean() > 0.95, "each of the four heads looks at one token"
    assert out.isfinite().all()


def test_strided_and_misaligned_inputs(place: Place) -> None:
    inputs = small(2, 2, 20)
    moved = []
    for t in inputs:
        room = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
        room[1:] = t.flatten()
        moved.append(room[1:].view(t.shape))
    moved[0], moved[2] = moved[0].mT.contiguous().mT, moved[2].transpose(0, 1).contiguous().transpose(0, 1)
    on = [t.to(place.device) if place is GPU else t for t in moved]
    got = attend(*on, return_weights=True)
    for ours, want in zip(got, ask(inputs, place), strict=True):
        assert torch.equal(ours.cpu(), want)


def test_repeats_are_bitwise_equal(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And do not depend on the order of blocks and warps, where the emulator shuffles them."""
    inputs = small(2, 1, 70)
    first = raw(inputs, place, [6, 3])
    for order in ("1", "2", "3"):
        monkeypatch.setenv("FLASHSLOTH_EMULATE_SEED", order)
        for got, want in zip(raw(inputs, place, [6, 3]), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_size_captured_in_a_graph(dtype: torch.dtype) -> None:
    sizes = {"queries": 9, "text": 64, "model": 2560, "inner": 576, "dim": 1152}
    inputs = make(1, 1, 729, dtype=dtype, **sizes)
    on_gpu = [t.cuda() for t in inputs]
    run = partial(attend, *on_gpu, heads=32, text_lengths=torch.tensor([50], device="cuda"), return_weights=True)
    with GPU:
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for i in range(3):
            inputs[i] = make(1, 1, 729, dtype=dtype, seed=1 + i, **sizes)[i]
            on_gpu[i].copy_(inputs[i])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
    expect([t.cpu() for t in captured], inputs, [50], heads=32)


# ---- limits ----


def test_errors_come_before_the_launch(place: Place) -> None:
    inputs = small(2, 2, 9)
    with pytest.raises(BackendError, match="cuda: serves bfloat16, float16, got float32"):
        ask([t.float() for t in inputs], place)
    with pytest.raises(BackendError, match="cuda: serves batches to 8, got 9"):
        ask(small(9, 9, 9), place)
    for sizes, heads, message in (
        ({"model": 20}, 4, "cuda: serves widths that divide by 8, got 20, "),
        ({"inner": 12}, 4, "cuda: serves widths that divide by 8, got 24, 12, 48"),
        ({"dim": 36}, 4, r"cuda: serves widths that divide by 8, got 24, \d+, 36"),
        ({"inner": 136}, 1, "cuda: serves head sizes to 128, got 136"),
    ):
        with pytest.raises(BackendError, match=message):
            ask(small(1, 1, 9, **sizes), place, heads=heads)


def test_kernels_name_the_limit_in_raw_calls(place: Place) -> None:
    image, weight, bias = (torch.randn(s, device=place.device).bfloat16() for s in ((1, 9, 36), (16, 36), (16,)))
    message = "image_state: Di: expected a multiple of 8 in the CUDA kernels, got 36"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.flashsloth.image_state.cuda(image, weight, bias, 1e-5)
    query, text, image, *weights = (t.to(place.device) for t in small(1, 1, 9, inner=136))
    params = EmbeddedQueryParams(*weights)
    state = torch.ops.flashsloth.image_state.cuda(image, *params[2:4], 1e-5)
    with pytest.raises(RuntimeError, match=re.escape("embedded_query: num_heads: expected E / heads to 128, got 136")):
        torch.ops.flashsloth.embedded_query.cuda(
            query, text, None, image, *state, params._kernel_params(), 1, 1e-5, False, False
        )


def test_raw_ops_refuse_what_does_not_fit(place: Place) -> None:
    query, text, image, *weights = (t.to(place.device) for t in small(2, 2, 9))
    params = EmbeddedQueryParams(*weights)
    state = torch.ops.flashsloth.image_state.cuda(image, *params[2:4], 1e-5)
    used = params._kernel_params()
    lengths = torch.tensor([6, 0], device=place.device)
    good = [query, text, lengths, image, *state, used, 4, 1e-5]
    op = torch.ops.flashsloth.embedded_query.cuda
    bad: list[tuple[int, Any, str]] = [
        (0, query[0], "three dimensions"),
        (0, query.float(), "one dtype"),
        (1, text[:1], "like query"),
        (2, lengths.int(), "int64"),
        (2, lengths[:1], "int64"),
        (3, image[:, 1:], "like image"),
        (6, state[2][:1], "mean and rstd"),
        (7, used[:-1], "22 params, got 21"),
        (7, [*used[:-1], query[0]], r"params\[21\]: expected 24 numbers"),
        (8, 3, "divides E and Di"),
        (8, 0, "divides E and Di"),
    ]
    for position, value, message in bad:
        with pytest.raises(RuntimeError, match=message):
            op(*good[:position], value, *good[position + 1 :], True, False)
    with pytest.raises(RuntimeError, match="multiple of the images"):
        op(query[:1], text[:1], None, *good[3:], True, False)
    with pytest.raises(RuntimeError, match=r"expected image \(Bi, N, Di\)"):
        torch.ops.flashsloth.image_state.cuda(image, params[2][:, 1:], params[3], 1e-5)


@pytest.mark.skipif(ARCHITECTURE != 90, reason="runs the others")
def test_on_an_emulated_a100() -> None:
    """This file again as an sm_80 GPU, where every instruction of sm_90 is an error."""
    if missing := build.load():
        pytest.skip(missing)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-k",
        "emulator and not backward",
        str(Path(__file__).resolve()),
    ]
    environment = {**os.environ, "FLASHSLOTH_EMULATE_ARCH": "80"}
    done = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
