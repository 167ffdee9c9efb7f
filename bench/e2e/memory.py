"""What a model needs at least, counted before it is tried: what cannot fit is not tried, and is reported with this."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from bench.e2e.flops import STAGES, TRAINING_1, TRAINING_2, decoder
from bench.e2e.models import Model, Parts
from bench.e2e.tokens import Layout


class Parameters(NamedTuple):
    """Numbers of a model: all, and those that each training stage changes."""

    total: int
    trained: dict[str, int]


@cache
def parameters(model: Model, small: bool) -> Parameters:
    """Counted on a model without memory, so that it costs a fraction of a second at any size."""
    built = model.build(small, "meta", torch.float32)
    parts = model.parts(built)
    trained = {}
    for stage in STAGES:
        choose_trained(built, parts, stage)
        trained[stage] = sum(p.numel() for p in built.parameters() if p.requires_grad)
    return Parameters(sum(p.numel() for p in built.parameters()), trained)


def choose_trained(built: Any, parts: Parts, stage: str) -> None:
    """The paper's trainable sets: what compresses and projects; then all but the vision tower."""
    built.requires_grad_(stage == TRAINING_2)
    parts.tower.requires_grad_(False)
    for module in parts.projector:
        module.requires_grad_(True)


def bytes_at_least(
    model: Model, config: Any, layout: Layout, batch: int, text: int, new: int, phase: str, small: bool, size: int
) -> int:
    """Bytes below which a phase cannot run, ``size`` bytes a number: weights and cache, or what training keeps.

    Training keeps gradients, two moments of AdamW, the inputs of the language model's products and attention (those
    of the products only where their matrices learn), and the logits in fp32. What kernels keep besides, and the
    tower's own activations, come on top.
    """
    count, language = parameters(model, small), decoder(config.text_config)
    tokens = batch * model.prompt(layout, config, text)
    if phase not in STAGES:
        return size * (count.total + language.cache * (tokens + batch * new))
    inner = language.heads * language.head_dim
    kept = 2 * inner + 2 * language.kv_heads * language.head_dim + language.hidden * (3 if language.gated else 1)
    if phase != TRAINING_1:
        kept += (2 if language.gated else 1) * language.width + language.hidden  # in front of MLP and attention
    logits = 4 * tokens * config.text_config.vocab_size
    return size * (count.total + 3 * count.trained[phase] + language.layers * kept * tokens) + logits
