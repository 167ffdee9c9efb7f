"""A process that times the ops it finds on its path, and the line protocol by which it is told what to do.

``python -m bench.worker --device cpu`` reads one JSON object a line from standard input and answers with one a line:

    (start)                                                 {"ops": folder of flashsloth_ops, "device": "cpu" or "cuda"}
    {"do": "prepare", "case", "size", "provider", "check"}  {"missing", "failure": text or null, "seconds": of one call}
    {"do": "round", "repeats": 3}                           {"seconds": of one call, the mean}

A request that goes wrong is answered with {"error": text}. The end of its input ends the worker. Whatever torch or the
ops print goes to standard error, so that it cannot be taken for an answer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu.timing import Timer

Answer = dict[str, Any]
WARM_UP = 0.3  # seconds, at most; two calls at least


class Timed:
    """What a worker holds: the call that is timed now, on a kind of device."""

    def __init__(self, device: str) -> None:
        from bench.gpu.timing import Timer

        self.device = device
        self.timer = Timer() if self.device == "cuda" else None
        self.sample: Callable[[int], float] | None = None

    def answer(self, request: Mapping[str, Any]) -> Answer:
        """Raises ValueError for a request that is not of the protocol, and whatever the ops raise."""
        if request.get("do") == "prepare":
            return self.prepare(request["case"], request["size"], request["provider"], request["check"])
        if request.get("do") == "round" and self.sample is not None:
            return {"seconds": self.sample(request["repeats"])}
        raise ValueError(f"request: expected to prepare, then rounds, got {request}")

    def prepare(self, name: str, size: Mapping[str, int], provider: str, check: bool) -> Answer:
        """Check the result of a provider, warm it up, and hold its call for the rounds to come."""
        from bench.case import DTYPES, callable_of, moved
        from bench.cases import CASES
        from bench.check import run_checks

        self.sample = None
        gc.collect()
        case = next((one for one in CASES if one.name == name), None)
        if case is None or provider not in (one.name for one in case.providers):
            return {"missing": "it is not declared", "failure": None}
        case, dtype = case.only(lambda one: one.name == provider), DTYPES[self.device]
        inputs = moved(case.inputs(size), self.device, dtype)
        if check:
            verdict = run_checks(case, inputs, self.device, dtype, size)[provider]
            if verdict.missing is not None or verdict.failure is not None:
                return {"missing": verdict.missing, "failure": verdict.failure}
        call = callable_of(case, case.provider(provider), inputs)
        self.sample = _wall(call) if self.timer is None else _graph(self.timer, call)
        return {"missing": None, "failure": None, "seconds": _warm(self.sample)}


def _wall(call: Callable[[], object]) -> Callable[[int], float]:
    def sample(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    return sample


def _graph(timer: Timer, call: Callable[[], object]) -> Callable[[int], float]:
    """Replays of a graph of several calls with cold L2, which need no repeats."""
    sample = timer.sampler([call])
    return lambda repeats: sample()


def _warm(sample: Callable[[int], float]) -> float:
    """Seconds of the last of some calls."""
    begin, took = time.perf_counter(), sample(1)
    took = sample(1)
    while time.perf_counter() - begin < WARM_UP and took < WARM_UP / 4:
        took = sample(1)
    return took


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.worker", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--threads", type=int, help="threads inside an op; default: as torch is set")
    options = parser.parse_args(arguments)
    # A copy of standard output for answers alone, taken before anything is imported that might print.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch

    import flashsloth_ops

    if options.threads is not None:
        torch.set_num_threads(options.threads)

    def say(what: Answer) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    timed = Timed(options.device)
    gc.disable()  # a collection would be billed to the call it interrupts
    say({"ops": str(Path(flashsloth_ops.__file__ or "").resolve().parent), "device": timed.device})
    for line in sys.stdin:
        try:
            say(timed.answer(json.loads(line)))
        except Exception as error:  # the parent hears of it, and may ask for something else
            say({"error": f"{type(error).__name__}: {error}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
