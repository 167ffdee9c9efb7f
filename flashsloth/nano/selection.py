"""Which questions of a record training asks: what is learned early is asked less often."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from flashsloth.data.sight.dice import Dice
from flashsloth.prompt import IMAGE_TOKEN

# Answered right to 96 % and more after 1,350 steps in which all kinds were asked as often.
EASY = ("color", "shape", "position", "query-shape", "query-horizontal", "query-vertical")
SHARE = 0.25


def only(records: Sequence[Mapping[str, Any]], kinds: Collection[str]) -> Iterator[dict[str, Any]]:
    """Questions of these kinds alone; records without any are left out."""
    return _select(records, lambda index, kind: kind in kinds)


def fewer_easy(records: Sequence[Mapping[str, Any]], without: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """A part of the easy questions, drawn by the place of the record, and all others but those of kinds ``without``."""
    dice = [Dice("fewer easy", index) for index in range(len(records))]
    return _select(records, lambda index, kind: kind not in without and (kind not in EASY or dice[index].coin(SHARE)))


def _select(records: Sequence[Mapping[str, Any]], wanted: Callable[[int, str], bool]) -> Iterator[dict[str, Any]]:
    """The picture stays with the first question that is left."""
    for index, record in enumerate(records):
        said, asked = record["conversations"], record["kinds"]
        chosen = [i for i, kind in enumerate(asked) if wanted(index, kind)]
        if not chosen:
            continue
        turns = [turn for i in chosen for turn in said[2 * i : 2 * i + 2]]
        question = turns[0]["value"].removeprefix(f"{IMAGE_TOKEN}\n")
        turns[0] = {**turns[0], "value": f"{IMAGE_TOKEN}\n{question}"}
        yield {**record, "conversations": turns, "kinds": [asked[i] for i in chosen]}
