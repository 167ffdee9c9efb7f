"""Whole models: is what is timed what is meant, does what goes wrong show, what is said of the paper's claims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.e2e import claims, flops, phases, points, run, summary, tokens
from bench.e2e.counted import count
from bench.e2e.counted import table as counted_table
from bench.e2e.models import (
    AVERAGE,
    CONTROL,
    FLASHSLOTH,
    INTERNVL_2B,
    MODELS,
    QWEN2_VL,
    RESOLUTIONS,
    SMOLVLM,
    Model,
)
from bench.e2e.points import Point
from bench.result import Row
from bench.timing import Ceilings
from flashsloth.modules import EmbeddedQuery, SpatialAttentionPool
from tests.bench.small_models import NEW, Built, every_model
from tests.support import ROOT

# ---- checks ----


@every_model
def test_what_is_right_passes(model: Model) -> None:
    verdict = Built(model, "flashsloth" if model.ours else "sdpa").check()
    assert verdict.failure is None
    assert (verdict.max_error is not None) == model.ours


@every_model
def test_another_number_of_tokens_fails(model: Model) -> None:
    built = Built(model)
    built.prompt += 1
    assert built.check().failure == (
        f"prompt: expected the language model to see {built.prompt} tokens, got [{built.prompt - 1}]"
    )


def test_values_that_are_not_finite_fail() -> None:
    built = Built(CONTROL)
    built.module.lm_head.weight.data[3] = torch.nan
    assert built.check().failure == "logits: expected finite values, got others"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", ["pooling", "queries"])
def test_a_wrong_op_fails(monkeypatch: pytest.MonkeyPatch, wrong: str, dtype: torch.dtype) -> None:
    """The first pass is the one that is checked; those it is compared with come later and are right."""
    built = Built(FLASHSLOTH, dtype=dtype)
    assert built.check().failure is None
    module = {"pooling": SpatialAttentionPool, "queries": EmbeddedQuery}[wrong]
    right, calls = module.forward, []

    def forward(self: Any, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        calls.append(wrong)
        if len(calls) > 1:
            return right(self, first, *others)
        if wrong == "queries":
            return first  # not updated
        return first.view(-1, 2, 3, 2, 3, first.shape[-1]).mean((2, 4)).flatten(1, 2)  # a plain average

    monkeypatch.setattr(module, "forward", forward)
    assert "logits: error" in built.check().failure
    assert len(calls) == 3


# ---- phases ----


class Counting:
    """A clock that ticks once a mark, so that seconds are the number of marks in between."""

    def __init__(self) -> None:
        self.ticks = 0

    def mark(self) -> int:
        self.ticks += 1
        return self.ticks

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)

    def settle(self) -> None:
        """There is nothing to wait for."""


@every_model
def test_the_parts_of_the_first_token(model: Model) -> None:
    built = Built(model)
    order: list[str] = []
    built.parts.tower_end.register_forward_hook(lambda *_: order.append("tower"))
    built.parts.language.register_forward_pre_hook(lambda *_: order.append("language"))
    for module in built.parts.projector[:1]:
        module.register_forward_pre_hook(lambda *_: order.append("projector"))
    found = phases.first_token(built.module, built.parts, built.request, Counting())
    assert order == ["tower", "projector", "language"]
    assert found == {"vision": 1.0, "compression": 1.0, "prefill": 1.0, "first token": 3.0}
    real = phases.first_token(built.module, built.parts, built.request, phases.HostClock())
    assert min(real.values()) > 0
    assert real["vision"] + real["compression"] + real["prefill"] == pytest.approx(real["first token"])


@every_model
def test_an_answer_has_its_length(model: Model) -> None:
    built = Built(model)
    found = phases.answer(built.module, built.request, NEW, Counting())
    # A mark before, one behind each of four passes, one behind all; from the first pass to the last it is three steps.
    assert found == {"decode": 1.0, "answer": 5.0}


def test_an_answer_of_another_length_is_refused() -> None:
    built = Built(CONTROL)
    first = int(built.module.generate(**built.request, max_new_tokens=1, do_sample=False)[0, -1])
    one = {name: value[:1] for name, value in built.request.items()}
    built.module.generation_config.eos_token_id = first
    with pytest.raises(RuntimeError, match="answer: expected 4 tokens in as many passes, got 1"):
        phases.answer(built.module, one, NEW, Counting())


@every_model
def test_training_leaves_nothing_behind(model: Model) -> None:
    built = Built(model)
    before = {name: value.clone() for name, value in built.module.state_dict().items()}
    for stage in flops.STAGES:
        with phases.Training(model, built.module, built.request, stage) as training:
            assert built.module.training
            training.loss().backward()
            learns = {n for n, p in built.module.named_parameters() if p.grad is not None and bool(p.grad.any())}
            training.step()
        names = {id(p): n for n, p in built.module.named_parameters()}
        for module in built.parts.projector:
            assert {names[id(p)] for p in module.parameters() if p.dim() > 1} <= learns
        assert all(p.grad is None and not p.requires_grad for p in built.module.parameters())
        assert not built.module.training
    assert all(torch.equal(value, before[name]) for name, value in built.module.state_dict().items())


def test_rounds() -> None:
    calls: list[int] = []

    def once() -> dict[str, float]:
        calls.append(len(calls))
        return {"a": float(calls[-1])}

    assert phases.repeat(once, phases.Rounds(0.0, 3, 9)) == {"a": [1.0, 2.0, 3.0]}  # the first is to warm up
    calls.clear()
    assert len(phases.repeat(once, phases.Rounds(1e9, 3, 9))["a"]) == 9


class Attentive:
    """Takes any attention but one that is not installed."""

    def __init__(self) -> None:
        self.now = ""

    def set_attn_implementation(self, name: str) -> None:
        if name == "absent":
            raise ImportError("no such package")
        self.now = name


def test_the_fastest_attention_is_chosen() -> None:
    model = Attentive()
    seconds = {"slow": 2.0, "fast": 1.0}
    chosen = phases.choose_attention(model, ("absent", "slow", "fast"), lambda: seconds[model.now])
    assert chosen == model.now == "fast"
    assert phases.choose_attention(model, ("fast", "slow"), lambda: seconds[model.now]) == model.now == "fast"
    with pytest.raises(ImportError):
        phases.choose_attention(model, ("absent", "absent"), lambda: 1.0)


class Growing:
    """A meter whose peak is a byte more at each restart."""

    def __init__(self) -> None:
        self.restarts = 0

    def restart(self) -> None:
        self.restarts += 1

    def peak(self) -> int:
        return self.restarts


def test_peaks_of_the_phases() -> None:
    built = Built(CONTROL)
    found = phases.inference_peaks(built.module, built.parts, built.request, NEW, Growing())
    assert found == {"vision": 1, "compression": 2, "prefill": 3, "first token": 3, "decode": 6, "answer": 6}


# ---- the run ----


def only(*models: Model) -> Any:
    return lambda case, provider: provider in {model.name for model in models}


def test_a_run_and_going_on_with_it() -> None:
    told: list[str] = []
    wanted = only(FLASHSLOTH, AVERAGE)
    found = list(run.run("cpu", quick=True, budget=0.0, step=told.append, chosen=wanted))
    assert [(rows[0].provider, rows[0].case) for rows in found] == [
        (model.name, case) for model in (FLASHSLOTH, AVERAGE) for case in ("e2e/42x42-b1", "e2e/147x98-b1")
    ]
    assert [row.mode for row in found[0]] == list(flops.PHASES)
    every = [row for rows in found for row in rows]
    assert len({row.key for row in every}) == len(every)
    for row in every:
        assert (row.failure, row.missing) == (None, None)
        assert len(row.samples) >= 3
        assert row.p50 is not None
        assert row.p50 > 0
        assert (row.flops > 0, row.bytes > 0, row.method, row.dtype) == (True, True, "wall", "float32")
        assert row.variant == ("flashsloth" if row.ours else "sdpa")
        assert (row.max_error is not None) == row.ours
        assert (row.kept_bytes is not None) == row.mode.startswith("training")
    sizes = found[0][0].size
    # Eight words, nine queries.
    assert sizes == {
        "width": 42,
        "height": 42,
        "batch": 1,
        "visual_tokens": 4,
        "text_tokens": 17,
        "new_tokens": 4,
    }
    assert any("inference" in text for text in told)

    assert all(row.share is None for row in every)

    done = {row.key for rows in found[:3] for row in rows}
    limits = Ceilings(1e9, 1e12)
    again = list(run.run("cpu", quick=True, budget=0.0, done=done, chosen=wanted, limits=limits))
    assert [(rows[0].provider, rows[0].case) for rows in again] == [(AVERAGE.name, "e2e/147x98-b1")]
    assert all(row.share == limits.limit(row.flops, row.bytes) / row.p50 for row in again[0] if row.p50)


def test_every_full_point_is_declared() -> None:
    found = points.points("cuda", quick=False, small=False)
    assert len(found) == len(MODELS) * 3 * 3
    assert {(p.width, p.height) for p in found} == set(RESOLUTIONS)
    assert {p.batch for p in found} == {1, 8, 32}
    rows = Point(SMOLVLM, 1344, 896, 32, False).rows("cuda")
    assert rows[0].case == "e2e/1344x896-b32"
    assert (rows[0].dtype, rows[0].method) == ("bfloat16", "call")
    assert rows[0].size["visual_tokens"] == 1053
    assert points.points("cpu", quick=False, small=False) == points.points("cuda", quick=False, small=True)


def test_what_fails_its_check_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(AVERAGE, layout=tokens.compressed(2))  # says four times what it will see
    monkeypatch.setattr(points, "MODELS", (wrong,))
    rows = next(run.run("cpu", quick=True, budget=0.0))
    for row in rows:
        assert row.failure is not None
        assert "Image features and image tokens do not match" in row.failure
    assert all(not row.samples and row.p50 is None and row.missing is None for row in rows)


def test_what_does_not_fit_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(points, "MODELS", (AVERAGE,))
    monkeypatch.setattr(phases.Training, "kept_bytes", full)
    rows = {row.mode: row for row in next(run.run("cpu", quick=True, budget=0.0))}
    for phase, row in rows.items():
        assert row.failure is None
        if phase in flops.STAGES:
            assert row.missing is not None
            assert row.missing.startswith("does not fit in memory: needs 0.0 GB at least")
            assert not row.samples
        else:
            assert row.missing is None
            assert row.samples

    monkeypatch.setattr(Model, "build", full)
    rows = {row.mode: row for row in next(run.run("cpu", quick=True, budget=0.0))}
    assert all(row.missing is not None and not row.samples for row in rows.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@every_model
def test_small_models_on_a_gpu(model: Model) -> None:
    for rows in run.run("cuda", quick=True, small=True, budget=0.0, chosen=only(model)):
        for row in rows:
            assert (row.failure, row.missing) == (None, None)
            assert row.samples
            assert row.peak_bytes is not None
            assert row.peak_bytes > 0


def test_summaries() -> None:
    point = Point(CONTROL, 384, 384, 8, False)
    rows = point.rows("cuda")
    for number, row in enumerate(rows):
        row.variant, row.peak_bytes = "sdpa", 10**9 * (number + 1)
        row.set_times([0.1 * (number + 1)])
    rows[-1].samples, rows[-1].p20, rows[-1].p50, rows[-1].p80, rows[-1].peak_bytes = [], None, None, None, None
    rows[-1].missing = "does not fit"
    other = Point(AVERAGE, 384, 384, 1, False).rows("cuda")
    for row in other:
        row.failure = "wrong"
    first, second = summary.summaries([*rows, *other])
    assert (first.model, first.batch, first.note) == (AVERAGE.name, 1, "all: wrong")
    assert second.model == CONTROL.name
    assert (second.vision, second.compression, second.prefill, second.first_token) == (0.1, 0.2, 0.3, 0.4)
    assert second.tokens_per_second == 8 / 0.5
    assert second.requests_per_second == 8 / 0.6
    assert second.answer_bytes == 6 * 10**9
    assert second.training == (0.7, None)
    assert second.training_bytes == (7 * 10**9, None)
    assert second.note == "training stage 2: does not fit"
    headings, lines = summary.table([*rows, *other])
    assert dict(zip(headings, lines[1], strict=True)) == {
        "image": "384x384",
        "batch": "8",
        "model": "uncompressed",
        "attention": "sdpa",
        "visual tokens": "729",
        "prefill TFLOPs": "33.6",
        "vision ms": "100",
        "compression ms": "200",
        "prefill ms": "300",
        "first token ms": "400",
        "decode tokens/s": "16",
        "requests/s": "13.3",
        "answer GB": "6",
        "training ms, stage 1 / 2": "700 / -",
        "training GB, stage 1 / 2": "7 / -",
        "": "training stage 2: does not fit",
    }


# ---- claims ----


def test_counted_claims() -> None:
    counted = count()
    found = claims.findings(counted=counted)
    assert {one.claim for one in found} == {claims.TOKENS, claims.FLOPS, claims.PREFILL_FLOPS}
    assert len(found) == 3 * 2 * 5 * 3  # claims, ours, peers, images
    by = {(one.claim.quantity, one.model, one.peer, one.width): one for one in found}
    control = by["visual tokens", "FlashSloth", "uncompressed", 384]
    assert control.gain == pytest.approx(8 / 9)
    assert control.holds
    # On small images the peers need few tokens, and about as many flops.
    small = by["flops to the first token", "FlashSloth", "Qwen2-VL-2B", 384]
    large = by["flops to the first token", "FlashSloth", "Qwen2-VL-2B", 1344]
    assert not small.holds
    assert large.holds
    lines = claims.table(found)
    first = next(line for line in lines if line.quantity == "visual tokens")
    assert (first.claimed, first.model, first.image) == ("-80% to -89%", "FlashSloth", "384x384")
    assert "uncompressed -89%" in first.found
    assert first.verdict == "does not hold against Qwen2-VL-2B, InternVL2-2B, InternVL2.5-1B"
    assert [line.found for line in lines if line.quantity == "time to the answer"] == ["not measured at full size"]
    text = (ROOT / "docs" / "bench-e2e.md").read_text()
    for name in ("FlashSloth", "FlashSloth-HD", *claims.PEERS):
        cells = [
            f"{one.visual_tokens} tokens, {one.flops['first token'] / 1e12:.1f} TFLOP"
            for one in counted
            if one.model.name == name
        ]
        assert f"| {name} | {' | '.join(cells)} |" in text
    headings, body = counted_table()
    assert len(body) == len(counted)
    assert all(len(line) == len(headings) for line in body)


def _measured(model: Model, image: tuple[int, int], batch: int, seconds: float, peak: int) -> Row:
    row = next(r for r in Point(model, *image, batch, False).rows("cuda") if r.mode == "answer")
    row.set_times([seconds] * 3)
    row.peak_bytes = peak
    return row


def test_measured_claims() -> None:
    rows = [
        _measured(FLASHSLOTH, (768, 768), 1, 1.0, 30),
        _measured(QWEN2_VL, (768, 768), 1, 3.0, 100),
        _measured(FLASHSLOTH, (768, 768), 8, 1.0, 60),
        _measured(QWEN2_VL, (768, 768), 8, 1.5, 100),
        _measured(CONTROL, (384, 384), 1, 9.0, 100),  # nothing of ours to compare with
        replace(_measured(INTERNVL_2B, (768, 768), 1, 9.0, 100), failure="wrong"),
    ]
    small = Point(FLASHSLOTH, 42, 42, 1, True).rows("cpu")[5]
    small.set_times([1.0])
    found = claims.findings([*rows, small], counted=())
    assert [(one.claim, one.peer, one.batch) for one in found] == [
        (claims.INFERENCE_MEMORY, "Qwen2-VL-2B", 1),
        (claims.LATENCY, "Qwen2-VL-2B", 1),
        (claims.INFERENCE_MEMORY, "Qwen2-VL-2B", 8),
        (claims.LATENCY, "Qwen2-VL-2B", 8),
    ]
    assert [one.gain for one in found] == pytest.approx([0.7, 3.0, 0.4, 1.5])
    assert [one.holds for one in found] == [True, True, False, False]
    latency = next(line for line in claims.table(found) if line.quantity == "time to the answer")
    assert (latency.claimed, latency.found) == ("2x to 5x", "Qwen2-VL-2B 1.5x to 3x")
    assert latency.verdict == "does not hold"
