"""Calls that stand for all: which kernels run at the sizes that matter, with every option that changes a kernel.

Each case calls functions of ``flashsloth_ops/triton`` with tensors of the meta device. The first case that launches a
kernel is the one that matters most for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    name: str
    call: Callable[[], object]


def cases() -> Iterator[Case]:
    yield from _spatial_pool()
    yield from _embedded_query()
    yield from _sparse_prefill()


def _column(column: str, function: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"flashsloth_ops.triton.{column}"), function)


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# ---- spatial_pool ----


def _spatial_pool() -> Iterator[Case]:
    for batch, dtype in ((64, BF16), (1, BF16), (1, FP32), (64, FP32), (8, BF16), (1, FP16)):
        yield Case(f"pool B={batch} {_short(dtype)}", partial(pool, batch, dtype))
    for dtype in (BF16, FP32):
        yield Case(f"pool B=64 {_short(dtype)} dropout", partial(pool, 64, dtype, dropout=0.1))
        yield Case(f"pool packed {_short(dtype)}", partial(pool, 8, dtype, packed=True))
    yield Case("pool packed bf16 dropout", partial(pool, 8, BF16, dropout=0.1, packed=True))
    yield Case("pool window 2x4 bf16", partial(pool, 8, BF16, window=(2, 4)))
    yield Case("pool odd sizes bf16", partial(pool, 3, BF16, dim=1155, hidden=1003))


def pool(
    batch: int,
    dtype: torch.dtype,
    *,
    dropout: float = 0.0,
    packed: bool = False,
    window: tuple[int, int] = (3, 3),
    dim: int = 1152,
    hidden: int = 1152,
) -> None:
    """Inference, then training forward and backward."""
    side = 27
    windows = -(-side // window[0]) * -(-side // window[1])
    shape = (batch * side * side, dim) if packed else (batch, side * side, dim)
    x, w1 = _empty(*shape, dtype=dtype), _empty(hidden, dim, dtype=dtype)
    b1, w2, b2 = (_empty(n, dtype=dtype) for n in (hidden, hidden, 1))
    grids = _empty(batch, 2, dtype=torch.int64) if packed else None
    sides = (0, 0) if packed else (side, side)
    rows = windows * batch if packed else windows
    seed = _empty(1, dtype=torch.int64) if dropout else None
    forward, backward = (_column("spatial_pool", f) for f in ("spatial_pool", "spatial_pool_backward"))
    if not dropout:
        forward(x, w1, b1, w2, b2, grids, *sides, rows, *window, 0.0, None, False)
    y, weights, mask = forward(x, w1, b1, w2, b2, grids, *sides, rows, *window, dropout, seed, True)
    for dweights in (None, weights) if batch == 64 else (None,):
        backward(y, dweights, x, w1, b1, w2, weights, mask, grids, *sides, *window, dropout, True, True)


# ---- embedded_query ----


def _embedded_query() -> Iterator[Case]:
    for images, dtype in ((1, BF16), (64, BF16), (1, FP32), (64, FP32), (1, FP16)):
        yield Case(f"query B={images} {_short(dtype)}", partial(query, images, 1, 729, dtype))
    yield Case("query text lengths bf16", partial(query, 8, 1, 729, BF16, lengths=True))
    yield Case("query 4 questions bf16", partial(query, 2, 4, 729, BF16))
    yield Case("query 3645 tokens bf16", partial(query, 1, 1, 3645, BF16))
    yield Case("query 48 inner 8 heads bf16", partial(query, 2, 1, 100, BF16, inner=48, heads=8, dim=64, model=80))


def query(
    images: int,
    questions: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    inner: int = 576,
    heads: int = 32,
    dim: int = 1152,
    model: int = 2560,
    lengths: bool = False,
) -> None:
    """The state of the images; inference; training forward and backward."""
    from flashsloth_ops.embedded_query import EmbeddedQueryParams

    batch, empty = images * questions, partial(_empty, dtype=dtype)
    widths = {"down_text": (inner, model), "down_image": (inner, dim), "i2q_v": (dim, dim), "up": (model, dim)}
    fields = {}
    for field in EmbeddedQueryParams._fields:
        module, _, kind = field.rpartition("_")
        shape = widths.get(module, (inner, inner))
        fields[field] = empty(*shape) if kind == "weight" and not module.startswith("ln") else empty(shape[0])
    params = EmbeddedQueryParams(**fields)
    state_of, forward, backward = (
        _column("embedded_query", f) for f in ("image_state", "embedded_query", "embedded_query_backward")
    )
    image = empty(images, tokens, dim)
    state = state_of(image, params.down_image_weight, params.down_image_bias, 1e-5)
    query, text, used = empty(batch, 9, model), empty(batch, 32, model), params._kernel_params()
    inputs = (query, text, _empty(batch, dtype=torch.int64) if lengths else None, image, *state, used)
    forward(*inputs, heads, 1e-5, False, False)
    out, _, *saved = forward(*inputs, heads, 1e-5, True, True)
    backward(out, *inputs, *saved, heads, 1e-5, True, True, True)


# ---- sparse_prefill ----


def _sparse_prefill() -> Iterator[Case]:
    for dim in (80, 72, 128, 64, 96, 256):
        yield Case(f"prefill d={dim} causal bf16", partial(prefill, dim, BF16, sparse=False, causal=True))
        yield Case(f"prefill d={dim} dense bf16", partial(prefill, dim, BF16, sparse=False, causal=False))
        yield Case(f"prefill d={dim} kept bf16", partial(prefill, dim, BF16, sparse=True, causal=True))
    yield Case("prefill d=80 lse bf16", partial(prefill, 80, BF16, sparse=False, causal=True, lse_gradient=True))
    yield Case("prefill d=80 kept dense bf16", partial(prefill, 80, BF16, sparse=True, causal=False))
    yield Case("prefill d=128 GQA kept bf16", partial(prefill, 128, BF16, sparse=True, causal=True, kv_heads=8))
    yield Case("prefill d=80 few rows bf16", partial(prefill, 80, BF16, sparse=False, causal=True, rows=9, keys=4096))
    yield Case("prefill d=80 packed bf16", partial(prefill, 80, BF16, sparse=True, causal=True, packed=True))
    yield Case("prefill d=80 causal fp16", partial(prefill, 80, FP16, sparse=False, causal=True))
    for dim in (80, 64, 128, 256):
        yield Case(f"prefill d={dim} kept fp32", partial(prefill, dim, FP32, sparse=True, causal=True))
    yield Case("prefill d=40 causal bf16", partial(prefill, 40, BF16, sparse=False, causal=True))


def prefill(
    dim: int,
    dtype: torch.dtype,
    *,
    sparse: bool,
    causal: bool,
    kv_heads: int = 32,
    rows: int = 2048,
    keys: int = 2048,
    packed: bool = False,
    lse_gradient: bool = False,
) -> None:
    """Forward, with importance as well, and backward."""
    batch, heads = 1 if packed else 2, 32

    def heads_of(length: int, count: int) -> Tensor:
        """As a model's projections lie in memory: rows before heads."""
        if packed:
            return _empty(length, count, dim, dtype=dtype)
        return _empty(batch, length, count, dim, dtype=dtype).transpose(1, 2)

    q, k, v = heads_of(rows, heads), heads_of(keys, kv_heads), heads_of(keys, kv_heads)
    sequences = 4 if packed else batch
    fields = (_empty(batch * keys // 4, dtype=torch.int32), _empty(sequences + 1, dtype=torch.int32), None, keys // 4)
    index = (*fields, *fields) if sparse else (None, None, None, 0) * 2
    forward, backward = (_column("sparse_prefill", f) for f in ("sparse_prefill", "sparse_prefill_backward"))
    scale = dim**-0.5
    asking = _empty(9, dtype=torch.int64)
    out, lse, _ = forward(q, k, v, *index, causal, scale, None)
    forward(q, k, v, *index, causal, scale, asking)
    backward(out, lse if lse_gradient else None, q, k, v, out, lse, *index, causal, scale)


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
