"""Rows of the report: what fails a check, how they print, how they are stored, and what a change did to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashsloth_ops.report.architecture import ARCHITECTURES

LIMITS = {a.name: a for a in ARCHITECTURES.values()}


@dataclass(frozen=True)
class Row:
    """One variant of a kernel on one architecture."""

    kernel: str
    case: str  # the call it serves, or the template arguments of a CUDA kernel
    arch: str
    language: str  # triton or cuda
    variant: str = ""  # dtypes and constants
    warps: int = 0  # of a block
    registers: int = 0  # of a thread
    stack: int = 0  # bytes of a thread
    spilled: tuple[int, int] = (0, 0)  # bytes of a thread that instructions store to and load from local memory
    spilled_in_loops: tuple[int, int] = (0, 0)  # of these, in main loops
    shared: int | None = 0  # bytes of a block
    blocks: int | None = 0  # that fit on a multiprocessor
    limit: str = ""  # what allows no more
    tensor: dict[str, int] = field(default_factory=dict)  # tensor-core instructions by opcode
    matrix: bool = False  # has a product that belongs on tensor cores
    error: str = ""  # of the compiler

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.language, self.kernel, self.case, self.arch

    def __str__(self) -> str:
        return f"{self.kernel} [{self.case}] on {self.arch}"


def failures(row: Row) -> list[str]:
    """Reasons why a row must not be."""
    if row.error:
        return [f"{row}: {row.error}"]
    found, limit = [], LIMITS[row.arch].shared_of_block
    if any(row.spilled_in_loops):
        stored, loaded = row.spilled_in_loops
        found.append(f"{row}: spills in a main loop, {stored} bytes stored and {loaded} loaded each pass")
    if row.shared is not None and row.shared > limit:
        found.append(f"{row}: {row.shared} bytes of shared memory, a block has at most {limit}")
    elif row.blocks == 0:
        found.append(f"{row}: no block fits on a multiprocessor ({row.limit})")
    if row.matrix and not row.tensor:
        found.append(f"{row}: a matrix product without tensor-core instructions")
    return found


def remarks(row: Row) -> list[str]:
    """What is worth a look without being wrong. (What a CUDA kernel should use is said where it is described.)"""
    with_groups = any(opcode.startswith("HGMMA") for opcode in row.tensor)
    if row.language == "triton" and row.arch == "sm_90" and row.matrix and row.warps >= 4 and row.tensor:
        return [] if with_groups else [f"{row}: {_tensor(row)}, no HGMMA"]
    return []


def render(rows: Sequence[Row]) -> str:
    """A line a row, under one title a kernel."""
    titles = ("case", "arch", "warps", "regs", "spilled", "in loops", "stack", "shared", "blocks", "warps", "limit",
              "tensor cores")  # fmt: skip
    groups: dict[str, list[tuple[str, ...]]] = {"": [titles]}
    cases = list(dict.fromkeys(row.case for row in rows))
    for row in sorted(rows, key=lambda r: cases.index(r.case)):  # stable: architectures stay in order
        groups.setdefault(f"{row.kernel} ({row.language})", []).append(_cells(row))
    widths = [max(len(line[i]) for group in groups.values() for line in group) for i in range(len(titles))]
    lines = []
    for name, group in groups.items():
        lines += ["", name] if name else []
        for line in group:
            pairs = zip(line, widths, strict=True)
            text = [c.ljust(w) if i < 2 or i >= 10 else c.rjust(w) for i, (c, w) in enumerate(pairs)]
            lines.append(("  " + "  ".join(text)).rstrip())
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    if row.error:
        return (row.case, row.arch, *[""] * 9, row.error[:60])
    shared = "?" if row.shared is None else f"{row.shared / 1024:.1f}K"
    blocks, warps = ("?", "?") if row.blocks is None else (str(row.blocks), str(row.blocks * row.warps))
    return (
        row.case, row.arch, str(row.warps), str(row.registers), _pair(row.spilled), _pair(row.spilled_in_loops),
        str(row.stack), shared, blocks, warps, row.limit, _tensor(row),
    )  # fmt: skip


def _pair(local: tuple[int, int]) -> str:
    return "/".join(map(str, local)) if any(local) else "0"


def _tensor(row: Row) -> str:
    if not row.tensor:
        return "none" if row.matrix else "-"
    return " ".join(f"{count} {opcode}" for opcode, count in sorted(row.tensor.items()))


# ---- stored ----


def write(path: Path, rows: Iterable[Row], versions: dict[str, str]) -> None:
    """One row a line, so that a diff shows which changed."""
    said = [{k: v for k, v in asdict(r).items() if v != "" or k == "case"} for r in sorted(rows, key=lambda r: r.key)]
    lines = [json.dumps(one) for one in said]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"versions": {json.dumps(versions)},\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]}\n")


def read(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Rows and versions of a stored report. Raises ValueError saying what is wrong with the file."""
    try:
        stored = json.loads(path.read_text())
        return [_row(r) for r in stored["rows"]], stored["versions"]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such report; `python -m flashsloth_ops kernels --json {path}` makes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a report of kernels, got {error!r}") from None


def _row(stored: dict[str, Any]) -> Row:
    pairs = {name: tuple(stored[name]) for name in ("spilled", "spilled_in_loops")}
    return Row(**{**stored, **pairs})


# ---- compared ----


def comparable(row: Row, now: dict[str, str], before: dict[str, str]) -> bool:
    """Whether the numbers of a row came from the same compilers as those stored: others allot registers otherwise."""
    tools = ("nvcc",) if row.language == "cuda" else ("triton", "ptxas_blackwell" if row.arch == "sm_100" else "ptxas")
    return all(now.get(t) == before.get(t) for t in tools)


def changes(row: Row, before: Row) -> list[str]:
    """What differs, in words: ``registers 96 -> 104``."""
    found = []
    for name in (
        "variant",
        "registers",
        "stack",
        "spilled",
        "spilled_in_loops",
        "shared",
        "blocks",
        "warps",
        "tensor",
        "error",
    ):
        old, new = getattr(before, name), getattr(row, name)
        if name.startswith("spilled"):
            old, new = _pair(old), _pair(new)
        if old != new:
            found.append(f"{name.replace('_', ' ')} {old} -> {new}")
    return found


def worse(row: Row, before: Row) -> list[str]:
    """Changes that cost time: more spilled, fewer warps that fit, or a lesser kind of tensor-core instruction.

    More registers alone do not matter, as long as as many warps fit. Nor do fewer warps of another configuration: that
    is a choice, not the compiler's.
    """
    found = []
    if sum(row.spilled) > sum(before.spilled):
        found.append(f"spilled {_pair(before.spilled)} -> {_pair(row.spilled)} bytes")
    if row.variant == before.variant and None not in (row.blocks, before.blocks):
        old, new = (before.blocks or 0) * before.warps, (row.blocks or 0) * row.warps
        if new < old:
            found.append(f"resident warps {old} -> {new}, registers {before.registers} -> {row.registers}")
    if _kind(row) < _kind(before):
        found.append(f"tensor-core instructions {_tensor(before)} -> {_tensor(row)}")
    return found


def _kind(row: Row) -> int:
    """0 without tensor cores, 1 with those of a warp, 2 with those of a warp group or of a whole block."""
    return max((2 if name.startswith(("HGMMA", "UTC")) else 1 for name in row.tensor), default=0)
