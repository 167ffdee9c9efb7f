"""Runs one size of a case: check first, then time every way there is on the device, then compare with the goals."""

from __future__ import annotations

import fnmatch
import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from bench.case import DTYPES, OURS, Case, Goal, Inputs, Provider, Size, callable_of, moved
from bench.check import Verdict, run_checks
from bench.gpu.timing import Timer
from bench.memory import kept_bytes, peak_bytes
from bench.result import GoalResult, Row
from bench.timing import Ceilings, interleave, ratio

# Curves stop where one call takes so much work: a suite has to end, and the check in fp64 costs several times more.
FLOPS_AT_MOST = {"cpu": 4e10, "cuda": float("inf")}
ROTATED_BYTES = 4 << 30  # inputs are made several times where that takes no more than this
METHODS = {"cpu": ("wall",), "cuda": ("graph", "call")}


class Effort(NamedTuple):
    """Seconds to spend on timing one size of a case, and bounds on its rounds."""

    budget: float
    min_rounds: int
    max_rounds: int


class Place(NamedTuple):
    """Where a case runs: kind of device, dtype, what the device gives at best, and the timer of a GPU.

    Without ceilings there are no shares of a limit; without a timer nothing is timed on a GPU.
    """

    device: str
    dtype: torch.dtype
    limits: Ceilings | None = None
    timer: Timer | None = None


CPU = Place("cpu", DTYPES["cpu"])


def matching(cases: Sequence[Case], pattern: str | None) -> list[Case]:
    """Cases whose name contains the pattern, or matches it with ``*`` and ``?``. Raises ValueError for none."""
    if pattern is None:
        return list(cases)
    found = [c for c in cases if pattern in c.name or fnmatch.fnmatch(c.name, pattern)]
    if not found:
        raise ValueError(f"--case: expected a pattern that matches one of {', '.join(c.name for c in cases)}")
    return found


def run_point(
    case: Case,
    size: Size,
    place: Place = CPU,
    effort: Effort = Effort(1.0, 5, 60),  # noqa: B008 (immutable)
    *,
    step: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Rows of all timed providers of a case at one size. What failed its check has no times, and no ratio with it.

    ``step`` is told what happens, for a progress display.
    """
    work = case.work(size)
    if case.axis and work.flops > FLOPS_AT_MOST[place.device]:
        reason = f"{work.flops:.2g} flops, more than the suite asks of this device"
        verdicts = {provider.name: Verdict(None, None, missing=reason) for provider in case.providers}
        return _rows(case, size, place, verdicts)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # each point compiles for itself; what is left of others counts against a limit
    gc.collect()
    inputs = moved(case.inputs(size), place.device, place.dtype)
    step("checking")
    verdicts = run_checks(case, inputs, place.device, place.dtype, size)
    rows = _rows(case, size, place, verdicts)
    right = [p for p in case.providers if p.timed and (verdicts[p.name].failure or verdicts[p.name].missing) is None]
    if any(provider.ours for provider in right):
        step("timing")
        _time(case, size, place, effort, right, inputs, rows)
        step("measuring memory")
        _measure_memory(case, place, right, inputs, rows)
    _compare(case, size, place, right, rows)
    return rows


def _rows(case: Case, size: Size, place: Place, verdicts: Mapping[str, Verdict]) -> list[Row]:
    work = case.work(size)
    return [
        Row(
            case=case.name,
            op=case.op,
            size=dict(size),
            dtype=str(place.dtype).removeprefix("torch."),
            mode=case.mode,
            provider=provider.name,
            method=method,
            flops=work.flops,
            bytes=work.elements * place.dtype.itemsize,
            ours=provider.ours,
            variant=provider.variant,
            missing=verdicts[provider.name].missing,
            failure=verdicts[provider.name].failure,
            max_error=verdicts[provider.name].max_error,
            error_allowed=verdicts[provider.name].allowed,
        )
        for provider in case.providers
        if provider.timed
        for method in METHODS[place.device]
    ]


def _time(
    case: Case, size: Size, place: Place, effort: Effort, right: Iterable[Provider], inputs: Inputs, rows: list[Row]
) -> None:
    by_key = {(row.provider, row.method): row for row in rows}
    found: dict[str, dict[str, list[float]]] = {}
    if place.device == "cpu":
        calls = {provider.name: callable_of(case, provider, inputs) for provider in right}
        found["wall"] = interleave(
            calls, budget=effort.budget, min_rounds=effort.min_rounds, max_rounds=effort.max_rounds
        )
    elif place.timer is not None:
        sets = _rotated(case, size, place, inputs)
        rotated = {p.name: [callable_of(case, p, one) for one in sets] for p in right}
        found["graph"], failures = place.timer.graphs(rotated, effort.max_rounds, effort.budget / 2)
        found["call"] = place.timer.calls(rotated, effort.max_rounds, effort.budget / 2)
        for name, failure in failures.items():
            by_key[name, "graph"].missing = failure
    for method, times in found.items():
        for name, samples in times.items():
            row = by_key[name, method]
            row.set_times(samples)
            if place.limits is not None and row.p50:
                row.share = place.limits.limit(row.flops, row.bytes) / row.p50


def _rotated(case: Case, size: Size, place: Place, inputs: Inputs) -> list[Inputs]:
    """The inputs, and two more draws of them where memory allows: a cache must not know what comes."""
    if 3 * case.work(size).elements * place.dtype.itemsize > ROTATED_BYTES:
        return [inputs]
    sets = [inputs]
    for _ in range(2):
        sets.append({name: _drawn_again(value) for name, value in inputs.items()})
    return sets


def _drawn_again(value: object) -> object:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.randn_like(value) * value.float().std().to(value.dtype)
    return value


def _measure_memory(case: Case, place: Place, right: Iterable[Provider], inputs: Inputs, rows: list[Row]) -> None:
    for provider in right:
        call = callable_of(case, provider, inputs)
        peak = peak_bytes(call, place.device)
        kept = kept_bytes(case, provider, inputs) if case.mode == "forward+backward" else None
        for row in rows:
            if row.provider == provider.name:
                row.peak_bytes, row.kept_bytes = peak, kept


def _compare(case: Case, size: Size, place: Place, right: Sequence[Provider], rows: list[Row]) -> None:
    """Ratios of ours with every peer (and with our other variants), and what came of the goals."""
    for row in rows:
        if row.ours and row.samples:
            variant = {other.provider for other in rows if other.ours and other.variant == row.variant}
            others = [o for o in rows if o.method == row.method and o.samples and o.provider not in variant]
            row.ratios = {
                o.provider: ratio(o.samples[:n], row.samples[:n])._asdict()
                for o in others
                if (n := min(len(o.samples), len(row.samples)))
            }
    for goal in case.goals_on(place.device, size):
        best = best_of(rows, goal.variant, METHODS[place.device][0])
        if best is not None:
            value = _value(goal, best, rows, case, size)
            reached = None if value is None else goal.reached(value)
            best.goals.append(GoalResult(goal.kind, goal.limit, list(goal.peers), value, reached))


def best_of(rows: Sequence[Row], variant: str, method: str) -> Row | None:
    """The fastest of our kernels in this use of the op; where none was timed, one that was right."""
    ours = [
        row
        for row in rows
        if row.ours
        and row.variant == variant
        and row.method == method
        and row.passed
        and "/reference" not in row.provider
    ]
    timed = [row for row in ours if row.p50 is not None]
    return min(timed, key=lambda row: row.p50 or 0.0) if timed else next(iter(ours), None)


def _value(goal: Goal, best: Row, rows: Sequence[Row], case: Case, size: Size) -> float | None:
    if goal.kind == "kept":
        if best.kept_bytes is None or case.kept_unit is None:
            return None
        return best.kept_bytes / (case.kept_unit(size) * getattr(torch, best.dtype).itemsize)
    if goal.kind in ("seconds", "share"):
        return best.p50 if goal.kind == "seconds" else best.share
    named = [row.provider for row in rows if row.provider in goal.peers or (row.ours and row.variant in goal.peers)]
    found = [best.ratios[name]["p50"] for name in named if name in best.ratios]
    if not found:
        return None
    return min(found) if goal.kind == "speedup" else 1 / min(found)


def faster_in_cuda(rows: Sequence[Row]) -> list[str]:
    """Ops whose CUDA C++ kernels beat Triton's in every case where both were timed by graphs."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row.ours and row.method == "graph" and row.p50 is not None:
            times.setdefault((row.op, *row.point, row.variant), {})[row.provider.split(",")[0]] = row.p50
    wins: dict[str, list[bool]] = {}
    for (op, *_), found in times.items():
        if {f"{OURS}/cuda", f"{OURS}/triton"} <= set(found):
            wins.setdefault(op, []).append(found[f"{OURS}/cuda"] < found[f"{OURS}/triton"])
    return [op for op, won in wins.items() if all(won)]
