"""The picture of a training is that of its logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashsloth.nano.curves import draw_curves


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    tower = [{"step": step, "kind_accuracy": step / 100, "letter_accuracy": 0.1} for step in (25, 50, 75)]
    write(tmp_path / "tower" / "log.jsonl", tower)
    losses = [{"step": step, "loss": 5.0 / step} for step in (1, 25, 50)]
    write(tmp_path / "stage1" / "log.jsonl", [*losses, {"step": 50, "train_runtime": 3.0}])
    write(tmp_path / "stage2" / "log.jsonl", losses)
    aligned = [{"step": step, "token": 9 / step, "key": 8 / step, "value": 7 / step} for step in (25, 50)]
    write(tmp_path / "aligned" / "log.jsonl", [{"steps": 50}, *aligned])
    return tmp_path


def test_curves_repeat_and_leave_out_what_a_resumed_run_did_again(trained: Path) -> None:
    first = draw_curves(trained, trained / "a.svg").read_bytes()
    assert b"<svg" in first
    log = trained / "stage2" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines, lines[1], lines[2]]))
    assert draw_curves(trained, trained / "b.svg").read_bytes() == first
    write(log, [{"step": 1, "loss": 5.0}, {"step": 50, "loss": 4.0}])
    assert draw_curves(trained, trained / "c.svg").read_bytes() != first


def test_a_step_that_left_no_log_is_named(trained: Path) -> None:
    (trained / "stage1" / "log.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="stage1"):
        draw_curves(trained, trained / "a.svg")
    assert not list(trained.glob("*.svg"))
