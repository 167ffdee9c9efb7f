"""CUDA C++ kernels: compiles ``csrc/cuda/*.cu`` to binaries, one file and architecture at a time.

What a binary does not say is in :data:`KERNELS`: the dynamic shared memory that the launcher asks for, as the constant
that it passes, which the compiler evaluates; and the tensor-core instruction that must be there. The threads of a
block are those of the kernel's launch bounds.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flashsloth_ops.report import binary
from flashsloth_ops.report.architecture import RESERVED_SHARED, WARP, Architecture, occupancy
from flashsloth_ops.report.table import Row

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPUTE = {80: "80", 90: "90a"}  # what setup.py builds


class Kernel(NamedTuple):
    """A kernel of ``csrc/cuda`` with dynamic shared memory or tensor-core instructions; others need no entry."""

    file: str
    shared: str = "0"  # bytes that a launch asks for, a constant of the file; the most where templates differ
    tensor: str = ""  # tensor-core instruction
    architectures: tuple[int, ...] = (80, 90)


KERNELS = {
    "spatial_pool_scores_kernel": Kernel("spatial_pool.cu", "ScoresTile::kSharedBytes", "HMMA"),
    "sparse_prefill_kernel": Kernel("sparse_prefill.cu", "prefill::kSharedBytes", "HGMMA", (90,)),
    "importance_kernel": Kernel("sparse_prefill.cu", "importance::kSharedBytes", "HMMA", (90,)),
}


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def missing() -> str | None:
    """Why nothing can be compiled here."""
    if not sources():
        return f"no kernels in {CSRC / 'cuda'}"
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


def absent(rows: list[Row], on: Architecture) -> list[str]:
    """Kernels that should be in the table and are not."""
    seen = {row.kernel for row in rows if row.language == "cuda" and row.arch == on.name}
    files = {source.name for source in sources()}
    wanted = sorted(n for n, k in KERNELS.items() if k.file in files and on.capability in k.architectures)
    return [f"{name} (cuda) on {on.name}: not in its binary" for name in wanted if name not in seen]


def compile_file(source: Path, on: Architecture, tools: Path, kernels: dict[str, Kernel] | None = None) -> list[Row]:
    """The rows of a file's kernels. A compiler's error is a row as well.

    A kernel that neither reads nor writes memory has no code for this architecture, and no row.
    """
    kernels = {n: k for n, k in (KERNELS if kernels is None else kernels).items() if k.file == source.name}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wrapper, target = folder / "wrapper.cu", folder / "kernels.cubin"
        wrapper.write_text(
            f'#include "{source}"\nusing namespace flashsloth::cuda;\n'
            + "".join(f"extern __device__ const int of_{n} = {k.shared};\n" for n, k in kernels.items())
        )
        command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", f"-I{CSRC}", f"-I{source.parent}", "-DFLASHSLOTH_SM90A=1"]
        command += ["--keep", "--keep-dir", name, "-cubin", f"-arch=sm_{COMPUTE[on.capability]}", "-o", str(target)]
        done = subprocess.run([*command, str(wrapper)], capture_output=True, text=True)
        if done.returncode:
            message = " ".join((done.stderr or done.stdout).split())[:400]
            return [Row(source.name, "", on.name, "cuda", error=f"does not compile: {message}")]
        ptx = (folder / "wrapper.ptx").read_text()
        reserved = RESERVED_SHARED if on.capability >= 90 else 0
        binaries = binary.read(target, tools, reserved)
    return [_row(code, on, ptx, kernels) for code in binaries if code.touches_memory]


def _row(code: binary.Binary, on: Architecture, ptx: str, kernels: dict[str, Kernel]) -> Row:
    name, arguments = demangled(code.name)
    row = Row(
        name, arguments, on.name, "cuda", registers=code.registers, stack=code.stack, spilled=code.local,
        spilled_in_loops=code.local_in_loops, tensor=code.tensor, shared=None, blocks=None,
    )  # fmt: skip
    entry = ptx.split(f".entry {code.name}(", 1)[-1].split(".entry ", 1)[0]
    bounds = re.search(r"\.(?:max|req)ntid (\d+)(?:, (\d+))?(?:, (\d+))?", entry)
    if bounds is None:
        return replace(row, error="without __launch_bounds__, by which the compiler allots registers")
    threads = math.prod(int(side or 1) for side in bounds.groups())
    if name not in kernels and any(symbol in entry for symbol in re.findall(r"\.extern \.shared .*? (\w+)\[\];", ptx)):
        return replace(row, error=f"has dynamic shared memory; say how much in KERNELS of {Path(__file__).name}")
    expected = kernels.get(name, Kernel(""))
    dynamic = re.search(rf"\bof_{name} = (\d+);", ptx)  # a constant of zero has no initialiser
    shared, warps = code.static_shared + (int(dynamic[1]) if dynamic else 0), -(-threads // WARP)
    fits = occupancy(on, warps, code.registers, shared)
    row = replace(row, warps=warps, shared=shared, blocks=fits.blocks, limit=fits.limit)
    wanted = expected.tensor
    if wanted == "HGMMA" and on.capability < 90:
        wanted = "HMMA"
    if wanted and not any(found.startswith(wanted) for found in code.tensor):
        return replace(row, error=f"expected {wanted} instructions, found {', '.join(code.tensor) or 'none'}")
    return replace(row, matrix=bool(wanted))


def demangled(symbol: str) -> tuple[str, str]:
    """``_ZN1a3fooI6__halfLi3EEEvPf`` -> ``foo``, ``fp16, 3``."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return symbol, ""
    text = subprocess.run([tool, symbol], capture_output=True, text=True).stdout.strip()
    text = text.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    found = re.match(r"(?:\w+ )?(?:[\w() ]+::)*(\w+)(?:<(.*)>)?\(", text)
    return (found[1], found[2] or "") if found else (text, "")


def version() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return ".".join(re.findall(r"release [\d.]+, V([\d.]+)", said))
