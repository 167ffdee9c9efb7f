"""Results on disk: one JSON file a run, written whole or not at all, and never mixed with those of other settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashsloth.files import write_json

FORMAT, VERSION = "flashsloth-ablation", 1
RUNS, TIMES = "runs", "times.json"


@dataclass(frozen=True)
class Run:
    """What came of one variant with one seed. Nothing in it depends on when or how fast it ran.

    Attributes:
        variant, title, family: see :class:`~flashsloth.ablation.variants.Variant`.
        seed: of the order of pictures, of the weights that are drawn and of dropout.
        settings: what all runs that are compared share, contents of checkpoints and data included.
        changes: fields of the configuration that differ from the model's.
        visual_tokens, queries: of one image and one question, in the prompt.
        prompt_tokens: of the request that flops and times are about.
        trained: parameters that were trained.
        flops: of that request, by part.
        losses: mean training loss of each fiftieth of the steps.
        order: checksum of the pictures of all steps, in order.
        scores: by kind of question: asked, right.
        environment: torch, device and threads it ran on.
    """

    variant: str
    title: str
    family: str
    seed: int
    settings: Mapping[str, Any]
    changes: Mapping[str, Any]
    visual_tokens: int
    queries: int
    prompt_tokens: int
    trained: int
    flops: Mapping[str, float]
    losses: list[float]
    order: str
    scores: Mapping[str, Mapping[str, int]]
    environment: Mapping[str, Any]

    @property
    def accuracy(self) -> float:
        """Right answers over all questions."""
        return share(self.scores.values())

    @property
    def name(self) -> str:
        return run_name(self.variant, self.seed)


def share(scores: Iterable[Mapping[str, int]]) -> float:
    """Right answers over questions asked."""
    scores = list(scores)
    return sum(one["right"] for one in scores) / sum(one["asked"] for one in scores)


def run_name(variant: str, seed: int) -> str:
    return f"{variant}-seed{seed}"


def save_run(run: Run, folder: Path) -> Path:
    """Write a run to ``folder/runs``."""
    path = folder / RUNS / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": FORMAT, "version": VERSION, **asdict(run)})
    return path


def load_runs(folder: Path) -> list[Run]:
    """All runs in ``folder/runs``, by name.

    Raises:
        ValueError: a file that is no run, naming it; or runs of different settings, naming what differs.
    """
    runs = [_load(path) for path in sorted((folder / RUNS).glob("*.json"))]
    for run in runs[1:]:
        check_same(run, runs[0].settings, folder)
    return runs


def check_same(run: Run, settings: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError unless a run has these settings."""
    names = [name for name in {**settings, **run.settings} if settings.get(name) != run.settings.get(name)]
    if names:
        told = ", ".join(f"{name} {run.settings.get(name)!r}, not {settings.get(name)!r}" for name in names)
        raise ValueError(
            f"--out: expected results of the same settings, got {folder / RUNS / run.name}.json with {told}; "
            "choose another folder"
        )


def _load(path: Path) -> Run:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        found = (read.pop("format"), read.pop("version"))
        if found != (FORMAT, VERSION):
            raise ValueError(f"format {found[0]!r}, version {found[1]!r}")
        run = Run(**read)
        if path.stem != run.name or not run.accuracy >= 0:
            raise ValueError(f"variant {run.variant!r} and seed {run.seed!r}")
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: expected a run of an ablation, got {error}") from error
    return run
