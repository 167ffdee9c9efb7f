"""Questions on a scene and their answers: each has one right answer, and none is given away by how often it is right.

A form is a function that lists, for a scene, the questions it can ask, each with its answer. What would be hard to tell
is not asked: bars of equal length, two shapes about equally near, something on the line between left and right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flashsloth.data.sight.dice import Dice
from flashsloth.data.sight.scene import CLEAR, COLORS, FROM_MIDDLE, SHAPES, Scene, Thing
from flashsloth.data.sight.words import draw_word

NEARER = 1.25  # times as far as the nearest must the second be, or the second farthest as the farthest
DESCRIBE = "Describe the picture in a few words."


class Question(NamedTuple):
    """``kind`` is what scores are counted by, ``form`` one way to ask within a kind, ``text`` the question itself."""

    kind: str
    form: str
    text: str
    answer: str


Form = Callable[[Scene, Dice, str], Iterator[tuple[str, str]]]  # (scene, dice, split): (question, answer)


def ask(scene: Scene, dice: Dice, split: str, most: int = 6) -> list[Question]:
    """Up to ``most`` questions of different forms, of as many kinds as there are, in random order.

    Within a form the answer is drawn first and a question with that answer second, so that yes is as likely as no.
    """
    asked: list[Question] = []
    # A conversation must not answer itself: "Does it say "lamp"?" gives the word away, and so does the reverse.
    left_out = ("shows",) if dice.coin(0.7) else ("word", "digit", "greatest")
    by_kind: dict[str, list[tuple[str, Form]]] = {}
    for form in dice.shuffled([form for form in _FORMS if form not in left_out]):
        by_kind.setdefault(_FORMS[form][0], []).append((form, _FORMS[form][1]))
    while by_kind and len(asked) < most:
        for kind in dice.shuffled(tuple(by_kind)):
            forms = by_kind[kind]
            while forms:
                name, form_ = forms.pop()
                found = _one(kind, name, list(form_(scene, dice, split)), dice)
                if found is not None:
                    asked.append(found)
                    break
            if not forms:
                del by_kind[kind]
    return dice.shuffled(asked[:most])


def _one(kind: str, form: str, candidates: list[tuple[str, str]], dice: Dice) -> Question | None:
    by_answer: dict[str, list[str]] = {}
    for text, answer in candidates:
        by_answer.setdefault(answer, []).append(text)
    if not by_answer or (kind == "yesno" and len(by_answer) < 2):
        return None  # a yes that could not have been a no would tilt the scale
    answers = tuple(by_answer)
    weights = [_RARE.get(answer, 1.0) for answer in answers] if kind == "count" else [1.0] * len(answers)
    answer = dice.weighted(answers, weights)
    return Question(kind, form, dice.choice(by_answer[answer]), answer)


# Scenes offer a count of one far more often than a count of five; these weights level what is asked.
_RARE = {"0": 0.5, "1": 0.35, "2": 0.9, "3": 2.0, "4": 4.0, "5": 8.0, "6": 12.0}


def describe(scene: Scene) -> Question:
    """The scene in a few words: what is alone, and up to three shapes from left to right, by name; more by number."""
    words, digits, shapes = scene.of("word"), scene.of("digit"), scene.of("shape")
    parts = []
    if scene.kind == "chart":
        parts.append("bars " + ", ".join(bar.color for bar in scene.things))
    elif scene.kind == "mixed":
        parts.append(f"a word, a digit, {_number(shapes, 'shape')}")
    else:
        for family, things in (("word", words), ("digit", digits)):
            if things:
                parts.append(f"{family} {things[0].name}" if len(things) == 1 else _number(things, family))
        if len(shapes) > 3:
            parts.append(_number(shapes, "shape"))
        elif shapes:
            parts.append(", ".join(f"{t.color} {t.name}" for t in sorted(shapes, key=lambda t: t.x)))
        if scene.of("small"):
            parts.append("small print")
    return Question("describe", "describe", DESCRIBE, "; ".join(parts))


def _number(things: list[Thing], family: str) -> str:
    return f"{len(things)} {family}{'' if len(things) == 1 else 's'}"


def named(scene: Scene) -> Iterator[tuple[str, Thing]]:
    """Names that mean one thing each: "the star", "the red star", "the red shape", "the digit", "the red word"."""
    for thing in scene.things:
        if thing.family in ("small", "bar"):
            continue
        alike = [t for t in scene.of(thing.family) if t is not thing]
        if thing.family != "shape" and not alike:
            yield f"the {thing.family}", thing
            continue
        if all(t.color != thing.color for t in alike):
            yield f"the {thing.color} {thing.family}", thing
        if thing.family == "shape":
            if all(t.name != thing.name for t in alike):
                yield f"the {thing.name}", thing
            if all((t.name, t.color) != (thing.name, thing.color) for t in alike):
                yield f"the {thing.color} {thing.name}", thing


def _color(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    for name, thing in named(scene):
        if thing.color not in name:
            yield f"What color is {name}?", thing.color
    for place, thing in ends(scene):
        yield f"What color is the {place} {thing.family}?", thing.color


def _shape(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    shapes = scene.of("shape")
    if len(shapes) == 1:
        yield "What shape is shown?", shapes[0].name
    for name, thing in named(scene):
        if name.endswith("shape"):
            yield f"What is {name}?", thing.name
    for place, thing in ends(scene):
        if thing.family == "shape":
            yield f"What is the {place} shape?", thing.name


def ends(scene: Scene) -> Iterator[tuple[str, Thing]]:
    """The outermost things of a family, where they are clearly so."""
    for family in ("shape", "digit", "word"):
        things = scene.of(family)
        if len(things) < 2:
            continue
        for axis, first, last in (("x", "leftmost", "rightmost"), ("y", "top", "bottom")):
            if (family == "word" and axis == "x") or (family == "digit" and axis == "y"):
                continue
            ordered = sorted(things, key=lambda t: getattr(t, axis))
            place = [getattr(t, axis) for t in ordered]
            if place[1] - place[0] > CLEAR * scene.size:
                yield first, ordered[0]
            if place[-1] - place[-2] > CLEAR * scene.size:
                yield last, ordered[-1]


def _count(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    shapes = scene.of("shape")
    if shapes:
        yield "How many shapes are there?", str(len(shapes))
        for shape in SHAPES:
            yield f"How many {shape}s are there?", str(sum(t.name == shape for t in shapes))
        for color in COLORS:
            yield f"How many {color} shapes are there?", str(sum(t.color == color for t in shapes))
    if scene.kind == "chart":
        yield "How many bars are there?", str(len(scene.things))
    if scene.kind == "digits":
        yield "How many digits are there?", str(len(scene.things))


def _half(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    middle = scene.size / 2
    for name, thing in named(scene):
        dx, dy = thing.x - middle, thing.y - middle
        if abs(dx) > FROM_MIDDLE * scene.size:
            yield f"Is {name} on the left or on the right?", "left" if dx < 0 else "right"
        if abs(dy) > FROM_MIDDLE * scene.size:
            yield f"Is {name} at the top or at the bottom?", "top" if dy < 0 else "bottom"


def pairs(scene: Scene) -> Iterator[tuple[str, Thing, str, Thing]]:
    all_named = list(named(scene))
    for name, thing in all_named:
        for other_name, other in all_named:
            if thing is not other:
                yield name, thing, other_name, other


def _side(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    for name, thing, other_name, other in pairs(scene):
        dx, dy = thing.x - other.x, thing.y - other.y
        if abs(dx) > CLEAR * scene.size:
            yield f"Is {name} left or right of {other_name}?", "left" if dx < 0 else "right"
        if abs(dy) > CLEAR * scene.size:
            yield f"Is {name} above or below {other_name}?", "above" if dy < 0 else "below"


def _near(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    for which, name, shape in nearest_and_farthest(scene):
        yield f"What is the shape {which} {name}?", shape.name
        yield f"What color is the shape {which} {name}?", shape.color


def nearest_and_farthest(scene: Scene) -> Iterator[tuple[str, str, Thing]]:
    """("closest to", "the red star", the shape that is), where it is clearly so."""
    shapes = scene.of("shape")
    if len(shapes) < 3:
        return
    for name, thing in named(scene):
        if thing.family != "shape":
            continue
        others = sorted((math.hypot(t.x - thing.x, t.y - thing.y), i) for i, t in enumerate(shapes) if t is not thing)
        (nearest, a), (second, _) = others[:2]
        (last, _), (farthest, b) = others[-2:]
        if second > NEARER * nearest:
            yield "closest to", name, shapes[a]
        if farthest > NEARER * last:
            yield "farthest from", name, shapes[b]


def _neighbour(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    if scene.kind == "chart":
        before, after = ("above", "below") if scene.horizontal else ("left of", "right of")
        for a, b in zip(scene.things, scene.things[1:], strict=False):
            yield f"Which bar is directly {before} the {b.color} bar?", a.color
            yield f"Which bar is directly {after} the {a.color} bar?", b.color


def _digit(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    digits = scene.of("digit")
    if len(digits) == 1:
        yield "Which digit is shown?", digits[0].name
        return
    for thing in digits:
        yield f"Which digit is {thing.color}?", thing.name
    places = ("on the left", "in the middle", "on the right")
    for place, thing in zip(places if len(digits) == 3 else places[::2], digits, strict=False):
        yield f"Which digit is {place}?", thing.name


def _greatest(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    names = [t.name for t in scene.of("digit")]
    if len(names) > 1 and len(set(names)) == len(names):
        yield "Which digit is the greatest?", max(names)
        yield "Which digit is the least?", min(names)


def _word(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    words = scene.of("word")
    if len(words) == 1:
        yield "What word is printed?", words[0].name
    for thing, place in zip(words, ("top", "bottom"), strict=False):
        if len(words) == 2:
            yield f"What word is at the {place}?", thing.name
            yield f"What word is {thing.color}?", thing.name


def _bar(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    if scene.kind == "chart":
        ordered = sorted(scene.things, key=lambda t: t.source)
        yield "Which bar is the largest?", ordered[-1].color
        yield "Which bar is the smallest?", ordered[0].color


def _larger(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    for a in scene.of("bar"):
        for b in scene.of("bar"):
            if a is not b:
                yield f"Which bar is larger, {a.color} or {b.color}?", (a if a.source > b.source else b).color


def _small(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    for thing in scene.of("small"):
        yield "What word is in small print?", thing.name


def _is_there(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    shapes = scene.of("shape")
    if shapes:
        seen = {(t.color, t.name) for t in shapes}
        for color in COLORS:
            for shape in SHAPES:
                # A pair of which colour and shape both occur elsewhere must be looked at together to be denied.
                related = any(t.color == color for t in shapes) or any(t.name == shape for t in shapes)
                if related:
                    article = "an" if color == "orange" else "a"
                    yield f"Is there {article} {color} {shape}?", "yes" if (color, shape) in seen else "no"


def _shows(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    digits, words = {t.name for t in scene.of("digit")}, {t.name for t in scene.of("word")}
    for digit in map(str, range(10 if digits else 0)):
        yield f"Is there a {digit}?", "yes" if digit in digits else "no"
    for word in sorted(words):
        yield f'Does it say "{word}"?', "yes"
        other = draw_word(dice, split)
        if other not in words:
            yield f'Does it say "{other}"?', "no"


def _is_beside(scene: Scene, dice: Dice, split: str) -> Iterator[tuple[str, str]]:
    for name, thing, other_name, other in pairs(scene):
        dx, dy = thing.x - other.x, thing.y - other.y
        for relation, distance in (("left of", -dx), ("right of", dx), ("above", -dy), ("below", dy)):
            if abs(distance) > CLEAR * scene.size:
                yield f"Is {name} {relation} {other_name}?", "yes" if distance > 0 else "no"
    for a in scene.of("bar"):
        for b in scene.of("bar"):
            if a is not b:
                yield f"Is the {a.color} bar larger than the {b.color} bar?", "yes" if a.source > b.source else "no"


_FORMS: dict[str, tuple[str, Form]] = {
    "color": ("color", _color),
    "shape": ("shape", _shape),
    "count": ("count", _count),
    "half": ("position", _half),
    "side": ("relation", _side),
    "near": ("relation", _near),
    "neighbour": ("relation", _neighbour),
    "greatest": ("relation", _greatest),
    "digit": ("digit", _digit),
    "word": ("word", _word),
    "bar": ("bar", _bar),
    "larger": ("bar", _larger),
    "small-print": ("small-print", _small),
    "is-there": ("yesno", _is_there),
    "shows": ("yesno", _shows),
    "is-beside": ("yesno", _is_beside),
}
KINDS = tuple(dict.fromkeys(["describe", *(kind for kind, _ in _FORMS.values())]))
