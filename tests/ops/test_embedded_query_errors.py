"""embedded_query_attention: weights by their official names, and errors that say what was expected and what came."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import EmbeddedQueryParams, ImageState, embedded_query_attention
from flashsloth_ops import embedded_query as module
from tests.ops.query_cases import NAMES, make, raw_arguments
from tests.support import needs_extension

# ---- weights by their official names ----


def state_dict(prefix: str = "") -> dict[str, Tensor]:
    names = [f"{prefix}{module._MODULES[f.rpartition('_')[0]]}.{f.rpartition('_')[2]}" for f in NAMES[3:]]
    return dict(zip(names, make()[3:], strict=True))


def test_from_state_dict() -> None:
    weights = state_dict("model.lqformer.")
    assert "model.lqformer.layers.0.t2q_attn.k_proj.bias" in weights
    params = EmbeddedQueryParams.from_state_dict({**weights, "other": torch.ones(1)}, "model.lqformer.")
    for got, want in zip(params, make()[3:], strict=True):
        assert torch.equal(got, want)


def test_from_state_dict_lists_what_is_wrong() -> None:
    weights = state_dict()
    for name in ("up_projector.bias", "layers.0.ln_q.weight"):
        del weights[name]
    with pytest.raises(KeyError, match=r"missing 2 of 24 names: layers.0.ln_q.weight, up_projector.bias"):
        EmbeddedQueryParams.from_state_dict(weights)
    with pytest.raises(KeyError, match=r"missing 24 of 24 names: x.down_projector_learnable_text.weight, "):
        EmbeddedQueryParams.from_state_dict(weights, "x.")
    weights = {**state_dict(), "up_projector.bias": torch.ones(7), "layers.0.ln_q.weight": torch.ones(24, 1)}
    message = "layers.0.ln_q.weight: expected (24,), got (24, 1); up_projector.bias: expected (20,), got (7,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        EmbeddedQueryParams.from_state_dict(weights)
    with pytest.raises(ValueError, match=r"down_projector_learnable_text.weight: expected \(0, 0\), got \(\)"):
        EmbeddedQueryParams.from_state_dict({**weights, "down_projector_learnable_text.weight": torch.ones(())})


# ---- errors: the argument, what was expected, what came ----

Q, T, X, *W = make(4, 2, 9)
P = EmbeddedQueryParams(*W)
STATE = ImageState(torch.ones(2, 9, 24), torch.ones(2, 9), torch.ones(2, 9))
H = {"num_heads": 4}


def replaced(**fields: Any) -> EmbeddedQueryParams:
    return P._replace(**fields)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (("q", T, X, P), H, TypeError, "query: expected a tensor, got str"),
        ((Q, None, X, P), H, TypeError, "text: expected a tensor, got NoneType"),
        ((Q, T, [1], P), H, TypeError, "image: expected a tensor, got list"),
        ((Q.int(), T, X, P), H, TypeError, "query: expected float32, bfloat16, float16, float64, got int32"),
        ((Q, T.double(), X, P), H, TypeError, "text: expected float32 as query, got float64"),
        ((Q, T, X.half(), P), H, TypeError, "image: expected float32 as query, got float16"),
        ((Q, T, X.to("meta"), P), H, ValueError, "image: expected device cpu as query, got meta"),
        ((Q[0], T, X, P), H, ValueError, "query: expected shape (B, Q, Dm), got (3, 20)"),
        ((Q, T[:3], X, P), H, ValueError, "text: expected shape (4, T, 20) with the B and Dm of query, got (3, 6, 20)"),
        ((Q, T[..., 1:], X, P), H, ValueError, "text: expected shape (4, T, 20) with the B and Dm of query"),
        ((Q, T, X[0], P), H, ValueError, "image: expected shape (Bi, N, Di), got (9, 32)"),
        ((Q[:3], T[:3], X, P), H, ValueError, "image: expected a batch that divides the 3 of query, got 2"),
        ((Q, T, X[:0], P), H, ValueError, "image: expected a batch that divides the 4 of query, got 0"),
        ((Q, T, X, W), H, TypeError, "params: expected EmbeddedQueryParams, got list"),
        ((Q, T, X, replaced(up_bias=None)), H, TypeError, "up_bias: expected a tensor, got NoneType"),
        ((Q, T, X, replaced(up_bias=P.up_bias.double())), H, TypeError, "up_bias: expected float32 as query"),
        (
            (Q, T, X, replaced(down_text_weight=P.down_text_weight[:, 1:])),
            H,
            ValueError,
            "down_text_weight: expected shape (E, 20) with the Dm of query, got (24, 19)",
        ),
        (
            (Q, T, X, replaced(down_image_weight=P.down_image_weight[1:])),
            H,
            ValueError,
            "down_image_weight: expected shape (24, 32) with the Di of image, got (23, 32)",
        ),
        ((Q, T, X, replaced(t2q_k_bias=P.up_bias)), H, ValueError, "t2q_k_bias: expected shape (24,), got (20,)"),
        (
            (Q, T, X, replaced(i2q_v_weight=P.i2q_v_weight[1:])),
            H,
            ValueError,
            "i2q_v_weight: expected shape (32, 32), got (31, 32)",
        ),
        ((Q, T, X, P), {"num_heads": 3}, ValueError, "num_heads: expected a divisor of 24 and 32, got 3"),
        ((Q, T, X, P), {"num_heads": 0}, ValueError, "num_heads: expected a divisor of 24 and 32, got 0"),
        ((Q, T, X, P), {"num_heads": 4.0}, ValueError, "num_heads: expected a divisor of 24 and 32, got 4.0"),
        ((Q, T, X, P), {**H, "text_lengths": [1]}, TypeError, "text_lengths: expected a tensor, got list"),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.ones(4)},
            TypeError,
            "text_lengths: expected an integer tensor, got float32",
        ),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.ones(4, dtype=torch.bool)},
            TypeError,
            "text_lengths: expected an integer tensor, got bool",
        ),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.ones(3, dtype=torch.int32)},
            ValueError,
            "text_lengths: expected shape (4,), got (3,)",
        ),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.tensor([0, 6, 7, 1])},
            ValueError,
            "text_lengths: expected lengths in [0, 6], got 7",
        ),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.tensor([0, 6, -1, 1])},
            ValueError,
            "text_lengths: expected lengths in [0, 6], got -1",
        ),
        (
            (Q, T, X, P),
            {**H, "text_lengths": torch.ones(4, dtype=torch.int64, device="meta")},
            ValueError,
            "text_lengths: expected device cpu as text, got meta",
        ),
        ((Q, T, X, P), {**H, "image_state": X}, TypeError, "image_state: expected ImageState, got Tensor"),
        (
            (Q, T, X, P),
            {**H, "image_state": STATE._replace(y=None)},
            TypeError,
            "image_state.y: expected a tensor, got NoneType",
        ),
        (
            (Q, T, X, P),
            {**H, "image_state": STATE._replace(y=STATE.y[:1])},
            ValueError,
            "image_state.y: expected shape (2, 9, 24) with the Bi and N of image, got (1, 9, 24)",
        ),
        (
            (Q, T, X, P),
            {**H, "image_state": STATE._replace(rstd=STATE.rstd.double())},
            TypeError,
            "image_state.rstd: expected float32 on cpu, got float64 on cpu",
        ),
        (
            (Q, T, X, P),
            {**H, "image_state": STATE._replace(mean=STATE.mean[:, 1:])},
            ValueError,
            "image_state.mean: expected shape (2, 9) with the Bi and N of image, got (2, 8)",
        ),
    ],
)
def test_errors(args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        embedded_query_attention(*args, **options)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((3, P), TypeError, "image: expected a tensor, got int"),
        ((X, None), TypeError, "params: expected EmbeddedQueryParams, got NoneType"),
        ((X[0], P), ValueError, "image: expected shape (Bi, N, Di), got (9, 32)"),
        ((X.double(), P), TypeError, "down_image_weight: expected float64 as image, got float32"),
        ((X[..., 1:], P), ValueError, "down_image_weight: expected shape (E, 31) with the Di of image, got (24, 32)"),
        ((X, replaced(down_image_bias=P.up_bias)), ValueError, "down_image_bias: expected shape (24,), got (20,)"),
    ],
)
def test_errors_of_the_state(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ImageState.from_image(*args)


@needs_extension
def test_raw_ops_refuse_what_does_not_fit() -> None:
    """Even called below the checks, no shape and no length makes the kernel read out of bounds."""
    good = list(raw_arguments(torch.tensor([6, 0, 1, 3])))
    op = torch.ops.flashsloth.embedded_query
    assert op(*good, True, False)[0].shape == (4, 3, 20)
    bad: list[tuple[int, Any, str]] = [
        (0, Q[0], "three dimensions"),
        (0, Q.double(), "one dtype"),
        (1, T[:2], "like query"),
        (2, torch.tensor([6, 0, 1, 7]), r"lengths in \[0, 6\], got 7"),
        (2, torch.tensor([6, 0, 1, 3], dtype=torch.int32), "int64"),
        (3, X[:, 1:], "like image"),
        (6, STATE.rstd[:1], "mean and rstd"),
        (7, good[7][:-1], "22 params, got 21"),
        (7, [*good[7][:-1], Q[0]], r"params\[21\]: expected 20 numbers"),
        (8, 5, "divides E and Di"),
        (8, 0, "divides E and Di"),
    ]
    for position, value, message in bad:
        args = [*good[:position], value, *good[position + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            op(*args, True, False)
    with pytest.raises(RuntimeError, match="multiple of the images"):
        op(Q[:3], T[:3], None, *good[3:], True, False)
    saved = op(*good, False, False)[2:]
    with pytest.raises(RuntimeError, match="what forward saved with save=True"):
        torch.ops.flashsloth.embedded_query_backward(Q, *good[:8], *saved, 4, 1e-5, True, True, True)
    with pytest.raises(RuntimeError, match=r"expected image \(Bi, N, Di\)"):
        torch.ops.flashsloth.image_state(X, W[2][1:], W[3], 1e-5)


def test_fields_are_in_the_order_of_the_kernel() -> None:
    """csrc/cpu/embedded_query.h numbers the weights; these pairs must stay neighbours in both lists."""
    assert len(P._kernel_params()) == 22
    fields = [f for f in EmbeddedQueryParams._fields if not f.startswith("down_image")]
    assert all(a.replace("_weight", "_bias") == b for a, b in list(pairwise(fields))[::2])
    assert fields[::2] == [
        f"{step}_weight"
        for step in (
            "down_text", "ln_q", "ln_text", "ln_kv", "t2q_q", "t2q_k", "t2q_v", "i2q_q", "i2q_k", "i2q_v", "up",
        )
    ]  # fmt: skip
