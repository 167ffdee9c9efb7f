"""What is asked: questions with answers, and the pictures they are about."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flashsloth.data.broken import BrokenRecord, Skipped
from flashsloth.data.llava import read_turns
from flashsloth.data.records import RecordSource, image_name, open_records
from flashsloth.prompt import EOS_TOKEN, IMAGE_TOKEN, QUERY_TOKEN

SPLITS = ("train", "validation", "test")
SPECIAL = (IMAGE_TOKEN, QUERY_TOKEN, EOS_TOKEN)
NO_KIND = "question"  # of a record without ``kinds``


class Question(NamedTuple):
    """One question and its answer.

    ``record`` and ``turn`` say where it stands, ``name`` is what reports call its record; ``picture`` names its picture
    for :attr:`Task.picture`, None where there is none.
    """

    record: int
    turn: int
    name: str
    picture: str | None
    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Task:
    """Questions to score a model by.

    Attributes:
        name: for people. ``questions``: in their order; those of one picture need not stand together.
        picture: the encoded picture of a name. Raises BrokenRecord.
        groups: kinds that are reported together too, by the group's name.
        records: how many were read, ``skipped`` those of them that cannot be used.
    """

    name: str
    questions: tuple[Question, ...]
    picture: Callable[[str], bytes]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    records: int = 0
    skipped: tuple[Skipped, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all questions and answers, in hexadecimal digits: the same in memory and on disk."""
        asked = [question._replace(name="") for question in self.questions]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def generated_task(
    sort_of_clevr: bool = False, split: str = "test", *, seed: int = 0, limit: int | None = None
) -> Task:
    """A split of ``sight``, or of Sort-of-CLEVR, as ``flashsloth data make sight`` writes it, made in memory.

    Args:
        limit: so many questions from the beginning; by default those of 2,000 pictures, or of the 200 published.

    Raises:
        ValueError: a split or number that is none; ModuleNotFoundError: a package that pictures are made of is missing.
    """
    from flashsloth.data.sight import load_sources, make, make_sample
    from flashsloth.data.sight import sort_of_clevr as published
    from flashsloth.data.sight.sample import SIZE, Settings

    _check(split, limit)
    settings = Settings(seed, published.SIZE if sort_of_clevr else SIZE, sort_of_clevr)
    sources = None if sort_of_clevr else load_sources()
    questions: list[Question] = []
    pictures: dict[str, bytes] = {}
    records = 0
    for index in range((published.COUNTS if sort_of_clevr else make.COUNTS)[split]):
        if limit is not None and len(questions) >= limit:
            break
        sample = make_sample(settings, split, index, sources)
        pictures[sample.name] = sample.encoded  # as it is on disk: JPEG loses something
        for turn, (kind, _, text, answer) in enumerate(sample.questions):
            questions.append(Question(index, turn, sample.record["id"], sample.name, text, answer, kind))
        records += 1
    name = f"{_name(sort_of_clevr)} {split}, seed {seed}"
    return Task(name, tuple(questions[:limit]), pictures.__getitem__, _groups(sort_of_clevr), records)


def folder_task(
    folder: str | os.PathLike[str], sort_of_clevr: bool = False, split: str = "test", *, limit: int | None = None
) -> Task:
    """A split that ``flashsloth data make sight`` wrote.

    Raises:
        ValueError: a folder with something else in it; FileNotFoundError: no such split there.
    """
    _check(split, limit)
    base = Path(folder) / split
    about = base / "split.json"
    if not about.is_file():
        raise FileNotFoundError(f"--data: expected a folder made by `flashsloth data make sight`, found no {about}")
    try:
        made = json.loads(about.read_text())["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--data: expected {about} as `flashsloth data make sight` writes it: {error}") from error
    if made != _name(sort_of_clevr):
        raise ValueError(f"--data: expected {_name(sort_of_clevr)}, got {made} in {folder}")
    shards = sorted((base / "shards").glob("*.tar"))
    source = open_records(base / "questions.json", shards or None)
    return _task(f"{made} {split} in {folder}", source, False, limit, SPECIAL, _groups(sort_of_clevr))


def file_task(
    file: str | os.PathLike[str],
    images: Any = None,
    *,
    limit: int | None = None,
    special: Sequence[str] = SPECIAL,
) -> Task:
    """Records in LLaVA's format: a ``.json``, ``.jsonl`` or webdataset ``.tar`` file.

    Each question of a record is one of the task, with the answer that follows it. ``kinds`` of a record, if it is
    there, holds one string for each of its questions.

    Args:
        images: folder, or tar shards, in which images are looked up; by default the folder of the file.
        special: what no text may contain.

    Raises:
        ValueError, FileNotFoundError: a file or folder that cannot be read. A record that cannot be used is skipped.
    """
    _check("test", limit)
    path = Path(file)
    return _task(path.name, open_records(path, images), path.suffix == ".tar", limit, special, {})


def _task(
    name: str,
    source: RecordSource,
    own_pictures: bool,
    limit: int | None,
    special: Sequence[str],
    groups: Mapping[str, tuple[str, ...]],
) -> Task:
    """``own_pictures``: a record brings its picture, whatever its name; otherwise equal names are one picture."""
    questions: list[Question] = []
    skipped: list[Skipped] = []
    owner: dict[str, int] = {}
    records = 0
    for index in range(len(source)):
        if limit is not None and len(questions) >= limit:
            break
        records += 1
        try:
            record = source.record(index)
            asked = _questions(record, special)
            picture = str(index) if own_pictures and source.picture(index, record) is not None else image_name(record)
            _check_marks(record, picture)
        except BrokenRecord as error:
            skipped.append(Skipped.of(index, source.name(index), error))
            continue
        if picture is not None:
            owner.setdefault(picture, index)
        for turn, (text, answer, kind) in enumerate(asked):
            questions.append(Question(index, turn, source.name(index), picture, text, answer, kind))

    def encoded(name: str) -> bytes:
        found = source.picture(owner[name], source.record(owner[name]))
        assert found is not None  # only records with a picture have a name
        return found

    return Task(name, tuple(questions[:limit]), encoded, groups, records, tuple(skipped))


def _questions(record: Any, special: Sequence[str]) -> list[tuple[str, str, str]]:
    """(question, answer, kind) of each question of a record that is answered."""
    turns = read_turns(record, list(special))
    kinds = record.get("kinds")
    if kinds is None:
        kinds = [NO_KIND] * len(turns)
    else:
        humans = sum(turn["from"] in ("human", "user") for turn in record["conversations"])
        if not isinstance(kinds, list) or len(kinds) != humans or not all(isinstance(kind, str) for kind in kinds):
            raise BrokenRecord(
                "malformed_record", f"kinds: expected {humans} strings, one a question, got {kinds!r:.80}"
            )
    texts = [value.replace(IMAGE_TOKEN, "").strip() for _, value in turns]
    return list(zip(texts[::2], texts[1::2], kinds, strict=False))


def _check_marks(record: dict[str, Any], picture: str | None) -> None:
    marks = sum(
        str(turn["value"]).count(IMAGE_TOKEN) for turn in record["conversations"] if turn["from"] in ("human", "user")
    )
    if marks > (picture is not None):
        raise BrokenRecord("too_many_marks", f"expected {int(picture is not None)} {IMAGE_TOKEN}, got {marks}")
    if picture is not None and not marks:
        raise BrokenRecord("unmarked_image", f"expected {IMAGE_TOKEN} in a question, got none")


def _check(split: str, limit: int | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"--split: expected {', '.join(SPLITS)}, got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit: expected at least 1 question, got {limit}")


def _name(sort_of_clevr: bool) -> str:
    return "sort-of-clevr" if sort_of_clevr else "sight"


def _groups(sort_of_clevr: bool) -> dict[str, tuple[str, ...]]:
    """The published figures of Sort-of-CLEVR are those of its two groups."""
    from flashsloth.data.sight import sort_of_clevr as published

    if not sort_of_clevr:
        return {}
    return {"non-relational": published.NON_RELATIONAL, "relational": published.RELATIONAL}
