"""What the demo measures: each fused op beside its peers, and the time to the first token with and without them.

The paths are the providers of the benchmark suite, given what the model itself computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from bench import case as benchmark
from bench.case import Case, Inputs
from bench.cases import embedded_query, sparse_prefill, spatial_pool
from bench.timing import interleave, quantiles
from flashsloth.heatmaps import Seen
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.modules import SpatialAttentionPool
from flashsloth_ops import use_backend

FUSED, PLAIN, OFFICIAL = "fused", "plain PyTorch", "official style"


class OpTimes(NamedTuple):
    """One op: median seconds by path, and the largest difference between the results of any two paths."""

    name: str
    seconds: dict[str, float]
    difference: float


class FirstToken(NamedTuple):
    """Median seconds to the first token, by path: of a new image, and of another question on the same image."""

    new_image: dict[str, float]
    same_image: dict[str, float]


def measure_pooling(model: FlashSlothForConditionalGeneration, features: Tensor, budget: float) -> OpTimes:
    """Pooling of the tower's output ``(tiles, H*W, Di)``; ``budget`` in seconds, like below."""
    peers = {PLAIN: spatial_pool.SCORES, OFFICIAL: spatial_pool.LOOP}
    given = _pooling_inputs(model, features)
    return _measure("spatial_attention_pool", spatial_pool.CASES[0], spatial_pool.fused, peers, given, budget)


def measure_queries(model: FlashSlothForConditionalGeneration, seen: Seen, budget: float) -> OpTimes:
    """The embedded queries of one question, without a stored image state."""
    given = {**seen._asdict(), "params": model.embedded_query.params(), "heads": model.config.query_heads}
    peers = {PLAIN: embedded_query.PLAIN, OFFICIAL: embedded_query.OFFICIAL}
    return _measure("embedded_query_attention", embedded_query.CASES[0], embedded_query.fused, peers, given, budget)


def measure_sparse(size: benchmark.Size, budget: float) -> OpTimes:
    """Sparse prefill on random rows, of which ``size["kept"]`` are kept."""
    case = sparse_prefill.CASES[0]
    peers = {PLAIN: sparse_prefill.MASKED, OFFICIAL: sparse_prefill.EAGER}
    return _measure("token_sparse_prefill", case, sparse_prefill.fused, peers, case.inputs(size), budget)


def _pooling_inputs(model: FlashSlothForConditionalGeneration, features: Tensor) -> Inputs:
    assert isinstance(model.pooling, SpatialAttentionPool)
    hidden, score = model.pooling.mlp["0"], model.pooling.mlp["3"]
    weights = {"w1": hidden.weight, "b1": hidden.bias, "w2": score.weight, "b2": score.bias}
    return {"x": features, **weights, "side": model.config.vision_grid[0], "window": model.config.pool_window}


def _measure(
    name: str,
    case: Case,
    fused: Callable[[Inputs], benchmark.Outputs],
    peers: dict[str, str],
    given: Inputs,
    budget: float,
) -> OpTimes:
    calls, results = {}, []
    providers = {FUSED: benchmark.Provider(FUSED, fused), **{path: case.provider(peer) for path, peer in peers.items()}}
    for path, one in providers.items():
        calls[path] = benchmark.forward(one, benchmark.prepared(one, given))
        outputs = calls[path]()
        results.append(outputs if case.compared is None else case.compared(outputs, given))
    first, *others = (next(iter(outputs.values())) for outputs in results)
    difference = max((first - other).abs().max().item() for other in others)
    times = interleave(calls, budget=budget, min_rounds=3)
    return OpTimes(name, {path: quantiles(times[path]).p50 for path in calls}, difference)


def measure_first_token(
    model: FlashSlothForConditionalGeneration, asked: dict[str, Any], asked_again: dict[str, Any], rounds: int = 3
) -> FirstToken:
    """Seconds from processed inputs to the logits of the answer's first token.

    ``asked`` is a processed question on an image, ``asked_again`` another on the same one. The fused path answers that
    from the encoded image it has; the plain path (the ops in plain PyTorch, SDPA) encodes the image again.
    """
    before = model.config._attn_implementation
    with_context = {name: value for name, value in asked_again.items() if name != "pixel_values"}
    with_context["image_context"] = model(**asked, use_cache=True, logits_to_keep=1).image_context
    runs: dict[tuple[int, str], dict[str, Any]] = {
        (0, FUSED): asked,
        (0, PLAIN): asked,
        (1, FUSED): with_context,
        (1, PLAIN): asked_again,
    }
    times: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
    try:
        for _ in range(rounds):
            for key, inputs in runs.items():
                times[key].append(_seconds(model, inputs, key[1]))
    finally:
        model.set_attn_implementation(before)
    found = ({path: quantiles(times[turn, path]).p50 for path in (FUSED, PLAIN)} for turn in (0, 1))
    return FirstToken(*found)


def _seconds(model: FlashSlothForConditionalGeneration, inputs: dict[str, Any], path: str) -> float:
    model.set_attn_implementation("flashsloth" if path == FUSED else "sdpa")
    forced: Callable[[], Any] = nullcontext if path == FUSED else lambda: use_backend("reference")
    with forced():
        start = time.perf_counter()
        model(**inputs, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start
