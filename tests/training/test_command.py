"""``flashsloth train`` as it is called: what is printed, what is left, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("accelerate")

from flashsloth.cli import main
from flashsloth.training.trainer import _joined
from tests.training.cases import prepare, settings, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("run"), 24)


def call(folder: Path, *arguments: str, **changes: Any) -> int:
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(folder, **changes)))
    return main(["train", "--config", str(folder / "run.yaml"), *arguments])


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def test_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, "--set", "arguments.max_steps=4") == 0
    printed = lines(capsys.readouterr().out)
    assert [line.split("  ")[0] for line in printed] == [f"step {i}/4" for i in (1, 2, 3, 4)]
    shape = r"step \d/4  loss \d+\.\d{4}  lr [\d.e-]+  grad [\d.]+  [\d,]+ tokens/s  \d+\.\d\d GiB"
    assert all(re.fullmatch(shape, line) for line in printed)
    assert json.loads((folder / "out" / "training.json").read_text())["batch"] == 4
    assert call(folder) == 2
    assert "out: expected a directory without a run" in capsys.readouterr().err
    # The run is whole, and it stays what it is: not one step more.
    before = (folder / "out" / "model.safetensors").read_bytes()
    assert call(folder, "--resume", "--set", "arguments.max_steps=4") == 0
    assert (folder / "out" / "model.safetensors").read_bytes() == before
    assert lines(capsys.readouterr().out) == [f"goes on from {folder / 'out' / 'checkpoint-4'}"]


def test_a_dry_run_says_what_would_be_and_leaves_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [{"records": "data/train.json", "repeat": 2}, {"records": "data/train.json", "image_hd": True}]
    assert call(folder, "--dry-run", out="dry", data=sources, arguments={"max_steps": -1}) == 0
    text = capsys.readouterr().out
    assert not (folder / "dry").exists()
    assert re.search(r"^tower +20,896 +0$", text, re.MULTILINE)
    assert re.search(r"^projector +3,936 +3,936$", text, re.MULTILINE)
    assert "data.0: 48 records (2 x 24), dialogues, an image is 4 visual tokens, a question has 9 queries" in text
    assert "data.1: 24 records, dialogues, an image is 20 visual tokens" in text
    assert "4 rows = 1 processes x 2 batches x 2 rows; 18 steps an epoch, 18 steps in all" in text
    assert "weights drawn by seed 0" in text


def test_wrong_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, message in [
        ({"batch": "many"}, "flashsloth: batch: expected a whole number, got 'many'"),
        ({"micro_batch": 3}, "flashsloth: micro_batch: expected a divisor of 4"),
        ({"arguments": {"report_to": "paper"}}, "paper"),
        ({"data": [{"records": "run.yaml"}]}, "flashsloth: data.0: data: expected .json, .jsonl or .tar files"),
    ]:
        assert call(folder, out="wrong", **changes) == 2
        error = lines(capsys.readouterr().err)
        assert message in error[-1]
        assert not any("Traceback" in line for line in error)


def test_too_many_broken_records_fail_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten may be broken while few were seen; in the end it is one in a hundred."""
    prepare(tmp_path, 24)
    (tmp_path / "data" / "7.png").write_bytes(b"no picture")
    assert call(tmp_path) == 2
    error = lines(capsys.readouterr().err)
    assert "1 of 24 records cannot be used, expected at most 0.01 of 24: 1 not_an_image" in error[-1]
    listed = [json.loads(line) for line in (tmp_path / "out" / "broken.jsonl").read_text().splitlines()]
    assert [(one["index"], one["name"], one["reason"]) for one in listed] == [(7, "train.json[7]", "not_an_image")]
    # Allowed, it is skipped, counted and listed.
    assert call(tmp_path, "--set", "max_broken=0.05", "--set", "out=more") == 0
    assert "  1 skipped" in capsys.readouterr().out
    assert len((tmp_path / "more" / "broken.jsonl").read_text().splitlines()) == 1


def test_nothing_but_broken_records(tmp_path: Path) -> None:
    """Steps without a token leave the weights as they are."""
    prepare(tmp_path, 8)
    for picture in (tmp_path / "data").glob("*.png"):
        picture.unlink()
    trained = train(tmp_path, max_broken=1, data=[{"records": "data/train.json"}], arguments={"max_steps": 2})
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(loss == loss for loss in losses)


def test_counts_of_several_processes_add_up() -> None:
    one = {"seen": 5, "cut": 1, "tokens": 10, "padding": 2, "reasons": {"too_long": 1}}
    one["listed"] = [{"index": 3, "name": "a", "reason": "too_long", "detail": ""}]
    other = {"seen": 4, "cut": 0, "tokens": 7, "padding": 0, "reasons": {"too_long": 1, "bad_text": 2}, "listed": []}
    joined = _joined([one, other])
    assert (joined["seen"], joined["tokens"], joined["reasons"]) == (9, 17, {"too_long": 2, "bad_text": 2})
    assert [entry["index"] for entry in joined["listed"]] == [3]
