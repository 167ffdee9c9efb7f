"""Runs the steps one after the other, in time, whatever happens to any of them, and writes one report.

    {"schema": "flashsloth-gpu-check", "version": 1, "header": {...}, "steps": [...], "ceilings": {...},
     "faster_in_cuda": [...], "rows": [...]}

A step: ``name``, ``ok`` (null: could not run here), ``summary``, ``seconds``, ``details``. A row: one provider in one
case, as :func:`bench.gpu.measure.measure` returns it. Times are in seconds.
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
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.result import ROOT, revision, slug, write_whole
from flashsloth_ops import measured

SCHEMA, VERSION = "flashsloth-gpu-check", 1

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
    header = make_header()
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "version": VERSION,
        "header": header,
        "steps": [],
        "ceilings": None,
        "faster_in_cuda": [],
        "rows": [],
    }
    moment = header["date"].replace(":", "").removesuffix("Z")
    path = out / header["slug"] / f"{moment}-{header['commit'][:12]}-gpu-check.json"
    end = time.monotonic() + budget
    for name, most in plan.items():
        step = run_step(name, [*command, name], min(most, end - time.monotonic()))
        document["steps"].append(step)
        if name == "timing":
            for key in ("ceilings", "rows", "faster_in_cuda"):
                document[key] = step["details"].pop(key, document[key])
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


def make_header() -> dict[str, Any]:
    """The device and the code the numbers belong to."""
    commit, dirty = revision()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    query = _nvidia_smi(
        "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,clocks_throttle_reasons.active"
    )
    return {
        "device": name,
        "slug": slug(name),
        "capability": list(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None,
        "driver": query.get("driver_version"),
        "state": query,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "python": sys.version.split()[0],
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi(fields: str) -> dict[str, str]:
    """What the driver tells of the first GPU before the run; nothing where the tool is absent."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in found.split(",")), strict=False))
