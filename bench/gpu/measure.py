"""Checks the GPU cases against fp64, then times them against their peers and goals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Inputs, Provider, callable_of, kept_bytes
from bench.check import Verdict, run_checks
from bench.gpu.cases import GpuCase, GpuGoal
from bench.gpu.timing import Ceilings, Timer
from bench.timing import quantiles


def moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    """The same inputs on a device, floating-point tensors in ``dtype``, through dicts and named tuples."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [moved(item, device, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def check_small(cases: Sequence[GpuCase], device: str, dtypes: Sequence[torch.dtype]) -> dict[str, Verdict]:
    """Our backends at the small size of every case, in every dtype, by the error rule: ``case, provider, dtype``."""
    found: dict[str, Verdict] = {}
    for one in cases:
        case = one.case
        for dtype in dtypes:
            inputs = moved(case.inputs(case.small), device, dtype)
            for name, verdict in run_checks(case, inputs).items():
                if case.provider(name).ours:
                    found[f"{case.name}, {name}, {str(dtype).removeprefix('torch.')}"] = verdict
    return found


def measure(
    one: GpuCase,
    timer: Timer | None,
    limits: Ceilings | None,
    rounds: int,
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    small: bool = False,
) -> list[dict[str, Any]]:
    """Rows of a case: the check of every provider, then the times of ours and of the peers that goals name.

    What failed its check has neither a time nor part in a goal. Without a timer nothing is timed.
    """
    case = one.case
    size = case.small if small else case.size
    inputs = moved(case.inputs(size), device, dtype)
    verdicts = run_checks(case, inputs)
    work = case.work(size)
    bytes_moved = work.bytes * dtype.itemsize / 4  # declared for fp32
    rows: dict[str, dict[str, Any]] = {
        name: {
            "case": case.name,
            "title": case.title,
            "size": dict(size),
            "dtype": str(dtype).removeprefix("torch."),
            "mode": case.mode,
            "provider": name,
            "ours": case.provider(name).ours,
            "flops": work.flops,
            "bytes": bytes_moved,
            "max_error": None if verdict.max_error != verdict.max_error else verdict.max_error,
            "error_allowed": verdict.allowed,
            "failure": verdict.failure,
            "seconds": None,
            "share": None,
            "kept_bytes": None,
            "goals": [],
        }
        for name, verdict in verdicts.items()
    }
    right = [provider for provider in case.providers if rows[provider.name]["failure"] is None]
    if case.mode == "memory":
        for provider in right:
            rows[provider.name]["kept_bytes"] = kept_bytes(case, provider, inputs)
    elif timer is not None and limits is not None:
        _time(case, one.gpu_goals, right, inputs, rows, timer, rounds)
        for row in rows.values():
            if row["seconds"] is not None:
                row["share"] = limits.limit(work.flops, bytes_moved) / row["seconds"]["p50"]
    _judge(one, rows)
    return list(rows.values())


def _time(
    case: Case,
    goals: Sequence[GpuGoal],
    right: Sequence[Provider],
    inputs: Inputs,
    rows: dict[str, dict[str, Any]],
    timer: Timer,
    rounds: int,
) -> None:
    named = {peer for goal in goals for peer in goal.peers}
    calls: dict[str, Callable[[], object]] = {
        provider.name: callable_of(case, provider, inputs)
        for provider in right
        if provider.ours or provider.name in named
    }
    times, failures = timer.interleave(calls, rounds)
    for name, sample in times.items():
        rows[name]["seconds"] = quantiles(sample)._asdict()
    for name, failure in failures.items():
        rows[name]["failure"] = failure


def _judge(one: GpuCase, rows: dict[str, dict[str, Any]]) -> None:
    """Compare the fastest of ours with every goal, and note the outcome on its row. Unmeasured goals say so."""
    best = _fastest([row for row in rows.values() if row["provider"].startswith("flashsloth")], one.case.mode)
    if best is None:
        return
    for goal in one.gpu_goals:
        value = _value(goal, best, rows, one.case)
        best["goals"].append(
            {
                "text": goal.text,
                "kind": goal.kind,
                "limit": goal.limit,
                "peers": list(goal.peers),
                "measured": value,
                "reached": None if value is None else goal.reached(value),
            }
        )


def _value(goal: GpuGoal, best: dict[str, Any], rows: dict[str, dict[str, Any]], case: Case) -> float | None:
    if goal.kind == "kept":
        plain = rows[case.plain]["kept_bytes"]
        return None if plain is None or best["kept_bytes"] is None else best["kept_bytes"] / plain
    if best["seconds"] is None:
        return None
    ours = best["seconds"]["p50"]
    if goal.kind == "seconds":
        return ours
    if goal.kind == "share":
        return best["share"]
    peer = _fastest([rows[name] for name in goal.peers if name in rows], case.mode)
    if peer is None or peer["seconds"] is None:
        return None
    return peer["seconds"]["p50"] / ours if goal.kind == "speedup" else ours / peer["seconds"]["p50"]


def _fastest(rows: Sequence[dict[str, Any]], mode: str) -> dict[str, Any] | None:
    right = [row for row in rows if row["failure"] is None]
    if mode == "memory":
        return right[0] if right else None
    timed = [row for row in right if row["seconds"] is not None]
    return min(timed, key=lambda row: row["seconds"]["p50"]) if timed else right[0] if right else None


def faster_in_cuda(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ops whose CUDA C++ kernels beat Triton's in every case where both were timed."""
    wins: dict[str, list[bool]] = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        times = {
            row["provider"]: row["seconds"]["p50"]
            for row in rows
            if row["case"] == case and row["provider"].startswith("flashsloth") and row["seconds"] is not None
        }
        if {"flashsloth, cuda", "flashsloth, triton"} <= set(times):
            wins.setdefault(case.split("/")[0], []).append(times["flashsloth, cuda"] < times["flashsloth, triton"])
    return [op for op, won in wins.items() if all(won)]
