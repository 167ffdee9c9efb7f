"""Sort-of-CLEVR by its published rules: Santoro et al., "A simple neural network module for relational reasoning"
(arXiv 1706.01427), section 3.2 and supplementary section D.

Published: 10,000 pictures of 75 x 75 pixels, 200 of them withheld; six objects each, a square or a circle by chance,
one of each colour (red, blue, green, orange, yellow, gray); 10 non-relational and 10 relational questions a picture.
The former are on the shape, the horizontal and the vertical position of an object named by its colour; the latter on
the shape of the closest object, the shape of the farthest and the number of objects of the same shape, itself included.
The wording of questions is the paper's own.

Not published, and chosen here: objects are 11 pixels wide and high on white and never overlap; the ten questions of a
group are ten different ones of its eighteen; one with two right answers (two objects equally near and of different
shape, an object exactly in the middle) is not asked. The paper withholds one set of 200; validation, for choosing among
models without looking at the test, is another 200 on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from PIL import Image, ImageDraw

from flashsloth.data.sight.dice import Dice, split_of
from flashsloth.data.sight.questions import Question
from flashsloth.data.sight.scene import COLORS, Scene, Thing

SIZE, RADIUS, QUESTIONS = 75, 5, 10
COUNTS = {"train": 9800, "validation": 200, "test": 200}
NON_RELATIONAL = ("query-shape", "query-horizontal", "query-vertical")
RELATIONAL = ("closest-to", "furthest-from", "count")
KINDS = (*NON_RELATIONAL, *RELATIONAL)
# The usual values of public implementations.
_RGB = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "orange": (255, 156, 0), "yellow": (255, 255, 0),
        "gray": (128, 128, 128)}  # fmt: skip


def compose_sort_of_clevr(dice: Dice, split: str) -> Scene:
    """Six objects that do not overlap, in a layout that ``split`` owns."""
    while True:
        things: list[Thing] = []
        for color in COLORS:
            shape = "square" if dice.coin() else "circle"
            while True:
                x, y = dice.integer(RADIUS, SIZE - 1 - RADIUS), dice.integer(RADIUS, SIZE - 1 - RADIUS)
                if all(max(abs(x - other.x), abs(y - other.y)) > 2 * RADIUS for other in things):
                    break
            things.append(Thing("shape", shape, color, x, y, (RADIUS, RADIUS)))
        scene = Scene("sort-of-clevr", SIZE, tuple(things))
        if split_of(scene.key()) == split:
            return scene


def ask_sort_of_clevr(scene: Scene, dice: Dice) -> list[Question]:
    """Ten non-relational questions, then ten relational ones."""
    candidates = {kind: [_question(kind, thing, scene) for thing in scene.things] for kind in KINDS}
    asked = []
    for group in (NON_RELATIONAL, RELATIONAL):
        possible = [question for kind in group for question in candidates[kind] if question is not None]
        asked += dice.sample(possible, QUESTIONS)
    return asked


def paint_sort_of_clevr(scene: Scene) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        box = thing.x - RADIUS, thing.y - RADIUS, thing.x + RADIUS, thing.y + RADIUS
        (draw.rectangle if thing.name == "square" else draw.ellipse)(box, fill=_RGB[thing.color])
    return image


def _question(kind: str, thing: Thing, scene: Scene) -> Question | None:
    """None where it has no single answer."""
    text, answer = {
        "query-shape": _query_shape,
        "query-horizontal": _query_horizontal,
        "query-vertical": _query_vertical,
        "closest-to": _closest,
        "furthest-from": _furthest,
        "count": _count,
    }[kind](thing, scene)
    return Question(kind, kind, text, answer) if answer else None


def _query_shape(thing: Thing, scene: Scene) -> tuple[str, str]:
    return f"What is the shape of the {thing.color} object?", thing.name


def _query_horizontal(thing: Thing, scene: Scene) -> tuple[str, str]:
    middle = (SIZE - 1) / 2
    answer = "" if thing.x == middle else "left" if thing.x < middle else "right"
    return f"Is the {thing.color} object on the left or right of the image?", answer


def _query_vertical(thing: Thing, scene: Scene) -> tuple[str, str]:
    middle = (SIZE - 1) / 2
    answer = "" if thing.y == middle else "top" if thing.y < middle else "bottom"
    return f"Is the {thing.color} object on the top or bottom of the image?", answer


def _closest(thing: Thing, scene: Scene) -> tuple[str, str]:
    return f"What is the shape of the object that is closest to the {thing.color} object?", _extreme(thing, scene, min)


def _furthest(thing: Thing, scene: Scene) -> tuple[str, str]:
    return (
        f"What is the shape of the object that is furthest from the {thing.color} object?",
        _extreme(thing, scene, max),
    )


def _extreme(thing: Thing, scene: Scene, pick: Callable[[Iterable[float]], float]) -> str:
    others = [other for other in scene.things if other is not thing]
    squared = [(other.x - thing.x) ** 2 + (other.y - thing.y) ** 2 for other in others]
    distance = pick(squared)
    shapes = {other.name for other, d in zip(others, squared, strict=True) if d == distance}
    return shapes.pop() if len(shapes) == 1 else ""


def _count(thing: Thing, scene: Scene) -> tuple[str, str]:
    same = sum(other.name == thing.name for other in scene.things)
    return f"How many objects have the shape of the {thing.color} object?", str(same)
