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
    q, k, v = (_batched(t, packed) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = _Rows(q, k, q_index, k_index, packed, causal)
    groups = q.shape[1] // max(k.shape[1], 1)
    q, k, v = rows.clean(q, k, v)

    scores = _scores(q, k.repeat_interleave(groups, 1), scale).masked_fill(~rows.mask, -torch.inf)
    empty = ~rows.mask.any(-1)
    safe = scores.masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(empty, -torch.inf) if k.shape[2] else scores.sum(-1) - torch.inf
    probs = safe.softmax(-1).masked_fill(~rows.mask, 0.0)
    out = (probs.to(v.dtype) @ v.repeat_interleave(groups, 1)).to(q.dtype)

    importance = None
    if importance_rows is not None:
        importance = rows.importance(probs.detach(), importance_rows)
    if packed:
        out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
        importance = None if importance is None else importance[0]
    return out, lse, importance


def token_sparse_prefill_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_index: Any = None,
    k_index: Any = None,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the output and its log-sum-exp: FlashAttention-2 (arXiv 2307.08691), algorithm 2.

    With dlse, the gradient of the log-sum-exp, ``dS = P * (dout v^T - (rowsum(dout * out) - dlse))``.
    """
    packed = q.dim() == 3
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, dout, out = (_batched(t, packed) for t in (q, k, v, dout, out))
    lse = _batched(lse, packed)
    dlse = None if dlse is None else _batched(dlse, packed)
    rows = _Rows(q, k, q_index, k_index, packed, causal)
    groups = q.shape[1] // max(k.shape[1], 1)
    q, k, v = (t.to(wide) for t in rows.clean(q, k, v))
    dout = dout.to(wide).masked_fill(~rows.kept_q[:, None, :, None], 0.0)
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    probs = (_scores(q, keys, scale) - lse[..., None]).masked_fill(~rows.mask, -torch.inf).exp()
    delta = (dout * out.to(wide)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.masked_fill(~rows.kept_q[:, None], 0.0)
    dscores = (probs * (dout @ values.transpose(-2, -1) - delta[..., None])).masked_fill(~rows.mask, 0.0)

    def over_group(grad: Tensor) -> Tensor:  # each key/value head serves a group of query heads
        return grad.unflatten(1, (k.shape[1], groups)).sum(2)

    dq = scale * dscores @ keys
    dk = over_group(scale * dscores.transpose(-2, -1) @ q)
    dv = over_group(probs.transpose(-2, -1) @ dout)
    dq, dk, dv = (g.to(dtype) for g in (dq, dk, dv))
    return (dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)) if packed else (dq, dk, dv)


def _batched(t: Tensor, packed: bool) -> Tensor:
    return t.transpose(0, 1).unsqueeze(0) if packed else t


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) @ k.to(wide).transpose(-2, -1) * scale


class _Rows:
    """Dense form of the two indices: which rows take part, in which sequence, and which key a query may see."""

    def __init__(self, q: Tensor, k: Tensor, q_index: Any, k_index: Any, packed: bool, causal: bool) -> None:
        batch, _, rows, _ = q.shape
        keys = k.shape[2]
        self.kept_q, self.sequence_q, position_q = _expand(q_index, batch, rows, packed, q.device, first=keys - rows)
        self.kept_k, self.sequence_k, position_k = _expand(k_index, batch, keys, packed, q.device, first=0)
        mask = self.kept_q[:, :, None] & self.kept_k[:, None, :]
        mask = mask & (self.sequence_q[:, :, None] == self.sequence_k[:, None, :])
        if causal:
            mask = mask & (position_k[:, None, :] <= position_q[:, :, None])
        self.mask = mask[:, None]  # (batch, 1, rows, keys)

    def clean(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros where rows are not kept or no query sees a key: those may hold anything, NaN too."""
        unseen = ~self.mask.any(2)[..., None]
        return (
            q.masked_fill(~self.kept_q[:, None, :, None], 0.0),
            k.masked_fill(unseen, 0.0),
            v.masked_fill(unseen, 0.0),
        )

    def importance(self, probs: Tensor, rows: Tensor) -> Tensor:
        """Mean over heads and over the listed rows that take part, for every key of the row's sequence."""
        batch, _, length, keys = probs.shape
        if length == 0 or probs.shape[1] == 0:
            return probs.new_zeros(batch, keys)
        rows = rows.long().expand(batch, rows.shape[-1])
        slot = rows.clamp(0, length - 1)
        valid = (rows >= 0) & (rows < length) & self.kept_q.gather(1, slot)
        picked = probs.mean(1).gather(1, slot[:, :, None].expand(-1, -1, keys)) * valid[:, :, None]
        same = (self.sequence_q.gather(1, slot)[:, :, None] == self.sequence_k[:, None, :]) & valid[:, :, None]
        return picked.sum(1) / same.sum(1).clamp(min=1)


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
    return dense(live), dense(sequence if packed else torch.zeros_like(sequence)), dense(positions.long())
