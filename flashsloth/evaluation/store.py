"""Answers on disk as they come, one JSON object a line, so that a run that was killed goes on where it was.

The first line says what was asked of what: a file of another model, task or setting is refused. A line that was cut
short by the end of its process is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashsloth.data.broken import REASONS, Skipped
from flashsloth.evaluation.running import Result
from flashsloth.evaluation.tasks import Task

VERSION = 1
_WEIGHED = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")  # what makes a checkpoint answer as it does


def model_fingerprint(directory: str | os.PathLike[str]) -> str:
    """SHA-256 of a checkpoint's weights, configuration and tokenizer, in hexadecimal digits."""
    total = hashlib.sha256()
    for path in sorted(Path(directory).rglob("*")):
        if path.suffix in _WEIGHED and path.is_file():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            total.update(f"{path.relative_to(directory)} {digest.hexdigest()}\n".encode())
    return total.hexdigest()


class Store:
    """The lines of a run. Use as a context manager: the file is open within.

    Args:
        path: the file; its folder must be there.
        about: what must be the same for answers to be of one run: JSON values by name.
        resume: go on with a file that is there; otherwise there must be none.

    Raises:
        FileExistsError: a file is there and ``resume`` is not asked for.
        ValueError: it is of another run, or damaged before its last line; with what differs.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self._about = {"version": VERSION, **about}
        self._lines: list[dict[str, Any]] = []
        self._length = 0  # bytes of whole lines
        if path.exists():
            if not resume:
                raise FileExistsError(f"--out: {path} is there already; --resume goes on with it")
            self._read()

    def known(self, task: Task) -> Result:
        """What earlier runs found out.

        Raises:
            ValueError: a line that is not one of ours.
        """
        result = Result(task)
        for number, line in enumerate(self._lines[1:], 2):
            try:
                if "skipped" in line:
                    one = Skipped(**line["skipped"])
                    if one.reason not in REASONS:
                        raise KeyError(one.reason)
                    result.skipped.append(one)
                elif isinstance(line["got"], str) and 0 <= line["question"] < len(task.questions):
                    result.answers[line["question"]] = line["got"]
                else:
                    raise KeyError("question")
            except (KeyError, TypeError) as error:
                raise ValueError(f"--resume: {self.path} is damaged in line {number}: {error!r}") from error
        return result

    def __enter__(self) -> Store:
        new = not self._length
        self._file = self.path.open("xb" if not self.path.exists() else "r+b")
        self._file.seek(self._length)
        self._file.truncate()
        if new:
            self._write([self._about])
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def add(self, answers: Mapping[int, str], skipped: list[Skipped]) -> None:
        """Append a batch. It is with the operating system when this returns, so it survives a kill."""
        lines: list[dict[str, Any]] = [{"skipped": asdict(one)} for one in skipped]
        self._write([*lines, *({"question": i, "got": text} for i, text in answers.items())])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        # Escaped to ASCII: half a letter of a model's bytes, or of a record, is no reason to stop.
        self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file.flush()

    def _read(self) -> None:
        whole = self.path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"--resume: {self.path} is damaged in line {number}: {error}") from error
            if not isinstance(line, dict):
                raise ValueError(f"--resume: {self.path} is damaged in line {number}: expected an object")
            self._lines.append(line)
        self._length = len(whole)
        if not self._lines:
            return
        found = self._lines[0]
        if "version" not in found or "task" not in found:
            raise ValueError(f"--resume: expected answers that `flashsloth eval` wrote, got {self.path}")
        names = sorted({*found, *self._about})
        differing = [name for name in names if found.get(name) != self._about.get(name)]
        if differing:
            changes = ", ".join(f"{n} {found.get(n)!s:.60}, now {self._about.get(n)!s:.60}" for n in differing)
            raise ValueError(f"--resume: {self.path} is of another run ({changes}); choose another --out")
