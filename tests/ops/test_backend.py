"""The backend table, the ways to force a backend, the log and the environment report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from flashsloth_ops import BackendError, _extension, backend, spatial_attention_pool, use_backend
from tests.ops.pool_cases import make
from tests.support import ROOT, needs_extension

POOL = "import torch, flashsloth_ops as f; x = torch.ones(1, 9, 4); w = torch.ones(8, 4); o = torch.ones(8); "
POOL += "print(f.spatial_attention_pool(x, w, o, o, o[:1], grid=(3, 3)).sum().item())"


# An editable installation would find the extension for a copy of the package that has none.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
ENV = "import runpy, sys; sys.argv[1:] = ['env']; runpy.run_module('flashsloth_ops', run_name='__main__')"


def python(code: str, *, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path), **environment}
    command = [sys.executable, "-c", code if path == ROOT else ALONE + code]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=path, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package without its extension, elsewhere."""
    for source in (ROOT / "flashsloth_ops").rglob("*.py"):
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return tmp_path


def test_every_op_has_a_backend_everywhere() -> None:
    for op in backend.OPS:
        for device in ("cpu", "cuda", "meta"):
            rules = [r for r in backend.RULES if r.op == op and r.why_not(device, torch.float32) is None]
            assert rules, f"{op} on {device}"
    assert {r.backend for r in backend.RULES} == set(backend.BACKENDS)


@needs_extension
def test_forced_backend_holds_in_its_block_only() -> None:
    x = torch.ones(1)
    assert backend.select("spatial_pool", x) == "cpu"
    with use_backend("reference"):
        assert backend.select("spatial_pool", x) == "reference"
        with use_backend("cpu"):
            assert backend.select("spatial_pool", x) == "cpu"
        assert backend.select("spatial_pool", x) == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend.select("spatial_pool", x) == "cpu"


def test_forced_backend_that_cannot_serve_raises() -> None:
    inputs = [t.to("meta") for t in make((1, 9), 4, 8)]
    message = "spatial_pool on meta in float32: backend 'cpu' was forced and cannot serve it: "
    message += "cpu: serves cpu tensors, got meta"
    with use_backend("cpu"), pytest.raises(BackendError, match=re.escape(message)):
        spatial_attention_pool(*inputs, grid=(3, 3))


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="backend: expected one of cpu, cuda, triton, reference, got 'tpu'"),
        use_backend("tpu"),
    ):
        pass
    result = python("import flashsloth_ops", FLASHSLOTH_BACKEND="tpu")
    assert result.returncode != 0
    assert "FLASHSLOTH_BACKEND: expected one of cpu, cuda, triton, reference, got 'tpu'" in result.stderr


def test_automatic_fallback_warns_once_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "module", None)
    monkeypatch.setattr(_extension, "error", "gone")
    monkeypatch.setattr(backend, "_warned", set())
    inputs = make((1, 9), 4, 8)
    with pytest.warns(UserWarning, match=r"spatial_pool: the reference backend .* cpu: the extension is gone"):
        spatial_attention_pool(*inputs, grid=(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spatial_attention_pool(*inputs, grid=(3, 3))


def test_shapes_on_the_meta_device() -> None:
    inputs = [t.to("meta") for t in make((2, 9), 4, 8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spatial_attention_pool(*inputs, grid=(3, 3)).shape == (2, 1, 4)


def test_environment_variable_and_log() -> None:
    result = python(POOL, FLASHSLOTH_BACKEND="reference", FLASHSLOTH_LOG="1")
    assert result.returncode == 0, result.stderr
    assert "flashsloth_ops spatial_pool backend=reference x=float32[1, 9, 4] w1=float32[8, 4]" in result.stderr
    assert "flashsloth_ops" not in python(POOL).stderr


def test_env_report() -> None:
    result = python(ENV)
    assert result.returncode == 0, result.stderr
    assert f"torch           {torch.__version__}" in result.stdout
    for op in backend.OPS:
        assert re.search(rf"^{op} +reference +any ", result.stdout, re.MULTILINE)
    if _extension.module is not None:
        assert re.search(r"^cpu kernels +(baseline|avx2|avx512)$", result.stdout, re.MULTILINE)


def test_without_the_extension(copy: Path) -> None:
    report = python(ENV, path=copy)
    assert report.returncode == 0, report.stderr
    assert "extension       not built (run `pip install" in report.stdout
    result = python(POOL, path=copy)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == 4.0
    assert "the extension is not built" in result.stderr
    forced = python(POOL, path=copy, FLASHSLOTH_BACKEND="cpu")
    assert forced.returncode != 0
    assert "backend 'cpu' was forced and cannot serve it: cpu: the extension is not built" in forced.stderr


def test_with_a_broken_extension(copy: Path) -> None:
    suffix = next(s for s in __import__("importlib.machinery").machinery.EXTENSION_SUFFIXES)
    (copy / "flashsloth_ops" / f"_C{suffix}").write_bytes(b"not a library")
    report = python(ENV, path=copy)
    assert report.returncode == 0, report.stderr
    assert "extension       does not load: " in report.stdout
    result = python(POOL, path=copy)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == 4.0


@needs_extension
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kernels_use_the_threads_of_torch() -> None:
    """One OpenMP runtime and one pool: the ops start no thread that a matrix product of torch has not."""
    code = """
import os, re, torch
torch.set_num_threads(3)
a = torch.randn(512, 512); a @ a
x = torch.randn(1, 729, 256, requires_grad=True)
torch.nn.functional.linear(x, torch.randn(256, 256)).sum().backward()
before = len(os.listdir('/proc/self/task'))
import flashsloth_ops as f
w = [torch.randn(256, 256), torch.randn(256), torch.randn(256), torch.randn(1)]
f.spatial_attention_pool(x, *w, grid=(27, 27)).sum().backward()
after = len(os.listdir('/proc/self/task'))
runtimes = set(re.findall(r'\\S*lib[gi]omp\\S*', open('/proc/self/maps').read()))
print(after - before, len(runtimes))
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", "1"]


def test_rules_say_which_size_they_do_not_serve() -> None:
    rules = {(rule.op, rule.backend): rule for rule in backend.RULES}
    half, query = torch.bfloat16, rules["embedded_query", "cuda"]
    assert query.why_not("cuda", half, batch=9) == "serves batches to 8, got 9"
    assert query.why_not("cuda", half, widths=(2560, 577)) == "serves widths that divide by 8, got 2560, 577"
    assert query.why_not("cuda", torch.float32) == "serves bfloat16, float16, got float32"
    prefill = rules["sparse_prefill", "cuda"]
    assert prefill.why_not("cuda", half, head_dim=64) == "serves head sizes 72 and 80, got 64"
    assert rules["sparse_prefill", "triton"].why_not("cuda", half, head_dim=320) == "serves head sizes to 256, got 320"
    assert query.limits() == "head size to 128, batch to 8, widths that divide by 8"
