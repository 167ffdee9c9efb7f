"""Gradients of embedded-query attention on GPUs: what runs. Kernels: ``embedded_query_backward``.

Kernels of our own where they save passes over numbers that grow with the image's tokens, and for the attention to the
text and the layer norms. The plain products between are torch's, in the dtype of the inputs, as autograd has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsloth_ops.backend import short
from flashsloth_ops.triton.embedded_query_backward import (
    query_dscores_kernel,
    query_dsoftmax_kernel,
    query_dy_kernel,
    query_norm_backward_kernel,
    query_text_backward_kernel,
)
from flashsloth_ops.triton.embedded_query_call import (
    Params,
    Sizes,
    ask,
    ceil_div,
    dense,
    precision,
    product_tile,
    softmax_block,
    space,
)
from flashsloth_ops.triton.embedded_query_text import query_norm_kernel
from flashsloth_ops.triton.launch import launch
from flashsloth_ops.triton.tuning import Config, bucket, choose


def embedded_query_backward(
    dout: Tensor, query: Tensor, text: Tensor, text_lengths: Tensor | None, image: Tensor, y: Tensor, mean: Tensor,
    rstd: Tensor, params: list[Tensor], hidden: Tensor, told: Tensor, pooled: Tensor, seen: Tensor, softmax: Tensor,
    num_heads: int, eps: float, need_image: bool, need_y: bool, need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """dquery, dtext, dimage, dy, dparams as ``flashsloth_ops.embedded_query`` declares them; empty where not needed."""
    dout, query, text, image, y = (t.contiguous() for t in (dout, query, text, image, y))
    mean, rstd, hidden, told = (t.contiguous() for t in (mean, rstd, hidden, told))
    pooled, seen, softmax, lengths = pooled.contiguous(), seen.contiguous(), softmax.contiguous(), dense(text_lengths)
    p, s = Params(*(t.contiguous() for t in params)), Sizes.of(query, text, image, y, num_heads)
    grads: dict[str, Tensor] = {}

    d = dout.view(s.rows, s.model)
    dseen = d @ p.up
    if need_params:
        grads["up"], grads["up_bias"] = d.mT @ seen.view(s.rows, s.dim).to(d.dtype), d.sum(0)
        by_head = dseen.view(s.rows, s.heads, s.value_dim).permute(1, 2, 0)
        grads["image_v"] = (by_head @ pooled.view(s.rows, s.heads, s.dim).transpose(0, 1).to(d.dtype)).flatten(0, 1)
        grads["image_v_bias"] = dseen.sum(0) if s.tokens else torch.zeros_like(p.image_v_bias)

    dasked, dimage, dy = read_image_backward(dseen, told, image, y, mean, rstd, softmax, p, s, need_image, need_y)
    dtold = absorbed_backward(dasked, told, p, s, grads if need_params else None)
    dhidden = read_text_backward(dtold, hidden, lengths, p, s, eps, grads if need_params else None)

    of_query, of_text = dhidden[: s.rows], dhidden[s.rows :]
    dquery = torch.addmm(d, of_query, p.down).view_as(query)
    dtext = (of_text @ p.down).view_as(text)
    dparams = [t.new_empty((0, *t.shape[1:])) for t in p]
    if need_params:
        if lengths is not None:  # padding may hold NaN, which zero gradients would not silence
            valid = torch.arange(s.text, device=text.device) < lengths[:, None]
            text = torch.where(valid[..., None], text, text.new_zeros(()))
        grads["down"] = of_query.mT @ query.view(s.rows, s.model)
        grads["down"] = torch.addmm(grads["down"], of_text.mT, text.view(s.batch * s.text, s.model))
        grads["down_bias"] = dhidden.sum(0)
        for unseen in ("norm_image_bias", "text_k_bias", "image_k_bias"):  # they shift all scores of a row alike
            grads[unseen] = torch.zeros_like(getattr(p, unseen))
        dparams = [grads[name].to(query.dtype) for name in Params._fields]
    return dquery, dtext, dimage, dy, dparams


# ---- image ----


def read_image_backward(
    dseen: Tensor, told: Tensor, image: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, softmax: Tensor, p: Params,
    s: Sizes, need_image: bool, need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dasked (B, Q, h, E), dimage and dy."""
    dtype, rows = image.dtype, s.image_rows
    by_head = dseen.view(s.rows, s.heads, s.value_dim).transpose(0, 1)
    dpooled = (by_head @ p.image_v.view(s.heads, s.value_dim, s.dim)).transpose(0, 1).contiguous()
    dpooled = dpooled.view(s.images, rows, s.dim)
    asked, sums = ask(told, p, s)

    width = ceil_div(s.tokens, 64) * 64  # whole vectors in a row
    scores, dprobs = (image.new_empty((s.images, rows, width), dtype=torch.float32) for _ in range(2))

    def run(tile: Config) -> Tensor:
        token_blocks = ceil_div(s.tokens, tile["BLOCK_N"])
        parts = image.new_empty((s.images, rows, token_blocks, 2), dtype=torch.float32)
        launch(
            query_dscores_kernel, (ceil_div(rows, tile["BLOCK_M"]) * token_blocks * s.images,),
            asked, sums, y, mean, rstd, image, dpooled, softmax, scores, dprobs, parts,
            rows, s.tokens, width, s.inner, s.dim, PRECISION=precision(image), **tile,
        )  # fmt: skip
        return parts

    heuristic = product_tile(rows, s.tokens, s.inner + s.dim, image, s.images)
    key = f"{short(dtype)} R{bucket(rows)} E{s.inner} D{s.dim} N{bucket(s.tokens)} B{bucket(s.images)}"
    parts = run(choose("query_dscores_kernel", key, image.device, heuristic, lambda: space(image), run))

    probs, ds = (image.new_empty((s.images, rows, width)) for _ in range(2))
    row_blocks, token_blocks = ceil_div(rows, 32), parts.shape[2]
    along = image.new_empty((s.images, row_blocks, s.tokens), dtype=torch.float32)
    launch(
        query_dsoftmax_kernel, (s.images * row_blocks * ceil_div(s.tokens, 128),),
        scores, dprobs, softmax, parts, rstd, probs, ds, along, rows, s.tokens, width, token_blocks,
        BLOCK_M=32, BLOCK_N=128, BLOCK_S=softmax_block(token_blocks), num_warps=4,
    )  # fmt: skip

    dasked = (ds[..., : s.tokens] @ y).view(s.rows, s.heads, s.inner)
    dimage = probs[..., : s.tokens].mT @ dpooled if need_image else torch.empty_like(image[:0])
    dy = torch.empty_like(y if need_y else y[:0])
    if need_y:
        score_gradient(ds, asked, along, y, mean, rstd, dy, s)
    return dasked, dimage, dy


def score_gradient(
    ds: Tensor, asked: Tensor, along: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, s: Sizes
) -> None:
    def run(tile: Config) -> None:
        programs = ceil_div(s.tokens, tile["BLOCK_M"]) * ceil_div(s.inner, tile["BLOCK_N"]) * s.images
        launch(
            query_dy_kernel, (programs,),
            ds, asked, along, y, mean, rstd, dy, s.image_rows, s.tokens, ds.shape[-1], s.inner, along.shape[1],
            PRECISION=precision(y), **tile,
        )  # fmt: skip

    heuristic = product_tile(s.tokens, s.inner, s.image_rows, y, s.images)
    key = f"{short(y.dtype)} R{bucket(s.image_rows)} E{s.inner} N{bucket(s.tokens)} B{bucket(s.images)}"
    run(choose("query_dy_kernel", key, y.device, heuristic, lambda: space(y), run))


def absorbed_backward(dasked: Tensor, told: Tensor, p: Params, s: Sizes, grads: dict[str, Tensor] | None) -> Tensor:
    """dtold (B*Q, E) from dasked (B*Q, h, E), with asked = q_h K_h and K = centred(Wk gain) scale."""
    told = told.view(s.rows, s.inner).to(dasked.dtype)
    gain, weight = p.norm_image.float(), p.image_k.float()
    key = weight * gain
    key = (key - key.mean(-1, keepdim=True)) * s.scale
    by_head = dasked.transpose(0, 1)
    dq = by_head @ key.to(dasked.dtype).view(s.heads, s.head_dim, s.inner).mT
    dq = dq.transpose(0, 1).reshape(s.rows, s.inner)
    if grads is not None:
        q = torch.addmm(p.image_q_bias, told, p.image_q.mT).view(s.rows, s.heads, s.head_dim)
        dkey = (q.permute(1, 2, 0) @ by_head).reshape(s.inner, s.inner).float()
        dkey = (dkey - dkey.mean(-1, keepdim=True)) * s.scale
        grads["image_k"], grads["norm_image"] = dkey * gain, (dkey * weight).sum(0)
        grads["image_q"], grads["image_q_bias"] = dq.mT @ told, dq.sum(0)
    return dq @ p.image_q


# ---- text ----


def read_text_backward(
    dtold: Tensor, hidden: Tensor, lengths: Tensor | None, p: Params, s: Sizes, eps: float,
    grads: dict[str, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Gradients of the down-projected rows: B*Q of the queries, then B*T of the texts, zero where those are padding."""
    rows_of_text, long = s.batch * s.text, max(s.text, 1)
    rows, block_b = s.rows + rows_of_text, min(bucket(s.batch), 256)
    normed = dtold.new_empty((rows, s.inner))
    launch(
        query_norm_kernel, (rows,),
        None, p.down_bias, lengths, p.norm_query, p.norm_query_bias, p.norm_text, p.norm_text_bias, hidden, normed,
        s.rows, rows_of_text, long, s.batch, s.inner, 0, eps,
        BLOCK_E=bucket(s.inner), BLOCK_B=block_b, num_warps=4,
    )  # fmt: skip
    of_query, of_text = normed[: s.rows], normed[s.rows :]
    q = torch.addmm(p.text_q_bias, of_query, p.text_q.mT)
    k = of_text @ p.text_k.mT
    v = torch.addmm(p.text_v_bias, of_text, p.text_v.mT)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    launch(
        query_text_backward_kernel, (s.batch, s.heads),
        q, k, v, dtold, lengths, dq, dk, dv, s.queries, s.text, s.heads, s.head_dim, s.scale,
        BLOCK_Q=max(bucket(s.queries), 16), BLOCK_T=16 if s.text <= 16 else 32,
        BLOCK_D=max(bucket(s.head_dim), 16), PRECISION=precision(q), num_warps=4,
    )  # fmt: skip
    dnormed = torch.empty_like(normed)
    torch.mm(dq, p.text_q, out=dnormed[: s.rows])
    torch.mm(dk, p.text_k, out=dnormed[s.rows :])
    dnormed[s.rows :].addmm_(dv, p.text_v)

    block_r = 4 if rows <= 1024 else 16
    query_blocks, text_blocks = ceil_div(s.rows, block_r), ceil_div(rows_of_text, block_r)
    dhidden = torch.empty_like(normed)
    parts = hidden.new_empty((query_blocks + text_blocks, 2, s.inner))
    launch(
        query_norm_backward_kernel, (query_blocks + text_blocks,),
        hidden, lengths, p.norm_query, p.norm_text, dnormed, dhidden, parts,
        s.rows, rows_of_text, long, s.batch, s.inner, query_blocks, eps,
        BLOCK_R=block_r, BLOCK_E=bucket(s.inner), BLOCK_B=block_b, num_warps=4,
    )  # fmt: skip
    if grads is not None:
        for norm, of_blocks in (("norm_query", parts[:query_blocks]), ("norm_text", parts[query_blocks:])):
            grads[norm], grads[f"{norm}_bias"] = of_blocks[:, 0].sum(0), of_blocks[:, 1].sum(0)
        grads["text_q"], grads["text_q_bias"] = dq.mT @ of_query, dq.sum(0)
        grads["text_k"] = dk.mT @ of_text
        grads["text_v"], grads["text_v_bias"] = dv.mT @ of_text, dv.sum(0)
    return dhidden
