"""``python -m bench run``, ``list`` and ``gpu-check``: check, time and compare the fused ops with their peers."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import runner
from bench.case import Case
from bench.cases import CASES
from bench.gpu import check, report
from bench.result import RESULTS, Result, make_header, save
from bench.runner import Effort
from bench.table import render
from bench.timing import fixed_threads
from flashsloth_ops import backend

DEFAULT_BUDGET, QUICK_BUDGET = 120.0, 10.0


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> int:
    """Exit code 0: every check passed. 1: one failed. 2: the command line or the machine does not allow a run."""
    options = _parser().parse_args(arguments)
    console = console_of(sys.stdout)
    try:
        if options.command == "list":
            console.print(listing(cases), highlight=False, markup=False)
            return 0
        if options.command == "gpu-check":
            return check_gpu(options)
        return run(options, console, cases)
    except (ValueError, OSError, backend.BackendError) as error:
        Console(stderr=True, soft_wrap=True).print(f"python -m bench: {error}", style="red", markup=False)
        return 2


def run(options: argparse.Namespace, console: Console, cases: Sequence[Case]) -> int:
    chosen = runner.matching(cases, options.case)
    if options.small:
        chosen = [replace(case, title=f"{case.name}, small", size=case.small, goals=()) for case in chosen]
    if options.quick:
        chosen = [case.with_goals_only() for case in chosen]
    total = options.budget or (QUICK_BUDGET if options.quick else DEFAULT_BUDGET)
    timed = max(1, sum(case.mode != "memory" for case in chosen))
    effort = Effort(total / timed, 3, 60) if options.quick else Effort(total / timed, 7, 60)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with fixed_threads(options.threads):
        result = Result(make_header(quick=options.quick, small=options.small, backends=runner.backends(chosen)))
        path = result.path(options.out)
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("", total=len(chosen))
            for case in chosen:

                def step(what: str, case: Case = case) -> None:
                    progress.update(bar, description=f"{case.title}: {what}")

                result.rows += runner.run_case(case, effort, step=step)
                save(result, path)  # an interrupted run keeps what was measured
                progress.advance(bar)
    console.print(render(result, chosen))
    console.print(f"stored in {path}", soft_wrap=True, markup=False, highlight=False)
    return 1 if result.failed else 0


def check_gpu(options: argparse.Namespace) -> int:
    """Everything that only a GPU can prove, in one command. Exit code 0: every step that could run passed."""
    if not torch.cuda.is_available():
        raise ValueError("gpu-check: torch sees no GPU here")
    document, path = check.run(options.out, budget=options.budget, keep=options.keep, tell=_say)
    _say(report.render(document))
    _say(f"stored in {path}")
    return 1 if any(step["ok"] is False for step in document["steps"]) else 0


def _say(line: str) -> None:
    print(line, flush=True)


def console_of(stream: TextIO) -> Console:
    """A console that breaks no line of a table where nobody looks at a terminal."""
    return Console(file=stream) if stream.isatty() else Console(file=stream, width=140)


def listing(cases: Sequence[Case]) -> str:
    """Cases, sizes, providers, and which backend would run them here, with the reason where it is not the best."""
    blocks = []
    for case in cases:
        size = " ".join(f"{name}={value}" for name, value in case.size.items())
        blocks.append(
            f"{case.name}  ({case.mode})\n"
            f"    size       {size}\n"
            f"    providers  {'; '.join(provider.name for provider in case.providers)}\n"
            f"    served by  {served_by(case.op)}"
        )
    return "\n".join(blocks)


def served_by(op: str) -> str:
    """The backend for fp32 on the processor, and why those before it in the table are passed over."""
    reasons: list[str] = []
    for rule in backend.RULES:
        if rule.op == op:
            reason = rule.why_not("cpu", torch.float32)
            if reason is None:
                return "; ".join([rule.backend, *reasons])
            reasons.append(f"not {rule.backend}: {reason}")
    return "; ".join(["nothing", *reasons])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="cases, sizes, providers, and what can run here")
    run_parser = commands.add_parser("run", help="check, then time; one table, one JSON file")
    run_parser.add_argument("--case", metavar="PATTERN", help="only cases whose name contains or matches this")
    run_parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, only peers with a goal: rougher, under a minute"
    )
    run_parser.add_argument("--small", action="store_true", help="small sizes: tests the suite, says nothing of speed")
    run_parser.add_argument("--budget", type=duration, metavar="TIME", help="time to measure in all, such as 90s or 3m")
    run_parser.add_argument("--threads", type=positive, help="threads inside an op; default: as torch is set")
    run_parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    gpu_parser = commands.add_parser("gpu-check", help="on a GPU: build, test, compare, check memory, time; one JSON")
    gpu_parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    gpu_parser.add_argument("--budget", type=duration, default=460.0, metavar="TIME", help="default: 460s in all")
    gpu_parser.add_argument("--keep", action="store_true", help="let this GPU use the kernels that were faster")
    return parser


def duration(text: str) -> float:
    """Seconds of ``90``, ``90s`` or ``1.5m``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m)?", text.strip())
    seconds = float(found.group(1)) * (60 if found.group(2) == "m" else 1) if found else 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s or 3m, got {text!r}")
    return seconds


def positive(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1024, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
