"""``flashsloth eval``: the table, the file, a killed run that goes on, and every kind of wrong input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flashsloth.cli import main
from flashsloth.evaluation import command, running
from tests.evaluation.test_tasks import record
from tests.model.talking import picture, talking_model
from tests.support import ROOT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = talking_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    for name in range(3):
        picture(name).save(folder / f"{name}.png")
    turns = [(f"Question {i}?", "a" * (1 + i)) for i in range(4)]
    made = [record(*turns, image=f"{name}.png", kinds=["one", "two", "two", "two"]) for name in range(3)]
    (folder / "test.json").write_text(json.dumps(made))
    return folder / "test.json"


def arguments(checkpoint: Path, records: Path, *more: str) -> list[str]:
    given = ["eval", "--task", str(records), "--model", str(checkpoint), "--max-new-tokens", "4", "--device", "cpu"]
    return [*given, "--batch-size", "4", *more]


def test_the_table_and_the_file_say_the_same(
    checkpoint: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    assert main(arguments(checkpoint, records, "--out", str(out))) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["all"]["of"] == 12
    assert {kind: score["of"] for kind, score in found["kinds"].items()} == {"one": 3, "two": 9}
    assert len(found["misses"]) + found["all"]["right"] == 12
    assert found["pictures"] == 3
    assert found["records"] == {"read": 3, "skipped": []}
    assert "the first 10 of 12 misses" in shown
    assert "0.png: Question 0? expected 'a', got '" in shown
    table = re.findall(r"^(one|two|all) +(\d+) +(\d+) ", shown, re.MULTILINE)
    assert table == [("one", "0", "3"), ("two", "0", "9"), ("all", "0", "12")]
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert sorted(line["question"] for line in lines[1:]) == list(range(12))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.json", "scores.jsonl"]


def test_made_pictures_need_no_file(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task, kinds in (("sight", "color"), ("sort-of-clevr", "non-relational")):
        given = ["eval", "--task", task, "--limit", "20", "--model", str(checkpoint), "--max-new-tokens", "2"]
        assert main(given) == 0
        shown = capsys.readouterr().out
        assert f"{task} test, seed 0: 20 questions" in shown
        assert kinds in shown


# ---- going on ----


def test_a_killed_run_goes_on(checkpoint: Path, records: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.json", tmp_path / "killed.json"
    assert main(arguments(checkpoint, records, "--out", str(whole))) == 0
    program = (
        "import sys, time\n"
        "from flashsloth.evaluation.store import Store\n"
        "add = Store.add\n"
        "def slow(self, *batch):\n"
        "    add(self, *batch)\n"
        "    time.sleep(600)\n"  # killed here, behind the first batch
        "Store.add = slow\n"
        "from flashsloth.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = [sys.executable, "-c", program, *arguments(checkpoint, records, "--out", str(out))]
    process = subprocess.Popen(given, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = out.with_suffix(".jsonl")
    try:
        deadline = time.monotonic() + 200
        while not lines.exists() or len(lines.read_bytes().splitlines()) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    with lines.open("ab") as file:
        file.write(b'{"question": 7, "go')  # a line the kill cut short
    assert main(arguments(checkpoint, records, "--out", str(out))) == 2  # not without being asked to
    assert main(arguments(checkpoint, records, "--out", str(out), "--resume")) == 0
    one, other = (json.loads(path.read_text()) for path in (whole, out))
    for found in (one, other):
        del found["seconds"]
    assert one == other
    assert len(lines.read_text().splitlines()) == 13


def test_what_is_done_is_not_asked_again(
    checkpoint: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores.json"
    assert main(arguments(checkpoint, records, "--out", str(out))) == 0
    first = out.read_text()

    def asked(*_: Any) -> None:
        raise AssertionError("a question was asked")

    monkeypatch.setattr(running._Run, "ask", asked)
    assert main(arguments(checkpoint, records, "--out", str(out), "--resume")) == 0
    assert json.loads(out.read_text())["misses"] == json.loads(first)["misses"]


@pytest.mark.parametrize("change", ["model", "task", "setting", "view"])
def test_a_run_of_something_else_is_refused(
    checkpoint: Path, records: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    assert main(arguments(checkpoint, records, "--out", str(out))) == 0
    before = out.with_suffix(".jsonl").read_bytes()
    given = arguments(checkpoint, records, "--out", str(out), "--resume")
    if change == "model":
        model, processor = talking_model()
        model.learnable_tokens.token.data += 1
        model.save_pretrained(tmp_path / "other")
        processor.save_pretrained(tmp_path / "other")
        given[given.index("--model") + 1] = str(tmp_path / "other")
    elif change == "task":
        made = json.loads(records.read_text())
        made[0]["conversations"][1]["value"] = "another answer"
        other = records.with_name(f"{change}.json")
        other.write_text(json.dumps(made))
        given[2] = str(other)
    elif change == "setting":
        given += ["--max-new-tokens", "5"]
    else:
        given.append("--hd")
    capsys.readouterr()
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "is of another run (" in said
    differing = {"model": "model", "task": "questions", "setting": "max_new_tokens", "view": "image_hd"}[change]
    assert f"{differing} " in said.split("another run")[1]
    assert out.with_suffix(".jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"question": 1}\n{"question": 2}\n', "expected answers that `flashsloth eval` wrote"),
        ("no JSON\n", "is damaged in line 1"),
        ("[1]\n", "is damaged in line 1: expected an object"),
        ('HEAD{"question": 99, "got": "x"}\n', "is damaged in line 2"),
        ('HEAD{"question": 1, "got": 3}\n', "is damaged in line 2"),
        ('HEAD{"skipped": {"index": 1}}\n', "is damaged in line 2"),
    ],
)
def test_damaged_files_are_refused(
    checkpoint: Path, records: Path, tmp_path: Path, lines: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    if lines.startswith("HEAD"):
        assert main(arguments(checkpoint, records, "--out", str(out), "--limit", "2")) == 0
        head = out.with_suffix(".jsonl").read_text().splitlines(keepends=True)[0]
        lines = lines.replace("HEAD", head)
    out.with_suffix(".jsonl").write_text(lines)
    assert main(arguments(checkpoint, records, "--out", str(out), "--resume", "--limit", "2")) == 2
    assert said in capsys.readouterr().err
    assert out.with_suffix(".jsonl").read_text() == lines


def test_an_empty_file_is_a_beginning(checkpoint: Path, records: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    out.with_suffix(".jsonl").write_text('{"version": 1, "ta')
    assert main(arguments(checkpoint, records, "--out", str(out), "--resume", "--limit", "2")) == 0
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 3


# ---- records that cannot be used ----


def test_broken_records_are_listed_and_too_many_fail(
    checkpoint: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = json.loads(records.read_text())
    path = records.with_name("broken.json")
    path.write_text(json.dumps([*made, record(("What?", "x"), image="gone.png"), 3]))
    out = tmp_path / "scores.json"
    assert main(arguments(checkpoint, path, "--out", str(out))) == 2
    shown = capsys.readouterr()
    assert "2 of 5 records cannot be used (1 malformed_record, 1 missing_image)" in shown.out
    assert "broken.json[3]: missing_image: gone.png is not in" in shown.out
    assert "data: 2 of 5 records cannot be used, expected at most 0.01" in shown.err
    found = json.loads(out.read_text())  # all that could be found out is there
    assert found["all"]["of"] == 12
    assert [one["reason"] for one in found["records"]["skipped"]] == ["malformed_record", "missing_image"]


def test_one_in_a_hundred_may_be_broken(
    checkpoint: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = records.with_name("hundred.json")
    path.write_text(json.dumps([record(("What?", "x"))] * 99 + [3]))
    assert main(arguments(checkpoint, path, "--max-new-tokens", "1", "--batch-size", "99")) == 0
    assert "1 of 100 records cannot be used" in capsys.readouterr().out


# ---- wrong input ----


def test_wrong_input_gives_one_line_and_writes_nothing(
    checkpoint: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashsloth.shipped.WEIGHTS", tmp_path / "none")
    (tmp_path / "there.json").write_text("{}")
    nothing = records.with_name("nothing.json")
    nothing.write_text("[3]")
    model, file = ["--model", str(checkpoint)], str(records)
    cases: list[tuple[list[str], str]] = [
        (["--task", "sigth", *model], "--task: expected sight, sort-of-clevr or a file of records, got sigth"),
        (["--task", "sight"], "no trained weights ship with this copy"),
        (["--task", "sight", "--model", str(tmp_path)], "--model: expected a directory with a checkpoint"),
        (["--task", file, "--data", "x", *model], "--data: expected only with --task sight or sort-of-clevr, got x"),
        (["--task", file, "--split", "test", *model], "--split: expected only with"),
        (["--task", file, "--seed", "1", *model], "--seed: expected only where pictures are made"),
        (["--task", "sight", "--data", "x", "--seed", "1", *model], "--seed: expected only where pictures are made"),
        (["--task", "sight", "--images", "x", *model], "--images: expected only with a file for --task, got x"),
        (["--task", "sight", "--data", str(tmp_path / "x"), *model], "--data: expected a folder made by"),
        (["--task", file, "--images", str(tmp_path / "x"), *model], "images: expected a path that exists"),
        (["--task", file, "--resume", *model], "--resume: expected only with --out"),
        (["--task", file, "--out", str(tmp_path / "x.txt"), *model], "--out: expected a file ending in .json"),
        (["--task", file, "--out", str(tmp_path / "x" / "y.json"), *model], "in an existing directory"),
        (["--task", file, "--out", str(tmp_path / "there.json"), *model], "is there already; --resume"),
        (
            ["--task", str(nothing), *model],
            "expected questions, got none that can be used (1 malformed_record)",
        ),
    ]
    before = sorted(tmp_path.rglob("*"))
    for given, said in cases:
        assert main(["eval", *given]) == 2, given
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("flashsloth: ")]
        assert len(lines) == 1, (given, captured.err)
        assert said in lines[0], (given, lines[0])
    assert sorted(tmp_path.rglob("*")) == before


def test_records_are_not_written_over(checkpoint: Path, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = records.with_name("lines.jsonl")
    path.write_text(json.dumps(record(("What?", "x"))) + "\n")
    out = path.with_suffix(".json")
    assert main(arguments(checkpoint, path, "--out", str(out), "--resume")) == 2
    assert "--out: expected another name than that of --task" in capsys.readouterr().err
    assert path.read_text().count("\n") == 1


def test_a_full_disk_stops_with_what_was_done(
    checkpoint: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = command.store.Store.add
    batches: list[int] = []

    def full(self: Any, *batch: Any) -> None:
        batches.append(1)
        if len(batches) > 1:
            raise OSError(28, "No space left on device")
        add(self, *batch)

    monkeypatch.setattr(command.store.Store, "add", full)
    out = tmp_path / "scores.json"
    assert main(arguments(checkpoint, records, "--out", str(out))) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.undo()
    assert main(arguments(checkpoint, records, "--out", str(out), "--resume")) == 0
    assert json.loads(out.read_text())["all"]["of"] == 12
