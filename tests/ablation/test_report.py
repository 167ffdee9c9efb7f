"""The report: what it says follows from the runs; runs that do not belong together are refused."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashsloth.ablation.findings import groups, paired, sentences, student
from flashsloth.ablation.plot import draw, places
from flashsloth.ablation.report import render, write_report
from flashsloth.ablation.runs import Run, load_runs, save_run
from flashsloth.ablation.timing import load_times, save_times
from flashsloth.cli import main
from tests.ablation.cases import SETTINGS, made_up

# Right answers of 1000, by seed.
RESULTS = {
    "none": (920, 930, 925),
    "average": (800, 810, 805),
    "attention": (850, 861, 855),
    "queries": (905, 914, 909),
    "window-4": (700, 705, 690),
    "queries-27": (905, 916, 908),
    "queries-3": (890, 880, 900),
}
# Of three rounds; the machine was slow in the second.
SECONDS = {name: [1e-2, 9e-2, 1.1e-2] for name in RESULTS}
SECONDS["none"] = [2e-2, 20e-2, 2.2e-2]


def runs_of(results: dict[str, tuple[int, ...]]) -> list[Run]:
    return [made_up(name, seed, right) for name, found in results.items() for seed, right in enumerate(found)]


def said(**results: tuple[int, ...]) -> str:
    return "\n".join(sentences(groups(runs_of({**RESULTS, **results}))))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    for run in runs_of(RESULTS):
        save_run(run, tmp_path)
    times = {"settings": SETTINGS, "environment": {"torch": "2.13.0", "device": "cpu", "threads": 2}, "rounds": 3}
    save_times({**times, "seconds": SECONDS}, tmp_path)
    return tmp_path


# ---- numbers ----


def test_variants_are_in_the_order_of_the_tables_with_mean_and_spread() -> None:
    found = groups(runs_of(RESULTS))
    assert [group.one.variant for group in found] == [
        "none",
        "average",
        "attention",
        "queries",
        "queries-3",
        "queries-27",
        "window-4",
    ]
    assert [group.mark for group in found] == list("ABCDEFG")
    assert found[1].mean == pytest.approx(0.805)
    assert found[1].spread == pytest.approx(0.005)
    assert found[1].of_kind("colour") == pytest.approx((80 + 81 + 80) / 300)
    assert found[3].tokens == 45
    assert groups(runs_of({"none": (1,)}))[0].spread is None


def test_differences_are_taken_seed_by_seed() -> None:
    """Seeds that move both alike do not widen the interval: by hand, differences 50, 51, 50 of 1000."""
    by_name = {group.one.variant: group for group in groups(runs_of(RESULTS))}
    attention, average = by_name["attention"], by_name["average"]
    found = paired(attention, average)
    assert found is not None
    assert found.mean == pytest.approx(0.151 / 3)
    half = 4.303 * np.std([0.050, 0.051, 0.050], ddof=1) / np.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(0.151 / 3 - half), pytest.approx(0.151 / 3 + half))
    assert (found.seeds, found.sign) == (3, 1)
    other = groups([made_up("average", 7, 800)])[0]
    assert paired(attention, other) is None
    single = paired(groups([made_up("attention", 7, 900)])[0], other)
    assert single is not None
    assert (single.low, single.high, single.sign) == (None, None, 0)


def test_students_quantiles() -> None:
    """Against published values."""
    for freedom, value in ((1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (20, 2.086), (60, 2.000)):
        assert student(freedom) == pytest.approx(value, abs=1e-3)


# ---- words ----


def test_attention_against_averaging_is_judged_by_its_interval() -> None:
    assert "+5.0 points (95 % interval +4.9 to +5.2, 3 seeds). Here attention pooling beats averaging." in said()
    assert "Here averaging beats attention pooling." in said(attention=(700, 711, 705))
    assert "Here attention pooling cannot be told from averaging." in said(attention=(700, 900, 860))
    assert "cannot be told" in said(attention=(805, 810, 800))


def test_recovery_is_judged_by_its_intervals() -> None:
    part = said()
    assert "Without compression (324 tokens) against attention pooling (36 tokens): +7.0 points" in part
    assert "With 9 queries beside the 36 tokens against without: +5.4 points" in part
    assert "Without compression against pooling and queries: +1.6 points" in part
    assert "Here the queries recover a part of it, 78 %, and not all." in part
    assert "Here the queries recover what compression loses." in said(queries=(921, 929, 926))
    assert "Here the queries do not recover what compression loses." in said(queries=(850, 860, 856))
    assert "Here the queries do not recover what compression loses." in said(queries=(800, 811, 805))
    assert "No loss can be told here, so there is nothing to recover." in said(
        none=(850, 860, 856), queries=RESULTS["attention"]
    )
    assert "nothing to recover, though queries help." in said(none=(850, 860, 856))


def test_one_seed_decides_nothing() -> None:
    found = groups([run for run in runs_of(RESULTS) if run.seed == 0])
    text = "\n".join(sentences(found))
    assert "+5.0 points (one seed: no interval). Here attention pooling cannot be told from averaging." in text
    assert "No loss can be told here" in text
    assert "one seed" in render(found, None)


def test_time_is_said_where_it_was_measured() -> None:
    text = "\n".join(sentences(groups(runs_of(RESULTS), SECONDS)))
    assert "the first token takes 0.50 of the time it takes without compression, and 1.00 of the flops" in text
    assert "What does it save" not in said()


# ---- the document ----


def test_the_report_holds_every_variant_and_kind(stored: Path) -> None:
    document, plot = write_report(stored)
    text = document.read_text()
    assert document.name == "ablation.md"
    assert "21 runs: 7 variants, seeds 0, 1, 2." in text
    assert f"]({plot.name})" in text
    assert "| A | no compression | 324 | 0 | 92.5 ± 0.5 | 1,024 | 200 | 1.00 (1.00 to 1.00) |" in text
    assert "| D | attention, 3x3, 9 queries | 36 | 9 | 90.9 ± 0.5 | 1,024 | 200 | 0.50 (0.45 to 0.50) |" in text
    assert "| colour | 100 | 92.3 | 80.3 | 85.3 | 90.3 | 89.0 | 90.3 | 69.7 |" in text
    assert "## Against D, attention, 3x3, 9 queries" in text
    assert "| B | average, 3x3 | -10.4 |" in text
    assert "| F | queries-27 | +0.0 |" in text
    assert "8,000 training pictures" in text
    assert "1,000 steps of 16" in text
    assert "1,000 questions on 100 pictures" in text
    assert "trained on cpu, 1 thread, torch 2.13.0; timed on cpu, 2 threads, torch 2.13.0" in text
    assert "over the time of A: the median of 3 rounds" in text
    assert "{" not in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") >= 5
    assert [path.name for path in stored.iterdir() if path.name.startswith(".")] == []


def test_missing_runs_are_said(stored: Path) -> None:
    (stored / "runs" / "average-seed1.json").unlink()
    (stored / "times.json").unlink()
    text = write_report(stored)[0].read_text()
    assert "(missing: B without seed 1)" in text
    assert "first token, over" not in text
    for name in ("none", "attention"):
        for seed in range(3):
            (stored / "runs" / f"{name}-seed{seed}.json").unlink()
    assert "The runs that the paper's claims are about are not here yet." in write_report(stored)[0].read_text()


def test_the_command_writes_it_without_a_configuration(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--out", str(stored), "--report"]) == 0
    assert "ablation.md" in capsys.readouterr().out


# ---- the plot ----


def test_the_plot_repeats_and_has_a_letter_for_every_point(stored: Path) -> None:
    plot = write_report(stored)[1]
    first = plot.read_bytes()
    assert write_report(stored)[1].read_bytes() == first
    root = ElementTree.fromstring(first)
    assert root.tag.endswith("svg")
    words = first.decode()
    for letter in "ABCDEFG":
        assert f"<!-- {letter} -->" in words  # what matplotlib writes beside a text it draws as outlines
    assert "<!-- G -->" in words
    assert "<!-- H -->" not in words


def test_the_plot_is_readable_without_colour(tmp_path: Path) -> None:
    """Families have markers of their own; and in grey the marks still stand out from the paper."""
    path = draw(groups(runs_of({**RESULTS, "shuffle": (820, 830, 825)})), tmp_path / "plot.png")
    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L"))
    assert grey.shape[0] > 500
    assert (grey < 60).mean() > 0.003
    from flashsloth.ablation.plot import _FAMILIES

    assert len({marker for _, _, marker in _FAMILIES.values()}) == len(_FAMILIES)
    assert len({colour for _, colour, _ in _FAMILIES.values()}) == len(_FAMILIES)


def test_points_with_the_same_tokens_stand_side_by_side() -> None:
    found = places([36, 324, 36, 36])
    assert found[1] == 324
    assert found[2] == pytest.approx(36)
    assert found[0] < 36 < found[3] < 40
    assert places([5]) == [5]


# ---- what does not belong together ----


def test_mixed_settings_are_refused(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(made_up("shuffle", 0, 500, settings={**SETTINGS, "steps": 2000}), stored)
    with pytest.raises(ValueError, match=r"shuffle-seed0\.json with steps 2000, not 1000"):
        load_runs(stored)
    assert main(["ablate", "--out", str(stored), "--report"]) == 2
    assert "expected results of the same settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": "flashsloth-ablation", "version": 2}',
        '{"format": "flashsloth-ablation", "version": 1, "variant": "none"}',
    ],
)
def test_a_file_that_is_no_run_is_named(stored: Path, text: str) -> None:
    (stored / "runs" / "none-seed0.json").write_text(text)
    with pytest.raises(ValueError, match=r"none-seed0\.json: expected a run of an ablation, got"):
        load_runs(stored)


def test_a_run_under_another_name_is_refused(stored: Path) -> None:
    (stored / "runs" / "none-seed0.json").rename(stored / "runs" / "none-seed9.json")
    with pytest.raises(ValueError, match="got variant 'none' and seed 0"):
        load_runs(stored)


def test_runs_go_through_disk_as_they_are(tmp_path: Path) -> None:
    run = made_up("none", 2, 900)
    save_run(run, tmp_path)
    assert load_runs(tmp_path) == [run]
    assert json.loads((tmp_path / "runs/none-seed2.json").read_text())["format"] == "flashsloth-ablation"


def test_times_of_other_settings_are_not_used(stored: Path) -> None:
    assert load_times(stored, {**SETTINGS, "steps": 1}) is None
    assert load_times(stored, SETTINGS) is not None
    (stored / "times.json").write_text("{}")
    with pytest.raises(ValueError, match=r"times\.json: expected times of an ablation"):
        load_times(stored, SETTINGS)
