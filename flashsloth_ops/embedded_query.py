"""Embedded-query attention: a few learnable queries read the question, then fetch what it needs from the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flashsloth_ops import _checks as check
from flashsloth_ops import _library as library
from flashsloth_ops import backend
from flashsloth_ops.reference import embedded_query as reference

_MODULES = {
    "down_text": "down_projector_learnable_text",
    "down_image": "down_projector_image",
    "ln_q": "layers.0.ln_q",
    "ln_text": "layers.0.ln_text",
    "ln_kv": "layers.0.ln_kv",
    **{f"{a}_{p}": f"layers.0.{a}_attn.{p}_proj" for a in ("t2q", "i2q") for p in "qkv"},
    "up": "up_projector",
}


class EmbeddedQueryParams(NamedTuple):
    """Weights of embedded-query attention, named as its steps; E is the inner size, 576 in the released models.

    ============== ============================ =================================================
    ``down_text``  ``(E, Dm)``, ``(E,)``        projects query rows and text rows, shared
    ``down_image`` ``(E, Di)``, ``(E,)``        projects image tokens
    ``ln_*``       ``(E,)``, ``(E,)``           layer norms of query rows, text rows, image tokens
    ``t2q_*``      ``(E, E)``, ``(E,)``         text to query: query, key, value projections
    ``i2q_q, _k``  ``(E, E)``, ``(E,)``         image to query: query and key projections
    ``i2q_v``      ``(Di, Di)``, ``(Di,)``      its value projection, of the raw image tokens
    ``up``         ``(Dm, Di)``, ``(Dm,)``      projects back to the model's size
    ============== ============================ =================================================
    """

    down_text_weight: Tensor
    down_text_bias: Tensor
    down_image_weight: Tensor
    down_image_bias: Tensor
    ln_q_weight: Tensor
    ln_q_bias: Tensor
    ln_text_weight: Tensor
    ln_text_bias: Tensor
    ln_kv_weight: Tensor
    ln_kv_bias: Tensor
    t2q_q_weight: Tensor
    t2q_q_bias: Tensor
    t2q_k_weight: Tensor
    t2q_k_bias: Tensor
    t2q_v_weight: Tensor
    t2q_v_bias: Tensor
    i2q_q_weight: Tensor
    i2q_q_bias: Tensor
    i2q_k_weight: Tensor
    i2q_k_bias: Tensor
    i2q_v_weight: Tensor
    i2q_v_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor

    @classmethod
    def from_state_dict(cls, sd: Mapping[str, Tensor], prefix: str = "") -> EmbeddedQueryParams:
        """From the names of the official checkpoints, each after ``prefix`` (``model.lqformer.`` in whole models).

        Raises KeyError listing the names that are missing, ValueError listing shapes that do not fit.
        """
        names = {f: f"{prefix}{_MODULES[f.rpartition('_')[0]]}.{f.rpartition('_')[2]}" for f in cls._fields}
        missing = [name for name in names.values() if name not in sd]
        if missing:
            raise KeyError(f"state dict: missing {len(missing)} of {len(names)} names: {', '.join(missing)}")
        params = cls(*(sd[name] for name in names.values()))
        wrong = [
            f"{names[field]}: expected {wanted}, got {tuple(value.shape)}"
            for field, value, wanted in zip(cls._fields, params, params._shapes(), strict=True)
            if tuple(value.shape) != wanted
        ]
        if wrong:
            raise ValueError(f"state dict: shapes do not fit together: {'; '.join(wrong)}")
        return params

    def _shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all fields that follow from those of the two down-projections."""
        down_text, down_image = self.down_text_weight, self.down_image_weight
        model, inner = down_text.shape[-1] if down_text.dim() else 0, down_text.shape[0] if down_text.dim() else 0
        dim = down_image.shape[-1] if down_image.dim() else 0
        shapes = {
            "down_text": (inner, model),
            "down_image": (inner, dim),
            "i2q_v": (dim, dim),
            "up": (model, dim),
        }
        shapes |= {f"{a}_{p}": (inner, inner) for a in ("t2q", "i2q") for p in "qkv" if (a, p) != ("i2q", "v")}
        found: list[tuple[int, ...]] = []
        for field in self._fields:
            step, _, kind = field.rpartition("_")
            shape = shapes.get(step, (inner,))
            found.append(shape if kind == "weight" else shape[:1])
        return found

    def _kernel_params(self) -> list[Tensor]:
        """What the op takes besides the image's state, in the order of csrc/cpu/embedded_query.h."""
        return [*self[:2], *self[4:]]


class ImageState(NamedTuple):
    """What depends on the image alone. Computed once, it serves every question and turn on that image.

    y ``(Bi, N, E)``: the down-projected image, in its dtype; mean and rstd ``(Bi, N)``: the layer norm's statistics of
    the rows of y, in fp32 (fp64 for fp64). Gradients flow through y alone; mean and rstd are functions of it.
    """

    y: Tensor
    mean: Tensor
    rstd: Tensor

    @classmethod
    def from_image(cls, image: Tensor, params: EmbeddedQueryParams, *, eps: float = 1e-5) -> ImageState:
        """The state of images ``(Bi, N, Di)``: 2 N Di E flops each. ``eps`` is that of the layer norm.

        Raises TypeError or ValueError for a wrong type, dtype, shape or device.
        """
        check.floating("image", image)
        _check_params(params)
        image, weight, bias = _autocast(image, params.down_image_weight, params.down_image_bias)
        check.shape("image", image, ("Bi", "N", "Di"))
        check.like("down_image_weight", weight, image, "image")
        check.like("down_image_bias", bias, image, "image")
        check.shape("down_image_weight", weight, ("E", image.shape[2]), " with the Di of image")
        check.shape("down_image_bias", bias, (weight.shape[0],))
        chosen = backend.select("embedded_query", image, batch=image.shape[0], widths=tuple(weight.shape))
        backend.log_call("image_state", chosen, image=image, weight=weight)
        if chosen == "reference":
            return cls(*_plain_state(image, weight, bias, eps))
        return cls(*library.kernel("image_state", chosen)(image, weight, bias, eps))


def embedded_query_attention(
    query: Tensor,
    text: Tensor,
    image: Tensor,
    params: EmbeddedQueryParams,
    *,
    num_heads: int,
    text_lengths: Tensor | None = None,
    image_state: ImageState | None = None,
    eps: float = 1e-5,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Let Q embedded queries read the question and then the image (arXiv 2412.04317, "EmbQ").

        told = attention(ln_q(down_text(query)) -> ln_text(down_text(text)))     no residual, no output projection
        seen = attention(told -> keys ln_kv(down_image(image)), values image)    scores scaled by 1/sqrt(E / heads)
        out  = query + up(seen)

    Args:
        query: ``(B, Q, Dm)``; fp32, bf16, fp16 (fp64 for checks).
        text: ``(B, T, Dm)``, the rows of the question, un-normalised; dtype and device of query, like all that follow.
        image: ``(Bi, N, Di)``, the raw vision tokens. Bi divides B: question i reads image ``i // (B / Bi)``, so
            several questions on one image lie next to each other and share one pass over it.
        params: the weights.
        num_heads: heads of both attentions; divides E and Di.
        text_lengths: int ``(B,)``, valid rows of each text; the others are padding, may hold anything and get no
            gradient. A question of length 0 attends to nothing there: its ``told`` is zero. None: all T rows.
        image_state: of ``image``, from :meth:`ImageState.from_image` with the same params and eps. Computed when None.
        eps: of the three layer norms.
        return_weights: also return the image attention.

    Returns:
        The updated query rows ``(B, Q, Dm)``; then, on request, the image attention averaged over heads ``(B, Q, N)``
        in fp32 (fp64 for fp64), which is for looking at and not differentiable. Without image tokens ``seen`` is zero.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, number of heads or text length.
        BackendError: a forced backend cannot serve the call.

    Keys and values are not formed for a few questions an image: 2 Q heads N (Di + E) flops a question, and 2 N Di E an
    image for its state. For backward the op keeps Q heads Di numbers a question, nothing that grows with N.
    """
    check.floating("query", query)
    check.tensor("text", text)
    check.tensor("image", image)
    _check_params(params)
    query, text, image, *cast = _autocast(query, text, image, *params)
    params = EmbeddedQueryParams(*cast)
    _check_inputs(query, text, image, params, num_heads)
    lengths = None if text_lengths is None else _check_lengths(text_lengths, text)

    inner, model = params.down_text_weight.shape
    chosen = backend.select(
        "embedded_query",
        query,
        head_dim=inner // num_heads,
        batch=query.shape[0],
        widths=(model, inner, image.shape[2]),
    )
    if image_state is None:
        state = ImageState.from_image(image, params, eps=eps)
    else:
        state = _check_state(image_state, image, params)
    backend.log_call("embedded_query", chosen, query=query, text=text, image=image)
    if chosen == "reference":
        out, weights = reference.embedded_query_attention(
            query, text, image, params, num_heads=num_heads, text_lengths=lengths, image_y=state.y, eps=eps
        )
        weights = weights.detach()
    else:
        used = params._kernel_params()
        save = torch.is_grad_enabled() and any(t.requires_grad for t in (query, text, image, state.y, *used))
        out, weights, *_ = library.kernel("embedded_query", chosen)(
            query, text, lengths, image, *state, used, num_heads, eps, return_weights, save
        )
    return (out, weights) if return_weights else out


def _autocast(*tensors: Tensor) -> list[Tensor]:
    return [t for t in check.autocast(*tensors) if t is not None]


def _check_params(params: EmbeddedQueryParams) -> None:
    if not isinstance(params, EmbeddedQueryParams):
        raise TypeError(f"params: expected EmbeddedQueryParams, got {type(params).__name__}")
    for name, value in zip(params._fields, params, strict=True):
        check.tensor(name, value)


def _check_inputs(query: Tensor, text: Tensor, image: Tensor, params: EmbeddedQueryParams, num_heads: int) -> None:
    check.like("text", text, query, "query")
    check.like("image", image, query, "query")
    check.shape("query", query, ("B", "Q", "Dm"))
    check.shape("text", text, (query.shape[0], "T", query.shape[2]), " with the B and Dm of query")
    check.shape("image", image, ("Bi", "N", "Di"))
    for name, value in zip(params._fields, params, strict=True):
        check.like(name, value, query, "query")
    check.shape("down_text_weight", params.down_text_weight, ("E", query.shape[2]), " with the Dm of query")
    inner, dim = params.down_text_weight.shape[0], image.shape[2]
    check.shape("down_image_weight", params.down_image_weight, (inner, dim), " with the Di of image")
    for name, value, wanted in zip(params._fields, params, params._shapes(), strict=True):
        check.shape(name, value, wanted)
    batch, images = query.shape[0], image.shape[0]
    if (batch % images if images else batch) != 0:
        raise ValueError(f"image: expected a batch that divides the {batch} of query, got {images}")
    if not isinstance(num_heads, int) or num_heads < 1 or inner % num_heads or dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of {inner} and {dim}, got {num_heads!r}")


def _check_lengths(text_lengths: Tensor, text: Tensor) -> Tensor:
    check.integral("text_lengths", text_lengths)
    check.shape("text_lengths", text_lengths, (text.shape[0],))
    if text_lengths.device != text.device:
        raise ValueError(f"text_lengths: expected device {text.device} as text, got {text_lengths.device}")
    # A look at values on another device would wait for it, and a tracer has none.
    if text_lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = [n for n in text_lengths.tolist() if not 0 <= n <= text.shape[1]]
        if wrong:
            raise ValueError(f"text_lengths: expected lengths in [0, {text.shape[1]}], got {wrong[0]}")
    return text_lengths.to(torch.int64)


def _check_state(state: ImageState, image: Tensor, params: EmbeddedQueryParams) -> ImageState:
    if not isinstance(state, ImageState):
        raise TypeError(f"image_state: expected ImageState, got {type(state).__name__}")
    y, mean, rstd = state
    (y,) = _autocast(check.tensor("image_state.y", y))
    check.like("image_state.y", y, image, "image")
    check.shape("image_state.y", y, (*image.shape[:2], params.down_image_bias.shape[0]), " with the Bi and N of image")
    for name, value in (("mean", mean), ("rstd", rstd)):
        t = check.tensor(f"image_state.{name}", value)
        if t.dtype != check.wide(image.dtype) or t.device != image.device:
            wanted = f"{backend.short(check.wide(image.dtype))} on {image.device}"
            raise TypeError(f"image_state.{name}: expected {wanted}, got {backend.short(t.dtype)} on {t.device}")
        check.shape(f"image_state.{name}", t, tuple(image.shape[:2]), " with the Bi and N of image")
    return ImageState(y, mean, rstd)


# ---- the ops: fakes, autograd, default implementations, schemas ----


def _fake_state(image: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistic = image.new_empty(image.shape[:2], dtype=check.wide(image.dtype))
    return image.new_empty((*image.shape[:2], weight.shape[0])), statistic, torch.empty_like(statistic)


def _fake(query, text, text_lengths, image, y, mean, rstd, params, num_heads, eps, return_weights, save):  # type: ignore[no-untyped-def]
    batch, queries, _ = query.shape
    tokens, dim = image.shape[1:]
    inner, kept, wide = y.shape[2], batch if save else 0, check.wide(query.dtype)
    return (
        query.new_empty(query.shape),
        query.new_empty((batch if return_weights else 0, queries, tokens), dtype=wide),
        query.new_empty((kept * (queries + text.shape[1]), inner), dtype=wide),
        query.new_empty((kept, queries, inner), dtype=wide),
        query.new_empty((kept, queries, num_heads, dim), dtype=wide),
        query.new_empty((kept, queries, dim), dtype=wide),
        query.new_empty((kept, queries, num_heads, 2), dtype=wide),
    )


def _fake_backward(  # type: ignore[no-untyped-def]
    dout, query, text, text_lengths, image, y, mean, rstd, params, hidden, told, pooled, seen, softmax, num_heads, eps,
    need_image, need_y, need_params,
):  # fmt: skip
    return (
        query.new_empty(query.shape),
        text.new_empty(text.shape),
        image.new_empty((image.shape[0] if need_image else 0, *image.shape[1:])),
        y.new_empty((y.shape[0] if need_y else 0, *y.shape[1:])),
        [p.new_empty(p.shape if need_params else (0, *p.shape[1:])) for p in params],
    )


def _setup_state(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    image, weight, _, _ = inputs
    ctx.save_for_backward(image, weight)
    ctx.mark_non_differentiable(*output[1:])


def _backward_state(ctx, dy, _mean, _rstd):  # type: ignore[no-untyped-def]
    image, weight = ctx.saved_tensors
    need_image, need_weight, need_bias, _ = ctx.needs_input_grad
    rows = dy.flatten(0, 1)
    return (
        dy @ weight if need_image else None,
        rows.mT @ image.flatten(0, 1) if need_weight else None,
        rows.sum(0) if need_bias else None,
        None,
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, text, lengths, image, y, mean, rstd, params, num_heads, eps, _, save = inputs
    _, weights, *saved = output
    if save:
        ctx.save_for_backward(query, text, lengths, image, y, mean, rstd, *params, *saved)
    ctx.num_heads, ctx.eps = num_heads, eps
    ctx.mark_non_differentiable(weights, *saved)


def _backward(ctx, dout, *_):  # type: ignore[no-untyped-def]
    kept = ctx.saved_tensors  # once: checkpointing unpacks a second time by recomputing
    if not kept:
        raise RuntimeError("embedded_query: no gradient without what forward keeps; call the op with save=True")
    inputs, params, saved = kept[:7], kept[7:-5], kept[-5:]
    need = ctx.needs_input_grad
    need_image, need_y, need_params = need[3], need[4], any(need[7])
    run = library.backward_kernel("embedded_query_backward", ctx.overload, dout.device.type)
    dquery, dtext, dimage, dy, dparams = run(
        dout, *inputs, list(params), *saved, ctx.num_heads, ctx.eps, need_image, need_y, need_params
    )
    return (
        dquery if need[0] else None,
        dtext if need[1] else None,
        None,
        dimage if need_image else None,
        dy if need_y else None,
        None,
        None,
        [d if n else None for d, n in zip(dparams, need[7], strict=True)],
        *(None,) * 4,
    )


def _plain_state(image: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.nn.functional.linear(image, weight, bias)
    wide = y.detach().to(check.wide(y.dtype))
    mean = wide.mean(-1)
    return y, mean, torch.rsqrt((wide - mean[..., None]).square().mean(-1) + eps)


def _plain(query, text, lengths, image, y, mean, rstd, params, num_heads, eps, return_weights, save):  # type: ignore[no-untyped-def]
    out, weights, *saved = reference.absorbed_forward(query, text, lengths, image, y, rstd, params, num_heads, eps)
    kept = saved if save else [t[:0].clone() for t in saved]
    return out, weights if return_weights else weights[:0].clone(), *kept


def _plain_backward(*args):  # type: ignore[no-untyped-def]
    *inputs, need_image, need_y, need_params = args
    dquery, dtext, dimage, dy, dparams = reference.absorbed_backward(*inputs)
    dimage = dimage if need_image else dimage[:0].clone()
    dy = dy if need_y else dy[:0].clone()
    return dquery, dtext, dimage, dy, [d if need_params else d[:0].clone() for d in dparams]


_INPUTS = "Tensor query, Tensor text, Tensor? text_lengths, Tensor image, Tensor y, Tensor mean, Tensor rstd, "
_INPUTS += "Tensor[] params, "
_SAVED = "Tensor hidden, Tensor told, Tensor pooled, Tensor seen, Tensor softmax"
library.define(
    "embedded_query",
    "image_state",
    "(Tensor image, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_fake_state,
    plain=_plain_state,
    setup_context=_setup_state,
    backward=_backward_state,
)
library.define(
    "embedded_query",
    "embedded_query",
    f"({_INPUTS} int num_heads, float eps, bool return_weights, bool save) -> (Tensor out, Tensor weights, {_SAVED})",
    fake=_fake,
    plain=_plain,
    setup_context=_setup_context,
    backward=_backward,
)
library.define(
    "embedded_query",
    "embedded_query_backward",
    f"(Tensor dout, {_INPUTS} {_SAVED}, int num_heads, float eps, bool need_image, bool need_y, bool need_params)"
    " -> (Tensor dquery, Tensor dtext, Tensor dimage, Tensor dy, Tensor[] dparams)",
    fake=_fake_backward,
    plain=_plain_backward,
    overloads=("default", "triton"),
)
