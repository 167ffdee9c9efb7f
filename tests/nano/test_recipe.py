"""The recipe of flashsloth-nano: its configurations, and what becomes of the weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashsloth.ablation.settings import read_settings
from flashsloth.nano import recipe
from flashsloth.tiny import processor_for, random_model, tiny_config
from flashsloth.training.config import read_config

pytest.importorskip("sklearn")


def options(out: Path, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    return parser.parse_args(["--out", str(out), *given])


def test_pictures_and_start_are_what_the_stages_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PICTURES", {"train": 30, "validation": 1, "test": 1})
    monkeypatch.setattr(recipe.sort_of_clevr, "COUNTS", {"train": 2, "validation": 1, "test": 1})
    recipe.main(options(tmp_path, "--jobs", "1", "--until", "start"))
    small = json.loads((tmp_path / "data" / "small-print.json").read_text())
    assert small
    assert all("small-print" in record["kinds"] for record in small)
    reading = json.loads((tmp_path / "data" / "reading.json").read_text())
    whole = json.loads((tmp_path / "data" / "sight" / "train" / "questions.json").read_text())
    whole = [record for record in whole if {"word", "digit"} & {*record["kinds"]}]
    assert 0 < len(reading) == len(whole)
    for record, of in zip(reading, whole, strict=True):
        said = [turn["value"] for turn in record["conversations"]]
        assert said[0].startswith("<image>\n")
        assert "<image>" not in "".join(said[1:])
        asked = [text.removeprefix("<image>\n") for text in said[::2]]
        pairs = list(zip(asked, said[1::2], record["kinds"], strict=True))
        everything = [turn["value"].removeprefix("<image>\n") for turn in of["conversations"]]
        kinds = zip(everything[::2], everything[1::2], of["kinds"], strict=True)
        assert pairs == [one for one in kinds if one[2] in recipe.READING]
    more = json.loads((tmp_path / "data" / "more.json").read_text())
    assert not any("small-print" in record["kinds"] for record in more)
    for folder in ("aligned", "stage1"):
        (tmp_path / folder).mkdir()
    for name in recipe.STAGES:
        recipe.copy_configuration(tmp_path, name)
        config = read_config(tmp_path / f"{name}.yaml")
        for source in config.data:
            assert source.images is not None
            for path in (*source.records, *source.images):
                assert path.exists(), path


def test_the_ablation_is_about_the_weights(tmp_path: Path) -> None:
    for folder in ("weights", "data/sight"):
        (tmp_path / folder).mkdir(parents=True)
    settings = read_settings(recipe.copy_configuration(tmp_path, "ablation"))
    assert settings.model == settings.init == tmp_path / "weights"
    assert options(tmp_path).until == "curves"  # other ways to compress only on demand


def test_weights_are_rounded_to_the_nearest_bfloat16(tmp_path: Path) -> None:
    config = tiny_config()
    model = random_model(config)
    model.save_pretrained(tmp_path / "stage2")
    processor_for(config).save_pretrained(tmp_path / "stage2")
    recipe.write_weights(tmp_path, 1)
    saved = load_file(tmp_path / "weights" / "model.safetensors")
    trained = load_file(tmp_path / "stage2" / "model.safetensors")
    assert saved.keys() == trained.keys()
    for name, weight in trained.items():
        assert torch.equal(saved[name], weight.to(torch.bfloat16)), name
