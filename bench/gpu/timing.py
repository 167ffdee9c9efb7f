"""Timing on a GPU: CUDA graphs, cold L2, and the ceilings of the device measured in the same run.

A graph of ``copies`` times [flush the L2 cache, call] is replayed beside a graph of the flushes alone, and the
difference, divided by ``copies``, is one sample. So launch latency of the host and the resolution of events do not
count, the gaps between the kernels of a call do, and every call reads its inputs from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

FLUSHED_BYTES = 256 << 20  # several times the largest L2 cache


class Ceilings(NamedTuple):
    """What the device gives at best: bytes a second of a large copy, read and written, and flops of a bf16 product."""

    bytes_per_second: float
    flops_per_second: float

    def limit(self, flops: float, moved: float) -> float:
        """Seconds below which no implementation gets."""
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


def ceilings() -> Ceilings:
    """Measure both: a copy of 2 GiB, and a product of 8192 x 8192 matrices of random bf16 numbers."""
    return Ceilings(_copy_rate(), _product_rate())


def _copy_rate() -> float:
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _median_events(lambda: target.copy_(source), 10)


def _product_rate() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * 8192**3 / _median_events(lambda: torch.mm(a, b, out=product), 10)


class Timer:
    """Graphs of several calls, replayed in turn so that drifting clocks hit all of them alike."""

    def __init__(self, copies: int = 10) -> None:
        self.copies = copies
        self.flush = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")
        self.flushes = self._capture(lambda: None)

    def interleave(
        self, calls: Mapping[str, Callable[[], object]], rounds: int
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of one call of each, round by round; and why some could not be captured."""
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        failures: dict[str, str] = {}
        for name, call in calls.items():
            try:
                graphs[name] = self._capture(call)
            except RuntimeError as error:
                torch.cuda.synchronize()
                failures[name] = f"not captured: {_first_line(error)}"
        times: dict[str, list[float]] = {name: [] for name in graphs}
        names = list(graphs)
        for done in range(rounds):
            empty = _events(self.flushes.replay)
            first = done % max(len(names), 1)
            for name in names[first:] + names[:first]:
                times[name].append(max(_events(graphs[name].replay) - empty, 1e-9) / self.copies)
        return times, failures

    def _capture(self, call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Warmed up on a side stream, as capture asks for, so that compiling and allocating stay outside."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.copies):
                self.flush.zero_()
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph


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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
