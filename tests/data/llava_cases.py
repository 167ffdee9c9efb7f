"""What the tests of training data share: small pictures, records, folders and shards of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flashsloth.data.llava import LlavaDataset, Sample
from flashsloth.data.records import JsonRecords, RecordSource
from flashsloth.tiny import processor_for, tiny_config


def picture(seed: int, kind: str = "PNG", width: int = 12, height: int = 9) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def record(question: str = "<image>\nWhat is it?", answer: str = "A cat.", *more: str, **fields: Any) -> dict[str, Any]:
    """A record of LLaVA's format; ``more`` are further questions and answers."""
    texts = [question, answer, *more]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def write_folder(folder: Path, count: int) -> list[dict[str, Any]]:
    """Pictures ``0.png`` ... in ``folder`` and the records about them, every fifth of text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        if i % 5 == 4:
            records.append(record(f"Say {i}.", f"It is {i}."))
            continue
        (folder / f"{i}.png").write_bytes(picture(i))
        records.append(record(f"<image>\nNumber {i}?", "Yes. " * (1 + i % 7), image=f"{i}.png"))
    return records


def write_json(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_shards(folder: Path, records: list[dict[str, Any]], images: Path, per_shard: int) -> list[Path]:
    """The same records as webdataset shards."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, len(records), per_shard):
        members = []
        for i, one in enumerate(records[start : start + per_shard], start):
            if "image" in one:
                members.append((f"{i:06}.png", (images / one["image"]).read_bytes()))
            members.append((f"{i:06}.json", json.dumps(one).encode()))
        shards.append(write_tar(folder / f"{len(shards):04}.tar", members))
    return shards


def tiny_dataset(source: RecordSource, **options: Any) -> LlavaDataset:
    """A byte tokenizer, one tile of 42 x 42 pixels, 4 visual tokens and 9 queries."""
    return LlavaDataset(source, processor_for(tiny_config()), **options)


def dataset_of(folder: Path, records: list[Any], **options: Any) -> LlavaDataset:
    folder.mkdir(parents=True, exist_ok=True)
    return tiny_dataset(JsonRecords(write_json(folder / "train.json", records)), **options)


def sample_of(dataset: LlavaDataset, index: int = 0) -> Sample:
    item = dataset[index]
    assert isinstance(item, Sample), item
    return item
