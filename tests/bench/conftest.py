"""What all tests of the suite share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.timing import fixed_threads
from tests.bench.reports import Factory


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Times of two threads on a busy machine say nothing, and small work is slower with them."""
    with fixed_threads(1):
        yield


@pytest.fixture
def factory(tmp_path: Path) -> Factory:
    return Factory(tmp_path / "results")
