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

import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent
CUDA = ROOT / "csrc" / "cuda"
LIBRARY = ROOT / "build" / "emulated" / "libflashsloth_emulated.so"

# Local variables start as a number that is none of the kernel's, as emulator.h says.
FLAGS = "-O2 -DFLASHSLOTH_EMULATE -DFLASHSLOTH_SM90A=1 -ftrivial-auto-var-init=pattern -Wno-unknown-pragmas"


@functools.cache
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flashsloth_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(library: Path, kernels: Sequence[Path], bindings: Sequence[Path]) -> None:
    """Compiles what has changed. Raises RuntimeError with the compiler's words, SystemExit naming a missing tool."""
    setup = setup_py()
    if shutil.which("nvcc") is None:
        setup.fail("nvcc is not on PATH, and the emulator needs the headers of the CUDA toolkit")
    headers, _ = setup.cuda_flags()
    torch_dir = Path(torch.__file__).parent
    emulator = f"{FLAGS} -I{setup._shell(ROOT / 'csrc')} -I{setup._shell(CUDA)} -I{setup._shell(EMULATOR)} {headers}"
    file = setup.NinjaFile(library.parent, setup.compiler())
    for source in kernels:
        file.compile("cxx", source, f"{emulator} -include {EMULATOR / 'emulator.h'} -x c++")
    for source in bindings:
        file.compile("cxx", source, f"{FLAGS} -O1 {setup.torch_flags(torch_dir)} {headers}")
    file.compile("cxx", EMULATOR / "emulator.cpp", emulator)
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers start at the same time; the first one compiles
        file.link(library, f"-L{torch_dir / 'lib'} -ltorch_cpu")
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
