"""Timing on a GPU: CUDA graphs and plain calls, cold L2, and the ceilings of the device measured in the same run.

A graph of ``copies`` times [flush the L2 cache, call] is replayed beside a graph of the flushes alone, and the
difference, divided by ``copies``, is one sample. So launch latency of the host and the resolution of events do not
count, the gaps between the kernels of a call do, and every call reads its inputs from memory. A plain call is timed
by the host from an idle device to the end of its last kernel: what a caller waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bench.check import first_line
from bench.timing import Ceilings

Calls = Sequence[Callable[[], object]]  # one provider on several sets of inputs

FLUSHED_BYTES = 256 << 20  # several times the largest L2 cache


def ceilings(dtype: torch.dtype = torch.bfloat16) -> Ceilings:
    """Measure both: a copy of 2 GiB, and a product of 8192 x 8192 matrices of random numbers."""
    return Ceilings(_copy_rate(), _product_rate(dtype))


def _copy_rate() -> float:
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _median_events(lambda: target.copy_(source), 10)


def _product_rate(dtype: torch.dtype) -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * 8192**3 / _median_events(lambda: torch.mm(a, b, out=product), 10)


class Timer:
    """Graphs of several calls, replayed in turn so that drifting clocks hit all of them alike.

    Each call comes on several sets of inputs, which the copies in its graph take in turn.
    """

    def __init__(self, copies: int = 10) -> None:
        self.copies = copies
        self.flush = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")
        self.flushes = self._capture([lambda: None])

    def graphs(
        self, calls: Mapping[str, Calls], rounds: int, budget: float = float("inf")
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of one call of each by replays, round by round; and why some could not be captured."""
        samplers: dict[str, Callable[[], float]] = {}
        failures: dict[str, str] = {}
        for name, call in calls.items():
            try:
                samplers[name] = self.sampler(call)
            except RuntimeError as error:
                torch.cuda.synchronize()
                failures[name] = f"not captured: {first_line(error)}"
        times: dict[str, list[float]] = {name: [] for name in samplers}
        end = time.monotonic() + budget
        for names in _turns(list(samplers), rounds, end):
            for name in names:
                times[name].append(samplers[name]())
        return times, failures

    def sampler(self, calls: Calls) -> Callable[[], float]:
        """Captures the calls; each call of what is returned gives the seconds of one by a replay.

        Raises:
            RuntimeError: they cannot be captured.
        """
        graph = self._capture(calls)

        def sample() -> float:
            empty = _events(self.flushes.replay)
            return max(_events(graph.replay) - empty, 1e-9) / self.copies

        return sample

    def calls(self, calls: Mapping[str, Calls], rounds: int, budget: float = float("inf")) -> dict[str, list[float]]:
        """Seconds of one plain call of each, launches included, round by round."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.monotonic() + budget
        for done, names in enumerate(_turns(list(calls), rounds, end)):
            for name in names:
                call = calls[name][done % len(calls[name])]
                self.flush.zero_()
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
        return times

    def _capture(self, calls: Calls) -> torch.cuda.CUDAGraph:
        """Warmed up on a side stream, as capture asks for, so that compiling and allocating stay outside."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for copy in range(self.copies):
                self.flush.zero_()
                calls[copy % len(calls)]()
        graph.replay()
        torch.cuda.synchronize()
        return graph


def _turns(names: list[str], rounds: int, end: float) -> Iterator[list[str]]:
    """The names, each round starting with another one; three rounds at least, then as many as time allows."""
    for done in range(rounds):
        if done >= 3 and time.monotonic() > end:
            return
        first = done % max(len(names), 1)
        yield names[first:] + names[:first]


def _events(run: Callable[[], object]) -> float:
    """Seconds between events around ``run``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _median_events(run: Callable[[], Tensor], rounds: int) -> float:
    for _ in range(3):
        run()
    return sorted(_events(run) for _ in range(rounds))[rounds // 2]
