"""Which rows of each sequence take part in :func:`flashsloth_ops.token_sparse_prefill`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise TypeError(f"mask: expected a bool tensor (B, S), got {mask.dtype} {tuple(mask.shape)}")
        batch, length = mask.shape
        counts = mask.sum(1)
        cu_seqlens = _cumulative(counts)
        # Kept entry number e of the flattened mask goes to slot e; the others share one spare slot behind.
        flat = mask.reshape(-1)
        slot = torch.where(flat, flat.cumsum(0) - 1, flat.numel())
        row = torch.arange(length, device=mask.device, dtype=torch.int32).expand(batch, length).reshape(-1)
        indices = row.new_zeros(flat.numel() + 1).scatter_(0, slot, row)[:-1]
        return cls(indices, cu_seqlens, length)

    @classmethod
    def from_lengths(cls, lengths: Tensor, max_seqlen: int) -> TokenIndex:
        """Keep the first ``lengths[b]`` of ``max_seqlen`` rows of sequence b: a batch padded on the right.

        ``lengths`` is an integer tensor ``(B,)``; values are clamped to ``[0, max_seqlen]``.
        """
        if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths: expected an integer tensor (B,), got {lengths.dtype} {tuple(lengths.shape)}")
        if max_seqlen < 0:
            raise ValueError(f"max_seqlen: expected 0 or more, got {max_seqlen}")
        row = torch.arange(max_seqlen, device=lengths.device)
        return cls.from_mask(row < lengths[:, None])

    @classmethod
    def from_topk(cls, scores: Tensor, k: int) -> TokenIndex:
        """Keep the k rows of each sequence with the largest ``scores`` ``(B, S)``. Capacity ``B * k``."""
        if scores.dim() != 2:
            raise ValueError(f"scores: expected (B, S), got {tuple(scores.shape)}")
        batch, length = scores.shape
        if not 0 <= k <= length:
            raise ValueError(f"k: expected 0 to {length} (the rows of a sequence), got {k}")
        rows = scores.topk(k, dim=1).indices.sort(dim=1).values
        cu_seqlens = torch.arange(0, batch * k + 1, max(k, 1), device=scores.device, dtype=torch.int32)
        if k == 0:
            cu_seqlens = cu_seqlens.new_zeros(batch + 1)
        return cls(rows.reshape(-1).to(torch.int32), cu_seqlens, k)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, total: int, max_seqlen: int) -> TokenIndex:
        """Keep every row of sequences packed end to end in ``(total, H, d)``, positions counted per sequence."""
        cu_seqlens = cu_seqlens.to(torch.int32)
        rows = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
        sequence = torch.searchsorted(cu_seqlens, rows, right=True).sub_(1).clamp_(max=cu_seqlens.shape[0] - 1)
        return cls(rows, cu_seqlens, max_seqlen, rows - cu_seqlens[sequence])

    def shifted(self, offset: int | Tensor) -> TokenIndex:
        """The same rows, ``offset`` positions later in their sequences: an int, or an int tensor ``(B,)``.

        For chunked prefill: row 0 of a chunk that follows a cache of c keys is position c.
        """
        start = self.indices if self.positions is None else self.positions
        if isinstance(offset, Tensor) and offset.dim() == 1:
            entry = torch.arange(start.shape[0], device=start.device)
            sequence = torch.searchsorted(self.cu_seqlens.long(), entry, right=True) - 1
            offset = offset.to(torch.int32)[sequence.clamp(max=offset.shape[0] - 1)]
        return self._replace(positions=(start + offset).to(torch.int32))


def _cumulative(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
