"""``flashsloth train --dry-run``: what would be trained, on how much, and the memory it takes."""

from __future__ import annotations

import os

import numpy as np
import torch

from flashsloth.config import FlashSlothConfig
from flashsloth.data.llava import Sample
from flashsloth.encoding import IGNORE_INDEX
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.training.config import TrainConfig, training_arguments
from flashsloth.training.lora import add_lora
from flashsloth.training.mixture import Mixture
from flashsloth.training.stages import count_parameters, has_weights, load_processor, row_length, set_trained

_SAMPLE = 32  # records that are read


def describe(config: TrainConfig) -> str:
    """Lines for people. Reads a few records and no weights. Raises as a run would."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = training_arguments(config, world)
    processor = load_processor(config.model)
    settings = FlashSlothConfig.from_pretrained(config.model)
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(settings)
        set_trained(model, config.train)
        if config.lora is not None:
            add_lora(model, config.lora)
    data = Mixture(config, processor, row_length(config.max_length, settings))
    batches = data.batches(arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps)
    epoch = -(-len(batches) // arguments.gradient_accumulation_steps)
    steps = arguments.max_steps if arguments.max_steps > 0 else int(np.ceil(epoch * arguments.num_train_epochs))
    counts = count_parameters(model)
    weights = "weights of a checkpoint" if has_weights(config.model) else f"weights drawn by seed {config.seed}"
    lines = [f"stage {config.stage}: {config.model} ({weights})", "", f"{'part':<12}{'parameters':>16}{'trained':>16}"]
    total = tuple(sum(count[i] for count in counts.values()) for i in (0, 1))
    for part, (every, trained) in [*counts.items(), ("all", total)]:
        lines.append(f"{part:<12}{every:>16,}{trained:>16,}")
    lines += ["", *_data_lines(config, data, processor.num_queries), ""]
    lines.append(
        f"a step: {config.batch} rows = {world} processes x {arguments.gradient_accumulation_steps} batches x "
        f"{arguments.per_device_train_batch_size} rows; {epoch} steps an epoch, {steps} steps in all"
    )
    return "\n".join([*lines, *_memory_lines(total, config.dtype)])


def _data_lines(config: TrainConfig, data: Mixture, queries: int) -> list[str]:
    lines = []
    for i, (source, part) in enumerate(zip(config.data, data.parts, strict=True)):
        expansion = part.processor.num_image_tokens(data.hd[i])
        repeated = f" ({source.repeat} x {len(part) // source.repeat:,})" if source.repeat > 1 else ""
        kind = "captions" if part.captions else "dialogues"
        places = np.unique(np.linspace(0, len(part) - 1, _SAMPLE).astype(int))
        read = [part[int(place)] for place in places]
        rows = [item for item in read if isinstance(item, Sample)]
        line = f"data.{i}: {len(part):,} records{repeated}, {kind}, an image is {expansion} visual tokens, a question "
        line += f"has {queries} queries"
        if rows:
            tokens = np.mean([len(row.row.ids) for row in rows])
            learned = np.mean([sum(label != IGNORE_INDEX for label in row.row.labels) for row in rows])
            line += f"; {tokens:.0f} tokens a row, {learned:.0f} of them learned (mean of {len(rows)} rows)"
        lines.append(line)
        broken = [item for item in read if not isinstance(item, Sample)]
        if broken:
            lines.append(
                f"  {len(broken)} of {len(read)} that were tried cannot be used, {broken[0].name} first: "
                f"{broken[0].reason}: {broken[0].detail}"
            )
    return lines


def _memory_lines(total: tuple[int, ...], dtype: str) -> list[str]:
    width = {"float32": 4, "bfloat16": 2}[dtype]
    every, trained = total
    parts = {"weights": every * width, "gradients": trained * width, "AdamW": 2 * trained * width}
    text = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return [
        f"memory of one process: {text}, together {_size(sum(parts.values()))}; activations come on top; "
        "FSDP and ZeRO share it out"
    ]


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
