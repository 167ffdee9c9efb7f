"""The curves of a training, drawn from the logs it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashsloth.figures import figure, plain

_ACCURACIES = (("kind", "kind of thing", "#000000", "-"), ("letter", "letter", "#D55E00", "--"))
_MEETINGS = (
    ("token", "visual tokens", "#000000", "-"),
    ("key", "keys", "#D55E00", "--"),
    ("value", "values", "#0072B2", ":"),
)
_STAGES = (("stage1", "captions"), ("stage2", "questions"))


def draw_curves(out: Path, path: Path) -> Path:
    """Accuracy of the tower, losses of the alignment and of the stages of ``make nano``, from ``out``, as one picture.

    Raises:
        FileNotFoundError: a step has left no log there. ModuleNotFoundError: matplotlib is not installed.
    """
    tower = _read(out / "tower" / "log.jsonl", "letter_accuracy")
    aligned = _read(out / "aligned" / "log.jsonl", "token")
    stages = [_read(out / name / "log.jsonl", "loss") for name, _ in _STAGES]
    with figure(path, (12.0, 3.2)) as drawn:
        axes = drawn.subplots(1, 4)
        for name, label, color, line in _ACCURACIES:
            steps = [row["step"] for row in tower]
            axes[0].plot(steps, [100 * row[f"{name}_accuracy"] for row in tower], line, color=color, label=label)
        axes[0].set_title("tower: patches that are right, %", loc="left", fontsize=10)
        axes[0].set_ylim(0, 100)
        axes[0].legend(loc="lower right", frameon=False)
        for name, label, color, line in _MEETINGS:
            axes[1].plot(
                [row["step"] for row in aligned], [row[name] for row in aligned], line, color=color, label=label
            )
        axes[1].set_title("alignment, loss", loc="left", fontsize=10)
        axes[1].legend(loc="upper right", frameon=False)
        for one, rows, (_, title) in zip(axes[2:], stages, _STAGES, strict=True):
            one.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="#000000")
            one.set_yscale("log")
            one.set_title(f"{title}, loss", loc="left", fontsize=10)
        for one in axes:
            one.set_xlabel("steps")
            plain(one, which="both", linewidth=0.6)
    return path


def _read(log: Path, key: str) -> list[dict[str, Any]]:
    """Rows that have ``key``, by step; of steps that a run did once more after a stop, the last."""
    rows = [row for line in log.read_text().splitlines() if key in (row := json.loads(line))]
    return list({row["step"]: row for row in sorted(rows, key=lambda row: row["step"])}.values())
