"""Which results a report is about: all that can be read, by device, and the one it shows as the state of the device."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.result import RESULTS, SCHEMA, Result, ResultError, load


@dataclass
class Device:
    """The results of one device.

    Attributes:
        current: the result that is shown: the newest complete full one; where there is none, the newest complete one,
            or else the newest.
        history: all results with rows, oldest first. Comparable: same device, same threads.
        notes: what a reader must know of the choice.
    """

    slug: str
    current: Result
    history: list[Result]
    notes: list[str] = field(default_factory=list)

    @property
    def header(self) -> dict[str, Any]:
        return self.current.header

    @property
    def name(self) -> str:
        return str(self.header.get("device") or self.slug)

    @property
    def absolute(self) -> bool:
        """Whether times mean something: on a GPU. On a CPU only ratios within a run do."""
        return self.header["kind"] == "cuda"


@dataclass
class Collection:
    """All devices, GPUs first, and the files that could not be used, with the reason."""

    devices: list[Device]
    unread: list[str] = field(default_factory=list)


def collect(folder: Path = RESULTS, slug: str | None = None) -> Collection:
    """Read a folder of results. A file that is no result of this schema is named, and does not hide the others.

    Raises:
        ResultError: there is no such folder, or no result in it.
    """
    if not folder.is_dir():
        raise ResultError(f"{folder}: expected a folder of results, found none")
    found: dict[str, list[Result]] = {}
    unread: list[str] = []
    seen: set[str] = set()
    for path in sorted(folder.glob("*/*.json")):
        seen.add(path.parent.name)
        if slug not in (None, path.parent.name):
            continue
        try:
            result = load(path)
        except (ResultError, OSError) as error:
            if _claims_schema(path):
                unread.append(str(error).replace(f"{folder}/", ""))
            continue
        if result.header["small"]:
            unread.append(f"{path.relative_to(folder)}: measured at small sizes, which say nothing of speed")
        elif result.rows:
            found.setdefault(path.parent.name, []).append(result)
        else:
            unread.append(f"{path.relative_to(folder)}: a run that measured nothing")
    if slug is not None and slug not in seen:
        raise ResultError(f"--device: expected one of {', '.join(sorted(seen)) or 'none stored'}, got {slug!r}")
    if not found:
        why = "; ".join(unread) or "none of this schema is there"
        raise ResultError(f"{folder}: expected a result, which `python -m bench run` stores: {why}")
    devices = [_device(name, sorted(results, key=_moment)) for name, results in found.items()]
    return Collection(sorted(devices, key=lambda device: (not device.absolute, device.slug)), unread)


def full(result: Result) -> bool:
    """Whether a run went to its end with all rounds and providers."""
    return result.complete and not result.header["quick"]


def _moment(result: Result) -> str:
    return str(result.header["date"])


def _claims_schema(path: Path) -> bool:
    """Whether a file that cannot be loaded is worth a word: not JSON, or of this schema. Others are other documents."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return True
    return isinstance(document, dict) and document.get("schema") == SCHEMA


def _device(slug: str, history: list[Result]) -> Device:
    best = [r for r in history if full(r)] or [r for r in history if r.complete] or history
    current, notes = best[-1], []
    if not current.complete:
        notes.append("This run did not go to its end: what is missing below was not reached. Go on with --resume.")
    if current.header["quick"]:
        notes.append("A quick run: fewer rounds and fewer peers, rougher numbers.")
    newer = [result for result in history if _moment(result) > _moment(current)]
    if newer:
        kind = "quick" if newer[-1].complete else "unfinished"
        notes.append(
            f"A newer {kind} run of {_moment(newer[-1])[:10]} (commit {newer[-1].header['commit'][:7]}) is not shown; "
            "this is the newest full one."
        )
    here = {row.case for row in current.rows}
    elsewhere = sorted({row.case for result in history for row in result.rows} - here)
    if elsewhere:
        notes.append(f"Measured in other runs of this device, not in this one: {', '.join(elsewhere)}.")
    return Device(slug, current, history, notes)
