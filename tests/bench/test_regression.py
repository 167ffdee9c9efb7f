"""Intervals of ratios, and the check against a baseline: what it finds, and how rarely it finds what is not there."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench import regression
from bench.regression import FAMILY, MEASUREMENTS, SCREEN, NoBaseline, beyond, check, find_baseline, main, measurer
from bench.result import Result, Row, save
from bench.slowdown import RUN_TO_RUN, over, percent
from bench.statistics import Array, Estimate, centre, paired, repeated, student, unpaired
from tests.bench.toys import right, toy, wrong

PEERS = ("eager", "loop", "compiled")


def noise(
    rng: np.random.Generator, shape: tuple[int, ...], *, sd: float, spikes: float = 0.05, correlation: float = 0.0
) -> Array:
    """What a machine adds to the logarithm of a time: much the same each time, now and then a third more."""
    usual = rng.standard_normal(shape)
    for i in range(1, shape[-1]):
        usual[..., i] = correlation * usual[..., i - 1] + (1 - correlation**2) ** 0.5 * usual[..., i]
    return sd * usual + np.where(rng.random(shape) < spikes, rng.exponential(0.3, shape), 0.0)


def drift(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """What happens to all that is measured in a round: a walk that ends some 10 % off."""
    return 0.1 * np.cumsum(rng.standard_normal(shape), axis=-1) / shape[-1] ** 0.5


# ---- statistics ----


def test_quantiles_of_student_are_those_of_the_tables() -> None:
    tables = {(0.025, 1): 12.706, (0.025, 2): 4.3027, (0.0005, 4): 8.6103, (0.0005, 10): 4.5869, (0.025, 120): 1.9799}
    for (error, freedom), value in tables.items():
        assert student(error, freedom) == pytest.approx(value, rel=1e-4)
    assert student(0.025, np.inf) == pytest.approx(1.95996, rel=1e-5)
    with pytest.raises(ValueError, match=r"probability between 0 and 0\.5, got 0\.7"):
        student(0.7, 3)


@pytest.mark.parametrize("rounds", [3, 5, 7, 20, 60])
@pytest.mark.parametrize(("spikes", "correlation"), [(0.0, 0.0), (0.05, 0.0), (0.0, 0.3)])
def test_intervals_hold_what_they_promise(rounds: int, spikes: float, correlation: float) -> None:
    rng = np.random.default_rng(rounds)
    pairs = [noise(rng, (4000, rounds), sd=0.03, spikes=spikes, correlation=correlation) for _ in range(2)]
    found = centre(pairs[0] - pairs[1])
    inside = np.abs(found.log) < student(0.025, found.freedom) * np.sqrt(found.variance)
    assert 0.92 < inside.mean() < 0.99


def test_drift_common_to_a_pair_cancels_and_spikes_hardly_move_the_ratio() -> None:
    rng = np.random.default_rng(1)
    common = 10 * drift(rng, (40,))
    base = np.exp(common + noise(rng, (40,), sd=0.005))
    times = 1.03 * np.exp(common + noise(rng, (40,), sd=0.005))
    times[::8] *= 4
    ratio = paired(times, base)
    low, high = ratio.interval()
    assert 1.02 < low < ratio.ratio < high < 1.05
    assert ratio.ratio == pytest.approx(1.03, abs=0.006)
    low, high = unpaired(times, base).interval()
    assert high / low > 1.1  # not knowing the pairs, one must allow for the drift
    assert paired(times, base) == ratio


def test_too_few_or_unequal_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 3, got 2"):
        centre([0.1, 0.2])
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(4,\)"):
        paired([1, 2, 3], [1, 2, 3, 4])


def test_constant_samples_have_an_interval_of_no_width() -> None:
    ratio = paired([2.0] * 5, [1.0] * 5)
    assert ratio.interval() == pytest.approx((2.0, 2.0))


# ---- the rule of the check, over many simulated runs at once ----


def simulated(
    rng: np.random.Generator, runs: int, cases: int, rounds: int, *, sd: float, offset: float, slower: float = 0.0
) -> Estimate:
    """One measurement of every case in every run: ours over the mean of three peers, off as a whole by ``offset``."""
    series = noise(rng, (runs, cases, 4, rounds), sd=sd) + drift(rng, (runs, cases, 1, rounds))
    logs = series[:, :, 0] - series[:, :, 1:].mean(axis=2)
    return centre(logs + np.log1p(slower) + offset * rng.standard_normal((runs, cases, 1)))


def alarms(
    rng: np.random.Generator,
    runs: int,
    cases: int,
    rounds: int,
    *,
    sd: float,
    offset: float,
    tolerance: float,
    slower: float = 0.0,
    allowance: float | None = None,
) -> Array:
    """Which cases of which runs are called regressions, by the functions and constants that the check goes by.

    ``allowance``: for what a run is off by; None for exactly that.
    """
    allowed = offset if allowance is None else allowance
    base = simulated(rng, runs, cases, rounds, sd=sd, offset=offset)
    new = [simulated(rng, runs, cases, rounds, sd=sd, offset=offset, slower=slower) for _ in range(MEASUREMENTS)]
    each = [beyond(over([one], base, allowed), tolerance, SCREEN) for one in new]
    return np.logical_and.reduce(each) & beyond(over(new, base, allowed), tolerance, FAMILY / cases)


@pytest.mark.parametrize(("sd", "offset"), [(0.01, 0.005), (0.02, 0.02), (0.05, 0.01)])
@pytest.mark.parametrize("rounds", [7, 20])
def test_false_alarms_are_under_one_percent(sd: float, offset: float, rounds: int) -> None:
    rng = np.random.default_rng(rounds)
    same = alarms(rng, 1200, 12, rounds, sd=sd, offset=offset, tolerance=0.0)
    assert same.any(axis=1).mean() < 0.01
    accepted = alarms(rng, 1200, 12, rounds, sd=sd, offset=offset, tolerance=0.05, slower=0.05)
    assert accepted.any(axis=1).mean() < 0.01  # every case is slower by just what is accepted


def test_the_default_tolerance_bears_runs_that_are_off_by_more_than_is_allowed_for() -> None:
    rng = np.random.default_rng(4)
    found = alarms(rng, 1200, 12, 20, sd=0.02, offset=0.02, tolerance=0.05, allowance=RUN_TO_RUN)
    assert found.any(axis=1).mean() < 0.01


@pytest.mark.parametrize(
    ("slower", "tolerance", "sd", "offset", "rounds", "found"),
    [
        (0.03, 0.0, 0.01, 0.005, 60, 0.85),
        (0.05, 0.0, 0.01, 0.005, 60, 0.98),
        (0.05, 0.0, 0.02, 0.005, 60, 0.98),
        (0.10, 0.05, 0.02, 0.005, 60, 0.98),
        (0.05, 0.0, 0.01, RUN_TO_RUN, 60, 0.70),
        (0.10, 0.02, 0.02, RUN_TO_RUN, 60, 0.98),
        (0.10, 0.05, 0.01, RUN_TO_RUN, 60, 0.65),
        (0.15, 0.05, 0.02, RUN_TO_RUN, 60, 0.98),
        (0.10, 0.0, 0.05, RUN_TO_RUN, 60, 0.95),
    ],
)
def test_planted_slowdowns_are_found(
    slower: float, tolerance: float, sd: float, offset: float, rounds: int, found: float
) -> None:
    rng = np.random.default_rng(5)
    hits = alarms(rng, 100, 12, rounds, sd=sd, offset=offset, tolerance=tolerance, slower=slower)
    assert hits.mean() > found


def in_turns(rng: np.random.Generator, *, sd: float, offset: float, slower: float) -> Estimate:
    """400 comparisons of two revisions, each over six launches of 30 rounds."""
    found = []
    for _ in range(6):
        times = noise(rng, (400, 2, 30), sd=sd) + offset * rng.standard_normal((400, 2, 1)) + drift(rng, (400, 1, 30))
        found.append(centre(times[:, 1] - times[:, 0] + np.log1p(slower)))
    return repeated(found)


@pytest.mark.parametrize(("sd", "offset"), [(0.01, 0.0), (0.02, 0.01), (0.05, 0.0), (0.01, 0.02)])
def test_equal_revisions_in_turns_look_equal(sd: float, offset: float) -> None:
    found = in_turns(np.random.default_rng(7), sd=sd, offset=offset, slower=0.0)
    inside = np.abs(found.log) < student(0.025, found.freedom) * np.sqrt(found.variance)
    assert 0.92 < inside.mean() < 0.98


@pytest.mark.parametrize(
    ("slower", "sd", "offset"),
    [(0.03, 0.01, 0.005), (0.03, 0.02, 0.005), (0.05, 0.02, 0.01), (0.10, 0.05, 0.02)],
)
def test_two_revisions_in_turns_show_small_slowdowns(slower: float, sd: float, offset: float) -> None:
    found = in_turns(np.random.default_rng(6), sd=sd, offset=offset, slower=slower)
    assert (found.lower(0.025) > 0).mean() > 0.95


def test_of_one_launch_its_own_samples_speak() -> None:
    one = centre([0.1, 0.2, 0.3])
    assert repeated([one]) is one
    with pytest.raises(ValueError, match="expected at least one, got none"):
        repeated([])


# ---- the check ----


def result_of(rows: Sequence[Row], **header: Any) -> Result:
    usual = {"kind": "cpu", "slug": "a-cpu", "date": "2026-01-02T03:04:05Z", "commit": "0" * 40, "difference": ""}
    return Result({**usual, "quick": False, "small": False, "torch": "2.13.0", **header}, list(rows), True)


def row_of(case: str, provider: str, method: str = "wall", **values: Any) -> Row:
    samples = values.pop("samples", None)
    row = Row(case, "pool", {"batch": 1}, "float32", "forward", provider, method, 1.0, 1.0, **values)
    if samples is not None:
        row.set_times(samples)
    return row


class Machine:
    """Measures cases by drawing times. ``slower``: by case, ours over what it was, one entry a measurement or one for
    all."""

    def __init__(self, seed: int, names: Sequence[str], *, kind: str = "cpu", sd: float = 0.02, offset: float = 0.0):
        self.rng, self.names, self.kind, self.sd, self.offset = np.random.default_rng(seed), names, kind, sd, offset
        self.slower: dict[str, Sequence[float]] = {}
        self.calls: list[list[str]] = []
        self.load = 1.0

    def __call__(self, names: Sequence[str]) -> Result:
        rows = []
        for case in names:
            steps = self.slower.get(case, (0.0,))
            slower = steps[min(len(self.calls), len(steps) - 1)]
            common = drift(self.rng, (30,))
            for i, provider in enumerate(("flashsloth/cpu", *PEERS)):
                logs = common + noise(self.rng, (30,), sd=self.sd) + self.offset * self.rng.standard_normal()
                factor = (1 + slower if i == 0 else 1 + i) * self.load
                method = "wall" if self.kind == "cpu" else "graph"
                rows.append(row_of(case, provider, method, ours=i == 0, samples=1e-3 * factor * np.exp(logs)))
        self.calls.append(list(names))
        return result_of(rows, kind=self.kind)


NAMES = tuple(f"pool/case-{i}" for i in range(8))


def baseline(kind: str = "cpu") -> Result:
    return Machine(0, NAMES, kind=kind)(NAMES)


def shown(report: regression.Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(regression.render(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_planted_slowdown_is_named_with_its_size_and_interval() -> None:
    machine = Machine(1, NAMES)
    machine.slower = {"pool/case-3": (0.25,)}
    said: list[str] = []
    report = check(baseline(), machine, NAMES, tolerance=0.05, say=said.append)
    assert report.exit_code == 1
    assert [finding.key[0] for finding in report.of("regression")] == ["pool/case-3"]
    slowdown = report.of("regression")[0].slowdown
    assert slowdown is not None
    low, high = slowdown.interval()
    assert 1.15 < low < 1.25 < high < 1.35
    assert machine.calls == [list(NAMES), ["pool/case-3"], ["pool/case-3"]]
    assert len(said) == 2
    assert all("pool/case-3" in line for line in said)
    text = shown(report)
    assert "pool/case-3 (batch=1; float32, forward), flashsloth/cpu: REGRESSION: 2" in text
    assert "95 % interval" in text
    assert "8 compared, 1 slower by more than 5 %" in text


def test_what_a_second_measurement_does_not_show_was_noise() -> None:
    machine = Machine(2, NAMES)
    machine.slower = {"pool/case-3": (0.4, 0.0)}
    report = check(baseline(), machine, NAMES, tolerance=0.05)
    assert report.exit_code == 0
    assert [finding.key[0] for finding in report.of("not confirmed")] == ["pool/case-3"]
    assert machine.calls[1:] == [["pool/case-3"]]


def test_nothing_is_measured_again_where_nothing_looks_slower() -> None:
    machine = Machine(3, NAMES)
    machine.slower = {"pool/case-3": (-0.5,)}
    report = check(baseline(), machine, NAMES, tolerance=0.05)
    assert report.exit_code == 0
    assert len(report.of("no slower")) == len(NAMES)
    assert len(machine.calls) == 1


def test_the_check_decides_as_the_rule_that_was_simulated() -> None:
    """With its own data, its own code and the allowance it goes by; near the edge of what can be found."""
    shape = {"sd": 0.03, "offset": 0.01 * (4 / 3) ** 0.5}  # of ours by 0.01 and of the mean of three peers
    found = 0
    for seed in range(40):
        machine = Machine(seed, NAMES[:3], sd=0.03, offset=0.01)
        base = machine(NAMES[:3])
        machine.slower = dict.fromkeys(NAMES[:3], (0.07,))
        report = check(base, machine, NAMES[:3], tolerance=0.02)
        assert len(report.findings) == 3
        found += len(report.of("regression"))
    rng = np.random.default_rng(0)
    hits = alarms(rng, 2000, 3, 30, tolerance=0.02, slower=0.07, allowance=RUN_TO_RUN, **shape)
    assert 0.2 < hits.mean() < 0.8
    assert found / 120 == pytest.approx(hits.mean(), abs=0.12)


def test_on_a_cpu_a_slower_machine_is_no_regression_and_on_a_gpu_it_is() -> None:
    for kind, code in (("cpu", 0), ("cuda", 1)):
        machine = Machine(4, NAMES, kind=kind)
        machine.load = 1.5
        assert check(baseline(kind), machine, NAMES, tolerance=0.05).exit_code == code


def edited(machine: Machine, edit: Callable[[Result], None]) -> Callable[[Sequence[str]], Result]:
    def measure(names: Sequence[str]) -> Result:
        result = machine(names)
        edit(result)
        return result

    return measure


def test_a_failed_check_of_ours_fails_the_check() -> None:
    def fail(result: Result) -> None:
        result.rows[0] = row_of(NAMES[0], "flashsloth/cpu", ours=True, failure="y: error 1, allowed 0.1")

    report = check(baseline(), edited(Machine(5, NAMES), fail), NAMES, tolerance=0.05)
    assert report.exit_code == 1
    assert "pool/case-0 (batch=1; float32, forward), flashsloth/cpu: check failed" in shown(report)
    assert "y: error 1, allowed 0.1" in shown(report)


def test_a_failed_check_in_a_second_measurement_counts() -> None:
    machine = Machine(5, NAMES)
    machine.slower = {NAMES[0]: (0.4,)}

    def fail(result: Result) -> None:
        if len(machine.calls) == 2:
            result.rows[0] = row_of(NAMES[0], "flashsloth/cpu", ours=True, failure="y: expected no NaN")

    report = check(baseline(), edited(machine, fail), NAMES, tolerance=0.05)
    assert [finding.note for finding in report.of("failed")] == ["y: expected no NaN"]
    assert report.exit_code == 1


def test_what_is_missing_or_new_is_said() -> None:
    def change(result: Result) -> None:
        result.rows[0] = row_of(NAMES[0], "flashsloth/cpu", ours=True, missing="the extension is not built")

    before = baseline()
    before.rows = [row for row in before.rows if row.case != NAMES[2]]
    report = check(before, edited(Machine(6, NAMES[:-1]), change), NAMES[:-1], tolerance=0.05)
    text = shown(report)
    assert "pool/case-0 (batch=1; float32, forward), flashsloth/cpu: missing: the extension is not built" in text
    assert f"{NAMES[-1]} (batch=1; float32, forward), flashsloth/cpu: missing: it was not measured now" in text
    assert f"{NAMES[2]} (batch=1; float32, forward), flashsloth/cpu: new: it is not in the baseline" in text
    assert report.exit_code == 0
    assert "5 compared, 0 slower by more than 5 %; 2 missing; 1 new" in text


def test_sizes_left_out_on_purpose_are_not_missing() -> None:
    report = check(baseline(), Machine(6, NAMES), NAMES[:3], tolerance=0.05, partial=True)
    assert [finding.verdict for finding in report.findings] == ["no slower"] * 3


def test_without_peers_a_cpu_time_is_not_judged() -> None:
    def alone(result: Result) -> None:
        result.rows = [row for row in result.rows if row.ours]

    report = check(baseline(), edited(Machine(7, NAMES), alone), NAMES, tolerance=0.05)
    assert len(report.of("not judged")) == len(NAMES)
    assert report.exit_code == 2  # it must not look as if all were well


def test_another_torch_is_said() -> None:
    def newer(result: Result) -> None:
        result.header["torch"] = "2.14.0"

    said: list[str] = []
    check(baseline(), edited(Machine(8, NAMES), newer), NAMES, tolerance=0.05, say=said.append)
    assert "torch was 2.13.0 when the baseline was measured and is 2.14.0 now" in said


# ---- the command ----


def store(folder: Path, date: str, **values: Any) -> Path:
    complete = values.pop("complete", True)
    result = baseline()
    model = row_of("e2e/small", "FlashSloth", ours=True, samples=[1.0, 1.0, 1.0])
    result.rows.append(replace(model, op="e2e"))
    result.header.update(date=date, **values)
    result.complete = complete
    path = result.path(folder)
    save(result, path)
    return path


def test_the_baseline_is_the_newest_complete_result_of_full_size(tmp_path: Path) -> None:
    with pytest.raises(NoBaseline, match=r"expected a complete result in .*a-cpu"):
        find_baseline("a-cpu", folder=tmp_path)
    store(tmp_path, "2026-01-01T00:00:00Z")
    wanted = store(tmp_path, "2026-01-02T00:00:00Z")
    small = store(tmp_path, "2026-01-03T00:00:00Z", small=True)
    store(tmp_path, "2026-01-04T00:00:00Z", complete=False)
    other = store(tmp_path, "2026-01-05T00:00:00Z", slug="another-cpu")
    assert find_baseline("a-cpu", folder=tmp_path)[0] == wanted
    assert find_baseline("a-cpu", file=wanted)[0] == wanted
    with pytest.raises(ValueError, match="this device, a-cpu, got one of another-cpu"):
        find_baseline("a-cpu", file=other)
    with pytest.raises(ValueError, match="full size, got one of small sizes"):
        find_baseline("a-cpu", file=small)


def run(tmp_path: Path, machine: Machine, *arguments: str, case: str | None = None) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    regression.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.case, options.quick = case, False
    console = Console(file=io.StringIO(), width=200)
    code = main(options, slug="a-cpu", names=NAMES, measure=machine, console=console, folder=tmp_path)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_the_command(tmp_path: Path) -> None:
    with pytest.raises(NoBaseline):
        run(tmp_path, Machine(9, NAMES))
    code, text = run(tmp_path, Machine(9, NAMES), "--if-any")
    assert code == 0
    assert "no baseline for this device" in text

    path = store(tmp_path, "2026-01-01T00:00:00Z")
    code, text = run(tmp_path, Machine(10, NAMES))
    assert code == 0
    assert "missing" not in text
    assert path.name in text
    machine = Machine(11, NAMES)
    machine.slower = {"pool/case-3": (0.25,)}
    assert run(tmp_path, machine, "--tolerance", "50%")[0] == 0
    assert run(tmp_path, machine, case="case-4")[0] == 0
    assert machine.calls[-1] == ["pool/case-4"]
    code, text = run(tmp_path, machine, "--tolerance", "2%", case="case-3")
    assert code == 1
    assert "REGRESSION" in text
    with pytest.raises(ValueError, match="expected a pattern that matches one of pool/case-0"):
        run(tmp_path, machine, case="nothing")


def test_cases_are_measured_as_in_a_run() -> None:
    cases = [toy(right), toy(wrong, name="toy/wrong")]
    measure = measurer(cases, "cpu", quick=True, budget=0.1, tell=lambda what, done: None)
    result = measure(["toy/double"])
    assert {row.case for row in result.rows} == {"toy/double"}
    assert all(len(row.samples) >= 3 for row in result.rows if row.ours)
    report = check(result, measure, ["toy/double", "toy/wrong"], tolerance=9.0)
    assert len(report.of("no slower")) == 1
    assert [finding.key[0] for finding in report.of("failed")] == ["toy/wrong"]


def test_what_is_missing_at_many_sizes_is_one_line() -> None:
    before = baseline()
    for batch in (2, 4):
        before.rows += [replace(row, size={"batch": batch}) for row in before.rows if row.case == NAMES[1]]
    text = shown(check(before, Machine(6, NAMES), NAMES, tolerance=0.05))
    assert text.count("missing: it was not measured now") == 1
    assert "pool/case-1 at " in text


def test_percentages() -> None:
    assert percent("5%") == percent("5") == 0.05
    assert percent("0.5 %") == 0.005
    for text in ("-1%", "five", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="a percentage such as 5%"):
            percent(text)
