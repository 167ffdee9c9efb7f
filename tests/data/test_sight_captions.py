"""Captions of ``sight``: every thing is in them, every fact is true, and their order tells nothing."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import pytest

from flashsloth.data.sight import Settings, load_sources, make_sample
from flashsloth.data.sight.captions import FURTHER
from flashsloth.data.sight.sample import Sample
from flashsloth.data.sight.scene import Scene, Thing

ENDS = {"leftmost": ("x", min), "rightmost": ("x", max), "top": ("y", min), "bottom": ("y", max)}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    sources = load_sources()
    return [make_sample(Settings(), "train", i, sources) for i in range(250)]


def facts(sample: Sample) -> list[str]:
    assert sample.caption is not None
    return sample.caption.split(", ")


def called(scene: Scene, name: str) -> list[Thing]:
    """The things a name fits."""
    *colors, what = name.split()
    fits = [t for t in scene.things if not colors or t.color == colors[0]]
    return [t for t in fits if what in (t.family, t.name) and t.family != "small"]


def the(scene: Scene, name: str) -> Thing:
    (thing,) = called(scene, name)
    return thing


def holds(scene: Scene, fact: str) -> str:
    """What kind of fact it is; fails where it is not true."""
    if ":" not in fact:
        if found := re.fullmatch(r"(\w+) bar (\d+)", fact):
            assert the(scene, f"{found[1]} bar").source == int(found[2])
            return "height"
        what, row, column = re.fullmatch(r"(.+) (top|middle|bottom) (left|center|right)", fact).groups()
        rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
        here = [t for t in scene.things if rows[int(3 * t.y / scene.size)] == row]
        here = [t for t in here if columns[int(3 * t.x / scene.size)] == column]
        names = {"shape": "{0.color} {0.name}", "small": "small print {0.name}"}
        assert what in {names.get(t.family, "{0.color} {0.family} {0.name}").format(t) for t in here}
        return "place"
    left, right = fact.split(": ")
    if " and " in left:
        a, b = (the(scene, name) for name in left.split(" and "))
        true = {
            "left": a.x < b.x,
            "right": a.x > b.x,
            "above": a.y < b.y,
            "below": a.y > b.y,
            "larger": a.source > b.source,
            "smaller": a.source < b.source,
        }
        assert true[right]
        return "larger" if right in ("larger", "smaller") else "side"
    if found := re.fullmatch(r"(closest to|farthest from) (.+)", left):
        thing = the(scene, found[2])
        others = [t for t in scene.of("shape") if t is not thing]
        best = (min if found[1] == "closest to" else max)(
            others, key=lambda t: math.dist((t.x, t.y), (thing.x, thing.y))
        )
        assert right == f"{best.color} {best.name}"
        return "near"
    if right.isdigit():
        assert len(called(scene, left.removesuffix("s"))) == int(right)
        return "number"
    which, family = left.split()
    things = scene.of(family)
    if which in ENDS:
        axis, first = ENDS[which]
        thing = first(things, key=lambda t: getattr(t, axis))
        assert right == f"{thing.color} {thing.name}"
        return "end"
    size = {"digit": lambda t: int(t.name), "bar": lambda t: t.source}[family]
    thing = (max if which in ("greatest", "largest") else min)(things, key=size)
    assert right == f"{thing.color} {size(thing)}"
    return "size"


def test_every_fact_is_true(samples: list[Sample]) -> None:
    seen = Counter(holds(sample.scene, fact) for sample in samples for fact in facts(sample))
    assert min(seen[kind] for kind in ("place", "height", "side", "larger", "near", "number", "end", "size")) > 10


def test_a_false_fact_is_found(samples: list[Sample]) -> None:
    """Of the test above: it fails where the last word is another, save where that is true of another thing."""
    wrong = {"left": "right", "above": "below", "larger": "smaller", "star": "circle", "0": "1", "2": "3"}
    tried, found = Counter(), Counter()
    for sample, (word, other) in itertools.product(samples, wrong.items()):
        for fact in facts(sample):
            *before, last = fact.split()
            if last == word:
                tried[word] += 1
                try:
                    holds(sample.scene, " ".join([*before, other]))
                except (AssertionError, ValueError):
                    found[word] += 1
    assert set(tried) == set(wrong)
    assert all(found[word] > 0.9 * tried[word] for word in wrong)


def test_captions_name_everything_once(samples: list[Sample]) -> None:
    for sample in samples:
        told = facts(sample)
        assert len(told) <= len(sample.scene.things) + FURTHER
        alone = [fact for fact in told if ":" not in fact]
        assert len(alone) == len(sample.scene.things)
        assert len(set(told) - set(alone)) == len(told) - len(alone)


def test_the_order_of_things_tells_nothing(samples: list[Sample]) -> None:
    """Of two shapes in a row, the left one comes first half the time."""
    first = Counter()
    for sample in samples:
        columns = [fact.rsplit(" ", 1)[1] for fact in facts(sample) if ":" not in fact and "bar" not in fact]
        for a, b in itertools.pairwise(columns):
            if {a, b} == {"left", "right"}:
                first[a] += 1
    assert first.total() > 50
    assert abs(first["left"] / first.total() - 0.5) < 2.5 / math.sqrt(first.total())
