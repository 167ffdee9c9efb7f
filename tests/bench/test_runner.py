"""Checks, goals and memory: a wrong result has no speedup, and a goal is judged as it is declared."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import case as declared
from bench.case import DTYPES, OUR_BACKENDS, OURS, Case, Goal, Inputs, Outputs, Provider, Work, callable_of
from bench.cases import CASES
from bench.cases import spatial_pool as pool
from bench.check import run_checks, verdict
from bench.memory import kept_bytes, peak_bytes
from bench.result import Row
from bench.runner import CPU, METHODS, Place, _compare, _rows, _time, best_of, faster_in_cuda, matching, run_point
from bench.timing import Ceilings
from tests.bench.toys import FAST, NAME, raises, right, toy, wrong
from tests.support import GPU_MARKS, needs_extension


def by_provider(case: Case, place: Place = CPU) -> dict[str, Row]:
    return {row.provider: row for row in run_point(case, case.sizes[0], place, FAST)}


# ---- declarations ----


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_provider_of_a_case_is_right_at_a_small_size(case: Case) -> None:
    found = run_checks(case, case.inputs(case.small), "cpu", torch.float32, case.small)
    assert set(found) == {provider.name for provider in case.providers}
    assert {name: one.failure for name, one in found.items() if one.failure} == {}
    for name, one in found.items():
        if one.missing is None:
            assert one.max_error is not None
            assert one.allowed is not None
            assert 0 <= one.max_error <= one.allowed
        else:  # made for GPUs, or a package that is not here; nothing that broke
            assert re.fullmatch("made for (cuda|cpu) tensors|.* is not installed", one.missing), (name, one.missing)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_declared_consistently(case: Case) -> None:
    names = [provider.name for provider in case.providers]
    assert len(set(names)) == len(names)
    assert {p.backend for p in case.providers if p.ours} == {*OUR_BACKENDS, *(() if case.axis else ("reference",))}
    assert case.plain in names
    assert not case.provider(case.plain).ours
    variants = {p.variant for p in case.providers if p.ours}
    for goal in case.goals:
        assert goal.device in case.devices
        assert goal.variant in variants
        assert set(goal.peers) <= {*names, *variants}
        assert bool(goal.peers) == (goal.kind in ("speedup", "overhead"))
        assert any(goal in case.goals_on(goal.device, size) for size in case.sizes)
    assert len(case.sizes) == len({tuple(sorted(size.items())) for size in case.sizes})
    assert bool(case.axis) == (len(case.sizes) > 1)
    for size in case.sizes:
        assert set(case.small) == set(size)
        work = case.work(size)
        assert work.flops > 0
        assert work.elements > 0


def test_case_names_are_unique_and_lead_with_their_op() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.name.startswith(f"{case.op}/") for case in CASES)


def test_work_of_pooling_is_that_of_its_product() -> None:
    work = pool.forward_work({"batch": 1, "side": 27, "dim": 1152, "window": 3})
    assert work.flops == pytest.approx(2 * 729 * 1152 * 1152, rel=0.01)
    assert work.elements == 1152 * (729 + 1152 + 81)


def test_cases_for_goals_keep_what_the_check_needs() -> None:
    case = next(case for case in CASES if case.name == "sparse_prefill/quarter-2k").for_goals("cpu")
    timed = {p.name for p in case.providers if p.timed}
    assert {"flashsloth/cpu", "masked SDPA on all tokens", "gather + SDPA"} <= timed
    assert "flashsloth/reference" not in timed
    assert case.plain in {p.name for p in case.providers}


def test_patterns() -> None:
    assert [case.name for case in matching(CASES, "pool/training-b8")] == ["spatial_pool/training-b8"]
    assert {case.op for case in matching(CASES, "sparse_prefill/*")} == {"sparse_prefill"}
    assert matching(CASES, None) == list(CASES)


def test_widened_reaches_named_tuples() -> None:
    case = next(case for case in CASES if case.op == "embedded_query")
    wide = declared.widened(case.inputs(case.small))
    assert all(field.dtype == torch.float64 for field in wide["params"])
    assert wide["heads"] == case.small["heads"]
    outputs = callable_of(case, Provider("exact", case.exact), wide)()
    assert outputs["query"].dtype == torch.float64


# ---- checks ----


def test_right_result_gets_its_ratios_and_goals() -> None:
    rows = by_provider(toy(right), CPU._replace(limits=Ceilings(1e9, 1e9)))
    ours = rows[NAME]
    assert ours.passed
    assert len(ours.samples) >= 3
    assert ours.ratios["slow"]["p50"] > 3
    assert [(goal.peers, goal.reached) for goal in ours.goals] == [(["slow"], True), (["sum"], False)]
    assert rows["slow"].ratios == {}
    assert rows["slow"].times is not None
    assert rows["slow"].times.p20 >= 0.005
    assert ours.p50 is not None
    assert ours.share == pytest.approx(4e-9 / ours.p50)  # one element of four bytes at 1 GB/s


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (wrong, "y: error"),
        (raises, "raised RuntimeError: kernel lost its way"),
        (lambda given: {"y": given["x"] * torch.nan}, "y: error nan"),
        (lambda given: {"y": given["x"][:3]}, r"y: expected shape \(8, 16\), got \(3, 16\)"),
        (lambda given: {}, "gave no output"),
    ],
    ids=["wrong", "raises", "nan", "shape", "nothing"],
)
def test_failed_check_leaves_no_times_and_no_ratios(run: Callable[[Inputs], Outputs], said: str) -> None:
    ours = by_provider(toy(run))[NAME]
    assert ours.failure is not None
    assert re.search(said, ours.failure), ours.failure
    assert (ours.p50, ours.samples, ours.ratios, ours.goals) == (None, [], {}, [])


@pytest.mark.parametrize("run", [wrong, raises])
def test_wrong_or_missing_peer_gives_no_ratio_either(run: Callable[[Inputs], Outputs]) -> None:
    case = toy(right)
    case = replace(case, providers=(*case.providers[:2], Provider("slow", run)))
    rows = by_provider(case)
    assert rows[NAME].passed
    assert (rows["slow"].failure is None) == (run is raises)
    assert (rows["slow"].missing is None) == (run is wrong)
    assert "slow" not in rows[NAME].ratios
    first = rows[NAME].goals[0]
    assert (first.peers, first.measured, first.reached) == (["slow"], None, None)


def test_peer_that_cannot_run_is_named_with_its_reason() -> None:
    case = toy(right)
    absent = Provider("far", raises, missing=lambda device, size: f"not on a {device} with {size['rows']} rows")
    rows = by_provider(replace(case, providers=(*case.providers, absent)))
    assert rows["far"].missing == "not on a cpu with 8 rows"
    assert not rows["far"].passed


def test_gradients_are_checked_too() -> None:
    class HalfGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return dy

    def run(given: Inputs) -> Outputs:
        return {"y": HalfGradient.apply(given["x"])}

    changes: dict[str, Any] = {"mode": "forward+backward", "differentiable": ("x",)}
    failure = by_provider(toy(run, **changes))[NAME].failure
    assert failure is not None
    assert failure.startswith("dx: error")
    assert by_provider(toy(right, **changes))[NAME].passed


def test_error_rule_allows_twice_the_plain_error_and_no_more() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    plain = torch.tensor([1.0, 1.0, 1.0 + 1e-4])
    assert verdict("y", torch.tensor([1.0, 1.0 - 1.9e-4, 1.0]), exact, plain).failure is None
    assert verdict("y", torch.tensor([1.0, 1.0 - 2.1e-4, 1.0]), exact, plain).failure is not None
    assert verdict("y", torch.tensor([1.0, 1.0, 1.0 + 9e-5]), exact, None).failure is None
    assert verdict("y", torch.tensor([1.0, 1.0, 1.0 + 2e-4]), exact, None).failure is not None


def test_curves_stop_where_the_work_is_too_much() -> None:
    case = toy(right, sizes=({"rows": 8}, {"rows": 16}), axis="rows", work=lambda size: Work(1e10 * size["rows"], 1.0))
    rows = by_provider(case)
    assert rows[NAME].missing == "8e+10 flops, more than the suite asks of this device"
    assert rows[NAME].samples == []


# ---- goals ----


def row(provider: str, seconds: float | None, *, failure: str | None = None, **rest: Any) -> Row:
    fields = {"size": {"rows": 8}, "ours": provider.startswith("flashsloth"), "share": 0.5, "method": "graph", **rest}
    found = Row("toy/double", "toy", mode="forward", dtype="bfloat16", provider=provider, flops=1, bytes=1, **fields)
    found.failure = failure
    if seconds is not None and failure is None:
        found.set_times([seconds] * 3)
    return found


def judged(goals: tuple[Goal, ...], *rows: Row) -> list[tuple[float | None, bool | None]]:
    case = toy(right, goals=goals, kept_unit=lambda size: 100 * size["rows"])
    _compare(case, case.sizes[0], Place("cuda", DTYPES["cuda"]), case.providers, list(rows))
    return [(goal.measured, goal.reached) for one in rows for goal in one.goals]


def test_goals_hold_for_the_fastest_of_ours_against_the_fastest_peer() -> None:
    goals = (
        Goal("cuda", "speedup", 2.0, ("a", "b")),
        Goal("cuda", "overhead", 0.4, ("a", "b")),
        Goal("cuda", "seconds", 1.0),
        Goal("cuda", "share", 0.6),
        Goal("cuda", "kept", 0.25),
        Goal("cuda", "speedup", 1.0, ("gone",)),
        Goal("cpu", "seconds", 1.0),
        Goal("cuda", "seconds", 1.0, size={"rows": 9}),
    )
    found = judged(
        goals,
        row("flashsloth/triton", 3.0),
        row("flashsloth/cuda", 2.0, kept_bytes=400),
        row("flashsloth/reference", 1.0),
        row("a", 6.0),
        row("b", 4.0, failure="wrong"),
    )
    assert found == [
        (3.0, True),
        (pytest.approx(1 / 3), True),
        (2.0, False),
        (0.5, False),
        (0.25, True),
        (None, None),
    ]


def test_goal_against_another_use_of_ours() -> None:
    rows = (
        row("flashsloth/triton", 3.0),
        row("flashsloth/triton, without", 2.5, variant="without"),
        row("flashsloth/cuda, without", 2.0, variant="without"),
    )
    assert judged((Goal("cuda", "overhead", 1.1, ("without",)),), *rows) == [(1.5, False)]


def test_what_is_wrong_takes_no_part_in_a_goal() -> None:
    goals = (Goal("cuda", "speedup", 1.0, ("a",)),)
    wrong_one = row("flashsloth/cuda", 1.0, failure="wrong")
    assert judged(goals, wrong_one, row("flashsloth/triton", 4.0), row("a", 2.0)) == [(0.5, False)]
    assert judged(goals, row("flashsloth/triton", None), row("a", 2.0)) == [(None, None)]
    assert best_of([wrong_one], "", METHODS["cuda"][0]) is None


def test_faster_in_cuda_means_at_every_size() -> None:
    both = [row("flashsloth/triton", 2.0), row("flashsloth/cuda", 1.0)]
    assert faster_in_cuda(both) == ["toy"]
    slower = [row("flashsloth/triton", 1.0, size={"rows": 9}), row("flashsloth/cuda", 2.0, size={"rows": 9})]
    assert faster_in_cuda(both + slower) == []
    assert faster_in_cuda(both[:1]) == []


# ---- memory ----


def test_kept_bytes_count_storages_once_and_no_inputs() -> None:
    def run(given: Inputs) -> Outputs:
        hidden = given["x"] @ given["w"]  # keeps its inputs, which do not count
        gate = hidden.sigmoid()  # keeps its output: 8 x 32 floats
        return {"y": (gate * gate.view(-1, 32)).sum()}  # keeps the same storage twice more

    case = toy(run, mode="forward+backward", differentiable=("x", "w"))
    inputs = {"x": torch.randn(8, 16), "w": torch.randn(16, 32)}
    assert kept_bytes(case, case.provider(NAME), inputs) == 8 * 32 * 4


@needs_extension
def test_pooling_keeps_one_bit_a_hidden_unit() -> None:
    case = next(case for case in CASES if case.name == "spatial_pool/training-b8").for_goals("cpu")
    size = {"batch": 2, "side": 9, "dim": 1152, "window": 3}
    rows = {row.provider: row for row in run_point(case, size, CPU, FAST)}
    tokens = 2 * 81
    assert rows[NAME].kept_bytes == tokens * (1152 // 8 + 4)  # the mask, and the weights in fp32
    assert [goal.reached for goal in rows[NAME].goals if goal.kind == "kept"] == [True]
    plain = rows[pool.SCORES].kept_bytes
    assert plain is not None
    assert plain >= tokens * 1152 * 4


def test_peak_is_what_a_call_holds_at_once() -> None:
    def call() -> None:
        first = torch.ones(16 << 20)  # 64 MiB
        second = first + 1
        del first
        torch.ones(8 << 20).add_(second[0])

    found = peak_bytes(call, "cpu")
    if found is None:
        pytest.skip("the system does not tell the resident set of a process")
    assert found == pytest.approx(128 << 20, rel=0.1)
    again = peak_bytes(call, "cpu")
    assert again == pytest.approx(found, rel=0.1)  # freed memory was given back


# ---- times of a GPU ----


class FakeTimer:
    """Answers as the timer of a GPU does: "sum" cannot be captured, and what it was given is kept."""

    def __init__(self) -> None:
        self.given: dict[str, int] = {}

    def graphs(self, calls: Any, rounds: int, budget: float) -> Any:
        self.given = {name: len({id(one) for one in sets}) for name, sets in calls.items()}
        for sets in calls.values():
            assert all(one() for one in sets)
        return {name: [2e-6] * 3 for name in calls if name != "sum"}, {"sum": "not captured: it synchronises"}

    def calls(self, calls: Any, rounds: int, budget: float) -> Any:
        return {name: [9e-6] * 3 for name in calls}


def test_a_gpu_has_two_times_and_rotated_inputs() -> None:
    case = toy(right, devices=("cuda",))
    timer = FakeTimer()
    place = Place("cuda", torch.float32, Ceilings(4e6, 1e12), timer)  # type: ignore[arg-type]
    inputs = case.inputs(case.sizes[0])
    rows = _rows(case, case.sizes[0], place, run_checks(case, inputs, "cpu", torch.float32, case.sizes[0]))
    _time(case, case.sizes[0], place, FAST, case.providers, inputs, rows)
    found = {(row.provider, row.method): row for row in rows}
    assert timer.given == {NAME: 3, "sum": 3, "slow": 3}
    assert (found[NAME, "graph"].p50, found[NAME, "call"].p50) == (2e-6, 9e-6)
    assert found[NAME, "graph"].share == pytest.approx(0.5)  # four bytes at 4 MB/s are a microsecond
    assert found["sum", "graph"].missing == "not captured: it synchronises"
    assert found["sum", "call"].p50 == 9e-6


@pytest.mark.parametrize("name", [pytest.param(case.name, marks=GPU_MARKS) for case in CASES])
def test_every_case_is_timed_on_a_gpu(name: str) -> None:
    from bench.gpu.timing import Timer

    case = next(case for case in CASES if case.name == name)
    rows = run_point(case, case.small, Place("cuda", DTYPES["cuda"], None, Timer(copies=2)), FAST)
    assert [(row.provider, row.failure) for row in rows if row.failure] == []
    timed = {(row.provider, row.method) for row in rows if row.samples}
    for method in METHODS["cuda"]:
        assert ("flashsloth/triton", method) in timed
        assert any(provider.startswith(f"{OURS}/") is False for provider, _ in timed), timed
    assert all(row.peak_bytes is not None for row in rows if row.samples)
