"""Attention as others compute it: peers of the prefill cases, each over ``(B, H, S, d)`` tensors with all rows kept."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.result import version

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


class Attention(NamedTuple):
    """One implementation: its name, the function of q, k, v and whether causal, and why it cannot run on a device."""

    name: str
    attend: Attend
    missing: Callable[[str], str | None]


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attend


@functools.cache
def _flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """FlexAttention compiled, as it is meant to be used, and its masks of blocks, kept by length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @functools.lru_cache(maxsize=4)
    def causal(rows: int, device: str) -> Any:
        return create_block_mask(lambda b, h, q, k: q >= k, None, None, rows, rows, device=device)

    return torch.compile(flex_attention, dynamic=False), causal


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    attend, mask = _flex()
    out = attend(q, k, v, block_mask=mask(q.shape[2], q.device.type) if causal else None)
    assert isinstance(out, Tensor)
    return out


def _rows_first(module: str, function: str, call: Callable[..., Any]) -> Attend:
    """A package whose tensors are ``(B, S, H, d)``; the transposes are views."""

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = call(getattr(importlib.import_module(module), function), *(t.transpose(1, 2) for t in (q, k, v)), causal)
        out = out[0] if isinstance(out, tuple) else out
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return attend


def _xformers(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
    bias = importlib.import_module("xformers.ops").LowerTriangularMask() if causal else None
    return function(q, k, v, attn_bias=bias)


def _on_gpus(device: str) -> str | None:
    return None if device == "cuda" else "made for cuda tensors"


def _package(name: str) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        return f"{name} is not installed" if version(name) is None else _on_gpus(device)

    return missing


def _anywhere(device: str) -> str | None:
    return None


SDPA_FLASH, SDPA_CUDNN, SDPA_EFFICIENT = "SDPA flash", "SDPA cuDNN", "SDPA efficient"
BEST_SDPA = (SDPA_FLASH, SDPA_CUDNN, SDPA_EFFICIENT)
PACKAGES = ("flash-attn", "flash-attn-4", "xformers")  # optional ones, named in results with version or absence

ATTENTIONS = (
    Attention(SDPA_FLASH, _sdpa(SDPBackend.FLASH_ATTENTION), _anywhere),
    Attention(SDPA_CUDNN, _sdpa(SDPBackend.CUDNN_ATTENTION), _on_gpus),
    Attention(SDPA_EFFICIENT, _sdpa(SDPBackend.EFFICIENT_ATTENTION), _on_gpus),
    Attention("SDPA math", _sdpa(SDPBackend.MATH), _anywhere),
    Attention("FlexAttention", flex, _anywhere),
    Attention(
        "flash-attn",
        _rows_first("flash_attn", "flash_attn_func", lambda f, q, k, v, causal: f(q, k, v, causal=causal)),
        _package("flash-attn"),
    ),
    Attention(
        "FlashAttention-4",
        _rows_first("flash_attn.cute", "flash_attn_func", lambda f, q, k, v, causal: f(q, k, v, causal=causal)),
        _package("flash-attn-4"),
    ),
    Attention("xformers", _rows_first("xformers.ops", "memory_efficient_attention", _xformers), _package("xformers")),
)
