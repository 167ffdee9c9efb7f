"""Attention over the tokens that are kept, for ragged batches, pruned prompts and chunked prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsloth_ops import _checks as check
from flashsloth_ops import _library as library
from flashsloth_ops import backend
from flashsloth_ops.reference import sparse_prefill as reference
from flashsloth_ops.token_index import TokenIndex


def token_sparse_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: TokenIndex | tuple[TokenIndex | None, TokenIndex | None] | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    importance_rows: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention in which only listed rows ask and only listed rows answer; the kernel gathers them itself.

        out = softmax(scale q k^T + mask) v       the mask admits kept keys of the query's sequence and,
                                                  when causal, of positions up to the query's

    Args:
        q: ``(B, Hq, Sq, d)``, or packed sequences ``(Tq, Hq, d)``; fp32, bf16, fp16 (fp64 for checks), any strides.
        k, v: ``(B, Hkv, Sk, d)`` or ``(Tk, Hkv, d)``, dtype and device of q; Hkv divides Hq.
        index: the rows that take part: a :class:`TokenIndex` for queries and keys alike, or a pair
            ``(q_index, k_index)``. None, in its place or in the pair, keeps every row; packed tensors are then one
            sequence.
        causal: admit keys whose position is at most the query's. Positions are those of the index; without one,
            key j is at position j and query i at ``Sk - Sq + i``, so that queries are the last rows of the sequence.
        scale: of the scores, ``d ** -0.5`` when None.
        return_lse: also return the log-sum-exp of the scores of each query, differentiable.
        importance_rows: integer tensor ``(R,)`` or ``(B, R)`` of query rows (of rows of the packed tensor: ``(R,)``),
            for which the attention that keys receive is wanted. Entries outside q or not kept are ignored.

    Returns:
        out, of the shape of q, zero in rows that are not kept or have no key to attend to; then, on request, lse of
        the shape of q without d, in fp32, -inf in such rows; then importance, fp32, ``(B, Sk)`` or ``(Tk,)``: the mean
        over heads and over the listed rows of the key's sequence, zero where there are none. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, index or row list. The contents of an index are
            checked where this costs no wait: in eager mode, on a CPU. Elsewhere wrong entries are ignored.
        BackendError: a forced backend cannot serve the call.

    Forward keeps out and lse; backward recomputes the probabilities from them. What rows not kept hold never
    matters, and their gradients are zero.
    """
    check.floating("q", q)
    q, k, v = check.autocast(q, k, v)  # type: ignore[assignment]
    _check_tensors(q, k, v)
    q_index, k_index = _pair(index, q, k)
    _check_indices(q, k, q_index, k_index)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    rows = None if importance_rows is None else _check_importance_rows(q, importance_rows)

    chosen = backend.select("sparse_prefill", q, head_dim=q.shape[-1])
    backend.log_call("sparse_prefill", chosen, q=q, k=k, importance_rows=rows)
    importance: Tensor | None
    if chosen == "reference":
        out, lse, importance = reference.token_sparse_prefill(
            q, k, v, q_index, k_index, causal=causal, scale=scale, importance_rows=rows
        )
    else:
        out, lse, importance = library.kernel("sparse_prefill", chosen)(
            q, k, v, *_fields(q_index), *_fields(k_index), bool(causal), float(scale), rows
        )
    wanted = [out]
    if return_lse:
        wanted.append(lse)
    if importance_rows is not None:
        assert importance is not None
        wanted.append(importance)
    return tuple(wanted) if len(wanted) > 1 else out


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    check.like("k", k, q, "q")
    check.like("v", v, q, "q")
    if q.dim() not in (3, 4):
        raise ValueError(f"q: expected (B, Hq, Sq, d) or packed (Tq, Hq, d), got {tuple(q.shape)}")
    dim = q.shape[-1]
    if dim < 1:
        raise ValueError(f"q: expected a head size of 1 or more, got {tuple(q.shape)}")
    why = " with the B and d of q" if q.dim() == 4 else " with the d of q"
    check.shape("k", k, (q.shape[0], "Hkv", "Sk", dim) if q.dim() == 4 else ("Tk", "Hkv", dim), why)
    check.shape("v", v, tuple(k.shape), " as k")
    heads, kv_heads = q.shape[1], k.shape[1]
    if (heads % kv_heads if kv_heads else heads) != 0:
        raise ValueError(f"k: expected a number of heads that divides the {heads} of q, got {kv_heads}")


def _pair(index: object, q: Tensor, k: Tensor) -> tuple[TokenIndex | None, TokenIndex | None]:
    if index is None:
        return None, None
    if isinstance(index, TokenIndex):
        q_rows, k_rows = (t.shape[0] if t.dim() == 3 else t.shape[2] for t in (q, k))
        if q_rows != k_rows:
            raise ValueError(
                f"index: expected a pair (q_index, k_index), as q has {q_rows} rows and k {k_rows}, got one TokenIndex"
            )
        return index, index
    if not isinstance(index, tuple) or len(index) != 2:
        raise TypeError(f"index: expected a TokenIndex, a pair of them or None, got {type(index).__name__}")
    for name, one in (("q_index", index[0]), ("k_index", index[1])):
        if one is not None and not isinstance(one, TokenIndex):
            raise TypeError(f"{name}: expected a TokenIndex or None, got {type(one).__name__}")
    return index


def _check_indices(q: Tensor, k: Tensor, q_index: TokenIndex | None, k_index: TokenIndex | None) -> None:
    packed = q.dim() == 3
    given = q_index if q_index is not None else k_index
    if given is None:
        return
    sequences = q.shape[0]
    if packed:
        sequences = max(check.tensor("index.cu_seqlens", given.cu_seqlens).numel() - 1, 0)
        for name, one in (("q_index", q_index), ("k_index", k_index)):
            if one is None and sequences != 1:
                raise ValueError(
                    f"{name}: expected a TokenIndex of {sequences} sequences as the other has, got None (one sequence)"
                )
    q_rows, k_rows = (t.shape[0 if packed else 2] for t in (q, k))
    if q_index is not None and k_index is not None and q_rows == k_rows and _same(q_index, k_index):
        q_index.validate("index", q.device, sequences, q_rows, packed=packed)
        return
    for name, one, rows in (("q_index", q_index, q_rows), ("k_index", k_index, k_rows)):
        if one is not None:
            one.validate(name, q.device, sequences, rows, packed=packed)


def _same(a: TokenIndex, b: TokenIndex) -> bool:
    """One index for both sides, by its tensors: torch 2.10 cannot trace ``is`` between named tuples."""
    tensors = a.indices is b.indices and a.cu_seqlens is b.cu_seqlens and a.positions is b.positions
    return tensors and a.max_seqlen == b.max_seqlen


def _check_importance_rows(q: Tensor, rows: Tensor) -> Tensor:
    check.integral("importance_rows", rows)
    if rows.device != q.device:
        raise ValueError(f"importance_rows: expected device {q.device} as q, got {rows.device}")
    if q.dim() == 3:
        check.shape("importance_rows", rows, ("R",), " of rows of packed q")
    elif rows.dim() != 1:
        check.shape("importance_rows", rows, (q.shape[0], "R"), " or (R,)")
    return rows.to(torch.int64)


def _fields(index: TokenIndex | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    if index is None:
        return None, None, None, 0
    narrow = (None if t is None else t.to(torch.int32) for t in (index.indices, index.cu_seqlens, index.positions))
    return *narrow, index.max_seqlen  # type: ignore[return-value]


# ---- the op: fake, autograd, default implementation, schema ----


def _empty_token_major(like: Tensor) -> Tensor:
    """Memory in the order (batch, row, head, d), which the projection after attention reads as a matrix."""
    if like.dim() == 3:
        return like.new_empty(like.shape)
    batch, heads, rows, dim = like.shape
    return like.new_empty(batch, rows, heads, dim).transpose(1, 2)


def _token_major(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format) if t.dim() == 3 else _empty_token_major(t).copy_(t)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest):  # type: ignore[no-untyped-def]
    listed = rest[-1]
    received = (0,) if listed is None else (k.shape[0],) if k.dim() == 3 else (k.shape[0], k.shape[2])
    wide = check.wide(q.dtype)
    return _empty_token_major(q), q.new_empty(q.shape[:-1], dtype=wide), q.new_empty(received, dtype=wide)


def _fake_backward(dout, dlse, q: Tensor, k: Tensor, v: Tensor, *rest):  # type: ignore[no-untyped-def]
    return _empty_token_major(q), _empty_token_major(k), _empty_token_major(v)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, q_rows, q_cu, q_positions, q_max, k_rows, k_cu, k_positions, k_max, causal, scale, _ = inputs
    out, lse, importance = output
    ctx.save_for_backward(q, k, v, out, lse, q_rows, q_cu, q_positions, k_rows, k_cu, k_positions)
    ctx.bounds, ctx.causal, ctx.scale = (q_max, k_max), causal, scale
    ctx.mark_non_differentiable(importance)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, _):  # type: ignore[no-untyped-def]
    if dout is None and dlse is None:
        return (None,) * 14
    q, k, v, out, lse, q_rows, q_cu, q_positions, k_rows, k_cu, k_positions = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout  # only the log-sum-exp is used
    run = library.backward_kernel("sparse_prefill_backward", ctx.overload, q.device.type)
    gradients = run(
        dout, dlse, q, k, v, out, lse, q_rows, q_cu, q_positions, ctx.bounds[0], k_rows, k_cu, k_positions,
        ctx.bounds[1], ctx.causal, ctx.scale,
    )  # fmt: skip
    return *gradients, *(None,) * 11


def _index(rows: Tensor | None, cu_seqlens: Tensor | None, positions: Tensor | None, bound: int) -> TokenIndex | None:
    return None if rows is None or cu_seqlens is None else TokenIndex(rows, cu_seqlens, bound, positions)


def _plain(q, k, v, *rest):  # type: ignore[no-untyped-def]
    *indices, causal, scale, listed = rest
    out, lse, importance = reference.token_sparse_prefill(
        q, k, v, _index(*indices[:4]), _index(*indices[4:]), causal=causal, scale=scale, importance_rows=listed
    )
    if importance is None:
        importance = lse.new_empty(0)
    return _token_major(out), lse.contiguous(), importance


def _plain_backward(dout, dlse, q, k, v, out, lse, *rest):  # type: ignore[no-untyped-def]
    *indices, causal, scale = rest
    gradients = reference.token_sparse_prefill_backward(
        dout, dlse, q, k, v, out, lse, _index(*indices[:4]), _index(*indices[4:]), causal=causal, scale=scale
    )
    return tuple(_token_major(g) for g in gradients)


_INDEX = (
    "Tensor? q_indices, Tensor? q_cu_seqlens, Tensor? q_positions, SymInt q_max_seqlen, "
    "Tensor? k_indices, Tensor? k_cu_seqlens, Tensor? k_positions, SymInt k_max_seqlen, bool causal, float scale"
)
library.define(
    "sparse_prefill",
    "sparse_prefill",
    f"(Tensor q, Tensor k, Tensor v, {_INDEX}, Tensor? importance_rows) -> (Tensor out, Tensor lse, Tensor importance)",
    fake=_fake,
    plain=_plain,
    setup_context=_setup_context,
    backward=_backward,
)
library.define(
    "sparse_prefill",
    "sparse_prefill_backward",
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_INDEX})"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    fake=_fake_backward,
    plain=_plain_backward,
    overloads=("default", "triton"),
)
