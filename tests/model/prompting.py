"""What the tests of prompts and processor share: tokenizers, an official-layout directory, golden prompts."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CodeGenTokenizer, PreTrainedTokenizerBase, TokenizersBackend

from flashsloth.image_processing import FlashSlothImageProcessor
from flashsloth.processing import FlashSlothProcessor
from flashsloth.tokenization import add_flashsloth_tokens
from tests.support import golden_path

# CodeGen's additions to GPT-2: runs of spaces and tabs.
WHITESPACE = {" " * n: 50288 - n for n in range(2, 32)} | {"\t" * n: 50296 - n for n in range(2, 10)}
SPECIAL = {"<|endoftext|>": 50256, "<learnable>": 50295, "</s>": 50296}
IMAGE, LEARNABLE, EOS, PAD = 50297, 50295, 50296, 50256


@cache
def golden_json(name: str) -> Any:
    return json.loads(golden_path(name).read_text())


def prompt_cases(kind: str) -> list[dict[str, Any]]:
    return [case for case in golden_json("prompt_strings.json") if case["kind"] == kind]


def span_case(name: str) -> dict[str, Any]:
    return next(case for case in golden_json("prompt_spans.json") if case["case"] == name)


def write_official(folder: Path, *, full: bool = False, **config: Any) -> Path:
    """A checkpoint directory as the official code saves it, without weights: CodeGen tokenizer files and config.json.

    ``full`` takes the whole vocabulary (where the large golden data is at hand), else the subset in tests/golden, which
    has every merge the golden texts need, under the same ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if full:
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(golden_path("tokenizer") / name, folder / name)
    else:
        subset = golden_json("tokenizer_subset.json")
        vocab = subset["vocab"] | WHITESPACE | SPECIAL | {"<image>": IMAGE}
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(subset["merges"]) + "\n")
    added = {
        str(i): {
            "content": token, "special": token in SPECIAL, "normalized": token not in SPECIAL,
            "lstrip": False, "rstrip": False, "single_word": False,
        }
        for token, i in (SPECIAL | WHITESPACE).items()
    }  # fmt: skip
    (folder / "added_tokens.json").write_text(json.dumps(WHITESPACE | {"<learnable>": LEARNABLE, "</s>": EOS}))
    settings = {"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": added, "padding_side": "right"}
    settings |= {"bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "</s>", "model_max_length": 64}))
    (folder / "config.json").write_text(json.dumps({"model_type": "flashsloth", **config}))
    return folder


@pytest.fixture(scope="session")
def official_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="session")
def processor(official_dir: Path) -> FlashSlothProcessor:
    """With the golden vocabulary (a subset of it) and the sizes of the released model."""
    return FlashSlothProcessor.from_pretrained(official_dir)


@pytest.fixture(scope="session")
def full_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The whole golden vocabulary; skips where the large golden data is not at hand."""
    tokenizer = CodeGenTokenizer.from_pretrained(write_official(tmp_path_factory.mktemp("full"), full=True))
    return add_flashsloth_tokens(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Any other tokenizer: bytes, no merges, no tokens of the format yet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return TokenizersBackend(tokenizer_object=backend)


def small_processor(**settings: Any) -> FlashSlothProcessor:
    """A byte tokenizer, 8 x 8 tiles of 4 tokens and 2 queries, so that counts differ from the released model's."""
    images = FlashSlothImageProcessor(image_size=8, **settings)
    return FlashSlothProcessor(images, add_flashsloth_tokens(byte_tokenizer()), num_queries=2, tokens_per_tile=4)


def photo(seed: int = 0, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def user(text: str, image: Any = None) -> dict[str, Any]:
    """A user's message; ``image=True`` for a bare image part."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image"} if image is True else {"type": "image", "image": image})
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def golden_messages(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of an ``inference_phi2`` case."""
    messages = []
    for i, question in enumerate(case["questions"]):
        messages.append(user(question, True if case["image"] and i == 0 else None))
        messages += [assistant(answer) for answer in case["answers"][i : i + 1]]
    return messages


def collapse(ids: list[int]) -> list[int]:
    """Runs of placeholders back to what the official ids have: -200 for an image, one id for a group of queries."""
    out: list[int] = []
    for i in ids:
        if i in (IMAGE, LEARNABLE) and out and out[-1] == (-200 if i == IMAGE else i):
            continue
        out.append(-200 if i == IMAGE else i)
    return out


QUESTION = [user("What is this?", True)]


def text_of(processor: FlashSlothProcessor, row: torch.Tensor, span: Any) -> str:
    return processor.decode(row[int(span[0]) : int(span[1])])


def spans(out: Any) -> list[list[list[int]]]:
    """Spans without the unused groups."""
    return [[span for span in row if span != [-1, -1]] for row in out["question_spans"].tolist()]
