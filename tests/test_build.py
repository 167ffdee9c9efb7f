"""setup.py: what is built when, and one line that says what to install when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashsloth_ops import _extension
from tests.emulator import build as emulator
from tests.support import ROOT, needs_extension


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("FLASHSLOTH_BUILD_CUDA", "FLASHSLOTH_CUDA_ARCHS", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    import setup

    return setup


TORCH = Path(torch.__file__).parent
KERNELS = [Path("csrc/cuda/x.cu")]


@pytest.mark.parametrize(
    ("choice", "nvcc", "torch_cuda", "built"),
    [
        ("auto", True, True, True),
        ("auto", True, False, False),
        ("auto", False, True, False),
        ("0", True, True, False),
        ("1", True, False, True),
    ],
)
def test_cuda_builds_with_compiler_and_cuda_torch_or_on_request(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, choice: str, nvcc: bool, torch_cuda: bool, built: bool
) -> None:
    monkeypatch.setenv("FLASHSLOTH_BUILD_CUDA", choice)
    assert setup_py.build_cuda(nvcc, torch_cuda, KERNELS) is built


def test_cuda_request_that_cannot_be_met(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSLOTH_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc is not on PATH: install the CUDA toolkit"):
        setup_py.build_cuda(False, True, KERNELS)
    with pytest.raises(SystemExit, match="csrc/cuda holds no kernels yet"):
        setup_py.build_cuda(True, True, [])
    monkeypatch.setenv("FLASHSLOTH_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="FLASHSLOTH_BUILD_CUDA: expected auto, 0 or 1, got 'yes'"):
        setup_py.build_cuda(True, True, KERNELS)


def test_cuda_architectures(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup_py.cuda_architectures() == ["80", "90a"]
    monkeypatch.setenv("FLASHSLOTH_CUDA_ARCHS", "86;90a 100")
    assert setup_py.cuda_architectures() == ["86", "90a", "100"]
    monkeypatch.setenv("FLASHSLOTH_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="expected numbers like 80 or 90a, got 'hopper'"):
        setup_py.cuda_architectures()


def test_ninja_file_compiles_kernels_once_per_instruction_set(setup_py: ModuleType, tmp_path: Path) -> None:
    setup_py.extension(tmp_path, tmp_path / "_C.so", TORCH, torch.__version__, "c++", [])
    text = (tmp_path / "build.ninja").read_text()
    for isa in setup_py.instruction_sets():
        assert text.count(f"cpu/spatial_pool_{isa}.o: cxx") == 1
    assert text.count("cpu/host.o: cxx") == 1
    assert text.count("bindings/cpu_spatial_pool.o: cxx") == 1
    assert "bindings/cuda_" not in text
    assert "-march=native" not in text


def test_architectures_of_cuda_kernels(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for what is asked; intermediate code of the newest general architecture for GPUs to come."""
    monkeypatch.setenv("MAX_JOBS", "2")
    assert setup_py.nvcc_flags(["80", "90a"]) == (
        "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a "
        "-gencode=arch=compute_80,code=compute_80 -DFLASHSLOTH_SM90A=1 --threads 2"
    )
    assert "-DFLASHSLOTH_SM90A=0" in setup_py.nvcc_flags(["80", "86"])
    assert "code=compute_" not in setup_py.nvcc_flags(["90a"])


KERNEL = """
#include "cuda/launch.cuh"
__global__ void twice_kernel(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2.0f * x[i];
}
void twice(const float* x, float* y, int n, cudaStream_t stream) {
  const flashsloth::cuda::Launch launch{dim3((n + 31) / 32), dim3(32), 0, stream};
  flashsloth::cuda::launch_kernel("twice", twice_kernel, launch, x, y, n);
}
"""

BINDING = """
#include <tuple>
#include "bindings/cuda.h"
void twice(const float* x, float* y, int n, cudaStream_t stream);
namespace flashsloth {
Tensor probe(Tensor x) {
  expect_one_device({"probe"}, x, std::vector<Tensor>{x}, std::optional<Tensor>());
  const OnDeviceOf where(x);
  Tensor y = empty({x.numel()}, x.scalar_type(), x);
  const int n = static_cast<int>(x.numel());
  twice(static_cast<const float*>(data(x)), static_cast<float*>(data(y)), n, where.stream);
  return y;
}
}
#ifdef FLASHSLOTH_EMULATE
#define NAME "emulated.cuda"
#else
#define NAME "probe.cuda"
STABLE_TORCH_LIBRARY_IMPL(flashsloth_probe, CPU, m) { m.impl(NAME, TORCH_BOX(&flashsloth::probe)); }
#endif
STABLE_TORCH_LIBRARY_IMPL(flashsloth_probe, FLASHSLOTH_CUDA_KEY, m) { m.impl(NAME, TORCH_BOX(&flashsloth::probe)); }
"""


def probe(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sources of a kernel and of its binding."""
    kernel, binding = folder / "probe.cu", folder / "cuda_probe.cpp"
    kernel.write_text(KERNEL)
    binding.write_text(BINDING)
    return [kernel], [binding]


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@needs_nvcc
def test_cuda_extension_loads_beside_any_torch(setup_py: ModuleType, tmp_path: Path) -> None:
    """A library of a kernel and its binding registers for CUDA, needs no CUDA library, and keeps its runtime hidden."""
    kernels, bindings = probe(tmp_path)
    library = tmp_path / "probe.so"
    file = setup_py.NinjaFile(tmp_path / "build", setup_py.compiler())
    libraries = setup_py.add_cuda(file, TORCH, kernels, bindings)
    file.link(library, f"-L{TORCH / 'lib'} -ltorch_cpu {libraries}")
    subprocess.run(file.command(), check=True)

    torch.library.define("flashsloth_probe::probe.cuda", "(Tensor x) -> Tensor")
    torch.ops.load_library(library)
    for key in ("CUDA", "CPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("flashsloth_probe::probe.cuda", key)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="expected a torch with CUDA"):
            torch.ops.flashsloth_probe.probe.cuda(torch.ones(4))
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert " cuda" not in symbols
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed
    assert "libcudart" not in needed


@needs_nvcc
def test_the_same_sources_run_on_the_emulator(tmp_path: Path) -> None:
    emulator.build(tmp_path / "emulated.so", *probe(tmp_path))
    torch.library.define("flashsloth_probe::emulated.cuda", "(Tensor x) -> Tensor")
    torch.ops.load_library(tmp_path / "emulated.so")
    x = torch.arange(70.0)
    assert torch.equal(torch.ops.flashsloth_probe.emulated.cuda(x), 2 * x)


def test_emulator_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert emulator.load.__wrapped__() == (
        "flashsloth: nvcc is not on PATH, and the emulator needs the headers of the CUDA toolkit"
    )


@needs_nvcc
def test_emulated_kernel_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in a kernel is an error of the tests, not a reason to skip them."""
    monkeypatch.setenv("MAX_JOBS", "1")
    source = tmp_path / "probe.cu"
    source.write_text("mistake")
    with pytest.raises(RuntimeError, match=r"(?s)emulated.so does not compile.*mistake"):
        emulator.build(tmp_path / "emulated.so", [source], [])


@needs_nvcc
@pytest.mark.parametrize(
    ("device", "host", "builds"),
    [("", "", True), ("__shared__ int unused;", "", False), ("", "int unused = 1;", False)],
)
def test_warnings_of_cuda_files_are_errors(
    setup_py: ModuleType, tmp_path: Path, device: str, host: str, builds: bool
) -> None:
    source = tmp_path / "probe.cu"
    source.write_text(f"__global__ void probe_kernel() {{ {device} }}\nvoid probe() {{ {host} }}\n")
    file = setup_py.NinjaFile(tmp_path / "build", setup_py.compiler())
    file.compile("nvcc", source, "-arch=sm_80")
    file.link(tmp_path / "probe.so", "")
    assert (subprocess.run(file.command()).returncode == 0) is builds


def test_jobs_follow_processors_and_memory(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup_py.jobs() == 7
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= setup_py.jobs() <= (os.cpu_count() or 1)
    monkeypatch.setattr(setup_py, "MEMORY_PER_JOB", 1e18)
    assert setup_py.jobs() == 1


def build(tmp_path: Path, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext`` in a copy of the sources."""
    for name in ("csrc", "flashsloth_ops"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    run = f"import sys, runpy\nsys.argv = ['setup.py', '-q', 'build_ext']\n{code}\n"
    run += "runpy.run_path('setup.py', run_name='__main__')"
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def test_missing_torch(tmp_path: Path) -> None:
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a)"
    assert last_line(build(tmp_path, hide)) == (
        "flashsloth: torch not found: run `pip install torch==2.13.0`, then `pip install --no-build-isolation .`"
    )


def test_missing_compiler(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="no-such-compiler")
    assert last_line(result) == (
        "flashsloth: no C++ compiler (no-such-compiler not found): install one, e.g. `apt-get install g++`"
    )


@needs_extension
def test_kernels_share_no_code_between_instruction_sets() -> None:
    """The extension has every copy of each kernel, and reports how it was built."""
    assert _extension.module is not None
    info = _extension.module.build_info()
    assert info["torch_target_version"] == "2.10"
    assert info["compiler"]
    with pytest.raises(ValueError, match="isa: expected baseline, avx2 or avx512, got sse9"):
        _extension.module.set_cpu_isa("sse9")
