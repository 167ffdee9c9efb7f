"""Embedded-query attention in plain PyTorch (FlashSloth, arXiv 2412.04317, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear


def embedded_query_attention(
    query: Tensor,
    text: Tensor,
    image: Tensor,
    params: Any,
    *,
    num_heads: int,
    text_lengths: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Let Q embedded queries read the question, then fetch what it needs from the image.

    query ``(B, Q, Dm)``, text ``(B, T, Dm)``, image ``(Bi, N, Di)`` where question i reads image
    ``i // (B / Bi)``; ``params`` has the fields of ``EmbeddedQueryParams``. Returns the updated query rows
    ``(B, Q, Dm)`` and the image attention averaged over heads ``(B, Q, N)``.
    """
    p = params
    questions = query.shape[0] // max(image.shape[0], 1)
    inner = p.down_text_bias.shape[0]
    scale = (inner // num_heads) ** -0.5

    q = linear(query, p.down_text_weight, p.down_text_bias)
    t = linear(text, p.down_text_weight, p.down_text_bias)
    y = linear(image, p.down_image_weight, p.down_image_bias)
    q = layer_norm(q, (inner,), p.ln_q_weight, p.ln_q_bias, eps)
    t = layer_norm(t, (inner,), p.ln_text_weight, p.ln_text_bias, eps)
    y = layer_norm(y, (inner,), p.ln_kv_weight, p.ln_kv_bias, eps)

    # The queries read the question. A row without text attends to nothing there.
    mask = None
    if text_lengths is not None:
        mask = torch.arange(text.shape[1], device=text.device) < text_lengths.view(-1, 1, 1, 1)
        t = t.masked_fill(~mask.view(*t.shape[:2], 1), 0.0)  # padding may hold anything, NaN too
    told, _ = _attention(
        _heads(linear(q, p.t2q_q_weight, p.t2q_q_bias), num_heads),
        _heads(linear(t, p.t2q_k_weight, p.t2q_k_bias), num_heads),
        _heads(linear(t, p.t2q_v_weight, p.t2q_v_bias), num_heads),
        scale,
        mask,
    )

    # What they then ask of the image; the values are the raw image tokens, projected.
    seen, attention = _attention(
        _heads(linear(told, p.i2q_q_weight, p.i2q_q_bias), num_heads),
        _heads(linear(y, p.i2q_k_weight, p.i2q_k_bias), num_heads).repeat_interleave(questions, 0),
        _heads(linear(image, p.i2q_v_weight, p.i2q_v_bias), num_heads).repeat_interleave(questions, 0),
        scale,
        None,
    )
    return query + linear(seen, p.up_weight, p.up_bias), attention.mean(1)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, L, h*d)`` -> ``(B, h, L, d)``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention with scores and softmax in fp32 (fp64 stays fp64); an empty row gives zeros."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
        nothing = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(nothing, 0.0)
        probs = scores.softmax(-1).masked_fill(nothing, 0.0)
    else:
        probs = scores.softmax(-1)
    out = probs.to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2), probs
