"""A process that times one revision of the ops, and the line protocol by which it is told what to do.

The parent writes one JSON object a line to the worker's standard input and reads one a line in answer:

    (start)                                                       -> {"ops": folder of flashsloth_ops, "device": kind}
    {"do": "prepare", "case": ..., "size": {...}, "provider": ...} -> {"missing": ..., "failure": ..., "seconds": one call}
    {"do": "round", "repeats": 3}                                  -> {"seconds": mean of one call}

What goes wrong inside a request comes back as {"error": text}. Closing its input ends a worker. Whatever ops or torch
print goes to standard error, so that it cannot be taken for an answer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

LAST_LINES = 12  # of a dead worker's standard error, quoted in the message
START_SECONDS, PREPARE_SECONDS, ROUND_SECONDS = 180.0, 900.0, 300.0


class WorkerError(RuntimeError):
    """A worker died, did not answer in time, or answered something else than was agreed."""


class Worker:
    """The parent's end. Used as a context manager: the process is gone afterwards, whatever happened.

    Attributes:
        name: in messages.
    """

    def __init__(self, name: str, command: Sequence[str], *, folder: Path, log: Path, threads: int | None = None) -> None:
        self.name, self.log = name, log
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("wb") as errors:
            # In a session of its own: Ctrl-C reaches the parent alone, which then ends the workers in order.
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def started(self, timeout: float = START_SECONDS) -> dict[str, Any]:
        """What the worker says of itself. Raises WorkerError."""
        return self._answer("start", timeout)

    def prepare(
        self, case: str, size: dict[str, int], provider: str, timeout: float = PREPARE_SECONDS
    ) -> dict[str, Any]:
        """Make inputs, check the result, warm up. Raises WorkerError."""
        return self._ask({"do": "prepare", "case": case, "size": size, "provider": provider}, timeout)

    def round(self, repeats: int, timeout: float = ROUND_SECONDS) -> float:
        """Seconds of one call, the mean of ``repeats``. Raises WorkerError."""
        seconds = self._ask({"do": "round", "repeats": repeats}, timeout).get("seconds")
        if not isinstance(seconds, float) or not seconds > 0:
            raise WorkerError(f"{self.name}: round: expected seconds, got {seconds!r}")
        return seconds

    def close(self) -> None:
        """End the process: by closing its input, and by force if that does not do."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            try:
                self.process.stdin.close()
                self.process.wait(2)
            except (OSError, subprocess.TimeoutExpired):
                self.process.kill()
        self.process.wait()

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            raise self._dead(request["do"]) from None
        return self._answer(request["do"], timeout)

    def _answer(self, to: str, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.process.kill()
            raise WorkerError(f"{self.name}: {to}: no answer within {timeout:.0f} s{self._last_lines()}") from None
        if not line:
            raise self._dead(to)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise WorkerError(f"{self.name}: {to}: expected a JSON object, got {line.strip()[:200]!r}")
        if "error" in answer:
            raise WorkerError(f"{self.name}: {to}: {answer['error']}")
        return answer

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")  # the end: it answers no more

    def _dead(self, to: str) -> WorkerError:
        try:
            code: int | str = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = "none yet"
        return WorkerError(f"{self.name}: {to}: the worker died, exit code {code}{self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
        return "; its last lines:\n  " + "\n  ".join(lines) if lines else "; it said nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    """The worker's end: answers requests until its input is closed."""
    parser = argparse.ArgumentParser(prog="python -m bench.worker", description=__doc__)
    parser.add_argument("--cases", default="bench.cases", help="module whose CASES it knows")
    options = parser.parse_args(arguments)
    # A copy of standard output for answers alone; then everything that prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import flashsloth_ops
    from bench.worker import Timed  # importing it needs torch and the ops, which the parent need not load

    timed = Timed(importlib.import_module(options.cases).CASES)
    _say(answers, {"ops": str(Path(flashsloth_ops.__file__ or "").resolve().parent), "device": timed.device})
    return serve(timed.answer, sys.stdin, answers)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]], requests: TextIO, answers: TextIO) -> int:
    for line in requests:
        try:
            _say(answers, answer(json.loads(line)))
        except Exception as error:  # the parent shall hear of it, and may ask something else
            _say(answers, {"error": f"{type(error).__name__}: {error}"})
    return 0


def _say(answers: TextIO, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()
