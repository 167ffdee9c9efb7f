"""The GPU check: its steps survive each other, its goals are judged as declared, its cases compute the same thing."""

from __future__ import annotations

import importlib
import json
import re
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.gpu import check, measure, report, steps
from bench.gpu.cases import GPU_CASES, GpuCase, GpuGoal
from flashsloth_ops import backend, measured
from tests.support import GPU_MARKS

# Stands in for `python -m bench.gpu.steps`: passes, fails, dies, hangs or writes nonsense, by the name of the step.
STEPS = """
import json, os, sys, time
name, file = sys.argv[1:]
rows = [{"case": "spatial_pool/x", "provider": "flashsloth, triton", "failure": None, "kept_bytes": None, "goals": [],
         "seconds": {"p20": 9e-6, "p50": 1e-5, "p80": 2e-5}, "share": 0.25}]
timing = {"ceilings": {"bytes_per_second": 4e12, "flops_per_second": 8e14}, "rows": rows, "faster_in_cuda": ["x"]}
found = {"build": (True, "built", {}), "timing": (True, "1 of 1", timing), "memcheck": (None, "no such tool", {}),
         "tests": (False, "2 failed", {"failed": ["a"]})}
if name == "graphs": print("a lot"); os.abort()
if name == "compile": time.sleep(60)
if name == "backends": open(file, "w").write("{"); sys.exit(0)
ok, summary, details = found[name]
json.dump({"ok": ok, "summary": summary, "details": details}, open(file, "w"))
"""


@pytest.fixture
def finished(tmp_path: Path) -> tuple[dict[str, Any], Path, list[str]]:
    script = tmp_path / "steps.py"
    script.write_text(textwrap.dedent(STEPS))
    said: list[str] = []
    plan = {
        "build": 30.0,
        "graphs": 30.0,
        "compile": 5.0,
        "backends": 30.0,
        "timing": 30.0,
        "memcheck": 30.0,
        "tests": 30.0,
    }
    command = [sys.executable, str(script)]
    document, path = check.run(tmp_path / "out", budget=120.0, plan=plan, tell=said.append, command=command)
    return document, path, said


def test_every_step_reports_whatever_the_others_do(finished: tuple[dict[str, Any], Path, list[str]]) -> None:
    document, path, said = finished
    found = {step["name"]: (step["ok"], step["summary"]) for step in document["steps"]}
    assert found["build"] == (True, "built")
    assert found["graphs"][0] is False
    assert found["graphs"][1].startswith("ended with -6: ")
    assert found["compile"] == (False, "stopped after 5 s")
    assert found["backends"][0] is False
    assert found["memcheck"] == (None, "no such tool")
    assert found["tests"] == (False, "2 failed")
    assert json.loads(path.read_text()) == document
    assert [line.split()[0] for line in said] == ["passed", "FAILED", "FAILED", "FAILED", "passed", "skipped", "FAILED"]
    text = report.render(document)
    assert "copy 4.00 TB/s, bf16 product 800 TFLOP/s" in text
    assert "spatial_pool/x  flashsloth, triton  10.0 us  9.0 us to 20.0 us  25 %" in text


def test_no_time_left_is_said(tmp_path: Path) -> None:
    document, _ = check.run(tmp_path, budget=1.0, plan={"build": 30.0}, tell=lambda _: None)
    assert document["steps"][0]["summary"] == "no time was left"


def test_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-check"]) == 2
    assert "gpu-check: torch sees no GPU here" in capsys.readouterr().err


def test_faster_kernels_are_kept_for_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SHIPPED", tmp_path)
    monkeypatch.setenv("FLASHSLOTH_CONFIG_DIR", str(tmp_path / "none"))
    path = measured.ship("NVIDIA Probe", ["spatial_pool"])
    assert path.name == "nvidia-probe.json"
    assert measured.faster_in_cuda("NVIDIA Probe") == ("spatial_pool",)


def row(provider: str, seconds: float | None, *, failure: str | None = None, share: float = 0.5) -> dict[str, Any]:
    times = None if seconds is None else {"p20": seconds, "p50": seconds, "p80": seconds}
    return {
        "case": "spatial_pool/b1",
        "provider": provider,
        "failure": failure,
        "seconds": times,
        "share": share,
        "kept_bytes": None,
        "goals": [],
    }


def judged(goals: tuple[GpuGoal, ...], *rows: dict[str, Any]) -> list[tuple[float | None, bool | None]]:
    by_name = {one["provider"]: one for one in rows}
    measure._judge(GpuCase(GPU_CASES[0].case, goals), by_name)
    return [(g["measured"], g["reached"]) for one in rows for g in one["goals"]]


def test_goals_hold_for_the_fastest_of_ours_against_the_fastest_peer() -> None:
    goals = (
        GpuGoal("speedup", 2.0, ("a", "b")),
        GpuGoal("overhead", 0.4, ("a", "b")),
        GpuGoal("seconds", 1.0),
        GpuGoal("share", 0.6),
        GpuGoal("speedup", 1.0, ("gone",)),
    )
    found = judged(
        goals,
        row("flashsloth, triton", 3.0),
        row("flashsloth, cuda", 2.0),
        row("a", 6.0),
        row("b", 4.0, failure="wrong"),
    )
    assert found == [(3.0, True), (pytest.approx(1 / 3), True), (2.0, False), (0.5, False), (None, None)]


def test_what_is_wrong_takes_no_part_in_a_goal() -> None:
    goals = (GpuGoal("speedup", 1.0, ("a",)),)
    assert judged(
        goals, row("flashsloth, cuda", 1.0, failure="wrong"), row("flashsloth, triton", 4.0), row("a", 2.0)
    ) == [(0.5, False)]
    assert judged(goals, row("flashsloth, triton", None), row("a", 2.0)) == [(None, None)]


def test_faster_in_cuda_means_in_every_case() -> None:
    both = [row("flashsloth, triton", 2.0), row("flashsloth, cuda", 1.0)]
    assert measure.faster_in_cuda(both) == ["spatial_pool"]
    slower = [
        {**one, "case": "spatial_pool/b2"} for one in (row("flashsloth, triton", 1.0), row("flashsloth, cuda", 2.0))
    ]
    assert measure.faster_in_cuda(both + slower) == []
    assert measure.faster_in_cuda(both[:1]) == []


@pytest.mark.parametrize("one", GPU_CASES, ids=lambda one: one.case.name)
def test_providers_compute_the_same(one: GpuCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the small size on the CPU, whose own kernels stand in for ours; a peer may be missing there, but not wrong."""
    monkeypatch.setattr("bench.gpu.cases.use_backend", lambda name: nullcontext())
    rows = measure.measure(one, None, None, 1, device="cpu", dtype=torch.float32, small=True)
    failed = {r["provider"]: r["failure"] for r in rows if r["failure"]}
    absent = {
        name for name, why in failed.items() if name.startswith("SDPA") and re.search("No (available|viable)", why)
    }
    assert set(failed) == absent, failed
    assert any(r["ours"] for r in rows)
    named = {peer for goal in one.gpu_goals for peer in goal.peers}
    assert named <= {r["provider"] for r in rows}


@pytest.mark.skipif(backend.triton_missing("cpu") is not None, reason=str(backend.triton_missing("cpu")))
def test_backends_and_compiled_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps themselves, on kernels under Triton's interpreter; then with a kernel that errs."""
    monkeypatch.setattr(steps, "DEVICE", "cpu")
    monkeypatch.setattr(steps, "GPU_CASES", GPU_CASES[:1])
    found = steps.backends(GPU_CASES[:1], (torch.float32,))
    assert found.ok
    assert "cuda: serves bfloat16, float16, got float32" in found.details["not_served"][0]
    assert steps.compiled(torch.float32).ok

    pool = importlib.import_module("flashsloth_ops.triton.spatial_pool")
    right = pool.spatial_pool

    def wrong(*args: Any) -> Any:
        y, *rest = right(*args)
        return y * 1.01, *rest

    monkeypatch.setattr(pool, "spatial_pool", wrong)
    found = steps.backends(GPU_CASES[:1], (torch.float32,))
    assert found.ok is False
    assert "y: error" in found.details["wrong"]["spatial_pool/b1, flashsloth, triton, float32"]


@pytest.mark.parametrize("cycles", [pytest.param(1_000_000, marks=GPU_MARKS)])
def test_timer_against_a_kernel_of_known_length(cycles: int) -> None:
    from bench.gpu.timing import Timer

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    want = start.elapsed_time(end) * 1e-3
    times, failures = Timer(copies=4).interleave({"sleep": lambda: torch.cuda._sleep(cycles)}, rounds=5)
    assert not failures
    assert sorted(times["sleep"])[2] == pytest.approx(want, rel=0.15)
