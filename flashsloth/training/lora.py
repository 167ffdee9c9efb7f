"""Low-rank updates of the decoder's linear layers, by peft; what is saved in the end has them added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.training.config import Lora

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def add_lora(model: FlashSlothForConditionalGeneration, lora: Lora, seed: int = 0) -> list[str]:
    """Give linear layers of the decoder an update that is trained instead of them; all else in the decoder is frozen.

    Returns:
        Their names within the decoder.

    Raises:
        ValueError: a target that is no linear layer there; ModuleNotFoundError: peft is missing.
    """
    from peft import LoraConfig, inject_adapter_in_model

    decoder = model.get_decoder()
    linear = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    targets = leaves if lora.targets is None else list(lora.targets)
    for target in targets:
        if target not in leaves:
            raise ValueError(f"lora.targets: expected linear layers out of {', '.join(leaves)}, got {target!r}")
    chosen = [name for name in linear if name.rpartition(".")[2] in targets]
    alpha: Any = lora.alpha
    settings = LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=chosen)
    model.language_model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, decoder)
    return chosen


def add_up(state: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The weights of a model with updates as those of the model without: ``W + alpha / rank * B A``."""
    merged: dict[str, Any] = {}
    for name, tensor in state.items():
        if _A in name or _B in name:
            continue
        layer, base, kind = name.partition(_BASE)
        if not base:
            merged[name] = tensor
        elif kind == "weight":
            update = state[layer + _B].float() @ state[layer + _A].float()
            merged[f"{layer}.weight"] = (tensor.float() + lora.alpha / lora.rank * update).to(tensor.dtype)
        else:
            merged[f"{layer}.{kind}"] = tensor
    return merged
