"""Sort-of-CLEVR as arXiv 1706.01427 publishes it, answers worked out again from the pixels."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from flashsloth.data.sight import Settings, make_sample
from flashsloth.data.sight.dice import SPLITS
from flashsloth.data.sight.sample import Sample
from flashsloth.data.sight.sort_of_clevr import COUNTS, NON_RELATIONAL, RELATIONAL

RGB = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "orange": (255, 156, 0), "yellow": (255, 255, 0),
       "gray": (128, 128, 128)}  # fmt: skip
WORDING = {
    "query-shape": r"What is the shape of the (\w+) object\?",
    "query-horizontal": r"Is the (\w+) object on the left or right of the image\?",
    "query-vertical": r"Is the (\w+) object on the top or bottom of the image\?",
    "closest-to": r"What is the shape of the object that is closest to the (\w+) object\?",
    "furthest-from": r"What is the shape of the object that is furthest from the (\w+) object\?",
    "count": r"How many objects have the shape of the (\w+) object\?",
}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [make_sample(Settings(0, 75, True), split, i, None) for split in SPLITS for i in range(200)]


def _look(sample: Sample) -> dict[str, tuple[float, float, str]]:
    """Centre and shape of each object, from the picture alone: a square fills its box, a circle does not."""
    pixels = np.asarray(sample.image)
    found = {}
    for color, rgb in RGB.items():
        y, x = np.nonzero((pixels == rgb).all(axis=2))
        box = (x.max() - x.min() + 1) * (y.max() - y.min() + 1)
        assert (x.max() - x.min(), y.max() - y.min()) == (10, 10)
        found[color] = ((x.min() + x.max()) / 2, (y.min() + y.max()) / 2, "square" if len(x) == box else "circle")
    return found


def test_pictures_follow_the_protocol(samples: list[Sample]) -> None:
    shapes = Counter()
    for sample in samples:
        assert sample.image.size == (75, 75)
        assert sorted(thing.color for thing in sample.scene.things) == sorted(RGB)
        white = (np.asarray(sample.image) == 255).all(axis=2).sum()
        objects = _look(sample)
        shapes.update(shape for _, _, shape in objects.values())
        covered = sum(121 if shape == "square" else _CIRCLE for _, _, shape in objects.values())
        assert white + covered == 75 * 75  # nothing overlaps, and there is nothing else
    assert shapes["square"] / shapes.total() == pytest.approx(0.5, abs=0.03)
    assert COUNTS == {"train": 9800, "validation": 200, "test": 200}


_CIRCLE = 97  # pixels of a circle 11 wide


def test_ten_and_ten_questions_in_the_words_of_the_paper(samples: list[Sample]) -> None:
    kinds = Counter()
    for sample in samples:
        count = Counter(question.kind for question in sample.questions)
        assert sum(count[kind] for kind in NON_RELATIONAL) == 10
        assert sum(count[kind] for kind in RELATIONAL) == 10
        assert len({question.text for question in sample.questions}) == 20
        for question in sample.questions:
            assert re.fullmatch(WORDING[question.kind], question.text)
        kinds += count
        assert sample.caption is None
    for kind in WORDING:
        assert kinds[kind] / kinds.total() == pytest.approx(1 / 6, abs=0.01)


def test_answers_are_those_of_the_pixels(samples: list[Sample]) -> None:
    for sample in samples:
        objects = _look(sample)
        for question in sample.questions:
            color = re.fullmatch(WORDING[question.kind], question.text).group(1)
            assert question.answer == _answer(question.kind, color, objects), (sample.index, question)


def _answer(kind: str, color: str, objects: dict[str, tuple[float, float, str]]) -> str:
    x, y, shape = objects[color]
    away = {c: (ox - x) ** 2 + (oy - y) ** 2 for c, (ox, oy, _) in objects.items() if c != color}
    if kind == "query-shape":
        return shape
    if kind == "query-horizontal":
        return {-1: "left", 0: "none", 1: "right"}[np.sign(x - 37)]
    if kind == "query-vertical":
        return {-1: "top", 0: "none", 1: "bottom"}[np.sign(y - 37)]
    if kind == "count":
        return str(sum(other == shape for _, _, other in objects.values()))
    extreme = min(away.values()) if kind == "closest-to" else max(away.values())
    shapes = {objects[c][2] for c, distance in away.items() if distance == extreme}
    return shapes.pop() if len(shapes) == 1 else "none"


def test_no_answer_is_a_good_guess(samples: list[Sample]) -> None:
    answers = defaultdict(Counter)
    for sample in samples:
        for question in sample.questions:
            answers[question.kind][question.answer] += 1
    for kind, found in answers.items():
        assert max(found.values()) / found.total() < (0.38 if kind == "count" else 0.55)
