"""Curves of the report: exponents, and when one is called steep."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from bench.report import markdown, page
from bench.report.curves import curves
from bench.report.points import Cases
from bench.report.scaling import Measured, fit
from bench.report.sizes import lines_of
from tests.bench.reports import CASES, LOOP, PLAIN, Factory

WORKS = [2.0**i for i in range(4, 14)]


def curve(time: Callable[[float], float], noise: float = 0.0, seed: int = 0) -> list[Measured]:
    source = random.Random(seed)
    return [Measured(work, time(work) * math.exp(source.gauss(0, noise))) for work in WORKS]


def test_exponent_of_clean_curves() -> None:
    linear = fit(curve(lambda w: 3 * w))
    assert linear.exponent == pytest.approx(1.0)
    assert (linear.low, linear.high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert not linear.steep
    quadratic = fit(curve(lambda w: w**2))
    assert quadratic.exponent == pytest.approx(2.0)
    assert quadratic.steep
    nlogn = fit(curve(lambda w: w * math.log(w)))
    assert nlogn.exponent is not None
    assert 1.1 < nlogn.exponent < 1.3
    assert nlogn.steep  # more than the work, and no noise that could hide it
    assert fit(curve(lambda w: w**0.5 * 2)).exponent == pytest.approx(0.5)


@pytest.mark.parametrize(("power", "steep"), [(0.9, False), (1.0, False), (1.5, True), (2.0, True)])
def test_noise_neither_hides_nor_invents_a_steep_curve(power: float, steep: bool) -> None:
    fits = [fit(curve(lambda w: w**power, 0.05, seed)) for seed in range(200)]
    assert all(found.exponent == pytest.approx(power, abs=0.06) for found in fits)
    assert [found.steep for found in fits] == [steep] * 200
    inside = sum(found.low <= power <= found.high for found in fits if found.low is not None and found.high is not None)
    assert inside / 200 >= 0.87  # of 90 %, as often as 200 draws can tell


def test_launch_floor_hides_no_slope() -> None:
    floor = fit(curve(lambda w: 500 + w))
    assert floor.used < floor.given
    assert floor.exponent is not None
    assert 0.7 < floor.exponent <= 1.0
    assert not floor.steep
    hidden = fit(curve(lambda w: 1e5 + w**2, 0.02))
    assert hidden.used < hidden.given
    assert hidden.steep
    flat = fit(curve(lambda w: 1e9 + w))
    assert flat.floored
    assert not flat.steep
    assert "launch floor" in str(flat)


def test_one_bad_point_does_not_move_the_exponent() -> None:
    points = curve(lambda w: w, 0.01)
    points[3] = points[3]._replace(time=points[3].time * 20)
    assert fit(points).exponent == pytest.approx(1.0, abs=0.05)


def test_few_points() -> None:
    assert fit([]).exponent is None
    assert fit([Measured(1, 1)]).exponent is None
    assert str(fit([Measured(1, 1), Measured(1, 3)])) == "one point, no slope"
    three = fit([Measured(1, 1), Measured(2, 4), Measured(4, 16)])
    assert three.exponent == pytest.approx(2.0)
    assert three.low is None
    assert not three.steep  # three points are no evidence
    for bad in (Measured(0, 1), Measured(1, -1), Measured(1, math.nan), Measured(math.inf, 1)):
        with pytest.raises(ValueError, match="expected positive work and time"):
            fit([bad])


def test_curves_fit_every_provider(factory: Factory) -> None:
    found = curves(factory.result("cuda"), Cases(CASES))
    assert [(one.case, one.method) for one in found] == [
        ("spatial_pool/batch", "graph"),
        ("spatial_pool/batch", "call"),
    ]
    assert [line.provider for line in found[0].lines] == ["flashsloth/triton", "flashsloth/cuda", PLAIN, LOOP]
    assert all(line.fit.given == 5 for line in found[0].lines)


def test_steep_curve_is_said(factory: Factory) -> None:
    result = factory.result("cuda")
    for row in result.rows:
        if row.case == "spatial_pool/batch" and row.provider == PLAIN:
            row.set_times([seconds * row.size["batch"] for seconds in row.samples])
    factory.store(result)
    (content,) = factory.content()
    said = f"{PLAIN} grows faster than the work"
    assert said in markdown.render([content]).replace("&lt;", "<")
    assert "grows faster than the work" in page.render([content])
    assert "No curve is steeper" not in page.render([content])


def test_sizes_that_go_along_with_the_axis_make_one_line() -> None:
    sizes = [
        {"rows": rows, "kept": max(1, rows // part), "heads": 8} for rows in (256, 512, 2048) for part in (1, 4, 9)
    ]
    labels = lines_of(sizes, "rows")
    assert sorted(set(labels)) == ["kept 1/4 of rows", "kept 1/9 of rows", "kept all of rows"]
    assert labels[:3] == labels[3:6] == labels[6:]
    assert lines_of([{"rows": 1, "heads": 2}, {"rows": 2, "heads": 2}, {"rows": 1, "heads": 4}], "rows") == [
        "heads 2",
        "heads 2",
        "heads 4",
    ]
