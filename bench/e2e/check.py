"""No time without a right result: the fused model against plain PyTorch on the same weights, peers by what is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.check import Verdict, verdict
from bench.e2e.models import Model, Request
from bench.e2e.phases import prompts_seen
from flashsloth_ops import use_backend

# What stands for the exact result, by the dtype that is measured: on a GPU whole models in fp64 would not fit.
EXACT = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


@torch.inference_mode()
def check(model: Model, built: Any, request: Request, prompt: int, *, small: bool) -> Verdict:
    """Logits of the last position: finite, of the right shape, from a language model that saw ``prompt`` tokens a row.

    Those of FlashSloth keep the project's error rule too (:func:`bench.check.verdict`), against the same weights in a
    wider dtype, where the plain path is the reference backend with SDPA.
    """
    with prompts_seen(model.parts(built)) as seen:
        logits = _logits(built, request)
    rows, vocabulary = request["input_ids"].shape[0], built.config.text_config.vocab_size
    if logits.shape != (rows, 1, vocabulary):
        return Verdict(None, None, f"logits: expected shape {(rows, 1, vocabulary)}, got {tuple(logits.shape)}")
    if not bool(logits.isfinite().all()):
        return Verdict(None, None, "logits: expected finite values, got others")
    if seen != [prompt]:
        return Verdict(None, None, f"prompt: expected the language model to see {prompt} tokens, got {seen}")
    return _against_reference(model, built, request, logits, small) if model.ours else Verdict(None, None)


def _against_reference(model: Model, built: Any, request: Request, logits: Tensor, small: bool) -> Verdict:
    attention = built.config.text_config._attn_implementation
    with use_backend("reference"):
        built.set_attn_implementation("sdpa")
        try:
            plain = _logits(built, request)
        finally:
            built.set_attn_implementation(attention)
        wide = EXACT[logits.dtype]
        exact = model.build(small, logits.device.type, wide)
        exact.load_state_dict(built.state_dict())
        given = {name: value.to(wide) if value.is_floating_point() else value for name, value in request.items()}
        # A GPU would round the products of convolutions in fp32 to about 11 bits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            right = _logits(exact, given).double()
    return verdict("logits", logits, right, plain)


def _logits(built: Any, request: Request) -> Tensor:
    logits = built(**request, use_cache=True, logits_to_keep=1).logits
    assert isinstance(logits, Tensor)
    return logits
