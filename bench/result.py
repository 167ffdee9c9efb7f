"""What a run stores: one JSON file with a versioned schema, written so that it is whole or not there.

    {"schema": "flashsloth-bench", "version": 1, "header": {...}, "rows": [...]}

Header: device, slug, cores, threads, isa (of our CPU kernels), python, torch, commit, dirty, date (UTC), load (of the
machine at the start), quick, small, backends (the one that served each op). Rows are :class:`Row`, one a provider and
case.
Times are in seconds, memory in bytes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.timing import Quantiles
from flashsloth_ops import _extension

SCHEMA, VERSION = "flashsloth-bench", 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


class ResultError(ValueError):
    """A file that is no result of this schema."""


@dataclass
class GoalResult:
    """A goal and what was measured: ``kind``, ``peer`` and limits as in :class:`bench.case.Goal`."""

    kind: str
    peer: str
    at_least: float | None
    at_most: float | None
    measured: float
    reached: bool


@dataclass
class Row:
    """One provider in one case. A row whose check failed has a ``failure`` and neither times nor ratios."""

    case: str
    op: str
    size: dict[str, int]
    dtype: str
    mode: str
    provider: str
    flops: float
    bytes: float
    check_passed: bool
    max_error: float | None
    error_allowed: float
    failure: str | None = None
    rounds: int = 0
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    kept_bytes: int | None = None
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)  # peer: quantiles of its time over ours
    goals: list[GoalResult] = field(default_factory=list)

    def set_times(self, times: Quantiles, rounds: int) -> None:
        self.p20, self.p50, self.p80 = times
        self.rounds = rounds


@dataclass
class Result:
    """A run: on what it ran, and its rows."""

    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not row.check_passed]

    def path(self, out: Path) -> Path:
        """``<out>/<device-slug>/<date>-<commit>.json``."""
        moment = self.header["date"].replace(":", "").removesuffix("Z")
        return out / self.header["slug"] / f"{moment}-{self.header['commit'][:12]}.json"


def make_header(*, quick: bool, small: bool, backends: dict[str, str]) -> dict[str, Any]:
    """Everything a reader needs to know which machine and which code gave the numbers."""
    device, threads = cpu_model(), torch.get_num_threads()
    commit, dirty = revision()
    return {
        "device": device,
        "slug": slug(f"{device} {threads} threads"),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": None if _extension.module is None else _extension.module.cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "quick": quick,
        "small": small,
        "backends": backends,
    }


def cpu_model() -> str:
    """The name of the processor, or its architecture where the system does not tell."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine() or "unknown"


def slug(text: str) -> str:
    """A name fit for a directory."""
    text = re.sub(r"\((r|tm)\)|@", " ", text.lower())
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-.") or "unknown"


def revision() -> tuple[str, bool | None]:
    """Commit of the code, and whether tracked files differ from it; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown", None  # installed inside somebody else's repository
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def save(result: Result, path: Path) -> None:
    """Write the result: the file at ``path`` is the old one or the new one, never a part.

    Raises:
        ResultError: ``path`` holds something that is not the same run; it is left alone.
        OSError: the directory cannot be made or written.
    """
    if path.exists() and load(path).header != result.header:
        raise ResultError(f"{path}: expected no file or an earlier state of this run, got another result")
    write_whole(path, {"schema": SCHEMA, "version": VERSION, **asdict(result)})


def write_whole(path: Path, document: dict[str, Any]) -> None:
    """Write JSON so that the file is the old one or the new one, never a part. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: Path) -> Result:
    """Read a stored result.

    Raises:
        ResultError: not JSON, not of this schema, of another version, or with fields missing or unknown.
        OSError: the file cannot be read.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{path}: expected a JSON document, got something else: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ResultError(f'{path}: expected "schema": "{SCHEMA}", got another document')
    if document.get("version") != VERSION:
        raise ResultError(f"{path}: expected schema version {VERSION}, got {document.get('version')!r}")
    header, rows = document.get("header"), document.get("rows")
    if not isinstance(header, dict) or not isinstance(rows, list):
        raise ResultError(f"{path}: expected a header and a list of rows")
    return Result(header, [_row(path, i, row) for i, row in enumerate(rows)])


def _row(path: Path, number: int, row: Any) -> Row:
    names = {f.name for f in fields(Row)}
    if not isinstance(row, dict) or set(row) != names:
        wrong = sorted(names ^ set(row)) if isinstance(row, dict) else type(row).__name__
        raise ResultError(f"{path}: row {number}: expected the fields of a row, differing: {wrong}")
    try:
        goals = [GoalResult(**goal) for goal in row["goals"]]
    except TypeError as error:
        raise ResultError(f"{path}: row {number}: goals: {error}") from error
    return Row(**{**row, "goals": goals})
