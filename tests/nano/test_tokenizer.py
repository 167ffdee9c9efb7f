"""The tokenizer of flashsloth-nano."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from flashsloth.data.sight.words import words_of
from flashsloth.nano.tokenizer import build_tokenizer, words_of_questions


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(words_of_questions(pictures=400))


def test_words_of_questions_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    words = ["USER", ":", "ĠWhat", "Ġcolor", "Ġis", "Ġthe", "Ġshape", "Ġclosest", "Ġto", "Ġthe", "Ġred", "Ġstar", "?"]
    assert tokenizer.tokenize("USER: What color is the shape closest to the red star?") == words


def test_words_to_be_read_are_spelt(tokenizer: PreTrainedTokenizerBase) -> None:
    """Also those of the test split, which training never shows; but for the few that questions use."""
    spelt = [word for word in words_of("test") if tokenizer.tokenize(f" {word}") == ["Ġ", *word]]
    assert len(spelt) > 0.95 * len(words_of("test"))


def test_any_text_survives(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("What word is printed?", "naïve Ωmega 日本 \N{OWL}", "two  spaces\nand lines"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_space_before_the_queries_is_no_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("Which? <learnable> ASSISTANT:") == tokenizer.tokenize("Which?<learnable> ASSISTANT:")


def test_more_than_one_word_is_refused() -> None:
    with pytest.raises(ValueError, match="words: expected single words, got 'two words'"):
        build_tokenizer(["one", "two words"])
