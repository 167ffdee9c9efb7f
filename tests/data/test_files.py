"""Files that are whole whenever they are there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flashsloth.files import replacing, write_json


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError, match="half"):
        _write_half(path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    write_json(tmp_path / "real.json", 1)
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", 2)
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == 2


def _write_half(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("{")
        assert partial.suffix == path.suffix
        raise RuntimeError("half")
