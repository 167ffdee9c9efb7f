"""FlashSloth as a model of lmms-eval: ``lmms_eval --model flashsloth --model_args pretrained=DIR --tasks ...``.

lmms-eval finds this by the entry point group ``lmms_eval.models`` (0.7 and later), which gives it :func:`manifest`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from torch import Tensor

from flashsloth.encoding import Row, encode_prompt, pad_rows
from flashsloth.loading import load_model
from flashsloth.prompt import IMAGE_TOKEN, Prompt, find_questions

MAX_NEW_TOKENS = 1024  # where a task does not say, as other models there have it


def manifest() -> Any:
    """What the entry point is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="flashsloth", simple_class_path="flashsloth.lmms_eval.FlashSloth")


class FlashSloth(lmms):
    """A checkpoint, asked in batches. A question may have one picture, or none.

    Args:
        pretrained: directory of a checkpoint; by default the model that ships.
        device: "cpu" or "cuda"; by default a GPU where there is one. With several processes each takes its own GPU.
        dtype: as of :func:`flashsloth.loading.load_model`.
        batch_size: questions that run together.
        image_hd: five tiles a picture.

    Raises:
        TypeError: an argument of another name.
        ValueError, FileNotFoundError: as :func:`flashsloth.loading.load_model`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        image_hd: bool = False,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise TypeError(
                f"model_args: expected pretrained, device, dtype, batch_size and image_hd, got {', '.join(others)}"
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size: expected a number of at least 1, got {batch_size!r}")
        if not isinstance(image_hd, bool):
            raise ValueError(f"image_hd: expected True or False, got {image_hd!r}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and torch.cuda.is_available():
            torch.cuda.set_device(self.accelerator.local_process_index)
        kind = None if device is None else device.partition(":")[0]
        loaded = load_model(None if pretrained is None else Path(pretrained), hd=image_hd, dtype=dtype, device=kind)
        self.model: Any = loaded.model  # the annotations of generate do not fit its own mixin
        self.processor, self.image_hd = loaded.processor, loaded.image_hd
        self.batch_size = int(batch_size)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests, each ending before the first of its ``until`` strings."""
        asked = [request.args for request in requests]
        answers = [""] * len(asked)
        for settings, indices in _alike([args[1] for args in asked], self.batch_size):
            rows, pixels = self._inputs([(args[0], None, self._pictures(args[2:])) for args in _at(asked, indices)])
            texts = self._generate(rows, pixels, settings)
            for i, text in zip(indices, texts, strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", (asked[i][0], asked[i][1]), text)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """For each request the loss of its continuation, and whether greedy decoding would give it.

        The loss is the mean of the negative logarithms of the probabilities of its tokens, the end token included: that
        is what lmms-eval picks the smallest of, whatever the name says, and what its other models return.
        """
        found: list[Any] = []
        for start in range(0, len(requests), self.batch_size):
            parts = []
            for request in requests[start : start + self.batch_size]:
                context, target, *rest = request.args
                # Without a document there is no picture: the probability of a choice by itself.
                pictures = self._pictures(rest) if rest else []
                text = target if isinstance(target, str) else target(self._document(rest))
                parts.append((context, str(text), pictures))
            found += map(_response, self._losses(*self._inputs(parts)))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("flashsloth: tasks of several rounds are not supported")

    # ---------------------------------------------------------------- parts

    def _document(self, rest: Sequence[Any]) -> Any:
        _, document, task, split = rest
        return self.task_dict[task][split][document]

    def _pictures(self, rest: Sequence[Any]) -> list[Any]:
        """The pictures of a request. More than one is an error: leaving some out would be scored as if it were fair."""
        visuals = rest[0](self._document(rest)) if rest[0] is not None else None
        pictures = [] if visuals is None else list(visuals)
        if len(pictures) > 1:
            raise ValueError(f"task {rest[2]}: expected at most one picture a question, got {len(pictures)}")
        return pictures

    def _inputs(self, parts: Sequence[tuple[str, str | None, list[Any]]]) -> tuple[list[Row], Tensor | None]:
        """Rows, and the pictures in their order, from (question, answer or None, pictures)."""
        processor = self.processor
        expansion = {
            processor.image_token_id: processor.num_image_tokens(self.image_hd),
            processor.learnable_token_id: processor.num_queries,
        }
        rows, images = [], []
        for context, answer, pictures in parts:
            # Some tasks write a mark where the picture belongs; here it stands in front.
            content: list[dict[str, str]] = [{"type": "image"}] * len(pictures)
            content = [*content, {"type": "text", "text": context.replace(IMAGE_TOKEN, "").strip()}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(messages)
            targets: tuple[tuple[int, int], ...] = ()
            if answer is not None:
                begin = len(text)
                text = processor.apply_chat_template([*messages, {"role": "assistant", "content": answer}])
                targets = ((begin, len(text)),)
            prompt = Prompt(text, find_questions(text, processor.tokenizer.eos_token), targets)
            rows.append(encode_prompt(processor.tokenizer, prompt, expansion))
            images += pictures
        if not images:
            return rows, None
        return rows, processor.image_processor(images, image_hd=self.image_hd)["pixel_values"]

    def _batch(self, rows: list[Row], pixels: Tensor | None, labels: bool) -> dict[str, Tensor]:
        padded = pad_rows(rows, self.processor.tokenizer.pad_token_id, "left", labels=labels)
        batch = {name: torch.from_numpy(value) for name, value in padded.items()}
        batch = {name: value if name == "question_spans" else value.to(self.device) for name, value in batch.items()}
        return batch if pixels is None else {**batch, "pixel_values": pixels.to(self.device)}

    @torch.no_grad()
    def _generate(self, rows: list[Row], pixels: Tensor | None, settings: Mapping[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        most = int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or MAX_NEW_TOKENS)
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        longest = max(len(row.ids) for row in rows)
        if limit is not None:
            if longest >= limit:
                raise ValueError(f"context: expected less than {limit} tokens, the picture included, got {longest}")
            most = min(most, limit - longest)
        warm = float(settings.get("temperature") or 0.0)
        options: dict[str, Any] = {"do_sample": warm > 0, "num_beams": int(settings.get("num_beams") or 1)}
        if warm > 0:
            options.update(temperature=warm, top_p=settings.get("top_p"))
        batch = self._batch(rows, pixels, labels=False)
        ids = self.model.generate(**batch, max_new_tokens=most, **options)[:, batch["input_ids"].shape[1] :]
        texts = self.processor.post_process_image_text_to_text(ids, clean_up_tokenization_spaces=False)
        return [_cut(text.strip(), until) for text in texts]

    @torch.no_grad()
    def _losses(self, rows: list[Row], pixels: Tensor | None) -> list[tuple[float, bool]]:
        batch = self._batch(rows, pixels, labels=True)
        labels = batch.pop("labels")[:, 1:]
        logits = self.model(**batch, use_cache=False).logits[:, :-1]
        wanted = labels != -100
        picked = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        losses = -(picked * wanted).sum(1) / wanted.sum(1)
        greedy = ((logits.argmax(-1) == labels) | ~wanted).all(1)
        return list(zip(losses.tolist(), greedy.tolist(), strict=True))


def _response(pair: tuple[float, bool]) -> Any:
    """The evaluator of lmms-eval 0.7 makes a text of every response that is none, also of the pairs it asks for here;
    what is wrapped it leaves as it is."""
    try:
        from lmms_eval.api.instance import GenerationResult, unwrap_generation_output
    except ImportError:
        return pair
    return pair if unwrap_generation_output(pair)[0] == pair else GenerationResult(text=pair)


def _alike(settings: Sequence[Mapping[str, Any]], batch_size: int) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
    """Batches of requests with equal generation settings, by their positions."""
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(settings):
        groups.setdefault(repr(sorted(one.items())), []).append(i)
    for indices in groups.values():
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            yield settings[part[0]], part


def _at(items: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [items[i] for i in indices]


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    for end in until:
        if end:
            text = text.split(end, 1)[0]
    return text.strip()
