"""The tokenizer of a FlashSloth checkpoint: any fast tokenizer plus three tokens of the prompt format."""

from __future__ import annotations

import json
import os
from typing import Any

from transformers import AutoTokenizer, CodeGenTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .prompt import EOS_TOKEN, IMAGE_TOKEN, QUERY_TOKEN


def add_flashsloth_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Adds ``<learnable>``, ``</s>`` and ``<image>``, those that are missing, in this order, and returns the tokenizer.

    ``</s>`` becomes the end-of-sequence token, the padding token is the unknown token where there is none, and
    padding goes to the left, as batched generation needs it. With phi-2's vocabulary the ids are 50295, 50296 and
    50297; an official checkpoint has the first two, so that ``<image>``, which the official code handles outside of
    the vocabulary, takes the first free id.

    Raises:
        TypeError: not a fast tokenizer (spans need character offsets).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer: expected a fast tokenizer (with offsets), got {type(tokenizer).__name__}")
    special = special_tokens(tokenizer)
    if QUERY_TOKEN not in special:
        tokenizer.add_tokens([QUERY_TOKEN], special_tokens=True)
    if EOS_TOKEN not in special or tokenizer.eos_token != EOS_TOKEN:
        tokenizer.add_special_tokens({"eos_token": EOS_TOKEN})
    if IMAGE_TOKEN not in special:
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The strings a tokenizer takes for one token wherever they occur in a text, and leaves out when decoding."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def load_tokenizer(path: str | os.PathLike[str], **hub: Any) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint in our layout or the official one, a directory or a hub id.

    The official layout names ``CodeGenTokenizer``, whose files are ``vocab.json``, ``merges.txt`` and the tokens
    added to them. The three tokens of the format are added where they are missing (:func:`add_flashsloth_tokens`).

    Args:
        hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` as in transformers.

    Raises:
        FileNotFoundError: a directory without tokenizer files, naming those that were looked for.
    """
    if os.path.isdir(path):
        names = set(os.listdir(path))
        if not ({"tokenizer.json"} <= names or {"vocab.json", "merges.txt"} <= names):
            raise FileNotFoundError(
                f"{os.fspath(path)}: expected tokenizer.json, or vocab.json and merges.txt; found neither"
            )
    settings = read_json(path, "tokenizer_config.json", **hub) or {}
    # The auto class would look into config.json, which is not needed to tell what the tokenizer is.
    official = settings.get("tokenizer_class", "CodeGenTokenizer") in ("CodeGenTokenizer", "CodeGenTokenizerFast")
    tokenizer = (CodeGenTokenizer if official else AutoTokenizer).from_pretrained(path, **hub)
    side = tokenizer.padding_side
    tokenizer = add_flashsloth_tokens(tokenizer)
    if "processor_class" in settings:  # written by save_pretrained: keep what was saved
        tokenizer.padding_side = side
    return tokenizer


def read_json(path: str | os.PathLike[str], name: str, **hub: Any) -> dict[str, Any] | None:
    """Reads a JSON object from a checkpoint, a directory or a hub id; None where the checkpoint has no such file.

    Raises:
        ValueError: the file is no JSON object.
    """
    if os.path.isdir(path):
        file: str | None = os.path.join(path, name)
    else:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None or not os.path.exists(file):
        return None
    with open(file, encoding="utf-8") as reader:
        try:
            value = json.load(reader)
        except ValueError as error:
            raise ValueError(f"{file}: expected a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value
