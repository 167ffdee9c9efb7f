"""FlashSlothProcessor: wrong calls, conversations and training data are named."""

from __future__ import annotations

from typing import Any

import pytest

from flashsloth.processing import FlashSlothProcessor
from tests.model.prompting import (
    QUESTION,
    assistant,
    official_dir,
    photo,
    processor,
    small_processor,
    user,
)

__all__ = ["official_dir", "processor"]  # fixtures


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({}, ValueError, "expected at least one of them"),
        ({"text": []}, ValueError, "at least one text, got an empty list"),
        ({"text": ""}, ValueError, r"text\[0\]: expected a text, got an empty string"),
        ({"text": ["a", 3]}, TypeError, r"text\[1\]: expected a string, got int"),
        ({"text": 3}, TypeError, "text: expected a string or a list"),
        ({"text": "a\ud800"}, ValueError, r"text\[0\]: expected valid Unicode"),
        ({"text": "<image>a"}, ValueError, "1 <image> in all, but 0 images"),
        ({"text": "a", "images": [photo()]}, ValueError, "0 <image> in all, but 1 images"),
        ({"text": ["<image>", "a<image>"], "images": [photo()]}, ValueError, "2 <image> in all, but 1 images"),
        ({"text": ["<image>", "a"], "images": [[], [photo()]]}, ValueError, r"text\[0\] has 1 <image>, but .* holds 0"),
        ({"text": ["<image>", "a"], "images": [[photo()]]}, ValueError, "one list for each of 2 texts, got 1"),
        ({"text": ["a", "<image> <image>"], "images": [photo()] * 2}, ValueError, r"text\[1\]: expected at most one"),
        ({"text": ["<image>", "<image>"], "images": [photo(), "nowhere"]}, ValueError, r"images\[1\]: cannot read"),
        ({"text": ["<image>"], "images": [["nowhere"]]}, ValueError, r"images\[0\]\[0\]: cannot read"),
        ({"images": []}, ValueError, "at least one image, got none"),
        ({"text": "a", "truncation": True}, ValueError, "truncation: not supported"),
        ({"text": "a", "add_special_tokens": True}, ValueError, "add_special_tokens: not supported"),
        ({"text": "a", "videos": [1]}, ValueError, "got videos or audio"),
        ({"text": "a", "colour": 1}, TypeError, "unknown arguments: colour"),
        ({"text": "a", "text_kwargs": {"stride": 1}}, TypeError, "unknown arguments: stride"),
        ({"text": "a", "return_tensors": "tf"}, ValueError, "return_tensors.*'tf'"),
        ({"text": "a", "padding": "left"}, ValueError, "padding: expected True, False.*'left'"),
        ({"text": "a", "padding_side": "top"}, ValueError, "padding_side: expected 'left' or 'right', got 'top'"),
        ({"text": ["a", "bc"], "padding": False}, ValueError, r"different lengths \[1, 2\]"),
        ({"text": "abc", "padding": "max_length"}, ValueError, "max_length: expected a length"),
        ({"text": "abc", "padding": "max_length", "max_length": 2}, ValueError, r"at most 2 tokens.*\[3\]"),
        ({"text": "abc", "pad_to_multiple_of": -2}, ValueError, "pad_to_multiple_of"),
    ],
)  # fmt: skip
def test_wrong_calls_are_named(call: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        small_processor()(**call)


@pytest.mark.parametrize("token", ["<image>", "<learnable>", "</s>", "<|endoftext|>"])
def test_messages_smuggle_no_special_tokens(processor: FlashSlothProcessor, token: str) -> None:
    for role in range(2):
        contents = ["a", "b"]
        contents[role] += token
        messages = [user(contents[0]), assistant(contents[1]), user("c")]
        with pytest.raises(ValueError, match=rf"conversation\[{role}\].*reserved"):
            processor.apply_chat_template(messages)
        with pytest.raises(ValueError, match=rf"conversation\[1\]\[{role}\].*reserved"):
            processor.apply_chat_template([[user("x")], messages])
    with pytest.raises(ValueError, match="reserved"):
        processor.encode_dialogue([user("a"), assistant("b" + token)])
    with pytest.raises(ValueError, match="reserved"):
        processor.encode_caption("a" + token, images=photo())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"conversation": []}, "expected a list of messages"),
        ({"conversation": "hi"}, "expected a list of messages"),
        ({"conversation": [[]]}, r"conversation\[0\]: expected at least one message"),
        ({"conversation": QUESTION, "tokenize": True}, "1 <image> in all, but 0 images"),
        ({"conversation": QUESTION, "tools": [{}]}, "tools: not part of this format"),
        ({"conversation": QUESTION, "return_assistant_tokens_mask": True}, "encode_dialogue"),
    ],
)
def test_wrong_conversations_are_named(call: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small_processor().apply_chat_template(**call)


def test_wrong_training_calls_are_named() -> None:
    small = small_processor()
    turns = [user("q", True), assistant("a")]
    with pytest.raises(ValueError, match="1 <image> in all, but 0 images"):
        small.encode_dialogue(turns)
    with pytest.raises(TypeError, match="truncation"):
        small.encode_dialogue(turns, truncation=True)
    for empty in ([], "", "text"):
        with pytest.raises(ValueError, match="expected a dialogue"):
            small.encode_dialogue(empty)
    with pytest.raises(ValueError, match="at least one caption"):
        small.encode_caption([])
    held = [user("q", photo()), assistant("a")]
    assert small.encode_dialogue(held)["pixel_values"].shape == (1, 1, 3, 8, 8)
    assert small.encode_dialogue([held, [user("p"), assistant("b")]])["labels"].shape[0] == 2
