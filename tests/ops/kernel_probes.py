"""Kernels with faults that the report of kernels must find, and the report of them.

    python -m tests.ops.kernel_probes            rows, failures and remarks as JSON

A module of its own because Triton compiles kernels of files only, and not in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from flashsloth_ops.report import table, triton_kernels
from flashsloth_ops.report.architecture import ARCHITECTURES
from flashsloth_ops.report.cases import Case
from flashsloth_ops.triton.launch import launch


@triton.jit
def product_kernel(
    a, b, c, rows, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """A product in blocks, as they should be."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        x = tl.load(a + m[:, None] * depth + start + k[None, :], mask=m[:, None] < rows, other=0.0)
        y = tl.load(b + (start + k[:, None]) * N + n[None, :])
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], total, mask=m[:, None] < rows)


@triton.jit
def spilling_kernel(x, y, times, BLOCK: tl.constexpr):
    """More values that live at once than a thread has registers, all through a loop."""
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    other = tl.load(x + BLOCK + at)
    for i in range(times):
        value = value * tl.load(y + i * BLOCK + at) + other
        other = other * tl.sum(value, 0) + value
    tl.store(x + at, value + other)


@triton.jit
def copy_kernel(x, y, length, scale, BLOCK: tl.constexpr):
    """No product, nothing wrong."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < length) * scale, mask=at < length)


@triton.jit
def broken_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


def _product(
    size: tuple[int, int, int], dtype: torch.dtype, precision: str = "tf32", stages: int = 3, warps: int = 4
) -> None:
    m, n, k = size
    a, b, c = (torch.empty(s, dtype=dtype, device="meta") for s in ((m, 1024), (1024, n), (m, n)))
    constants = {"M": m, "N": n, "K": k, "PRECISION": precision}
    launch(product_kernel, (1,), a, b, c, m, 1024, **constants, num_warps=warps, num_stages=stages)


def _spill(block: int) -> None:
    x = torch.empty(2 * block, device="meta")
    launch(spilling_kernel, (1,), x, x, 100, BLOCK=block, num_warps=1)


def _copy() -> None:
    x = torch.empty(4096, device="meta")
    launch(copy_kernel, (4,), x, x, 4095, 2.0, BLOCK=1024)


def _raise() -> None:
    _copy()
    raise ValueError("no such size")


CASES = (
    Case("good", lambda: _product((64, 64, 64), torch.bfloat16)),
    Case("fp32 tf32x3", lambda: _product((64, 64, 32), torch.float32, "tf32x3")),
    Case("fp32 ieee", lambda: _product((32, 32, 32), torch.float32, "ieee")),
    Case("few rows", lambda: _product((16, 64, 64), torch.bfloat16)),
    Case("too much shared memory", lambda: _product((128, 256, 64), torch.bfloat16, stages=6, warps=8)),
    Case("spills", lambda: _spill(4096)),
    Case("spills not", lambda: _spill(128)),
    Case("broken", lambda: launch(broken_kernel, (1,), torch.empty(64, device="meta"), BLOCK=32)),
    Case("raises", _raise),
    Case("copies again", _copy),
)


def main() -> None:
    rows, problems = [], []
    for on in ARCHITECTURES.values():
        variants, wrong = triton_kernels.record(CASES, on)
        problems += wrong
        rows += [row for v in variants for row in triton_kernels.compile_variant(v, on)]
    result = {
        "kernels": sorted(triton_kernels.kernels("tests.ops")),
        "rows": [
            {**asdict(row), "failures": table.failures(row), "remarks": table.remarks(row)} for row in rows
        ],
        "problems": problems,
        "table": table.render(rows),
    }  # fmt: skip
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
