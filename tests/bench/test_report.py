"""The report: what it says and what it must not say."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.report import e2e, formats, markdown, page, readme, summary, tables
from bench.report.collect import collect
from bench.report.points import Cases, points
from bench.result import GoalResult, Result, ResultError, Row
from tests.bench.reports import CASES, FACTORS, LOOP, PLAIN, Elements, Factory, run

# ---- what is said and what is not ----


def test_fastest_backend_against_every_peer(factory: Factory) -> None:
    found = points(factory.result("cuda"), Cases(CASES))
    first = found[0]
    assert first.title == "pool, one image"
    assert first.ours is not None
    assert first.ours.provider == "flashsloth/cuda"  # the reference is no product, whatever its time
    assert [against.peer.provider for against in first.against] == [PLAIN, LOOP]
    assert first.fastest is not None
    assert first.fastest.ratio.p50 == pytest.approx(2.0, rel=0.05)


def test_what_only_serves_to_measure_is_no_finding(factory: Factory) -> None:
    result = factory.result("cuda")
    bare = [replace(row, provider=f"{row.provider}, bare", variant="bare", goals=[]) for row in result.rows if row.ours]
    result.rows += [row for row in bare if row.case == "spatial_pool/forward-b1"]
    uses = {point.variant for one in summary.opponents(points(result, Cases(CASES))) for point, _ in one.found}
    assert uses == {"", "bare"}
    result.rows[1].goals.append(GoalResult("overhead", 1.1, ["bare"], 1.05, True))
    found = points(result, Cases(CASES))
    uses = {point.variant for one in summary.opponents(found) for point, _ in one.found}
    assert uses == {""}
    assert {point.title for point in found} >= {"pool, one image, bare"}  # it is still in the numbers


def failing(result: Result, *providers: str) -> Result:
    """As a careless tool might write it: wrong, and still with times and ratios."""
    rows = [replace(row, failure="y: error 1, allowed 0") if row.provider in providers else row for row in result.rows]
    return replace(result, rows=rows)


def test_failed_peer_has_no_speedup_anywhere(factory: Factory) -> None:
    factory.store(failing(factory.result("cuda"), LOOP))
    (content,) = factory.content()
    assert all(against.peer.provider == PLAIN for point in content.points for against in point.against)
    text, html = markdown.render([content]), page.render([content])
    assert "6 results failed the check" in text
    assert "6 results failed the check" in html
    assert re.search(rf"{LOOP} +\| no speedup", text)
    assert re.search(rf"{LOOP} +\| +[\d.]+{formats.TIMES}", text) is None
    assert "no speedup: check failed" in html


def test_failed_backend_leaves_the_next_one(factory: Factory) -> None:
    factory.store(failing(factory.result("cuda"), "flashsloth/cuda"))
    (content,) = factory.content()
    assert {point.ours.provider for point in content.points if point.ours} == {"flashsloth/triton"}
    assert {goal.state for goal in content.goals} == {"unmeasured"}  # a wrong result reaches nothing


def test_only_failed_rows(factory: Factory) -> None:
    result = factory.result("cuda")
    factory.store(failing(replace(result, rows=result.rows[:10]), *FACTORS, "flashsloth/reference"))
    (content,) = factory.content()
    assert content.finding == "No speedup to show on NVIDIA H200"
    html = page.render([content])
    assert "Every result failed its check" in html
    assert "no speedup: our check failed" in html
    assert not tables.speedups(content.points, True)
    assert all(one.ratios == [] for one in content.opponents)
    assert [goal.goal.measured for goal in content.goals] == [None, None]


def test_cpu_shows_ratios_and_no_time(factory: Factory) -> None:
    factory.store(factory.result("cpu"))
    (content,) = factory.content()
    for text in (markdown.render([content]), page.render([content])):
        shown = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
        assert re.search(r"\d (µs|ms|ns|s)\b", shown) is None
        assert re.search(r"[TG]?FLOP/s|B/s|tokens/s", shown) is None
        assert f"2.0{formats.TIMES}" in shown


def test_gpu_shows_both_ways_of_timing(factory: Factory) -> None:
    factory.store(factory.result("cuda"))
    (content,) = factory.content()
    text, html = markdown.render([content]), page.render([content])
    for shown in (text, html):
        assert "µs" in shown
        assert "power cap" in shown  # decoded from the driver's bits, after the run
        assert "700 TFLOP/s" in shown
    assert {row[1] for row in tables.speedups(content.points, True).rows} == {"graph", "call"}


def test_uncommitted_changes_are_on_the_first_screen(factory: Factory) -> None:
    factory.store(factory.result("cuda", dirty=True, difference="12ab"))
    html = page.render(factory.content())
    assert "uncommitted changes" in html[: html.index("Faster than what?")]


def test_history_goes_over_commits(factory: Factory) -> None:
    factory.several()
    gpu, cpu = factory.content()
    assert len(gpu.device.history) == 3
    track = gpu.tracks[0]
    assert [at for at, _ in track.values] == [0, 1, 2]
    assert track.values[2][1] == pytest.approx(track.values[0][1] / 1.4, rel=0.05)  # seconds, of ours
    assert track.tone == "good"
    assert track.moved.startswith(formats.MINUS)
    assert cpu.tracks == []
    html = page.render([gpu, cpu])
    assert "bbbbbbb+" in html  # with uncommitted changes
    assert "One result so far" in html


def test_history_on_a_cpu_is_of_ratios(factory: Factory) -> None:
    factory.store(factory.result("cpu", 1.0, commit="a" * 40, date="2026-11-20T10:00:00Z"))
    factory.store(factory.result("cpu", 1.3, commit="b" * 40, date="2026-11-21T10:00:00Z"))
    (content,) = factory.content()
    track = content.tracks[0]
    assert track.what == f"against {PLAIN}"
    assert track.values[1][1] / track.values[0][1] == pytest.approx(1.3, rel=0.05)


def test_missing_peers_are_named_once_with_the_reason(factory: Factory) -> None:
    result = factory.result("cuda")
    for case in ("spatial_pool/forward-b1", "spatial_pool/batch"):
        row = Row(case, "spatial_pool", {"batch": 1, "side": 27}, "float32", "forward", "xformers", "graph", 1.0, 1.0)
        result.rows.append(replace(row, missing="xformers is not installed"))
    factory.store(result)
    (content,) = factory.content()
    assert [tuple(row) for row in content.missing.rows] == [
        ("xformers", "xformers is not installed", "spatial_pool/forward-b1, spatial_pool/batch")
    ]


# ---- whole models ----


def test_whole_models(factory: Factory) -> None:
    factory.store(factory.result("cuda"))
    (content,) = factory.content()
    one, eight = content.settings
    ours = one.runs[0]
    assert (ours.model, ours.ours, ours.visual_tokens) == ("FlashSloth", True, 81)
    assert ours.first_token == pytest.approx(8e-3 + 1e-3 + 81 * 3e-5)
    assert ours.tokens_per_second == pytest.approx(1 / 0.01)
    assert eight.runs[0].requests_per_second == pytest.approx(1 / (ours.first_token + 0.15), rel=1e-3)
    assert one.runs[1].parts[1] == 0.0  # what is not compressed has no such phase
    assert "100 tokens/s" in markdown.render([content])


def test_claims_are_the_callers(factory: Factory) -> None:
    factory.store(factory.result("cuda"))

    def claims(rows: Any) -> tables.Table:
        assert {row.op for row in rows} == {"e2e"}
        line = ("latency", "2x to 5x", "FlashSloth", "384x384", "uncompressed 1.1x", "does not hold")
        return e2e.compared_claims([line])

    (content,) = factory.content(claims=claims)
    for text in (markdown.render([content]), page.render([content])):
        assert "uncompressed 1.1x" in text
        assert "does not hold" in text
    (content,) = factory.content()
    assert "80 to 89 % fewer" in page.render([content])


# ---- which results ----


def test_newest_complete_full_result_is_shown(factory: Factory) -> None:
    factory.store(factory.result("cuda", commit="a" * 40, date="2026-11-20T10:00:00Z"))
    factory.store(factory.result("cuda", commit="b" * 40, date="2026-11-21T10:00:00Z", quick=True))
    factory.store(factory.result("cuda", commit="c" * 40, date="2026-11-22T10:00:00Z", complete=False))
    (content,) = factory.content()
    assert content.device.header["commit"][0] == "a"
    assert any("newer unfinished run" in note for note in content.device.notes)


def test_partial_result_alone_says_so(factory: Factory) -> None:
    result = factory.result("cuda", complete=False)
    factory.store(replace(result, rows=result.rows[:10]))
    (content,) = factory.content()
    html = page.render([content])
    assert "did not go to its end" in html
    assert "unfinished run" in html


def test_one_point_of_a_curve(factory: Factory) -> None:
    rows = factory.rows("cuda", "spatial_pool/batch", {"batch": 4, "side": 27}, 8e9)
    factory.store(Result(factory.header("cuda"), rows, True))
    (content,) = factory.content()
    assert "one point, no slope" in markdown.render([content])
    assert "pool by images" in page.render([content])


@pytest.mark.parametrize("seed", range(12))
def test_any_part_of_a_result_has_a_page(factory: Factory, seed: int) -> None:
    source, kind = random.Random(seed), ("cuda", "cpu")[seed % 2]
    for i in range(2):
        result = factory.result(kind, date=f"2026-11-2{i}T10:00:00Z", commit=f"{i}" * 40)
        result.rows = [row for row in result.rows if source.random() < (0.03, 0.3, 0.9)[seed % 3]] or result.rows[:1]
        for row in result.rows:
            found = source.random()
            if found < 0.15:
                row.failure = "y: error 1, allowed 0"
            elif found < 0.3:
                row.missing, row.p20, row.p50, row.p80, row.ratios, row.share = "absent", None, None, None, {}, None
            elif found < 0.4:
                row.peak_bytes, row.flops, row.share = 0, 0.0, 1.4
        optional = {"clocks", "clocks_after", "ceilings", "peers", "backends", "load", "dirty", "device"}
        result.header = {k: v for k, v in result.header.items() if k not in optional or source.random() < 0.6}
        factory.store(result)
    contents = factory.content()
    Elements(page.render(contents))
    assert markdown.render(contents).count("\n## ") == 1


def test_foreign_and_older_files_are_named_and_hide_nothing(factory: Factory) -> None:
    stored = factory.store(factory.result("cuda"))
    folder = stored.path(factory.folder).parent
    (folder / "old.json").write_text(json.dumps({"schema": "flashsloth-bench", "version": 1}))
    (folder / "foreign.json").write_text("[1, 2]")
    (folder / "broken.json").write_text('{"schema": ')
    factory.store(factory.result("cpu", small=True))
    collection = collect(factory.folder)
    assert [device.slug for device in collection.devices] == ["nvidia-h200"]
    said = " ".join(collection.unread)
    for name, reason in (("old.json", "version 2, got 1"), ("broken.json", "JSON"), ("amd-epyc", "small sizes")):
        assert name in said
        assert reason in said
    assert "foreign.json" not in said  # other documents may lie there
    assert "old.json" in page.render(factory.content(), collection.unread)


def test_nothing_to_report(tmp_path: Path, factory: Factory) -> None:
    with pytest.raises(ResultError, match="expected a folder of results"):
        run("--results", str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultError, match="expected a result, which `python -m bench run` stores"):
        run("--results", str(tmp_path / "empty"))
    factory.store(factory.result("cpu"))
    with pytest.raises(ResultError, match="--device: expected one of amd-epyc-avx512-2-threads, got 'h200'"):
        run("--results", str(factory.folder), "--device", "h200")


# ---- the command ----


def test_command_writes_markdown_and_page(factory: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory.several()
    target = tmp_path / "report.html"
    assert run("--results", str(factory.folder), "--html", str(target)) == 0
    text, html = capsys.readouterr().out, target.read_text()
    assert text.startswith("# FlashSloth")
    assert text.count("\n## ") == 2
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") - line.count("\\|") >= 3
    run("--results", str(factory.folder), "--html", str(target))
    assert (capsys.readouterr().out, target.read_text()) == (text, html)  # the same bytes
    with pytest.raises(OSError, match="absent"):
        run("--results", str(factory.folder), "--html", str(tmp_path / "absent" / "report.html"))


def test_readme_table(factory: Factory, tmp_path: Path) -> None:
    factory.several()
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter `x`\n")
    options = ("--results", str(factory.folder), "--device", "amd-epyc-avx512-2-threads", "--readme", str(path))
    assert run(*options) == 0
    text = path.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n")
    assert text.endswith(f"{readme.END}\nafter `x`\n")
    assert "old" not in text
    assert "AMD EPYC (avx512), 2 threads" in text
    assert "aaaaaaa" in text
    assert re.search(r"\| pool, one image +\| plain &lt;PyTorch> 2\.\d.; official-style loop [56]\.\d. +\|", text)
    run(*options)
    assert path.read_text() == text
    with pytest.raises(ResultError, match="expected --device with one of nvidia-h200, amd-epyc"):
        run("--results", str(factory.folder), "--readme", str(path))
    path.write_text("no marks")
    with pytest.raises(ResultError, match="where the table goes"):
        run(*options)
    assert path.read_text() == "no marks"


def test_readme_wants_a_complete_full_result(factory: Factory, tmp_path: Path) -> None:
    factory.store(factory.result("cpu", quick=True))
    path = tmp_path / "README.md"
    path.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    with pytest.raises(ResultError, match="expected a complete full result"):
        run("--results", str(factory.folder), "--readme", str(path))
