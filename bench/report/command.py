"""``python -m bench report``: stored results as Markdown, as a page, and as the table of README.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import e2e, markdown, page, readme
from bench.report.collect import collect
from bench.report.content import gather
from bench.report.e2e import Claims
from bench.report.points import Cases, Declared
from bench.result import RESULTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    parser.add_argument("--device", metavar="SLUG", help="only this device: a folder of the results; default: all")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="?",
        const=readme.README,
        metavar="FILE",
        help=f"rewrite the table between {readme.BEGIN} and {readme.END}; default: README.md",
    )


def main(options: argparse.Namespace, cases: Sequence[Declared] = (), claims: Claims = e2e.unmeasured_claims) -> int:
    """Markdown on stdout, and the files that were asked for.

    ``cases``: as declared, for titles and axes. ``claims``: see :data:`bench.report.e2e.Claims`.

    Raises:
        ResultError: no result, no such device, no place for the table.
        OSError: a file cannot be read or written.
    """
    known = Cases(cases)
    collection = collect(options.results, options.device)
    contents = [gather(device, known, claims) for device in collection.devices]
    if options.html is not None:
        write(options.html, page.render(contents, collection.unread))
        _say(f"the page is {options.html}")
    if options.readme is not None:
        device = readme.rewrite(options.readme, collection, known)
        _say(f"the table of {options.readme} is from {device.name}, {device.header['date']}")
    sys.stdout.write(markdown.render(contents, collection.unread))
    return 0


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _say(line: str) -> None:
    print(f"python -m bench report: {line}", file=sys.stderr)
