"""What is timed on a GPU and what must be reached there: the full sizes of FlashSloth in bf16, and their small forms.

The declarations of the CPU suite with other sizes, peers and goals. Peers of attention are the backends of
``scaled_dot_product_attention``, each by itself. Goals hold for the fastest of our backends that passed its check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case, Inputs, Mode, Outputs, Provider, Size, Work
from bench.cases import embedded_query as query
from bench.cases import sparse_prefill as prefill
from bench.cases import spatial_pool as pool
from flashsloth_ops import TokenIndex, token_sparse_prefill, use_backend

COMPILED = "torch.compile"
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ALL_KEPT = "ours, all kept"
PLAIN_ATTENTION = "plain PyTorch"
EAGER = "eager with weights"


@dataclass(frozen=True)
class GpuGoal:
    """What the fastest of our backends must reach.

    ``speedup``: time of the fastest of ``peers`` over ours, at least. ``overhead``: ours over the fastest of ``peers``,
    at most. ``seconds``: our time, at most. ``share``: of the measured limit, at least. ``kept``: bytes that stay for
    backward over those of the plain path, at most.
    """

    kind: Literal["speedup", "overhead", "seconds", "share", "kept"]
    limit: float
    peers: tuple[str, ...] = ()

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.kind in ("speedup", "share") else value <= self.limit

    @property
    def text(self) -> str:
        peers = " or ".join(self.peers)
        if self.kind == "speedup":
            return f"{self.limit:.3g}x {peers}"
        if self.kind == "overhead":
            return f"{100 * (self.limit - 1):.0f} % over {peers} at most"
        if self.kind == "seconds":
            return f"{self.limit * 1e6:.3g} us or less"
        return f"{100 * self.limit:.0f} % of the limit" if self.kind == "share" else f"{self.limit:.4g} kept"


@dataclass(frozen=True)
class GpuCase:
    """A case of the suite with what it must reach on a GPU."""

    case: Case
    gpu_goals: tuple[GpuGoal, ...]


def ours(run: Callable[[Inputs], Outputs], backends: tuple[str, ...] = ("triton", "cuda")) -> tuple[Provider, ...]:
    """The op by each of its GPU backends."""

    def forced(name: str) -> Callable[[Inputs], Outputs]:
        def call(given: Inputs) -> Outputs:
            with use_backend(name):
                return run(given)

        return call

    return tuple(Provider(f"flashsloth, {name}", forced(name), ours=True) for name in backends)


def compiled(run: Callable[[Inputs], Outputs]) -> Provider:
    """The plain path through torch.compile, compiled at its first call."""
    found: list[Callable[[Inputs], Outputs]] = []

    def call(given: Inputs) -> Outputs:
        if not found:
            found.append(torch.compile(run, fullgraph=True, dynamic=False))
        return found[0](given)

    return Provider(COMPILED, call)


# ---- pooling ----


def _pool(name: str, mode: Mode, batch: int, goals: tuple[GpuGoal, ...], backends: tuple[str, ...]) -> GpuCase:
    peers = [Provider(pool.SCORES, pool.scores_windowed), compiled(pool.scores_windowed)]
    if batch == 1:
        peers += [Provider(pool.TOKENS, pool.tokens_windowed), Provider(pool.LOOP, pool.official_loop)]
    base = pool.CASES[0]
    case = replace(
        base,
        name=f"spatial_pool/{name}",
        title=f"pool 27x27x1152, B={batch}, {mode}",
        mode=mode,
        size={**base.size, "batch": batch},
        work=pool.forward_work if mode == "forward" else pool.training_work,
        providers=(*ours(pool.fused, backends), *peers),
        goals=(),
    )
    return GpuCase(case, goals)


VECTORISED = (pool.SCORES, pool.TOKENS)

POOL = (
    _pool(
        "b1",
        "forward",
        1,
        (
            GpuGoal("seconds", 10e-6),
            GpuGoal("speedup", 50.0, (pool.LOOP,)),
            GpuGoal("speedup", 3.0, VECTORISED),
            GpuGoal("speedup", 1.3, (COMPILED,)),
        ),
        ("triton", "cuda"),
    ),
    _pool("b64", "forward", 64, (GpuGoal("share", 0.75), GpuGoal("speedup", 1.5, (COMPILED,))), ("triton",)),
    _pool("b64-training", "forward+backward", 64, (GpuGoal("speedup", 1.3, (COMPILED,)),), ("triton",)),
    _pool("b64-memory", "memory", 64, (GpuGoal("kept", 1 / 16),), ("triton",)),
)


# ---- the query module ----


def _query(batch: int, goals: tuple[GpuGoal, ...], backends: tuple[str, ...]) -> GpuCase:
    base = query.CASES[0]
    case = replace(
        base,
        name=f"embedded_query/b{batch}",
        title=f"query module, 729 image tokens, B={batch}",
        size={**base.size, "images": batch},
        providers=(*ours(query.fused, backends), Provider(query.PLAIN, query.plain), compiled(query.plain)),
        goals=(),
    )
    return GpuCase(case, goals)


QUERY = (
    _query(
        1,
        (
            GpuGoal("seconds", 30e-6),
            GpuGoal("speedup", 10.0, (query.PLAIN,)),
            GpuGoal("speedup", 3.0, (COMPILED,)),
        ),
        ("triton", "cuda"),
    ),
    _query(64, (GpuGoal("speedup", 1.7, (query.PLAIN, COMPILED)),), ("triton",)),
)


# ---- sparse prefill ----


def attention_inputs(size: Size) -> Inputs:
    """As the suite's, for dense attention too: ``kept`` equal to ``rows`` has no index."""
    given = prefill.inputs(size)
    if size["kept"] == size["rows"]:
        given["index"] = None
    return {**given, "causal": bool(size["causal"])}


def attention_work(size: Size) -> Work:
    found = prefill.work(size)
    pairs = size["kept"] * (size["kept"] + 1) / 2 if size["causal"] else size["kept"] ** 2
    return found._replace(flops=4.0 * size["batch"] * size["heads"] * pairs * size["head_dim"])


def fused(given: Inputs) -> Outputs:
    index: TokenIndex | None = given["index"]
    out = token_sparse_prefill(given["q"], given["k"], given["v"], index, causal=given["causal"])
    assert isinstance(out, Tensor)
    return {"out": out}


def fused_all(given: Inputs) -> Outputs:
    out = token_sparse_prefill(given["q"], given["k"], given["v"], causal=given["causal"])
    assert isinstance(out, Tensor)
    return {"all": out}


def fused_importance(given: Inputs) -> Outputs:
    rows = given["asking"]
    out, importance = token_sparse_prefill(
        given["q"], given["k"], given["v"], given["index"], causal=given["causal"], importance_rows=rows
    )
    return {"out": out, "importance": importance}


def sdpa(backend: SDPBackend) -> Callable[[Inputs], Outputs]:
    """One backend of SDPA on the rows that are kept, gathered and put back where there is an index."""

    def call(given: Inputs) -> Outputs:
        q, k, v = given["q"], given["k"], given["v"]
        where = None if given["index"] is None else prefill._spread(given["rows"], q)
        if where is not None:
            q, k, v = (t.gather(2, where) for t in (q, k, v))
        with sdpa_kernel([backend]):
            out = scaled_dot_product_attention(q, k, v, is_causal=given["causal"])
        return {"out": out if where is None else torch.zeros_like(given["q"]).scatter_(2, where, out)}

    return call


def plain_attention(given: Inputs) -> Outputs:
    """All probabilities, a head at a time so that the exact result of a long sequence fits in memory too."""
    q, k, v = given["q"], given["k"], given["v"]
    dense = given["index"] is None
    where = None if dense else prefill._spread(given["rows"], q)
    kept = (q, k, v) if where is None else tuple(t.gather(2, where) for t in (q, k, v))
    outs, received = [], []
    rows = kept[0].shape[2]
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1) if given["causal"] else None
    for head in range(q.shape[1]):
        one_q, one_k, one_v = (t[:, head] for t in kept)
        scores = (one_q @ one_k.mT) * q.shape[-1] ** -0.5
        if future is not None:
            scores = scores.masked_fill_(future, -torch.inf)
        weights = scores.softmax(-1)
        outs.append(weights @ one_v)
        received.append(weights[:, -given["asking"].shape[1] :].mean(1))
    out, seen = torch.stack(outs, 1), torch.stack(received).mean(0)
    if where is not None:
        out = torch.zeros_like(q).scatter_(2, where, out)
        seen = torch.zeros_like(q[:, 0, :, 0]).scatter_(1, given["rows"], seen)
    found = {"out": out, "importance": seen.to(torch.promote_types(seen.dtype, torch.float32))}
    if dense:
        found["all"] = out
    return found


def eager(given: Inputs) -> Outputs:
    """Attention that returns its weights, as methods that prune tokens run it; every head at once."""
    q, k, v = given["q"], given["k"], given["v"]
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu_(1)
    weights = ((q @ k.mT) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
    received = weights[:, :, -given["asking"].shape[1] :].float().mean((1, 2))
    return {"out": weights @ v, "importance": received}


def attention(given: Inputs) -> Outputs:
    """What every provider of an attention case is held to: output, importance, and the output with all rows kept."""
    found = plain_attention(given)
    if "all" not in found and given["all_kept"]:
        everything = {**given, "index": None, "rows": None}
        found["all"] = plain_attention(everything)["all"]
    return found


def kept_rows(outputs: Outputs, given: Inputs) -> Outputs:
    return outputs if given["index"] is None else prefill.kept_rows(outputs, given)


def _attention(
    name: str,
    title: str,
    size: dict[str, int],
    goals: tuple[GpuGoal, ...],
    providers: tuple[Provider, ...],
    *,
    all_kept: bool = False,
) -> GpuCase:
    size = {"heads": 32, "head_dim": 80, "asking": 9, "causal": 1, **size}
    small = {**size, "batch": min(size["batch"], 2), "heads": 2, "rows": 96, "asking": 3}
    small["kept"] = small["rows"] * size["kept"] // size["rows"]
    case = Case(
        name=f"sparse_prefill/{name}",
        op="sparse_prefill",
        title=title,
        mode="forward",
        size=size,
        small=small,
        inputs=lambda wanted: {**attention_inputs(wanted), "all_kept": all_kept},
        work=attention_work,
        providers=(*providers, Provider(PLAIN_ATTENTION, attention)),
        exact=attention,
        plain=PLAIN_ATTENTION,
        goals=(),
        compared=kept_rows,
    )
    return GpuCase(case, goals)


SDPA_PEERS = tuple(Provider(name, sdpa(backend)) for name, backend in SDPA.items())
BEST_SDPA = tuple(SDPA)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
ALL_KEPT_PROVIDERS = tuple(replace(p, name=f"{ALL_KEPT}, {p.name.split(', ')[1]}") for p in ours(fused_all))


def _kept_all(rows: int) -> GpuCase:
    return _attention(
        f"s{rows}",
        f"prefill, head 80, S={rows}, causal, all kept",
        {"batch": 1, "rows": rows, "kept": rows},
        (GpuGoal("speedup", 1.15 if rows == 16384 else 1.0, BEST_SDPA),),
        (*ours(fused), *SDPA_PEERS),
    )


PREFILL = (
    *(_kept_all(rows) for rows in LENGTHS),
    _attention(
        "quarter",
        "prefill, head 80, S=8192, causal, a quarter kept",
        {"batch": 1, "rows": 8192, "kept": 2048},
        (
            GpuGoal("speedup", 0.85 * 16, tuple(p.name for p in ALL_KEPT_PROVIDERS)),  # pairs fall by 4 squared
            GpuGoal("speedup", 1.0, BEST_SDPA),
        ),
        (*ours(fused), *ALL_KEPT_PROVIDERS, *SDPA_PEERS),
        all_kept=True,
    ),
    _attention(
        "tower",
        "attention of the vision tower, head 72, 729 tokens, B=8, not causal",
        {"batch": 8, "heads": 16, "head_dim": 72, "rows": 729, "kept": 729, "causal": 0},
        (GpuGoal("speedup", 1.1, BEST_SDPA),),
        (*ours(fused), *SDPA_PEERS),
    ),
    _attention(
        "importance",
        "prefill, head 80, S=2048, importance for 9 rows",
        {"batch": 1, "rows": 2048, "kept": 2048},
        (
            GpuGoal("overhead", 1.10, tuple(f"without, {name}" for name in ("triton", "cuda"))),
            GpuGoal("speedup", 5.0, (EAGER,)),
        ),
        (
            *ours(fused_importance),
            *(replace(p, name=f"without, {p.name.split(', ')[1]}") for p in ours(fused)),
            Provider(EAGER, eager),
        ),
    ),
)

GPU_CASES: tuple[GpuCase, ...] = (*POOL, *QUERY, *PREFILL)
