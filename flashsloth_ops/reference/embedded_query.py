"""Embedded-query attention in plain PyTorch (FlashSloth, arXiv 2412.04317, "EmbQ").

:func:`embedded_query_attention` is what the op computes, written as the paper does. :func:`absorbed_forward` and
:func:`absorbed_backward` are the same function as the fused kernels compute it (docs/kernels/embedded_query.md).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    image_y: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Let Q embedded queries read the question, then fetch what it needs from the image.

    query ``(B, Q, Dm)``, text ``(B, T, Dm)``, image ``(Bi, N, Di)`` where question i reads image
    ``i // (B / Bi)``; ``params`` has the fields of ``EmbeddedQueryParams``; ``image_y`` is the down-projected image,
    if it is already there. Returns the updated query rows ``(B, Q, Dm)`` and the image attention averaged over
    heads ``(B, Q, N)``.
    """
    p = params
    questions = query.shape[0] // max(image.shape[0], 1)
    inner = p.down_text_bias.shape[0]
    scale = (inner // num_heads) ** -0.5

    # Padding may hold anything, NaN too. A row without text attends to nothing there.
    mask = None
    if text_lengths is not None:
        valid = text_mask(text, text_lengths)
        text = text.masked_fill(~valid[..., None], 0.0)
        mask = valid[:, None, None, :]

    q = linear(query, p.down_text_weight, p.down_text_bias)
    t = linear(text, p.down_text_weight, p.down_text_bias)
    y = linear(image, p.down_image_weight, p.down_image_bias) if image_y is None else image_y
    q = layer_norm(q, (inner,), p.ln_q_weight, p.ln_q_bias, eps)
    t = layer_norm(t, (inner,), p.ln_text_weight, p.ln_text_bias, eps)
    y = layer_norm(y, (inner,), p.ln_kv_weight, p.ln_kv_bias, eps)

    # The queries read the question.
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


def text_mask(text: Tensor, text_lengths: Tensor) -> Tensor:
    """``(B, T)``: which rows of text are no padding."""
    return torch.arange(text.shape[1], device=text.device) < text_lengths.view(-1, 1)


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


# ---- the absorbed form, forward and backward, without autograd ----


class _Text:
    """The text side: rows down-projected and normalised, then multi-head attention of query rows to text rows."""

    def __init__(self, hidden: Tensor, valid: Tensor, queries: int, p: Sequence[Tensor], heads: int, eps: float):
        batch, self.queries, self.heads, self.p = valid.shape[0], queries, heads, p
        rows, inner = batch * queries, hidden.shape[-1]
        self.scale = (inner // heads) ** -0.5
        t = hidden.new_zeros(*valid.shape, inner)
        t[valid] = hidden[rows : rows + int(valid.sum())]
        self.q_hat, self.q_rstd = _normalised(hidden[:rows].view(batch, queries, inner), eps)
        self.t_hat, self.t_rstd = _normalised(t, eps)
        self.lq, self.lt = self.q_hat * p[2] + p[3], self.t_hat * p[4] + p[5]
        self.q = _heads(linear(self.lq, p[8], p[9]), heads)
        self.k = _heads(linear(self.lt, p[10], p[11]), heads)
        self.v = _heads(linear(self.lt, p[12], p[13]), heads)
        scores = (self.q @ self.k.mT * self.scale).masked_fill(~valid[:, None, None], -torch.inf)
        self.probs = scores.softmax(-1).masked_fill(~valid[:, None, None], 0.0)

    def told(self) -> Tensor:
        return (self.probs @ self.v).transpose(1, 2).flatten(2)

    def backward(self, dtold: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of the down-projected query and text rows, and of params[2:14] but for ln_kv."""
        p = self.p
        dtold = _heads(dtold, self.heads)
        dprobs = dtold @ self.v.mT
        ds = self.probs * (dprobs - (self.probs * dprobs).sum(-1, keepdim=True)) * self.scale
        dq, dk, dv = ((t.transpose(1, 2).flatten(2)) for t in (ds @ self.k, ds.mT @ self.q, self.probs.mT @ dtold))
        dlq, dlt = dq @ p[8], dk @ p[10] + dv @ p[12]
        dqd, dgq, dbq = _normalised_backward(dlq, self.q_hat, self.q_rstd, p[2])
        dtd, dgt, dbt = _normalised_backward(dlt, self.t_hat, self.t_rstd, p[4])
        weights = [_outer(dq, self.lq), _sum(dq), _outer(dk, self.lt), torch.zeros_like(p[11])]
        return dqd, dtd, [dgq, dbq, dgt, dbt, *weights, _outer(dv, self.lt), _sum(dv)]


def absorbed_forward(
    query: Tensor, text: Tensor, text_lengths: Tensor | None, image: Tensor, y: Tensor, rstd: Tensor,
    params: Sequence[Tensor], num_heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``params``: the fields of ``EmbeddedQueryParams`` but for ``down_image_*``.

    Returns out and weights, and what backward needs, in fp32: hidden ``(B*(Q+T), E)``, the down-projected query rows,
    then text rows without padding, then zeros; told ``(B, Q, E)``; pooled ``(B, Q, h, Di)``, the image averaged by each
    head's attention; seen ``(B, Q, Di)``, its projection; softmax ``(B, Q, h, 2)``, each row's largest
    score and the sum of its ``exp(score - largest)``.
    """
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    batch, queries, _ = query.shape
    valid = _valid(text, text_lengths)
    query, text, image, y = (t.to(wide) for t in (query, text, image, y))
    p = [t.to(wide) for t in params]
    rows = torch.cat([query.flatten(0, 1), text[valid]])
    hidden = rows.new_zeros(batch * (queries + text.shape[1]), y.shape[-1])
    hidden[: len(rows)] = linear(rows, p[0], p[1])
    told = _Text(hidden, valid, queries, p, num_heads, eps).told()

    asked = _by_image(_asked(told, p, num_heads), image.shape[0])
    scores = asked @ y.mT * rstd[:, None]
    top = scores.amax(-1, keepdim=True) if image.shape[1] else scores.new_zeros(*scores.shape[:2], 1)
    probs = (scores - top).exp()
    total = probs.sum(-1, keepdim=True)
    probs = probs / total
    pooled = (probs @ image).view(batch, queries, num_heads, image.shape[-1])
    value = p[18].unflatten(0, (num_heads, -1))
    seen = torch.einsum("bqhi,hvi->bqhv", pooled, value).flatten(2)
    if image.shape[1]:
        seen = seen + p[19]
    out = query + linear(seen, p[20], p[21])
    weights = probs.view(batch, queries, num_heads, image.shape[1]).mean(2)
    softmax = torch.cat([top, total], -1).view(batch, queries, num_heads, 2)
    return out.to(dtype), weights, hidden, told, pooled, seen, softmax


def absorbed_backward(
    dout: Tensor, query: Tensor, text: Tensor, text_lengths: Tensor | None, image: Tensor, y: Tensor, mean: Tensor,
    rstd: Tensor, params: Sequence[Tensor], hidden: Tensor, told: Tensor, pooled: Tensor, seen: Tensor,
    softmax: Tensor,
    num_heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of query, text, image (as values), y (mean and rstd are functions of it) and params."""
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    valid = _valid(text, text_lengths)
    dout, query, image, y = (t.to(wide) for t in (dout, query, image, y))
    text = text.to(wide).masked_fill(~valid[..., None], 0.0)
    p = [t.to(wide) for t in params]
    heads, images, scale = num_heads, image.shape[0], (y.shape[-1] // num_heads) ** -0.5

    dup, dup_bias = _outer(dout, seen), _sum(dout)
    dseen = dout @ p[20]
    value = p[18].unflatten(0, (heads, -1))
    dpooled = torch.einsum("bqhv,hvi->bqhi", dseen.unflatten(-1, (heads, -1)), value)
    dvalue = torch.einsum("bqhv,bqhi->hvi", dseen.unflatten(-1, (heads, -1)), pooled).flatten(0, 1)
    dvalue_bias = _sum(dseen) if image.shape[1] else torch.zeros_like(p[19])

    delta = (dpooled * pooled).sum(-1)
    dpooled, delta, softmax = (_by_image(t, images) for t in (dpooled, delta[..., None], softmax))
    asked = _by_image(_asked(told, p, heads), images)
    scores = asked @ y.mT * rstd[:, None]
    probs = (scores - softmax[..., :1]).exp() / softmax[..., 1:]
    ds = probs * (dpooled @ image.mT - delta)
    dimage = probs.mT @ dpooled
    along = (ds * scores).sum(1) / y.shape[-1]
    y_hat = (y - mean[..., None]) * rstd[..., None]
    dy = ((ds.mT @ asked) - along[..., None] * y_hat) * rstd[..., None]
    dasked = ((ds * rstd[:, None]) @ y).view(*told.shape[:2], heads, y.shape[-1])

    # asked = q absorbed, where absorbed = centred(Wk gamma) scale.
    q = linear(told, p[14], p[15]).unflatten(-1, (heads, -1))
    dabsorbed = torch.einsum("bqhd,bqhe->hde", q, dasked).flatten(0, 1)
    dq = torch.einsum("bqhe,hde->bqhd", dasked, _absorbed(p, scale).unflatten(0, (heads, -1))).flatten(2)
    dabsorbed = (dabsorbed - dabsorbed.mean(-1, keepdim=True)) * scale
    dkey, dgamma = dabsorbed * p[6], (dabsorbed * p[16]).sum(0)
    dtold = dq @ p[14]

    side = _Text(hidden, valid, query.shape[1], p, heads, eps)
    dqd, dtd, dside = side.backward(dtold)
    dtd = dtd.masked_fill(~valid[..., None], 0.0)
    ddown, ddown_bias = _outer(dqd, query) + _outer(dtd, text), _sum(dqd) + _sum(dtd)
    dparams = [ddown, ddown_bias, *dside[:4], dgamma, torch.zeros_like(dgamma), *dside[4:]]
    dparams += [_outer(dq, told), _sum(dq), dkey, torch.zeros_like(p[17]), dvalue, dvalue_bias, dup, dup_bias]
    grads = (dout + dqd @ p[0], dtd @ p[0], dimage, dy)
    dquery, dtext, dimage, dy = (g.to(dtype) for g in grads)
    return dquery, dtext, dimage, dy, [g.to(dtype) for g in dparams]


def _valid(text: Tensor, text_lengths: Tensor | None) -> Tensor:
    if text_lengths is None:
        return text.new_ones(text.shape[:2], dtype=torch.bool)
    return text_mask(text, text_lengths)


def _absorbed(p: Sequence[Tensor], scale: float) -> Tensor:
    """Key projection with the layer norm's gain in it. Centred rows meet only the centred part of y."""
    key = p[16] * p[6]
    return (key - key.mean(-1, keepdim=True)) * scale


def _asked(told: Tensor, p: Sequence[Tensor], heads: int) -> Tensor:
    q = linear(told, p[14], p[15]).unflatten(-1, (heads, -1))
    absorbed = _absorbed(p, q.shape[-1] ** -0.5).unflatten(0, (heads, -1))
    return torch.einsum("bqhd,hde->bqhe", q, absorbed)


def _by_image(t: Tensor, images: int) -> Tensor:
    """``(B, Q, h, D)`` -> ``(Bi, B/Bi * Q * h, D)``: the rows of one image together."""
    rows = t.shape[0] // max(images, 1) * t.shape[1] * t.shape[2]
    return t.reshape(images, rows, t.shape[3])


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x - x.mean(-1, keepdim=True)
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def _normalised_backward(dout: Tensor, hat: Tensor, rstd: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = dout * gain
    dx = (d - d.mean(-1, keepdim=True) - hat * (d * hat).mean(-1, keepdim=True)) * rstd
    return dx, _sum(dout * hat), _sum(dout)


def _outer(d: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight in ``linear(x, weight)``."""
    return d.flatten(0, -2).mT @ x.flatten(0, -2)


def _sum(d: Tensor) -> Tensor:
    return d.flatten(0, -2).sum(0)
