"""Sparse prefill: 2048 rows, 32 heads of 80 (phi-2), a quarter of the rows kept, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.case import OURS, Case, Goal, Inputs, Outputs, Provider, Size, Work
from flashsloth_ops import TokenIndex, token_sparse_prefill

MASKED = "masked SDPA on all tokens"
GATHERED = "gather + SDPA"
COMPACT = "gather + SDPA, not put back"
EAGER = "official style, all tokens"
WITHOUT = f"{OURS}, without"
SEEN = "gather + eager"


def inputs(size: Size) -> Inputs:
    generator = torch.Generator().manual_seed(size["rows"])
    shape = size["batch"], size["heads"], size["rows"], size["head_dim"]
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    scores = torch.rand(size["batch"], size["rows"], generator=generator)
    index = TokenIndex.from_topk(scores, size["kept"])
    rows = index.indices.view(size["batch"], -1).long()
    return {"q": q, "k": k, "v": v, "index": index, "rows": rows, "asking": rows[:, -size["asking"] :].contiguous()}


def work(size: Size) -> Work:
    """Two products over the causal half of kept times kept; kept rows are read, all rows are written."""
    batch, heads, kept, dim = size["batch"], size["heads"], size["kept"], size["head_dim"]
    pairs = kept * (kept + 1) / 2
    return Work(4.0 * batch * heads * pairs * dim, 4.0 * batch * heads * dim * (3 * kept + size["rows"]))


def fused(given: Inputs) -> Outputs:
    out = token_sparse_prefill(given["q"], given["k"], given["v"], given["index"])
    assert isinstance(out, Tensor)
    return {"out": out}


def fused_importance(given: Inputs) -> Outputs:
    out, importance = token_sparse_prefill(
        given["q"], given["k"], given["v"], given["index"], importance_rows=given["asking"]
    )
    return {"out": out, "importance": importance}


def with_mask(given: Inputs) -> Inputs:
    """Mask of the kept keys a row may see. A row that is not kept gets what causality gives; nobody reads it."""
    q, rows = given["q"], given["rows"]
    kept = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool).scatter_(1, rows, True)
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril_()
    own = torch.eye(q.shape[2], dtype=torch.bool)  # no row is without a key
    return {**given, "mask": (causal & (kept[:, None, :] | own))[:, None]}


def masked(given: Inputs) -> Outputs:
    return {"out": scaled_dot_product_attention(given["q"], given["k"], given["v"], attn_mask=given["mask"])}


def gathered(given: Inputs) -> Outputs:
    """Copy the kept rows together, attend, and put the result back where the rows were."""
    q = given["q"]
    where = _spread(given["rows"], q)
    return {"out": torch.zeros_like(q).scatter_(2, where, _attend(given, where))}


def compact(given: Inputs) -> Outputs:
    return {"kept": _attend(given, _spread(given["rows"], given["q"]))}


def eager(given: Inputs) -> Outputs:
    """All scores of all tokens in fp32, an added mask, softmax, second product."""
    q, k, v = given["q"], given["k"], given["v"]
    scores = torch.matmul(q, k.transpose(2, 3)) / q.shape[-1] ** 0.5 + given["bias"]
    return {"out": torch.matmul(torch.softmax(scores, dim=-1), v)}


def with_bias(given: Inputs) -> Inputs:
    mask = with_mask(given)["mask"]
    return {**given, "bias": torch.zeros(mask.shape, dtype=given["q"].dtype).masked_fill_(~mask, -torch.inf)}


def seen(given: Inputs) -> Outputs:
    """Output and importance from the explicit probabilities of kept tokens: what one does without the op."""
    q, k, v, rows = given["q"], given["k"], given["v"], given["rows"]
    where = _spread(rows, q)
    kept_q, kept_k, kept_v = (t.gather(2, where) for t in (q, k, v))
    future = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool).triu_(1)
    scores = (kept_q @ kept_k.mT * q.shape[-1] ** -0.5).masked_fill_(future, -torch.inf)
    weights = scores.softmax(-1)
    out = torch.zeros_like(q).scatter_(2, where, weights @ kept_v)
    received = weights[:, :, -given["asking"].shape[1] :].mean((1, 2))
    importance = torch.zeros(rows.shape[0], q.shape[2], dtype=q.dtype).scatter_(1, rows, received)
    return {"out": out, "kept": out.gather(2, where), "importance": importance}


def _attend(given: Inputs, where: Tensor) -> Tensor:
    q, k, v = (given[name].gather(2, where) for name in "qkv")
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _spread(rows: Tensor, like: Tensor) -> Tensor:
    return rows[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def kept_rows(outputs: Outputs, given: Inputs) -> Outputs:
    """Rows that are not kept are defined for us (zero), not for every peer."""
    where = _spread(given["rows"], given["q"])
    return {name: value.gather(2, where) if name == "out" else value for name, value in outputs.items()}


FULL = {"batch": 1, "heads": 32, "rows": 2048, "kept": 512, "head_dim": 80, "asking": 9}
SMALL = {"batch": 2, "heads": 4, "rows": 48, "kept": 12, "head_dim": 16, "asking": 3}

CASES = (
    Case(
        name="sparse_prefill/quarter",
        op="sparse_prefill",
        title="sparse prefill S=2048, 32 heads of 80, 1/4 kept",
        mode="forward",
        size=FULL,
        small=SMALL,
        inputs=inputs,
        work=work,
        providers=(
            Provider(OURS, fused, ours=True),
            Provider(MASKED, masked, prepare=with_mask),
            Provider(GATHERED, gathered),
            Provider(COMPACT, compact),
            Provider(EAGER, eager, prepare=with_bias),
        ),
        exact=seen,
        plain=GATHERED,
        compared=kept_rows,
        goals=(Goal("speedup", MASKED, at_least=10.0), Goal("speedup", GATHERED, at_least=1.0)),
    ),
    Case(
        name="sparse_prefill/importance",
        op="sparse_prefill",
        title="importance_rows for 9 rows",
        mode="forward",
        size=FULL,
        small=SMALL,
        inputs=inputs,
        work=work,
        providers=(
            Provider(OURS, fused_importance, ours=True),
            Provider(WITHOUT, fused, ours=True),
            Provider(SEEN, seen),
        ),
        exact=seen,
        plain=SEEN,
        compared=kept_rows,
        goals=(Goal("overhead", WITHOUT, at_most=1.15),),
    ),
)
