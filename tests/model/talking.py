"""Random models whose answers are texts, for tests of conversations and of scoring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor, tiny

SPACE = 220  # of the byte tokenizer
LETTERS = range(64, 90)  # "a" to "z" there


def talking_model(
    space_first: bool = True, end: float = 0.0, **changes: Any
) -> tuple[FlashSlothForConditionalGeneration, FlashSlothProcessor]:
    """A tiny model that writes lower-case letters, which depend on picture and question, and its processor.

    ``space_first``: as a trained model does, it begins with the space that follows "ASSISTANT:" in training.
    ``end`` is added to the logit of the end token.
    """
    config = tiny.tiny_config(**changes)
    model = tiny.random_model(config, seed=1)
    head = model.language_model.lm_head
    with torch.no_grad():
        for weight in model.language_model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
        model.projector[2].weight.mul_(4)
        bias = torch.full_like(head.bias, -1e4)
        bias[[*LETTERS, config.eos_token_id]] = 0
        bias[config.eos_token_id] = end
        head.bias.copy_(bias)
    if space_first:
        model.register_forward_hook(_space_after_a_prompt, with_kwargs=True)
    return model, tiny.processor_for(config)


def _space_after_a_prompt(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if kwargs["input_ids"].shape[1] > 1:
        output.logits[:, -1, SPACE] += 1e6


@contextmanager
def saying(model: FlashSlothForConditionalGeneration, ids: list[int]) -> Iterator[None]:
    """The model answers with ``ids``, one a pass, whatever it is asked."""
    left = list(ids)

    def force(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        output.logits[:, -1, left.pop(0)] += 1e9

    handle = model.register_forward_hook(force, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 50, 3), dtype=np.uint8))
