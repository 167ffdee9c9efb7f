"""The configuration of an ablation: a YAML file, read strictly, and what the results depend on."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

# Keys that say where things are, or how long to measure: two runs that differ in them alone may be compared. What lies
# at the paths does count, by its contents.
_PLACES = ("model", "data", "tower", "init", "timing_rounds")


@dataclass(frozen=True)
class Settings:
    """What all runs of an ablation share.

    Attributes:
        model: directory of a checkpoint, which gives configuration, tokenizer and image settings.
        data: folder of ``flashsloth data make sight``; its train and test splits are used.
        steps: optimizer steps of a run.
        tower: checkpoint whose vision tower is taken; ``model`` where there is none. It is not trained.
        init: checkpoint whose decoder all variants start from; without one its weights are drawn by the seed.
        batch: pictures of a step, each with all its questions.
        learning_rate: at its highest, behind the warmup; a cosine takes it to zero.
        warmup: the part of the steps in which it rises.
        muon: the same of Muon, for the matrices of linear layers; without it AdamW trains them like all else.
        weight_decay: of both.
        clip: norm of the gradients at most.
        bf16: whether training multiplies in bfloat16; weights stay in float32.
        compile: whether training runs the decoder's layers compiled.
        train_pictures, test_pictures: the first so many of a split; None for all.
        query_layers: layers to try the query module before, besides that of the model; None for the first, the middle
            and the last that are possible.
        new_tokens: of an answer at most.
        timing_rounds: rounds of the timing, each with every variant.
    """

    model: Path
    data: Path
    steps: int
    tower: Path | None = None
    init: Path | None = None
    batch: int = 16
    learning_rate: float = 1e-3
    muon: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    bf16: bool = False
    compile: bool = False
    train_pictures: int | None = None
    test_pictures: int | None = None
    query_layers: tuple[int, ...] | None = None
    new_tokens: int = 16
    timing_rounds: int = 30

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "train_pictures", "test_pictures", "new_tokens", "timing_rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        for name, high in (("learning_rate", 1.0), ("muon", 1.0), ("clip", float("inf"))):
            value = getattr(self, name)
            if value is not None and not 0 < value <= high:
                raise ValueError(
                    f"{name}: expected a number above 0{'' if high > 1 else ' and at most 1'}, got {value}"
                )
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")

    def compared(self) -> dict[str, Any]:
        """The settings that two results must share, as JSON values."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _PLACES}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def read_settings(path: Path) -> Settings:
    """Read a configuration. Paths in it are relative to its folder.

    Raises:
        FileNotFoundError: no such file, or a directory it names; ValueError, TypeError: an unknown key, a value of
            another type or out of range, named by its key.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"--config: expected a YAML file, got {path}")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML: {error}") from error
    if not isinstance(read, dict):
        raise TypeError(f"{path}: expected keys and values, got {type(read).__name__}")
    known = {one.name: one for one in fields(Settings)}
    for key in read:
        if key not in known:
            raise ValueError(f"{path}: {key}: expected one of {', '.join(known)}")
    for name, one in known.items():
        if one.default is MISSING and read.get(name) is None:
            raise ValueError(f"{path}: {name}: expected a value, got none")
    return Settings(**{key: _value(key, value, path) for key, value in read.items() if value is not None})


def _value(key: str, value: Any, path: Path) -> Any:
    if key in ("model", "data", "tower", "init"):
        if not isinstance(value, str):
            raise TypeError(f"{path}: {key}: expected a path, got {value!r}")
        directory = path.resolve().parent / Path(value).expanduser()
        if not directory.is_dir():
            raise FileNotFoundError(f"{path}: {key}: expected a directory, got {directory}")
        return directory
    if key == "query_layers":
        if not isinstance(value, list) or not all(isinstance(one, int) and one is not True for one in value):
            raise TypeError(f"{path}: {key}: expected a list of whole numbers, got {value!r}")
        return tuple(value)
    if key in ("bf16", "compile"):
        if not isinstance(value, bool):
            raise TypeError(f"{path}: {key}: expected true or false, got {value!r}")
        return value
    if key in ("learning_rate", "muon", "warmup", "weight_decay", "clip"):
        try:  # YAML takes 1e-3, without a point, for text
            return float(value if not isinstance(value, bool) else "bool")
        except (TypeError, ValueError):
            raise TypeError(f"{path}: {key}: expected a number, got {value!r}") from None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{path}: {key}: expected a whole number, got {value!r}")
    return value
