"""Inputs, indices and comparisons that the tests of token_sparse_prefill share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsloth_ops import TokenIndex, token_sparse_prefill, use_backend
from tests.support import Place, gradients, poisoned


def make(
    batch: int,
    heads: tuple[int, int],
    rows: tuple[int, int],
    dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """q (B, Hq, Sq, d), k and v (B, Hkv, Sk, d)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads[0], rows[0], dim), *[(batch, heads[1], rows[1], dim)] * 2]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def random_mask(batch: int, length: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


def pack(t: Tensor, lengths: list[int]) -> Tensor:
    """(B, H, S, d) to packed (T, H, d), the first lengths[b] rows of each."""
    return torch.cat([t[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])


def packed_index(mask: Tensor, lengths: list[int]) -> TokenIndex:
    """The kept rows of sequences that lie end to end."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    kept = [mask[b, :n].nonzero().flatten() for b, n in enumerate(lengths)]
    rows = torch.cat([r + starts[b] for b, r in enumerate(kept)] or [torch.zeros(0)]).int()
    bounds = torch.tensor([0, *(len(r) for r in kept)]).cumsum(0).int()
    return TokenIndex(rows, bounds, max([0, *(len(r) for r in kept)]))


def strided(name: str, t: Tensor) -> Tensor:
    """The same values in another memory layout."""
    if name == "token major":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if name == "head size outside":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if name == "every other row":
        return torch.stack([t, t * torch.nan], 3).flatten(2, 3)[:, :, ::2]
    assert name == "slice of a fused projection"
    return torch.cat([t, t * torch.nan, t * torch.nan], -1)[..., : t.shape[-1]]


def moved(value: Any, device: str) -> Any:
    """An index, a pair of them, a tensor or None on a device. One object stays one, as kernels notice."""
    if value is None or device == "cpu":
        return value
    if isinstance(value, TokenIndex):
        return TokenIndex(*(v.to(device) if isinstance(v, Tensor) else v for v in value))
    return value.to(device) if isinstance(value, Tensor) else tuple(moved(v, device) for v in value)


def attend(place: Place, inputs: list[Tensor], index: Any = None, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """All outputs and the gradients of q, k and v at a place, from memory that starts as NaN; on the CPU."""
    index = moved(index, place.device)
    options = {name: moved(v, place.device) if isinstance(v, Tensor) else v for name, v in options.items()}

    def run(*args: Tensor) -> Any:
        return token_sparse_prefill(*args, index, **{"return_lse": True, **options})

    with place, poisoned():
        return gradients(run, inputs, device=place.device)


def check_against_reference(place: Place, inputs: list[Tensor], index: Any, causal: bool, listed: Tensor) -> None:
    options = {"causal": causal, "importance_rows": listed}
    got, got_grads = attend(place, inputs, index, **options)
    with use_backend("reference"):
        want, want_grads = gradients(
            lambda *args: token_sparse_prefill(*args, index, return_lse=True, **options), [t.double() for t in inputs]
        )
    q, k, _ = inputs
    assert got[0].shape == q.shape
    assert got[1].shape == q.shape[:-1]
    assert got[2].shape == (k.shape[:1] if k.dim() == 3 else (k.shape[0], k.shape[2]))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-4, atol=1e-5)
    for g, w in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-3, atol=1e-4)


def raw_args(packed: bool, indexed: bool, listed: bool) -> tuple[Any, ...]:
    """Arguments of the op itself, below the checks."""
    inputs = make(2, (4, 2), (9, 9), 8)
    mask = random_mask(2, 9, 0.6)
    index = TokenIndex.from_mask(mask)
    if packed:
        inputs, index = [pack(t, [9, 9]) for t in inputs], packed_index(mask, [9, 9])
    fields = (index.indices, index.cu_seqlens, None, index.max_seqlen) if indexed else (None, None, None, 0)
    shifted = (*fields[:2], index.indices, fields[3]) if indexed else fields
    rows = torch.tensor([8, 3]) if listed else None
    return (*inputs, *shifted, *fields, True, 0.3, rows)
