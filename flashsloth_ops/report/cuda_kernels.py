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
    shared: str = "0"  # bytes that a launch asks for: a constant of the file, {0} being its first template argument
    tensor: str = ""  # tensor-core instruction
    architectures: tuple[int, ...] = (80, 90)


KERNELS = {
    "image_state_cluster_kernel": Kernel("embedded_query.cu", "query::StateTile<bf16>::kSharedBytes", "HMMA", (90,)),
    "image_state_project_kernel": Kernel("embedded_query.cu", "query::RowsTile<bf16>::kSharedBytes", "HMMA"),
    "embedded_query_rows_cluster_kernel": Kernel(
        "embedded_query.cu", "query::RowsClusterTile<bf16>::kSharedBytes", "HMMA", (90,)
    ),
    "embedded_query_rows_kernel": Kernel("embedded_query.cu", "query::RowsGemm<bf16>::kSharedBytes", "HMMA"),
    "embedded_query_many_rows_kernel": Kernel("embedded_query.cu", "query::RowsTile<bf16>::kSharedBytes", "HMMA"),
    "embedded_query_text_kernel": Kernel(
        "embedded_query.cu", "query::TextTile::shared_bytes(query::kMaxHeadDim)", "HMMA"
    ),
    "embedded_query_asked_kernel": Kernel("embedded_query.cu", "query::AskedTile<bf16>::kSharedBytes", "HMMA"),
    "embedded_query_scores_kernel": Kernel("embedded_query.cu", "query::ScoresTile<bf16>::kSharedBytes", "HMMA"),
    "embedded_query_pooled_kernel": Kernel("embedded_query.cu", "query::PooledTile<bf16>::kSharedBytes", "HMMA"),
    "embedded_query_values_kernel": Kernel("embedded_query.cu", "query::OutputGemm<bf16>::kSharedBytes", "HMMA"),
    "embedded_query_up_kernel": Kernel("embedded_query.cu", "query::OutputGemm<bf16>::kSharedBytes", "HMMA"),
    "spatial_pool_scores_kernel": Kernel("spatial_pool.cu", "ScoresTile::kSharedBytes", "HMMA"),
    "spatial_pool_cluster_kernel": Kernel("spatial_pool.cu", "ClusterTile<{1}, {2}>::kSharedBytes", "HGMMA", (90,)),
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
    wanted = sorted(name for name, kernel in KERNELS.items() if on.capability in kernel.architectures)
    return [f"{name} (cuda) on {on.name}: not in its binary" for name in wanted if name not in seen]


def compile_file(source: Path, on: Architecture, tools: Path, kernels: dict[str, Kernel] | None = None) -> list[Row]:
    """The rows of a file's kernels. A compiler's error is a row as well.

    A kernel that neither reads nor writes memory has no code for this architecture, and no row.
    """
    kernels = {n: k for n, k in (KERNELS if kernels is None else kernels).items() if k.file == source.name}
    flags = ["-std=c++17", "-O3", "-lineinfo", "-DFLASHSLOTH_SM90A=1", f"-arch=sm_{COMPUTE[on.capability]}"]
    flags += [f"-I{CSRC}", f"-I{source.parent}"]
    with tempfile.TemporaryDirectory() as name:
        ptx, cubin, wrapper, constants = (Path(name) / n for n in ("k.ptx", "k.cubin", "wrapper.cu", "wrapper.ptx"))
        try:
            binary.run("nvcc", *flags, "-ptx", source, "-o", ptx)
            binary.run("nvcc", *flags, "-cubin", ptx, "-o", cubin)
            reserved = RESERVED_SHARED if on.capability >= 90 else 0
            binaries = [code for code in binary.read(cubin, tools, reserved) if code.touches_memory]
            lines = [f'#include "{source}"', "using namespace flashsloth::cuda;"]
            for number, code in enumerate(binaries):
                function, arguments = demangled(code.name)
                shared = kernels[function].shared.format(*arguments) if function in kernels else "0"
                lines.append(f"extern __device__ const int shared_of_{number} = {shared};")
            wrapper.write_text("\n".join(lines) + "\n")
            binary.run("nvcc", *flags, "-ptx", wrapper, "-o", constants)
        except RuntimeError as error:
            return [
                Row(source.name, "", on.name, "cuda", error=f"does not compile: {' '.join(str(error).split())[:400]}")
            ]
        # A constant of zero has no initialiser.
        sizes = dict(re.findall(r"\bshared_of_(\d+) = (\d+);", constants.read_text()))
        text = ptx.read_text()
        return [_row(code, on, text, int(sizes.get(str(n), 0)), kernels) for n, code in enumerate(binaries)]


def _row(code: binary.Binary, on: Architecture, ptx: str, dynamic: int, kernels: dict[str, Kernel]) -> Row:
    name, arguments = demangled(code.name)
    case = ", ".join(arguments).replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    row = Row(
        name, case, on.name, "cuda", registers=code.registers, stack=code.stack, spilled=code.local,
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
    shared, warps = code.static_shared + dynamic, -(-threads // WARP)
    fits = occupancy(on, warps, code.registers, shared)
    row = replace(row, warps=warps, shared=shared, blocks=fits.blocks, limit=fits.limit)
    wanted = expected.tensor
    if wanted == "HGMMA" and on.capability < 90:
        wanted = "HMMA"
    if wanted and not any(found.startswith(wanted) for found in code.tensor):
        return replace(row, error=f"expected {wanted} instructions, found {', '.join(code.tensor) or 'none'}")
    return replace(row, matrix=bool(wanted))


def demangled(symbol: str) -> tuple[str, list[str]]:
    """``_ZN1a3fooI6__halfLi3EEEvPf`` -> ``foo``, ``[__half, 3]``."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return symbol, []
    text = subprocess.run([tool, symbol], capture_output=True, text=True).stdout.strip()
    found = re.match(r"(?:\w+ )?(?:[\w() ]+::)*(\w+)(?:<(.*)>)?\(", text)
    return (found[1], found[2].split(", ") if found[2] else []) if found else (text, [])


def version() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return ".".join(re.findall(r"release [\d.]+, V([\d.]+)", said))
