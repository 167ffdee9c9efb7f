"""The same cases under pytest-benchmark: ``pytest bench/ --benchmark-json=out.json``. Small sizes; absolute times."""

from __future__ import annotations

from typing import Any

import pytest

from bench.case import Case, Provider, callable_of
from bench.cases import CASES
from bench.check import run_checks

TIMED = [(case, provider) for case in CASES if case.mode != "memory" for provider in case.providers]


@pytest.mark.parametrize(("case", "provider"), TIMED, ids=lambda one: one.name.replace(" ", "_"))
def test_case(benchmark: Any, case: Case, provider: Provider) -> None:
    inputs = case.inputs(case.small)
    found = run_checks(case, inputs)[provider.name]
    assert found.failure is None
    benchmark.group = case.name
    benchmark.extra_info.update(size=dict(case.small), mode=case.mode, max_error=found.max_error)
    outputs = benchmark.pedantic(callable_of(case, provider, inputs), rounds=20, warmup_rounds=2)
    assert outputs
