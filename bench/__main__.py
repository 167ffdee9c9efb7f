"""The benchmark suite of the fused ops: check, time, compare with their peers, guard against regressions, report."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import compare, regression, report, runner, suite
from bench.case import DTYPES, Case, why_missing
from bench.cases import CASES
from bench.gpu import check
from bench.report.e2e import compared_claims
from bench.result import RESULTS, load, make_header, version
from bench.table import of_models, render
from bench.timing import fixed_threads
from flashsloth_ops import backend


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> int:
    """Exit code 0: every check passed. 1: one failed. 2: the command line or the machine does not allow a run."""
    options = _parser().parse_args(arguments)
    console = console_of(sys.stdout)
    try:
        if options.command == "list":
            console.print(listing(cases, device_of(options)), highlight=False, markup=False, soft_wrap=True)
            return 0
        if options.command == "gpu-check":
            return check_gpu(options)
        if options.command == "compare":
            return compare.main(options, cases=cases, console=console, device=device_of(options))
        if options.command == "check":
            return check_regressions(options, console, cases)
        if options.command == "report":
            return reported(options, cases)
        return run(options, console, cases)
    except (ValueError, OSError, backend.BackendError) as error:
        Console(stderr=True, soft_wrap=True).print(f"python -m bench: {error}", style="red", markup=False)
        return 2


def run(options: argparse.Namespace, console: Console, cases: Sequence[Case]) -> int:
    """Check and time what was asked for; one table, one JSON file."""
    device = device_of(options)
    how = {"quick": options.quick, "small": options.small, "budget": options.budget, "providers": options.provider}
    models = suite.end_to_end(device, options.case, **how)
    if models is not None and options.case is not None:
        plan = suite.Plan(device, quick=options.quick, small=options.small)
    else:
        plan = suite.plan(runner.matching(cases, options.case), device, **how)
    with fixed_threads(options.threads), Bar() as bar:
        path, result = suite.unfinished(plan, options.out) if options.resume else (None, suite.begin(plan))
        path = path or result.path(options.out)
        tell = bar.telling(len(plan.points))
        more = () if models is None else models(result, lambda what: tell(what, len(plan.points)))
        suite.go(plan, result, path, more=more, tell=tell)
    console.print(render(result, cases))
    if models is not None:
        console.print(of_models(result.rows))
    console.print(f"stored in {path}", soft_wrap=True, markup=False, highlight=False)
    return 1 if result.failed else 0


def check_regressions(options: argparse.Namespace, console: Console, cases: Sequence[Case]) -> int:
    """Measure again and compare with the stored result of this device."""
    device = device_of(options)
    with fixed_threads(options.threads):
        slug = make_header(device)["slug"]
        with Bar() as bar:
            measure = regression.measurer(
                cases,
                device,
                quick=options.quick,
                budget=options.budget,
                tell=lambda what, n: bar.telling(None)(what, n),
            )
            names = [case.name for case in cases if device in case.devices]
            return regression.main(
                options, slug=slug, names=names, measure=measure, console=console, folder=options.results
            )


def check_gpu(options: argparse.Namespace) -> int:
    """Everything that only a GPU can prove, in one command. Exit code 0: every step that could run passed."""
    if not torch.cuda.is_available():
        raise ValueError("gpu-check: torch sees no GPU here")
    document, path = check.run(options.out, budget=options.budget, keep=options.keep, tell=_say)
    console_of(sys.stdout).print(render(load(path), CASES))
    if document["faster_in_cuda"]:
        _say(f"faster in CUDA C++ than in Triton: {', '.join(document['faster_in_cuda'])}")
    _say(f"stored in {path}")
    return 1 if any(step["ok"] is False for step in document["steps"]) else 0


def reported(options: argparse.Namespace, cases: Sequence[Case]) -> int:
    """Markdown, a page, the table of the README: from what is stored. The paper's claims need the models counted."""
    if version("transformers") is None:
        return report.main(options, cases)
    from bench.e2e import claims, counted

    counts = counted.count()
    return report.main(options, cases, lambda rows: compared_claims(claims.table(claims.findings(rows, counts))))


class Bar(Progress):
    """A progress bar on stderr, gone at the end."""

    def __init__(self) -> None:
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        super().__init__(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
        self.task = self.add_task("", total=None)

    def telling(self, total: int | None) -> Callable[[str, int], None]:
        """What is to be told the title of a step and how many are done, of ``total``."""
        self.update(self.task, total=total)
        return lambda what, done: self.update(self.task, description=what, completed=done)


def _say(line: str) -> None:
    print(line, flush=True)


def console_of(stream: TextIO) -> Console:
    """A console that breaks no line of a table where nobody looks at a terminal."""
    return Console(file=stream) if stream.isatty() else Console(file=stream, width=160)


def device_of(options: argparse.Namespace) -> str:
    """The device asked for, else a GPU where there is one. Raises ValueError for a GPU that is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def listing(cases: Sequence[Case], device: str) -> str:
    """Cases, sizes, providers, and which can run on a device, with the reason when not."""
    blocks = []
    for case in cases:
        first, *others = case.sizes
        size = " ".join(f"{name}={value}" for name, value in first.items())
        if others:
            size += f"; {case.axis} to {max(one[case.axis] for one in others)}, {len(case.sizes)} sizes"
        lines = [f"{case.name}  ({case.mode}, {' and '.join(case.devices)})", f"    {case.title}", f"    size  {size}"]
        if device not in case.devices:
            lines.append(f"    not measured on {device}")
        else:
            for provider in (p for p in case.providers if p.timed):
                reason = why_missing(case, provider, device, DTYPES[device], first)
                lines.append(
                    f"    {'runs ' if reason is None else 'not  '} {provider.name}{(reason and f': {reason}') or ''}"
                )
        blocks.append("\n".join(lines))
    return "\n".join([*blocks, *models_listing(device)])


def models_listing(device: str) -> list[str]:
    """Whole models: which, at which images and batches; small ones on a CPU."""
    if version("transformers") is None:
        return ["e2e  (whole models)\n    not   any model: transformers is not installed"]
    from bench.e2e.points import points

    found = points(device, quick=False, small=False)
    images = dict.fromkeys(f"{point.width}x{point.height}" for point in found)
    batches = dict.fromkeys(str(point.batch) for point in found)
    lines = ["e2e  (whole models, cpu and cuda; in a full run, or with --case e2e)"]
    lines.append(f"    size  images {', '.join(images)}; batches {', '.join(batches)}")
    if device == "cpu":
        lines.append("    small models and images: a test of the suite, whose times say nothing of full size")
    lines += dict.fromkeys(f"    runs  {point.model.name}" for point in found)
    return ["\n".join(lines)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    list_parser = commands.add_parser("list", help="cases, sizes, providers, and what can run here")
    run_parser = commands.add_parser("run", help="check, then time; one table, one JSON file")
    run_parser.add_argument(
        "--provider",
        action="append",
        default=[],
        metavar="NAME",
        help="ours and peers whose name contains this; repeatable",
    )
    run_parser.add_argument("--small", action="store_true", help="small sizes: tests the suite, says nothing of speed")
    run_parser.add_argument("--resume", action="store_true", help="go on with the newest unfinished run like this one")
    run_parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    compare_parser = commands.add_parser("compare", help="two results or revisions: how long B takes over A")
    compare.add_arguments(compare_parser)
    compare_parser.add_argument("--small", action="store_true", help="small sizes: tests the suite")
    check_parser = commands.add_parser("check", help="against the stored result of this device: exit code 1 if slower")
    regression.add_arguments(check_parser)
    check_parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    for one in (run_parser, check_parser):
        one.add_argument("--quick", action="store_true", help="only sizes and peers with a goal, fewer rounds")
    for one in (run_parser, compare_parser, check_parser):
        one.add_argument("--case", metavar="PATTERN", help="only cases whose name contains or matches this")
        one.add_argument("--budget", type=duration, metavar="TIME", help="time to measure in all, such as 90s or 8m")
        one.add_argument("--threads", type=positive, help="threads inside an op on a CPU; default: as torch is set")
    for one in (list_parser, run_parser, compare_parser, check_parser):
        one.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    report.add_arguments(
        commands.add_parser("report", help="what is stored, as Markdown, one page, the README's table")
    )
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
