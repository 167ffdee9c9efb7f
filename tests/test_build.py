"""setup.py: what is built when, and one line that says what to install when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from flashsloth_ops import _extension
from tests.support import ROOT, needs_extension


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("FLASHSLOTH_BUILD_CUDA", "FLASHSLOTH_CUDA_ARCHS", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    import setup

    return setup


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
    import torch

    where = Path(torch.__file__).parent
    setup_py.write_ninja(tmp_path, tmp_path / "_C.so", where, torch.__version__, "c++", KERNELS)
    text = (tmp_path / "build.ninja").read_text()
    for isa in setup_py.instruction_sets():
        assert text.count(f"spatial_pool_{isa}.o: cxx") == 1
    assert text.count("host.o: cxx") == 1
    assert text.count("x_cuda.o: nvcc") == 1
    assert "-gencode=arch=compute_90a,code=sm_90a" in text
    assert "-march=native" not in text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_rule_compiles(setup_py: ModuleType, tmp_path: Path) -> None:
    import torch

    source = tmp_path / "probe.cu"
    source.write_text("__global__ void probe(float* x) { x[threadIdx.x] *= 2.0f; }\n")
    where = Path(torch.__file__).parent
    setup_py.write_ninja(tmp_path, tmp_path / "_C.so", where, torch.__version__, "c++", [source])
    subprocess.run([*setup_py.ninja(), "-C", str(tmp_path), str(tmp_path / "probe_cuda.o")], check=True)
    assert (tmp_path / "probe_cuda.o").stat().st_size > 0


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
