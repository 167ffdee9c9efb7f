"""The same cases under pytest-benchmark: ``pytest bench/ --benchmark-json=out.json``. Small sizes; absolute times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.case import DTYPES, Case, Provider, callable_of, moved
from bench.cases import CASES
from bench.check import run_checks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMED = [(case, p) for case in CASES if DEVICE in case.devices and not case.axis for p in case.providers if p.timed]


@pytest.mark.parametrize(("case", "provider"), TIMED, ids=lambda one: one.name.replace(" ", "_"))
def test_case(benchmark: Any, case: Case, provider: Provider) -> None:
    dtype = DTYPES[DEVICE]
    inputs = moved(case.inputs(case.small), DEVICE, dtype)
    found = run_checks(case.only(lambda p: p.name == provider.name), inputs, DEVICE, dtype, case.small)[provider.name]
    if found.missing is not None:
        pytest.skip(found.missing)
    assert found.failure is None
    benchmark.group = case.name
    benchmark(synchronised(callable_of(case, provider, inputs)))


def synchronised(call: Callable[[], object]) -> Callable[[], object]:
    """A call that ends when its last kernel has: pytest-benchmark times what returns."""
    if DEVICE == "cpu":
        return call

    def waiting() -> object:
        outputs = call()
        torch.cuda.synchronize()
        return outputs

    return waiting
