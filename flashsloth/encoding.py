"""From a prompt to a padded batch: tokens, expanded placeholders, spans and labels."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .image_processing import flatten_images
from .prompt import IMAGE_TOKEN, Prompt

IGNORE_INDEX = -100


@dataclass
class Row:
    """One text as the model sees it: expanded ids, a span ``(start, end)`` for each group of queries, and labels."""

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def check_string(text: Any, name: str) -> None:
    """Raises TypeError or ValueError unless ``text`` is a string a tokenizer can take, and not empty."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
    if not text:
        raise ValueError(f"{name}: expected a text, got an empty string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected valid Unicode: {error}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, expansion: Mapping[int, int]) -> Row:
    """Tokenizes a text, then expands its placeholders.

    Args:
        expansion: for the id of each placeholder, how often it is repeated.

    Spans and labels go from characters to tokens by the offsets of the tokenizer, then to expanded tokens. A token that
    reaches into a span belongs to it: in ``USER: Describe`` the first token of the question holds the space before it.
    """
    encoding = tokenizer(
        prompt.text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    ids = encoding["input_ids"]
    starts = [start for start, _ in encoding["offset_mapping"]]
    ends = [end for _, end in encoding["offset_mapping"]]
    labels = [IGNORE_INDEX] * len(ids)
    for first, last in prompt.targets:
        for i in range(bisect_right(ends, first), bisect_left(starts, last)):
            labels[i] = ids[i]
    row = Row()
    position = []
    for token, label in zip(ids, labels, strict=True):
        position.append(len(row.ids))
        count = expansion.get(token, 1)
        row.ids += [token] * count
        row.labels += [label] * count
    position.append(len(row.ids))
    for first, last in prompt.questions:
        end = position[bisect_left(starts, last)]
        start = end if first == last else position[bisect_right(ends, first)]
        row.spans.append((start, end))
    return row


def match_images(images: Any, texts: Sequence[str]) -> list[tuple[str, Any]]:
    """Checks that every ``<image>`` of the texts has its image, and no text two of them.

    Args:
        images: None, one image, a list in the order of the texts that have one, or one list (or None) for each text.

    Returns:
        (position, image) pairs in the order of the texts; ``images[2]`` or ``images[2][0]`` is a position.

    Raises:
        ValueError: naming the text and both numbers.
    """
    wanted = [text.count(IMAGE_TOKEN) for text in texts]
    for i, count in enumerate(wanted):
        if count > 1:
            raise ValueError(f"text[{i}]: expected at most one {IMAGE_TOKEN} in a text, got {count}")
    if isinstance(images, (list, tuple)) and any(one is None or isinstance(one, (list, tuple)) for one in images):
        if len(images) != len(wanted):
            raise ValueError(f"images: expected one list for each of {len(wanted)} texts, got {len(images)}")
        given: list[tuple[str, Any]] = []
        for i, (row, count) in enumerate(zip(images, wanted, strict=True)):
            found = [] if row is None else list(flatten_images(row, f"images[{i}]"))
            if len(found) != count:
                raise ValueError(f"text[{i}] has {count} {IMAGE_TOKEN}, but images[{i}] holds {len(found)} images")
            given += found
        return given
    given = [] if images is None else list(flatten_images(images))
    if len(given) != sum(wanted):
        raise ValueError(f"the texts have {sum(wanted)} {IMAGE_TOKEN} in all, but {len(given)} images were given")
    return given


def pad_rows(
    rows: Sequence[Row],
    pad_token_id: int,
    side: str,
    *,
    labels: bool,
    padding: Any = True,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    as_arrays: bool = True,
) -> dict[str, Any]:
    """Pads rows to one length: ``input_ids``, ``attention_mask``, ``question_spans`` and, on request, ``labels``.

    Returns:
        int64 arrays (B, L), spans (B, G, 2) with unused groups (-1, -1), or lists of rows without ``as_arrays``.

    Raises:
        ValueError: an argument's value, a row longer than ``max_length``, or arrays wanted of rows that differ in
            length.
    """
    if side not in ("left", "right"):
        raise ValueError(f"padding_side: expected 'left' or 'right', got {side!r}")
    lengths = [len(row.ids) for row in rows]
    target = _padded_length(lengths, padding, max_length, pad_to_multiple_of)
    if target is None and as_arrays and len(set(lengths)) > 1:
        raise ValueError(f"padding: rows of different lengths {lengths} make no tensor; pass padding=True")
    groups = max(len(row.spans) for row in rows)
    names = ["input_ids", "attention_mask", "question_spans"] + ["labels"] * labels
    data: dict[str, Any] = {name: [] for name in names}
    for row, length in zip(rows, lengths, strict=True):
        pad = 0 if target is None else target - length
        left, right = (pad, 0) if side == "left" else (0, pad)
        data["input_ids"].append([pad_token_id] * left + row.ids + [pad_token_id] * right)
        data["attention_mask"].append([0] * left + [1] * length + [0] * right)
        spans = [[start + left, end + left] for start, end in row.spans]
        data["question_spans"].append(spans + [[-1, -1]] * (groups - len(spans)))
        if labels:
            data["labels"].append([IGNORE_INDEX] * left + row.labels + [IGNORE_INDEX] * right)
    if as_arrays:
        data = {name: np.array(value, dtype=np.int64) for name, value in data.items()}
        data["question_spans"] = data["question_spans"].reshape(len(rows), groups, 2)
    return data


def _padded_length(lengths: list[int], padding: Any, max_length: int | None, multiple: int | None) -> int | None:
    """The length all rows are padded to, or None where they are left as they are."""
    padding = getattr(padding, "value", padding)  # transformers' PaddingStrategy
    if padding in (False, None, "do_not_pad"):
        return None
    if padding in (True, "longest"):
        target = max(lengths)
    elif padding == "max_length":
        if max_length is None:
            raise ValueError("max_length: expected a length with padding='max_length', got None")
        if max(lengths) > max_length:
            raise ValueError(
                f"max_length: expected rows of at most {max_length} tokens, placeholders expanded, got {lengths}"
            )
        target = max_length
    else:
        raise ValueError(f"padding: expected True, False, 'longest' or 'max_length', got {padding!r}")
    if multiple is not None and multiple < 1:
        raise ValueError(f"pad_to_multiple_of: expected a positive int, got {multiple}")
    return -(-target // multiple) * multiple if multiple else target
