"""The configuration of a training run: a YAML file, read strictly."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from flashsloth.training.keys import NAMES, Keys, change_value, kind_of, read_yaml
from flashsloth.training.stages import PARTS, STAGES

DTYPES = ("float32", "bfloat16")

# Arguments of transformers that the run sets itself, and where to say it instead.
_OWN = {
    "output_dir": "set by `out`",
    "per_device_train_batch_size": "set by `micro_batch`",
    "gradient_accumulation_steps": "set by `batch` and `micro_batch`",
    "auto_find_batch_size": "`micro_batch` is never changed",
    "seed": "set by `seed`",
    "data_seed": "set by `seed`",
    "resume_from_checkpoint": "given by --resume",
    "remove_unused_columns": "a batch is used as it is",
    "ignore_data_skip": "a resumed run continues where it was",
    "restore_callback_states_from_checkpoint": "a resumed run continues where it was",
    "train_sampling_strategy": "set by `seed` alone",
    "label_names": "a batch is used as it is",
    "label_smoothing_factor": "packed batches have the model's own loss",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "eval_strategy": "`flashsloth eval` measures what was trained",
    "load_best_model_at_end": "nothing is evaluated while training",
    "push_to_hub": "what is trained stays in `out`",
    "do_train": "it is what the command does",
    "do_eval": "`flashsloth eval` measures what was trained",
    "do_predict": "`flashsloth eval` measures what was trained",
    "local_rank": "set by torchrun",
}
_FILES = ("deepspeed", "fsdp_config", "accelerator_config")  # a mapping, or a file with one


@dataclass(frozen=True)
class Source:
    """One source of records.

    Attributes:
        records: ``.json``, ``.jsonl`` or ``.tar`` files.
        images: a folder, or ``.tar`` shards; None for the folder of each file of records.
        image_hd: five tiles an image; None for what the model's processor says.
        captions: rows of stage 1; None for what the stage says.
        repeat: how often an epoch has each record.
    """

    records: tuple[Path, ...]
    images: tuple[Path, ...] | None = None
    image_hd: bool | None = None
    captions: bool | None = None
    repeat: int = 1


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of the decoder's linear layers, by peft, instead of training their weights.

    Attributes:
        rank, alpha: an update is ``alpha / rank * B A``, with A of ``rank`` rows.
        dropout: on the input of the updates.
        targets: names of linear layers in the decoder; None for all but the output embedding.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, how, and where it goes; docs/training.md has every key.

    Attributes:
        model: a directory with a checkpoint, or with configuration, tokenizer and processor alone: then weights are
            drawn by ``seed``.
        stage: 1 or 2, which gives what is not said.
        train: parts of the model that are trained, keys of :data:`~flashsloth.training.stages.PARTS`.
        data: the sources.
        batch: rows of an optimizer step, over all processes.
        micro_batch: rows that one process computes at once; None for its whole share of a step.
        out: the directory of checkpoints, logs and the trained model.
        tower: a checkpoint whose vision tower is taken.
        lora: see :class:`Lora`.
        seed: of the order of records, of dropout and of drawn weights.
        max_length: tokens of a row; None for the decoder's ``max_position_embeddings``.
        max_broken: the part of the records that may be unusable, 0 to 1.
        muon: learning rate of Muon for the matrices of layers; None trains them by AdamW, like all else.
        dtype: of the weights in memory; ``arguments: {bf16: true}`` computes in bfloat16 whatever this is.
        compile: whether layers of tower and decoder run compiled.
        arguments: of transformers' TrainingArguments, those of the stage under those of the file.
    """

    model: Path
    stage: int
    train: tuple[str, ...]
    data: tuple[Source, ...]
    batch: int
    out: Path
    micro_batch: int | None = None
    tower: Path | None = None
    lora: Lora | None = None
    seed: int = 0
    max_length: int | None = None
    max_broken: float = 0.01
    muon: float | None = None
    dtype: str = "float32"
    compile: bool = False
    arguments: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values, paths as strings."""
        return _plain(asdict(self))

    def changed(self, **fields: Any) -> TrainConfig:
        return replace(self, **fields)


def read_config(path: Path, changes: Iterable[str] = ()) -> TrainConfig:
    """Read a configuration.

    Args:
        path: the YAML file. Paths in it are relative to its folder.
        changes: ``key=value`` that replace what the file says; keys of keys by dots, ``arguments.max_steps=10``,
            ``data.0.repeat=2``; values are YAML.

    Raises:
        ValueError, TypeError: an unknown key, a wrong type or value, named by its key; FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config: expected a YAML file, got {path}")
    read = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(read, dict):
        raise TypeError(f"{path}: expected keys and values, got {kind_of(read)}")
    for change in changes:
        change_value(read, change)
    return parse_config(read, path.resolve().parent)


def parse_config(read: Mapping[str, Any], folder: Path) -> TrainConfig:
    """A configuration from the values of a file in ``folder``. Raises as :func:`read_config`."""
    keys = Keys(read, folder)
    stage = keys.number("stage", int, low=1, high=2)
    defaults = STAGES[stage]
    lora = keys.part("lora", _lora)
    config = TrainConfig(
        model=keys.directory("model"),
        stage=stage,
        train=_parts(keys, defaults.train),
        data=_sources(keys),
        batch=keys.number("batch", int, defaults.batch, low=1),
        micro_batch=keys.number("micro_batch", int, None, low=1),
        out=keys.path("out"),
        tower=keys.directory("tower", None),
        lora=lora,
        seed=keys.number("seed", int, 0, low=0, high=2**32 - 1),
        max_length=keys.number("max_length", int, None, low=1),
        max_broken=keys.number("max_broken", float, 0.01, low=0, high=1),
        muon=keys.number("muon", float, None),
        dtype=keys.choice("dtype", DTYPES, "float32"),
        compile=keys.take("compile", (bool,), False),
        arguments=dict(defaults.arguments) | _arguments(keys.take("arguments", (dict,), {}), folder),
    )
    keys.done()
    _check_muon(config)
    if lora is not None and "decoder" not in config.train:
        raise ValueError(f"lora: expected decoder among the parts of `train`, got {', '.join(config.train)}")
    return config


def _check_muon(config: TrainConfig) -> None:
    if config.muon is None:
        return
    if config.muon == 0:
        raise ValueError("muon: expected a learning rate above 0, got 0")
    if config.lora is not None:
        raise ValueError("muon: expected no lora, whose matrices are factors of an update, got both")
    if "optim" in (config.arguments or {}):
        raise ValueError("muon: expected no arguments.optim, as AdamW trains the rest, got both")


def training_arguments(config: TrainConfig, world_size: int) -> TrainingArguments:
    """transformers' arguments for one of ``world_size`` processes. Raises ValueError, TypeError."""
    share, rest = divmod(config.batch, world_size)
    if rest:
        raise ValueError(f"batch: expected a multiple of the {world_size} processes, got {config.batch}")
    micro = config.micro_batch or share
    if share % micro:
        raise ValueError(
            f"micro_batch: expected a divisor of {share}, the share of one of {world_size} processes in the batch of "
            f"{config.batch}, got {micro}"
        )
    given = dict(config.arguments or {})
    if not torch.accelerator.is_available():  # without it processes on CPUs do not find each other
        given.setdefault("use_cpu", True)
    try:
        arguments = TrainingArguments(
            output_dir=str(config.out),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=share // micro,
            seed=config.seed,
            data_seed=config.seed,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            **given,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"arguments: {error}") from error
    if "tensorboard" in list(arguments.report_to or ()) and find_spec("tensorboard") is None:
        raise ValueError("arguments.report_to: tensorboard needs its package: pip install tensorboard")
    return arguments


def _parts(keys: Keys, default: tuple[str, ...]) -> tuple[str, ...]:
    value = keys.take("train", (list,), list(default))
    for part in value:
        if part not in PARTS:
            raise ValueError(f"train: expected parts out of {', '.join(PARTS)}, got {part!r}")
    if not value:
        raise ValueError("train: expected at least one part, got none")
    return tuple(part for part in PARTS if part in value)


def _sources(keys: Keys) -> tuple[Source, ...]:
    values = keys.take("data", (list,))
    if not values:
        raise ValueError("data: expected at least one source, got none")
    sources = []
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise TypeError(f"data.{i}: expected keys and values, got {kind_of(value)}")
        own = Keys(value, keys.folder, f"data.{i}.")
        sources.append(
            Source(
                records=own.paths("records"),
                images=own.paths("images", None),
                image_hd=own.take("image_hd", (bool,), None),
                captions=own.take("captions", (bool,), None),
                repeat=own.number("repeat", int, 1, low=1),
            )
        )
        own.done()
    return tuple(sources)


def _lora(keys: Keys) -> Lora:
    rank = keys.number("rank", int, low=1)
    targets = keys.take("targets", (list,), None)
    if targets is not None and not (targets and all(isinstance(one, str) for one in targets)):
        raise TypeError(f"lora.targets: expected names of layers, got {targets!r:.80}")
    lora = Lora(
        rank=rank,
        alpha=float(keys.number("alpha", float, 2 * rank)),
        dropout=float(keys.number("dropout", float, 0.0, high=1)),
        targets=None if targets is None else tuple(targets),
    )
    keys.done()
    return lora


def _arguments(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    hints = typing.get_type_hints(TrainingArguments)
    known = {field.name: hints[field.name] for field in fields(TrainingArguments) if field.init}
    for key, value in given.items():
        if key in _OWN:
            raise ValueError(f"arguments.{key}: not to be set here, {_OWN[key]}")
        if key not in known:
            raise ValueError(f"arguments.{key}: unknown; expected a field of transformers' TrainingArguments")
        kinds = _scalars(known[key])
        if kinds and (type(value) not in kinds and not (type(value) is int and float in kinds)):
            names = " or ".join(NAMES[kind] for kind in kinds)
            raise TypeError(f"arguments.{key}: expected {names}, got {kind_of(value)}")
    files = {key: given[key] for key in _FILES if isinstance(given.get(key), str)}
    return given | {key: str((folder / Path(name).expanduser()).resolve()) for key, name in files.items()}


def _scalars(hint: Any) -> tuple[type, ...]:
    """The types a hint is made of, where these are bool, int, float and None alone; else ()."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = typing.get_args(hint) if union else (hint,)
    return tuple(parts) if set(parts) <= {bool, int, float, type(None)} else ()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
