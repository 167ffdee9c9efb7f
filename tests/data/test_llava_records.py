"""Where records come from: JSON with folders or tar shards, webdataset shards, and what is wrong with them."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from flashsloth.data.broken import BrokenRecord
from flashsloth.data.records import (
    FolderPictures,
    JoinedRecords,
    JsonRecords,
    RecordSource,
    TarPictures,
    TarRecords,
    Texts,
    open_records,
)
from tests.data.llava_cases import picture, record, write_folder, write_json, write_shards, write_tar


def content(source: RecordSource) -> list[tuple[object, bytes | None]]:
    return [(source.record(i), source.picture(i, source.record(i))) for i in range(len(source))]


def reason(source: RecordSource, index: int) -> str:
    with pytest.raises(BrokenRecord) as error:
        source.picture(index, source.record(index))
    return error.value.reason


def test_all_sources_hold_the_same(tmp_path: Path) -> None:
    records = write_folder(tmp_path / "images", 12)
    file = write_json(tmp_path / "train.json", records)
    lines = tmp_path / "train.jsonl"
    lines.write_text("\n".join(json.dumps(one) for one in records) + "\n\n")
    shards = write_shards(tmp_path / "shards", records, tmp_path / "images", 5)
    pictures = write_tar(
        tmp_path / "pictures.tar", [(f"./{p.name}", p.read_bytes()) for p in (tmp_path / "images").iterdir()]
    )
    wanted = content(open_records(file, tmp_path / "images"))
    assert [one for one, _ in wanted] == records
    assert [image for _, image in wanted] == [None if i % 5 == 4 else picture(i) for i in range(12)]
    assert content(open_records(lines, tmp_path / "images")) == wanted
    assert content(open_records(shards)) == wanted
    assert content(open_records(file, pictures)) == wanted
    assert content(open_records([file, *shards], tmp_path / "images")) == wanted + wanted
    source = open_records(shards)
    assert source.shards.tolist() == [0, 5, 10]
    assert content(pickle.loads(pickle.dumps(source))) == wanted  # as to a worker that is not forked


def test_names_say_where_a_record_is(tmp_path: Path) -> None:
    records = write_folder(tmp_path / "images", 4)
    first, second = write_json(tmp_path / "a.json", records[:3]), write_json(tmp_path / "b.json", records[3:])
    shards = write_shards(tmp_path, records, tmp_path / "images", 2)
    source = JoinedRecords([JsonRecords([first, second], FolderPictures(tmp_path / "images")), TarRecords(shards)])
    wanted = ["a.json[0]", "a.json[1]", "a.json[2]", "b.json[0]"]
    assert [source.name(i) for i in range(8)] == wanted + [f"{i // 2:04}.tar:{i:06}" for i in range(4)]
    assert source.shards.tolist() == [0, 1, 2, 3, 4, 6]


def test_images_are_beside_their_file_by_default(tmp_path: Path) -> None:
    records = write_folder(tmp_path, 2)
    assert content(open_records(write_json(tmp_path / "train.json", records)))[1][1] == picture(1)


def test_sizes_are_those_of_the_text(tmp_path: Path) -> None:
    long, short = record(answer="é" * 500), record()
    source = open_records(write_json(tmp_path / "train.json", [short, long]))
    added = 1000 - len("A cat.")  # bytes of UTF-8, whatever the file's escapes
    assert (np.diff(source.sizes) == added).all()
    tar = open_records(write_tar(tmp_path / "a.tar", [("0.json", b"{}"), ("1.json", b"[1, 2]")]))
    assert tar.sizes.tolist() == [2, 6]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("nowhere.png", "missing_image"),
        ("train.json/0.png", "missing_image"),
        ("../secret.png", "image_path"),
        ("a/../../secret.png", "image_path"),
        ("/etc/hostname", "image_path"),
        ("a\0.png", "image_path"),
        ("a\ud800.png", "image_path"),
        ("a" * 300, "unreadable_image"),
        ("", "image_path"),
        (7, "image_path"),
        ("folder", "unreadable_image"),
        (["0.png", "1.png"], "several_images"),
    ],
)
def test_images_that_cannot_be_had(tmp_path: Path, name: object, wanted: str) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(picture(0))
    assert reason(open_records(write_json(root / "train.json", [record(image=name)])), 0) == wanted


def test_an_image_may_be_null_or_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    records = [record(image=None), record(image=[]), record(image=["0.png"])]
    assert [image for _, image in content(open_records(write_json(tmp_path / "t.json", records)))] == [
        None,
        None,
        picture(0),
    ]


def test_a_bad_line_is_one_bad_record(tmp_path: Path) -> None:
    lines = tmp_path / "train.jsonl"
    lines.write_bytes(b'{"a": 1}\n{"a": \n\xff\xfe\n' + b"[" * 100_000 + b"\n[1]\n")
    source = open_records(lines)
    assert len(source) == 5
    assert source.record(0) == {"a": 1}
    assert [reason(source, i) for i in (1, 2, 3)] == ["malformed_json"] * 3
    assert source.record(4) == [1]


def test_shards_with_something_missing(tmp_path: Path) -> None:
    text = json.dumps(record(image="x.png")).encode()
    members = [
        ("a/1.png", picture(1)),  # no record
        ("a/2.json", text),  # no image
        ("a/3.seg.png", picture(3)),  # neither: another kind of file
        ("b/2.json", b"{"),
        ("b/3.PNG", picture(4)),
        ("b/3.json", text),
    ]
    source = TarRecords(write_tar(tmp_path / "a.tar", members))
    assert [source.name(i) for i in range(4)] == ["a.tar:a/1", "a.tar:a/2", "a.tar:b/2", "a.tar:b/3"]
    assert [reason(source, i) for i in range(3)] == ["malformed_record", "missing_image", "malformed_json"]
    assert source.picture(3, source.record(3)) == picture(4)


@pytest.mark.parametrize("cut", ["within a member", "within a header", "garbage"])
def test_a_damaged_shard_loses_its_end_and_says_so(tmp_path: Path, cut: str) -> None:
    records = write_folder(tmp_path / "images", 4)
    (shard,) = write_shards(tmp_path, records, tmp_path / "images", 4)
    whole = shard.read_bytes()
    place = whole.index(b"000003.png")  # the header of the last sample's first member
    damaged = {"within a member": whole[: place + 600], "within a header": whole[: place + 200]}
    shard.write_bytes(damaged.get(cut, whole[:place] + b"\xff" * 2048))
    source = TarRecords([shard])
    assert [source.record(i) for i in range(3)] == records[:3]
    assert len(source) == 4
    assert reason(source, 3) == "damaged_shard"
    assert source.name(3) == "0000.tar:(end)"


def test_a_shard_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    records = write_folder(tmp_path / "images", 2)
    (shard,) = write_shards(tmp_path, records, tmp_path / "images", 2)
    source = TarRecords([shard])
    shard.write_bytes(shard.read_bytes()[:700])
    assert reason(source, 1) == "damaged_shard"
    shard.unlink()
    assert reason(source, 0) == "damaged_shard"


def test_what_is_no_source_is_refused_by_name(tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    shard = write_tar(tmp_path / "good.tar", [("0.json", b"{}")])
    bad = [
        (tmp_path / "none.json", FileNotFoundError, "data: expected a path that exists"),
        (write("a.csv", b""), ValueError, r"data: expected \.json, \.jsonl or \.tar"),
        ([], ValueError, "data: expected at least one path"),
        (write("object.json", b"{}"), ValueError, "object.json: expected a JSON list of records, got dict"),
        (write("cut.json", b'[{"a": 1'), ValueError, "cut.json: expected a JSON list of records: "),
        (write("empty.json", b"[]"), ValueError, "expected at least one record"),
        (write("no.tar", b"this is no tar" * 99), ValueError, "no.tar: expected an uncompressed tar"),
        (write("gz.tar", gzip.compress(shard.read_bytes())), ValueError, "gz.tar: expected an uncompressed tar"),
        (write("zero.tar", b""), ValueError, "zero.tar"),
        (write_tar(tmp_path / "other.tar", [("readme.txt", b"hi")]), ValueError, "shards: expected samples, got none"),
    ]
    for data, error, message in bad:
        with pytest.raises(error, match=message):
            open_records(data)
    with pytest.raises(NotADirectoryError, match="images: expected a folder"):
        FolderPictures(tmp_path / "good.tar")
    with pytest.raises(BrokenRecord, match="missing_image"):
        TarPictures(shard).read("a.png")


def test_texts_are_what_was_put_in() -> None:
    texts = [b"", b"abc", b"", b"\x00\xff"]
    packed = Texts(texts)
    assert [packed[i] for i in range(4)] == texts
    assert len(pickle.loads(pickle.dumps(packed))) == 4
