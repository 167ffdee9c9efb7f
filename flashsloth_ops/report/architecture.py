"""Limits of the architectures that kernels are compiled for, and how many blocks fit on a multiprocessor.

Limits: CUDA C++ programming guide, "Compute capabilities"; tensor memory: PTX ISA, "Tensor memory".
"""

from __future__ import annotations

from typing import NamedTuple

WARP = 32
RESERVED_SHARED = 1024  # bytes a block that the system takes
TENSOR_MEMORY_COLUMNS = 512


class Architecture(NamedTuple):
    name: str
    capability: int  # 90 for sm_90
    shared_of_block: int  # bytes one block may have
    shared: int  # bytes of a multiprocessor
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


ARCHITECTURES = {
    80: Architecture("sm_80", 80, 163 * 1024, 164 * 1024),
    90: Architecture("sm_90", 90, 227 * 1024, 228 * 1024),
    100: Architecture("sm_100", 100, 227 * 1024, 228 * 1024),
}


class Occupancy(NamedTuple):
    blocks: int  # resident on a multiprocessor
    warps: int
    limit: str  # what allows no more


def occupancy(on: Architecture, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> Occupancy:
    """Blocks of ``warps`` warps that fit, given registers a thread and bytes of shared memory a block.

    Warps get registers in units of 256, from a quarter of the multiprocessor; blocks get shared memory in 128 bytes.
    """
    of_warp = _round_up(max(registers, 1) * WARP, 256)
    fitting_warps = on.registers // 4 // of_warp * 4
    bounds = {
        "warps": on.warps // warps,
        "blocks": on.blocks,
        "registers": fitting_warps // warps,
        "shared memory": on.shared // _round_up(shared + RESERVED_SHARED, 128),
    }
    if tensor_columns:
        bounds["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_columns
    limit = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[limit], bounds[limit] * warps, limit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
