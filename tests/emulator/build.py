"""Builds the CUDA kernels and their bindings over the emulator: the ``.cuda`` overloads then serve CPU tensors."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent
CUDA = ROOT / "csrc" / "cuda"
LIBRARY = ROOT / "build" / "emulated" / "libflashsloth_emulated.so"

# emulator.h says what each is for; -Wno: what nvcc's language has and C++ has not.
FLAGS = "-O2 -DFLASHSLOTH_EMULATE -DFLASHSLOTH_SM90A=1 -fno-strict-aliasing -Wno-unknown-pragmas -Wno-psabi"
FILL_LOCALS = "-ftrivial-auto-var-init=pattern"


@functools.cache
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flashsloth_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def compiler_flags(compiler: str) -> str:
    """FLAGS, and FILL_LOCALS unless the compiler is too old for it (g++ before 12)."""
    tried = subprocess.run([compiler, FILL_LOCALS, "-E", "-x", "c++", "/dev/null"], capture_output=True)
    return FLAGS if tried.returncode else f"{FLAGS} {FILL_LOCALS}"


def build(library: Path, kernels: Sequence[Path], bindings: Sequence[Path] = ()) -> None:
    """Compiles what has changed, for the emulator; bindings register ops of torch.

    Raises RuntimeError with the compiler's words, SystemExit naming a missing tool.
    """
    setup = setup_py()
    if shutil.which("nvcc") is None:
        setup.fail("nvcc is not on PATH, and the emulator needs the headers of the CUDA toolkit")
    headers, _ = setup.cuda_flags()
    torch_dir = Path(torch.__file__).parent
    folders = " ".join(f"-I{setup._shell(folder)}" for folder in (ROOT / "csrc", CUDA, EMULATOR))
    compiler = setup.compiler()
    flags = compiler_flags(compiler)
    file = setup.NinjaFile(library.parent, compiler)
    for source in kernels:
        forced = setup._shell(EMULATOR / "emulator.h")
        file.compile("cxx", source, f"{flags} {folders} {headers} -include {forced} -x c++")
    for source in bindings:
        file.compile("cxx", source, f"{flags} -O1 {setup.torch_flags(torch_dir)} {headers}")
    file.compile("cxx", EMULATOR / "emulator.cpp", f"{flags} {folders} {headers}")
    _link(file, library, f"-L{setup._shell(torch_dir / 'lib')} -ltorch_cpu" if bindings else "")


def build_for_gpu(library: Path, kernels: Sequence[Path]) -> None:
    """The same sources by nvcc, as setup.py compiles csrc/cuda. Raises as build."""
    setup = setup_py()
    if shutil.which("nvcc") is None:
        setup.fail("nvcc is not on PATH")
    _, libraries = setup.cuda_flags()
    file = setup.NinjaFile(library.parent, setup.compiler())
    for source in kernels:
        file.compile("nvcc", source, f"{setup.nvcc_flags(setup.cuda_architectures())} -I{setup._shell(CUDA)}")
    _link(file, library, f"{libraries} {setup.CUDA_LIBRARIES}")


def _link(file: Any, library: Path, libraries: str) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers start at the same time; the first one compiles
        file.link(library, libraries)
        result = subprocess.run(file.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError(f"{library.name} does not compile:\n{result.stdout[-8000:]}")


@functools.cache
def load() -> str | None:
    """Registers the kernels of csrc/cuda for CPU tensors, compiling them first where needed. Returns why it cannot."""
    try:
        build(LIBRARY, sorted(CUDA.glob("*.cu")), sorted((ROOT / "csrc" / "bindings").glob("cuda_*.cpp")))
    except SystemExit as missing:
        return str(missing)
    torch.ops.load_library(LIBRARY)
    return None
