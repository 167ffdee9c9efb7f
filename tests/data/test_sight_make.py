"""``flashsloth data make sight`` on disk: format, repeatability, interruption, errors."""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from flashsloth import cli
from flashsloth.data.sight import KINDS, Settings, make_sight
from flashsloth.data.sight import make as making
from flashsloth.data.sight import write as writing
from flashsloth.data.sight.dice import SPLITS
from flashsloth.data.sight.make import add_arguments, main

COUNTS = {"train": 300, "validation": 20, "test": 30}
SMALL = {"train": 3, "validation": 2, "test": 2}
SOC = Settings(0, 75, True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sight") / "data"
    make_sight(folder, Settings(3), COUNTS)
    return folder


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args(arguments))


def test_records_are_in_llavas_format(made: Path) -> None:
    for split in SPLITS:
        records = json.loads((made / split / "questions.json").read_text())
        assert [r["id"] for r in records] == [f"{split}-{i:06d}" for i in range(COUNTS[split])]
        for record in records:
            with Image.open(made / split / record["image"]) as image:
                assert image.size == (216, 216)
                assert image.mode == "RGB"
                image.load()
            turns = record["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(record["kinds"])
            assert turns[0]["value"].startswith("<image>\n")
            assert not any("<image>" in turn["value"] for turn in turns[1:])
            assert set(record["kinds"]) <= set(KINDS)
        captions = json.loads((made / split / "captions.json").read_text())
        assert [(c["id"], c["image"]) for c in captions] == [(r["id"], r["image"]) for r in records]
        assert all(len(c["conversations"]) == 2 and len(c["conversations"][1]["value"]) > 5 for c in captions)


def test_the_manifest_counts_what_is_there(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert {k: manifest[k] for k in ("data", "version", "seed", "size", "shards")} == {
        "data": "sight", "version": 1, "seed": 3, "size": 216, "shards": False,
    }  # fmt: skip
    for split in SPLITS:
        records = json.loads((made / split / "questions.json").read_text())
        kinds = Counter(kind for record in records for kind in record["kinds"])
        assert manifest["splits"][split]["pictures"] == len(records) == COUNTS[split]
        assert manifest["splits"][split]["kinds"] == dict(kinds)
        assert manifest["splits"][split]["questions"] == kinds.total()
        assert len(list((made / split / "images").rglob("*.*"))) == COUNTS[split]
    with Image.open(made / "preview.png") as preview:
        assert preview.width > 1000


def test_processes_change_nothing(made: Path, tmp_path: Path) -> None:
    make_sight(tmp_path / "two", Settings(3), COUNTS, jobs=2)
    assert _tree(tmp_path / "two") == _tree(made)


def test_more_pictures_leave_the_first_ones_alone(made: Path, tmp_path: Path) -> None:
    manifest = make_sight(tmp_path / "few", Settings(3), SMALL)
    few, many = (json.loads((folder / "train/questions.json").read_text()) for folder in (tmp_path / "few", made))
    assert few == many[: len(few)]
    assert manifest["hash"] != json.loads((made / "manifest.json").read_text())["hash"]


def test_shards_hold_the_same(made: Path, tmp_path: Path) -> None:
    manifest = make_sight(tmp_path / "shards", Settings(3), COUNTS, shards=True, jobs=2)
    assert manifest["hash"] == json.loads((made / "manifest.json").read_text())["hash"]
    for split in SPLITS:
        records = json.loads((made / split / "questions.json").read_text())
        assert json.loads((tmp_path / "shards" / split / "questions.json").read_text()) == records
        with tarfile.open(tmp_path / "shards" / split / "shards/000000.tar") as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        assert len(members) == 2 * len(records)
        for record in records:
            assert members[record["image"]] == (made / split / record["image"]).read_bytes()
            assert json.loads(members[record["image"].rsplit(".", 1)[0] + ".json"]) == record


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_run_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], jobs: int
) -> None:
    monkeypatch.setattr(writing, "_CHUNK", 10)
    counts = {"train": 20, "validation": 30, "test": 5}

    def stop(split: str, done: int, total: int) -> None:
        if split == "validation" and done:
            raise error

    with pytest.raises(error):
        make_sight(tmp_path / "cut", SOC, counts, jobs=jobs, report=stop)
    assert (tmp_path / "cut/train/split.json").is_file()
    assert not (tmp_path / "cut/validation").exists()
    assert not (tmp_path / "cut/manifest.json").exists()
    before = (tmp_path / "cut/train/questions.json").stat().st_mtime_ns
    begun = []
    make_sight(tmp_path / "cut", SOC, counts, report=lambda split, done, total: begun.append(split))
    assert set(begun) == {"validation", "test"}
    assert (tmp_path / "cut/train/questions.json").stat().st_mtime_ns == before
    make_sight(tmp_path / "whole", SOC, counts)
    assert _tree(tmp_path / "cut") == _tree(tmp_path / "whole")


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    make_sight(tmp_path, SOC, SMALL)
    before = _tree(tmp_path)
    make_sight(tmp_path, SOC, SMALL, report=lambda *_: pytest.fail("nothing was to be done"))
    assert _tree(tmp_path) == before


def test_a_full_disk_leaves_whole_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "validation" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"--out: no space left on the disk of .* while writing validation"):
        make_sight(tmp_path, SOC, SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train"]
    monkeypatch.undo()
    make_sight(tmp_path, SOC, SMALL)
    assert (tmp_path / "manifest.json").is_file()


def test_too_small_a_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(OSError, match=r"--out: 53,000 pictures need about 50. MB, .*/new has 1"):
        make_sight(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_a_picture_takes_on_disk_is_what_is_reckoned_with(made: Path) -> None:
    taken = sum(-(-path.stat().st_size // 4096) * 4096 for path in made.rglob("*") if path.name != "preview.png")
    reckoned = making._BYTES[False] * sum(COUNTS.values())
    assert 0.6 * reckoned < taken < 1.1 * reckoned


def test_folders_of_others_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"--out: expected an empty folder or one this command began, .*thesis\.tex"):
        make_sight(tmp_path, SOC, SMALL)
    with pytest.raises(NotADirectoryError, match="--out: expected a folder, got the file"):
        make_sight(tmp_path / "thesis.tex", SOC, SMALL)
    (tmp_path / "other/train").mkdir(parents=True)
    (tmp_path / "other/train/mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="--out: expected an empty folder"):
        make_sight(tmp_path / "other", SOC, SMALL)
    assert sorted(_tree(tmp_path)) == ["other/train/mine.txt", "thesis.tex"]


def test_other_settings_are_not_mixed(tmp_path: Path) -> None:
    make_sight(tmp_path, SOC, SMALL)
    with pytest.raises(ValueError, match=r"train was made with other settings \(seed 0, not 1\)"):
        make_sight(tmp_path, Settings(1, 75, True), SMALL)
    with pytest.raises(ValueError, match=r"\(pictures 3, not 4\)"):
        make_sight(tmp_path, SOC, {**SMALL, "train": 4})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"counts": {**SMALL, "test": 0}}, "--test: expected a whole number of at least 1, got 0"),
        ({"counts": {"train": 3, "test": 3}}, "--validation: expected a whole number of at least 1, got None"),
        ({"counts": {**SMALL, "train": 2.5}}, "--train: expected a whole number of at least 1, got 2.5"),
        ({"counts": SMALL, "jobs": 0}, "--jobs: expected a whole number of at least 1, got 0"),
    ],
)
def test_numbers_that_cannot_be(tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sight(tmp_path / "new", SOC, **given)
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    few = ("--train", "4", "--validation", "2", "--test", "2", "--jobs", "1")
    assert _run("--out", str(out), *few, "--sort-of-clevr", "--seed", "5") == 0
    printed = capsys.readouterr()
    assert "train: 4 pictures, 80 questions" in printed.out
    assert "train: 4 of 4 pictures" in printed.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["data"], manifest["seed"], manifest["size"]) == ("sort-of-clevr", 5, 75)
    assert manifest["hash"] in printed.out
    assert not (out / "train/captions.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "0"), "argument --train: expected a whole number of at least 1, got '0'"),
        (("--seed", "-1"), "argument --seed: expected"),
        (("--jobs", "two"), "argument --jobs: expected a whole number of at least 1, got 'two'"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit):
        _run("--out", str(tmp_path), *arguments)
    assert message in capsys.readouterr().err


def test_the_published_size_stands(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--size: expected 75"):
        _run("--out", str(tmp_path / "new"), "--sort-of-clevr", "--size", "128")


def test_the_command_line_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sight"
    counts = ["--train", "3", "--validation", "1", "--test", "2", "--jobs", "1"]
    assert cli.main(["data", "make", "sight", "--out", str(out), *counts]) == 0
    assert "train: 3 pictures" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["splits"]["test"]["pictures"] == 2
    assert cli.main(["data", "make", "sight", "--out", str(out / "manifest.json"), *counts]) == 2
    assert "flashsloth: " in capsys.readouterr().err
