"""The steps of the check. Each runs in a process of its own, because an error on a GPU spoils the process it is in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import suite
from bench.case import Case, Provider, callable_of, moved, why_missing
from bench.cases import CASES
from bench.check import run_checks
from bench.result import ROOT, Row
from bench.runner import Place, faster_in_cuda, run_point

DEVICE = "cuda"  # tests of the steps themselves use a CPU
BACKENDS = ("triton", "cuda")


class Outcome(NamedTuple):
    """What a step found. ``ok`` None: it could not run here, and ``summary`` says why."""

    ok: bool | None
    summary: str
    details: dict[str, Any]


def build() -> Outcome:
    """The extension, with CUDA where nvcc is present."""
    wanted = "1" if shutil.which("nvcc") else "auto"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = _run(command, FLASHSLOTH_BUILD_CUDA=wanted)
    if run.returncode:
        return Outcome(False, _last_line(run.stderr or run.stdout), {"output": _tail(run.stdout + run.stderr)})
    code = "from flashsloth_ops import _extension as e; print(e.error or e.module.build_info())"
    info = _run([sys.executable, "-c", code]).stdout.strip()
    return Outcome("'cuda'" in info and wanted == "1", info, {})


def backends(
    cases: Sequence[Case] = CASES,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
) -> Outcome:
    """Every GPU backend against fp64 at small sizes, forward and backward, in every dtype."""
    wrong: dict[str, str] = {}
    absent: set[str] = set()
    count = 0
    for case in cases:
        own = case.only(lambda p: p.backend in BACKENDS)
        for dtype in dtypes:
            inputs = moved(case.inputs(case.small), DEVICE, dtype)
            for name, found in run_checks(own, inputs, "cuda", dtype, case.small).items():
                if found.missing is not None:
                    absent.add(found.missing)
                elif case.provider(name).ours:
                    count += 1
                    if found.failure is not None:
                        wrong[f"{case.name}, {name}, {str(dtype).removeprefix('torch.')}"] = found.failure
    summary = f"{count - len(wrong)} of {count} results within the error rule, {len(absent)} reasons not to run"
    return Outcome(not wrong and count > 0, summary, {"wrong": wrong, "not_served": sorted(absent)})


def graphs() -> Outcome:
    """Each op captured in a CUDA graph, replayed with new data, against an eager call on the same data."""
    results: dict[str, str] = {}
    for case, provider, first, second in _pairs():
        try:
            results[f"{case.name}, {provider.name}"] = _replay(case, provider, first, second)
        except RuntimeError as error:
            torch.cuda.synchronize()
            results[f"{case.name}, {provider.name}"] = _last_line(str(error))
    return _all_equal(results, "captured and replayed with new data")


def compiled(dtype: torch.dtype = torch.bfloat16) -> Outcome:
    """Each op inside torch.compile(fullgraph=True), against an eager call."""
    results: dict[str, str] = {}
    for case, provider, given, _ in _pairs(dtype):
        run = torch.compile(provider.run, fullgraph=True, dynamic=False)
        try:
            results[f"{case.name}, {provider.name}"] = _same(run(given), provider.run(given))
        except RuntimeError as error:
            results[f"{case.name}, {provider.name}"] = _last_line(str(error))
    return _all_equal(results, "compiled as one graph")


def small() -> Outcome:
    """Each op once, forward and backward: what the memory checkers watch."""
    count = 0
    for case in CASES:
        given = moved(case.inputs(case.small), DEVICE, torch.bfloat16)
        for provider in _served(case, torch.bfloat16):
            callable_of(case, provider, given)()
            count += 1
    torch.cuda.synchronize()
    return Outcome(count > 0, f"{count} calls", {})


def sanitizer(tool: str) -> Outcome:
    """compute-sanitizer over :func:`small`; racecheck looks at shared memory."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return Outcome(None, "compute-sanitizer is not on PATH", {})
    run = _run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu.steps", "small", "-"]
    )
    text = run.stdout + run.stderr
    if "Device not supported" in text or "LibraryNotLoaded" in text:
        return Outcome(None, "compute-sanitizer cannot attach to this device", {"output": _tail(text)})
    found = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    return Outcome(run.returncode == 0, "; ".join(found) or _last_line(text), {"output": _tail(text)})


def tests() -> Outcome:
    """The test-suite on the device, in all dtypes."""
    report = Path(os.environ.get("TMPDIR", "/tmp")) / f"flashsloth-gpu-{os.getpid()}.xml"
    command = [sys.executable, "-m", "pytest", "tests/ops", "tests/bench", "-m", "gpu", "-q", f"--junitxml={report}"]
    run = _run([*command, *_workers()])
    if not report.exists():
        return Outcome(False, _last_line(run.stdout + run.stderr), {"output": _tail(run.stdout + run.stderr)})
    suite = next(xml.parse(report).getroot().iter("testsuite"))
    report.unlink()
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}: {(case.find(kind).get('message') or '')[:300]}"  # type: ignore[union-attr]
        for case in suite.iter("testcase")
        for kind in ("failure", "error")
        if case.find(kind) is not None
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    summary = f"{passed} passed, {len(failed)} failed, {counts['skipped']} skipped"
    return Outcome(not failed and passed > 0 and run.returncode == 0, summary, {"failed": failed})


def timing() -> Outcome:
    """Ceilings of the device, then every size with a goal. Its details are the rows of the report."""
    from bench.gpu.timing import Timer, ceilings

    plan = suite.plan(CASES, "cuda", quick=True, budget=60.0)
    place = Place("cuda", torch.bfloat16, ceilings(), Timer())
    rows: list[Row] = []
    died: list[str] = []
    for case, size in plan.points:
        start = time.perf_counter()
        try:
            rows += run_point(case, size, place, plan.effort)
        except (RuntimeError, ValueError) as error:
            died.append(f"{case.name}: {_last_line(str(error))}")
        print(f"{case.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    goals = [goal for row in rows for goal in row.goals]
    wrong = [f"{row.case}, {row.provider}: {row.failure}" for row in rows if row.ours and row.failure] + died
    details = {
        "ceilings": place.limits._asdict() if place.limits else None,
        "rows": [asdict(row) for row in rows],
        "faster_in_cuda": faster_in_cuda(rows),
        "wrong": wrong,
    }
    reached = sum(bool(goal.reached) for goal in goals)
    summary = f"{reached} of {len(goals)} goals reached, {len(wrong)} of ours failed"
    return Outcome(not wrong and bool(rows), summary, details)


STEPS: dict[str, Callable[[], Outcome]] = {
    "build": build,
    "backends": backends,
    "graphs": graphs,
    "compile": compiled,
    "timing": timing,
    "tests": tests,
    "memcheck": lambda: sanitizer("memcheck"),
    "racecheck": lambda: sanitizer("racecheck"),
    "small": small,
}


# ---- helpers ----


def _served(case: Case, dtype: torch.dtype) -> list[Provider]:
    """Our kernels that serve a case on this device, from plain inputs."""
    ours = [p for p in case.providers if p.backend in BACKENDS and p.prepare is None]
    return [p for p in ours if why_missing(case, p, "cuda", dtype, case.small) is None]


def _pairs(dtype: torch.dtype = torch.bfloat16) -> list[tuple[Case, Provider, Any, Any]]:
    """Our providers of one forward case an op, with two draws of small inputs."""
    chosen = {case.op: case for case in reversed(CASES) if case.mode == "forward"}
    pairs = []
    for case in chosen.values():
        first, second = (moved(case.inputs(case.small), DEVICE, dtype) for _ in range(2))
        for name, value in second.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                second[name] = torch.randn_like(value) * value.abs().mean()
        pairs += [(case, provider, first, second) for provider in _served(case, dtype)]
    return pairs


def _replay(case: Any, provider: Any, first: dict[str, Any], second: dict[str, Any]) -> str:
    held = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in first.items()}
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            provider.run(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = provider.run(held)
        for name, value in second.items():
            if isinstance(value, torch.Tensor):
                held[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        return _same(outputs, provider.run(second))


def _same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> str:
    """Empty where the two are equal to rounding; what differs otherwise."""
    for name, value in want.items():
        error = (got[name].double() - value.double()).abs().max().item()
        if not error <= 2e-2 * value.double().abs().max().item():
            return f"{name}: differs by {error:.3g}"
    return ""


def _all_equal(results: dict[str, str], done: str) -> Outcome:
    wrong = {name: what for name, what in results.items() if what}
    return Outcome(
        not wrong and bool(results), f"{len(results) - len(wrong)} of {len(results)} {done}", {"wrong": wrong}
    )


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False
    )


def _workers() -> list[str]:
    """Several processes share the GPU well where pytest-xdist is there: most of a test is Python."""
    from importlib.util import find_spec

    return ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"] if find_spec("xdist") else []


def _tail(text: str) -> str:
    return text[-4000:]


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:400] if lines else "no message"


def main(arguments: list[str]) -> int:
    """``python -m bench.gpu.steps NAME FILE``: run one step and write its outcome as JSON (``-``: nowhere)."""
    name, file = arguments
    outcome = STEPS[name]()
    if file != "-":
        Path(file).write_text(json.dumps(outcome._asdict()))
    return 0 if outcome.ok in (True, None) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
