"""Pretrain a vision tower on what each patch shows, as SigLIP's was trained before FlashSloth was.

A picture is a crowd of things, a new one of the training split of ``sight``, or one of the 9,800 of Sort-of-CLEVR, seen
as a whole or, as HD cuts it, a quarter. The heads that are trained on top are thrown away.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import SiglipVisionConfig, SiglipVisionModel

from flashsloth.data.sight.dice import Dice
from flashsloth.data.sight.paint import paint
from flashsloth.data.sight.sample import SIZE, Settings, make_sample
from flashsloth.data.sight.scene import Scene
from flashsloth.data.sight.sort_of_clevr import COUNTS as SORT_OF_CLEVR_COUNTS
from flashsloth.data.sight.sort_of_clevr import SIZE as SORT_OF_CLEVR_SIZE
from flashsloth.data.sight.sources import Sources, load_sources
from flashsloth.files import replacing
from flashsloth.image_processing import FlashSlothImageProcessor
from flashsloth.nano.crowd import crowd
from flashsloth.nano.neighbours import look_at_neighbours, whiten_patches
from flashsloth.nano.patches import COLUMNS, GEOMETRY, INKS, KINDS, LETTERS, PLACES, SPELLED, View, label_patches, views
from flashsloth.training.muon import Muon

_STATE = "tower.pt"
_WHITENED, _MEASURED = 16, 4  # batches
_CLASSES = {"kind": len(KINDS), "ink": len(INKS), "letter": LETTERS, "place": PLACES, "spelling": LETTERS}
_TOLD = {"letter": COLUMNS, "place": COLUMNS, "spelling": SPELLED}  # how many of them a patch is told; of others one
_LOSSES = ("kind", "ink", "letter", "place", "geometry", "spelling")
_GEOMETRY_WEIGHT = 20.0  # squares of parts of a side are small numbers


@dataclass(frozen=True)
class TowerTraining:
    """``steps`` of ``batch`` views; the learning rate rises over ``warmup`` steps, stays, and falls to 0 over the last
    ``decay`` of them. Matrices of the layers are trained by Muon, all else by AdamW. Whole words are asked for from
    step ``spelling_from`` on, when letters are beginning to be told apart."""

    steps: int = 5000
    batch: int = 16
    learning_rate: float = 3e-3
    muon_learning_rate: float = 0.02
    warmup: int = 60
    decay: int = 1500
    spelling_from: int = 1500
    weight_decay: float = 0.01
    crowds: float = 0.6  # shares of the pictures
    sort_of_clevr: float = 0.15
    seed: int = 0

    def rate(self, step: int) -> float:
        """Factor of the learning rates at a step."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / self.decay)


class Views(IterableDataset):
    """Batches of (pixel values, labels) from step ``first`` on, each a function of the seed and its number alone."""

    def __init__(self, config: SiglipVisionConfig, training: TowerTraining, first: int) -> None:
        self.training, self.first = training, first
        self.config: Any = config
        side: Any = config.image_size  # for SigLIP in general a side may be a pair of numbers
        self.processor = FlashSlothImageProcessor(image_size=side)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        sources = load_sources()
        for step in range(self.first, self.training.steps):
            rows = [self._row(step * self.training.batch + i, sources) for i in range(self.training.batch)]
            yield {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def _row(self, number: int, sources: Any) -> dict[str, np.ndarray]:
        dice = Dice(self.training.seed, "view", number)
        scene, image, photograph = self._picture(number, dice, sources)
        view, image = self._view(scene, image, dice)
        config = self.config
        labels = label_patches(scene, view, config.image_size // config.patch_size, config.patch_size, photograph)
        return {"pixels": self.processor.pixel_values([("image", image)])[0, 0], **asdict(labels)}

    def _picture(self, number: int, dice: Dice, sources: Sources) -> tuple[Scene, Image.Image, bool]:
        """A scene, its picture, and whether a photograph is behind it."""
        training = self.training
        kind = dice.between(0, 1)
        if kind < training.crowds:
            scene = crowd(dice, SIZE, sources)
            return scene, *paint(scene, dice, "train", sources)
        if kind < training.crowds + training.sort_of_clevr:  # published is how many pictures there are to train on
            settings = Settings(training.seed, SORT_OF_CLEVR_SIZE, sort_of_clevr=True)
            sample = make_sample(settings, "train", number % SORT_OF_CLEVR_COUNTS["train"], None)
        else:
            sample = make_sample(Settings(training.seed), "train", number, sources)
        return sample.scene, sample.image, sample.photograph

    def _view(self, scene: Scene, image: Image.Image, dice: Dice) -> tuple[View, Image.Image]:
        """Mostly the whole. Pictures with small print often as a quarter, which is where it begins if there is one."""
        side = self.config.image_size
        whole, quarters = views(scene.size, side)
        small = scene.of("small")
        if scene.kind == "sort-of-clevr" or not dice.coin(0.4 if small else 0.1):
            return whole, image
        index = dice.integer(0, 3)
        if scene.kind == "label":
            start = small[0].x - small[0].half[0] / 2
            index = 2 * (small[0].y > scene.size / 2) + (start > scene.size / 2)
        row, column = divmod(index, 2)
        square = image.resize((2 * side, 2 * side), Image.Resampling.BICUBIC)
        return quarters[index], square.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))


class PatchReader(nn.Module):
    """A tower and one linear head a label."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(config)
        inner = getattr(self.tower, "vision_model", self.tower)  # nested in some versions
        inner.post_layernorm = nn.Identity()  # as FlashSloth takes the output of a layer
        look_at_neighbours(self.tower)
        widths = {name: classes * _TOLD.get(name, 1) for name, classes in _CLASSES.items()} | {"geometry": GEOMETRY}
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, widths[name]) for name in _LOSSES})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits of shape (B, patches, classes), and geometry (B, patches, 7)."""
        features = self.tower(pixels).last_hidden_state
        features = F.layer_norm(features, features.shape[-1:])
        return {name: head(features) for name, head in self.heads.items()}


def losses(found: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over patches. Where there is nothing counts a tenth: most of a picture is empty."""
    result = {}
    for name, classes in _CLASSES.items():
        logits, target = found[name].reshape(-1, classes), batch[name].flatten()
        weight = torch.where(target > 0, 1.0, 0.1)
        loss = F.cross_entropy(logits, target, reduction="none")
        result[name] = (loss * weight).sum() / weight.sum()
    there = (batch["kind"].flatten() > 0)[:, None]
    error = (found["geometry"].flatten(0, 1) - batch["geometry"].flatten(0, 2)) ** 2
    result["geometry"] = _GEOMETRY_WEIGHT * (error * there).sum() / (there.sum().clamp(min=1) * GEOMETRY)
    return result


@torch.no_grad()
def accuracies(found: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, float]:
    """Share of patches that are right, where there is something."""
    result = {}
    for name, classes in _CLASSES.items():
        target = batch[name].flatten()
        right = found[name].reshape(-1, classes).argmax(1) == target
        result[name] = right[target > 0].float().mean().item()
    return result


def optimizer(model: nn.Module, training: TowerTraining) -> Muon:
    return Muon(
        [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2],
        [{"params": model.parameters()}],
        muon_lr=training.muon_learning_rate,
        weight_decay=training.weight_decay,
        lr=training.learning_rate,
        betas=(0.9, 0.98),
    )


def train_tower(
    config: SiglipVisionConfig,
    out: Path,
    training: TowerTraining,
    *,
    device: str = "cpu",
    fast: bool = False,
    save_every: int = 250,
) -> Path:
    """Trains, or goes on where an earlier call stopped, and writes the tower to ``out`` as transformers does.

    ``fast``: products in bf16 and a compiled tower, for a GPU or a processor that multiplies bf16 (AMX). Beside the
    tower: ``log.jsonl``, losses and accuracies every 25 steps, and ``tower.pt``, what is needed to go on.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(training.seed)
    model = PatchReader(config)
    whiten_patches(model.tower, torch.cat([batch["pixels"] for batch in islice(Views(config, training, 0), _WHITENED)]))
    model.to(device)
    stepper = optimizer(model, training)
    bases = [group["lr"] for group in stepper.param_groups]
    if fast and device == "cpu":
        model.tower.set_attn_implementation("eager")  # compiled, it takes half of what SDPA takes on a processor
    forward = torch.compile(model) if fast else model
    first = 0
    if (out / _STATE).is_file():
        state = torch.load(out / _STATE, weights_only=True, map_location=device)
        if state["training"] != asdict(training):
            raise ValueError(f"{out}: expected a state of {asdict(training)}, got one of {state['training']}")
        model.load_state_dict(state["model"])
        stepper.load_state_dict(state["optimizer"])
        first = state["step"]
    loader = DataLoader(Views(config, training, first), batch_size=None, num_workers=1, prefetch_factor=8)
    sums, began = dict.fromkeys(_LOSSES, 0.0), time.perf_counter()
    for step, cpu_batch in enumerate(loader, first):
        batch = {name: value.to(device) for name, value in cpu_batch.items()}
        for group, base in zip(stepper.param_groups, bases, strict=True):
            group["lr"] = base * training.rate(step)
        with torch.autocast(device, torch.bfloat16, enabled=fast):
            found = forward(batch["pixels"])
        parts = losses({name: logits.float() for name, logits in found.items()}, batch)
        asked = [part for name, part in parts.items() if name != "spelling" or step >= training.spelling_from]
        torch.stack(asked).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad()
        for name, value in parts.items():
            sums[name] += value.item()
        done = step + 1
        if done % 25 == 0:
            seconds = (time.perf_counter() - began) / (done - first)
            line = {"step": done, "seconds_per_step": round(seconds, 3)}
            line |= {name: round(value / 25, 4) for name, value in sums.items()}
            line |= {f"{name}_accuracy": round(value, 4) for name, value in accuracies(found, batch).items()}
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            sums = dict.fromkeys(_LOSSES, 0.0)
        if done % save_every == 0 or done == training.steps:
            state = {"step": done, "training": asdict(training), "model": model.state_dict()}
            state["optimizer"] = stepper.state_dict()
            with replacing(out / _STATE) as partial:
                torch.save(state, partial)
    model.tower.set_attn_implementation(config._attn_implementation or "sdpa")
    others = Views(config, replace(training, seed=training.seed + 5), 0)
    pixels = torch.cat([batch["pixels"] for batch in islice(others, _MEASURED)])
    unit_features(model.tower, pixels.to(device))
    model.tower.save_pretrained(out)
    return out


@torch.no_grad()
def unit_features(tower: SiglipVisionModel, pixels: Tensor) -> None:
    """Change weights so that over ``pixels`` each feature has mean 0 and all of them standard deviation 1.

    As trained they are forty times as large, and so would visual tokens be beside words, whatever a decoder adds to
    them. Layers see their input normalised, so all that is added to the features may be scaled, and what the last layer
    adds be shifted: the features change by that and by nothing else.
    """
    features = tower(pixels).last_hidden_state
    mean = features.mean((0, 1))
    scale = 1 / (features - mean).std()
    inner: Any = getattr(tower, "vision_model", tower)  # nested in some versions
    embeddings, layers = inner.embeddings, inner.encoder.layers
    added: list[Any] = [embeddings.patch_embedding]
    for layer in layers:
        added += [layer.self_attn.out_proj, layer.mlp.fc2]
    for part in added:
        part.weight.mul_(scale)
        part.bias.mul_(scale)
    embeddings.position_embedding.weight.mul_(scale)
    layers[-1].mlp.fc2.bias.sub_(mean * scale)
