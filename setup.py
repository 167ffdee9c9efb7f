"""Builds flashsloth_ops._C with ninja: the CPU kernels, once per instruction set, the CUDA kernels and the bindings.

FLASHSLOTH_BUILD_CUDA   auto (default): build csrc/cuda when nvcc and a CUDA torch are present; 0: never; 1: always
FLASHSLOTH_CUDA_ARCHS   architectures for nvcc, default "80 90a"
MAX_JOBS                compilers at once; default: as many as processors and memory allow
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
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
# The CUDA runtime is linked statically and hidden, so the extension loads beside whatever runtime torch brings.
CUDA_LIBRARIES = "-Wl,--exclude-libs,libcudart_static.a -lcudart_static -ldl -lrt -lpthread"
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


def cuda_flags() -> tuple[str, str]:
    """Where the headers and the libraries of the CUDA toolkit are, as flags for a C++ compiler. nvcc itself says it."""
    said = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    values = dict(re.findall(r"^#\$ (INCLUDES|SYSTEM_INCLUDES|LIBRARIES)=(.*)$", said, re.MULTILINE))
    if "INCLUDES" not in values or "LIBRARIES" not in values:
        fail(f"nvcc --dryrun does not say where the CUDA toolkit is: {said.strip()[-200:]!r}")
    headers = values["INCLUDES"].replace('"-I', '-isystem "')
    return f"{headers} {values.get('SYSTEM_INCLUDES', '')}", values["LIBRARIES"]


def torch_flags(torch_dir: Path) -> str:
    """Flags of csrc/bindings: the stable ABI of torch 2.10, which later versions keep."""
    return f"-I{_shell(CSRC)} -isystem {_shell(torch_dir / 'include')} -DTORCH_TARGET_VERSION=0x020a000000000000"


def nvcc_flags(architectures: list[str]) -> str:
    """Machine code for each architecture, and for GPUs unknown today intermediate code of the newest general one.

    FLASHSLOTH_SM90A tells host code whether kernels with sm_90a instructions are in the binary.
    """
    targets = [f"arch=compute_{a},code=sm_{a}" for a in architectures]
    general = [a for a in architectures if a.isdigit()]
    if general:
        newest = max(general, key=int)
        targets.append(f"arch=compute_{newest},code=compute_{newest}")
    flags = " ".join(f"-gencode={target}" for target in targets)
    return f"{flags} -DFLASHSLOTH_SM90A={int('90a' in architectures)} --threads {min(len(targets), jobs())}"


class NinjaFile:
    """A build file: one rule a language, one edge an object, linked into one library."""

    def __init__(self, build: Path, cxx: str) -> None:
        shared = "-dynamiclib -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror"
        nvcc = f"nvcc -ccbin {cxx} -std=c++17 -O3 -lineinfo --Werror all-warnings -Xcompiler {host} -I{_shell(CSRC)}"
        self.build = build
        self.objects: list[str] = []
        self.lines: list[str] = []
        self._rule("cxx", "compile", f"{cxx} -MD -MF $out.d {CXX_FLAGS} $flags -c $in -o $out")
        self._rule("nvcc", "compile", f"{nvcc} -MD -MF $out.d $flags -c $in -o $out")
        self._rule("link", "link", f"{cxx} {shared} $in -o $out $libs")

    def _rule(self, name: str, verb: str, command: str) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {verb} $out"]
        if verb == "compile":
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: str = "", suffix: str = "") -> None:
        """An object file, named by the folder and the stem of its source."""
        self.objects.append(_escape(self.build / source.parent.name / f"{source.stem}{suffix}.o"))
        self.lines += [f"build {self.objects[-1]}: {rule} {_escape(source)}", f"  flags = {flags}"]

    def link(self, target: Path, libraries: str) -> None:
        """The library, out of all objects so far. Writes the file."""
        self.lines += [f"build {_escape(target)}: link {' '.join(self.objects)}", f"  libs = {libraries}"]
        self.lines.append(f"default {_escape(target)}")
        self.build.mkdir(parents=True, exist_ok=True)
        (self.build / "build.ninja").write_text("\n".join(self.lines) + "\n")

    def command(self) -> list[str]:
        """Compiles what has changed and links it."""
        return [*ninja(), "-C", str(self.build), "-j", str(jobs())]


def extension(
    build: Path, target: Path, torch_dir: Path, torch_version: str, cxx: str, kernels: list[Path]
) -> NinjaFile:
    """The whole extension; `kernels` are the CUDA files, if any."""
    file = NinjaFile(build, cxx)
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.name in HOST_SOURCES:
            file.compile("cxx", source)
            continue
        for isa in instruction_sets():
            file.compile("cxx", source, f"-DFLASHSLOTH_ISA={isa} {ISA_FLAGS[isa]}", f"_{isa}")
    torch = torch_flags(torch_dir)
    for source in sorted((CSRC / "bindings").glob("cpu_*.cpp")):
        # Only the matrix product computes anything: without optimisation the others take half the time to compile.
        file.compile("cxx", source, torch if source.stem == "cpu_gemm" else f"{torch} -O1")
    file.compile("cxx", CSRC / "bindings" / "module.cpp", module_flags(torch_version, cxx, bool(kernels)))
    libraries = f"-L{_shell(torch_dir / 'lib')} -ltorch_cpu"
    if kernels:
        libraries += add_cuda(file, torch_dir, kernels, sorted((CSRC / "bindings").glob("cuda_*.cpp")))
    file.link(target, libraries)
    return file


def module_flags(torch_version: str, cxx: str, cuda: bool) -> str:
    """Flags of the Python module, which reports how it was built."""
    import pybind11

    version = subprocess.run([cxx, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True).stdout.strip()
    defines = {"COMPILER": f"{cxx} {version}", "TORCH_VERSION": torch_version}
    if cuda:
        defines["CUDA_ARCHS"] = " ".join(cuda_architectures())
    includes = f"-isystem {_shell(Path(pybind11.get_include()))} -isystem {_shell(Path(sysconfig.get_path('include')))}"
    values = " ".join(shlex.quote(f'-DFLASHSLOTH_{name}="{value}"') for name, value in defines.items())
    return f"-O1 -I{_shell(CSRC)} {includes} {values}"


def add_cuda(file: NinjaFile, torch_dir: Path, kernels: list[Path], bindings: list[Path]) -> str:
    """Compiles CUDA files and the bindings over them. Returns the libraries to link."""
    headers, libraries = cuda_flags()
    for source in kernels:
        file.compile("nvcc", source, nvcc_flags(cuda_architectures()))
    for source in bindings:
        file.compile("cxx", source, f"-O1 {torch_flags(torch_dir)} {headers}")
    return f" {libraries} {CUDA_LIBRARIES}"


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
        torch_dir = Path(found.origin).parent
        file = extension(build, target, torch_dir, torch.__version__, compiler(), sources if cuda else [])
        if subprocess.run(file.command()).returncode:
            fail("the extension did not compile; the compiler's message is above")


if __name__ == "__main__":
    setup(ext_modules=[Extension("flashsloth_ops._C", sources=[])], cmdclass={"build_ext": BuildExtension})
