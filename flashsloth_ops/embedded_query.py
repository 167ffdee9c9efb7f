from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flashsloth_ops.reference import embedded_query as _ref


class EmbeddedQueryParams(NamedTuple):
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
        names = dict(
            down_text="down_projector_learnable_text",
            down_image="down_projector_image",
            up="up_projector",
            ln_q="layers.0.ln_q",
            ln_text="layers.0.ln_text",
            ln_kv="layers.0.ln_kv",
            **{f"{a}_{p}": f"layers.0.{a}_attn.{p}_proj" for a in ("t2q", "i2q") for p in "qkv"},
        )
        return cls(*(sd[prefix + names[f.rsplit("_", 1)[0]] + "." + f.rsplit("_", 1)[1]] for f in cls._fields))


class ImageState(NamedTuple):
    y: Tensor
    mean: Tensor
    rstd: Tensor

    @classmethod
    def from_image(cls, image: Tensor, params: EmbeddedQueryParams, *, eps: float = 1e-5) -> ImageState:
        y = torch.nn.functional.linear(image, params.down_image_weight, params.down_image_bias)
        var, mean = torch.var_mean(y.detach().float(), -1, correction=0)
        return cls(y, mean, torch.rsqrt(var + eps))


def embedded_query_attention(
    query, text, image, params, *, num_heads, text_lengths=None, image_state=None, return_weights=False
):
    out, w = _ref.embedded_query_attention(query, text, image, params, num_heads=num_heads, text_lengths=text_lengths)
    return (out, w) if return_weights else out
