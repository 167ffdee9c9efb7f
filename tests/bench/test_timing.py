"""Timing on a CPU: does the timer time what it is given, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from bench.timing import Ceilings, ceilings, interleave, quantiles, ratio


def test_timer_measures_sleeps_of_known_length() -> None:
    times = interleave(
        {"short": lambda: time.sleep(0.004), "long": lambda: time.sleep(0.012)}, budget=0.2, max_rounds=12
    )
    short, long = quantiles(times["short"]), quantiles(times["long"])
    # A sleep never ends early; a busy machine may wake up late, so only the better part is bounded above.
    assert 0.004 <= short.p20 < 0.008
    assert 0.012 <= long.p20 < 0.020
    assert min(times["long"]) > min(times["short"])


class FakeClock:
    """Time passes only inside the calls, by exactly what they cost."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def costing(self, name: str, seconds: float | Callable[[int], float]) -> Callable[[], None]:
        def call() -> None:
            number = self.calls.count(name)
            self.calls.append(name)
            self.now += seconds if isinstance(seconds, float) else seconds(number)

        return call


def test_providers_are_interleaved_with_a_rotating_start() -> None:
    clock = FakeClock()
    calls = {name: clock.costing(name, 1.0) for name in "abc"}
    times = interleave(calls, budget=0.0, min_rounds=4, clock=clock)
    assert clock.calls[:3] == ["a", "b", "c"]  # warm-up; one is enough where it is long
    assert "".join(clock.calls[3:]) == "abc" + "bca" + "cab" + "abc"
    assert times == {name: [1.0] * 4 for name in "abc"}


def test_rounds_fill_the_budget_within_bounds() -> None:
    for budget, rounds in ((0.0, 5), (20.0, 10), (1e9, 30)):
        clock = FakeClock()
        calls = {name: clock.costing(name, 1.0) for name in "ab"}
        times = interleave(calls, budget=budget, min_rounds=5, max_rounds=30, clock=clock)
        assert len(times["a"]) == len(times["b"]) == rounds


def test_short_calls_are_repeated_within_a_measurement() -> None:
    clock = FakeClock()
    times = interleave({"tiny": clock.costing("tiny", 1e-4)}, budget=0.0, min_rounds=2, shortest=1e-3, clock=clock)
    assert times["tiny"] == pytest.approx([1e-4] * 2)
    assert len(clock.calls) == 2 + 2 * 11


def test_ratio_is_the_median_of_pairs() -> None:
    # The machine becomes ten times slower half way: the ratio of medians would be off, that of pairs is not.
    peer, ours = [2.0, 2.0, 2.0, 20.0, 20.0, 20.0], [1.0, 1.0, 1.0, 10.0, 10.0, 10.0]
    assert ratio(peer, ours) == (2.0, 2.0, 2.0)
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="expected at least one, got none"):
        quantiles([])
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize("slowdown", [1.03, 1.10, 2.0])
def test_planted_slowdown_is_seen_through_drift(slowdown: float) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 0.02 * torch.randn(200, generator=generator)
    clock = FakeClock()

    def cost(base: float, shift: int) -> Callable[[int], float]:
        # Load that comes and goes over the run, the same for both of a pair, and noise of each its own.
        return lambda number: base * (1 + 0.5 * (number // 10 % 2)) * noise[2 * number + shift].item()

    times = interleave(
        {"before": clock.costing("before", cost(1.0, 0)), "after": clock.costing("after", cost(slowdown, 1))},
        budget=1e9,
        max_rounds=60,
        clock=clock,
    )
    assert ratio(times["after"], times["before"]).p50 == pytest.approx(slowdown, rel=0.015)


def test_ceilings_are_what_a_copy_and_a_product_reach() -> None:
    found = ceilings()
    # Any machine that runs this: between 0.1 and 1000 GB/s, and between 1 GFLOP/s and 10 TFLOP/s on one thread.
    assert 1e8 < found.bytes_per_second < 1e12
    assert 1e9 < found.flops_per_second < 1e13
    limits = Ceilings(bytes_per_second=10.0, flops_per_second=100.0)
    assert limits.limit(200.0, 5.0) == 2.0
    assert limits.limit(200.0, 50.0) == 5.0
