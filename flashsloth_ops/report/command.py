"""``python -m flashsloth_ops kernels``: compiles, prints, checks, stores and compares."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from flashsloth_ops.report import cuda_kernels, table
from flashsloth_ops.report.architecture import ARCHITECTURES
from flashsloth_ops.report.cases import cases
from flashsloth_ops.report.table import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default="80,90,100", help="architectures, e.g. 90 (default: %(default)s)")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--quick", action="store_true", help="of each kernel the first variant only")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="store the rows; those that --only and --quick leave out stay"
    )
    parser.add_argument("--compare", type=Path, metavar="PATH", help="say what changed against stored rows")
    parser.add_argument("--jobs", type=int, default=_processors(), help="compilers at once (default: %(default)s)")


def main(given: argparse.Namespace) -> int:
    """0 when every kernel compiles and passes, 1 when not, 2 when nothing could be looked at."""
    try:
        architectures = [ARCHITECTURES[int(a)] for a in given.arch.split(",")]
    except (KeyError, ValueError):
        return _complain(f"--arch: expected some of {', '.join(map(str, ARCHITECTURES))}, got {given.arch!r}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return _complain("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    try:
        from flashsloth_ops.report import triton_kernels
    except ImportError as error:
        return _complain(f"triton, whose compiler and disassembler this needs: {error}")
    try:
        stored = table.read(given.compare) if given.compare else None
    except ValueError as error:
        return _complain(f"--compare: {error}")

    started = time.perf_counter()
    work: list[Callable[[], list[Row]]] = []
    problems: list[str] = []
    names = {name for name in triton_kernels.kernels() if given.only in name}
    for on in architectures:
        variants, wrong = triton_kernels.record(cases(), on)
        problems += wrong
        variants = [v for v in variants if given.only in v.name]
        unseen = names - {v.name for v in variants}
        problems += [f"{name} on {on.name}: no case launches it" for name in sorted(unseen)]
        if given.quick:
            variants = list({v.name: v for v in reversed(variants)}.values())[::-1]
        work += [partial(triton_kernels.compile_variant, v, on) for v in variants]
    versions = triton_kernels.versions()
    no_cuda = cuda_kernels.missing()
    if no_cuda is None:
        versions["nvcc"] = cuda_kernels.version()
        tools = triton_kernels.tools()
        files = [(f, a) for f in cuda_kernels.sources() for a in architectures if a.capability in cuda_kernels.COMPUTE]
        work += [partial(cuda_kernels.compile_file, f, a, tools) for f, a in files]
    rows = _parallel(work, given.jobs)
    if no_cuda is None and not given.only:
        problems += [p for a in architectures for p in cuda_kernels.absent(rows, a)]
    rows = [row for row in rows if given.only in row.kernel]

    print(" ".join(f"{tool} {version}" for tool, version in versions.items()))
    print(table.render(rows))
    print()
    if no_cuda is not None:
        print(f"CUDA C++ kernels skipped: {no_cuda}")
    for remark in [r for row in rows for r in table.remarks(row)]:
        print(f"note: {remark}")
    problems += [p for row in rows for p in table.failures(row)]
    if stored is not None:
        problems += _compare(rows, versions, *stored, whole=not (given.only or given.quick))
    if given.json:
        _store(given.json, rows, versions, bool(given.only), given.quick)
    for problem in problems:
        print(f"FAILED: {problem}")
    seconds = time.perf_counter() - started
    kernels = len({(r.language, r.kernel) for r in rows})
    print(f"{kernels} kernels, {len(rows)} binaries, {seconds:.0f} s: {len(problems) or 'nothing'} failed")
    return 1 if problems else 0


def _compare(rows: list[Row], now: dict[str, str], stored: list[Row], before: dict[str, str], whole: bool) -> list[str]:
    """Prints changes; returns those for the worse, and kernels that the stored report lacks."""
    known, problems = {row.key: row for row in stored}, []
    named = {(row.language, row.kernel) for row in stored}
    fresh = sorted({(row.language, row.kernel) for row in rows} - named)
    problems += [f"{kernel} ({language}): not in the stored report" for language, kernel in fresh]
    for row in rows:
        old = known.get(row.key)
        if old is None or not table.comparable(row, now, before):
            continue
        changed = table.changes(row, old)
        if changed:
            print(f"changed: {row}: {', '.join(changed)}")
        problems += [f"{row}: worse than stored: {w}" for w in table.worse(row, old)]
    gone = sorted(named - {(row.language, row.kernel) for row in rows}) if whole else []
    for language, kernel in gone:
        print(f"gone: {kernel} ({language})")
    if now != before:
        print(f"compiled by {now}, stored by {before}: rows of other compilers are not compared")
    return problems


def _store(path: Path, rows: list[Row], versions: dict[str, str], only: bool, quick: bool) -> None:
    """Replaces the file. What a run leaves out stays, if the same compilers made it: other kernels under ``only``,
    other variants of the kernels that are still there under ``quick``.
    """
    if (only or quick) and path.exists():
        stored, before = table.read(path)
        kernels = {(row.language, row.kernel) for row in rows}
        if before == versions:
            kept = [row for row in stored if only or (row.language, row.kernel) in kernels]
            rows = list({row.key: row for row in [*kept, *rows]}.values())
    table.write(path, rows, versions)


def _parallel(work: list[Callable[[], list[Row]]], jobs: int) -> list[Row]:
    """The rows in order. Processes, as compilers hold Python's lock; fresh ones, as a fork of threads may hang."""
    if jobs == 1 or len(work) < 2:
        return [row for one in work for row in one()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(work)), mp_context=context) as pool:
        return [row for rows in _progress(pool.map(_do, work), len(work)) for row in rows]


def _do(one: Callable[[], list[Row]]) -> list[Row]:
    return one()


def _progress(results: Iterator[list[Row]], total: int) -> Iterator[list[Row]]:
    for done, rows in enumerate(results, 1):
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        yield rows


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _complain(message: str) -> int:
    print(f"python -m flashsloth_ops kernels: {message}", file=sys.stderr)
    return 2
