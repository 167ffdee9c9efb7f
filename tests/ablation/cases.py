"""A tiny model, a few drawn pictures and a configuration over them; and runs that were never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flashsloth.ablation.runs import Run
from flashsloth.data.sight import Settings as Drawing
from flashsloth.data.sight import make_sight
from flashsloth.tiny import processor_for, random_model, tiny_config

COUNTS = {"train": 6, "validation": 1, "test": 2}
DROPOUT = {"resid_pdrop": 0.1}


def make_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    config = tiny_config(**{"text": DROPOUT, **changes})
    random_model(config, seed).save_pretrained(folder)
    processor_for(config).save_pretrained(folder)
    return folder


def make_data(folder: Path, seed: int = 0) -> Path:
    make_sight(folder, Drawing(seed), COUNTS)
    return folder


def write_config(folder: Path, name: str = "config.yaml", **changes: Any) -> Path:
    """Beside the folders ``model`` and ``data``. A change to None takes a key out."""
    fields: dict[str, Any] = {"model": "model", "data": "data", "steps": 2, "batch": 2, "new_tokens": 2}
    fields |= {"timing_rounds": 2, "test_pictures": 1, **changes}
    path = folder / name
    path.write_text(yaml.safe_dump({key: value for key, value in fields.items() if value is not None}))
    return path


SETTINGS = {
    "steps": 1000,
    "batch": 16,
    "learning_rate": 1e-3,
    "muon": None,
    "warmup": 0.05,
    "weight_decay": 0.01,
    "clip": 1.0,
    "bf16": False,
    "compile": False,
    "train_pictures": 8000,
    "test_pictures": 100,
    "query_layers": None,
    "new_tokens": 16,
    "train": "a",
    "test": "b",
    "model": "c",
    "tower": "d",
    "init": None,
}
FLOPS = {"tower": 8e8, "pooling": 2e7, "projector": 1e6, "queries": 3e6, "prefill": 2e8}
TOKENS = {"none": 324, "window-2": 81, "window-4": 25}
TITLES = {"none": "no compression", "average": "average, 3x3", "queries": "attention, 3x3, 9 queries"}


def made_up(variant: str, seed: int, right: int, **changes: Any) -> Run:
    """A run with ``right`` of 1000 answers right, a tenth of them on colour."""
    queries = {"none": 0, "average": 0, "shuffle": 0, "attention": 0}.get(variant, 9)
    fields: dict[str, Any] = {
        "variant": variant,
        "title": TITLES.get(variant, variant),
        "family": variant if variant in ("none", "average", "shuffle", "attention") else "queries",
        "seed": seed,
        "settings": SETTINGS,
        "changes": {},
        "visual_tokens": TOKENS.get(variant, 36),
        "queries": queries,
        "prompt_tokens": 60 + TOKENS.get(variant, 36) + queries,
        "trained": 12345,
        "flops": FLOPS,
        "losses": [2.0, 1.0],
        "order": f"order{seed}",
        "scores": {
            "colour": {"asked": 100, "right": right // 10},
            "count": {"asked": 900, "right": right - right // 10},
        },
        "environment": {"torch": "2.13.0", "device": "cpu", "threads": 1},
    }
    return Run(**{**fields, **changes})
