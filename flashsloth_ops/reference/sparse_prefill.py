"""Attention over the tokens that are kept, in plain PyTorch with a dense mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_sparse_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Any = None,
    k_index: Any = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    importance_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """softmax(scale q k^T + mask) v, where the mask admits kept rows and keys of one sequence.

    q ``(B, Hq, Sq, d)``, k and v ``(B, Hkv, Sk, d)``, or packed ``(T, H, d)``. An index has the fields of
    ``TokenIndex``; None keeps every row. Returns the output, the log-sum-exp (shape of q without d) and the
    attention each key receives from ``importance_rows`` (or None), as the public op describes them.
    """
    packed = q.dim() == 3
    if packed:
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]

    kept_q, sequence_q, position_q = _expand(q_index, batch, rows, packed, q.device, first=keys - rows)
    kept_k, sequence_k, position_k = _expand(k_index, batch, keys, packed, q.device, first=0)
    mask = kept_q[:, :, None] & kept_k[:, None, :] & (sequence_q[:, :, None] == sequence_k[:, None, :])
    if causal:
        mask = mask & (position_k[:, None, :] <= position_q[:, :, None])
    mask = mask[:, None]

    wide = torch.promote_types(q.dtype, torch.float32)
    groups = heads // max(k.shape[1], 1)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1) * scale).masked_fill(~mask, -torch.inf)
    empty = ~mask.any(-1)
    safe = scores.masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(empty, -torch.inf) if keys else scores.sum(-1) - torch.inf
    probs = safe.softmax(-1).masked_fill(~mask, 0.0)
    # A key nobody attends to may hold anything, NaN too.
    out = (probs.to(v.dtype) @ v.masked_fill(~mask.any(2).unsqueeze(-1), 0.0)).to(q.dtype)

    importance = None
    if importance_rows is not None:
        importance = _importance(probs.detach(), importance_rows, kept_q, sequence_q, sequence_k)
    if packed:
        out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
        importance = None if importance is None else importance[0]
    return out, lse, importance


def _expand(
    index: Any, batch: int, length: int, packed: bool, device: torch.device, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense form of an index: is a row kept, which sequence is it in, what is its position; each ``(B, S)``."""
    if index is None:
        position = torch.arange(first, first + length, device=device).expand(batch, length)
        return torch.ones_like(position, dtype=torch.bool), torch.zeros_like(position), position
    bounds = index.cu_seqlens.long()
    entry = torch.arange(index.indices.shape[0], device=device)
    sequence = torch.searchsorted(bounds, entry, right=True) - 1
    live = entry < bounds[-1]
    row = 0 if packed else sequence
    cell = torch.where(live, row * length + index.indices.long(), batch * length)  # the spare cell takes the unused

    def dense(values: Tensor) -> Tensor:
        return values.new_zeros(batch * length + 1).scatter(0, cell, values)[:-1].view(batch, length)

    positions = index.indices if index.positions is None else index.positions
    return dense(live), dense(sequence), dense(positions.long())


def _importance(probs: Tensor, rows: Tensor, kept_q: Tensor, sequence_q: Tensor, sequence_k: Tensor) -> Tensor:
    """Mean over heads and over the listed rows that take part, for every key of the row's sequence."""
    batch, _, length, keys = probs.shape
    rows = rows.long().expand(batch, rows.shape[-1])
    inside = (rows >= 0) & (rows < length)
    slot = rows.clamp(0, max(length - 1, 0))
    valid = inside & kept_q.gather(1, slot) if length else torch.zeros_like(inside)
    if not length:
        return probs.new_zeros(batch, keys)
    mean = probs.mean(1)  # over heads
    picked = mean.gather(1, slot[:, :, None].expand(-1, -1, keys)) * valid[:, :, None]
    same = (sequence_q.gather(1, slot)[:, :, None] == sequence_k[:, None, :]) & valid[:, :, None]
    return picked.sum(1) / same.sum(1).clamp(min=1)
