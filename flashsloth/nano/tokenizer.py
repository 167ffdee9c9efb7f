"""The tokenizer of flashsloth-nano: the words of the questions, and single letters for everything else.

A word that is to be read from a picture is spelt letter by letter, so one that was never in the training data is no
harder to say than any other. Words of the questions and of the prompt are one token each, which keeps prompts short.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flashsloth.data.sight.sample import Settings, make_sample
from flashsloth.data.sight.sources import load_sources
from flashsloth.prompt import SYSTEM, dialogue_prompt
from flashsloth.tokenization import add_flashsloth_tokens

PICTURES = 2000
_OFTEN = 15  # a printed word comes up a few times in so many pictures, a word of a question far more often
_END = "<|endoftext|>"


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerBase:
    """``words``, with the space or without as they occur, are one token each; other text is spelt in bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for word in sorted(set(words)):
        (piece, _), *others = splitter.pre_tokenize_str(word)
        if others:
            raise ValueError(f"words: expected single words, got {word!r}")
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    # A dialogue to train on has a space before its embedded queries, a prompt has none; both are to be the same tokens.
    tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return add_flashsloth_tokens(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=_END, bos_token=_END, pad_token=_END)
    )


def words_of_questions(pictures: int = PICTURES, seed: int = 0) -> list[str]:
    """The words that questions, answers, captions and the prompt are made of, found by counting in training data."""
    sources = load_sources()
    counts: Counter[str] = Counter()
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    decoder = decoders.ByteLevel()

    def add(text: str) -> None:
        counts.update(decoder.decode([piece]) for piece, _ in splitter.pre_tokenize_str(text))

    for settings in (Settings(seed), Settings(seed, 75, sort_of_clevr=True)):
        for index in range(pictures):
            sample = make_sample(settings, "train", index, sources)
            add(dialogue_prompt(sample.record["conversations"]).text)
            if sample.caption is not None:
                add(sample.caption)
    system = re.findall(r" ?[A-Za-z]+", SYSTEM)
    often = [word for word, count in counts.items() if count >= _OFTEN and re.fullmatch(r" ?[A-Za-z]{2,}", word)]
    return sorted({*often, *system})
