"""The configuration file: what it may say, and what is said of what it may not."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from flashsloth.training.config import Lora, Source, TrainConfig, parse_config, read_config, training_arguments
from flashsloth.training.stages import STAGES
from tests.support import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "captions.json").write_text("[]")
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    """The shortest file, with lines of ``changes`` instead of or behind its own; None leaves a line out."""
    values = {"model": "model", "stage": "1", "data": "[{records: captions.json}]", "out": "out", **changes}
    path = folder / "run.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in values.items() if value is not None))
    return path


def test_the_paper_is_the_default(folder: Path) -> None:
    first = read_config(write(folder))
    assert (first.train, first.batch) == (("pooling", "projector"), 256)
    assert first.arguments is not None
    assert first.arguments["learning_rate"] == 1e-3
    second = read_config(write(folder, stage=2))
    assert (second.train, second.batch) == (("pooling", "projector", "queries", "decoder"), 128)
    assert second.arguments is not None
    assert second.arguments["learning_rate"] == 2e-5
    assert (STAGES[1].captions, STAGES[2].captions) == (True, False)


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = read_config(write(folder, out="../runs/1"))
    assert config.model == folder / "model"
    assert config.data[0].records == (folder / "captions.json",)
    assert config.out == folder.parent / "runs" / "1"


def test_numbers_are_as_everybody_writes_them(folder: Path) -> None:
    given = "{learning_rate: 1e-4, weight_decay: 1E-2, warmup_steps: .05, adam_epsilon: 1.5e-08, max_steps: 7}"
    arguments = read_config(write(folder, arguments=given)).arguments
    assert arguments is not None
    assert [arguments[key] for key in ("learning_rate", "weight_decay", "warmup_steps", "adam_epsilon")] == [
        1e-4,
        1e-2,
        0.05,
        1.5e-8,
    ]
    assert arguments["save_total_limit"] == 2  # those of the stage stay


def test_changes_from_the_command_line(folder: Path) -> None:
    changes = ["batch=8", "arguments.max_steps=3", "data.0.repeat=2", "tower=null", "train=[decoder]", "lora.rank=4"]
    config = read_config(write(folder), changes)
    assert (config.batch, config.data[0].repeat, config.tower, config.train) == (8, 2, None, ("decoder",))
    assert config.arguments is not None
    assert config.arguments["max_steps"] == 3
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha) == (4, 8.0)
    for change, message in [("batch", "key=value"), ("data.7.repeat=1", "data.7.repeat"), ("=3", "key=value")]:
        with pytest.raises(ValueError, match=rf"--set: expected .*{re.escape(message)}"):
            read_config(write(folder), [change])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model: expected a value, got none"),
        ({"model": "nowhere"}, "model: expected a directory, got .*nowhere"),
        ({"stage": 3}, "stage: expected 1 to 2, got 3"),
        ({"stage": "one"}, "stage: expected a whole number, got 'one'"),
        ({"stage": "true"}, "stage: expected a whole number, got True"),
        ({"epochs": 3}, "epochs: unknown; expected model, lora.*arguments|epochs: unknown; expected .*stage"),
        ({"train": "[projector, eyes]"}, "train: expected parts out of tower, .*, got 'eyes'"),
        ({"train": "[]"}, "train: expected at least one part"),
        ({"train": "projector"}, "train: expected a list, got 'projector'"),
        ({"data": "[]"}, "data: expected at least one source"),
        ({"data": "captions.json"}, "data: expected a list, got 'captions.json'"),
        ({"data": "[captions.json]"}, "data.0: expected keys and values, got 'captions.json'"),
        ({"data": "[{records: none.json}]"}, "data.0.records: expected a path that exists, got .*none.json"),
        ({"data": "[{records: captions.json, image_hd: 5}]"}, "data.0.image_hd: expected true or false, got 5"),
        ({"data": "[{records: captions.json, repeat: 0}]"}, "data.0.repeat: expected 1 or more, got 0"),
        ({"data": "[{records: captions.json, folder: x}]"}, "data.0.folder: unknown; expected records, images"),
        ({"batch": -1}, "batch: expected 1 or more, got -1"),
        ({"batch": 1.5}, "batch: expected a whole number, got 1.5"),
        ({"max_broken": 2}, "max_broken: expected 0 to 1, got 2"),
        ({"dtype": "float16"}, "dtype: expected float32 or bfloat16, got 'float16'"),
        ({"lora": "{rank: 4}"}, "lora: expected decoder among the parts of `train`"),
        ({"lora": "{rank: 4, size: 3}", "stage": 2}, "lora.size: unknown"),
        ({"lora": "{rank: 0}", "stage": 2}, "lora.rank: expected 1 or more, got 0"),
        ({"arguments": "{lr: 1}"}, "arguments.lr: unknown; expected a field of transformers' TrainingArguments"),
        ({"arguments": "{output_dir: x}"}, "arguments.output_dir: not to be set here, set by `out`"),
        ({"arguments": "{learning_rate: fast}"}, "arguments.learning_rate: expected a number, got 'fast'"),
        ({"arguments": "{bf16: 1}"}, "arguments.bf16: expected true or false, got 1"),
        ({"arguments": "{max_steps: 1.5}"}, "arguments.max_steps: expected a whole number, got 1.5"),
        ({"out": "{a: 1}"}, "out: expected a text, got keys and values"),
        ({"stage": "1\nstage: 2"}, "stage: given twice"),
        ({"stage": "[1"}, "run.yaml: expected YAML"),
        ({"1": "x"}, "expected a name, got 1"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        read_config(write(folder, **changes))


def test_a_file_that_is_none(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--config: expected a YAML file"):
        read_config(folder / "none.yaml")
    (folder / "list.yaml").write_text("- 1\n")
    with pytest.raises(TypeError, match="expected keys and values, got a list"):
        read_config(folder / "list.yaml")


def test_the_examples_of_the_documents_are_right(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        for path in re.findall(r"(?:model|tower|images): ([^\s\]}]+)", example):
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for path in re.findall(r"[\w/]+\.(?:json\b|tar)", example):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text("[]")
        (tmp_path / "run.yaml").write_text(example)
        config = read_config(tmp_path / "run.yaml")
        assert config.batch % (config.micro_batch or 1) == 0
        assert config.arguments is not None
        assert config.arguments.get("deepspeed", str(tmp_path / "zero.json")) == str(tmp_path / "zero.json")


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    for field in (*fields(TrainConfig), *fields(Source), *fields(Lora)):
        assert f"`{field.name}`" in text, field.name


def test_the_batch_is_shared_out(folder: Path) -> None:
    config = parse_config(
        {"model": "model", "stage": 2, "data": [{"records": "captions.json"}], "out": "o", "batch": 12,
         "micro_batch": 3, "arguments": {"use_cpu": True}},
        folder,
    )  # fmt: skip
    arguments = training_arguments(config, 2)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 2)
    with pytest.raises(ValueError, match="batch: expected a multiple of the 5 processes, got 12"):
        training_arguments(config, 5)
    with pytest.raises(ValueError, match=r"micro_batch: expected a divisor of 4, .* got 3"):
        training_arguments(config, 3)
    assert training_arguments(config.changed(micro_batch=None), 2).per_device_train_batch_size == 6
    with pytest.raises(ValueError, match=r"arguments: .*sometimes"):
        training_arguments(config.changed(arguments={"save_strategy": "sometimes"}), 1)
