"""Attention over kept rows in Triton: what is launched, in which order and on which grid.

forward     attention, (combine where keys are split,) (importance and its sum where it is asked for)
backward    dq with delta, dk and dv

Every kernel finds its rows through the index on the device: grids are sized by upper bounds, nothing waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsloth_ops.triton import sparse_prefill_tiles as tiles
from flashsloth_ops.triton.launch import launch
from flashsloth_ops.triton.sparse_prefill_backward import dkdv_kernel, dq_kernel
from flashsloth_ops.triton.sparse_prefill_call import (
    Call,
    empty_token_major,
    head_tiles,
    strides_of_rows,
    with_contiguous_rows,
)
from flashsloth_ops.triton.sparse_prefill_forward import attention_kernel, combine_kernel
from flashsloth_ops.triton.sparse_prefill_importance import importance_kernel, importance_sum_kernel
from flashsloth_ops.triton.sparse_prefill_tiles import Config


def sparse_prefill(
    q: Tensor, k: Tensor, v: Tensor,
    q_indices: Tensor | None, q_cu_seqlens: Tensor | None, q_positions: Tensor | None, q_max_seqlen: int,
    k_indices: Tensor | None, k_cu_seqlens: Tensor | None, k_positions: Tensor | None, k_max_seqlen: int,
    causal: bool, scale: float, importance_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, log-sum-exp and importance, as the schema in ``flashsloth_ops/sparse_prefill.py`` describes them."""
    if scale < 0:  # the kernel takes the running maximum of q k^T before it is scaled
        q, scale = -q, -scale
    q, k, v = (with_contiguous_rows(t) for t in (q, k, v))
    q_index, k_index = (
        (q_indices, q_cu_seqlens, q_positions, q_max_seqlen),
        (k_indices, k_cu_seqlens, k_positions, k_max_seqlen),
    )
    call = Call.of(q, k, q_index, k_index, causal, scale)
    out, lse = empty_token_major(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    if call.packed and call.queries.indices is not None:
        out.zero_()  # rows of no sequence: across packed sequences a list has no order to look a row up in
        lse.fill_(-torch.inf)

    def run(config: Config) -> None:
        _attention(call, config, q, k, v, out, lse)

    run(tiles.choose("attention_kernel", call, run))
    importance = q.new_empty(0, dtype=torch.float32)
    if importance_rows is not None:
        importance = _importance(call, tiles.importance(call), q, k, lse, importance_rows.contiguous())
    return out, lse, importance


def sparse_prefill_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_indices: Tensor | None, q_cu_seqlens: Tensor | None, q_positions: Tensor | None, q_max_seqlen: int,
    k_indices: Tensor | None, k_cu_seqlens: Tensor | None, k_positions: Tensor | None, k_max_seqlen: int,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from what the forward of any backend returned."""
    q, k, v, out, dout = (with_contiguous_rows(t) for t in (q, k, v, out, dout))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    q_index, k_index = (
        (q_indices, q_cu_seqlens, q_positions, q_max_seqlen),
        (k_indices, k_cu_seqlens, k_positions, k_max_seqlen),
    )
    call = Call.of(q, k, q_index, k_index, causal, scale)
    dq, dk, dv = (empty_token_major(t) for t in (q, k, v))
    if call.packed and call.queries.indices is not None:
        dq.zero_()
    if call.packed and call.keys.indices is not None:
        dk.zero_()
        dv.zero_()
    delta = torch.empty_like(lse)

    def run_dq(config: Config) -> None:
        _dq(call, config, q, k, v, out, dout, lse, dlse, delta, dq)

    def run_dkdv(config: Config) -> None:
        _dkdv(call, config, q, k, v, dout, lse, delta, dk, dv)

    run_dq(tiles.choose("dq_kernel", call, run_dq))
    run_dkdv(tiles.choose("dkdv_kernel", call, run_dkdv))
    return dq, dk, dv


def _attention(call: Call, config: Config, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    strides, constants = call.constants(q, k, v, out)
    block_m = config["BLOCK_M"]
    blocks = -(-call.members // block_m)
    programs = blocks * call.lists
    fill_blocks = call.fill_blocks(call.queries, block_m)
    splits = tiles.splits(call, programs)
    partial = partial_lse = None
    if splits > 1:
        partial = q.new_empty(splits, programs, block_m, sum(head_tiles(call.dim)), dtype=torch.float32)
        partial_lse = q.new_empty(splits, programs, block_m, dtype=torch.float32)
    launch(
        attention_kernel,
        (programs + fill_blocks * call.sequences, splits),
        q, k, v, out, lse, partial, partial_lse,
        *call.queries.arguments, *call.keys.arguments, *strides, *strides_of_rows(lse),
        *call.order(blocks), fill_blocks, call.scale, splits,
        **constants, **tiles.precision(call), SPLIT=splits > 1, FILL=fill_blocks > 0, **config,
    )  # fmt: skip
    if splits > 1:
        launch(
            combine_kernel,
            (programs,),
            out, lse, partial, partial_lse,
            *call.queries.arguments, *strides[-3:], *strides_of_rows(lse), *call.order(blocks), splits,
            **_without(constants, "WIDE", "CAUSAL", "SAME"), BLOCK_M=block_m, num_warps=8 if block_m > 64 else 4,
        )  # fmt: skip


def _importance(call: Call, config: Config, q: Tensor, k: Tensor, lse: Tensor, listed: Tensor) -> Tensor:
    """(B, Sk) or (Tk,), from the attention of the listed rows alone."""
    shape = k.shape[:1] if call.packed else (k.shape[0], k.shape[2])
    every_key = call.keys.indices is None and call.heads > 0
    received = (q.new_empty if every_key else q.new_zeros)(shape, dtype=torch.float32)
    partial = q.new_empty(call.heads, call.sequences, call.keys.bound, dtype=torch.float32)
    strides, constants = call.constants(q, k)
    blocks = -(-call.keys.bound // config["BLOCK_N"])
    launch(
        importance_kernel,
        (blocks * call.lists,),
        q, k, lse, listed, partial,
        *call.queries.arguments, *call.keys.arguments, *strides, *strides_of_rows(lse),
        listed.stride(0) if listed.dim() == 2 else 0, listed.shape[-1], *call.order(blocks), call.scale,
        **_without(constants, "WIDE", "BASE2"), **tiles.precision(call), **config,
    )  # fmt: skip
    launch(
        importance_sum_kernel,
        (blocks * call.sequences if call.heads else 0,),
        partial, received, *call.keys.arguments, 0 if call.packed else received.stride(0), blocks, call.heads,
        call.sequences,
        PACKED=call.packed, BLOCK_N=config["BLOCK_N"], num_warps=2,
    )  # fmt: skip
    return received


def _dq(
    call: Call, config: Config, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor,
    dlse: Tensor | None, delta: Tensor, dq: Tensor,
) -> None:  # fmt: skip
    strides, constants = call.constants(q, k, v, out, dout, dq)
    blocks = -(-call.members // config["BLOCK_M"])
    fill_blocks = call.fill_blocks(call.queries, config["BLOCK_M"])
    launch(
        dq_kernel,
        (blocks * call.lists + fill_blocks * call.sequences,),
        q, k, v, out, dout, lse, dlse, delta, dq,
        *call.queries.arguments, *call.keys.arguments, *strides, *strides_of_rows(lse),
        *call.order(blocks), fill_blocks, call.scale,
        **constants, **tiles.precision(call, backward=True), FILL=fill_blocks > 0, **config,
    )  # fmt: skip


def _dkdv(
    call: Call, config: Config, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor,
    dv: Tensor,
) -> None:  # fmt: skip
    strides, constants = call.constants(q, k, v, dout, dk)
    blocks = -(-call.keys.bound // config["BLOCK_N"])
    fill_blocks = call.fill_blocks(call.keys, config["BLOCK_N"])
    launch(
        dkdv_kernel,
        (blocks * call.lists + fill_blocks * call.sequences,),
        q, k, v, dout, lse, delta, dk, dv,
        *call.queries.arguments, *call.keys.arguments, *strides, *strides_of_rows(lse),
        *call.order(blocks), fill_blocks, call.scale,
        **constants, **tiles.precision(call, backward=True), FILL=fill_blocks > 0, **config,
    )  # fmt: skip


def _without(constants: dict[str, object], *names: str) -> dict[str, object]:
    return {name: value for name, value in constants.items() if name not in names}
