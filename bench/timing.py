"""Timing on a CPU: providers interleaved, so that what else the machine does hits all of them alike.

An absolute time on a shared processor says little. The ratio of two calls made right after each other says much, and
the median of many such pairs is what is reported.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Ceilings(NamedTuple):
    """What a device gives at best: bytes a second of a large copy, read and written, and flops of a large product."""

    bytes_per_second: float
    flops_per_second: float

    def limit(self, flops: float, moved: float) -> float:
        """Seconds below which no implementation gets."""
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


class Quantiles(NamedTuple):
    """The 20th, 50th and 80th percentile of a sample."""

    p20: float
    p50: float
    p80: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Percentiles by linear interpolation between the sorted values. Raises ValueError for an empty sample."""
    if not values:
        raise ValueError("values: expected at least one, got none")
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Quantiles(at(0.2), at(0.5), at(0.8))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Quantiles:
    """Quantiles of the ratio of two samples, pair by pair: value i of both was measured in round i."""
    return quantiles([a / b for a, b in zip(numerator, denominator, strict=True)])


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    min_rounds: int = 5,
    max_rounds: int = 60,
    shortest: float = 2e-3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one call of each, round by round.

    Every round calls all providers once, each round starting with another one, so that none is always the one that
    runs behind the slowest. A provider faster than ``shortest`` seconds is called several times a round, and the mean
    counts. Rounds go on until ``budget`` seconds are used, at least ``min_rounds`` and at most ``max_rounds``.
    """
    names = list(calls)
    repeats = {name: _repeats(calls[name], shortest, clock) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = clock()
    with _no_collection():
        for done in range(max_rounds):
            if done >= min_rounds and clock() - begin >= budget:
                break
            first = done % len(names)
            for name in names[first:] + names[:first]:
                call, count = calls[name], repeats[name]
                start = clock()
                for _ in range(count):
                    call()
                times[name].append((clock() - start) / count)
    return times


def _repeats(call: Callable[[], object], shortest: float, clock: Callable[[], float]) -> int:
    """Warm up, and count how many calls a measurement needs. A first call may be slow, a long one tells enough."""
    took = 0.0
    for _ in range(2):
        start = clock()
        call()
        took = clock() - start
        if took >= 20 * shortest:
            break
    return 1 if took >= shortest else min(1000, int(shortest / max(took, 1e-6)) + 1)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A garbage collection in the middle of a call would be billed to that call."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def fixed_threads(count: int | None) -> Iterator[int]:
    """Run with ``count`` threads inside an op (None: as torch is set), and yield that number."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def ceilings() -> Ceilings:
    """Of this processor in fp32: a copy of 256 MiB, and a product of 1024 x 1024 matrices by the faster of torch's
    two libraries, which differ by a factor of two on some processors."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "mkl": lambda: torch.mm(a, b)}
    if torch.backends.mkldnn.is_available():
        calls["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    times = {name: min(sample) for name, sample in interleave(calls, budget=0.5, min_rounds=3).items()}
    product = min(seconds for name, seconds in times.items() if name != "copy")
    return Ceilings(2 * source.numel() * source.element_size() / times["copy"], 2 * 1024**3 / product)
