"""Answers of a batch are those of each question asked alone, each picture is encoded once, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.evaluation import Task, evaluate, file_task, generated_task
from tests.evaluation.test_tasks import record
from tests.model.talking import picture, talking_model

Parts = tuple[FlashSlothForConditionalGeneration, Any]
COUNT = 10  # tokens of an answer


@pytest.fixture(scope="module")
def parts() -> Parts:
    return talking_model()


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Four pictures, one of them in two records, and questions without a picture; answers of several lengths."""
    for name in range(4):
        picture(name).save(tmp_path / f"{name}.png")
    records = [
        record(("What is it?", "a"), ("And what is that over there?", "bbb"), ("Why?", "c" * 30), image="0.png"),
        record(("Where?", "left"), image="1.png"),
        record(("2 + 2?", "4"), ("And 3 + 3, which is a longer question?", "6")),
        record(("How many?", "two"), ("Which colour?", "red"), image="2.png"),
        record(("What else?", "nothing"), image="0.png"),
        record(("", "a picture"), image="3.png"),
    ]
    (tmp_path / "test.json").write_text(json.dumps(records))
    return file_task(tmp_path / "test.json")


def alone(parts: Parts, task: Task, index: int, folder: Path, hd: bool) -> str:
    """The answer to one question, by nothing of this package but model and processor."""
    model, processor = parts
    question = task.questions[index]
    content: list[dict[str, str]] = [{"type": "image"}] if question.picture else []
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}]
    )
    image = folder / question.picture if question.picture else None
    batch = processor(images=image, text=prompt, image_hd=hd)
    generate: Any = model.generate
    ids = generate(**batch, max_new_tokens=COUNT, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


@pytest.mark.parametrize(("batch_size", "hd"), [(1, False), (2, True), (5, False), (64, True)])
def test_each_question_is_asked_alone(
    parts: Parts, task: Task, tmp_path: Path, hd: bool, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles: list[torch.Size] = []
    encode = FlashSlothForConditionalGeneration.get_image_features

    def counted(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        tiles.append(pixel_values.shape[:2])
        return encode(model, pixel_values)

    monkeypatch.setattr(FlashSlothForConditionalGeneration, "get_image_features", counted)
    reports: list[dict[int, str]] = []
    result = evaluate(
        *parts,
        task,
        batch_size=batch_size,
        max_new_tokens=COUNT,
        image_hd=hd,
        report=lambda answers, skipped: reports.append(answers),
    )
    assert sum(images for images, _ in tiles) == 4  # each once, in the larger and the smaller batches
    assert {per_image for _, per_image in tiles} == {5 if hd else 1}
    assert max(map(len, reports)) <= batch_size
    assert {i: text for answers in reports for i, text in answers.items()} == result.answers
    want = {i: alone(parts, task, i, tmp_path, hd) for i in range(len(task.questions))}
    assert result.answers == want
    assert len(set(want.values())) > 2
    assert result.skipped == []


def test_scores_and_misses(parts: Parts, task: Task) -> None:
    result = evaluate(*parts, task, max_new_tokens=COUNT)
    assert (result.total.correct, result.total.count) == (0, 10)
    assert len(result.misses) == 10
    right = {0: "A.", 3: " left ", 4: "four"}
    result.answers.update(right)
    assert [result.right(i) for i in right] == [True, True, False]
    assert (result.total.correct, result.total.count) == (2, 10)
    first = result.misses[0]
    assert first == {
        "record": "test.json[0]",
        "image": "0.png",
        "kind": "question",
        "question": "And what is that over there?",
        "expected": "bbb",
        "got": result.answers[1],
    }


def test_groups_of_kinds(parts: Parts) -> None:
    result = evaluate(*parts, generated_task(True, limit=20), max_new_tokens=2)
    assert list(result.groups) == ["non-relational", "relational"]
    assert [score.count for score in result.groups.values()] == [10, 10]
    result.answers = {i: q.answer for i, q in enumerate(result.task.questions)}
    assert [score.correct for score in result.groups.values()] == [10, 10]


def test_what_is_known_is_not_asked_again(parts: Parts, task: Task) -> None:
    whole = evaluate(*parts, task, max_new_tokens=COUNT)
    known = evaluate(*parts, task, max_new_tokens=COUNT)
    known.answers = {i: f"known {i}" for i in (1, 2, 5)}
    asked: list[int] = []
    result = evaluate(
        *parts, task, max_new_tokens=COUNT, known=known, report=lambda answers, skipped: asked.extend(answers)
    )
    assert sorted(asked) == [0, 3, 4, 6, 7, 8, 9]
    assert result.answers == {**whole.answers, **known.answers}


def test_pictures_that_cannot_be_read_are_skipped_with_their_records(parts: Parts, task: Task, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    (tmp_path / "2.png").unlink()
    seen: list[Any] = []
    result = evaluate(*parts, task, max_new_tokens=COUNT, report=lambda answers, skipped: seen.extend(skipped))
    assert {(one.index, one.reason) for one in result.skipped} == {
        (0, "damaged_image"),
        (4, "damaged_image"),
        (3, "missing_image"),
    }
    assert sorted(seen, key=lambda one: one.index) == sorted(result.skipped, key=lambda one: one.index)
    assert {task.questions[i].record for i in result.answers} == {1, 2, 5}
    again = evaluate(*parts, task, max_new_tokens=COUNT, known=result)
    assert again.answers == result.answers
    assert len(again.skipped) == 3


def test_a_question_that_leaves_no_room_is_skipped_with_its_record(tmp_path: Path) -> None:
    model, processor = talking_model(text={"max_position_embeddings": 256})
    (tmp_path / "test.json").write_text(json.dumps([record(("x" * 100, "y")), record(("x" * 20, "y"))]))
    result = evaluate(model, processor, file_task(tmp_path / "test.json"), max_new_tokens=COUNT)
    assert [(one.index, one.reason) for one in result.skipped] == [(0, "too_long")]
    assert "expected 246 tokens before the answer, got" in result.skipped[0].detail
    assert list(result.answers) == [1]


def test_wrong_numbers_are_named(parts: Parts, task: Task) -> None:
    for name in ("batch_size", "max_new_tokens"):
        given: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"{name}: expected a whole number of at least 1, got 0"):
            evaluate(*parts, task, **given)
