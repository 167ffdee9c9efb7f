"""Runs cases: check first, then time, then compare with the goals."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bench import case as declared
from bench.case import Case, Inputs, Size
from bench.check import Verdict, run_checks
from bench.result import GoalResult, Row
from bench.timing import interleave, quantiles, ratio
from flashsloth_ops import backend


class Effort(NamedTuple):
    """Seconds to spend on timing a case, and bounds on its rounds."""

    budget: float
    min_rounds: int
    max_rounds: int


def matching(cases: Sequence[Case], pattern: str | None) -> list[Case]:
    """Cases whose name contains the pattern, or matches it with ``*`` and ``?``. Raises ValueError for none."""
    if pattern is None:
        return list(cases)
    found = [c for c in cases if pattern in c.name or fnmatch.fnmatch(c.name, pattern)]
    if not found:
        raise ValueError(f"--case: expected a pattern that matches one of {', '.join(c.name for c in cases)}")
    return found


def run_case(
    case: Case, effort: Effort, *, size: Size | None = None, step: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Rows of all providers of a case. Where a check fails there are no times, and no ratio with that provider.

    ``step`` is told what happens, for a progress display.
    """
    size = case.size if size is None else size
    inputs = case.inputs(size)
    step("checking")
    verdicts = run_checks(case, inputs)
    work = case.work(size)
    rows = {
        name: Row(
            case=case.name,
            op=case.op,
            size=dict(size),
            dtype="float32",
            mode=case.mode,
            provider=name,
            flops=work.flops,
            bytes=work.bytes,
            check_passed=verdict.failure is None,
            max_error=verdict.max_error if math.isfinite(verdict.max_error) else None,
            error_allowed=verdict.allowed,
            failure=verdict.failure,
        )
        for name, verdict in verdicts.items()
    }
    step("measuring")
    if case.mode == "memory":
        _measure_memory(case, inputs, size, rows)
    else:
        _measure_time(case, inputs, verdicts, rows, effort)
    return list(rows.values())


def _measure_time(
    case: Case, inputs: Inputs, verdicts: dict[str, Verdict], rows: dict[str, Row], effort: Effort
) -> None:
    right = [provider for provider in case.providers if verdicts[provider.name].failure is None]
    if not any(provider.ours for provider in right):
        return
    calls = {provider.name: declared.callable_of(case, provider, inputs) for provider in right}
    times = interleave(calls, budget=effort.budget, min_rounds=effort.min_rounds, max_rounds=effort.max_rounds)
    for provider in right:
        row = rows[provider.name]
        row.set_times(quantiles(times[provider.name]), len(times[provider.name]))
        if provider.ours:
            with_goal = {goal.peer for goal in case.goals if goal.provider == provider.name}
            peers = [peer.name for peer in right if not peer.ours or peer.name in with_goal]
            row.ratios = {peer: ratio(times[peer], times[provider.name])._asdict() for peer in peers}
    for goal in case.goals:
        row = rows[goal.provider]
        found = row.ratios.get(goal.peer)
        if found is not None:
            measured = found["p50"] if goal.kind == "speedup" else 1 / found["p50"]
            row.goals.append(_judge(goal, measured))


def _measure_memory(case: Case, inputs: Inputs, size: Size, rows: dict[str, Row]) -> None:
    for provider in case.providers:
        if rows[provider.name].check_passed:
            rows[provider.name].kept_bytes = declared.kept_bytes(case, provider, inputs)
    for goal in case.goals:
        kept = rows[goal.provider].kept_bytes
        if kept is not None and case.kept_peer is not None:
            rows[goal.provider].goals.append(_judge(goal, kept / case.kept_peer(size)))


def _judge(goal: declared.Goal, measured: float) -> GoalResult:
    return GoalResult(goal.kind, goal.peer, goal.at_least, goal.at_most, measured, goal.reached(measured))


def backends(cases: Sequence[Case]) -> dict[str, str]:
    """The backend that serves each op of the cases, fp32 on this machine's processor."""
    probe = torch.empty(0)
    return {op: backend.select(op, probe) for op in dict.fromkeys(case.op for case in cases)}
