"""Which tiles a launch takes: heuristics by counting registers, shared memory and programs, and small search spaces."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashsloth_ops.triton import tuning
from flashsloth_ops.triton.launch import gpu
from flashsloth_ops.triton.sparse_prefill_call import Call, head_tiles

Config = tuning.Config

SMALL_SHARED = 104 * 1024  # bytes: a block has 99 KiB on GPUs of 8.6, 8.9 and 12.0, and 163 or more on the others


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def _attention(block_m: int, block_n: int, num_warps: int, num_stages: int, maxnreg: int = 255) -> Config:
    """Every candidate names the registers a thread may have, as stored configurations have all names or none."""
    return {**_config(block_m, block_n, num_warps, num_stages), "maxnreg": maxnreg}


def choose(kernel: str, call: Call, run: Callable[[Config], object]) -> Config:
    """The tiles of ``attention_kernel``, ``dq_kernel`` or ``dkdv_kernel``; ``run`` launches it."""
    if call.device.type == "cpu":
        return _config(64, 64, 4, 1)  # interpreted: the cost is that of programs and their operations, not of elements
    dtype = str(call.dtype).removeprefix("torch.")
    kind = f"{'causal' if call.causal else 'full'} {'kept' if call.keys.indices is not None else 'dense'}"
    lengths = f"m{tuning.bucket(call.members)} n{tuning.bucket(call.keys.bound)} x{tuning.bucket(call.lists)}"
    key = f"{dtype} d{call.dim} g{call.group} {kind} {lengths}"
    heuristic, space = _KNOWN[kernel]
    return tuning.choose(kernel, key, call.device, heuristic(call), lambda: space, run)


def precision(call: Call, backward: bool = False) -> dict[str, str]:
    """How products of fp32 are taken: by tensor cores in three passes of tf32, or by plain multiply-adds where parts of
    the operands do not fit in registers (wide heads, and backward, which holds two operands)."""
    if call.dtype != torch.float32:
        return {"PRECISION": "tf32"}  # products of 16-bit inputs are exact
    return {"PRECISION": "ieee" if backward or sum(head_tiles(call.dim)) > 128 else "tf32x3"}


def forward(call: Call) -> Config:
    """128 queries read keys from L2 half as often as 64; fewer where those would leave multiprocessors idle.

    Head sizes to 80 take 128 registers a thread, so that two blocks of 8 warps share a multiprocessor: one's
    exponentials run beside the other's products.
    """
    first, second = head_tiles(call.dim)
    width, kept = first + second, call.keys.indices is not None
    capability, multiprocessors, shared_bytes = gpu(call.device)
    if call.dtype == torch.float32:
        return _attention(32, 16 if second else 32, 4, 2) if width <= 128 else _attention(16, 16, 8, 2)
    if call.members <= 32:
        keys, stages = (32, 2) if width > 128 and shared_bytes <= SMALL_SHARED else (64, 3)
        return _attention(16 if call.members <= 16 else 32, keys, 4, stages)
    few = -(-call.members // 128) * call.lists < multiprocessors
    if few and width <= 128:
        return _attention(64, 64, 4, 3)
    if capability < (9, 0):
        return _forward_by_warps(call, shared_bytes)
    if few:
        return _attention(64, 32, 4, 2)
    if width <= 80:
        return _attention(128, 64, 8, 3, maxnreg=128)
    if width <= 128:
        return _attention(128, 128, 8, 3 if kept else 2)  # with an index, one stage is for the index
    return _attention(128, 32 if kept else 64, 8, 2)


def _forward_by_warps(call: Call, shared_bytes: int) -> Config:
    """Before Hopper each warp has a product of its own.

    Where a tile has at least as many queries as the first column tile has columns, Triton gives a warp its own queries:
    16, in registers with their output, and the wider the head the fewer keys fit beside them. With fewer queries warps
    divide the columns, and softmax goes through shared memory: so at 256, where 128 queries would spill.
    """
    width = sum(head_tiles(call.dim))
    if width > 192:
        return _attention(64, 64 if shared_bytes > SMALL_SHARED else 32, 8, 2)  # with 32 keys warps repeat scores
    if width > 128:
        return _attention(128, 32 if width <= 160 else 16, 8, 3)
    whole = call.keys.indices is None and call.dim == width  # neither gathered nor with columns masked
    return _attention(128, 64, 8, 2) if whole or width <= 96 else _attention(128, 32, 8, 3)


def dq(call: Call) -> Config:
    width = sum(head_tiles(call.dim))
    if call.dtype == torch.float32:
        return _config(32 if width <= 80 else 16, 32, 8, 2)
    if width <= 96:
        return _config(64, 64, 4, 3)
    if width > 128:
        return _config(64, 32, 8, 2 if gpu(call.device).shared_bytes > SMALL_SHARED else 1)
    return _config(128, 32, 8, 3) if gpu(call.device).capability < (9, 0) else _config(64, 64, 4, 2)


def dkdv(call: Call) -> Config:
    """Two accumulators: the wider the head, the fewer queries at a time."""
    width = sum(head_tiles(call.dim))
    if call.dtype == torch.float32:
        return _config(32 if width <= 80 else 16, 32, 8, 2)
    if width > 128:
        return _config(16, 64, 8, 2)
    capability, multiprocessors, _ = gpu(call.device)
    if capability < (9, 0) or -(-call.keys.bound // 128) * call.lists < multiprocessors:
        return _config(32, 64, 4 if width <= 96 or capability < (9, 0) else 8, 2)
    return _config(64 if width <= 96 else 32, 128, 8, 2)


def importance(call: Call) -> Config:
    return _config(16, 32 if call.dtype == torch.float32 else 64, 4, 2)


def splits(call: Call, programs: int) -> int:
    """Parts of the keys, two programs a multiprocessor in all, with at least 256 keys each."""
    wanted = 2 * gpu(call.device).multiprocessors // max(programs, 1)
    return max(1, min(wanted, call.keys.bound // 256))


_KNOWN: dict[str, tuple[Callable[[Call], Config], list[Config]]] = {
    "attention_kernel": (
        forward,
        [
            _attention(64, 64, 4, 3),
            _attention(128, 64, 4, 3),
            _attention(128, 64, 8, 3),
            _attention(128, 64, 8, 3, maxnreg=128),
            _attention(128, 128, 8, 2),
            _attention(128, 128, 8, 3),
        ],
    ),
    "dq_kernel": (
        dq,
        [_config(64, 64, 4, 2), _config(64, 64, 4, 3), _config(128, 32, 8, 3), _config(128, 64, 8, 2)],
    ),
    "dkdv_kernel": (
        dkdv,
        [_config(32, 64, 4, 2), _config(64, 64, 4, 2), _config(32, 128, 8, 2), _config(64, 128, 8, 2)],
    ),
}
