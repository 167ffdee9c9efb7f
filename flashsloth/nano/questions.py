"""More questions on the pictures of ``sight`` than the data set has: to see one costs as much as ten questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import Any

from flashsloth.data.sight.dice import Dice
from flashsloth.data.sight.questions import Question, ask
from flashsloth.data.sight.sample import Settings, sample_key
from flashsloth.data.sight.scene import compose
from flashsloth.data.sight.sources import Sources, load_sources
from flashsloth.prompt import IMAGE_TOKEN

ROUNDS = 3  # of as many questions as a picture of the data set has
# A conversation must not answer itself, as in :func:`~flashsloth.data.sight.questions.ask`.
_GIVEN_AWAY = ("word", "digit", "greatest")


def more_questions(settings: Settings, index: int, sources: Sources) -> list[Question]:
    """Questions on a training picture, no two alike."""
    key = sample_key(settings, "train", index)
    scene = compose(Dice(*key, "scene"), "train", settings.size, sources)
    asked: dict[str, Question] = {}
    for round_ in range(ROUNDS):
        for one in ask(scene, Dice(*key, "more", round_), "train"):
            forms = {other.form for other in asked.values()}
            told = _GIVEN_AWAY if one.form == "shows" else ("shows",) if one.form in _GIVEN_AWAY else ()
            if not forms & {*told}:
                asked.setdefault(one.text, one)
    return list(asked.values())


def more_records(records: Sequence[Mapping[str, Any]], settings: Settings, jobs: int) -> Iterator[dict[str, Any]]:
    """``records`` of the training split, in order and from the first, with more questions instead of theirs.

    Where a picture is to be described, it stays at that: other questions would be answered by it.
    """
    with ProcessPoolExecutor(jobs) as pool:
        found = pool.map(partial(_asked, settings), range(len(records)), chunksize=500)
        for record, turns in zip(records, found, strict=True):
            if record["kinds"] == ["describe"]:
                yield {**record}
                continue
            said = []
            for question, answer, _ in turns:
                said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            said[0]["value"] = f"{IMAGE_TOKEN}\n{said[0]['value']}"
            yield {**record, "conversations": said, "kinds": [kind for *_, kind in turns]}


def _asked(settings: Settings, index: int) -> list[tuple[str, str, str]]:
    return [(one.text, one.answer, one.kind) for one in more_questions(settings, index, _sources())]


_sources = cache(load_sources)
