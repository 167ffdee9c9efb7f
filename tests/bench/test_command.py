"""The command line: what is run, shown, stored and taken up again."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import runner, suite
from bench.__main__ import duration, main
from bench.case import Inputs, Outputs
from bench.cases import CASES
from bench.result import ROOT, Result, load
from tests.bench.toys import NAME, right, toy, wrong

TOY = ("run", "--device", "cpu", "--case", "toy", "--budget", "0.1s")

SLOW_SUITE = """
import time
from dataclasses import replace
from bench.__main__ import main
from tests.bench.test_command import TOY
from tests.bench.toys import right, toy

def slowly(given):
    time.sleep(0.02)
    return right(given)

cases = [replace(toy(right if n == 0 else slowly), name=f"toy/{n}") for n in range(10)]
raise SystemExit(main([*TOY, "--small", "--out", r"%s", *%r], cases=cases))
"""


@pytest.fixture(autouse=True)
def _no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product and a copy of a second are of no use to cases that double eight rows."""
    monkeypatch.setattr(suite, "_ceilings", lambda device: None)


def stored(folder: Path) -> Result:
    (path,) = folder.rglob("*.json")
    return load(path)


def test_run_of_all_cases_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--small", "--quick", "--budget", "1s", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    code = main(["run", *options])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert "small sizes: these numbers say nothing of speed" in shown
    result = stored(tmp_path)
    assert result.complete
    with_goals = {case.name for case in CASES if any(goal.device == "cpu" for goal in case.goals)}
    assert {row.case for row in result.rows} == with_goals
    assert result.header["threads"] == 1
    assert result.failed == []
    ours = [row for row in result.rows if row.provider == NAME]
    assert all(row.ratios for row in ours)


def test_planted_wrong_result_shows_no_speedup_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*TOY, "--out", str(tmp_path)], cases=[toy(wrong)])
    shown = capsys.readouterr().out
    assert code == 1
    assert "check failed: y: error" in shown
    assert "so those results have no ratio" in shown
    assert not any(line.rstrip().endswith(("reached", "missed")) for line in shown.splitlines())
    assert stored(tmp_path).rows[0].ratios == {}


def test_missed_goal_is_shown_and_does_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOY, "--out", str(tmp_path)], cases=[toy(right)]) == 0
    shown = capsys.readouterr().out
    assert "1 of 2 goals reached" in shown
    (line,) = [line for line in shown.splitlines() if "slow" in line]
    assert "≥ 3" in line
    assert "reached" in line


def test_only_named_providers_run(tmp_path: Path) -> None:
    arguments = [
        "run",
        "--device",
        "cpu",
        "--case",
        "toy",
        "--budget",
        "0.1s",
        "--out",
        str(tmp_path),
        "--provider",
        "slow",
    ]
    assert main(arguments, cases=[toy(right)]) == 0
    assert {row.provider for row in stored(tmp_path).rows} == {NAME, "slow"}


# ---- going on with an interrupted run ----


def test_interrupted_run_keeps_what_was_measured(tmp_path: Path) -> None:
    def interrupted(given: Inputs) -> Outputs:
        raise KeyboardInterrupt

    cases = [toy(right), toy(interrupted, name="toy/interrupted")]
    with pytest.raises(KeyboardInterrupt):
        main([*TOY, "--out", str(tmp_path)], cases=cases)
    result = stored(tmp_path)
    assert {row.case for row in result.rows} == {"toy/double"}
    assert not result.complete


def test_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Killed for real, at a moment of its own; the second run measures the rest and nothing twice."""

    def command(*options: str) -> list[str]:
        return [sys.executable, "-c", textwrap.dedent(SLOW_SUITE) % (tmp_path, options)]

    process = subprocess.Popen(command(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            paths = list(tmp_path.rglob("[!.]*.json"))
            if paths and len({row.case for row in load(paths[0]).rows}) >= 3:
                break
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = stored(tmp_path)
    cases = {row.case for row in before.rows}
    assert 3 <= len(cases) < 10
    assert not before.complete

    subprocess.run(command("--resume"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = stored(tmp_path)
    assert after.complete
    assert after.rows[: len(before.rows)] == before.rows
    assert [row.case for row in after.rows if row.provider == NAME] == [f"toy/{n}" for n in range(10)]
    rerun = subprocess.run(command("--resume"), cwd=ROOT, capture_output=True, text=True)
    assert rerun.returncode == 2
    assert "expected an unfinished result in" in rerun.stderr


def test_other_code_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = suite.plan([toy(right)], "cpu", budget=0.1)
    result = suite.begin(plan)
    monkeypatch.setattr(runner, "run_point", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        suite.go(plan, result, result.path(tmp_path), tell=lambda *_: None)
    assert suite.unfinished(plan, tmp_path)[1] == result
    with pytest.raises(ValueError, match=r"--resume: .* differs in quick: expected the same code and options"):
        suite.unfinished(plan._replace(quick=True), tmp_path)


def test_rows_from_elsewhere_are_stored_as_they_come(tmp_path: Path) -> None:
    plan = suite.plan([toy(right)], "cpu", budget=0.1)
    result = suite.begin(plan)
    path = result.path(tmp_path)
    seen: list[int] = []

    def more() -> Any:
        for number in range(2):
            seen.append(len(load(path).rows))
            yield [replace(result.rows[0], case=f"more/{number}")]

    suite.go(plan, result, path, more=more(), tell=lambda *_: None)
    assert seen == [3, 4]
    assert load(path) == result


# ---- what can run ----


def test_list_names_every_case_its_providers_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for case in CASES:
        assert f"{case.name}  (" in shown
    assert "runs  masked SDPA on all tokens" in shown
    assert "not   flashsloth/triton: made for cuda tensors" in shown
    assert "not measured on cpu" in shown
    assert "e2e  (whole models" in shown


def test_quick_runs_take_sizes_with_a_goal() -> None:
    plan = suite.plan(CASES, "cpu", quick=True)
    assert plan.points
    assert all(case.goals_on("cpu", size) for case, size in plan.points)
    gpu = suite.plan(CASES, "cuda", quick=True)
    lengths = [size["rows"] for case, size in gpu.points if case.name == "sparse_prefill/rows"]
    assert lengths == [512, 1024, 2048, 4096, 8192, 16384]


def test_wrong_arguments_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--case", "nothing-like-it", "--out", str(tmp_path)]) == 2
    assert "expected a pattern that matches one of spatial_pool/forward-b1" in capsys.readouterr().err
    assert main(["run", "--device", "cpu", "--case", "b64", "--out", str(tmp_path)]) == 2
    assert "expected a case that is measured on cpu, got spatial_pool/forward-b64" in capsys.readouterr().err
    assert main(["run", "--device", "cpu", "--provider", "tvm", "--out", str(tmp_path)]) == 2
    assert "--provider: expected part of one of " in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["run", "--device", "cuda", "--out", str(tmp_path)]) == 2
        assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err
    occupied = tmp_path / "file"
    occupied.write_text("")
    assert main(["run", "--device", "cpu", "--small", "--case", "importance", "--out", str(occupied)]) == 2
    assert "python -m bench: " in capsys.readouterr().err
    for text in ("0s", "soon", "-1m"):
        with pytest.raises(SystemExit) as stop:
            main(["run", "--budget", text])
        assert stop.value.code == 2
    assert duration("1.5m") == 90
