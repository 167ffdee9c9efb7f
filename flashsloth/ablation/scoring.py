"""Accuracy on the test split: every question asked alone, answered greedily, right or wrong as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flashsloth.ablation.material import Material, Question
from flashsloth.encoding import Row, encode_prompt, pad_rows
from flashsloth.evaluation.scoring import matches
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor
from flashsloth.prompt import Prompt, find_questions

_AT_ONCE = 64  # questions answered together


def score(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, material: Material
) -> dict[str, dict[str, int]]:
    """Questions asked and answered right, by kind, kinds in order of their names."""
    questions = material.questions
    found: dict[str, dict[str, int]] = {
        kind: {"asked": 0, "right": 0} for kind in sorted({question.kind for question in questions})
    }
    for start in range(0, len(questions), _AT_ONCE):
        asked = questions[start : start + _AT_ONCE]
        for question, answer in zip(asked, answers(model, processor, material, asked), strict=True):
            found[question.kind]["asked"] += 1
            found[question.kind]["right"] += matches(answer, question.answer)
    return found


@torch.inference_mode()
def answers(
    model: Any,
    processor: FlashSlothProcessor,
    material: Material,
    asked: Sequence[Question],
) -> list[str]:
    """One batch of questions. A picture that several are about is pooled and projected once."""
    tokenizer = processor.tokenizer
    rows = [request(processor, question.text) for question in asked]
    batch = pad_rows(rows, tokenizer.pad_token_id, "left", labels=False)
    pictures, shown = np.unique([question.picture for question in asked], return_inverse=True)
    features = torch.from_numpy(material.test_features[pictures]).to(model.device, model.dtype)
    inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
    inputs = {name: one if name == "question_spans" else one.to(model.device) for name, one in inputs.items()}
    ids = model.generate(
        **inputs,
        image_context=model.context_of_features(features, torch.from_numpy(shown).to(model.device)),
        max_new_tokens=material.settings.new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    made = ids[:, batch["input_ids"].shape[1] :]
    found: list[str] = tokenizer.batch_decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return found


def request(processor: FlashSlothProcessor, question: str) -> Row:
    """Ids and span of one question on one picture, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    expansion = {
        processor.image_token_id: processor.num_image_tokens(),
        processor.learnable_token_id: processor.num_queries,
    }
    eos = processor.tokenizer.eos_token
    return encode_prompt(processor.tokenizer, Prompt(text, find_questions(text, eos)), expansion)
