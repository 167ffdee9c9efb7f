"""Reads a binary: resources with cuobjdump, instructions with nvdisasm, both shipped with Triton.

Local memory is what registers spill to, and where arrays live that are indexed by a variable; either is slow in a loop.
Traffic is counted in the instructions, in bytes a thread and pass, and a *main loop* is an innermost loop that holds
tensor-core instructions or, in kernels without any, loads from global memory (any loop where there are none either).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TENSOR = re.compile(r"(?:HMMA|HGMMA|QGMMA|IGMMA|IMMA|DMMA|UTC[A-Z]*MMA)\b")
GLOBAL_LOAD = re.compile(r"(?:LDG|LDGSTS|UBLKCP|UTMALDG|UTMACCTL|LD)\b")
GLOBAL = re.compile(r"(?:LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UBLK\w+|UTMA\w+)\b")
LOCAL = {"STL": "stores", "LDL": "loads"}


class Local(NamedTuple):
    """Bytes of local memory."""

    stores: int = 0
    loads: int = 0


class Binary(NamedTuple):
    """What one kernel takes."""

    name: str
    registers: int  # a thread
    stack: int  # bytes a thread
    static_shared: int  # bytes a block, without what the system reserves
    local: Local  # spilled, in all
    local_in_loops: Local  # of these, in main loops
    tensor: dict[str, int]  # tensor-core instructions, by opcode and shape
    touches_memory: bool  # of the device: where not, the code was meant for other architectures


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str  # with modifiers: LDG.E.128
    operands: str


def read(path: Path, tools: Path, reserved_shared: int) -> list[Binary]:
    """Every kernel of a cubin. ``tools`` is the folder of cuobjdump and nvdisasm."""
    resources = run(tools / "cuobjdump", "-res-usage", path)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", resources)
    code = sections(run(tools / "nvdisasm", "-c", path))
    return [
        describe(name, int(registers), int(stack), max(int(shared) - reserved_shared, 0), code[name])
        for name, registers, stack, shared in found
        if name in code
    ]


def read_bytes(cubin: bytes, tools: Path, reserved_shared: int) -> list[Binary]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return read(path, tools, reserved_shared)


def describe(name: str, registers: int, stack: int, shared: int, lines: list[str]) -> Binary:
    instructions, labels = parse(lines)
    tensor: dict[str, int] = {}
    for i in instructions:
        if TENSOR.match(i.opcode):
            kind = ".".join(i.opcode.split(".")[:2])
            tensor[kind] = tensor.get(kind, 0) + 1
    looped = set().union(*main_loops(instructions, labels))
    touches = any(GLOBAL.match(i.opcode) for i in instructions)
    inside = [i for at, i in enumerate(instructions) if at in looped]
    return Binary(name, registers, stack, shared, _local(instructions), _local(inside), tensor, touches)


def _local(instructions: Iterable[Instruction]) -> Local:
    total = {"stores": 0, "loads": 0}
    for i in instructions:
        kind, *modifiers = i.opcode.split(".")
        if kind in LOCAL:
            widths = [int(m) // 8 for m in modifiers if m in ("64", "128")]
            narrow = [{"8": 1, "16": 2}[m[1:]] for m in modifiers if m in ("U8", "S8", "U16", "S16")]
            total[LOCAL[kind]] += (widths + narrow + [4])[0]
    return Local(**total)


# ---- instructions ----


def sections(disassembly: str) -> dict[str, list[str]]:
    """The lines of each kernel, from the output of nvdisasm."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in disassembly.splitlines():
        start = re.match(r"\s*\.section\s+\.text\.(\S+?),", line)
        if start:
            lines = found[start[1]] = []
        lines.append(line)
    return found


def parse(lines: Iterable[str]) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and at which of them each label stands."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        label = re.match(r"(\.\S+):$", line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        found = re.match(r"\s*/\*([0-9a-f]+)\*/\s+(@\S+)?\s*([A-Z][A-Z0-9_.a-z]*)\s*(.*)$", line)
        if found:
            address, predicate, opcode, operands = found.groups()
            instructions.append(Instruction(int(address, 16), predicate or "", opcode, operands.rstrip(" ;")))
    return instructions, labels


# ---- loops ----


def main_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[frozenset[int]]:
    """Main loops, each as the set of its instructions' numbers."""
    loops = natural_loops(instructions, labels)
    for work in (TENSOR, GLOBAL_LOAD, re.compile("")):
        busy = [loop for loop in loops if any(work.match(instructions[at].opcode) for at in loop)]
        if busy and any(work.match(i.opcode) for i in instructions):
            return [loop for loop in busy if not any(other < loop for other in busy)]
    return []


def natural_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[frozenset[int]]:
    """Loops of the control-flow graph: for an edge back to a header that dominates it, what reaches it past the header.

    Two edges to one header are one loop. Branches that merely go back, as from a wait that was moved behind the end of
    the kernel, are none. A jump of the kernel to itself at the end (padding) is unreachable and none either.
    """
    successors = _successors(instructions, labels)
    order = _reverse_postorder(successors)
    predecessors: dict[int, list[int]] = {at: [] for at in order}
    for at in order:
        for after in successors[at]:
            predecessors[after].append(at)
    dominator = _dominators(order, predecessors)

    def dominates(header: int, at: int) -> bool:
        while at != header and at != dominator[at]:
            at = dominator[at]
        return at == header

    loops: dict[int, set[int]] = {}
    for at in order:
        for header in successors[at]:
            if dominates(header, at):
                body = loops.setdefault(header, {header})
                pending = [at]
                while pending:
                    one = pending.pop()
                    if one not in body:
                        body.add(one)
                        pending.extend(predecessors[one])
    starts = sorted(successors)
    ends = dict(zip(starts, [*starts[1:], len(instructions)], strict=True))
    return [frozenset(i for start in body for i in range(start, ends[start])) for body in loops.values()]


def _successors(instructions: list[Instruction], labels: dict[str, int]) -> dict[int, list[int]]:
    """The control-flow graph. Blocks are named by the number of their first instruction."""
    targets = [[labels[t] for t in re.findall(r"`\((\.\S+?)\)", i.operands) if t in labels] for i in instructions]
    jumps = ("BRA", "BRX", "BRXU", "JMP", "EXIT", "RET", "BSYNC", "BREAK")
    starts = {0, *labels.values()}
    starts |= {at + 1 for at, i in enumerate(instructions) if i.opcode.split(".")[0] in jumps}
    starts = {s for s in starts if s < len(instructions)}
    ordered = sorted(starts)
    successors: dict[int, list[int]] = {}
    joins: dict[str, int] = {}  # where the barrier of a BSSY lets its threads go on
    for start, end in zip(ordered, [*ordered[1:], len(instructions)], strict=True):
        for at in range(start, end):
            if instructions[at].opcode.startswith("BSSY") and targets[at]:
                joins[instructions[at].operands.split(",")[0]] = targets[at][0]
        last = instructions[end - 1]
        kind = last.opcode.split(".")[0]
        after = [end] if end in starts else []
        if kind in ("BRA", "JMP", "BRX", "BRXU"):
            plain = not last.predicate and last.operands.startswith(("`(", "R")) and last.opcode != "BRA.DIV"
            after = targets[end - 1] + ([] if plain else after)
        elif kind in ("EXIT", "RET"):
            after = after if last.predicate else []
        elif kind == "BSYNC" and last.operands in joins:
            after = [joins[last.operands]] + (after if last.predicate else [])
        successors[start] = [a for a in dict.fromkeys(after) if a in starts]
    return successors


def _reverse_postorder(successors: dict[int, list[int]]) -> list[int]:
    """Blocks that the first one reaches, each before what follows it but for edges back."""
    order: list[int] = []
    if not successors:
        return order
    seen, path = {0}, [(0, iter(successors[0]))]
    while path:
        at, following = path[-1]
        fresh = next((n for n in following if n not in seen), None)
        if fresh is None:
            order.append(at)
            path.pop()
        else:
            seen.add(fresh)
            path.append((fresh, iter(successors[fresh])))
    return order[::-1]


def _dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, int]:
    """The immediate dominator of each block (Cooper, Harvey, Kennedy: A simple, fast dominance algorithm)."""
    rank = {at: i for i, at in enumerate(order)}
    dominator = {at: at for at in order[:1]}
    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            known = [p for p in predecessors[at] if p in dominator]
            meet = known[0]
            for other in known[1:]:
                while meet != other:
                    if rank[meet] > rank[other]:
                        meet = dominator[meet]
                    else:
                        other = dominator[other]
            if dominator.get(at) != meet:
                dominator[at], changed = meet, True
    return dominator


def run(*command: object) -> str:
    """What a tool prints. Raises RuntimeError with what it complains about."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]}: {(result.stderr or result.stdout).strip()}")
    return result.stdout
