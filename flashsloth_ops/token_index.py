"""Which rows of each sequence take part in :func:`flashsloth_ops.token_sparse_prefill`."""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from flashsloth_ops import _checks as check
from flashsloth_ops.backend import short


class TokenIndex(NamedTuple):
    """Kept rows of a batch of sequences: a ragged list with a static capacity, wholly on the device.

    Sequence b keeps rows ``indices[cu_seqlens[b]:cu_seqlens[b + 1]]``, ascending. What lies beyond
    ``cu_seqlens[-1]`` is unused capacity, so no shape depends on data and nothing waits for the device.

    Attributes:
        indices: int32 ``(capacity,)``. Rows of a sequence for ``(B, H, S, d)`` tensors, rows of the whole
            packed tensor for ``(T, H, d)``.
        cu_seqlens: int32 ``(B + 1,)``, cumulative number of kept rows, starting at 0.
        max_seqlen: upper bound of the rows one sequence keeps; sizes the launch.
        positions: int32 ``(capacity,)`` or None. Position of each entry in its sequence, which causality
            compares; None where it equals ``indices``. See :meth:`shifted`.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor) -> TokenIndex:
        """Keep the rows where ``mask``, bool ``(B, S)``, is True. Capacity ``B * S``."""
        check.tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, got {short(mask.dtype)}")
        check.shape("mask", mask, ("B", "S"))
        batch, length = mask.shape
        _check_capacity("mask", batch * length)
        # Kept entry number e of the flattened mask goes to slot e; the others share one spare slot behind.
        flat = mask.reshape(-1)
        slot = torch.where(flat, flat.cumsum(0) - 1, flat.numel())
        row = torch.arange(length, device=mask.device, dtype=torch.int32).expand(batch, length).reshape(-1)
        indices = row.new_zeros(flat.numel() + 1).scatter_(0, slot, row)[:-1]
        return cls(indices, _cumulative(mask.sum(1)), length)

    @classmethod
    def from_lengths(cls, lengths: Tensor, max_seqlen: int) -> TokenIndex:
        """Keep the first ``lengths[b]`` of ``max_seqlen`` rows of sequence b: a batch padded on the right.

        ``lengths`` is an integer tensor ``(B,)``; values are clamped to ``[0, max_seqlen]``.
        """
        check.integral("lengths", lengths)
        check.shape("lengths", lengths, ("B",))
        _check_length("max_seqlen", max_seqlen)
        row = torch.arange(max_seqlen, device=lengths.device)
        return cls.from_mask(row < lengths[:, None])

    @classmethod
    def from_topk(cls, scores: Tensor, k: int) -> TokenIndex:
        """Keep the k rows of each sequence with the largest ``scores`` ``(B, S)``. Capacity ``B * k``."""
        check.tensor("scores", scores)
        check.shape("scores", scores, ("B", "S"))
        batch, length = scores.shape
        if not 0 <= k <= length:
            raise ValueError(f"k: expected 0 to {length} (the rows of a sequence), got {k}")
        _check_capacity("scores", batch * k)
        rows = scores.topk(k, dim=1).indices.sort(dim=1).values
        cu_seqlens = torch.arange(batch + 1, device=scores.device, dtype=torch.int32) * k
        return cls(rows.reshape(-1).to(torch.int32), cu_seqlens, k)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, total: int, max_seqlen: int) -> TokenIndex:
        """Keep every row of sequences packed end to end in ``(total, H, d)``, positions counted per sequence.

        ``cu_seqlens`` is an integer tensor ``(B + 1,)`` from 0 to at most ``total``; rows beyond its last entry
        belong to no sequence. ``max_seqlen`` bounds the length of one sequence.
        """
        check.integral("cu_seqlens", cu_seqlens)
        check.shape("cu_seqlens", cu_seqlens, ("B + 1",))
        if cu_seqlens.shape[0] < 1:
            raise ValueError("cu_seqlens: expected shape (B + 1,) with at least one entry, got (0,)")
        _check_length("total", total)
        _check_length("max_seqlen", max_seqlen)
        cu_seqlens = cu_seqlens.to(torch.int32)
        rows = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
        return cls(rows, cu_seqlens, max_seqlen, rows - cu_seqlens[_sequence(cu_seqlens, total)])

    def shifted(self, offset: int | Tensor) -> TokenIndex:
        """The same rows, ``offset`` positions later in their sequences: an int, or an int tensor ``(B,)``.

        For chunked prefill: row 0 of a chunk that follows a cache of c keys is position c.
        """
        start = self.indices if self.positions is None else self.positions
        if isinstance(offset, Tensor):
            check.integral("offset", offset)
            if offset.dim() != 0:
                check.shape("offset", offset, (self.cu_seqlens.shape[0] - 1,), " or one number")
                if offset.shape[0] == 0:
                    return self
                sequence = _sequence(self.cu_seqlens, start.shape[0]).clamp(max=offset.shape[0] - 1)
                offset = offset.to(torch.int32)[sequence]
        return self._replace(positions=(start + offset).to(torch.int32))

    def validate(self, name: str, device: torch.device, sequences: int, length: int, *, packed: bool) -> None:
        """Raise where this does not index ``sequences`` sequences of ``length`` rows (packed: rows in all) on a device.

        Types and shapes always. The contents where reading them waits for nothing: on a CPU, outside torch.compile.

        Raises:
            TypeError, ValueError: naming ``name`` and the field.
        """
        for field, value in (("indices", self.indices), ("cu_seqlens", self.cu_seqlens), ("positions", self.positions)):
            if field == "positions" and value is None:
                continue
            t = check.integral(f"{name}.{field}", value)
            if t.device != device:
                raise ValueError(f"{name}.{field}: expected device {device} as q, got {t.device}")
        check.shape(f"{name}.indices", self.indices, ("capacity",))
        check.shape(f"{name}.cu_seqlens", self.cu_seqlens, (sequences + 1,), f" for {sequences} sequences")
        if self.positions is not None:
            check.shape(f"{name}.positions", self.positions, tuple(self.indices.shape), " as indices")
        if not isinstance(self.max_seqlen, (int, torch.SymInt)):
            raise TypeError(f"{name}.max_seqlen: expected an int, got {type(self.max_seqlen).__name__}")
        plain = all(type(t) is Tensor for t in (self.indices, self.cu_seqlens, self.positions) if t is not None)
        if device.type == "cpu" and plain and not torch.compiler.is_compiling():
            _check_contents(self, name, length, packed)


def _check_contents(index: TokenIndex, name: str, length: int, packed: bool) -> None:
    """Every list ascending and inside its sequence. In NumPy, whose calls cost a tenth of PyTorch's on short arrays."""
    bounds = index.cu_seqlens.numpy()
    capacity = index.indices.shape[0]
    counts = numpy.diff(bounds)
    if bounds[0] != 0 or bounds[-1] > capacity or (counts < 0).any():
        raise ValueError(
            f"{name}.cu_seqlens: expected an ascending list from 0 to at most {capacity} (the capacity), "
            f"got {bounds.tolist()}"
        )
    if index.max_seqlen < counts.max(initial=0):
        raise ValueError(f"{name}.max_seqlen: expected at least {counts.max()} as cu_seqlens, got {index.max_seqlen}")
    used = bounds[-1]
    rows = index.indices.numpy()[:used]
    outside = (rows < 0) | (rows >= length)
    if outside.any():
        raise ValueError(f"{name}.indices: expected rows in [0, {length}), got {rows[outside][0]}")
    first = numpy.zeros(used, dtype=bool)  # the first entry of a sequence may be anything
    first[bounds[:-1][counts > 0]] = True
    _check_ascending(f"{name}.indices: expected rows that ascend", rows, first, 1)
    if packed and numpy.bincount(rows, minlength=1).max() > 1:
        raise ValueError(f"{name}.indices: expected each packed row once, got {numpy.bincount(rows).argmax()} twice")
    if index.positions is not None:
        positions = index.positions.numpy()[:used]
        _check_ascending(f"{name}.positions: expected positions that never fall", positions, first, 0)


def _check_ascending(message: str, values: numpy.ndarray, first: numpy.ndarray, least: int) -> None:
    wrong = (numpy.diff(values.astype(numpy.int64)) < least) & ~first[1:]
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"{message} within a sequence, got {values[at]} before {values[at + 1]}")


def _check_length(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}")
    _check_capacity(name, value)


def _check_capacity(name: str, entries: int) -> None:
    if entries >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2**31 rows in all, the range of int32, got {entries}")


def _sequence(cu_seqlens: Tensor, entries: int) -> Tensor:
    """The sequence each of the first ``entries`` entries is in; beyond the last, the number of sequences."""
    entry = torch.arange(entries, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, entry, right=True) - 1


def _cumulative(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
