"""Builds flashsloth_ops._C: the CPU kernels, once per instruction set, and the bindings, with ninja.

FLASHSLOTH_BUILD_CUDA   auto (default): build csrc/cuda when nvcc and a CUDA torch are present; 0: never; 1: always
FLASHSLOTH_CUDA_ARCHS   architectures for nvcc, default "80 90a"
MAX_JOBS                compilers at once; default: as many as processors and memory allow
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall -Wextra"
HOST_SOURCES = ("host.cpp", "dispatch.cpp")  # csrc/cpu files compiled once, for every processor
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
MEMORY_PER_JOB = 1.5e9  # bytes


def fail(message: str) -> None:
    """End with one line that says what to do, instead of a traceback."""
    raise SystemExit(f"flashsloth: {message}")


def instruction_sets() -> list[str]:
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


def compiler() -> str:
    wanted = os.environ.get("CXX", "c++ g++ clang++").split()
    if "CXX" in os.environ:
        wanted = wanted[:1]
    for name in wanted:
        if shutil.which(name):
            return name
    fail(f"no C++ compiler ({' or '.join(wanted)} not found): install one, e.g. `apt-get install g++`")
    raise AssertionError


def ninja() -> list[str]:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return ["ninja"]
    fail("ninja not found: run `pip install ninja`")
    raise AssertionError


def build_cuda(has_nvcc: bool, torch_has_cuda: bool, sources: list[Path]) -> bool:
    """Whether to compile csrc/cuda. Looks for a compiler, never for a GPU: builders often have none."""
    choice = os.environ.get("FLASHSLOTH_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        fail(f"FLASHSLOTH_BUILD_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "1" and not sources:
        fail("FLASHSLOTH_BUILD_CUDA=1, but csrc/cuda holds no kernels yet")
    if choice == "1" and not has_nvcc:
        fail("FLASHSLOTH_BUILD_CUDA=1, but nvcc is not on PATH: install the CUDA toolkit or add its bin folder")
    return bool(sources) and choice != "0" and has_nvcc and (choice == "1" or torch_has_cuda)


def cuda_architectures() -> list[str]:
    names = os.environ.get("FLASHSLOTH_CUDA_ARCHS", "80 90a").replace(";", " ").replace(",", " ").split()
    for name in names:
        if not name.rstrip("af").isdigit():
            fail(f"FLASHSLOTH_CUDA_ARCHS: expected numbers like 80 or 90a, got {name!r}")
    return names


def jobs() -> int:
    """Compilers to run at once: one a processor, but no more than fit into the memory that is free."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return processors
    return max(1, min(processors, int(available // MEMORY_PER_JOB)))


def write_ninja(
    build: Path, target: Path, torch_dir: Path, torch_version: str, cxx: str, cuda_sources: list[Path]
) -> None:
    """One rule a language, one edge an object file."""
    import pybind11

    version = subprocess.run([cxx, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True).stdout.strip()
    # pybind11 before torch, which has a copy of its own that refuses to serve the stable ABI.
    includes = [CSRC, Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"]), torch_dir / "include"]
    defines = f'-DTORCH_TARGET_VERSION=0x020a000000000000 -DFLASHSLOTH_COMPILER=\\"{cxx}\\ {version}\\" '
    defines += f'-DFLASHSLOTH_TORCH_VERSION=\\"{torch_version}\\"'
    shared = "-dynamiclib -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"

    lines = [
        "rule cxx",
        f"  command = {cxx} -MD -MF $out.d {CXX_FLAGS} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule nvcc",
        "  command = nvcc -MD -MF $out.d -std=c++17 -O3 -Xcompiler -fPIC --Werror all-warnings $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {cxx} {shared} $in -o $out $libs",
        "  description = link $out",
    ]
    objects: list[str] = []

    def compile(rule: str, source: Path, name: str, flags: str) -> None:
        objects.append(_escape(build / f"{name}.o"))
        lines.append(f"build {objects[-1]}: {rule} {_escape(source)}")
        lines.append(f"  flags = {flags}")

    system = " ".join(f"-isystem {_shell(i)}" for i in includes[1:])
    for source in sorted((CSRC / "bindings").glob("*.cpp")):
        level = "" if source.stem == "cpu_gemm" else "-O1"  # the others compute nothing: half the time to compile
        compile("cxx", source, f"bindings/{source.stem}", f"-I{_shell(CSRC)} {system} {defines} {level}")
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.name in HOST_SOURCES:
            compile("cxx", source, source.stem, "")
            continue
        for isa in instruction_sets():
            compile("cxx", source, f"{source.stem}_{isa}", f"-DFLASHSLOTH_ISA={isa} {ISA_FLAGS[isa]}")
    architectures = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda_architectures())
    for source in cuda_sources:
        compile("nvcc", source, f"{source.stem}_cuda", architectures)

    libraries = f"-L{_shell(torch_dir / 'lib')} -ltorch_cpu"
    if cuda_sources:
        libraries += " -lcudart"
    lines += [
        f"build {_escape(target)}: link {' '.join(objects)}",
        f"  libs = {libraries}",
        f"default {_escape(target)}",
    ]
    build.mkdir(parents=True, exist_ok=True)
    (build / "build.ninja").write_text("\n".join(lines) + "\n")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _shell(path: Path) -> str:
    return f'"{path}"' if " " in str(path) else str(path)


class BuildExtension(build_ext):
    """Runs ninja in place of the compiler driver of setuptools, which knows no per-file flags."""

    def build_extension(self, ext: Extension) -> None:
        found = importlib.util.find_spec("torch")
        if found is None or found.origin is None:
            fail("torch not found: run `pip install torch==2.13.0`, then `pip install --no-build-isolation .`")
            return
        import torch

        if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
            fail(f"torch: expected 2.10 or later, got {torch.__version__}")
        if importlib.util.find_spec("pybind11") is None:
            fail("pybind11 not found: run `pip install pybind11`")
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        cuda = build_cuda(shutil.which("nvcc") is not None, torch.version.cuda is not None, sources)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve()
        write_ninja(build, target, Path(found.origin).parent, torch.__version__, compiler(), sources if cuda else [])
        command = [*ninja(), "-C", str(build), "-j", str(jobs())]
        if subprocess.run(command).returncode:
            fail("the extension did not compile; the compiler's message is above")


if __name__ == "__main__":
    setup(ext_modules=[Extension("flashsloth_ops._C", sources=[])], cmdclass={"build_ext": BuildExtension})
