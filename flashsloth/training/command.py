"""``flashsloth train --config FILE``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from transformers.utils import logging

from flashsloth.data.broken import BrokenLog, TooManyBroken
from flashsloth.files import write_json
from flashsloth.training import checkpoints
from flashsloth.training.config import TrainConfig, read_config, training_arguments
from flashsloth.training.lora import add_lora
from flashsloth.training.mixture import Mixture
from flashsloth.training.stages import compile_layers, load_model, load_processor, row_length, set_trained
from flashsloth.training.trainer import FlashSlothTrainer

BROKEN = "broken.jsonl"
# What may differ between a run and the one that resumes it: where and how, not what.
_FREE = ("model", "tower", "data", "out", "micro_batch", "max_broken", "compile")
_FREE_ARGUMENTS = (
    "logging_", "log_", "save_", "report_to", "run_name", "disable_tqdm", "dataloader_", "ddp_", "use_cpu",
    "skip_memory_metrics", "max_steps", "num_train_epochs", "fsdp_config", "deepspeed", "gradient_checkpointing",
    "activation_checkpointing", "torch_",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="YAML; docs/training.md has its keys"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="instead of what the file says: --set batch=64"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in `out`")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and do not")


def main(options: argparse.Namespace) -> None:
    """Raises ValueError, TypeError, OSError with one line on what is wrong."""
    logging.disable_progress_bar()  # of transformers, for every file it reads or writes
    config = read_config(options.config, options.set)
    if options.dry_run:
        from flashsloth.training.report import describe

        print(describe(config))
        return
    try:
        run(config, resume=options.resume)
    except TooManyBroken as error:
        raise ValueError(str(error)) from error


def run(config: TrainConfig, *, resume: bool = False) -> FlashSlothTrainer:
    """Train, and leave the model in ``config.out``.

    Args:
        resume: go on from the newest complete checkpoint there, if any.

    Raises:
        ValueError, TypeError, OSError: something given cannot be used; TooManyBroken: too many records cannot.
    """
    import accelerate  # noqa: F401  transformers would name it in a paragraph

    if not resume and (checkpoints.any_checkpoint(config.out) or (config.out / "config.json").exists()):
        raise ValueError(
            f"out: expected a directory without a run, got {config.out}; --resume goes on with the run that is there"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = training_arguments(config, world)
    if arguments.world_size != world:
        raise ValueError(f"WORLD_SIZE: expected {world} processes that train together, got {arguments.world_size}")
    processor = load_processor(config.model)
    model = load_model(config.model, tower=config.tower, seed=config.seed, dtype=config.dtype)
    set_trained(model, config.train)
    if config.lora is not None:
        add_lora(model, config.lora, config.seed)
    if config.compile:
        compile_layers(model)
    data = Mixture(config, processor, row_length(config.max_length, model.config))
    rank = arguments.process_index
    broken = BrokenLog(config.out / (BROKEN if rank == 0 else f"broken-{rank}.jsonl"), limit=config.max_broken)
    trainer = FlashSlothTrainer(model, arguments, data, broken, _identity(config), muon=config.muon)
    if rank == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "training.json", config.as_dict())
    last = checkpoints.complete_checkpoints(config.out)[-1:] if resume else []
    if last and rank == 0:
        print(f"goes on from {last[0]}", flush=True)
    try:
        trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
    except checkpoints.CheckpointError:
        raise
    except OSError as error:  # logs need little room, but they need some
        checkpoints.fail(error, config.out, "logs")
    trainer.save_final(processor, config.lora)
    return trainer


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What must stay the same for a resumed run to continue the same curve."""
    values = {key: value for key, value in config.as_dict().items() if key not in _FREE}
    for name, value in values.pop("arguments").items():
        if not name.startswith(_FREE_ARGUMENTS):
            values[f"arguments.{name}"] = value
    return values
