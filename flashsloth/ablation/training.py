"""One run's training: pooling, projector, queries and decoder, on features that are kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch

from flashsloth.ablation.material import Material, Split
from flashsloth.ablation.settings import Settings
from flashsloth.data.collate import PACKED_MULTIPLE, Collator, take_report
from flashsloth.data.llava import LlavaDataset, Sample
from flashsloth.encoding import Row, encode_prompt
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor
from flashsloth.prompt import dialogue_prompt
from flashsloth.training.muon import Muon, matrices_of_layers
from flashsloth.training.stages import compile_decoder, uncompile_decoder

LOGGED = 50  # losses a run keeps


def order(seed: int, pictures: int, batch: int, steps: int) -> Iterator[np.ndarray]:
    """The pictures of each step, int64 ``(batch,)``: pass after pass over all of them, each shuffled anew.

    Depends on these numbers alone, so every variant sees the same. A pass may end within a step.
    """
    left = np.empty(0, dtype=np.int64)
    passes = 0
    for _ in range(steps):
        while len(left) < batch:
            # Of NumPy's generators this is the one whose numbers never change with its version.
            random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, passes))))
            left, passes = np.concatenate([left, random.permutation(pictures)]), passes + 1
        yield left[:batch]
        left = left[batch:]


def checksum(seed: int, pictures: int, batch: int, steps: int) -> str:
    """Of :func:`order`, so that a result shows what it was trained on."""
    found = hashlib.sha256()
    for chosen in order(seed, pictures, batch, steps):
        found.update(chosen.astype("<i8").tobytes())
    return found.hexdigest()[:16]


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The part of the highest rate at a step: a line up, then half a cosine down to zero behind the last."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


def train(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, material: Material, seed: int
) -> list[float]:
    """Train all but the tower, in place. Returns mean losses, of a fiftieth of the steps each.

    The loss is the mean over the answers' tokens of a step.

    Raises:
        ValueError: a loss that is not finite, or a row too long for the decoder.
    """
    settings, rows = material.settings, Rows(material.train, processor, material)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = optimizer_of(model, settings)
    highest = [group["lr"] for group in optimizer.param_groups]
    steps, every = settings.steps, max(1, settings.steps // LOGGED)
    losses: list[float] = []
    devices = [torch.cuda.current_device()] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)  # of dropout
        model.train()
        if settings.compile:
            compile_decoder(model)
        for step, chosen in enumerate(order(seed, material.train.pictures, settings.batch, steps)):
            for group, most in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = most * learning_rate(step, steps, settings.warmup)
            batch = rows.batch(chosen, model.device)
            features = torch.from_numpy(material.train_features[chosen]).to(model.device, model.dtype)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.bf16):
                loss = model(**batch, image_context=model.context_of_features(features)).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"learning_rate: expected one with which the loss stays finite, got {settings.learning_rate:g} and "
                    f"a loss of {losses[-1]} in step {step + 1}"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % max(1, steps // 4) == 0:
                material.tell(f"  step {step + 1:,} of {steps:,}: loss {np.mean(losses[-every:]):.3f}")
        model.eval()
    if settings.compile:
        uncompile_decoder(model)
    return [float(np.mean(losses[start : start + every])) for start in range(0, steps, every)]


def optimizer_of(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """At its highest rates. As usual, decay is for matrices: not for biases and norms."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in trained if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    if settings.muon is None:
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return Muon(
        matrices_of_layers(model),
        groups,
        muon_lr=settings.muon,
        bf16=settings.bf16,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )


class Rows:
    """Training rows of one variant, packed into batches. Pictures are not read: their features are kept."""

    def __init__(self, split: Split, processor: FlashSlothProcessor, material: Material) -> None:
        self.split, self.processor, self.special = split, processor, material.special
        self.positions = getattr(material.config.text_config, "max_position_embeddings", None)
        # No batch needs the blank row: every record of a split can be used.
        self.collate = Collator.of(LlavaDataset(split.source, processor), packed=True, packed_multiple=PACKED_MULTIPLE)
        self.expansion = {
            processor.image_token_id: processor.num_image_tokens(),
            processor.learnable_token_id: processor.num_queries,
        }

    def row(self, index: int) -> Row:
        """Prompt, labels and question spans of a picture with all its questions."""
        tokenizer = self.processor.tokenizer
        turns = [{"from": role, "value": value} for role, value in self.split.turns(index, self.special)]
        return encode_prompt(tokenizer, dialogue_prompt(turns, tokenizer.eos_token), self.expansion)

    def batch(self, chosen: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
        """Model inputs without images; row i is that of picture ``chosen[i]``.

        Raises:
            ValueError: a row longer than the decoder has positions for.
        """
        batch = self.collate([Sample(int(index), self.row(int(index)), None) for index in chosen])
        take_report(batch)
        length = batch["input_ids"].shape[1]
        if self.positions is not None and length > self.positions:
            raise ValueError(f"model: expected a decoder with positions for rows of {length}, got {self.positions}")
        # Spans stay: on the CPU they bound the work by the longest question.
        return {name: value if name == "question_spans" else value.to(device) for name, value in batch.items()}
