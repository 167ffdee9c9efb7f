"""``python -m bench compare A B``: how long ours takes at B over how long it takes at A.

A and B are results (files), git revisions, or ``.``, the working tree as it is. Two results are compared as they are
stored. With a revision on at least one side both sides are built and timed in turns, now, on this machine; a result on
the other side then stands for its commit and its cases. So drift of the machine cancels, and a difference is found
that two runs apart do not show.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from bench.case import DTYPES, OUR_BACKENDS, Case
from bench.interleaved import LAUNCHES, Point, Worker, WorkerError, interleaved
from bench.result import ROOT, Result, Row, load
from bench.revisions import HERE, Revision, checked_out, of_result, resolve, workplace
from bench.runner import FLOPS_AT_MOST, METHODS
from bench.slowdown import Key, Line, View, label, matches, same_device, short_sizes, slowdown, span
from bench.statistics import Estimate

DEFAULT_BUDGET = 120.0  # seconds of rounds in all, when revisions are timed


class Side(NamedTuple):
    """What A or B was asked to be: a result, or a revision; of a result both, where its commit is built again."""

    text: str
    result: Result | None
    revision: Revision | None


def side(text: str, root: Path = ROOT) -> Side:
    """A file of results where there is one of that name, else a revision.

    Raises:
        ValueError: neither, or a file that is no result.
        OSError: the file cannot be read.
    """
    path = Path(text)
    if text != HERE and (path.suffix == ".json" or path.is_file()):
        return Side(text, load(path), None)
    return Side(text, None, resolve(text, root))


def results(a: Result, b: Result) -> list[Line]:
    """B over A for everything that both hold, and what only one holds.

    Raises:
        ValueError: they are of different devices, or one is of small sizes.
    """
    first, second = View(a), View(b)
    same_device(first, second)
    lines = []
    for key in dict.fromkeys([*_shown(first), *_shown(second)]):
        one, other = first.rows.get(key), second.rows.get(key)
        if one is not None and other is not None and one.missing and other.missing:
            continue  # nothing that either could run
        if one is None or other is None:
            lines.append(Line(key, None, "only in A" if other is None else "only in B"))
        elif not one.passed or not other.passed:
            failed = one.failure is not None or other.failure is not None
            lines.append(Line(key, None, "; ".join(_reasons(one, other)), failed))
        else:
            found = slowdown(first, [second], key)
            lines.append(Line(key, None, found) if isinstance(found, str) else Line(key, found))
    return lines


def _shown(view: View) -> list[Key]:
    return [key for key, row in view.rows.items() if view.compared(row)]


def _reasons(a: Row, b: Row) -> list[str]:
    found = []
    for name, row in (("A", a), ("B", b)):
        if row.failure is not None:
            found.append(f"check failed in {name}: {row.failure}")
        elif row.missing is not None:
            found.append(f"missing in {name}: {row.missing}")
    return found


def points_of(cases: Sequence[Case], device: str, pattern: str | None, *, small: bool = False) -> list[Point]:
    """Ours by the kernels made for a kind of device, at each size. Curves only where the pattern chooses them."""
    found = []
    for case in cases:
        if device not in case.devices or not matches(case.name, pattern) or (case.axis and pattern is None):
            continue
        for size in (case.small,) if small else case.sizes:
            if not case.axis or case.work(size).flops <= FLOPS_AT_MOST[device]:
                for provider in case.providers:
                    if provider.ours and OUR_BACKENDS.get(provider.backend) == device:
                        found.append(_point(case, dict(size), device, provider.name))
    return found


def _point(case: Case, size: dict[str, int], device: str, provider: str) -> Point:
    dtype = str(DTYPES[device]).removeprefix("torch.")
    row = Row(case.name, case.op, size, dtype, case.mode, provider, METHODS[device][0], flops=0.0, bytes=0.0)
    return Point(row.key, size)


def revisions(
    a: Side,
    b: Side,
    points: Sequence[Point],
    command: Sequence[str],
    *,
    budget: float,
    launches: int,
    root: Path,
    console: Console,
) -> list[Line]:
    """Build both sides and time them in turns, each by a worker that ``command`` starts.

    Raises:
        RevisionError: one cannot be checked out or built.
        WorkerError: one cannot be imported.
    """

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    with ExitStack() as stack:
        stack.enter_context(_ended_in_order())
        folders, ops = {}, {}
        for name, one in (("A", a), ("B", b)):
            assert one.revision is not None
            tree = stack.enter_context(checked_out(one.revision, root, say=say))
            folders[name], ops[name] = stack.enter_context(workplace(tree)), tree / "flashsloth_ops"

        @contextmanager
        def start(name: str) -> Iterator[Worker]:
            with Worker(name, command, folder=folders[name], ops=ops[name]) as worker:
                yield worker

        with console.status("") as status:

            def step(key: Key) -> None:
                status.update(label(key))

            return interleaved(points, start, budget=budget, launches=launches, step=step)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """A request to end (SIGTERM) is an exception meanwhile, so that workers and worktrees go before this process."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def render(lines: Sequence[Line], title: str) -> Group:
    """The table of a comparison, and what has no ratio below it."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("case", "size", "mode", "provider"):
        table.add_column(name)
    table.add_column("B / A", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("")
    sizes = short_sizes(line.key for line in lines)
    for line in lines:
        if line.ratio is not None:
            case, _, _, mode, provider, _ = line.key
            table.add_row(
                case, sizes[line.key], mode, provider, f"{line.ratio.ratio:.3f}", span(line.ratio), tendency(line.ratio)
            )
    notes = [Text(f"{label(line.key)}: {line.note}", style="yellow") for line in lines if line.ratio is None]
    return Group(table, *notes)


def tendency(ratio: Estimate) -> Text:
    """In a word, where the interval does not hold 1."""
    low, high = ratio.interval()
    if low > 1:
        return Text("B slower", style="red")
    return Text("B faster", style="green") if high < 1 else Text("")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A and B; which cases, for how long and with how many threads is common to all commands."""
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="a result (JSON), a git revision, or . (the working tree)")


def main(
    options: argparse.Namespace,
    *,
    cases: Sequence[Case],
    console: Console,
    root: Path = ROOT,
    device: str | None = None,
    launches: int = LAUNCHES,
) -> int:
    """Exit code 0: compared. 1: a check of ours failed, or a worker died.

    Of ``options``: a, b, and case, budget (seconds), threads and small, each None or False where it is not given.

    Raises:
        ValueError: A or B is neither a result nor a revision; two results are of different devices; the commit of a
            result cannot be built; no case matches.
        OSError: a file cannot be read.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    a, b = side(options.a, root), side(options.b, root)
    if a.result is not None and b.result is not None:
        lines = [line for line in results(a.result, b.result) if matches(line.key[0], options.case)]
        title = "Ours at B over ours at A, two runs: what runs as a whole are off by is in the intervals"
    else:
        points = points_of(cases, device, options.case, small=options.small)
        for one in (a, b):
            if one.result is not None:
                points = _stored(one.text, one.result, cases, device, options.case)
        a, b = (_built_from(one, root) for one in (a, b))
        if not points:
            raise ValueError(f"--case: expected a pattern that matches a case of this device, got {options.case!r}")
        command = [sys.executable, "-m", "bench.worker", "--device", device]
        if options.threads:
            command += ["--threads", str(options.threads)]
        try:
            budget = options.budget or DEFAULT_BUDGET
            lines = revisions(a, b, points, command, budget=budget, launches=launches, root=root, console=console)
        except WorkerError as error:
            console.print(Text(str(error), style="bold red"), soft_wrap=True)
            return 1
        title = f"Ours at B, {b.revision}, over ours at A, {a.revision}, in turns"
    console.print(render(lines, title), highlight=False)
    return 1 if any(line.failed for line in lines) else 0


def _built_from(one: Side, root: Path) -> Side:
    return one if one.result is None else one._replace(revision=of_result(one.text, one.result, root))


def _stored(text: str, result: Result, cases: Sequence[Case], device: str, pattern: str | None) -> list[Point]:
    """What a result has of ours, as far as it is still declared."""
    view = View(result)
    if view.kind != device:
        raise ValueError(f"{text}: expected a result of this kind of device, {device}, got one of {view.kind}")
    declared = {(case.name, provider.name) for case in cases for provider in case.providers}
    rows = [view.rows[key] for key in view.ours if matches(key[0], pattern)]
    return [Point(row.key, row.size) for row in rows if (row.case, row.provider) in declared]
