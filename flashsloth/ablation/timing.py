"""Time to first token: one picture, one question, from processed inputs to the logits of the answer's first token.

Variants are timed in turns, so that what else a machine does hits all alike, and each round starts with another one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flashsloth.ablation.material import Material
from flashsloth.ablation.runs import TIMES
from flashsloth.ablation.scoring import request
from flashsloth.ablation.variants import Variant, processor_of
from flashsloth.files import write_json

_WARMUP = 2


def measure(material: Material, variants: list[Variant], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Times of the variants, with weights as training starts: which they are changes no time.

    Returns JSON values: ``seconds`` holds those of each variant, round by round.
    """
    calls = {variant.name: _call(material, variant) for variant in variants}
    names, rounds = list(calls), material.settings.timing_rounds
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-_WARMUP, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = calls[name]()
            if number >= 0:
                samples[name].append(taken)
    return {"settings": material.identity, "environment": dict(environment), "rounds": rounds, "seconds": samples}


def save_times(times: dict[str, Any], folder: Path) -> None:
    write_json(folder / TIMES, times)


def load_times(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was measured for these settings; None where nothing was. Raises ValueError for a file of another kind."""
    path = folder / TIMES
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            return None
        if any(len(one) != found["rounds"] or min(one) <= 0 for one in found["seconds"].values()):
            raise ValueError("times that are not those of its rounds")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected times of an ablation, got one that fails: {error}") from error
    return found


def _call(material: Material, variant: Variant) -> Any:
    config = variant.config(material.config)
    processor = processor_of(material.processor, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = material.build(config, 0)
    model.to(device)
    row = request(processor, material.typical.text)
    inputs = {
        "input_ids": torch.tensor([row.ids], device=device),
        "question_spans": torch.tensor([row.spans]),
        "pixel_values": torch.from_numpy(material.pixels(material.test, material.typical.picture)[None]).to(device),
    }

    @torch.inference_mode()
    def call() -> float:
        start = time.perf_counter()
        model(**inputs, use_cache=True, logits_to_keep=1).logits.argmax(-1).item()  # .item() waits for a GPU
        return time.perf_counter() - start

    return call
