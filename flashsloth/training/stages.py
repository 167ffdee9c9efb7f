"""What a stage trains, and the model it starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashsloth.checkpoint import read_tensors, rename
from flashsloth.config import FlashSlothConfig
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor

# Part -> modules of the model.
PARTS = {
    "tower": ("vision_tower",),
    "pooling": ("pooling",),
    "projector": ("projector",),
    "queries": ("learnable_tokens", "embedded_query"),
    "decoder": ("language_model",),
}
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


@dataclass(frozen=True)
class Stage:
    """What a run takes where its configuration says nothing.

    Attributes:
        train: parts that are trained.
        batch: rows of an optimizer step.
        captions: rows are captions, not dialogues.
        arguments: of transformers' TrainingArguments.
    """

    train: tuple[str, ...]
    batch: int
    captions: bool
    arguments: Mapping[str, Any]


_BOTH = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below one: of all steps
    "weight_decay": 0.0,
    "logging_steps": 10,
    "logging_first_step": True,
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "none",
}
# Learning rates and batch sizes are the paper's; what it does not say is as in LLaVA-1.5.
STAGES = {
    1: Stage(("pooling", "projector"), 256, True, {**_BOTH, "learning_rate": 1e-3}),
    2: Stage(("pooling", "projector", "queries", "decoder"), 128, False, {**_BOTH, "learning_rate": 2e-5}),
}


def load_processor(directory: Path) -> FlashSlothProcessor:
    """The processor that is trained with. Raises FileNotFoundError, ValueError."""
    processor = FlashSlothProcessor.from_pretrained(directory)
    config = FlashSlothConfig.from_pretrained(directory)
    pairs = {
        "image_token_id": (config.image_token_id, processor.image_token_id),
        "learnable_token_id": (config.learnable_token_id, processor.learnable_token_id),
        "num_queries": (config.num_queries, processor.num_queries),
        "tokens_per_tile": (config.tokens_per_tile, processor.tokens_per_tile),
        "image_size": (config.vision_config.image_size, processor.image_processor.image_size),
    }
    for name, (expected, got) in pairs.items():
        if expected != got:
            raise ValueError(f"model: {name}: expected {expected}, as config.json has it, got {got} of the processor")
    size, used = config.text_config.vocab_size, max(processor.tokenizer.get_vocab().values()) + 1
    if used > size:
        raise ValueError(f"model: expected a tokenizer of at most {size} ids, as config.json has it, got {used}")
    return processor


def load_model(
    directory: Path, *, tower: Path | None = None, seed: int = 0, dtype: str = "float32"
) -> FlashSlothForConditionalGeneration:
    """The weights in ``directory``, or weights drawn by ``seed`` where it has none; then those of ``tower``.

    Raises:
        ValueError, FileNotFoundError: a checkpoint that is not complete, or a tower of another shape.
    """
    if has_weights(directory):
        model = FlashSlothForConditionalGeneration.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="flashsloth"
        )
    else:
        config = FlashSlothConfig.from_pretrained(directory)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = FlashSlothForConditionalGeneration(config).to(getattr(torch, dtype))
        model.set_attn_implementation("flashsloth")
    if tower is not None:
        load_tower(model, tower)
    dropout = getattr(model.config.text_config, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"model: expected attention_dropout 0 in text_config, as rows are packed for training, got {dropout}"
        )
    return model


def row_length(wanted: int | None, config: FlashSlothConfig) -> int | None:
    """Tokens of a row at most: ``wanted``, or what the decoder has positions for. Raises ValueError."""
    positions = getattr(config.text_config, "max_position_embeddings", None)
    if wanted is not None and positions is not None and wanted > positions:
        raise ValueError(f"max_length: expected at most {positions}, the decoder's positions, got {wanted}")
    return positions if wanted is None else wanted


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights, or any part of them."""
    return any(any(directory.glob(pattern)) for pattern in _WEIGHTS)


def load_tower(model: FlashSlothForConditionalGeneration, directory: Path) -> None:
    """Copy the vision tower of a checkpoint: FlashSloth's in either layout, or SigLIP's own, whose later layers and
    head are left out. Raises ValueError, FileNotFoundError."""
    found = {}
    for name, tensor in read_tensors(directory).items():
        inner = rename(name).removeprefix("vision_tower.").removeprefix("vision_model.")
        found[inner] = tensor
    expected = {name.removeprefix("vision_model."): weight for name, weight in model.vision_tower.named_parameters()}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(f"tower: {directory}: expected a vision tower with {', '.join(missing[:3])}, got none")
    with torch.no_grad():
        for name, weight in expected.items():
            if weight.shape != found[name].shape:
                raise ValueError(
                    f"tower: {directory}: {name}: expected {tuple(weight.shape)}, got {tuple(found[name].shape)}"
                )
            weight.copy_(found[name])


def set_trained(model: FlashSlothForConditionalGeneration, parts: Iterable[str]) -> None:
    """Let ``parts`` have gradients, and nothing else."""
    chosen = set(parts)
    for part in PARTS:
        for module in _modules(model, part):
            module.requires_grad_(part in chosen)
    # Without this the tower would run without gradients whatever its weights ask for.
    model.config.freeze_vision_tower = "tower" not in chosen


def compile_layers(model: FlashSlothForConditionalGeneration) -> None:
    """Compile the decoder's layers, and the tower whole. What lies between, the embedded queries for one, runs as it
    is. Weights and their names stay.
    """
    tower: Any = model.vision_tower
    # A compiled softmax beats the products of SDPA on a processor; on a GPU SDPA is FlashAttention.
    if not torch.cuda.is_available():
        tower.set_attn_implementation("eager")
    tower.forward = torch.compile(tower.forward, dynamic=False)
    compile_decoder(model)


def compile_decoder(model: FlashSlothForConditionalGeneration) -> None:
    """Compile each layer of the decoder: one graph for all of them and for any number of tokens."""
    for layer in _decoder_layers(model):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def uncompile_decoder(model: FlashSlothForConditionalGeneration) -> None:
    """Undo :func:`compile_decoder`."""
    for layer in _decoder_layers(model):
        del layer.forward


def _decoder_layers(model: FlashSlothForConditionalGeneration) -> Iterable[Any]:
    decoder: Any = model.get_decoder()
    layers: Iterable[Any] = decoder.layers
    return layers


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (all parameters, those that are trained); shared ones count once, where they come first."""
    counts, seen = {}, set()
    for part in PARTS:
        every = trained = 0
        for module in _modules(model, part):
            for weight in module.parameters():
                if id(weight) in seen:
                    continue
                seen.add(id(weight))
                every += weight.numel()
                trained += weight.numel() if weight.requires_grad else 0
        counts[part] = (every, trained)
    return counts


def _modules(model: nn.Module, part: str) -> list[nn.Module]:
    """Those that the model has: one without embedded queries has none of theirs."""
    return [getattr(model, name) for name in PARTS[part] if hasattr(model, name)]
