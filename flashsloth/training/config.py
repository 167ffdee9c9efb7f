"""The configuration of a training run: a YAML file, read strictly."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

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
        dtype: of the weights in memory; ``arguments: {bf16: true}`` computes in bfloat16 whatever this is.
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
    dtype: str = "float32"
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
    read = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(read, dict):
        raise TypeError(f"{path}: expected keys and values, got {_kind(read)}")
    for change in changes:
        _change(read, change)
    return parse_config(read, path.resolve().parent)


def parse_config(read: Mapping[str, Any], folder: Path) -> TrainConfig:
    """A configuration from the values of a file in ``folder``. Raises as :func:`read_config`."""
    keys = _Keys(read, folder)
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
        dtype=keys.choice("dtype", DTYPES, "float32"),
        arguments=dict(defaults.arguments) | _arguments(keys.take("arguments", (dict,), {}), folder),
    )
    keys.done()
    if lora is not None and "decoder" not in config.train:
        raise ValueError(f"lora: expected decoder among the parts of `train`, got {', '.join(config.train)}")
    return config


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
    try:
        arguments = TrainingArguments(
            output_dir=str(config.out),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=share // micro,
            seed=config.seed,
            data_seed=config.seed,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            **dict(config.arguments or {}),
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"arguments: {error}") from error
    if "tensorboard" in list(arguments.report_to or ()) and find_spec("tensorboard") is None:
        raise ValueError("arguments.report_to: tensorboard needs its package: pip install tensorboard")
    return arguments


class _Keys:
    """The keys of a mapping, each taken once and checked; what is left over is unknown."""

    def __init__(self, read: Mapping[str, Any], folder: Path, prefix: str = "") -> None:
        self.left, self.folder, self.prefix = dict(read), folder, prefix
        self.known: list[str] = []

    def take(self, key: str, kinds: tuple[type, ...], default: Any = ...) -> Any:
        """A value of one of ``kinds``; ``null`` is as if it were not there."""
        self.known.append(key)
        value = self.left.pop(key, None)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.prefix}{key}: expected a value, got none")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(
                f"{self.prefix}{key}: expected {' or '.join(_NAMES[kind] for kind in kinds)}, got {_kind(value)}"
            )
        return value

    def number(self, key: str, kind: type, default: Any = ..., low: float = 0, high: float = float("inf")) -> Any:
        value = self.take(key, (int,) if kind is int else (int, float), default)
        if value is not None and not low <= value <= high:
            upper = "" if high == float("inf") else f" to {high:g}"
            raise ValueError(f"{self.prefix}{key}: expected {low:g}{upper or ' or more'}, got {value}")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: Any = ...) -> Any:
        value = self.take(key, (str,), default)
        if value not in choices:
            raise ValueError(f"{self.prefix}{key}: expected {' or '.join(choices)}, got {value!r}")
        return value

    def path(self, key: str, default: Any = ...) -> Any:
        value = self.take(key, (str,), default)
        return value if value is default else self.resolve(value)

    def directory(self, key: str, default: Any = ...) -> Any:
        path = self.path(key, default)
        if path is not default and not path.is_dir():
            raise FileNotFoundError(f"{self.prefix}{key}: expected a directory, got {path}")
        return path

    def paths(self, key: str, default: Any = ...) -> Any:
        value = self.take(key, (str, list), default)
        if value is default:
            return default
        values = [value] if isinstance(value, str) else value
        if not values or not all(isinstance(one, str) for one in values):
            raise TypeError(f"{self.prefix}{key}: expected a path or a list of paths, got {value!r:.80}")
        found = tuple(self.resolve(one) for one in values)
        for one in found:
            if not one.exists():
                raise FileNotFoundError(f"{self.prefix}{key}: expected a path that exists, got {one}")
        return found

    def resolve(self, path: str) -> Path:
        return (self.folder / Path(path).expanduser()).resolve()

    def part(self, key: str, parse: Any) -> Any:
        value = self.take(key, (dict,), None)
        return None if value is None else parse(_Keys(value, self.folder, f"{self.prefix}{key}."))

    def done(self) -> None:
        for key in self.left:
            raise ValueError(f"{self.prefix}{key}: unknown; expected {', '.join(self.known)}")


def _parts(keys: _Keys, default: tuple[str, ...]) -> tuple[str, ...]:
    value = keys.take("train", (list,), list(default))
    for part in value:
        if part not in PARTS:
            raise ValueError(f"train: expected parts out of {', '.join(PARTS)}, got {part!r}")
    if not value:
        raise ValueError("train: expected at least one part, got none")
    return tuple(part for part in PARTS if part in value)


def _sources(keys: _Keys) -> tuple[Source, ...]:
    values = keys.take("data", (list,))
    if not values:
        raise ValueError("data: expected at least one source, got none")
    sources = []
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise TypeError(f"data.{i}: expected keys and values, got {_kind(value)}")
        own = _Keys(value, keys.folder, f"data.{i}.")
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


def _lora(keys: _Keys) -> Lora:
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
            names = " or ".join(_NAMES[kind] for kind in kinds)
            raise TypeError(f"arguments.{key}: expected {names}, got {_kind(value)}")
    files = {key: given[key] for key in _FILES if isinstance(given.get(key), str)}
    return given | {key: str((folder / Path(name).expanduser()).resolve()) for key, name in files.items()}


def _scalars(hint: Any) -> tuple[type, ...]:
    """The types a hint is made of, where these are bool, int, float and None alone; else ()."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = typing.get_args(hint) if union else (hint,)
    return tuple(parts) if set(parts) <= {bool, int, float, type(None)} else ()


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everybody means it, and a key comes once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"expected a name, got {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key}: given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: expected YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{where}: expected YAML, got one too deep") from None


def _change(read: Any, change: str) -> None:
    """Apply one ``key=value``."""
    name, equals, text = change.partition("=")
    if not equals or not name:
        raise ValueError(f"--set: expected key=value, got {change!r}")
    *outer, last = name.split(".")
    where = read
    for key in outer:
        if isinstance(where, dict) and where.get(key) is None:
            where[key] = {}
        where = where[_place(where, key, name)]
    where[_place(where, last, name)] = _yaml(text, f"--set {name}")


def _place(where: Any, key: str, name: str) -> Any:
    if isinstance(where, dict):
        return key
    if isinstance(where, list) and key.isdigit() and int(key) < len(where):
        return int(key)
    raise ValueError(f"--set: expected a key of the configuration, got {name}")


_NAMES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list",
    dict: "keys and values", type(None): "null",
}  # fmt: skip


def _kind(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _NAMES[type(value)]
    return f"{value!r:.80}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
