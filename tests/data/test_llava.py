"""A record to a training row: prompt, labels, spans, pixel values, cutting, and every way a record can be broken."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.data.broken import REASONS, Skipped
from flashsloth.data.collate import Collator, take_report
from flashsloth.data.llava import LlavaDataset, cut_row, decode
from flashsloth.data.records import JsonRecords
from flashsloth.encoding import IGNORE_INDEX
from flashsloth.processing import FlashSlothProcessor
from tests.data.llava_cases import dataset_of, picture, record, sample_of, tiny_dataset, write_json
from tests.model.prompting import EOS, LEARNABLE, PAD, write_official
from tests.support import ROOT, Golden, golden_path


def answers(dataset: LlavaDataset, row: Any) -> str:
    return dataset.processor.decode([label for label in row.labels if label != IGNORE_INDEX])


def asked(dataset: LlavaDataset, row: Any) -> list[str]:
    return [dataset.processor.decode(row.ids[start:end]) for start, end in row.spans]


# -------------------------------------------------------------------- golden


def test_a_batch_is_the_golden_training_case(tmp_path: Path) -> None:
    """From files to ids, mask, labels, spans and pixel values, and through the model to the official loss."""
    golden, source = Golden("model_b_train"), golden_path("model_weights")
    meta = json.loads((source / "meta.json").read_text())
    write_official(tmp_path, full=True, **meta["llm_config"])
    (tmp_path / "vision_tower").mkdir()
    tower = {"model_type": "siglip_vision_model", **meta["siglip_config"]}
    (tmp_path / "vision_tower" / "config.json").write_text(json.dumps(tower))
    processor = FlashSlothProcessor.from_pretrained(tmp_path)

    images = load_file(golden_path("model_images") / "io.safetensors")["images_u8"].numpy()
    special = {-200: "<image>", LEARNABLE: "<learnable>", EOS: "</s>", PAD: ""}
    records = []
    for i, (number, roll) in enumerate(golden.meta["images_recipe"]):
        Image.fromarray(np.roll(images[number], roll, axis=1)).save(tmp_path / f"{i}.png")
        text = "".join(special.get(t) or processor.decode([t]) for t in golden.io["input_ids"][i].tolist() if t != PAD)
        turns = text.split("USER: ", 1)[1].removesuffix("</s>").split("</s>USER: ")
        records.append(
            record(*(part for turn in turns for part in turn.split(" <learnable> ASSISTANT: ")), image=f"{i}.png")
        )
    dataset = LlavaDataset(JsonRecords(write_json(tmp_path / "train.json", records)), processor)
    batch = Collator.of(dataset)([dataset[0], dataset[1]])
    report = take_report(batch)

    assert report is not None
    assert report.skipped == ()
    assert torch.equal(batch["labels"], golden.io["expanded_labels"])
    assert torch.equal(batch["attention_mask"], golden.io["expanded_attention_mask"])
    spans = [[list(span) for span in row] for row in golden.meta["question_token_ranges"]]
    assert batch["question_spans"].tolist() == [spans[0] + [[-1, -1]], spans[1]]
    plain = torch.from_numpy(np.stack([np.roll(images[k], r, axis=1) for k, r in golden.meta["images_recipe"]]))
    wanted = (plain.permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    assert (batch["pixel_values"][:, 0].double() - wanted).abs().max() <= 6e-8

    weights = {name: tensor.float() for name, tensor in load_file(source / "weights.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    model = FlashSlothForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert abs(model(**batch).loss.item() - golden.io["loss"].item()) <= 2e-5


# -------------------------------------------------------------------- rows


def test_several_turns(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(3))
    dataset = dataset_of(
        tmp_path, [record("<image>\nWho?", "Tim.", "And where?", "There.", "Why?", "No.", image="a.png")]
    )
    sample = sample_of(dataset)
    processor = dataset.processor
    assert sample.row.ids.count(processor.image_token_id) == 4
    assert sample.row.ids.count(processor.learnable_token_id) == 3 * 9
    assert answers(dataset, sample.row) == " Tim.</s> There.</s> No.</s>"
    assert [text.strip() for text in asked(dataset, sample.row)] == ["Who?", "And where?", "Why?"]
    for token, label in zip(sample.row.ids, sample.row.labels, strict=True):
        assert label in (IGNORE_INDEX, token)
        assert label == IGNORE_INDEX or token not in (processor.image_token_id, processor.learnable_token_id)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(sample.pixel_values, processor.image_processor(image)["pixel_values"][0])


def test_a_row_is_what_the_processor_makes(tmp_path: Path) -> None:
    """Also with the mark behind the question, in a later turn, and in text alone."""
    (tmp_path / "a.jpg").write_bytes(picture(1, "JPEG"))
    records = [
        record("What is it?\n<image>", "A dog.", "Sure?", "Yes.", image="a.jpg"),
        record("Hello.", "Hi.", "<image>\nAnd this?", "A cat.", image="a.jpg"),
        record("Two plus two?", "4", id="x"),
        record("<image>", "", image="a.jpg"),
    ]
    dataset = dataset_of(tmp_path, records)
    batch = Collator.of(dataset)([dataset[i] for i in range(4)])
    take_report(batch)
    pictures = [str(tmp_path / "a.jpg")] * 3
    wanted = dataset.processor.encode_dialogue([one["conversations"] for one in records], images=pictures)
    assert batch.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(batch[name], wanted[name]), name


def test_captions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    records = [
        record("Describe it.\n<image>", "a red car", image="a.png"),
        record("Say a.", "a"),
        record(answer=" ", image="a.png"),
        record("<image>", "a", "b", "c", image="a.png"),
    ]
    dataset = dataset_of(tmp_path, records, captions=True)
    batch = Collator.of(dataset)([dataset[i] for i in range(4)])
    report = take_report(batch)
    wanted = dataset.processor.encode_caption("a red car", images=str(tmp_path / "a.png"))
    for name in wanted:
        assert torch.equal(batch[name], wanted[name]), name
    assert report is not None
    assert [(one.index, one.reason) for one in report.skipped] == [(i, "not_a_caption") for i in (1, 2, 3)]


@pytest.mark.parametrize(("hd", "tiles"), [(True, 5), (False, 1), (None, 1)])
def test_tiles(tmp_path: Path, hd: bool | None, tiles: int) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    dataset = dataset_of(tmp_path, [record(image="a.png")], image_hd=hd)
    for sample in (sample_of(dataset), dataset.blank()):
        assert sample.pixel_values is not None
        assert sample.pixel_values.shape == (tiles, 3, 42, 42)
        assert sample.row.ids.count(dataset.processor.image_token_id) == 4 * tiles


def test_a_leading_answer_and_a_last_question_are_left_out(tmp_path: Path) -> None:
    turns = record("Who?", "Tim.")["conversations"]
    lead, last = {"from": "gpt", "value": "Ask me."}, {"from": "human", "value": "And?"}
    dataset = dataset_of(tmp_path, [{"conversations": turns}, {"conversations": [lead, *turns, last]}])
    assert sample_of(dataset, 1).row == sample_of(dataset, 0).row


# -------------------------------------------------------------------- the maximal length


def test_every_length_cuts_between_placeholders(tmp_path: Path) -> None:
    """Whatever the length: whole images and groups, spans to match, an answer at the end, the same tokens before."""
    (tmp_path / "a.png").write_bytes(picture(1))
    records = [
        record("<image>\nWho?", "Tim.", "Where?", "There.", image="a.png"),
        record("Hello.", "Hi.", "<image>\nAnd this?", "A cat.", image="a.png"),
    ]
    dataset = dataset_of(tmp_path, records)
    image, query = dataset.processor.image_token_id, dataset.processor.learnable_token_id
    for index in range(2):
        whole = sample_of(dataset, index)
        first = next(i for i, label in enumerate(whole.row.labels) if label != IGNORE_INDEX)
        lengths = set()
        for length in range(1, len(whole.row.ids) + 2):
            item = tiny_dataset(dataset.source, max_length=length)[index]
            if length <= first:
                assert isinstance(item, Skipped)
                assert item.reason == "too_long"
                continue
            assert not isinstance(item, Skipped)
            row, kept = item.row, len(item.row.ids)
            assert kept <= length
            assert item.cut == len(whole.row.ids) - kept
            assert row.ids == whole.row.ids[:kept]
            assert row.labels == whole.row.labels[:kept]
            assert row.labels[-1] != IGNORE_INDEX
            assert row.ids.count(image) in (0, 4)
            assert (item.pixel_values is not None) == (image in row.ids)
            assert row.ids.count(query) == 9 * len(row.spans)
            assert row.spans == whole.row.spans[: len(row.spans)]
            lengths.add((row.ids.count(image), len(row.spans)))
        assert lengths == ({(4, 1), (4, 2)}, {(0, 1), (4, 2)})[index]


def test_a_row_that_fits_is_left_as_it_is(tmp_path: Path) -> None:
    row = sample_of(dataset_of(tmp_path, [record("Who?", "Tim.")])).row
    assert cut_row(row, len(row.ids), 0, 1) is row


# -------------------------------------------------------------------- broken records


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def turn(role: Any, value: Any) -> dict[str, Any]:
    return {"from": role, "value": value}


BROKEN_RECORDS: list[tuple[str, Any]] = [
    ("malformed_record", "no object"),
    ("malformed_record", None),
    ("malformed_record", {"image": "good.png"}),
    ("malformed_record", {"conversations": "text"}),
    ("malformed_record", {"conversations": ["text"]}),
    ("malformed_record", {"conversations": [turn("human", 7), turn("gpt", "a")]}),
    ("malformed_record", {"conversations": [turn(["human"], "q"), turn("gpt", "a")]}),
    ("malformed_record", {"conversations": [{"value": "q"}]}),
    ("empty_conversation", {"conversations": []}),
    ("unknown_role", {"conversations": [turn("system", "Be nice."), turn("human", "q"), turn("gpt", "a")]}),
    ("wrong_order", {"conversations": [turn("human", "q"), turn("human", "q"), turn("gpt", "a")]}),
    ("wrong_order", {"conversations": [turn("human", "q"), turn("gpt", "a"), turn("gpt", "a")]}),
    ("no_answer", {"conversations": [turn("human", "q")]}),
    ("no_answer", {"conversations": [turn("gpt", "a")]}),
    ("special_token", record("q</s>", "a")),
    ("special_token", record("<learnable>", "a")),
    ("special_token", record("q", "<image>")),
    ("special_token", record("<lear<image>nable>", "a", image="good.png")),
    ("bad_text", record("\ud800", "a")),
    ("too_many_marks", record("<image>\nq", "a")),
    ("too_many_marks", record("<image><image>\nq", "a", image="good.png")),
    ("too_many_marks", record("<image>q", "a", "<image>q", "a", image="good.png")),
    ("unmarked_image", record("q", "a", image="good.png")),
    ("several_images", record(image=["good.png", "good.png"])),
    ("image_path", record(image="../good.png")),
    ("missing_image", record(image="none.png")),
    ("unreadable_image", record(image="folder")),
    ("not_an_image", record(image="text.png")),
    ("not_an_image", record(image="empty.png")),
    ("not_an_image", record(image="page.eps")),
    ("image_too_large", record(image="bomb.png")),
    ("damaged_image", record(image="cut.jpg")),
    ("damaged_image", record(image="cut.png")),
    ("damaged_image", record(image="flipped.png")),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> LlavaDataset:
    folder = tmp_path_factory.mktemp("broken")
    good, flipped = picture(1, width=90, height=80), bytearray(picture(1, width=90, height=80))
    flipped[len(flipped) // 2] ^= 0xFF
    files = {
        "good.png": good,
        "text.png": b"<html>404 not found</html>",
        "empty.png": b"",
        "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "bomb.png": bomb(),
        "cut.jpg": picture(1, "JPEG", 90, 80)[:2000],
        "cut.png": good[:900],
        "flipped.png": bytes(flipped),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder").mkdir()
    return dataset_of(folder, [one for _, one in BROKEN_RECORDS])


@pytest.mark.parametrize("index", range(len(BROKEN_RECORDS)), ids=lambda i: f"{i}-{BROKEN_RECORDS[i][0]}")
def test_a_broken_record_is_skipped(broken: LlavaDataset, index: int) -> None:
    item = broken[index]
    assert isinstance(item, Skipped)
    assert (item.index, item.name) == (index, f"train.json[{index}]")
    assert item.reason == BROKEN_RECORDS[index][0]
    assert item.detail
    json.dumps(item.detail).encode()


def test_every_reason_is_tested() -> None:
    elsewhere = {"malformed_json", "damaged_shard", "not_a_caption", "too_long"}
    assert {reason for reason, _ in BROKEN_RECORDS} | elsewhere == set(REASONS)


def test_every_reason_is_documented() -> None:
    text = (ROOT / "docs" / "training-data.md").read_text()
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)) == REASONS


def test_pixels_are_limited(tmp_path: Path) -> None:
    assert decode(picture(1, width=10, height=10), 100).size == (10, 10)
    (tmp_path / "a.png").write_bytes(picture(1, width=10, height=10))
    item = dataset_of(tmp_path, [record(image="a.png")], max_pixels=99)[0]
    assert isinstance(item, Skipped)
    assert item.reason == "image_too_large"
    for option in ({"max_pixels": 0}, {"max_length": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: expected 1 or more, got 0"):
            dataset_of(tmp_path, [record(image="a.png")], **option)


def test_a_mistake_of_ours_is_no_broken_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    dataset = dataset_of(tmp_path, [record(image="a.png")])
    monkeypatch.setattr(dataset.processor.image_processor, "image_size", "wrong")
    with pytest.raises(TypeError):
        dataset[0]
