"""What the kernels of one sparse_prefill call are told: sizes, indices, strides and constants."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Index = tuple[Tensor | None, Tensor | None, Tensor | None, int]  # indices, cu_seqlens, positions, max_seqlen


class Side(NamedTuple):
    """The rows of queries, or of keys, that take part."""

    indices: Tensor | None
    cu_seqlens: Tensor | None
    positions: Tensor | None
    bound: int  # rows one sequence keeps at most
    length: int  # rows there are

    @classmethod
    def of(cls, name: str, index: Index, length: int) -> Side:
        indices, cu_seqlens, positions, bound = index
        if indices is None or cu_seqlens is None:
            if indices is not cu_seqlens:
                raise RuntimeError(f"sparse_prefill: {name}_indices and {name}_cu_seqlens go together")
            return cls(None, None, None, length, length)
        positions = None if positions is None else positions.contiguous()
        return cls(indices.contiguous(), cu_seqlens.contiguous(), positions, min(max(bound, 0), length), length)

    @property
    def sequences(self) -> int | None:
        return None if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        capacity = 0 if self.indices is None else self.indices.shape[0]
        return self.indices, self.cu_seqlens, self.positions, capacity, self.bound, self.length

    def ascends_like(self, other: Side) -> bool:
        """Whether entry i of one is at the position of entry i of the other, and entry i + 1 later."""
        if self.length != other.length or self.positions is not None or other.positions is not None:
            return False  # given positions may be equal in neighbours
        return _same(self.indices, other.indices) and _same(self.cu_seqlens, other.cu_seqlens)


class Call(NamedTuple):
    """One call."""

    queries: Side
    keys: Side
    packed: bool
    causal: bool
    scale: float
    sequences: int
    heads: int  # of keys and values
    group: int  # query heads that share one
    dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, q: Tensor, k: Tensor, q_index: Index, k_index: Index, causal: bool, scale: float) -> Call:
        packed = q.dim() == 3
        q_length, k_length = (t.shape[0 if packed else 2] for t in (q, k))
        queries, keys = Side.of("q", q_index, q_length), Side.of("k", k_index, k_length)
        default = 1 if packed else q.shape[0]
        sequences = next((s.sequences for s in (queries, keys) if s.sequences is not None), default)
        if any((default if s.sequences is None else s.sequences) != sequences for s in (queries, keys)):
            raise RuntimeError("sparse_prefill: the indices do not have the sequences of q and k")
        heads = k.shape[1]
        group = q.shape[1] // heads if heads else 1
        return cls(queries, keys, packed, causal, scale, sequences, heads, group, q.shape[-1], q.dtype, q.device)

    @property
    def lists(self) -> int:
        """Lists of queries: one a sequence and key/value head, with the heads of its group."""
        return self.sequences * self.heads

    @property
    def members(self) -> int:
        """The most queries of one list."""
        return self.queries.bound * self.group

    def fill_blocks(self, side: Side, block: int) -> int:
        """Blocks of rows of a batch item, of which some may not be kept. Packed tensors are zeroed before."""
        return 0 if side.indices is None or self.packed else -(-side.length // block)

    def order(self, blocks: int) -> tuple[int, int, int, int]:
        """What programs find their place by, see ``locate``: the last are the lists whose rows fit in a third of L2."""
        rows = self.keys.bound + self.members
        section = 2**24 // max(2 * rows * self.dim * self.dtype.itemsize, 1)
        return blocks, self.heads, self.lists, max(1, min(section, self.lists))

    def constants(self, *tensors: Tensor) -> tuple[list[int], dict[str, object]]:
        """Strides of batch item, head and row of each tensor, counted in ALIGN elements, and the kernels' constants.

        ALIGN is 16 bytes where all strides are multiples of it, so that rows are read 16 bytes at a time.
        """
        strides, wide = [], False
        for t in tensors:
            shape, stride = ((1, *t.shape), (0, *t.stride())) if t.dim() == 3 else (t.shape, t.stride())
            head, row = (2, 1) if t.dim() == 3 else (1, 2)
            strides += [stride[i] if shape[i] > 1 else 0 for i in (0, head, row)]
            wide = wide or sum((shape[i] - 1) * stride[i] for i in (1, 2, 3)) >= 2**31
        align = 16 // self.dtype.itemsize
        if any(s % align for s in strides):
            align = 1
        d0, d1 = head_tiles(self.dim)
        return [s // align for s in strides], {
            "GROUP": self.group, "DIM": self.dim, "D0": d0, "D1": d1, "ALIGN": align, "WIDE": wide,
            "CAUSAL": self.causal, "PACKED": self.packed, "SAME": self.queries.ascends_like(self.keys),
            "BASE2": self.dtype != torch.float32,
        }  # fmt: skip


def head_tiles(dim: int) -> tuple[int, int]:
    """Column tiles of a head: 72 and 80 are 64 + 16, 96 is 64 + 32; (d, 0) where two would not take less than one."""
    whole = max(16, 1 << (dim - 1).bit_length())
    first = whole // 2
    if first < 16 or dim == whole:
        return whole, 0
    second = max(16, 1 << (dim - first - 1).bit_length())
    return (first, second) if first + second < whole else (whole, 0)


def strides_of_rows(t: Tensor) -> tuple[int, ...]:
    """Strides of batch item, head and row of one number a row."""
    return (0, t.stride(1), t.stride(0)) if t.dim() == 2 else t.stride()


def with_contiguous_rows(t: Tensor) -> Tensor:
    """A last dimension without gaps; other strides are the kernels' business."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def empty_token_major(like: Tensor) -> Tensor:
    """Memory in the order (batch, row, head, d)."""
    if like.dim() == 3:
        return like.new_empty(like.shape)
    batch, heads, rows, dim = like.shape
    return like.new_empty(batch, rows, heads, dim).transpose(1, 2)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """One tensor, or two of the same memory."""
    if a is b or a is None or b is None or a.device.type == "meta":
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape
