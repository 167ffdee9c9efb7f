"""What the tests of all ops share: golden cases, the error rule, switches of the extension."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flashsloth_ops import _extension, backend, use_backend

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = (ROOT / "tests" / "golden", Path(os.environ.get("FLASHSLOTH_GOLDEN", ROOT.parent / "shared" / "golden")))

needs_extension = pytest.mark.skipif(_extension.module is None, reason=f"extension: {_extension.error}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", pytest.param("cpu", marks=needs_extension))


@dataclass(frozen=True)
class Place:
    """A backend on a device. ``with place:`` forces the backend."""

    backend: str
    device: str = "cpu"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes to test there: Triton's interpreter, which serves CPU tensors, has no bf16 arithmetic."""
        if self.backend == "cuda":
            return (torch.bfloat16, torch.float16)
        return (torch.float32, torch.float16) if self.backend == "triton" and self.device == "cpu" else DTYPES

    def __enter__(self) -> None:
        stack = _entered.setdefault(self, [])
        stack.append(use_backend(self.backend))
        stack[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        _entered[self].pop().__exit__(*error)

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-gpu"


_entered: dict[Place, list[Any]] = {}

INTERPRETER = Place("triton")
GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def skip_missing(reason: str | None) -> list[pytest.MarkDecorator]:
    return [pytest.mark.skipif(reason is not None, reason=str(reason))]


# Triton's kernels under the interpreter, then the backends on a GPU. The op tests run over these, with tensors made on
# the CPU and moved there (``gradients`` does).
TRITON = (
    pytest.param(INTERPRETER, marks=skip_missing(backend.triton_missing("cpu")), id="triton"),
    pytest.param(Place("triton", "cuda"), marks=GPU_MARKS, id="triton-gpu"),
)
CUDA = (pytest.param(Place("cuda", "cuda"), marks=GPU_MARKS, id="cuda-gpu"),)
PLACES = (
    pytest.param(Place("reference"), id="reference"),
    pytest.param(Place("cpu"), marks=needs_extension, id="cpu"),
    *TRITON,
)


def golden_path(name: str) -> Path:
    """A golden case or file; skips the test where it is not at hand."""
    for root in GOLDEN:
        if (root / name).exists():
            return root / name
    pytest.skip(f"golden data {name} is not here")


class Golden:
    """One case: ``meta``, input and output tensors and weights by name, all widened to fp32."""

    def __init__(self, name: str) -> None:
        folder = golden_path(name)
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.io = _load(folder / "io.safetensors")
        self.weights: dict[str, Tensor] = {}
        if "weights" in self.meta:
            path = folder / self.meta["weights"]
            if not path.exists():
                pytest.skip(f"golden data {path.name} of {name} is not here")
            prefix = self.meta.get("weights_prefix", "")
            self.weights = {k.removeprefix(prefix): v for k, v in _load(path).items() if k.startswith(prefix)}

    def check(self, name: str, got: Tensor, relative: float, skip: Tensor | None = None) -> None:
        """``got`` is within ``relative`` of the stored tensor's largest magnitude, all of it or what was kept of it.

        ``skip``, a bool tensor that broadcasts to ``got``, leaves out elements that have no derivative.
        """
        got = got.detach().clone()
        left_out = torch.zeros(got.shape, dtype=torch.bool) if skip is None else skip.expand(got.shape)
        if name in self.io:
            want = self.io[name]
            assert_within(torch.where(left_out, want, got), want, relative, name)
            return
        stride = self.meta["subsampled"][name]["flat_stride"]
        largest = float(self.io[f"{name}.stats"][2])
        difference = got.flatten()[::stride] - self.io[f"{name}.sub"]
        error = difference.masked_fill(left_out.flatten()[::stride], 0.0).abs().max().item()
        assert error <= relative * largest, f"{name}: error {error:.3g} over {relative} of {largest:.3g}"
        norm = float(self.io[f"{name}.stats"][1])
        assert abs(got.double().norm().item() - norm) <= relative * norm, f"{name}: norm {got.norm()} against {norm}"


def _load(path: Path) -> dict[str, Tensor]:
    wide = {torch.float8_e4m3fn, torch.float16, torch.bfloat16}
    return {k: v.float() if v.dtype in wide else v for k, v in load_file(path).items()}


def assert_within(got: Tensor, want: Tensor, relative: float, name: str) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    error, largest = (got.detach() - want).abs().max().item(), want.abs().max().item()
    assert error <= relative * largest, f"{name}: error {error:.3g} over {relative} of {largest:.3g}"


EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float64: 2.0**-53}


def assert_error_rule(
    fused: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, name: str, between: float = 0.0
) -> None:
    """The error of the fused result against fp64 is at most twice that of plain PyTorch in the same dtype, plus the
    rounding of the result itself: two units in the last place of the largest value. ``between``: the relative error
    that follows from rounding what the op stores on the way and plain PyTorch does not."""
    assert fused.shape == exact.shape, f"{name}: shape {tuple(fused.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert fused.isfinite().all(), f"{name}: not finite"
    ours, theirs = (fused.double() - exact).abs().max().item(), (plain.double() - exact).abs().max().item()
    atol = (4 * EPS[dtype] + between) * exact.abs().max().item()
    assert ours <= 2 * theirs + atol, (
        f"{name} in {dtype}: error {ours:.3g}, plain PyTorch {theirs:.3g}, atol {atol:.3g}"
    )


def gradients(
    run: Callable[..., Any], inputs: list[Tensor], seed: int = 7, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of ``run`` on a device, and gradients of a fixed random functional of them for all inputs; on the CPU."""
    inputs = [t.detach().to(device, copy=True).requires_grad_(t.is_floating_point()) for t in inputs]
    result = run(*inputs)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    generator = torch.Generator().manual_seed(seed)
    live = [o for o in outputs if o.requires_grad]
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in live]
    wanted = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(live, wanted, cotangents, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return [o.detach().cpu() for o in outputs], [g.cpu() for g in grads]


@contextmanager
def poisoned() -> Iterator[None]:
    """Scratch memory of the CPU kernels, where they are installed, and every new tensor start as NaN."""
    module = _extension.module
    before = torch.are_deterministic_algorithms_enabled()
    if module is not None:
        module.set_scratch_poison(True)
    torch.use_deterministic_algorithms(True)  # together with fill_uninitialized_memory, its default
    try:
        yield
    finally:
        if module is not None:
            module.set_scratch_poison(False)
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


ISAS = ("baseline", "avx2", "avx512")


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Run the CPU kernels with a lesser instruction set; skips where the processor lacks it."""
    module = _extension.module
    assert module is not None
    before = module.cpu_isa()
    try:
        module.set_cpu_isa(name)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        module.set_cpu_isa(before)
