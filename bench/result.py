"""What a run stores: one JSON file with a versioned schema, written so that it is whole or not there.

    {"schema": "flashsloth-bench", "version": 2, "complete": true, "header": {...}, "rows": [...]}

``complete``: whether the run went to its end; one that did not can go on with ``--resume``. ``header``: see
:func:`make_header`. ``rows``: :class:`Row`, one a provider, case, size and way of timing. Times are in seconds, memory
in bytes. The report of a GPU check (:mod:`bench.gpu.check`) has the same header and rows, and is read as a result too.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.timing import Quantiles, quantiles
from flashsloth_ops import _extension

SCHEMA, GPU_CHECK, VERSION = "flashsloth-bench", "flashsloth-gpu-check", 2
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


class ResultError(ValueError):
    """A file that is no result of this schema."""


@dataclass
class GoalResult:
    """A goal as in :class:`bench.case.Goal`, and what came of it: None where it could not be measured."""

    kind: str
    limit: float
    peers: list[str]
    measured: float | None
    reached: bool | None


@dataclass
class Row:
    """One provider at one size of a case, timed one way. What is missing or failed its check has no times.

    Attributes:
        case, op, size, mode: as declared; ``mode`` of an end-to-end case is the phase.
        dtype: "float32", "bfloat16", ...
        provider: its name. ``ours``: whether it is one of our backends, ``variant``: which use of the op; of a whole
            model, which attention it ran with.
        method: "wall" (CPU, interleaved), "graph" (replays of a CUDA graph, cold L2) or "call" (a call from the host
            to its end, launch latency included).
        flops, bytes: what any implementation must do.
        missing: why it could not run here.
        failure: what was wrong with its result, or with its capture.
        max_error, error_allowed: against fp64, of the output that is worst against what is allowed.
        p20, p50, p80: of the times. ``samples``: the times, round by round; values at one place of two rows of a run
            were measured right after each other.
        share: of the limit that the device's ceilings set, measured in the same run.
        peak_bytes: most memory above what was in use before the call (allocator on a GPU, resident set on a CPU); of
            end-to-end rows with the weights.
        kept_bytes: what autograd keeps between forward and backward, without the inputs.
        ratios: for ours, quantiles of a peer's time over ours, pair by pair.
        goals: those this row is the best of ours for.
    """

    case: str
    op: str
    size: dict[str, int]
    dtype: str
    mode: str
    provider: str
    method: str
    flops: float
    bytes: float
    ours: bool = False
    variant: str = ""
    missing: str | None = None
    failure: str | None = None
    max_error: float | None = None
    error_allowed: float | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    samples: list[float] = field(default_factory=list)
    share: float | None = None
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    goals: list[GoalResult] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies a row within a result, and the same measurement in another one."""
        return (*self.point, self.provider, self.method)

    @property
    def point(self) -> tuple[str, ...]:
        """The case, size, dtype and mode: rows of one point are comparable."""
        size = " ".join(f"{name}={value}" for name, value in sorted(self.size.items()))
        return (self.case, size, self.dtype, self.mode)

    @property
    def passed(self) -> bool:
        """Whether it ran and its result was right."""
        return self.missing is None and self.failure is None

    def set_times(self, samples: Sequence[float]) -> None:
        """Keep the samples to four digits, which is more than they are good for, and their quantiles."""
        self.samples = [float(f"{seconds:.4g}") for seconds in samples]
        self.p20, self.p50, self.p80 = quantiles(self.samples)

    @property
    def times(self) -> Quantiles | None:
        if self.p20 is None or self.p50 is None or self.p80 is None:
            return None
        return Quantiles(self.p20, self.p50, self.p80)


@dataclass
class Result:
    """A run: on what it ran, its rows, and whether it went to its end."""

    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    complete: bool = False

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.failure is not None]

    def path(self, out: Path) -> Path:
        """``<out>/<device-slug>/<date>-<commit>.json``."""
        moment = self.header["date"].replace(":", "").removesuffix("Z")
        return out / self.header["slug"] / f"{moment}-{self.header['commit'][:12]}.json"


def make_header(
    device: str = "cpu",
    *,
    quick: bool = False,
    small: bool = False,
    backends: Mapping[str, str] | None = None,
    peers: Mapping[str, str] | None = None,
    ceilings: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Everything a reader needs to know which machine and which code gave the numbers.

    kind ("cpu" or "cuda"), device (its name), slug (its folder), cores, threads, isa (of our CPU kernels), capability,
    driver, clocks (a GPU's clocks, temperature and throttle reasons before the run; after it, ``clocks_after``),
    python, torch, triton, cuda, commit, dirty, difference (a hash of uncommitted changes), date (UTC), load (of the
    machine), quick, small, backends (op: the one an automatic choice takes), peers (optional package: version, or why
    not), ceilings ("bytes_per_second" of a large copy, "flops_per_second" of a large product in the run's dtype).
    """
    commit, difference = revision()
    threads, isa = torch.get_num_threads(), None if _extension.module is None else _extension.module.cpu_isa()
    place: dict[str, Any]
    if device == "cuda":
        name = torch.cuda.get_device_name()
        place = {"device": name, "slug": slug(name), "capability": list(torch.cuda.get_device_capability())}
    else:
        name = cpu_model()
        place = {"device": name, "slug": slug(f"{name} {isa or 'plain'} {threads} threads"), "capability": None}
    return {
        "kind": device,
        **place,
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": isa,
        "driver": gpu_state().get("driver_version") if device == "cuda" else None,
        "clocks": gpu_state() if device == "cuda" else None,
        "clocks_after": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "commit": commit,
        "dirty": None if difference is None else bool(difference),
        "difference": difference,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "quick": quick,
        "small": small,
        "backends": dict(backends or {}),
        "peers": dict(peers or {}),
        "ceilings": dict(ceilings or {}),
    }


def version(package: str) -> str | None:
    """The installed version of a package, None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpu_state() -> dict[str, str]:
    """Driver, clocks, temperature and throttle reasons of the first GPU; empty where nvidia-smi is absent."""
    wanted = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,clocks_throttle_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(wanted.split(","), (value.strip() for value in found.split(",")), strict=False))


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


def revision(root: Path = ROOT) -> tuple[str, str | None]:
    """Commit of the code, and a hash of what tracked files differ from it ("" for nothing).

    "unknown" and None outside a repository.
    """

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown", None  # installed inside somebody else's repository
        difference = git("diff", "HEAD")
        return git("rev-parse", "HEAD"), hashlib.sha256(difference.encode()).hexdigest()[:16] if difference else ""
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def save(result: Result, path: Path) -> None:
    """Write the result: the file at ``path`` is the old one or the new one, never a part.

    Raises:
        ResultError: ``path`` holds something that is not the same run; it is left alone.
        OSError: the directory cannot be made or written.
    """
    if path.exists():
        before, now = load(path).header, result.header
        if any(before[name] != now[name] for name in ("date", "slug", "commit", "difference")):
            raise ResultError(f"{path}: expected no file or an earlier state of this run, got another result")
    write_whole(path, {"schema": SCHEMA, "version": VERSION, **_fields(result)})


def _fields(result: Result) -> dict[str, Any]:
    return {"complete": result.complete, "header": result.header, "rows": [asdict(row) for row in result.rows]}


def write_whole(path: Path, document: dict[str, Any]) -> None:
    """Write JSON so that the file is the old one or the new one, never a part. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(_laid_out(document))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _laid_out(document: dict[str, Any]) -> str:
    """JSON with one line a row, so that a diff of two results shows rows."""
    lines = []
    for key, value in document.items():
        if key == "rows" and isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
            lines.append(f' "rows": [\n  {rows}\n ]')
        else:
            text = json.dumps(value, indent=1, allow_nan=False).replace("\n", "\n ")
            lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


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
    if not isinstance(document, dict) or document.get("schema") not in (SCHEMA, GPU_CHECK):
        raise ResultError(f'{path}: expected "schema": "{SCHEMA}", got another document')
    if document.get("version") != VERSION:
        raise ResultError(f"{path}: expected schema version {VERSION}, got {document.get('version')!r}; measure again")
    header, rows, complete = (document.get(name) for name in ("header", "rows", "complete"))
    if not isinstance(header, dict) or not isinstance(rows, list) or not isinstance(complete, bool):
        raise ResultError(f"{path}: expected a header, a list of rows and whether they are complete")
    lacking = {"kind", "slug", "date", "commit", "difference", "quick", "small"} - set(header)
    if lacking:
        raise ResultError(f"{path}: header: expected {', '.join(sorted(lacking))} too")
    return Result(header, [_row(path, i, row) for i, row in enumerate(rows)], complete)


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


def stored(folder: Path = RESULTS, slug: str | None = None) -> list[tuple[Path, Result]]:
    """All results in a folder of results, of one device or of all, oldest first. Other documents are passed over.

    Raises:
        ResultError: a file says it is of this schema and is not.
    """
    found = []
    for path in sorted(folder.glob(f"{slug or '*'}/*.json")):
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ResultError(f"{path}: expected a JSON document, got something else: {error}") from error
        if isinstance(head, dict) and head.get("schema") in (SCHEMA, GPU_CHECK):
            found.append((path, load(path)))
    return sorted(found, key=lambda one: one[1].header["date"])
