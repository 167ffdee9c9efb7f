"""What all runs of an ablation share: the model they vary, its frozen tower, pictures, questions, kept features."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flashsloth.ablation.settings import Settings
from flashsloth.checkpoint import read_tensors, rename
from flashsloth.config import FlashSlothConfig
from flashsloth.data.broken import BrokenRecord, Skipped
from flashsloth.data.llava import LlavaDataset, read_turns
from flashsloth.data.records import JsonRecords
from flashsloth.files import replacing
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor
from flashsloth.prompt import IMAGE_TOKEN
from flashsloth.tokenization import special_tokens

FEATURES = "features"
_AT_ONCE = 32  # pictures the tower takes together
# In this order their random numbers are dealt, whether a variant has them or not.
_DRAWN = ("pooling", "projector", "learnable_tokens", "embedded_query", "language_model")
_NESTED = "vision_model."  # what some versions of transformers put the tower's weights under

Tell = Callable[[str], None]


class Question(NamedTuple):
    """One question of the test: ``picture`` is its place in the split."""

    picture: int
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Split:
    """The first ``pictures`` records of a split; ``hash`` is that of its whole content."""

    name: str
    source: JsonRecords
    pictures: int
    hash: str

    def turns(self, index: int, special: list[str]) -> list[tuple[str, str]]:
        """The (role, text) pairs of a record, which shows a picture. Raises ValueError."""
        try:
            record = self.source.record(index)
            turns = read_turns(record, special)
        except BrokenRecord as error:
            raise ValueError(f"data: {self.source.name(index)}: {error}") from error
        if "image" not in record or turns[0][1].count(IMAGE_TOKEN) != 1:
            raise ValueError(f"data: {self.source.name(index)}: expected a picture, shown in the first question")
        return turns

    def questions(self, special: list[str]) -> Iterator[Question]:
        """Every question of every picture, each to be asked alone."""
        for index in range(self.pictures):
            turns, kinds = self.turns(index, special), self.source.record(index).get("kinds")
            if not isinstance(kinds, list) or len(kinds) != len(turns) // 2:
                raise ValueError(f"data: {self.source.name(index)}: expected kinds, one a question, got {kinds!r:.80}")
            for kind, (_, question), (_, answer) in zip(kinds, turns[::2], turns[1::2], strict=True):
                yield Question(index, kind, question.replace(IMAGE_TOKEN, "").strip(), answer)


class Material:
    """Opened once; every run of an ablation reads from it.

    Attributes:
        config, processor: of the model that is varied.
        train, test: the splits.
        identity: the settings that count, with checksums of weights and data in place of paths.
    """

    def __init__(self, settings: Settings, folder: Path, tell: Tell = lambda line: None) -> None:
        self.settings, self.folder, self.tell = settings, folder, tell
        self.config = FlashSlothConfig.from_pretrained(settings.model)
        self.processor = FlashSlothProcessor.from_pretrained(settings.model)
        if getattr(self.config.text_config, "attention_dropout", 0.0):
            raise ValueError("model: expected attention_dropout 0 in text_config, as rows are packed for training")
        self.special = special_tokens(self.processor.tokenizer)
        self.train = _split(settings.data, "train", settings.train_pictures)
        self.test = _split(settings.data, "test", settings.test_pictures)
        if self.train.pictures < settings.batch:
            raise ValueError(f"batch: expected at most the {self.train.pictures} pictures, got {settings.batch}")
        self._tower = _weights(
            settings.tower or settings.model, "vision_tower.", "tower" if settings.tower else "model"
        )
        self._decoder = None if settings.init is None else _weights(settings.init, "language_model.", "init")
        self.identity: dict[str, Any] = {
            **settings.compared(),
            "train_pictures": self.train.pictures,
            "test_pictures": self.test.pictures,
            "train": self.train.hash,
            "test": self.test.hash,
            "model": _digest(json.dumps(_essence(self.config), sort_keys=True).encode()),
            "tower": _checksum(self._tower),
            "init": None if self._decoder is None else _checksum(self._decoder),
        }

    def build(self, config: FlashSlothConfig, seed: int) -> FlashSlothForConditionalGeneration:
        """A variant as its training starts: the tower, frozen; the decoder of ``init``; the rest drawn by the seed.

        Each part has random numbers of its own, so parts that two variants share start alike.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = FlashSlothForConditionalGeneration(config)
            for number, name in enumerate(_DRAWN):
                torch.manual_seed(len(_DRAWN) * seed + number)
                part: Any = getattr(model, name, None)
                if part is not None:
                    part.apply((part if name == "language_model" else model)._init_weights)
        model.set_attn_implementation("flashsloth")
        load_part(model.vision_tower, self._tower, "tower")
        if self._decoder is not None:
            load_part(model.language_model, self._decoder, "init")
        model.vision_tower.requires_grad_(False)
        return model.eval()

    @cached_property
    def train_features(self) -> np.ndarray:
        """What the tower makes of the training pictures: float16 ``(pictures, tiles * H*W, Di)``, mapped from disk."""
        return self._features(self.train)

    @cached_property
    def test_features(self) -> np.ndarray:
        return self._features(self.test)

    @cached_property
    def questions(self) -> list[Question]:
        """All questions of the test, in order."""
        return list(self.test.questions(self.special))

    @cached_property
    def typical(self) -> Question:
        """The question of median length, in tokens: flops and times are about it."""
        lengths = [len(self.processor.tokenizer(question.text)["input_ids"]) for question in self.questions]
        return self.questions[int(np.argsort(lengths, kind="stable")[len(lengths) // 2])]

    def pixels(self, split: Split, index: int) -> np.ndarray:
        """float32 ``(tiles, 3, S, S)`` of a picture. Raises ValueError where it cannot be used."""
        sample = LlavaDataset(split.source, self.processor)[index]
        if isinstance(sample, Skipped) or sample.pixel_values is None:
            told = sample.detail if isinstance(sample, Skipped) else "no picture"
            raise ValueError(f"data: {split.source.name(index)}: expected a picture, got {told}")
        return sample.pixel_values

    def _features(self, split: Split) -> np.ndarray:
        config, view = self.config, self.processor.image_processor.to_dict()
        rows, columns = config.vision_grid
        shape = (split.pictures, config.num_tiles * rows * columns, config.vision_config.hidden_size)
        made_of = [self.identity["tower"], self.identity["model"], split.hash, split.pictures, view]
        key = _digest(json.dumps(made_of, sort_keys=True, default=str).encode())
        path = self.folder / FEATURES / f"{split.name}-{key}.npy"
        if not path.exists():
            self._make_features(split, path, shape)
        found: np.ndarray = np.load(path, mmap_mode="r")
        if found.shape != shape or found.dtype != np.float16:
            raise ValueError(f"{path}: expected float16 {shape}, got {found.dtype} {found.shape}; delete it")
        return found

    @torch.inference_mode()
    def _make_features(self, split: Split, path: Path, shape: tuple[int, ...]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(
                f"--out: features of {split.name} need {needed / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f}"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = self.build(self.config, 0)
        model.to(device)
        with replacing(path) as partial:
            out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            for start in range(0, split.pictures, _AT_ONCE):
                chosen = range(start, min(start + _AT_ONCE, split.pictures))
                pixels = torch.from_numpy(np.stack([self.pixels(split, i) for i in chosen]))
                features = model.get_image_features(pixels.to(device)).half().cpu()
                if not bool(features.isfinite().all()):
                    raise ValueError(
                        f"tower: expected features within the range of float16 in {split.name}, got others"
                    )
                out[start : chosen.stop] = features.numpy()
                if chosen.stop == split.pictures or start // _AT_ONCE % 32 == 31:
                    self.tell(f"features of {split.name}: {chosen.stop:,} of {split.pictures:,} pictures")
            out.flush()


def load_part(module: nn.Module, weights: dict[str, Tensor], key: str) -> None:
    """Copy weights into a part of a model, every one by its name.

    Raises:
        ValueError: names that are missing, other shapes or kinds; ``key`` is the setting they come from.
    """
    with torch.no_grad():
        for name, weight in module.named_parameters():  # tied weights once, under their first name
            found = weights.get(name.removeprefix(_NESTED))
            if found is None or found.shape != weight.shape:
                got = "none" if found is None else str(tuple(found.shape))
                raise ValueError(f"{key}: expected {name} of shape {tuple(weight.shape)}, got {got}")
            if not found.is_floating_point():  # quantised: without its scales it is another weight
                raise ValueError(f"{key}: expected {name} in floating point, got {found.dtype}")
            weight.copy_(found)


def _weights(directory: Path, prefix: str, key: str) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint, without the part's name."""
    try:
        tensors = read_tensors(directory)
    except (ValueError, OSError) as error:
        raise type(error)(f"{key}: {error}") from error
    found = {rename(name): tensor for name, tensor in tensors.items()}
    part = {
        name.removeprefix(prefix).removeprefix(_NESTED): tensor
        for name, tensor in found.items()
        if name.startswith(prefix)
    }
    if not part:
        raise ValueError(f"{key}: expected weights named {prefix}... in {directory}, got none")
    return part


def _split(data: Path, name: str, pictures: int | None) -> Split:
    summary, records = data / name / "split.json", data / name / "questions.json"
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"data: expected a folder of `flashsloth data make sight`, got {data} without a whole {name}/split.json"
        ) from None
    source = JsonRecords(records)
    if pictures is not None and pictures > len(source):
        raise ValueError(f"{name}_pictures: expected at most {len(source)}, the pictures of the split, got {pictures}")
    return Split(name, source, pictures or len(source), content)


def _essence(config: FlashSlothConfig) -> dict[str, Any]:
    """What of a configuration counts: no versions, no path."""
    skipped = ("transformers_version", "_name_or_path", "architectures", "dtype")
    return {key: value for key, value in config.to_dict().items() if key not in skipped}


def _checksum(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
