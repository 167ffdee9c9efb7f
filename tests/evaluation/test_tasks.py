"""What is asked: made in memory as on disk, read from files, and records that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashsloth.data.sight import Settings, make_sight, sort_of_clevr
from flashsloth.evaluation import Task, file_task, folder_task, generated_task
from tests.model.talking import picture

COUNTS = {"train": 1, "validation": 1, "test": 6}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("published", [False, True], ids=["sight", "sort-of-clevr"])
def test_made_in_memory_and_on_disk_it_is_the_same(tmp_path: Path, published: bool, shards: bool) -> None:
    size = {"size": sort_of_clevr.SIZE} if published else {}
    make_sight(tmp_path, Settings(seed=3, sort_of_clevr=published, **size), COUNTS, shards=shards)
    read = folder_task(tmp_path, published)
    made = generated_task(published, seed=3, limit=len(read.questions))
    assert [q._replace(name="") for q in made.questions] == [q._replace(name="") for q in read.questions]
    assert made.fingerprint == read.fingerprint
    names = {question.picture for question in read.questions}
    assert len(names) == 6
    for name in names:
        assert made.picture(str(name)) == read.picture(str(name))
    assert made.groups == read.groups
    assert (made.records, read.records) == (6, 6)
    if published:
        assert len(read.questions) == 120
        assert {kind for kinds in read.groups.values() for kind in kinds} == {q.kind for q in read.questions}


def test_a_limit_takes_the_first_questions_and_a_seed_others() -> None:
    ten = generated_task(limit=10)
    assert len(ten.questions) == 10
    assert generated_task(limit=13).questions[:10] == ten.questions
    other = generated_task(limit=10, seed=1)
    assert other.questions != ten.questions
    assert other.fingerprint != ten.fingerprint
    assert generated_task(limit=10, split="validation").questions != ten.questions


# ---- files ----


def record(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    said = []
    for number, (question, answer) in enumerate(turns):
        mark = "<image>\n" if "image" in more and number == 0 else ""
        said += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"conversations": said, **more}


def write(folder: Path, records: list[Any], name: str = "test.json") -> Path:
    picture().save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def test_questions_of_a_file(tmp_path: Path) -> None:
    records = [
        record(("What?", "a cat"), ("Sure?", "yes"), image="a.png", kinds=["what", "yesno"]),
        record(("And this?", "a dog"), image="a.png"),
        record(("2 + 2?", "4")),
    ]
    records[2]["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    records[2]["conversations"].append({"from": "human", "value": "Nobody answers this."})
    task = file_task(write(tmp_path, records))
    assert [(q.record, q.turn, q.picture, q.text, q.answer, q.kind) for q in task.questions] == [
        (0, 0, "a.png", "What?", "a cat", "what"),
        (0, 1, "a.png", "Sure?", "yes", "yesno"),
        (1, 0, "a.png", "And this?", "a dog", "question"),
        (2, 0, None, "2 + 2?", "4", "question"),
    ]
    assert [q.name for q in task.questions] == ["test.json[0]", "test.json[0]", "test.json[1]", "test.json[2]"]
    assert task.picture("a.png") == (tmp_path / "a.png").read_bytes()
    assert (task.records, task.skipped) == (3, ())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = elsewhere / "test.json"
    (tmp_path / "test.json").rename(moved)
    assert file_task(moved, tmp_path).picture("a.png") == task.picture("a.png")


def test_records_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    good = record(("What?", "a cat"), image="a.png")
    unmarked = record(("What?", "a cat"))
    unmarked["image"] = "a.png"
    cases: list[tuple[Any, str]] = [
        (3, "malformed_record"),
        ({"conversations": []}, "empty_conversation"),
        (record(("What?", "a </s> cat"), image="a.png"), "special_token"),
        (unmarked, "unmarked_image"),
        (record(("<image> what?", "a cat")), "too_many_marks"),
        (record(("What?", "a cat"), image=["a.png", "b.png"]), "several_images"),
        (record(("What?", "a cat"), image="a.png", kinds=["one", "two"]), "malformed_record"),
        (record(("What?", "a cat"), image="a.png", kinds="one"), "malformed_record"),
        (record(("What?", "a cat"), image="a.png", kinds=[1]), "malformed_record"),
        (record(("What?", "\ud800"), image="a.png"), "bad_text"),
    ]
    task = file_task(write(tmp_path, [good, *(case for case, _ in cases), good]))
    assert [(one.index, one.reason) for one in task.skipped] == [(i, why) for i, (_, why) in enumerate(cases, 1)]
    assert [q.record for q in task.questions] == [0, len(cases) + 1]
    assert task.records == len(cases) + 2


def check(task: Task) -> None:
    raise AssertionError(task)


def test_wrong_input_is_named(tmp_path: Path) -> None:
    make_sight(tmp_path / "made", Settings(size=sort_of_clevr.SIZE, sort_of_clevr=True), COUNTS)
    with pytest.raises(ValueError, match="--data: expected sight, got sort-of-clevr"):
        check(folder_task(tmp_path / "made"))
    with pytest.raises(FileNotFoundError, match="--data: expected a folder made by"):
        check(folder_task(tmp_path / "nothing"))
    (tmp_path / "made" / "test" / "split.json").write_text("[]")
    with pytest.raises(ValueError, match=r"--data: expected .*split\.json as"):
        check(folder_task(tmp_path / "made", True))
    with pytest.raises(ValueError, match=r"--split: expected train, validation, test, got 'tset'"):
        check(generated_task(split="tset"))
    with pytest.raises(ValueError, match="--limit: expected at least 1 question, got 0"):
        check(generated_task(limit=0))
    with pytest.raises(ValueError, match="--seed: expected a whole number"):
        check(generated_task(seed=-1))
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        check(file_task(tmp_path / "nothing.json"))
    (tmp_path / "torn.json").write_text("[{")
    with pytest.raises(ValueError, match="expected a JSON list of records"):
        check(file_task(tmp_path / "torn.json"))
