"""Asks a model the questions of a task, many at a time: each alone, each picture encoded once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashsloth.context import ImageContext
from flashsloth.data.broken import BrokenRecord, Skipped
from flashsloth.data.llava import MAX_PIXELS, decode
from flashsloth.encoding import Row, encode_prompt, pad_rows
from flashsloth.evaluation.scoring import Score, matches, score_kinds
from flashsloth.evaluation.tasks import Question, Task
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor
from flashsloth.prompt import Prompt, find_questions

BATCH_SIZE, MAX_NEW_TOKENS = 64, 64


@dataclass
class Result:
    """What a model answered.

    Attributes:
        answers: by the position of the question in the task; questions of skipped records have none.
        skipped: records that cannot be used, those the task left out among them.
        seconds: what asking took, of this run.
    """

    task: Task
    answers: dict[int, str] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0

    def right(self, index: int) -> bool:
        return matches(self.answers[index], self.task.questions[index].answer)

    @property
    def kinds(self) -> dict[str, Score]:
        """The score of each kind, in alphabetical order."""
        return score_kinds((self.task.questions[i].kind, self.right(i)) for i in self.answers)

    @property
    def groups(self) -> dict[str, Score]:
        """The score of each group of kinds."""
        kinds, none = self.kinds, Score(0, 0)
        return {name: sum((kinds.get(k, none) for k in of), none) for name, of in self.task.groups.items()}

    @property
    def total(self) -> Score:
        return sum(self.kinds.values(), Score(0, 0))

    @property
    def misses(self) -> list[dict[str, Any]]:
        """Questions that were answered wrong, in their order."""
        wrong = [(self.task.questions[i], self.answers[i]) for i in sorted(self.answers) if not self.right(i)]
        return [
            {"record": q.name, "image": q.picture, "kind": q.kind, "question": q.text, "expected": q.answer, "got": got}
            for q, got in wrong
        ]


Batch = tuple[dict[int, str], list[Skipped]]  # answers by question, and records that turned out unusable


def evaluate(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    task: Task,
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    image_hd: bool | None = None,
    known: Result | None = None,
    report: Callable[[dict[int, str], list[Skipped]], None] | None = None,
) -> Result:
    """The answers of ``model`` (in inference mode) to a task, by greedy decoding.

    Args:
        batch_size: questions that run together. It changes no answer, but for rounding.
        max_new_tokens: of an answer; a longer one is cut.
        image_hd: five tiles a picture or one; by default as the processor is set.
        known: of an earlier run: what it has is not asked again.
        report: called behind each batch with its answers and the records that turned out unusable.

    Raises:
        ValueError: a number out of range.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    result = Result(task, {}, list(task.skipped))
    if known is not None:
        result.answers.update(known.answers)
        result.skipped += [one for one in known.skipped if one not in result.skipped]
    out = {one.index for one in result.skipped}
    todo = [i for i, q in enumerate(task.questions) if i not in result.answers and q.record not in out]
    begun = time.perf_counter()
    run = _Run(model, processor, task, batch_size, max_new_tokens, image_hd)
    for chunk in _chunks(task, todo, batch_size):
        for answers, skipped in run.ask(chunk):
            fresh = [one for one in skipped if one.index not in out]
            out.update(one.index for one in fresh)
            result.answers.update(answers)
            result.skipped += fresh
            if report is not None:
                report(answers, fresh)
    result.answers = {i: a for i, a in result.answers.items() if task.questions[i].record not in out}
    result.seconds = time.perf_counter() - begun
    return result


def _chunks(task: Task, todo: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Questions that run together: those of a picture stay together, and pictures whose longest answers are about as
    long stand together, as a batch decodes until its last row has ended. What is read of an answer is its length."""
    of: dict[str | None, list[int]] = {}
    for i in todo:
        of.setdefault(task.questions[i].picture, []).append(i)
    chunk: list[int] = []
    for indices in sorted(of.values(), key=lambda group: max(len(task.questions[i].answer) for i in group)):
        bare = task.questions[indices[0]].picture is None
        if chunk and (bare or len(chunk) + len(indices) > batch_size):
            yield chunk
            chunk = []
        if bare or len(indices) > batch_size:
            yield indices
        else:
            chunk += indices
    if chunk:
        yield chunk


@dataclass
class _Run:
    model: Any
    processor: FlashSlothProcessor
    task: Task
    batch_size: int
    max_new_tokens: int
    image_hd: bool | None

    def ask(self, chunk: Sequence[int]) -> Iterator[Batch]:
        """The pictures of ``chunk`` are encoded once, then its questions run, ``batch_size`` at a time."""
        skipped: list[Skipped] = []
        names = list(dict.fromkeys(p for i in chunk if (p := self.task.questions[i].picture) is not None))
        pixels: dict[str, Any] = {}
        for name in names:
            try:
                pixels[name] = self._pixels(name)
            except BrokenRecord as error:
                records = {self.task.questions[i].record: self.task.questions[i] for i in chunk
                           if self.task.questions[i].picture == name}  # fmt: skip
                skipped += [Skipped.of(q.record, q.name, error) for q in records.values()]
        rows: list[tuple[int, Row]] = []
        for i in chunk:
            question = self.task.questions[i]
            if question.picture is not None and question.picture not in pixels:
                continue
            try:
                rows.append((i, self._row(question)))
            except BrokenRecord as error:
                skipped.append(Skipped.of(question.record, question.name, error))
        context, place = None, {name: number for number, name in enumerate(pixels)}
        if rows and pixels:
            with torch.no_grad():
                values = torch.stack([torch.from_numpy(one) for one in pixels.values()])
                context = self.model.get_image_context(values.to(self.model.device))
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            shown = [place.get(self.task.questions[i].picture or "", -1) for i, _ in part]
            texts = self._generate([row for _, row in part], None if context is None else _for_rows(context, shown))
            yield {i: text for (i, _), text in zip(part, texts, strict=True)}, skipped
            skipped = []
        if skipped:
            yield {}, skipped

    def _pixels(self, name: str) -> Any:
        image = decode(self.task.picture(name), MAX_PIXELS)
        return self.processor.image_processor.pixel_values([("image", image)], image_hd=self.image_hd)[0]

    def _row(self, question: Question) -> Row:
        content: list[dict[str, str]] = [] if question.picture is None else [{"type": "image"}]
        content.append({"type": "text", "text": question.text})
        text = self.processor.apply_chat_template([{"role": "user", "content": content}])
        tokenizer = self.processor.tokenizer
        expansion = {
            self.processor.image_token_id: self.processor.num_image_tokens(self.image_hd),
            self.processor.learnable_token_id: self.processor.num_queries,
        }
        row = encode_prompt(tokenizer, Prompt(text, find_questions(text, tokenizer.eos_token)), expansion)
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and len(row.ids) + self.max_new_tokens > limit:
            raise BrokenRecord(
                "too_long", f"expected {limit - self.max_new_tokens} tokens before the answer, got {len(row.ids)}"
            )
        return row

    def _generate(self, rows: list[Row], context: ImageContext | None) -> list[str]:
        """The answers; a batch ends when all of its rows have."""
        padded = pad_rows(rows, self.processor.tokenizer.pad_token_id, "left", labels=False)
        batch = {name: torch.from_numpy(value) for name, value in padded.items()}
        spans = batch.pop("question_spans")
        ids: Tensor = self.model.generate(
            **{name: value.to(self.model.device) for name, value in batch.items()},
            question_spans=spans,
            image_context=context,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
        )
        made = ids[:, batch["input_ids"].shape[1] :].tolist()
        return [self._decode(row) for row in made]

    def _decode(self, ids: Iterable[int]) -> str:
        text: str = self.processor.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()


def _for_rows(context: ImageContext, shown: Sequence[int]) -> ImageContext:
    """The context for rows that show image ``shown[b]``, -1 for none. Where every image has as many rows, one after
    the other, the query module reads each image once for all of them."""
    images, rows = context.features.shape[0], len(shown)
    each = rows // images
    aligned = each and list(shown) == [image for image in range(images) for _ in range(each)]
    return context._replace(
        row_image=torch.tensor(shown, device=context.features.device), rows_per_image=each if aligned else 0
    )
