"""What the tests of training share: a tiny model, few records, a configuration of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flashsloth.tiny import processor_for, random_model, tiny_config
from flashsloth.training.command import run
from flashsloth.training.config import TrainConfig, parse_config
from flashsloth.training.trainer import FlashSlothTrainer
from tests.data.llava_cases import write_folder, write_json

STEADY = {"resid_pdrop": 0.0}  # no dropout: two processes draw other masks than one


def write_model(folder: Path, *, weights: bool = False, **changes: Any) -> Path:
    """A tiny model's directory, without weights or with random ones."""
    config = tiny_config(**changes)
    if weights:
        random_model(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    processor_for(config).save_pretrained(folder)
    return folder


def write_data(folder: Path, count: int = 24) -> Path:
    return write_json(folder / "train.json", write_folder(folder, count)) if count else folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """The values of a configuration file in ``folder``, where ``model`` and ``data`` are."""
    arguments = {"max_steps": 6, "logging_steps": 1, "save_steps": 2, "use_cpu": True, "disable_tqdm": True}
    values = {
        "model": "model",
        "stage": 2,
        "data": [{"records": "data/train.json"}],
        "batch": 4,
        "micro_batch": 2,
        "out": "out",
        **changes,
    }
    return values | {"arguments": arguments | {"learning_rate": 1e-3} | changes.get("arguments", {})}


def prepare(folder: Path, count: int = 24, **model: Any) -> Path:
    """A folder with ``model`` and ``data``."""
    write_model(folder / "model", **model)
    (folder / "data").mkdir()
    write_data(folder / "data", count)
    return folder


def configured(folder: Path, **changes: Any) -> TrainConfig:
    return parse_config(settings(folder, **changes), folder)


def train(folder: Path, *, resume: bool = False, **changes: Any) -> FlashSlothTrainer:
    return run(configured(folder, **changes), resume=resume)


def curve(trainer: Any) -> list[tuple[Any, ...]]:
    """What must be the same, bit for bit: step, loss, norm of the gradient, learning rate."""
    return [
        (entry["step"], entry["loss"], entry["grad_norm"], entry["learning_rate"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
