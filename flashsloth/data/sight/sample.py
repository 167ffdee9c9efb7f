"""One picture with its questions, from nothing but settings, a split and a number."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from flashsloth.data.sight.captions import caption
from flashsloth.data.sight.dice import Dice
from flashsloth.data.sight.paint import paint
from flashsloth.data.sight.questions import Question, ask, describe
from flashsloth.data.sight.scene import Scene, compose
from flashsloth.data.sight.sort_of_clevr import SIZE as SORT_OF_CLEVR_SIZE
from flashsloth.data.sight.sort_of_clevr import ask_sort_of_clevr, compose_sort_of_clevr, paint_sort_of_clevr
from flashsloth.data.sight.sources import Sources

VERSION = 1  # of what is generated: goes up with every change to a picture or a question

# A tower of half the side sees 108 pixels: patches of 6 give a grid of 18 x 18, which windows of 3 pool to 36 tokens,
# patches of 12 a grid of 9 x 9 and 9 tokens. HD cuts the picture into four tiles of 108, so it sees every pixel.
# 216 itself divides by 8, 12, 18, 24 and 27 for a tower that looks at the whole.
SIZE = 216
MIN_SIZE, MAX_SIZE = 144, 1024  # below, no face is legible as small print
PER_FOLDER = 1000
_DESCRIBED = 1 / 6  # share of the pictures with the description for a question, and no other that it would answer


@dataclass(frozen=True)
class Settings:
    """What decides the content. ``size`` is the side in pixels."""

    seed: int = 0
    size: int = SIZE
    sort_of_clevr: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"--seed: expected a whole number of at least 0, got {self.seed!r}")
        if self.sort_of_clevr:
            if self.size != SORT_OF_CLEVR_SIZE:
                raise ValueError(
                    f"--size: expected {SORT_OF_CLEVR_SIZE}, as Sort-of-CLEVR is published, got {self.size}"
                )
        elif not MIN_SIZE <= self.size <= MAX_SIZE or self.size % 2:
            raise ValueError(f"--size: expected an even number from {MIN_SIZE} to {MAX_SIZE}, got {self.size}")


@dataclass(frozen=True)
class Sample:
    """``questions`` in the order in which they are asked; ``caption`` is None for Sort-of-CLEVR, which has none."""

    split: str
    index: int
    scene: Scene
    questions: tuple[Question, ...]
    caption: str | None
    image: Image.Image
    photograph: bool

    @property
    def name(self) -> str:
        """Path of the image, relative to the folder of its split. Photographs are JPEG, which keeps them small; all
        else is PNG, where every pixel is as drawn."""
        suffix = "jpg" if self.photograph else "png"
        return f"images/{self.index // PER_FOLDER:03d}/{self.index:06d}.{suffix}"

    @cached_property
    def encoded(self) -> bytes:
        out = io.BytesIO()
        if self.photograph:
            self.image.save(out, "JPEG", quality=90, subsampling=0)
        else:
            self.image.save(out, "PNG", compress_level=3)
        return out.getvalue()

    @cached_property
    def record(self) -> dict[str, Any]:
        """LLaVA's format, and ``kinds``: one a question."""
        turns = [(question.text, question.answer) for question in self.questions]
        return {**self._record(turns), "kinds": [question.kind for question in self.questions]}

    @property
    def caption_record(self) -> dict[str, Any]:
        return self._record([(describe(self.scene).text, self.caption or "")])

    def _record(self, turns: list[tuple[str, str]]) -> dict[str, Any]:
        conversations = []
        for i, (question, answer) in enumerate(turns):
            conversations.append({"from": "human", "value": question if i else f"<image>\n{question}"})
            conversations.append({"from": "gpt", "value": answer})
        return {"id": f"{self.split}-{self.index:06d}", "image": self.name, "conversations": conversations}

    @cached_property
    def hash(self) -> bytes:
        """SHA-256 of pixels as drawn, questions, answers and caption: not of encoded files, which codecs decide."""
        text = json.dumps([self.record, self.caption], sort_keys=True)
        return hashlib.sha256(self.image.tobytes() + text.encode()).digest()


def sample_key(settings: Settings, split: str, index: int) -> tuple[object, ...]:
    """What the random streams of a picture are named by; a word behind it says which: scene, paint, caption."""
    return ("sight", VERSION, settings.sort_of_clevr, settings.seed, split, index)


def make_sample(settings: Settings, split: str, index: int, sources: Sources | None) -> Sample:
    """The picture ``index`` of a split. ``sources`` may be None for Sort-of-CLEVR."""
    name = sample_key(settings, split, index)
    dice = Dice(*name, "scene")
    if settings.sort_of_clevr:
        scene = compose_sort_of_clevr(dice, split)
        asked = dice.shuffled(ask_sort_of_clevr(scene, dice))
        return Sample(split, index, scene, tuple(asked), None, paint_sort_of_clevr(scene), False)
    assert sources is not None
    scene = compose(dice, split, settings.size, sources)
    asked = [describe(scene)] if dice.coin(_DESCRIBED) else ask(scene, dice, split)
    image, photograph = paint(scene, Dice(*name, "paint"), split, sources)
    return Sample(split, index, scene, tuple(asked), caption(scene, Dice(*name, "caption")), image, photograph)
