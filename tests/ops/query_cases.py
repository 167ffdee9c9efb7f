"""What the tests of embedded_query_attention share: inputs, calls of the op, the official cases, the error rule."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import EmbeddedQueryParams, ImageState, embedded_query_attention, use_backend
from flashsloth_ops import embedded_query as module
from tests.support import Golden, assert_error_rule, gradients

# The softmax does not see a shift of all scores of a row: these gradients are exactly zero.

UNSEEN = ("t2q_k_bias", "i2q_k_bias", "ln_kv_bias")


NAMES = ("query", "text", "image", *EmbeddedQueryParams._fields)


def make(
    batch: int = 4,
    images: int = 2,
    tokens: int = 50,
    *,
    queries: int = 3,
    text: int = 6,
    heads: int = 4,
    model: int = 20,
    inner: int = 24,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """query, text, image and the 24 weights, with scores of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    def linear(out: int, into: int) -> list[Tensor]:
        return [normal(out, into, scale=max(into, 1) ** -0.5), normal(out, scale=0.3)]

    inputs = [normal(batch, queries, model), normal(batch, text, model), normal(images, tokens, dim)]
    weights = [*linear(inner, model), *linear(inner, dim)]
    for _ in range(3):
        weights += [normal(inner, scale=0.3, shift=1.0), normal(inner, scale=0.3)]
    for _ in range(5):
        weights += linear(inner, inner)
    return [*inputs, *weights, *linear(dim, dim), *linear(model, dim)]


def attend(*args: Tensor, heads: int = 4, **options: Any) -> Any:
    query, text, image, *weights = args
    lengths = options.get("text_lengths")
    if isinstance(lengths, Tensor):
        options["text_lengths"] = lengths.to(query.device)
    return embedded_query_attention(query, text, image, EmbeddedQueryParams(*weights), num_heads=heads, **options)


def each_dtype(places: Iterable[Any]) -> list[Any]:
    """(place, dtype) for every dtype that a place is tested in."""
    return [
        pytest.param(place, dtype, marks=param.marks, id=f"{param.id}-{str(dtype).removeprefix('torch.')}")
        for param in places
        for place in param.values
        for dtype in place.dtypes
    ]


def official_inputs(golden: Golden, device: str = "cpu") -> list[Tensor]:
    io = golden.io
    if "image_tokens" in io:
        image = io["image_tokens"]
    else:  # five tiles made of one, as the case's meta.json says
        scales = (1, -0.5, 0.75, 1.25, -1.5)
        parts = [torch.roll(io["image_base"], 7 * k, dims=-1) * scale for k, scale in enumerate(scales)]
        image = torch.cat(parts, dim=1)
    params = EmbeddedQueryParams.from_state_dict(golden.weights)
    return [
        t.to(device, copy=True).requires_grad_() for t in (io["learnable_tokens"], io["text_tokens"], image, *params)
    ]


def check_official(golden: Golden, inputs: list[Tensor], lengths: list[int] | None) -> None:
    text_lengths = None if lengths is None else torch.tensor(lengths)
    out, weights = attend(*inputs, text_lengths=text_lengths, return_weights=True)
    golden.check("out", out.cpu(), 1e-5)
    golden.check("attention_map", weights.cpu(), 1e-5)
    found = torch.autograd.grad(out, inputs, golden.io["g"].to(out.device))
    grads = dict(zip(NAMES, (g.cpu() for g in found), strict=True))
    golden.check("grad.learnable_tokens", grads["query"], 2e-5)
    golden.check("grad.text_tokens", grads["text"], 2e-5)
    golden.check("grad.image_tokens", grads["image"], 2e-5)
    for field in EmbeddedQueryParams._fields:
        step, _, kind = field.rpartition("_")
        if field in UNSEEN:  # the official code leaves its rounding there
            weight = grads[f"{step}_weight"]
            assert grads[field].abs().max() <= 2e-5 * weight.abs().max() if weight.any() else not grads[field].any()
        else:
            golden.check(f"grad.{module._MODULES[step]}.{kind}", grads[field], 2e-5)


def naive(args: list[Tensor], heads: int, lengths: list[int], eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Numbers, loops and sums in fp64: nothing shared with the code under test."""
    query, text, image, *weights = (t.double() for t in args)
    p = EmbeddedQueryParams(*weights)
    batch, queries, _ = query.shape
    images, tokens, dim = image.shape
    inner = len(p.down_text_bias)
    d, dv = inner // heads, dim // heads

    def project(row: Tensor, name: str) -> Tensor:
        return getattr(p, name + "_weight") @ row + getattr(p, name + "_bias")

    def norm(row: Tensor, name: str) -> Tensor:
        mean = row.sum() / inner
        spread = ((row - mean) ** 2).sum() / inner
        return (row - mean) / torch.sqrt(spread + eps) * getattr(p, name + "_weight") + getattr(p, name + "_bias")

    def look(q: Tensor, keys: list[Tensor], values: list[Tensor], size: int, width: int) -> tuple[Tensor, Tensor]:
        out, mean = torch.zeros(heads * width, dtype=torch.float64), torch.zeros(len(keys), dtype=torch.float64)
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = torch.tensor([float(q[part] @ k[part]) / size**0.5 for k in keys], dtype=torch.float64).exp()
            for weight, value in zip(weights / weights.sum(), values, strict=True):
                out[h * width : (h + 1) * width] += weight * value[h * width : (h + 1) * width]
            mean += weights / weights.sum() / heads
        return out, mean

    out, maps = torch.zeros_like(query), torch.zeros(batch, queries, tokens, dtype=torch.float64)
    for b in range(batch):
        told_rows = [norm(project(row, "down_text"), "ln_text") for row in text[b, : lengths[b]]]
        pixels = image[b // (batch // images)]
        keys = [project(norm(project(row, "down_image"), "ln_kv"), "i2q_k") for row in pixels]
        values = [project(row, "i2q_v") for row in pixels]
        for i in range(queries):
            q = project(norm(project(query[b, i], "down_text"), "ln_q"), "t2q_q")
            told, _ = look(q, [project(r, "t2q_k") for r in told_rows], [project(r, "t2q_v") for r in told_rows], d, d)
            seen, maps[b, i] = look(project(told, "i2q_q"), keys, values, d, dv)
            out[b, i] = query[b, i] + project(seen, "up")
    return out, maps


def check_errors(
    run: Any, draws: list[list[Tensor]], dtype: torch.dtype, kernels: AbstractContextManager[Any], device: str = "cpu"
) -> None:
    """The error rule for outputs and gradients, over several draws: the largest error of one is a matter of luck."""
    with kernels:
        fused = [gradients(run, inputs, device=device) for inputs in draws]
    with use_backend("reference"):
        plain = [gradients(run, inputs) for inputs in draws]
        exact = [gradients(run, [t.double() for t in inputs]) for inputs in draws]
    for i, name in enumerate(("out", "weights")):
        f, p, e = (torch.stack([outputs[i] for outputs, _ in results]) for results in (fused, plain, exact))
        assert f.dtype == (torch.float32 if name == "weights" else dtype)
        assert_error_rule(f, p, e, f.dtype, name)
    for i, name in enumerate(NAMES):
        f, p, e = (torch.stack([grads[i] for _, grads in results]) for results in (fused, plain, exact))
        assert f.dtype == dtype
        assert_error_rule(f, p, e, dtype, name)
        if name in UNSEEN:
            assert not f.any(), f"{name} is exactly zero"


def raw_arguments(lengths: Tensor | None, device: str = "cpu", **sizes: int) -> tuple[Any, ...]:
    """Of torch.ops.flashsloth.embedded_query, but for its last two, with gradients wanted."""
    query, text, image, *weights = (t.to(device).requires_grad_() for t in make(4, 2, 9, **sizes))
    params = EmbeddedQueryParams(*weights)
    state = [t.detach() for t in ImageState.from_image(image, params)]
    lengths = None if lengths is None else lengths.to(device)
    state[0].requires_grad_()
    return query, text, lengths, image, *state, params._kernel_params(), 4, 1e-5
