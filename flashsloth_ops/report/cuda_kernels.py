"""CUDA C++ kernels: compiles ``csrc/cuda/*.cu`` to binaries, one file and architecture at a time."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from flashsloth_ops.report import binary
from flashsloth_ops.report.architecture import RESERVED_SHARED, Architecture
from flashsloth_ops.report.table import Row

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPUTE = {80: "80", 90: "90a"}  # what setup.py builds


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def missing() -> str | None:
    """Why nothing can be compiled here."""
    if not sources():
        return f"no kernels in {CSRC / 'cuda'}"
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


def compile_file(source: Path, on: Architecture, tools: Path) -> list[Row]:
    """The rows of a file's kernels. A compiler's error is a row as well."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "--Werror", "all-warnings", f"-I{CSRC}", "-cubin"]
        command += [f"-arch=sm_{COMPUTE[on.capability]}", "-DFLASHSLOTH_SM90A=1", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            message = " ".join((done.stderr or done.stdout).split())[:400]
            return [Row(source.stem, "", on.name, "cuda", error=f"does not compile: {message}")]
        reserved = RESERVED_SHARED if on.capability >= 90 else 0
        return [_row(code, on) for code in binary.read(target, tools, reserved)]


def _row(code: binary.Binary, on: Architecture) -> Row:
    name, arguments = demangled(code.name)
    return Row(
        name, arguments, on.name, "cuda", registers=code.registers, stack=code.stack, spilled=code.local,
        spilled_in_loops=code.local_in_loops, shared=None, blocks=None, tensor=code.tensor,
    )  # fmt: skip


def demangled(symbol: str) -> tuple[str, str]:
    """``_ZN1a3fooILi3EEEvPf`` -> ``foo``, ``3``."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return symbol, ""
    text = subprocess.run([tool, symbol], capture_output=True, text=True).stdout.strip()
    found = re.match(r"(?:\w+ )?(?:[\w() ]+::)*(\w+)(?:<(.*)>)?\(", text)
    return (found[1], found[2] or "") if found else (text, "")


def version() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return ".".join(re.findall(r"release [\d.]+, V([\d.]+)", said))
