"""A conversation about one picture: answers as they come, nothing computed twice.

The picture is encoded once, and the keys and values of everything that was said stay in the cache. A question is put
behind the whole conversation, which is tokenized anew; what the cache holds of those ids is not computed again. So an
answer is always that of the whole conversation without a cache, whatever was generated, interrupted or taken back.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from flashsloth.context import ImageContext
from flashsloth.encoding import Row, check_string, encode_prompt
from flashsloth.heatmaps import Seen, pooling_weights, query_attention, watching
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor
from flashsloth.prompt import IMAGE_TOKEN, QUERY_TOKEN, Prompt, find_questions
from flashsloth.tokenization import special_tokens

MAX_NEW_TOKENS = 256
_HALF_A_LETTER = "\ufffd"  # what bytes decode to of which the rest is still to come


@dataclass
class Answer:
    """What :meth:`Conversation.ask` gave, and how long it took.

    Attributes:
        text: all that was yielded. ``ids``: the tokens that were generated, the end token included.
        ended: "stop" (the model ended it), "length" (as many tokens as were allowed, or as the model has positions
            for), "interrupted" (the caller stopped reading, or an error), None while it is under way.
        prompt_tokens: of the whole conversation, placeholders expanded; ``cached_tokens`` of them were in the cache.
        image_seconds: to encode the picture, 0 where it was encoded before.
        first_token_seconds: from the encoded picture to the first token.
        decode_seconds: for the tokens behind the first. All three are times of the model, not of who reads.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    ended: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    image_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first; 0 where there is none."""
        return (len(self.ids) - 1) / self.decode_seconds if len(self.ids) > 1 and self.decode_seconds > 0 else 0.0


@contextmanager
def _timed(answer: Answer, name: str) -> Iterator[None]:
    """Adds the seconds of a block to an attribute of ``answer``."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        setattr(answer, name, getattr(answer, name) + time.perf_counter() - begun)


class Conversation:
    """Questions and answers about one picture, or about none.

    One question at a time, and one thread at a time for a model, as of any module of torch.

    Args:
        model: in inference mode (``eval()``), on any device.
        processor: the model's.
        image_hd: five tiles a picture or one; by default as the processor is set.

    Attributes:
        messages: the turns so far in the chat format of transformers; the first holds an image part where there is one.
        image_context: the encoded picture, None before there is one.
        last: the latest answer, also while it is under way; None before the first.
    """

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        processor: FlashSlothProcessor,
        *,
        image_hd: bool | None = None,
    ) -> None:
        self.model, self.processor, self.image_hd = model, processor, image_hd
        self.messages: list[dict[str, Any]] = []
        self.image_context: ImageContext | None = None
        self.last: Answer | None = None
        self._pixels: Tensor | None = None
        self._cache: Cache | None = None
        self._cached: list[int] = []  # the ids whose keys and values the cache holds
        self._seen: Seen | None = None
        self._answering: Generator[str, None, None] | None = None
        self._special = list(dict.fromkeys([IMAGE_TOKEN, QUERY_TOKEN, *special_tokens(processor.tokenizer)]))
        stop = model.generation_config.eos_token_id if model.generation_config is not None else None
        stop = model.config.eos_token_id if stop is None else stop
        self._stop = set(stop) if isinstance(stop, (list, tuple)) else {stop}

    @property
    def has_image(self) -> bool:
        return self._pixels is not None

    def ask(self, question: str, image: Any = None, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[str]:
        """The answer in pieces of text, as they are generated (greedily). Joined they are ``last.text``.

        Reading them runs the model; a caller who stops reading, by closing the iterator or asking the next question,
        has the answer end there, and the conversation goes on with what was said.

        Args:
            question: text, without special tokens.
            image: a picture of any kind the image processor takes: a new conversation about it begins. Without one
                the conversation goes on.
            max_new_tokens: of the answer.

        Raises:
            ValueError, TypeError: a question, picture or number that cannot be used, or a conversation that is longer
                than the model has positions for. Everything is as before then.
        """
        self.stop()
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected a whole number of at least 1, got {max_new_tokens!r}")
        if isinstance(question, str) and not question.strip():
            raise ValueError("question: expected a text, got none")
        check_string(question, "question")
        pixels = self._pixels if image is None else self._prepare(image)
        messages = [] if image is not None else self.messages
        content: Any = question
        if pixels is not None and not messages:
            content = [{"type": "image"}, {"type": "text", "text": question}]
        asked = [*messages, {"role": "user", "content": content}]
        row = self._encode(asked)
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(row.ids))
        if room < 1:
            raise ValueError(
                f"question: expected a conversation of less than {limit} tokens, the picture and earlier turns "
                f"included, got {len(row.ids)}; ask something shorter, or begin a new conversation"
            )
        if image is not None:
            self._show(pixels)
        self._answering = self._answer(asked, row, room)
        return self._answering

    def set_image(self, image: Any) -> None:
        """Begin a new conversation about ``image``. Raises as :meth:`ask`, and everything is as before then."""
        self.stop()
        self._show(self._prepare(image))

    def reset(self) -> None:
        """Forget what was said. The picture stays, encoded."""
        self.stop()
        self.messages, self.last = [], None

    def stop(self) -> None:
        """End the answer that is under way, if one is.

        Raises:
            RuntimeError: another thread is reading it this moment.
        """
        if self._answering is not None:
            try:
                self._answering.close()
            except ValueError as error:  # the generator is running
                raise RuntimeError("conversation: expected one question at a time, got another") from error
            self._answering = None

    @torch.no_grad()
    def pooling_map(self) -> Tensor:
        """Weights ``(tiles, rows, columns)`` of the vision tokens, on the CPU: each window sums to one.

        Raises:
            ValueError: no question was asked about a picture yet.
        """
        features, grid = self._looked()[1].features, self.model.config.vision_grid
        tiles = features.view(-1, grid[0] * grid[1], features.shape[-1])
        return pooling_weights(self.model, tiles).view(-1, *grid).float().cpu()

    @torch.no_grad()
    def query_map(self) -> Tensor:
        """Attention ``(Q, tiles, rows, columns)`` of each embedded query of the last question to the vision tokens, on
        the CPU: the mean of the heads, each query sums to one. Raises as :meth:`pooling_map`."""
        attention = query_attention(self.model, self._looked()[0])
        return attention.view(attention.shape[1], -1, *self.model.config.vision_grid).float().cpu()

    # ---------------------------------------------------------------- parts

    def _looked(self) -> tuple[Seen, ImageContext]:
        if self._seen is None or self.image_context is None:
            raise ValueError("conversation: expected a question about a picture to have been asked, got none")
        return self._seen, self.image_context

    def _prepare(self, image: Any) -> Tensor:
        pixels = self.processor.image_processor(image, image_hd=self.image_hd)["pixel_values"]
        if pixels.shape[0] != 1:
            raise ValueError(f"image: expected one picture, got {pixels.shape[0]}")
        return pixels

    def _show(self, pixels: Tensor | None) -> None:
        same = self._pixels is not None and pixels is not None and torch.equal(self._pixels, pixels)
        if not same:
            self._pixels, self.image_context = pixels, None
            self._forget()
        self.messages, self.last, self._seen = [], None, None

    def _forget(self) -> None:
        self._cache, self._cached = None, []

    def _encode(self, messages: list[dict[str, Any]]) -> Row:
        text = self.processor.apply_chat_template(messages)
        expansion = {
            self.processor.image_token_id: self.processor.num_image_tokens(self.image_hd),
            self.processor.learnable_token_id: self.processor.num_queries,
        }
        tokenizer = self.processor.tokenizer
        return encode_prompt(tokenizer, Prompt(text, find_questions(text, tokenizer.eos_token)), expansion)

    def _answer(self, asked: list[dict[str, Any]], row: Row, room: int) -> Generator[str, None, None]:
        answer = self.last = Answer(prompt_tokens=len(row.ids))
        ids: list[int] = []
        said = ""
        try:
            if self._pixels is not None and self.image_context is None:
                with _timed(answer, "image_seconds"):
                    self._encode_image()
            with _timed(answer, "first_token_seconds"):
                token = self._prefill(row, answer)
            while True:
                ids.append(token)
                answer.ids = tuple(ids)
                over = token in self._stop
                last = over or len(ids) == room
                said = self._decode(ids)
                piece = self._new(answer.text, said, last)
                if last:
                    answer.ended = "stop" if over else "length"
                if piece:
                    answer.text += piece
                    yield piece
                if last:
                    break
                with _timed(answer, "decode_seconds"):
                    token = self._step(token)
        except BaseException as error:
            if not isinstance(error, GeneratorExit):  # within a forward pass: some layers have the token, others not
                self._forget()
            answer.ended = answer.ended or "interrupted"
            raise
        finally:
            if ids:
                self.messages = [*asked, {"role": "assistant", "content": self._plain(said)}]

    @torch.no_grad()
    def _encode_image(self) -> None:
        assert self._pixels is not None
        self.image_context = self.model.get_image_context(self._pixels.to(self.model.device))
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # so that its time is its own

    @torch.no_grad()
    def _prefill(self, row: Row, answer: Answer) -> int:
        """The first token of the answer: all ids that the cache does not hold go through the model."""
        kept = self._reusable(row)
        self._crop(kept)
        answer.cached_tokens = kept = len(self._cached)
        device = self.model.device
        chunk = torch.tensor([row.ids[kept:]], device=device)
        with watching(self.model) as seen:
            out = self.model(
                input_ids=chunk,
                attention_mask=torch.ones(1, len(row.ids), dtype=torch.long, device=device),
                question_spans=torch.tensor([row.spans]),
                past_key_values=self._cache,
                image_context=self.image_context,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache, self._cached = out.past_key_values, list(row.ids)
        if seen:
            group = sum(end >= kept for _, end in row.spans) - 1  # the last one of those that ran
            query, text, lengths, image = seen[0]
            at = slice(group, group + 1)
            self._seen = Seen(query[at], text[at], lengths[at], image)
        return int(out.logits[0, -1].argmax())

    @torch.no_grad()
    def _step(self, token: int) -> int:
        ids = torch.tensor([[token]], device=self.model.device)
        out = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cached.append(token)
        return int(out.logits[0, -1].argmax())

    def _reusable(self, row: Row) -> int:
        """How many of a row's first ids the cache holds, without a part of a picture or of a question's queries."""
        count = 0
        # The last id is never taken from the cache: its logits are wanted.
        for ours, wanted in zip(self._cached, row.ids[:-1], strict=False):
            if ours != wanted:
                break
            count += 1
        image = [i for i, token in enumerate(row.ids) if token == self.processor.image_token_id]
        whole = [(start, end + self.processor.num_queries) for start, end in row.spans]
        if image:
            whole.append((image[0], image[-1] + 1))
        for start, end in sorted(whole, reverse=True):
            if start < count < end:
                count = start
        return count

    def _crop(self, count: int) -> None:
        if self._cache is None or count == 0:
            self._forget()
        elif count < (held := self._cache.get_seq_length()):
            try:
                self._cache.crop(count - held)
                self._cached = self._cached[:count]
            except RuntimeError:  # a sliding window does not hold what it has slid over
                self._forget()

    def _decode(self, ids: list[int]) -> str:
        text: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _new(self, shown: str, said: str, last: bool) -> str:
        """What of ``said`` was not shown yet. Spaces in front are not, nor is half a letter before it is whole."""
        text = said.lstrip()
        if not last:
            text = text.rstrip(_HALF_A_LETTER)
        # A later token may change how earlier ones are written; what was shown stays.
        return text[len(shown) :] if text.startswith(shown) else ""

    def _plain(self, text: str) -> str:
        """An answer as it goes back into the conversation: letters that spell a special token are not one."""
        while found := next((token for token in self._special if token in text), None):
            text = text.replace(found, "")
        return text
