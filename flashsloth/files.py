"""Files that are whole whenever they are there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, which takes its place at the end; an error leaves ``path`` as it was.

    The content is on the disk before the name changes, so a power cut leaves the old file or the new one.
    """
    path = path.resolve()  # what a link points to is replaced, not the link
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # libraries go by the suffix
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by JSON, ending in a newline."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
