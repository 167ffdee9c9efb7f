"""A run of the suite: which sizes of which cases, how long each, stored after each one, and taken up again."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import runner, timing
from bench.case import DTYPES, Case, Size
from bench.cases.attention import PACKAGES
from bench.gpu import timing as gpu_timing
from bench.result import Result, Row, gpu_state, make_header, save, stored, version
from bench.runner import Effort, Place
from flashsloth_ops import backend


class Plan(NamedTuple):
    """What a run consists of.

    ``points``: sizes of cases, in order. ``effort``: how long to time each. ``quick``, ``small``: for the header.
    """

    device: str
    points: tuple[tuple[Case, Size], ...] = ()
    effort: Effort = Effort(1.0, 3, 60)
    quick: bool = False
    small: bool = False


# Seconds of timing in all. Checks come on top: on two cores about as much again.
BUDGETS = {("cpu", True): 60.0, ("cpu", False): 480.0, ("cuda", True): 60.0, ("cuda", False): 480.0}


def plan(
    cases: Sequence[Case],
    device: str,
    *,
    quick: bool = False,
    small: bool = False,
    budget: float | None = None,
    providers: Sequence[str] = (),
) -> Plan:
    """The points of these cases on a device.

    ``quick``: sizes with a goal, ours and the peers that goals name. ``small``: the sizes of the tests, which say
    nothing of speed. ``providers``: only those whose name contains one of these, besides ours.

    Raises:
        ValueError: no case is measured on this device, or no provider has such a name.
    """
    chosen = [case for case in cases if device in case.devices]
    if not chosen:
        raise ValueError(
            f"--case: expected a case that is measured on {device}, got {', '.join(c.name for c in cases)}"
        )
    if providers:
        names = {p.name for case in chosen for p in case.providers if p.timed}
        for wanted in providers:
            if not any(wanted in name for name in names):
                raise ValueError(f"--provider: expected part of one of {', '.join(sorted(names))}, got {wanted!r}")
        chosen = [c.only(lambda p: p.ours or any(wanted in p.name for wanted in providers)) for c in chosen]
    if quick:
        chosen = [case.for_goals(device) for case in chosen]
    points = [
        (case, size)
        for case in chosen
        for size, measured in (((case.small, case.sizes),) if small else ((size, (size,)) for size in case.sizes))
        if not quick or any(case.goals_on(device, one) for one in measured)
    ]
    if not points:
        raise ValueError(f"--quick: expected a case with a goal on {device}, got {', '.join(c.name for c in chosen)}")
    each = (budget or BUDGETS[device, quick or small]) / len(points)
    rounds = (3, 40) if quick or small else (7, 60)
    return Plan(device, tuple(points), Effort(each, *rounds), quick, small)


def end_to_end(
    device: str, pattern: str | None, *, quick: bool, small: bool, budget: float | None, providers: Sequence[str] = ()
) -> Callable[[Result, Callable[[str], None]], Iterator[list[Row]]] | None:
    """What measures of whole models (:mod:`bench.e2e`) what a result lacks; None where they are not wanted.

    Without a pattern they are part of a full run only. Raises ValueError where they are asked for and cannot run.
    """
    asked = pattern is not None and (pattern in "e2e" or pattern.startswith("e2e"))
    if not asked and (quick or pattern is not None):
        return None
    if version("transformers") is None:
        if asked:
            raise ValueError("--case e2e: expected transformers to be installed: pip install transformers")
        return None
    from bench.e2e.run import run

    def chosen(case: str, provider: str) -> bool:
        named = pattern is None or pattern in case or fnmatch.fnmatch(case, pattern)
        return named and (not providers or any(wanted in provider for wanted in providers))

    seconds = budget or (20.0 if device == "cpu" or quick else 900.0)

    def measure(result: Result, step: Callable[[str], None]) -> Iterator[list[Row]]:
        limits = result.header["ceilings"]
        return run(
            device,
            quick=quick,
            small=small,
            budget=seconds,
            done={row.key for row in result.rows},
            step=step,
            chosen=chosen,
            limits=timing.Ceilings(**limits) if limits else None,
        )

    return measure


def begin(plan: Plan) -> Result:
    """An empty result: the machine, the code, what serves what, and the ceilings, measured now."""
    place = torch.empty(0, device=plan.device, dtype=DTYPES[plan.device])
    served = {op: backend.select(op, place) for op in dict.fromkeys(op for case, _ in plan.points for op in case.ops)}
    limits = None if plan.small else _ceilings(plan.device)
    return Result(
        make_header(
            plan.device,
            quick=plan.quick,
            small=plan.small,
            backends=served,
            peers={package: version(package) or "not installed" for package in (*PACKAGES, "transformers")},
            ceilings=None if limits is None else limits._asdict(),
        )
    )


def _ceilings(device: str) -> timing.Ceilings:
    return timing.ceilings() if device == "cpu" else gpu_timing.ceilings(DTYPES[device])


def unfinished(plan: Plan, out: Path) -> tuple[Path, Result]:
    """The newest result of this device, code and kind of run that did not come to its end.

    Raises:
        ValueError: there is none; says what the newest unfinished one differs in.
    """
    now = make_header(plan.device, quick=plan.quick, small=plan.small)
    found = [(path, result) for path, result in stored(out, now["slug"]) if not result.complete]
    if not found:
        raise ValueError(f"--resume: expected an unfinished result in {out / now['slug']}, got none")
    same = ("commit", "difference", "threads", "torch", "quick", "small")
    for path, result in reversed(found):
        if all(result.header[name] == now[name] for name in same):
            return path, result
    path, result = found[-1]
    other = [name for name in same if result.header[name] != now[name]]
    raise ValueError(f"--resume: {path} differs in {', '.join(other)}: expected the same code and options")


def go(
    plan: Plan, result: Result, path: Path, *, more: Iterable[list[Row]] = (), tell: Callable[[str, int], None]
) -> None:
    """Measure what the result lacks, and store it after every point, so that an interrupted run keeps what it has.

    ``more``: rows from elsewhere, a list at a time, after those of the plan. ``tell``: title and what is done, for a
    progress display.

    Raises:
        ResultError: ``path`` holds another result.
        OSError: it cannot be written.
    """
    limits = result.header["ceilings"]
    place = Place(
        plan.device,
        DTYPES[plan.device],
        timing.Ceilings(**limits) if limits else None,
        gpu_timing.Timer() if plan.device == "cuda" else None,
    )
    done = {row.point for row in result.rows}
    save(result, path)
    for number, (case, size) in enumerate(plan.points):
        title = case.title if not case.axis else f"{case.title}, {case.axis} {size[case.axis]}"
        tell(title, number)
        if _point(case, size, place) not in done:

            def step(what: str, title: str = title, number: int = number) -> None:
                tell(f"{title}: {what}", number)

            result.rows += runner.run_point(case, size, place, plan.effort, step=step)
            save(result, path)
    for rows in more:
        result.rows += rows
        save(result, path)
    if plan.device == "cuda":
        result.header["clocks_after"] = gpu_state()
    result.complete = True
    save(result, path)


def _point(case: Case, size: Mapping[str, int], place: Place) -> tuple[str, ...]:
    dtype = str(place.dtype).removeprefix("torch.")
    return Row(case.name, case.op, dict(size), dtype, case.mode, "", "", 0.0, 0.0).point
