"""``make nano``: flashsloth-nano from nothing. Each step leaves a folder and is left out when it is there.

    OUT/data/sight, OUT/data/sort-of-clevr    pictures, questions, captions
    OUT/start                                 configuration, tokenizer, processor
    OUT/tower                                 the vision tower, pretrained on what patches show
    OUT/aligned                               pooling, projector and embedded queries, told the words of what is seen
    OUT/stage1, OUT/stage2                    captions, questions: by the YAML files of this folder
    OUT/weights                               what ships: stage 2 in bfloat16, rounded to nearest even
    OUT/curves.svg                            how it went
    OUT/ablation                              other ways to compress, on these weights; only with --until ablation

A run that was interrupted goes on by the same command.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from flashsloth.data.sight import make_sight, sort_of_clevr
from flashsloth.data.sight.sample import Settings
from flashsloth.nano.align import ALIGNMENT, align
from flashsloth.nano.curves import draw_curves
from flashsloth.nano.model import vision_config, write_start
from flashsloth.nano.questions import more_records
from flashsloth.nano.selection import fewer_easy, only
from flashsloth.nano.tower import TowerTraining, train_tower

STAGES = ("stage1", "stage2")
PICTURES = {"train": 60_000, "validation": 1_000, "test": 2_000}
READING, SMALL = ("word", "digit"), ("small-print",)
_HERE = Path(__file__).parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("nano"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that draw pictures (%(default)s)")
    parser.add_argument(
        "--until", choices=[name for name, _ in STEPS], default="curves", help="the last step to do (%(default)s)"
    )


def main(options: argparse.Namespace) -> None:
    out: Path = options.out
    for name, step in STEPS:
        print(f"== {name}", flush=True)
        step(out, options.jobs)
        if name == options.until:
            return


def _data(out: Path, jobs: int) -> None:
    """``make_sight`` keeps what is finished."""
    make_sight(out / "data" / "sight", Settings(), PICTURES, jobs=jobs)
    make_sight(out / "data" / "sort-of-clevr", Settings(size=sort_of_clevr.SIZE, sort_of_clevr=True), jobs=jobs)
    sight, clevr = (
        json.loads((out / "data" / name / "train" / "questions.json").read_text())
        for name in ("sight", "sort-of-clevr")
    )
    more = list(more_records(sight, Settings(), jobs))
    for name, chosen in (
        ("more", fewer_easy(more, without=SMALL)),  # in one tile small print cannot be read
        ("reading", only(sight, READING)),
        ("small-print", fewer_easy([record for record in sight if {*SMALL} & {*record["kinds"]}])),
        ("sort-of-clevr", fewer_easy(clevr)),
    ):
        (out / "data" / f"{name}.json").write_text(json.dumps(list(chosen)))


def _start(out: Path, jobs: int) -> None:
    if not (out / "start" / "config.json").is_file():
        write_start(out / "start")


def _tower(out: Path, jobs: int) -> None:
    if not (out / "tower" / "model.safetensors").is_file():
        train_tower(vision_config(), out / "tower", TowerTraining(), device=_device(), fast=_multiplies_bf16())


def _align(out: Path, jobs: int) -> None:
    if not (out / "aligned" / "model.safetensors").is_file():
        align(out / "start", out / "tower", out / "aligned", ALIGNMENT, device=_device())


def _stage(out: Path, jobs: int, name: str) -> None:
    from flashsloth.training import command
    from flashsloth.training.config import read_config

    if (out / name / "model.safetensors").is_file():
        return
    fast = ("arguments.bf16=true", "compile=true") if _multiplies_bf16() else ()
    command.run(read_config(copy_configuration(out, name), fast), resume=True)


def copy_configuration(out: Path, name: str) -> Path:
    """A YAML file of this folder to where its paths are meant."""
    return Path(shutil.copyfile(_HERE / f"{name}.yaml", out / f"{name}.yaml"))


def write_weights(out: Path, jobs: int) -> None:
    """OUT/stage2 to OUT/weights."""
    from flashsloth.modeling import FlashSlothForConditionalGeneration
    from flashsloth.processing import FlashSlothProcessor

    model = FlashSlothForConditionalGeneration.from_pretrained(out / "stage2", dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(out / "weights")
    FlashSlothProcessor.from_pretrained(out / "stage2").save_pretrained(out / "weights")


def _ablation(out: Path, jobs: int) -> None:
    from flashsloth.ablation.command import SEEDS, ablate
    from flashsloth.ablation.report import write_report

    ablate(copy_configuration(out, "ablation"), out / "ablation", None, SEEDS, resume=True)
    write_report(out / "ablation")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _multiplies_bf16() -> bool:
    """Elsewhere bf16 is slower than fp32."""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()


STEPS: tuple[tuple[str, Callable[[Path, int], object]], ...] = (
    ("data", _data),
    ("start", _start),
    ("tower", _tower),
    ("align", _align),
    *((name, partial(_stage, name=name)) for name in STAGES),
    ("weights", write_weights),
    ("curves", lambda out, jobs: draw_curves(out, out / "curves.svg")),
    ("ablation", _ablation),
)
