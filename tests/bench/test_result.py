"""What is stored is whole, read back as it was, and never in place of something else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench import result as stored
from bench.result import Result, ResultError, Row, load, make_header, save
from bench.runner import CPU, run_point
from tests.bench.toys import FAST, right, toy


def make_result() -> Result:
    case = toy(right)
    return Result(make_header(quick=True, backends={"spatial_pool": "cpu"}), run_point(case, case.sizes[0], CPU, FAST))


def test_result_survives_a_round_trip(tmp_path: Path) -> None:
    result = make_result()
    path = result.path(tmp_path)
    save(result, path)
    assert load(path) == result
    assert path.parent.name == result.header["slug"]
    assert path.name.endswith(f"-{result.header['commit'][:12]}.json")
    document = json.loads(path.read_text())
    assert (document["schema"], document["version"], document["complete"]) == ("flashsloth-bench", 2, False)
    wanted = (
        "kind device slug cores isa threads driver clocks python torch triton cuda commit dirty date ceilings peers"
    )
    assert set(wanted.split()) <= set(document["header"])
    wanted = "case size dtype mode provider method p20 p50 p80 samples flops bytes share ratios goals max_error missing"
    assert set(wanted.split()) <= set(document["rows"][0])
    assert len(path.read_text().splitlines()) < 60 + len(result.rows)  # a line a row: a diff shows rows


def test_a_report_of_a_gpu_check_is_read_as_a_result(tmp_path: Path) -> None:
    result = make_result()
    path = result.path(tmp_path)
    save(result, path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "schema": "flashsloth-gpu-check", "steps": []}))
    assert load(path) == result
    assert [found for _, found in stored.stored(tmp_path)] == [result]


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_result()
    path = tmp_path / "result.json"
    save(result, path)
    before = path.read_bytes()
    result.rows = result.rows * 2

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(result, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]  # and nothing half written lies around
    save(result, path)
    assert len(load(path).rows) == 2 * len(json.loads(before)["rows"])


HEADER = '{"schema": "flashsloth-bench", "version": 2, '


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "expected a JSON document"),
        ("[]", 'expected "schema": "flashsloth-bench"'),
        ('{"schema": "other"}', 'expected "schema": "flashsloth-bench"'),
        ('{"schema": "flashsloth-bench", "version": 1}', "expected schema version 2, got 1; measure again"),
        (HEADER + '"header": {}}', "expected a header, a list of rows"),
        (HEADER + '"complete": true, "header": {}, "rows": []}', "header: expected commit, date"),
    ],
)
def test_foreign_files_are_named_and_never_overwritten(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ResultError, match=said):
        load(path)
    with pytest.raises(ResultError, match="expected"):
        save(make_result(), path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.pop("p50"), r"row 1: expected the fields of a row, differing: \['p50'\]"),
        (lambda row: row.update(extra=1), r"row 1: expected the fields of a row, differing: \['extra'\]"),
        (lambda row: row.update(goals=[{}]), "row 1: goals: "),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, change: Any, said: str) -> None:
    path = tmp_path / "result.json"
    save(make_result(), path)
    document = json.loads(path.read_text())
    change(document["rows"][1])
    path.write_text(json.dumps(document))
    with pytest.raises(ResultError, match=said):
        load(path)


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    save(make_result(), path)
    other = make_result()
    other.header["date"] = "2001-01-01T00:00:00Z"
    with pytest.raises(ResultError, match="got another result"):
        save(other, path)


def test_results_of_a_folder_come_oldest_first(tmp_path: Path) -> None:
    for year in (2003, 2001, 2002):
        result = make_result()
        result.header["date"] = f"{year}-01-01T00:00:00Z"
        save(result, result.path(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "other.json").write_text('{"schema": "other"}')
    found = stored.stored(tmp_path)
    assert [result.header["date"][:4] for _, result in found] == ["2001", "2002", "2003"]
    assert len(stored.stored(tmp_path, "no-such-device")) == 0
    (tmp_path / "elsewhere" / "older.json").write_text('{"schema": "flashsloth-bench", "version": 1}')
    with pytest.raises(ResultError, match=r"older\.json: expected schema version 2"):
        stored.stored(tmp_path)


def test_shipped_results_can_be_read() -> None:
    for path, result in stored.stored():
        assert path.parent.name == result.header["slug"]
        assert result.rows


def test_rows_of_one_point_are_comparable() -> None:
    row = Row("c", "op", {"b": 1, "a": 2}, "float32", "forward", "x", "wall", 1.0, 1.0)
    same = Row("c", "op", {"a": 2, "b": 1}, "float32", "forward", "y", "wall", 1.0, 1.0)
    assert row.point == same.point
    assert row.key != same.key
    assert row.times is None


def test_slug_is_fit_for_a_directory() -> None:
    assert stored.slug("Intel(R) Xeon(R) CPU @ 2.50GHz 2 threads") == "intel-xeon-cpu-2.50ghz-2-threads"
    assert stored.slug("../..") == "unknown"
