"""Runs the steps one after the other, in time, whatever happens to any of them, and writes one report.

    {"schema": "flashsloth-gpu-check", "version": 2, "complete": true, "header": {...}, "steps": [...],
     "faster_in_cuda": [...], "rows": [...]}

A step: ``name``, ``ok`` (null: could not run here), ``summary``, ``seconds``, ``details``. Header and rows are those of
:mod:`bench.result`, which reads the report as a result of a quick run; ``complete`` says whether all was timed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.result import GPU_CHECK, ROOT, VERSION, Result, gpu_state, make_header, write_whole
from flashsloth_ops import measured

# Name and most seconds of each step, in order: what everything needs first, then what is worth most.
PLAN: Mapping[str, float] = {
    "build": 150,
    "backends": 90,
    "timing": 220,
    "graphs": 40,
    "compile": 60,
    "memcheck": 60,
    "racecheck": 60,
    "tests": 240,
}


def run(
    out: Path,
    *,
    budget: float,
    keep: bool = False,
    plan: Mapping[str, float] = PLAN,
    tell: Callable[[str], None] = print,
    command: Sequence[str] = (sys.executable, "-m", "bench.gpu.steps"),
) -> tuple[dict[str, Any], Path]:
    """Every step within ``budget`` seconds in all; the report so far is stored after each one.

    ``keep``: write which CUDA C++ kernels were faster into the package's ``configs/<gpu>.json``.
    """
    header = make_header("cuda" if torch.cuda.is_available() else "cpu", quick=True)
    document: dict[str, Any] = {
        "schema": GPU_CHECK,
        "version": VERSION,
        "complete": False,
        "header": header,
        "steps": [],
        "faster_in_cuda": [],
        "rows": [],
    }
    path = Result(header).path(out)
    path = path.with_name(f"{path.stem}-gpu-check.json")
    end = time.monotonic() + budget
    for name, most in plan.items():
        step = run_step(name, [*command, name], min(most, end - time.monotonic()))
        document["steps"].append(step)
        if name == "timing":
            for key in ("rows", "faster_in_cuda"):
                document[key] = step["details"].pop(key, document[key])
            header["ceilings"] = step["details"].pop("ceilings", None) or {}
            header["clocks_after"] = gpu_state()
            document["complete"] = bool(document["rows"])
        write_whole(path, document)
        tell(f"{MARKS[step['ok']]:8} {name:10} {step['seconds']:5.0f} s  {step['summary']}")
    if keep and document["rows"]:
        measured.ship(header["device"], document["faster_in_cuda"])
    return document, path


MARKS = {True: "passed", False: "FAILED", None: "skipped"}


def run_step(name: str, command: Sequence[str], limit: float) -> dict[str, Any]:
    """One step in its own process group, stopped at its limit. What it wrote, or why there is nothing."""
    if limit < 5:
        return _step(name, None, "no time was left", 0.0)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcome.json"
        process = subprocess.Popen(
            [*command, str(file)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return _step(name, False, f"stopped after {limit:.0f} s", time.monotonic() - start, output=output[-4000:])
        took = time.monotonic() - start
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            lines = output.strip().splitlines() or ["no output"]
            return _step(name, False, f"ended with {process.returncode}: {lines[-1]}", took, output=output[-4000:])
    return {"name": name, "ok": found["ok"], "summary": found["summary"], "seconds": took, "details": found["details"]}


def _step(name: str, ok: bool | None, summary: str, seconds: float, **details: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "summary": summary, "seconds": seconds, "details": details}
