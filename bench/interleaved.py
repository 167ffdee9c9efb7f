"""Two workers, one a revision, timed in turns: the parent's end of the protocol of :mod:`bench.worker`."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bench.slowdown import Key, Line
from bench.statistics import Estimate, paired, repeated

LAST_LINES = 12  # of a dead worker's standard error, quoted in the message


class Limits(NamedTuple):
    """Seconds after which a worker hangs: to import everything; to check a result and warm up; for one round."""

    start: float = 180.0
    prepare: float = 900.0
    round: float = 300.0


class WorkerError(RuntimeError):
    """A worker died, did not answer in time, or answered something else than was agreed."""


class Worker:
    """The parent's end. Used as a context manager: the process is gone afterwards, whatever happened.

    ``name``: in messages. ``folder``: where it runs and the only entry of its PYTHONPATH; its log is written there.
    ``ops``: the folder of flashsloth_ops it must have found, None for any.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        folder: Path,
        ops: Path | None = None,
        limits: Limits = Limits(),  # noqa: B008 (immutable)
    ) -> None:
        self.name, self.ops, self.limits, self.log = name, ops, limits, folder / "worker.log"
        with self.log.open("wb") as errors:
            # In a session of its own: Ctrl-C reaches the parent alone, which then ends the workers in order.
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(folder)},  # nothing else of ours may be found
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

    def started(self) -> dict[str, Any]:
        """What the worker says of itself. Raises WorkerError, also for ops of another revision than its own."""
        answer = self._answer("start", self.limits.start)
        if self.ops is not None and answer.get("ops") != str(self.ops.resolve()):
            raise WorkerError(f"{self.name}: start: expected the ops of {self.ops}, got those of {answer.get('ops')}")
        return answer

    def prepare(self, case: str, size: dict[str, int], provider: str, *, check: bool = True) -> dict[str, Any]:
        """Make inputs, check the result where that is asked for, warm up. Raises WorkerError."""
        request = {"do": "prepare", "case": case, "size": size, "provider": provider, "check": check}
        return self._ask(request, self.limits.prepare)

    def round(self, repeats: int) -> float:
        """Seconds of one call, the mean of ``repeats``. Raises WorkerError."""
        seconds = self._ask({"do": "round", "repeats": repeats}, self.limits.round).get("seconds")
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


LAUNCHES = 6  # pairs of workers, one after the other
SHORTEST = 2e-3  # seconds of a sample; a faster call is repeated, as often in A as in B
FEWEST_ROUNDS, MOST_ROUNDS = 5, 60  # of a point in a launch
PAUSE = 2e-3  # seconds, so that threads of one side that wait for more work are asleep when the other is timed


class Point(NamedTuple):
    """One provider at one size of a case."""

    key: Key
    size: dict[str, int]


def interleaved(
    points: Sequence[Point],
    start: Callable[[str], AbstractContextManager[Worker]],
    *,
    budget: float,
    launches: int = LAUNCHES,
    step: Callable[[Key], None] = lambda key: None,
) -> list[Line]:
    """B over A for each point, over several launches of two workers each; see :func:`bench.statistics.repeated`.

    A worker that dies or hangs costs the point it was at; new ones go on with the next.

    Args:
        start: gives a new worker for "A" and for "B", and ends it.
        budget: seconds of rounds in all; starting and checking come on top.
        step: told what is measured now.

    Raises:
        WorkerError: a worker does not even start.
    """
    settled: dict[Key, Line] = {}
    found: dict[Key, list[Estimate]] = {point.key: [] for point in points}
    for launch in range(launches):
        waiting = [point for point in points if point.key not in settled]
        while waiting:
            with ExitStack() as running:
                pair = [running.enter_context(start(side)) for side in "AB"]
                for worker in pair:
                    worker.started()
                while waiting:
                    point = waiting.pop(0)
                    step(point.key)
                    try:
                        one = _measured(point, pair, launch, budget / len(points) / launches)
                    except WorkerError as error:
                        settled[point.key] = Line(point.key, None, str(error), failed=True)
                        break
                    if isinstance(one, Line):
                        settled[point.key] = one
                    else:
                        found[point.key].append(one)
    return [settled.get(point.key) or Line(point.key, repeated(found[point.key])) for point in points]


def _measured(point: Point, pair: Sequence[Worker], launch: int, budget: float) -> Estimate | Line:
    """B over A in this launch, or why there will be none. Results are checked in the first launch."""
    states = [worker.prepare(point.key[0], point.size, point.key[4], check=launch == 0) for worker in pair]
    for what in ("failure", "missing"):
        found = {side: state[what] for side, state in zip("AB", states, strict=True) if state.get(what)}
        if found:
            words = "check failed in" if what == "failure" else "missing in"
            note = "; ".join(f"{words} {side}: {reason}" for side, reason in found.items())
            return Line(point.key, None, note, failed=what == "failure")
    fastest = min(state["seconds"] for state in states)
    repeats = max(1, min(1000, math.ceil(SHORTEST / max(fastest, 1e-9))))
    times: list[list[float]] = [[], []]
    end = time.monotonic() + budget
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        for side in (0, 1) if (done + launch) % 2 == 0 else (1, 0):
            times[side].append(pair[side].round(repeats))
            time.sleep(PAUSE)
    return paired(times[1], times[0])
