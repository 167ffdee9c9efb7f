"""The GPU check: its steps survive each other, and find what is wrong."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.cases import CASES
from bench.gpu import check, steps
from bench.result import Row, load
from flashsloth_ops import backend, measured
from tests.support import GPU_MARKS

# Stands in for `python -m bench.gpu.steps`: passes, fails, dies, hangs or writes nonsense, by the name of the step.
STEPS = """
import json, os, sys, time
name, file = sys.argv[1:]
rows = json.load(open(os.path.join(os.path.dirname(__file__), "rows.json")))
limits = {"bytes_per_second": 4e12, "flops_per_second": 8e14}
timing = {"ceilings": limits, "rows": rows, "faster_in_cuda": ["x"]}
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
    row = Row("spatial_pool/x", "spatial_pool", {}, "bfloat16", "forward", "flashsloth/triton", "graph", 1.0, 1.0)
    row.set_times([9e-6, 1e-5, 2e-5])
    (tmp_path / "rows.json").write_text(json.dumps([asdict(row)]))
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
    result = load(path)
    assert result.complete
    assert result.rows[0].p50 == 1e-5
    assert result.header["ceilings"] == {"bytes_per_second": 4e12, "flops_per_second": 8e14}


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


@pytest.mark.skipif(backend.triton_missing("cpu") is not None, reason=str(backend.triton_missing("cpu")))
def test_backends_and_compiled_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps themselves, on kernels under Triton's interpreter; then with a kernel that errs."""
    monkeypatch.setattr(steps, "DEVICE", "cpu")
    monkeypatch.setattr(steps, "CASES", CASES[:1])
    found = steps.backends(CASES[:1], (torch.float32,))
    assert found.ok
    assert any("serves bfloat16, float16, got float32" in reason for reason in found.details["not_served"])
    assert steps.compiled(torch.float32).ok

    pool = importlib.import_module("flashsloth_ops.triton.spatial_pool")
    right = pool.spatial_pool

    def wrong(*args: Any) -> Any:
        y, *rest = right(*args)
        return y * 1.01, *rest

    monkeypatch.setattr(pool, "spatial_pool", wrong)
    found = steps.backends(CASES[:1], (torch.float32,))
    assert found.ok is False
    assert "y: error" in found.details["wrong"]["spatial_pool/forward-b1, flashsloth/triton, float32"]


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
    timer = Timer(copies=4)
    calls = {"sleep": [lambda: torch.cuda._sleep(cycles)]}
    times, failures = timer.graphs(calls, rounds=5)
    assert not failures
    assert sorted(times["sleep"])[2] == pytest.approx(want, rel=0.15)
    assert sorted(timer.calls(calls, rounds=5)["sleep"])[2] == pytest.approx(want, rel=0.25)
