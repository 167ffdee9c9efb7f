"""Embedded-query attention on GPUs: what runs, with which tiles. Kernels: ``embedded_query_text``, ``_image``.

The image's state is two launches, the op eight: rows down-projected in shares, then added up and normalised; attention
to the text; what is asked of the image; scores; pooled image; values; up-projection. All results repeat bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsloth_ops.backend import short
from flashsloth_ops.triton.embedded_query_call import (
    Params,
    Sizes,
    ask,
    ceil_div,
    dense,
    precision,
    product_tile,
    shares,
    softmax_block,
    space,
    step,
)
from flashsloth_ops.triton.embedded_query_gradients import embedded_query_backward
from flashsloth_ops.triton.embedded_query_image import (
    query_pool_kernel,
    query_scores_kernel,
    query_state_kernel,
    query_statistics_kernel,
    query_up_kernel,
    query_values_kernel,
    query_weights_kernel,
)
from flashsloth_ops.triton.embedded_query_text import query_down_kernel, query_norm_kernel, query_text_kernel
from flashsloth_ops.triton.launch import gpu, launch
from flashsloth_ops.triton.tuning import Config, bucket, choose

POOL_SHARE = 256  # tokens that a share of the pooled image has at least

__all__ = ["embedded_query", "embedded_query_backward", "image_state"]


def image_state(image: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd as ``flashsloth_ops.embedded_query`` declares them."""
    image, weight, bias = image.contiguous(), weight.contiguous(), bias.contiguous()
    images, tokens, dim = image.shape
    rows, inner = images * tokens, weight.shape[0]
    y = image.new_empty((images, tokens, inner))
    mean, rstd = (image.new_empty((images, tokens), dtype=torch.float32) for _ in range(2))

    def project(tile: Config) -> Tensor:
        blocks = ceil_div(inner, tile["BLOCK_N"])
        partial = image.new_empty((blocks, rows, 2), dtype=torch.float32)
        launch(
            query_state_kernel, (ceil_div(rows, tile["BLOCK_M"]) * blocks,),
            image, weight, bias, y, partial, rows, dim, inner, PRECISION=precision(image), **tile,
        )  # fmt: skip
        return partial

    heuristic = product_tile(rows, inner, dim, image)
    key = f"{short(image.dtype)} D{dim} E{inner} T{bucket(rows)}"
    tile = choose("query_state_kernel", key, image.device, heuristic, lambda: space(image), project)
    partial = project(tile)
    launch(
        query_statistics_kernel, (ceil_div(rows, 64),),
        partial, mean, rstd, rows, inner, eps,
        BLOCK_N=tile["BLOCK_N"], BLOCK_R=64, BLOCK_P=bucket(partial.shape[0]), num_warps=2,
    )  # fmt: skip
    return y, mean, rstd


def embedded_query(
    query: Tensor, text: Tensor, text_lengths: Tensor | None, image: Tensor, y: Tensor, mean: Tensor, rstd: Tensor,
    params: list[Tensor], num_heads: int, eps: float, return_weights: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, weights and what backward needs as ``flashsloth_ops.embedded_query`` declares them."""
    query, text, image, y = query.contiguous(), text.contiguous(), image.contiguous(), y.contiguous()
    mean, rstd, lengths = mean.contiguous(), rstd.contiguous(), dense(text_lengths)
    p, s = Params(*(t.contiguous() for t in params)), Sizes.of(query, text, image, y, num_heads)
    kept = s.batch if save else 0
    out = torch.empty_like(query)
    weights = query.new_empty((s.batch if return_weights else 0, s.queries, s.tokens), dtype=torch.float32)
    hidden = query.new_empty((kept * (s.queries + s.text), s.inner), dtype=torch.float32)
    told = query.new_empty((s.batch, s.queries, s.inner), dtype=torch.float32)
    pooled = query.new_empty((kept, s.queries, s.heads, s.dim), dtype=torch.float32)
    seen = query.new_empty((s.batch, s.queries, s.dim), dtype=torch.float32)
    softmax = query.new_empty((kept, s.queries, s.heads, 2), dtype=torch.float32)

    normed = normalised_rows(query, text, lengths, p, s, eps, hidden if save else None)
    read_text(normed, lengths, p, s, told)
    asked, sums = ask(told, p, s)
    mass, blocks, block_tokens = scores(asked, sums, y, mean, rstd, s)
    partial = pool(mass, blocks, block_tokens, image, s, pooled if save else None, softmax if save else None)
    project_values(partial, p, s, pooled if save and partial.shape[0] > 1 else None, seen)
    project_up(seen, p, query, out)
    if return_weights and s.rows:
        token_blocks = ceil_div(s.tokens, block_tokens)
        launch(
            query_weights_kernel, (s.rows * token_blocks,),
            mass, blocks, weights, s.rows, s.tokens, mass.shape[-1], s.heads,
            TOKENS=block_tokens, BLOCK_H=min(bucket(s.heads), 32), BLOCK_S=softmax_block(token_blocks),
        )  # fmt: skip
    if not save:
        told, seen = torch.empty_like(told[:0]), torch.empty_like(seen[:0])
    return out, weights, hidden, told, pooled, seen, softmax


# ---- text ----


def normalised_rows(
    query: Tensor, text: Tensor, lengths: Tensor | None, p: Params, s: Sizes, eps: float, hidden: Tensor | None
) -> Tensor:
    """Query rows, then text rows with their padding, down-projected and normalised, in the dtype of query."""
    rows_of_text = s.batch * s.text
    rows, long = s.rows + rows_of_text, max(s.text, 1)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    block_n = 16 if rows <= 128 else 64
    programs = ceil_div(rows, block_m) * ceil_div(s.inner, block_n)
    share, splits = shares(s.model, programs, 64, query)
    partial = query.new_empty((splits, rows, s.inner), dtype=torch.float32)
    launch(
        query_down_kernel, (ceil_div(rows, block_m), ceil_div(s.inner, block_n), splits),
        query, text, lengths, p.down, partial, s.rows, rows_of_text, long, s.model, s.inner, share,
        BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=precision(query), **step(query), num_warps=4,
    )  # fmt: skip
    normed = query.new_empty((rows, s.inner))
    launch(
        query_norm_kernel, (rows,),
        partial, p.down_bias, lengths, p.norm_query, p.norm_query_bias, p.norm_text, p.norm_text_bias, hidden, normed,
        s.rows, rows_of_text, long, s.batch, s.inner, splits, eps,
        BLOCK_E=bucket(s.inner), BLOCK_B=min(bucket(s.batch), 256), num_warps=4,
    )  # fmt: skip
    return normed


def read_text(normed: Tensor, lengths: Tensor | None, p: Params, s: Sizes, told: Tensor) -> None:
    group = head_group(s, normed)
    query_blocks = ceil_div(s.queries, group["BLOCK_R"] // group["HEADS"])
    launch(
        query_text_kernel, (s.batch, ceil_div(s.heads, group["HEADS"]), query_blocks),
        normed, lengths, p.text_q, p.text_q_bias, p.text_k, p.text_v, p.text_v_bias, told,
        s.rows, s.queries, s.text, s.inner, s.head_dim, s.scale,
        BLOCK_T=16 if s.text <= 16 else 32 if s.text <= 32 else 64, PRECISION=precision(normed),
        **group, **step(normed), num_warps=8 if group["BLOCK_C"] > 64 else 4,
    )  # fmt: skip


def head_group(s: Sizes, like: Tensor) -> Config:
    """Heads that one program of the text side takes: one while that fills the GPU, then as many as its columns hold."""
    heads, columns = 1, 64 if like.dtype == torch.float32 else 128
    while (
        2 * heads * s.head_dim <= columns
        and 2 * heads <= s.heads
        and s.batch * ceil_div(s.heads, 2 * heads) >= gpu(like.device).multiprocessors
    ):
        heads *= 2
    return {
        "HEADS": heads,
        "BLOCK_R": max(min(heads * bucket(s.queries), 64), heads, 16),
        "BLOCK_C": max(bucket(heads * s.head_dim), 16),
    }


# ---- image ----


def scores(asked: Tensor, sums: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, s: Sizes) -> tuple[Tensor, Tensor, int]:
    """exp(score - peak of a block of tokens) (Bi, rows, width), peaks and sums of the blocks, and a block's tokens."""
    rows, images = s.image_rows, s.images
    # In fp16, 11 bits, for bf16 too: these numbers are in [0, 1] and are scaled once more before they are rounded.
    dtype = torch.float32 if asked.dtype == torch.float32 else torch.float16

    def run(tile: Config) -> tuple[Tensor, Tensor, int]:
        block = tile["BLOCK_N"]
        token_blocks = ceil_div(s.tokens, block)
        mass = asked.new_empty((images, rows, token_blocks * block), dtype=dtype)
        blocks = asked.new_empty((images, rows, token_blocks, 2), dtype=torch.float32)
        launch(
            query_scores_kernel, (ceil_div(rows, tile["BLOCK_M"]) * token_blocks * images,),
            asked, sums, y, mean, rstd, mass, blocks, rows, s.tokens, token_blocks * block, s.inner,
            PRECISION=precision(asked), **tile,
        )  # fmt: skip
        return mass, blocks, block

    heuristic = product_tile(rows, s.tokens, s.inner, asked, images)
    key = f"{short(asked.dtype)} R{bucket(rows)} E{s.inner} N{bucket(s.tokens)} B{bucket(images)}"
    return run(choose("query_scores_kernel", key, asked.device, heuristic, lambda: space(asked), run))


def pool(
    mass: Tensor, blocks: Tensor, block_tokens: int, image: Tensor, s: Sizes, pooled: Tensor | None,
    softmax: Tensor | None,
) -> Tensor:  # fmt: skip
    """The pooled image in shares (splits, B, Q, h, Di); a single share is ``pooled`` where that is given."""
    rows, images, token_blocks = s.image_rows, s.images, blocks.shape[2]

    def run(tile: Config) -> Tensor:
        step_k = min(tile["BLOCK_K"], block_tokens)
        programs = ceil_div(rows, tile["BLOCK_M"]) * ceil_div(s.dim, tile["BLOCK_N"]) * images
        share, splits = shares(s.tokens, programs, POOL_SHARE, image)
        shape = (s.batch, s.queries, s.heads, s.dim)
        if splits > 1:
            out = image.new_empty((splits, *shape), dtype=torch.float32)
        else:
            out = image.new_empty((1, *shape)) if pooled is None else pooled[None]
        launch(
            query_pool_kernel, (programs, splits),
            mass, blocks, image, out, softmax, images, rows, s.tokens, mass.shape[-1], s.dim, share,
            TOKENS=block_tokens, BLOCK_S=softmax_block(token_blocks), PRECISION=precision(image),
            **{**tile, "BLOCK_K": step_k},
        )  # fmt: skip
        return out

    heuristic = product_tile(rows, s.dim, s.tokens, image, images, POOL_SHARE)
    key = f"{short(image.dtype)} R{bucket(rows)} D{s.dim} N{bucket(s.tokens)} B{bucket(images)} K{block_tokens}"
    return run(choose("query_pool_kernel", key, image.device, heuristic, lambda: space(image), run))


def project_values(partial: Tensor, p: Params, s: Sizes, pooled: Tensor | None, seen: Tensor) -> None:
    block_m = 16 if s.rows <= 16 else 64
    launch(
        query_values_kernel, (ceil_div(s.rows, block_m) * s.heads,),
        partial, p.image_v, p.image_v_bias if s.tokens else None, pooled, seen,
        s.rows, s.heads, s.dim, s.value_dim, partial.shape[0],
        BLOCK_M=block_m, BLOCK_V=max(bucket(s.value_dim), 16), PRECISION=precision(p.image_v), **step(p.image_v),
        num_warps=4,
    )  # fmt: skip


def project_up(seen: Tensor, p: Params, query: Tensor, out: Tensor) -> None:
    rows, (model, dim) = out.shape[:2].numel(), p.up.shape
    block_m, block_n = (16, 16) if rows <= 16 else (64, 64)
    launch(
        query_up_kernel, (ceil_div(model, block_n), ceil_div(rows, block_m)),
        seen, p.up, p.up_bias, query, out, rows, dim, model,
        BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=precision(query), **step(query), num_warps=4,
    )  # fmt: skip
