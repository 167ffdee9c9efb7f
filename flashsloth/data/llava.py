"""A record of LLaVA's format to one training row: prompt, ids, question spans, labels and pixel values."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from flashsloth.data.broken import BrokenRecord, Skipped
from flashsloth.data.records import RecordSource
from flashsloth.encoding import IGNORE_INDEX, Row, encode_prompt
from flashsloth.image_processing import load_rgb
from flashsloth.processing import FlashSlothProcessor
from flashsloth.prompt import IMAGE_TOKEN, Prompt, caption_prompt, dialogue_prompt
from flashsloth.tokenization import special_tokens

MAX_PIXELS = 178_956_970 // 2  # as Pillow's own limit for what is no decompression bomb: 1/4 GiB of RGB
# The kinds a photograph comes in. Pillow knows more, and one of them runs another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclass(frozen=True)
class Sample:
    """One row to train on.

    Attributes:
        index: of its record; -1 for a row that belongs to none.
        row: expanded ids, question spans and labels.
        pixel_values: float32 ``(tiles, 3, S, S)``, or None for text alone.
        cut: tokens left out at the end because of the maximal length.
    """

    index: int
    row: Row
    pixel_values: np.ndarray | None
    cut: int = 0


class LlavaDataset(Dataset[Sample | Skipped]):
    """Records by index, ready for :class:`~flashsloth.data.collate.Collator`. A broken one is a ``Skipped``.

    ``{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt",
    "value": "A cat."}, ...]}``; without ``image`` a record is text alone. Every question has its group of embedded
    queries. As in LLaVA's own code a leading answer is left out; so is a last question without an answer, of which
    nothing can be learned.

    Args:
        source: the records.
        processor: its tokenizer, prompt format and image settings.
        captions: stage 1: ``<image>caption<learnable>\\n`` of records with an image, one question (not used) and one
            answer (the caption).
        max_length: tokens of a row, placeholders expanded. A longer row ends with the last of its answers' tokens
            that fits, so neither an image nor a group of queries is ever cut; one with no answer's token within the
            length is skipped.
        max_pixels: of an image, before it is resized.
        image_hd, image_aspect_ratio: override the image processor's settings.

    Reading a record uses no random numbers and no state: the same index gives the same sample in every process.
    """

    def __init__(
        self,
        source: RecordSource,
        processor: FlashSlothProcessor,
        *,
        captions: bool = False,
        max_length: int | None = None,
        max_pixels: int = MAX_PIXELS,
        image_hd: bool | None = None,
        image_aspect_ratio: str | None = None,
    ) -> None:
        for name, value in (("max_length", max_length), ("max_pixels", max_pixels)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        self.source, self.processor = source, processor
        self.captions, self.max_length, self.max_pixels = captions, max_length, max_pixels
        self._view: dict[str, Any] = {"image_hd": image_hd, "image_aspect_ratio": image_aspect_ratio}
        self._expansion = {
            processor.image_token_id: processor.num_image_tokens(image_hd),
            processor.learnable_token_id: processor.num_queries,
        }
        self._special = special_tokens(processor.tokenizer)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample | Skipped:
        try:
            return self._sample(index)
        except BrokenRecord as error:
            return Skipped.of(index, self.source.name(index), error)

    def blank(self) -> Sample:
        """A row with an image of mid grey and a question, of which nothing is learned: all its labels are -100."""
        tokenizer = self.processor.tokenizer
        turns = [{"from": "human", "value": IMAGE_TOKEN + "\n?"}, {"from": "gpt", "value": ""}]
        row = encode_prompt(tokenizer, dialogue_prompt(turns, tokenizer.eos_token), self._expansion)
        row.labels = [IGNORE_INDEX] * len(row.ids)
        return Sample(-1, row, self._pixel_values(Image.new("RGB", (1, 1), (128, 128, 128))))

    def _sample(self, index: int) -> Sample:
        record = self.source.record(index)
        turns = read_turns(record, self._special)
        marks = sum(value.count(IMAGE_TOKEN) for role, value in turns if role == "human")
        encoded = self.source.picture(index, record)
        if marks > (encoded is not None):
            raise BrokenRecord("too_many_marks", f"expected {int(encoded is not None)} {IMAGE_TOKEN}, got {marks}")
        if encoded is not None and not marks:
            raise BrokenRecord("unmarked_image", f"expected {IMAGE_TOKEN} in a question, got none")
        prompt = self._prompt(turns, encoded is not None)
        row = encode_prompt(self.processor.tokenizer, prompt, self._expansion)
        length = len(row.ids)
        if self.max_length is not None:
            row = cut_row(row, self.max_length, self.processor.learnable_token_id, self.processor.num_queries)
        values = None
        if encoded is not None:
            # Decoded even where the cut left it out, so that a broken image is told whatever the length.
            values = self._pixel_values(decode(encoded, self.max_pixels))
        if self.processor.image_token_id not in row.ids:
            values = None
        return Sample(index, row, values, length - len(row.ids))

    def _prompt(self, turns: list[tuple[str, str]], image: bool) -> Prompt:
        if not self.captions:
            return dialogue_prompt(
                [{"from": role, "value": value} for role, value in turns], self.processor.tokenizer.eos_token
            )
        if not image or len(turns) != 2 or not turns[1][1].strip():
            got = f"{len(turns)} turns" + ("" if image else ", no image")
            raise BrokenRecord("not_a_caption", f"expected an image, a question and an answer with text, got {got}")
        return caption_prompt(turns[1][1])

    def _pixel_values(self, image: Image.Image) -> np.ndarray:
        values: np.ndarray = self.processor.image_processor.pixel_values([("image", image)], **self._view)[0]
        return values


def read_turns(record: Any, special: list[str]) -> list[tuple[str, str]]:
    """The (role, text) pairs of a record: human and gpt in turn, the last one gpt's.

    Args:
        special: what no text may contain; an ``<image>`` in a question is its mark.

    Raises:
        BrokenRecord: what is wrong, and where.
    """
    if not isinstance(record, dict):
        raise BrokenRecord("malformed_record", f"expected an object, got {type(record).__name__}")
    conversation = record.get("conversations")
    if not isinstance(conversation, list):
        raise BrokenRecord("malformed_record", f"conversations: expected a list, got {type(conversation).__name__}")
    turns = [_read_turn(turn, f"conversations[{i}]", special) for i, turn in enumerate(conversation)]
    if not turns:
        raise BrokenRecord("empty_conversation", "conversations: expected turns, got none")
    turns = turns[1:] if turns[0][0] == "gpt" else turns
    turns = turns[:-1] if turns and turns[-1][0] == "human" else turns
    if not turns:
        raise BrokenRecord("no_answer", "conversations: expected a question and an answer, got only one of them")
    for i, (role, _) in enumerate(turns):
        if role != ("human", "gpt")[i % 2]:
            raise BrokenRecord("wrong_order", "conversations: expected human and gpt in turn, got one of them twice")
    return turns


def _read_turn(turn: Any, where: str, special: list[str]) -> tuple[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise BrokenRecord("malformed_record", f"{where}: expected strings 'from' and 'value', got {turn!r:.80}")
    role, value = _ROLES.get(turn["from"]), turn["value"]
    if role is None:
        raise BrokenRecord("unknown_role", f"{where}: expected human or gpt, got {turn['from']!r:.80}")
    # The mark is taken out first: what is left on its two sides may join to a token.
    text = value.replace(IMAGE_TOKEN, "") if role == "human" else value
    for token in special:
        if token in text:
            raise BrokenRecord("special_token", f"{where}: expected text, got the special token {token}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BrokenRecord("bad_text", f"{where}: expected valid Unicode: {error}") from error
    return role, value


def decode(encoded: bytes, max_pixels: int) -> Image.Image:
    """An upright RGB image. Raises BrokenRecord."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BrokenRecord("image_too_large", str(error)) from error
    except UnidentifiedImageError:
        raise BrokenRecord("not_an_image", f"expected one of {', '.join(FORMATS)}, {len(encoded)} bytes") from None
    except Exception as error:  # a header that begins well: anything from SyntaxError to struct.error
        raise BrokenRecord("damaged_image", f"{type(error).__name__}: {error}") from error
    if image.width * image.height > max_pixels:
        raise BrokenRecord(
            "image_too_large", f"expected {max_pixels} pixels or fewer, got {image.width}x{image.height}"
        )
    try:
        return load_rgb(image)
    except ValueError as error:
        raise BrokenRecord("damaged_image", str(error)) from error


def cut_row(row: Row, length: int, learnable_token_id: int, num_queries: int) -> Row:
    """The first part of a row, ``length`` tokens at most, that ends with a token to be learned.

    Behind such a token stand only whole images and whole groups, as none of their tokens is learned.

    Raises:
        BrokenRecord: there is no such token.
    """
    if len(row.ids) <= length:
        return row
    end = length
    while end and row.labels[end - 1] == IGNORE_INDEX:
        end -= 1
    if not end:
        raise BrokenRecord("too_long", f"expected an answer within {length} tokens, got {len(row.ids)} in all")
    if num_queries:
        groups = row.ids[:end].count(learnable_token_id) // num_queries
    else:
        groups = sum(last <= end for _, last in row.spans)
    return Row(row.ids[:end], row.spans[:groups], row.labels[:end])
