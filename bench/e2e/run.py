"""``--case e2e``: every model at every resolution and batch, checked, then timed, one point after the other.

Models run one at a time, and one is freed before the next is made: few devices hold all. So times of different models
were not measured side by side. On a GPU they are stable and may be compared; on a CPU everything is small, the run is a
self-test, and its times say nothing about full size.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import Any

import torch

from bench.case import DTYPES
from bench.check import Verdict, first_line
from bench.e2e.check import check
from bench.e2e.flops import FIRST_TOKEN, PHASES, STAGES
from bench.e2e.models import Model, Request
from bench.e2e.phases import (
    EventClock,
    HostClock,
    Meter,
    Rounds,
    Training,
    answer,
    choose_attention,
    first_token,
    inference_peaks,
    repeat,
)
from bench.e2e.points import Point, attentions, points
from bench.result import Row
from bench.timing import Ceilings, fixed_threads

# Shares of a point's budget: the first token, the answer, and each training stage.
FORWARD_SHARE, ANSWER_SHARE, TRAINING_SHARE = 0.3, 0.4, 0.15


def run(
    device: str,
    *,
    quick: bool = False,
    small: bool = False,
    budget: float = 60.0,
    done: Set[tuple[str, ...]] = frozenset(),
    step: Callable[[str], None] = lambda _: None,
    chosen: Callable[[str, str], bool] = lambda case, provider: True,
    limits: Ceilings | None = None,
) -> Iterator[list[Row]]:
    """The rows of one point at a time, a row a phase, so that the caller can store them after each.

    Args:
        device: "cpu" or "cuda".
        budget: seconds to spend on timing, over all points; each gets the fewest rounds anyway.
        done: keys of rows that are there; points of which all are there are left out.
        step: is told what happens, for a progress display.
        chosen: by case and provider, whether a point is wanted.
        limits: of the device, measured in the same run; without them rows have no share of a limit.
    """
    left = [p for p in points(device, quick=quick, small=small) if chosen(p.case, p.model.name)]
    left = [p for p in left if not {row.key for row in p.rows(device)} <= done]
    begin = time.perf_counter()
    while left:
        model = left[0].model
        step(f"building {model.name}")
        bench = _Bench(model, left[0].small, device, quick)
        while left and left[0].model is model:
            share = max(0.0, budget - (time.perf_counter() - begin)) / len(left)
            with fixed_threads(1 if device == "cpu" else None):  # small models have nothing to share out
                rows = bench.measure(left.pop(0), share, step)
            for row in rows:
                if limits is not None and row.p50 is not None:
                    row.share = limits.limit(row.flops, row.bytes) / row.p50
            yield rows
        del bench
        _release(device)


class _Bench:
    """A built model, and what measures it on a device."""

    def __init__(self, model: Model, small: bool, device: str, quick: bool) -> None:
        self.model, self.device, self.least = model, device, 3 if quick else 5
        self.dtype = DTYPES[device]
        self.clock = EventClock() if device == "cuda" else HostClock()
        self.meter = Meter(torch.cuda.memory_allocated()) if device == "cuda" else None
        self.memory = torch.cuda.mem_get_info()[1] if device == "cuda" else None
        self.candidates = attentions(model, device)
        self.built: Any = None
        try:
            self.built = model.build(small, device, self.dtype, self.candidates[-1])
        except torch.OutOfMemoryError:
            _release(device)

    def measure(self, point: Point, budget: float, step: Callable[[str], None]) -> list[Row]:
        """All rows of a point. Where the check fails, none has times."""
        rows = {row.mode: row for row in point.rows(self.device)}
        name = f"{point.model.name}, {point.case}"
        inference = [rows[phase] for phase in PHASES if phase not in STAGES]
        step(f"{name}: inference")
        self._attempt(point, inference, lambda: self._infer(point, rows, budget))
        wrong = next((row.failure for row in inference if row.failure is not None), None)
        for row in (rows[stage] for stage in STAGES):
            row.failure = wrong
            if wrong is None:
                step(f"{name}: {row.mode}")
                self._attempt(point, [row], partial(self._train, point, row, TRAINING_SHARE * budget))
        return list(rows.values())

    def _attempt(self, point: Point, rows: list[Row], body: Callable[[], None]) -> None:
        """Run ``body``; what goes wrong is said by the rows, which then have no times: half a measurement is none."""
        if self.device == "cuda":
            _release(self.device)  # what another phase left behind in pieces may be too scattered for this one
        config = self.model.config(point.small)
        needs = max(point.bytes_at_least(config, row.mode, self.dtype.itemsize) for row in rows)
        has = "" if self.memory is None else f", the device has {self.memory / 1e9:.1f} GB"
        missing = f"does not fit in memory: needs {needs / 1e9:.1f} GB at least{has}"
        failure = None
        if self.built is not None and (self.memory is None or needs <= self.memory):
            try:
                body()
                return
            except torch.OutOfMemoryError:
                pass  # what it holds is free once this handler is left
            except Exception as error:  # whatever a model of another package raises
                failure = f"raised {type(error).__name__}: {first_line(error)}"
            _release(self.device)
        for row in rows:
            row.failure, row.missing = failure, None if failure else missing
            row.samples, row.p20, row.p50, row.p80, row.peak_bytes, row.kept_bytes = [], None, None, None, None, None

    def _infer(self, point: Point, rows: dict[str, Row], budget: float) -> None:
        parts, request = self.model.parts(self.built), self._request(point)

        def forward() -> dict[str, float]:
            return first_token(self.built, parts, request, self.clock)

        attention = choose_attention(self.built, self.candidates, lambda: forward()[FIRST_TOKEN])
        verdict = self._check(point, request)
        for row in rows.values():
            row.variant = attention
            row.max_error, row.error_allowed, row.failure = verdict.max_error, verdict.allowed, verdict.failure
        if verdict.failure is not None:
            return
        found = repeat(forward, Rounds(FORWARD_SHARE * budget, self.least, 20))
        whole = Rounds(ANSWER_SHARE * budget, 3, 10)
        found |= repeat(lambda: answer(self.built, request, point.new_tokens, self.clock), whole)
        for phase, samples in found.items():
            rows[phase].set_times(samples)
        if self.meter is not None:
            for phase, peak in inference_peaks(self.built, parts, request, point.new_tokens, self.meter).items():
                rows[phase].peak_bytes = peak

    def _train(self, point: Point, row: Row, budget: float) -> None:
        with Training(self.model, self.built, self._request(point), row.mode) as training:
            row.set_times(repeat(lambda: training.time(self.clock), Rounds(budget, 3, 10))[row.mode])
            row.kept_bytes = training.kept_bytes()
            row.peak_bytes = None if self.meter is None else training.peak(self.meter)

    def _request(self, point: Point) -> Request:
        config = self.built.config
        return self.model.request(config, point.layout(config), point.batch, point.text, self.device, self.dtype)

    def _check(self, point: Point, request: Request) -> Verdict:
        config = self.built.config
        prompt = self.model.prompt(point.layout(config), config, point.text)
        return check(self.model, self.built, request, prompt, small=point.small)


def _release(device: str) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
