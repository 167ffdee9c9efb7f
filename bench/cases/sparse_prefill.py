"""Sparse prefill: heads of 80 (phi-2), all rows kept or some, and the attention of the vision tower (heads of 72)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case, Goal, Inputs, Outputs, Provider, Size, Work, ours
from bench.cases.attention import ATTENTIONS, BEST_SDPA, Attention
from flashsloth_ops import TokenIndex, token_sparse_prefill

SAMPLED = "plain PyTorch, sampled rows"
MASKED = "masked SDPA on all tokens"
GATHERED = "gather + SDPA"
COMPACT = "gather + SDPA, not put back"
EAGER = "official style, all tokens"
WEIGHTS = "eager with weights"
ALL_KEPT, WITHOUT = "all kept", "without importance"

CHECKED_ROWS = 1024  # of longer sequences the check takes this many rows
LARGEST_MATRIX = 8 << 30  # bytes of scores or masks that a peer may form


def inputs(size: Size) -> Inputs:
    """``index`` is None where all rows are kept; ``rows`` lists them, ``checked`` those the check looks at."""
    generator = torch.Generator().manual_seed(size["rows"])
    shape = size["batch"], size["heads"], size["rows"], size["head_dim"]
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    given: Inputs = {"q": q, "k": k, "v": v, "causal": bool(size.get("causal", 1)), "index": None}
    if size["kept"] < size["rows"]:
        scores = torch.rand(size["batch"], size["rows"], generator=generator)
        given["index"] = TokenIndex.from_topk(scores, size["kept"])
        rows = given["index"].indices.view(size["batch"], -1).long()
    else:
        rows = torch.arange(size["rows"]).expand(size["batch"], -1)
    asking = size.get("asking", 1)
    some = torch.randperm(size["kept"], generator=generator)[: CHECKED_ROWS - asking]
    last = torch.arange(size["kept"] - asking, size["kept"])
    checked = torch.cat([some[some < size["kept"] - asking].sort().values, last])
    return {**given, "rows": rows.contiguous(), "asking": rows[:, -asking:].contiguous(), "checked": checked}


def work(size: Size) -> Work:
    """Two products over kept times kept, half of it where causal; kept rows are read, all rows are written."""
    batch, heads, kept, dim = size["batch"], size["heads"], size["kept"], size["head_dim"]
    pairs = kept * (kept + 1) / 2 if size.get("causal", 1) else kept**2
    return Work(4.0 * batch * heads * pairs * dim, float(batch * heads * dim * (3 * kept + size["rows"])))


def training_work(size: Size) -> Work:
    """Backward takes the scores again and four more products, so five halves of forward; each gradient is written."""
    forward = work(size)
    return Work(3.5 * forward.flops, 3 * forward.elements)


# ---- ours ----


def fused(given: Inputs) -> Outputs:
    out = token_sparse_prefill(given["q"], given["k"], given["v"], given["index"], causal=given["causal"])
    assert isinstance(out, Tensor)
    return {"out": out}


def fused_all(given: Inputs) -> Outputs:
    out = token_sparse_prefill(given["q"], given["k"], given["v"], causal=given["causal"])
    assert isinstance(out, Tensor)
    return {"all": out}


def fused_importance(given: Inputs) -> Outputs:
    out, importance = token_sparse_prefill(
        given["q"], given["k"], given["v"], given["index"], causal=given["causal"], importance_rows=given["asking"]
    )
    return {"out": out, "importance": importance}


# ---- peers ----


def gathered(attend: Callable[[Tensor, Tensor, Tensor, bool], Tensor]) -> Callable[[Inputs], Outputs]:
    """Copy the kept rows together, attend, and put the result back where the rows were; nothing of that if all are."""

    def call(given: Inputs) -> Outputs:
        q, k, v = given["q"], given["k"], given["v"]
        if given["index"] is None:
            return {"out": attend(q, k, v, given["causal"])}
        where = spread(given["rows"], q)
        out = attend(q.gather(2, where), k.gather(2, where), v.gather(2, where), given["causal"])
        return {"out": torch.zeros_like(q).scatter_(2, where, out)}

    return call


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Whichever backend torch chooses."""
    return scaled_dot_product_attention(q, k, v, is_causal=causal)


def compact(given: Inputs) -> Outputs:
    where = spread(given["rows"], given["q"])
    q, k, v = (given[name].gather(2, where) for name in "qkv")
    return {"kept": sdpa(q, k, v, given["causal"])}


def with_mask(given: Inputs) -> Inputs:
    """Mask of the kept keys a row may see. A row that is not kept gets what causality gives; nobody reads it."""
    q, rows = given["q"], given["rows"]
    kept = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device).scatter_(1, rows, True)
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril_()
    own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)  # no row is without a key
    return {**given, "mask": (causal & (kept[:, None, :] | own))[:, None]}


def masked(given: Inputs) -> Outputs:
    return {"out": scaled_dot_product_attention(given["q"], given["k"], given["v"], attn_mask=given["mask"])}


def with_bias(given: Inputs) -> Inputs:
    mask = with_mask(given)["mask"]
    bias = torch.zeros(mask.shape, dtype=given["q"].dtype, device=mask.device)
    return {**given, "bias": bias.masked_fill_(~mask, -torch.inf)}


def eager(given: Inputs) -> Outputs:
    """All scores of all tokens in fp32, an added mask, softmax, second product."""
    q, k, v = given["q"], given["k"], given["v"]
    scores = torch.matmul(q, k.transpose(2, 3)) / q.shape[-1] ** 0.5 + given["bias"]
    wide = torch.promote_types(q.dtype, torch.float32)
    return {"out": torch.matmul(torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype), v)}


def with_weights(given: Inputs) -> Outputs:
    """Attention that returns its weights, as methods that prune tokens run it: output and importance of kept rows."""
    q, k, v, rows = given["q"], given["k"], given["v"], given["rows"]
    where = None if given["index"] is None else spread(rows, q)
    kept_q, kept_k, kept_v = (t if where is None else t.gather(2, where) for t in (q, k, v))
    future = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=q.device).triu_(1)
    scores = (kept_q @ kept_k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
    weights = scores.softmax(-1)
    received = weights[:, :, -given["asking"].shape[1] :].to(_wide(q)).mean((1, 2))
    out = weights @ kept_v
    if where is not None:
        out = torch.zeros_like(q).scatter_(2, where, out)
    return {"out": out, "importance": _received(received, given)}


# ---- the check ----


def sampled(given: Inputs) -> Outputs:
    """The rows that are checked, by explicit probabilities."""
    out, received = _rows_of(given, given["rows"])
    return {"out": out, "kept": out, "importance": _received(received, given)}


def sampled_all(given: Inputs) -> Outputs:
    """The same, and the same rows with no key left out."""
    everything = torch.arange(given["q"].shape[2], device=given["q"].device).expand(given["q"].shape[0], -1)
    return sampled(given) | {"all": _rows_of(given, everything)[0]}


def explicit(given: Inputs) -> Outputs:
    """All rows, by explicit probabilities."""
    return {"out": with_weights(given)["out"]}


def _rows_of(given: Inputs, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that are checked over the keys at these positions, and the mean attention of the asking ones to each.

    A head at a time, so that long sequences fit in memory.
    """
    q, rows = given["q"], given["rows"][:, given["checked"]]
    future = keys[:, None, :] > rows[:, :, None]
    outs, received = [], []
    for head in range(q.shape[1]):
        asked, k, v = (
            given[name][:, head].gather(1, which[:, :, None].expand(-1, -1, q.shape[3]))
            for name, which in (("q", rows), ("k", keys), ("v", keys))
        )
        scores = (asked @ k.mT) * q.shape[-1] ** -0.5
        weights = (scores.masked_fill(future, -torch.inf) if given["causal"] else scores).softmax(-1)
        outs.append(weights @ v)
        received.append(weights[:, -given["asking"].shape[1] :].to(_wide(q)).mean(1))
    return torch.stack(outs, 1), torch.stack(received).mean(0)


def compared(outputs: Outputs, given: Inputs) -> Outputs:
    """The rows that are checked, of each output. Rows not kept are defined for us (zero), not for every peer."""
    checked = given["checked"]
    where = spread(given["rows"][:, checked], given["q"])
    found = {}
    for name, value in outputs.items():
        if name not in ("out", "all", "kept") or value.shape[2] == checked.shape[0]:
            found[name] = value  # importance, gradients, and what was computed for those rows only
        else:
            found[name] = value[:, :, checked] if name == "kept" else value.gather(2, where)
    return found


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _received(received: Tensor, given: Inputs) -> Tensor:
    """Importance by original position."""
    found = torch.zeros(given["q"].shape[0], given["q"].shape[2], dtype=received.dtype, device=received.device)
    return found.scatter_(1, given["rows"], received)


def spread(rows: Tensor, like: Tensor) -> Tensor:
    """Row numbers ``(B, n)`` as an index into ``(B, H, S, d)``."""
    return rows[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


# ---- cases ----


def _matrix(copies: int) -> Callable[[str, Size], str | None]:
    """Why a provider that forms ``copies`` matrices of rows by rows cannot run."""

    def missing(device: str, size: Size) -> str | None:
        formed = copies * size["batch"] * size["rows"] ** 2 * (2 if device == "cuda" else 4)
        return f"would form {formed / 2**30:.0f} GiB of scores" if formed > LARGEST_MATRIX else None

    return missing


def _peer(one: Attention) -> Provider:
    return Provider(one.name, gathered(one.attend), missing=lambda device, size: one.missing(device))


HEADS = 32
CHECK = Provider(SAMPLED, sampled, timed=False)
PEERS = tuple(_peer(one) for one in ATTENTIONS)
BEST_PEERS = tuple(peer for peer in PEERS if peer.name in BEST_SDPA)
SMALL = {"batch": 2, "heads": 2, "rows": 96, "kept": 24, "head_dim": 80, "asking": 3}
SHARES = (1, 2, 4, 9)  # one row of so many is kept
LENGTHS = tuple(2**n for n in range(8, 18))


def _size(rows: int, share: int, **rest: int) -> dict[str, int]:
    return {"batch": 1, "heads": HEADS, "rows": rows, "kept": rows // share, "head_dim": 80, "asking": 9, **rest}


def _case(name: str, title: str, sizes: tuple[dict[str, int], ...], goals: tuple[Goal, ...], **rest: Any) -> Case:
    defaults = {"small": SMALL, "exact": sampled, "providers": (*ours(fused), *PEERS), "mode": "forward", "work": work}
    rest = {**defaults, **rest}
    rest["providers"] = (*rest["providers"], replace(CHECK, run=rest["exact"]))
    return Case(
        name=f"sparse_prefill/{name}",
        op="sparse_prefill",
        title=title,
        sizes=sizes,
        inputs=inputs,
        plain=SAMPLED,
        goals=goals,
        compared=compared,
        **rest,
    )


CASES = (
    _case(
        "quarter-2k",
        "prefill of 2048 tokens, a quarter kept",
        (_size(2048, 4),),
        (Goal("cpu", "speedup", 10.0, (MASKED,)), Goal("cpu", "speedup", 1.0, (GATHERED,))),
        providers=(
            *ours(fused),
            Provider(MASKED, masked, prepare=with_mask, missing=_matrix(1)),
            Provider(GATHERED, gathered(sdpa)),
            Provider(COMPACT, compact),
            Provider(EAGER, eager, prepare=with_bias, missing=_matrix(HEADS)),
        ),
    ),
    _case(
        "importance",
        "prefill of 2048 tokens, a quarter kept, with importance for 9 rows",
        (_size(2048, 4),),
        (
            Goal("cpu", "overhead", 1.15, (WITHOUT,)),
            Goal("cuda", "overhead", 1.10, (WITHOUT,)),
            Goal("cuda", "speedup", 5.0, (WEIGHTS,)),
        ),
        providers=(
            *ours(fused_importance),
            *ours(fused, WITHOUT),
            Provider(WEIGHTS, with_weights, missing=_matrix(HEADS)),
        ),
    ),
    _case(
        "quarter-8k",
        "prefill of 8192 tokens, a quarter kept",
        (_size(8192, 4),),
        (
            Goal("cuda", "speedup", 0.85 * 16, (ALL_KEPT,)),  # pairs fall by 4 squared
            Goal("cuda", "speedup", 1.0, BEST_SDPA),
        ),
        providers=(*ours(fused), *ours(fused_all, ALL_KEPT), *PEERS),
        exact=sampled_all,
        devices=("cuda",),
    ),
    _case(
        "tower",
        "attention of the vision tower, 729 tokens, 8 images",
        (_size(729, 1, batch=8, heads=16, head_dim=72, causal=0),),
        (Goal("cuda", "speedup", 1.1, BEST_SDPA),),
        small={**SMALL, "kept": 96, "head_dim": 72, "causal": 0},
    ),
    _case(
        "training-2k",
        "prefill of 2048 tokens, a quarter kept, forward and backward",
        (_size(2048, 4),),
        (),
        mode="forward+backward",
        work=training_work,
        providers=(*ours(fused), Provider(GATHERED, gathered(sdpa)), Provider(WEIGHTS, explicit)),
        exact=explicit,
        differentiable=("q", "k", "v"),
        stored=8 * 2.0**-24,  # backward takes exp(score - lse) of an lse, below 8 here, that was rounded to fp32
    ),
    _case(
        "rows",
        "prefill by tokens and share kept",
        tuple(_size(rows, share) for share in SHARES for rows in LENGTHS),
        tuple(
            Goal("cuda", "speedup", 1.15 if rows == 16384 else 1.0, BEST_SDPA, size={"rows": rows, "kept": rows})
            for rows in LENGTHS
            if 512 <= rows <= 16384
        ),
        axis="rows",
        providers=(*ours(fused, reference=False), *BEST_PEERS),
    ),
)
