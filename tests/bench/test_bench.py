"""The suite itself: does the timer time, does a wrong result stay without a speedup, is what is stored whole."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import case as declared
from bench import result as stored
from bench.__main__ import duration, main
from bench.case import OURS, Case, Goal, Inputs, Outputs, Provider, Work, callable_of, kept_bytes
from bench.cases import CASES
from bench.cases import spatial_pool as pool
from bench.check import run_checks, verdict
from bench.result import Result, ResultError, load, make_header, save
from bench.runner import Effort, matching, run_case
from bench.timing import fixed_threads, interleave, quantiles, ratio
from tests.support import needs_extension

FAST = Effort(0.05, 3, 5)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with fixed_threads(1):
        yield


# ---- timing ----


def test_timer_measures_sleeps_of_known_length() -> None:
    times = interleave(
        {"short": lambda: time.sleep(0.004), "long": lambda: time.sleep(0.012)}, budget=0.2, max_rounds=12
    )
    short, long = quantiles(times["short"]), quantiles(times["long"])
    # A sleep never ends early; a busy machine may wake up late, so only the better part is bounded above.
    assert 0.004 <= short.p20 < 0.008
    assert 0.012 <= long.p20 < 0.020
    assert min(times["long"]) > min(times["short"])


class FakeClock:
    """Time passes only inside the calls, by exactly what they cost."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def costing(self, name: str, seconds: float | Callable[[int], float]) -> Callable[[], None]:
        def call() -> None:
            number = self.calls.count(name)
            self.calls.append(name)
            self.now += seconds if isinstance(seconds, float) else seconds(number)

        return call


def test_providers_are_interleaved_with_a_rotating_start() -> None:
    clock = FakeClock()
    calls = {name: clock.costing(name, 1.0) for name in "abc"}
    times = interleave(calls, budget=0.0, min_rounds=4, clock=clock)
    assert clock.calls[:3] == ["a", "b", "c"]  # warm-up; one is enough where it is long
    assert "".join(clock.calls[3:]) == "abc" + "bca" + "cab" + "abc"
    assert times == {name: [1.0] * 4 for name in "abc"}


def test_rounds_fill_the_budget_within_bounds() -> None:
    for budget, rounds in ((0.0, 5), (20.0, 10), (1e9, 30)):
        clock = FakeClock()
        calls = {name: clock.costing(name, 1.0) for name in "ab"}
        times = interleave(calls, budget=budget, min_rounds=5, max_rounds=30, clock=clock)
        assert len(times["a"]) == len(times["b"]) == rounds


def test_short_calls_are_repeated_within_a_measurement() -> None:
    clock = FakeClock()
    times = interleave({"tiny": clock.costing("tiny", 1e-4)}, budget=0.0, min_rounds=2, shortest=1e-3, clock=clock)
    assert times["tiny"] == pytest.approx([1e-4] * 2)
    assert len(clock.calls) == 2 + 2 * 11


def test_ratio_is_the_median_of_pairs() -> None:
    # The machine becomes ten times slower half way: the ratio of medians would be off, that of pairs is not.
    peer, ours = [2.0, 2.0, 2.0, 20.0, 20.0, 20.0], [1.0, 1.0, 1.0, 10.0, 10.0, 10.0]
    assert ratio(peer, ours) == (2.0, 2.0, 2.0)
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="expected at least one, got none"):
        quantiles([])
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize("slowdown", [1.03, 1.10, 2.0])
def test_planted_slowdown_is_seen_through_drift(slowdown: float) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 0.02 * torch.randn(200, generator=generator)
    clock = FakeClock()

    def cost(base: float, shift: int) -> Callable[[int], float]:
        # Load that comes and goes over the run, the same for both of a pair, and noise of each its own.
        return lambda number: base * (1 + 0.5 * (number // 10 % 2)) * noise[2 * number + shift].item()

    times = interleave(
        {"before": clock.costing("before", cost(1.0, 0)), "after": clock.costing("after", cost(slowdown, 1))},
        budget=1e9,
        max_rounds=60,
        clock=clock,
    )
    assert ratio(times["after"], times["before"]).p50 == pytest.approx(slowdown, rel=0.015)


# ---- checks ----


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_provider_of_a_case_is_right_at_a_small_size(case: Case) -> None:
    found = run_checks(case, case.inputs(case.small))
    assert set(found) == {provider.name for provider in case.providers}
    assert {name: one.failure for name, one in found.items() if one.failure} == {}
    assert all(0 <= one.max_error <= one.allowed for one in found.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_declared_consistently(case: Case) -> None:
    names = [provider.name for provider in case.providers]
    assert len(set(names)) == len(names)
    assert names[0] == OURS
    assert case.provider(OURS).ours
    assert case.plain in names
    assert not case.provider(case.plain).ours
    assert case.goals
    for goal in case.goals:
        assert goal.provider in names
        assert goal.kind == "kept" or goal.peer in names
        assert (goal.at_least is None) != (goal.at_most is None)
    work = case.work(case.size)
    assert work.flops > 0
    assert work.bytes > 0
    assert {OURS, case.plain} <= {provider.name for provider in case.with_goals_only().providers}


def test_work_of_pooling_is_that_of_its_product() -> None:
    work = pool.forward_work({"batch": 1, "side": 27, "dim": 1152, "window": 3})
    assert work.flops == pytest.approx(2 * 729 * 1152 * 1152, rel=0.01)
    assert work.bytes == 4 * 1152 * (729 + 1152 + 81)


def _toy(run: Callable[[Inputs], Outputs], **changes: Any) -> Case:
    """Twice x, in place of an op; ``run`` is ours."""
    case = Case(
        name="toy/double",
        op="spatial_pool",
        title="toy",
        mode="forward",
        size={"rows": 8},
        small={"rows": 4},
        inputs=lambda size: {"x": torch.randn(size["rows"], 16, generator=torch.Generator().manual_seed(0))},
        work=lambda size: Work(1.0, 1.0),
        providers=(
            Provider(OURS, run, ours=True),
            Provider("sum", lambda given: {"y": given["x"] + given["x"]}),
            Provider("slow", _slow),
        ),
        exact=lambda given: {"y": 2 * given["x"]},
        plain="sum",
        goals=(Goal("speedup", "slow", at_least=3.0), Goal("speedup", "sum", at_least=1e6)),
    )
    return replace(case, **changes)


def _slow(given: Inputs) -> Outputs:
    time.sleep(0.005)
    return {"y": given["x"] * 2}


def _right(given: Inputs) -> Outputs:
    return {"y": given["x"] * 2}


def _wrong(given: Inputs) -> Outputs:
    return {"y": given["x"] * 2.001}


def _raises(given: Inputs) -> Outputs:
    raise RuntimeError("kernel lost its way")


def test_right_result_gets_its_ratios_and_goals() -> None:
    rows = {row.provider: row for row in run_case(_toy(_right), FAST)}
    ours = rows[OURS]
    assert ours.check_passed
    assert ours.rounds >= 3
    assert ours.ratios["slow"]["p50"] > 3
    assert [(goal.peer, goal.reached) for goal in ours.goals] == [("slow", True), ("sum", False)]
    assert rows["slow"].ratios == {}
    assert rows["slow"].p20 is not None
    assert rows["slow"].p20 >= 0.005


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (_wrong, "y: error"),
        (_raises, "raised RuntimeError: kernel lost its way"),
        (lambda given: {"y": given["x"] * torch.nan}, "y: error nan"),
        (lambda given: {"y": given["x"][:3]}, r"y: expected shape \(8, 16\), got \(3, 16\)"),
        (lambda given: {}, "gave no output"),
    ],
    ids=["wrong", "raises", "nan", "shape", "nothing"],
)
def test_failed_check_leaves_no_times_and_no_ratios(run: Callable[[Inputs], Outputs], said: str) -> None:
    rows = {row.provider: row for row in run_case(_toy(run), FAST)}
    ours = rows[OURS]
    assert not ours.check_passed
    assert ours.failure is not None
    assert re.search(said, ours.failure), ours.failure
    assert (ours.p50, ours.ratios, ours.goals) == (None, {}, [])


def test_wrong_peer_gives_no_ratio_either() -> None:
    case = _toy(_right)
    case = replace(case, providers=(*case.providers[:2], Provider("slow", _wrong)))
    rows = {row.provider: row for row in run_case(case, FAST)}
    assert rows[OURS].check_passed
    assert not rows["slow"].check_passed
    assert "slow" not in rows[OURS].ratios
    assert [goal.peer for goal in rows[OURS].goals] == ["sum"]


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
    failure = run_checks(_toy(run, **changes), _toy(run).inputs({"rows": 8}))[OURS].failure
    assert failure is not None
    assert failure.startswith("dx: error")
    right = run_checks(_toy(_right, **changes), _toy(run).inputs({"rows": 8}))[OURS]
    assert right.failure is None


def test_error_rule_allows_twice_the_plain_error_and_no_more() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    plain = torch.tensor([1.0, 1.0, 1.0 + 1e-4])
    assert verdict("y", torch.tensor([1.0, 1.0 - 1.9e-4, 1.0]), exact, plain).failure is None
    assert verdict("y", torch.tensor([1.0, 1.0 - 2.1e-4, 1.0]), exact, plain).failure is not None
    assert verdict("y", torch.tensor([1.0, 1.0, 1.0 + 9e-5]), exact, None).failure is None
    assert verdict("y", torch.tensor([1.0, 1.0, 1.0 + 2e-4]), exact, None).failure is not None


# ---- memory ----


def test_kept_bytes_count_storages_once_and_no_inputs() -> None:
    def run(given: Inputs) -> Outputs:
        hidden = given["x"] @ given["w"]  # keeps its inputs, which do not count
        gate = hidden.sigmoid()  # keeps its output: 8 x 32 floats
        return {"y": (gate * gate.view(-1, 32)).sum()}  # keeps the same storage twice more

    case = _toy(run, mode="memory", differentiable=("x", "w"))
    inputs = {"x": torch.randn(8, 16), "w": torch.randn(16, 32)}
    assert kept_bytes(case, case.provider(OURS), inputs) == 8 * 32 * 4


@needs_extension
def test_pooling_keeps_one_bit_a_hidden_unit() -> None:
    case = next(case for case in CASES if case.name == "spatial_pool/memory-b8")
    size = {"batch": 2, "side": 9, "dim": 1152, "window": 3}
    rows = {row.provider: row for row in run_case(case, FAST, size=size)}
    tokens = 2 * 81
    assert rows[OURS].kept_bytes == tokens * (1152 // 8 + 4)  # the mask, and the weights in fp32
    assert rows[OURS].goals[0].reached
    assert rows[pool.SCORES].kept_bytes is not None
    assert rows[pool.SCORES].kept_bytes >= tokens * 1152 * 4


# ---- results ----


def _result() -> Result:
    return Result(make_header(quick=True, small=True, backends={"spatial_pool": "cpu"}), run_case(_toy(_right), FAST))


def test_result_survives_a_round_trip(tmp_path: Path) -> None:
    result = _result()
    path = result.path(tmp_path)
    save(result, path)
    assert load(path) == result
    assert path.parent.name == result.header["slug"]
    assert path.name.endswith(f"-{result.header['commit'][:12]}.json")
    document = json.loads(path.read_text())
    assert (document["schema"], document["version"]) == ("flashsloth-bench", 1)
    assert {"device", "cores", "isa", "threads", "torch", "commit", "dirty", "date"} <= set(document["header"])
    row = document["rows"][0]
    wanted = "case size dtype mode provider p20 p50 p80 flops bytes ratios goals max_error check_passed"
    assert set(wanted.split()) <= set(row)


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _result()
    path = tmp_path / "result.json"
    save(result, path)
    before = path.read_bytes()
    result.rows = result.rows * 2

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(result, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]  # and nothing half written lies around
    save(result, path)
    assert len(load(path).rows) == 2 * len(load_rows(before))


def load_rows(raw: bytes) -> list[Any]:
    return json.loads(raw)["rows"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "expected a JSON document"),
        ("[]", 'expected "schema": "flashsloth-bench"'),
        ('{"schema": "other"}', 'expected "schema": "flashsloth-bench"'),
        ('{"schema": "flashsloth-bench", "version": 0}', "expected schema version 1, got 0"),
        ('{"schema": "flashsloth-bench", "version": 1, "header": {}}', "expected a header and a list of rows"),
        ('{"schema": "flashsloth-bench", "version": 1, "header": {}, "rows": [{}]}', "row 0: expected the fields"),
    ],
)
def test_foreign_files_are_named_and_never_overwritten(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ResultError, match=said):
        load(path)
    with pytest.raises(ResultError, match="expected"):
        save(_result(), path)
    assert path.read_text() == content


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    save(_result(), path)
    other = _result()
    other.header["date"] = "2001-01-01T00:00:00Z"
    with pytest.raises(ResultError, match="got another result"):
        save(other, path)


def test_slug_is_fit_for_a_directory() -> None:
    assert stored.slug("Intel(R) Xeon(R) CPU @ 2.50GHz 2 threads") == "intel-xeon-cpu-2.50ghz-2-threads"
    assert stored.slug("../..") == "unknown"


# ---- command line ----


def _stored(folder: Path) -> Result:
    (path,) = folder.rglob("*.json")
    return load(path)


def test_run_of_all_cases_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", "--small", "--budget", "1s", "--threads", "1", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert "small sizes: these numbers say nothing of speed" in shown
    result = _stored(tmp_path)
    assert {row.case for row in result.rows} == {case.name for case in CASES}
    assert result.header["threads"] == 1
    assert all(row.check_passed for row in result.rows)
    ours = [row for row in result.rows if row.provider == OURS and row.mode != "memory"]
    assert all(row.ratios for row in ours)


def test_planted_wrong_result_shows_no_speedup_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", "--budget", "0.1s", "--out", str(tmp_path)], cases=[_toy(_wrong)])
    shown = capsys.readouterr().out
    assert code == 1
    assert "check failed: y: error" in shown
    assert "so those results have no ratio" in shown
    assert not any(line.rstrip().endswith(("reached", "missed")) for line in shown.splitlines())
    assert _stored(tmp_path).rows[0].ratios == {}


def test_missed_goal_is_shown_and_does_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--budget", "0.1s", "--out", str(tmp_path)], cases=[_toy(_right)]) == 0
    shown = capsys.readouterr().out
    assert "1 of 2 goals reached" in shown
    (line,) = [line for line in shown.splitlines() if "slow" in line]
    assert "≥ 3" in line
    assert "reached" in line


def test_interrupted_run_keeps_what_was_measured(tmp_path: Path) -> None:
    def interrupted(given: Inputs) -> Outputs:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        main(
            ["run", "--budget", "0.1s", "--out", str(tmp_path)],
            cases=[_toy(_right), _toy(interrupted, name="toy/interrupted")],
        )
    assert {row.case for row in _stored(tmp_path).rows} == {"toy/double"}


def test_list_names_every_case_and_who_serves_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for case in CASES:
        assert case.name in shown
    assert "masked SDPA on all tokens" in shown
    assert "served by" in shown


def test_wrong_arguments_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--case", "nothing-like-it", "--out", str(tmp_path)]) == 2
    assert "expected a pattern that matches one of spatial_pool/forward-b1" in capsys.readouterr().err
    occupied = tmp_path / "file"
    occupied.write_text("")
    assert main(["run", "--small", "--case", "importance", "--budget", "0.1s", "--out", str(occupied)]) == 2
    assert "python -m bench: " in capsys.readouterr().err
    for text in ("0s", "soon", "-1m"):
        with pytest.raises(SystemExit) as stop:
            main(["run", "--budget", text])
        assert stop.value.code == 2
    assert duration("1.5m") == 90


def test_patterns() -> None:
    assert [case.name for case in matching(CASES, "training")] == ["spatial_pool/training-b8"]
    assert {case.op for case in matching(CASES, "sparse_prefill/*")} == {"sparse_prefill"}
    assert matching(CASES, None) == list(CASES)


def test_widened_reaches_named_tuples() -> None:
    case = next(case for case in CASES if case.op == "embedded_query")
    wide = declared.widened(case.inputs(case.small))
    assert all(field.dtype == torch.float64 for field in wide["params"])
    assert wide["heads"] == case.small["heads"]
    outputs = callable_of(case, Provider("exact", case.exact), wide)()
    assert outputs["query"].dtype == torch.float64
