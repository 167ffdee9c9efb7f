"""Small models and small batches for the tests of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration

IMAGE, LEARNABLE, OFFSET, PAD, EOS = 90, 91, 7, 92, 93
QUERIES, VISUAL, SIZE = 3, 4, 28

VISION = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 7,
}
PHI = {
    "model_type": "phi",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 256,
}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def small_config(text: dict[str, Any] = PHI, **changes: Any) -> FlashSlothConfig:
    fields: dict[str, Any] = {
        "pool_window": 2,
        "num_queries": QUERIES,
        "query_layer": 2,
        "query_dim": 16,
        "image_token_id": IMAGE,
        "learnable_token_id": LEARNABLE,
        "query_offset_token_id": OFFSET,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **changes,
    }
    return FlashSlothConfig(vision_config=fields.pop("vision_config", VISION), text_config=text, **fields)


def small_model(text: dict[str, Any] = PHI, seed: int = 0, **changes: Any) -> FlashSlothForConditionalGeneration:
    """A random model whose parts are large enough to be seen in the logits."""
    torch.manual_seed(seed)
    model = FlashSlothForConditionalGeneration(small_config(text, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0 if "language_model" in name or "embedded_query" in name else 2.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def words(count: int, seed: int) -> list[int]:
    return torch.randint(8, IMAGE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def images(count: int, tiles: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, tiles, 3, SIZE, SIZE, generator=generator) * 2 - 1


class Row:
    """A conversation: what precedes the image, the image or none, then questions, each with the answer given.

    ``turn`` is the turn the image is shown in.
    """

    def __init__(
        self, *questions: int, image: bool = True, answer: int = 5, seed: int = 0, tiles: int = 1, turn: int = 0
    ) -> None:
        shown = [IMAGE] * (VISUAL * tiles if image else 0)
        self.ids = words(3, seed) + (shown if turn == 0 else [])
        self.image = image
        self.spans: list[tuple[int, int]] = []
        for number, question in enumerate(questions):
            if number:
                self.ids += words(answer, seed + 50 + number) + (shown if turn == number else [])
            self.spans.append((len(self.ids), len(self.ids) + question))
            self.ids += words(question, seed + 100 + number) + [LEARNABLE] * QUERIES
        self.ids += words(2, seed + 200)


def batch(rows: list[Row], side: str = "right", extra: int = 0, seed: int = 0, tiles: int = 1) -> dict[str, Tensor]:
    """Model inputs of the rows, padded to the longest and ``extra`` more. Image i depends on its row's index alone."""
    length, groups = max(len(r.ids) for r in rows) + extra, max(len(r.spans) for r in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    spans = torch.full((len(rows), groups, 2), -1)
    for i, row in enumerate(rows):
        start = length - len(row.ids) if side == "left" else 0
        ids[i, start : start + len(row.ids)] = torch.tensor(row.ids)
        mask[i, start : start + len(row.ids)] = 1
        for g, span in enumerate(row.spans):
            spans[i, g] = torch.tensor(span) + start
    inputs = {"input_ids": ids, "attention_mask": mask, "question_spans": spans}
    shown = [images(1, tiles, seed + i) for i, row in enumerate(rows) if row.image]
    if shown:
        inputs["pixel_values"] = torch.cat(shown)
    return inputs
