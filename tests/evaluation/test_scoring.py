"""Right or wrong, and the interval of a share."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flashsloth.evaluation import Score, normalise, score_kinds, wilson
from flashsloth.evaluation.scoring import matches


@pytest.mark.parametrize(
    ("got", "expected", "right"),
    [
        ("red", "red", True),
        (" Red.\n", "red", True),
        ("red  star", "red star", True),
        ("red\tstar", "red star", True),
        ("STRASSE", "straße", True),
        ("redstar", "red star", False),
        ("red, star", "red star", False),
        ("red..", "red", False),
        ("", "red", False),
        ("", "", True),
        (".", "", True),
        ("a red star", "red star", False),
        ("3", "03", False),
    ],
)
def test_what_counts_as_the_same(got: str, expected: str, right: bool) -> None:
    assert matches(got, expected) is right


@given(st.text())
def test_normalising_adds_nothing_and_is_done_once(text: str) -> None:
    once = normalise(text)
    assert once == " ".join(once.split())
    assert normalise(" " + text + "\n") == once


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(numbers: tuple[int, int]) -> None:
    want = stats.binomtest(*numbers).proportion_ci(0.95, method="wilson")
    assert wilson(*numbers) == pytest.approx((want.low, want.high), abs=1e-9)


def test_wilson_touches_the_ends() -> None:
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    assert 0.0 < wilson(0, 10)[1] < 0.3


def test_wilson_of_nothing_and_of_nonsense() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    for correct, count in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"correct: expected 0 to count = {count}, got {correct}"):
            wilson(correct, count)


def test_scores_of_kinds() -> None:
    scores = score_kinds([("b", True), ("a", False), ("b", False), ("b", True)])
    assert list(scores.items()) == [("a", Score(0, 1)), ("b", Score(2, 3))]
    assert sum(scores.values(), Score(0, 0)) == Score(2, 4)
    assert scores["b"].accuracy == 2 / 3
    assert math.isnan(Score(0, 0).accuracy)
