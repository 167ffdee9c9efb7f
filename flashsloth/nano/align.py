"""Give what is seen the meaning of words, before the first caption.

A decoder finds "the orange circle" by comparing these words with visual tokens, an embedded query by comparing them
with patches. At a random start words and pictures share no direction, and the comparison is learned word by word:
slowly, and in a mixture of many questions not at all for thousands of steps. So first, without a decoder, for each word
that could name something in a picture:

* a pooled and projected token has the direction of the embeddings of what its window shows,
* the key of a patch is near to the query that a word makes of itself, where the patch shows what the word says,
* what an embedded query brings back from a patch has the direction of the embeddings of what the patch shows.

In the end visual tokens and what queries bring back are made as large as words, as beside something forty times its
size nothing that a layer adds would count; and keys are made equal to queries in the layers of the decoder, whose heads
so start by looking for the same.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from flashsloth.data.sight.captions import COLUMNS, ROWS
from flashsloth.data.sight.scene import COLORS, SHAPES
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.nano.patches import INKS, KINDS
from flashsloth.nano.tower import TowerTraining, Views
from flashsloth.training.muon import Muon
from flashsloth.training.stages import load_model, load_processor

DIGITS, LETTERS = tuple("0123456789"), tuple("abcdefghijklmnopqrstuvwxyz")
NAMES = (*ROWS, *COLUMNS, *SHAPES, *DIGITS, "digit", "bar", "word", "print", *COLORS, *LETTERS)
_PLACE = {name: i for i, name in enumerate(NAMES)}
_LOSSES = ("token", "key", "value")


# Views and rates are as the tower was trained with; of another seed, so that pictures are new.
ALIGNMENT = TowerTraining(steps=500, warmup=20, decay=200, seed=1)


def names_shown(labels: dict[str, Tensor]) -> Tensor:
    """(B, rows, columns, names) bool: what each patch shows, by the labels of :mod:`flashsloth.nano.patches`, and the
    third of the picture it is in, down and across."""
    kind, ink, letter = labels["kind"], labels["ink"], labels["letter"]
    grid = kind.shape[1]
    shown = torch.zeros(*kind.shape, len(NAMES), dtype=torch.bool)
    for value, name in enumerate(KINDS[1:], 1):
        shown[..., _PLACE["print" if name == "small" else name]] |= kind == value
        if name in DIGITS:
            shown[..., _PLACE["digit"]] |= kind == value
    for value, name in enumerate(INKS):
        if name in COLORS:
            shown[..., _PLACE[name]] |= ink == value
    for value, name in enumerate(LETTERS, 1):
        shown[..., _PLACE[name]] |= (letter == value).any(-1)
    for i in range(grid):
        shown[:, i, :, _PLACE[ROWS[3 * i // grid]]] = True
        shown[:, :, i, _PLACE[COLUMNS[3 * i // grid]]] = True
    return shown


def in_windows(shown: Tensor, window: int) -> Tensor:
    """(B, windows, names) of ``shown`` (B, rows, columns, names), whose sides are multiples of ``window``."""
    batch, rows, columns, names = shown.shape
    apart = shown.view(batch, rows // window, window, columns // window, window, names)
    return apart.any(4).any(2).flatten(1, 2)


def ids_of_names(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token of each name as it occurs in a text: a word behind a space, a digit or a letter by itself."""
    ids = []
    for name in NAMES:
        found = tokenizer(name if len(name) == 1 else f" {name}", add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise ValueError(f"tokenizer: expected one token for {name!r}, got {len(found)}")
        ids += found
    return torch.tensor(ids)


class Aligner(nn.Module):
    """Logits of the names, of visual tokens, of keys (by head) and of values. What it adds is thrown away."""

    def __init__(self, model: FlashSlothForConditionalGeneration, ids: Tensor) -> None:
        super().__init__()
        self.model, self.ids = model, ids
        self.gain = nn.ParameterDict({name: nn.Parameter(torch.ones(())) for name in _LOSSES})
        self.bias = nn.ParameterDict({name: nn.Parameter(torch.full((len(NAMES),), -3.0)) for name in _LOSSES})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """``(B, patches, Di)`` -> token ``(B, windows, names)``, key ``(B, patches, heads, names)``, value
        ``(B, patches, names)``."""
        model: Any = self.model
        query = model.embedded_query
        words = model.get_input_embeddings().weight[self.ids]
        tokens = model.projector(model.pooling(features))
        found = {"token": F.rms_norm(tokens, tokens.shape[-1:]) @ words.T}
        layer, heads = query.layers[0], query.num_heads
        told = layer.t2q_attn.v_proj(layer.ln_text(query.down_projector_learnable_text(words)))
        asked = layer.i2q_attn.q_proj(told).unflatten(-1, (heads, -1))
        keys = layer.i2q_attn.k_proj(layer.ln_kv(query.down_projector_image(features))).unflatten(-1, (heads, -1))
        found["key"] = torch.einsum("bphd,nhd->bphn", keys, asked) * keys.shape[-1] ** -0.5
        brought = query.up_projector(layer.i2q_attn.v_proj(features))
        found["value"] = F.rms_norm(brought, brought.shape[-1:]) @ words.T
        return {name: self.gain[name] * logits + self.bias[name] for name, logits in found.items()}


def losses(found: dict[str, Tensor], shown: Tensor, window: int) -> dict[str, Tensor]:
    """Binary cross entropies: sums over names, means over all else."""
    patches = shown.flatten(1, 2)
    wanted = {"token": in_windows(shown, window), "key": patches[:, :, None].expand_as(found["key"]), "value": patches}
    return {
        name: F.binary_cross_entropy_with_logits(found[name], wanted[name].float(), reduction="none").sum(-1).mean()
        for name in _LOSSES
    }


def optimizer(model: FlashSlothForConditionalGeneration, aligner: Aligner, training: TowerTraining) -> Muon:
    parts = (model.pooling, model.projector, model.embedded_query)
    matrices = [p for part in parts for p in part.parameters() if p.dim() == 2 and min(p.shape) > 1]
    own = [*aligner.gain.parameters(), *aligner.bias.parameters()]
    rest = [p for part in parts for p in part.parameters()]
    return Muon(
        matrices,
        [{"params": [*rest, model.get_input_embeddings().weight]}, {"params": own, "lr": 1e-2, "weight_decay": 0.0}],
        muon_lr=training.muon_learning_rate,
        weight_decay=training.weight_decay,
        lr=training.learning_rate,
        betas=(0.9, 0.98),
    )


def align(start: Path, tower: Path, out: Path, training: TowerTraining, *, device: str = "cpu") -> Path:
    """A model of the configuration in ``start`` with the vision tower of ``tower``, aligned, written to ``out``.

    Beside it: ``log.jsonl``, losses every 25 steps.
    """
    model: Any = load_model(start, tower=tower, seed=training.seed, dtype="float32")
    model.to(device)
    processor = load_processor(start)
    aligner = Aligner(model, ids_of_names(processor.tokenizer).to(device)).to(device)
    stepper = optimizer(model, aligner, training)
    bases = [group["lr"] for group in stepper.param_groups]
    views = Views(model.config.vision_config, training, 0)
    out.mkdir(parents=True, exist_ok=True)
    log, began = [], time.perf_counter()
    for step, batch in enumerate(DataLoader(views, batch_size=None, num_workers=1, prefetch_factor=8)):
        for group, base in zip(stepper.param_groups, bases, strict=True):
            group["lr"] = base * training.rate(step)
        with torch.no_grad():
            features = model.get_image_features(batch["pixels"].to(device))
        found = losses(aligner(features), names_shown(batch).to(device), model.config.pool_window)
        torch.stack(list(found.values())).sum().backward()
        stepper.step()
        stepper.zero_grad()
        if step % 25 == 24 or step + 1 == training.steps:
            log.append({"step": step + 1, **{name: round(one.item(), 4) for name, one in found.items()}})
            log[-1]["seconds"] = round(time.perf_counter() - began, 1)
            print(" ".join(f"{name} {value}" for name, value in log[-1].items()), flush=True)
    as_large_as_words(model, features)
    tie_keys(model)
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [asdict(training), *log]))
    processor.save_pretrained(out)
    model.save_pretrained(out)
    return out


@torch.no_grad()
def as_large_as_words(model: FlashSlothForConditionalGeneration, features: Tensor) -> None:
    """Scale the last layers of projector and embedded queries, by what they give for ``features``: directions stay."""
    parts: Any = model
    projector, query = parts.projector, parts.embedded_query
    size = parts.get_input_embeddings().weight.norm(dim=-1).mean()
    tokens = projector(parts.pooling(features))
    brought = query.up_projector(query.layers[0].i2q_attn.v_proj(features))
    for last, given in ((projector[-1], tokens), (query.up_projector, brought)):
        scale = size / given.norm(dim=-1).mean()
        last.weight.mul_(scale)
        last.bias.mul_(scale)


@torch.no_grad()
def tie_keys(model: FlashSlothForConditionalGeneration) -> None:
    """Keys like queries in each layer of the decoder, for the start: a token then looks for tokens like itself."""
    decoder: Any = model.get_decoder()
    for layer in decoder.layers:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
