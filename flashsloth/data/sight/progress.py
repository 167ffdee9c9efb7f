"""How far a run is, on standard error: a line that renews itself on a terminal, a line each tenth elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO


class Progress:
    """``with Progress() as progress: make_sight(..., report=progress.report)``"""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._split, self._started, self._tenth = "", 0.0, 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._terminal and self._split:
            print(file=self._stream)

    def report(self, split: str, done: int, total: int) -> None:
        now = time.monotonic()
        if split != self._split:
            if self._terminal and self._split:
                print(file=self._stream)
            self._split, self._started, self._tenth = split, now, 0
        tenth = 10 * done // total
        if not self._terminal and tenth == self._tenth:
            return
        self._tenth = tenth
        seconds = now - self._started
        rate = done / seconds if done and seconds > 0 else 0.0
        left = f", {rate:,.0f} a second, {(total - done) / rate:,.0f} s left" if rate else ""
        line = f"{split}: {done:,} of {total:,} pictures{left}"
        print(
            f"\r{line:<78}" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=self._stream,
            flush=True,
        )
