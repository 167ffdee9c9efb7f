"""Spatial attention pooling: 27x27 tokens of width 1152 to 81, as FlashSloth pools each tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.case import Case, Goal, Inputs, Mode, Outputs, Provider, Size, Work, compiled, ours
from flashsloth_ops import spatial_attention_pool

LOOP = "official-style loop"
SCORES = "vectorised (scores)"
TOKENS = "vectorised (tokens)"
COMPILED = "torch.compile"


def inputs(size: Size) -> Inputs:
    generator = torch.Generator().manual_seed(size["batch"])
    dim, side = size["dim"], size["side"]

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "x": randn(size["batch"], side * side, dim),
        "w1": randn(dim, dim, scale=dim**-0.5),
        "b1": randn(dim, scale=0.1),
        "w2": randn(1, dim, scale=dim**-0.5),
        "b2": randn(1),
        "side": side,
        "window": size["window"],
    }


def forward_work(size: Size) -> Work:
    """One product of all tokens with w1 dominates; x, w1 and y pass once."""
    tokens, dim = size["batch"] * size["side"] ** 2, size["dim"]
    pooled = size["batch"] * (size["side"] // size["window"]) ** 2
    return Work(2.0 * tokens * dim * dim + 6.0 * tokens * dim, tokens * dim + dim * dim + pooled * dim)


def training_work(size: Size) -> Work:
    """Two more products, for dx and for dw1; every tensor and its gradient pass, and x twice."""
    forward = forward_work(size)
    return Work(3 * forward.flops, 3 * forward.elements)


def fused(given: Inputs) -> Outputs:
    side = given["side"]
    y = spatial_attention_pool(
        given["x"], given["w1"], given["b1"], given["w2"], given["b2"], grid=(side, side), window=given["window"]
    )
    assert isinstance(y, Tensor)
    return {"y": y}


def scores_windowed(given: Inputs) -> Outputs:
    """One MLP call over all tokens; only scores are rearranged, and tokens are read where they lie."""
    x, rows, window = given["x"], given["side"] // given["window"], given["window"]
    score = _mlp(x, given).view(-1, rows, window, rows, window).transpose(2, 3)
    weights = score.flatten(3).softmax(-1).unflatten(3, (window, window)).transpose(2, 3)
    weighted = x.view(-1, rows, window, rows, window, x.shape[-1]) * weights.unsqueeze(-1)
    return {"y": weighted.sum((2, 4)).flatten(1, 2)}


def tokens_windowed(given: Inputs) -> Outputs:
    """Tokens are copied into window order first; the rest is then one MLP call and one small product a window."""
    x, rows, window = given["x"], given["side"] // given["window"], given["window"]
    windows = x.view(-1, rows, window, rows, window, x.shape[-1]).transpose(2, 3).reshape(-1, window**2, x.shape[-1])
    weights = _mlp(windows, given).softmax(1)
    return {"y": (weights.transpose(1, 2) @ windows).view(x.shape[0], rows * rows, -1)}


def official_loop(given: Inputs) -> Outputs:
    """A Python loop over regions, rows outside and columns inside, with an MLP call and a softmax for each."""
    x, side, window = given["x"], given["side"], given["window"]
    batch, _, dim = x.shape
    square = x.view(batch, side, side, dim)
    pooled = []
    for top in range(0, side, window):
        for left in range(0, side, window):
            region = square[:, top : top + window, left : left + window].reshape(batch, -1, dim)
            weights = torch.softmax(_mlp(region, given), dim=1)
            pooled.append((weights * region).sum(dim=1))
    return {"y": torch.stack(pooled, dim=1)}


def _mlp(tokens: Tensor, given: Inputs) -> Tensor:
    return linear(torch.relu(linear(tokens, given["w1"], given["b1"])), given["w2"], given["b2"])


SIZE = {"side": 27, "dim": 1152, "window": 3}
SMALL = {"batch": 2, "side": 6, "dim": 64, "window": 3}
PEERS = (
    Provider(LOOP, official_loop),
    Provider(SCORES, scores_windowed),
    Provider(TOKENS, tokens_windowed),
    compiled(scores_windowed),
)


def _case(name: str, title: str, mode: Mode, batches: tuple[int, ...], goals: tuple[Goal, ...], **rest: Any) -> Case:
    return Case(
        name=f"spatial_pool/{name}",
        op="spatial_pool",
        title=title,
        mode=mode,
        sizes=tuple({"batch": batch, **SIZE} for batch in batches),
        small=SMALL,
        inputs=inputs,
        work=forward_work if mode == "forward" else training_work,
        providers=(*ours(fused, reference="axis" not in rest), *rest.pop("peers", PEERS)),
        exact=tokens_windowed,
        plain=SCORES,
        goals=goals,
        differentiable=("x", "w1", "b1", "w2"),  # b2 moves no softmax: its exact gradient is zero
        kept_unit=lambda size: size["batch"] * size["side"] ** 2 * size["dim"],  # the hidden layer
        **rest,
    )


def _no_slower(loop: float) -> tuple[Goal, ...]:
    return (
        Goal("cpu", "speedup", loop, (LOOP,)),
        Goal("cpu", "speedup", 0.95, (SCORES,)),
        Goal("cpu", "speedup", 0.95, (TOKENS,)),
    )


CASES = (
    _case(
        "forward-b1",
        "pool 27x27x1152, one image",
        "forward",
        (1,),
        (
            *_no_slower(4.0),
            Goal("cuda", "seconds", 10e-6),
            Goal("cuda", "speedup", 50.0, (LOOP,)),
            Goal("cuda", "speedup", 3.0, (SCORES, TOKENS)),
            Goal("cuda", "speedup", 1.3, (COMPILED,)),
        ),
    ),
    _case(
        "forward-b64",
        "pool 27x27x1152, 64 images",
        "forward",
        (64,),
        (Goal("cuda", "share", 0.75), Goal("cuda", "speedup", 1.5, (COMPILED,))),
        devices=("cuda",),
    ),
    _case(
        "training-b8",
        "pool 27x27x1152, 8 images, forward and backward",
        "forward+backward",
        (8,),
        (*_no_slower(3.5), Goal("cpu", "kept", 1 / 16)),
        devices=("cpu",),
    ),
    _case(
        "training-b64",
        "pool 27x27x1152, 64 images, forward and backward",
        "forward+backward",
        (64,),
        (Goal("cuda", "speedup", 1.3, (COMPILED,)), Goal("cuda", "kept", 1 / 16)),
        devices=("cuda",),
    ),
    _case(
        "batch",
        "pool 27x27x1152 by images",
        "forward",
        (1, 2, 4, 8, 16, 32, 64, 128, 256),
        (),
        axis="batch",
        peers=(Provider(SCORES, scores_windowed),),
    ),
)
