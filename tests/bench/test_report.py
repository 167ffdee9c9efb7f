"""The report: what it says, what it must not say, and how its page opens in a browser."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench.report import add_arguments, command, e2e, formats, markdown, page, readme, summary, tables
from bench.report.collect import collect
from bench.report.content import Content, gather
from bench.report.curves import curves
from bench.report.plots import log_scale
from bench.report.points import Cases, points
from bench.report.scaling import Measured, fit
from bench.report.sizes import lines_of
from bench.result import GoalResult, Result, ResultError, Row, save
from bench.timing import ratio


@dataclass(frozen=True)
class Declared:
    name: str
    title: str
    axis: str = ""


CASES = (
    Declared("spatial_pool/forward-b1", "pool, one image"),
    Declared("spatial_pool/batch", "pool by images", "batch"),
    Declared("sparse_prefill/rows", "prefill by tokens", "rows"),
)
LOOP, PLAIN = "official-style loop", "plain <PyTorch>"  # the second would be an element if it were not escaped
FACTORS = {"flashsloth/triton": 1.1, "flashsloth/cuda": 1.0, "flashsloth/cpu": 1.0, PLAIN: 2.0, LOOP: 6.0}


class Factory:
    """Results as runs would store them, from seeded noise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def header(self, kind: str, **changed: Any) -> dict[str, Any]:
        gpu = kind == "cuda"
        clocks = {"driver_version": "570.1", "clocks.sm": "1980 MHz", "clocks_throttle_reasons.active": "0x1"}
        return {
            "kind": kind,
            "device": "NVIDIA H200" if gpu else "AMD EPYC",
            "slug": "nvidia-h200" if gpu else "amd-epyc-avx512-2-threads",
            "cores": 2,
            "threads": 2,
            "isa": "avx512",
            "capability": [9, 0] if gpu else None,
            "driver": "570.1" if gpu else None,
            "clocks": clocks if gpu else None,
            "clocks_after": {**clocks, "clocks_throttle_reasons.active": "0x4"} if gpu else None,
            "python": "3.11.7",
            "torch": "2.13.0",
            "triton": "3.8.0" if gpu else None,
            "cuda": "13.0" if gpu else None,
            "commit": "a" * 40,
            "dirty": False,
            "difference": "",
            "date": "2026-11-20T10:00:00Z",
            "load": 0.3,
            "quick": False,
            "small": False,
            "backends": {"spatial_pool": "triton" if gpu else "cpu"},
            "peers": {"flash-attn": "absent"},
            "ceilings": {"bytes_per_second": 4e12, "flops_per_second": 7e14},
            **changed,
        }

    def rows(self, kind: str, case: str, size: dict[str, int], work: float, speed: float = 1.0) -> list[Row]:
        """All providers of a point, timed every way, checked and compared."""
        noise = random.Random(f"{case} {size} {speed}")
        mine = ("flashsloth/triton", "flashsloth/cuda") if kind == "cuda" else ("flashsloth/cpu",)
        made = []
        for method in ("graph", "call") if kind == "cuda" else ("wall",):
            group = []
            for provider in (*mine, "flashsloth/reference", PLAIN, LOOP):
                row = Row(case, case.partition("/")[0], size, "float32", "forward", provider, method, work, work / 100)
                row.ours = provider.startswith("flashsloth")
                row.max_error, row.error_allowed = 1e-4, 2e-4
                seconds = FACTORS.get(provider, 3.0) * (work / 1e13 + 5e-6) / (speed if row.ours else 1.0)
                row.set_times([seconds * math.exp(noise.gauss(0, 0.02)) for _ in range(15)])
                row.share = 0.5 / FACTORS.get(provider, 3.0)
                row.peak_bytes = int(FACTORS.get(provider, 3.0) * 2**20)
                group.append(row)
            for row in group:
                if row.ours:
                    row.ratios = {o.provider: ratio(o.samples, row.samples)._asdict() for o in group if not o.ours}
            best = group[1] if kind == "cuda" else group[0]
            best.goals = [GoalResult("speedup", 1.5, [PLAIN], best.ratios[PLAIN]["p50"], True)]
            made += group
        return made

    def result(self, kind: str = "cuda", speed: float = 1.0, complete: bool = True, **header: Any) -> Result:
        rows = self.rows(kind, "spatial_pool/forward-b1", {"batch": 1, "side": 27}, 2e9, speed)
        for batch in (1, 4, 16, 64, 256):
            rows += self.rows(kind, "spatial_pool/batch", {"batch": batch, "side": 27}, 2e9 * batch, speed)
        rows += end_to_end("call" if kind == "cuda" else "wall")
        return Result(self.header(kind, **header), rows, complete)

    def store(self, result: Result) -> Result:
        save(result, result.path(self.folder))
        return result

    def several(self) -> None:
        """Two devices; on the GPU three commits, the second with uncommitted changes."""
        for i, commit in enumerate("abc"):
            dirty = {"dirty": True, "difference": "1f"} if i == 1 else {}
            date = f"2026-11-2{i}T10:00:00Z"
            self.store(self.result("cuda", 1 + 0.2 * i, commit=commit * 40, date=date, **dirty))
        self.store(self.result("cpu"))

    def content(self, **options: Any) -> list[Content]:
        collection = collect(self.folder, options.pop("slug", None))
        return [gather(device, Cases(CASES), **options) for device in collection.devices]


def end_to_end(method: str) -> list[Row]:
    rows = []
    for model, ours, tokens in (("FlashSloth", True, 81), ("uncompressed", False, 729)):
        for batch in (1, 8):
            size = {"width": 384, "height": 384, "batch": batch, "visual_tokens": tokens, "new_tokens": 16}
            times = {"vision": 8e-3, "compression": 1e-3, "prefill": tokens * 3e-5, "decode": 0.01}
            if not ours:
                del times["compression"]
            times["first token"] = sum(times.values()) - times["decode"]
            times["answer"] = times["first token"] + 15 * times["decode"]
            times["training stage 1"] = 3 * times["first token"]
            for phase, seconds in times.items():
                row = Row("e2e/models", "e2e", size, "float32", phase, model, method, tokens * 5e9, 5e9, ours)
                row.set_times([seconds * batch] * 5)
                row.peak_bytes = tokens * batch << 20
                rows.append(row)
    return rows


@pytest.fixture
def factory(tmp_path: Path) -> Factory:
    return Factory(tmp_path / "results")


def run(*arguments: str, claims: Callable[..., Any] = e2e.unmeasured_claims) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return command.main(parser.parse_args(arguments), CASES, claims)


# ---- the exponent of a curve ----

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


# ---- the page ----


class Elements(HTMLParser):
    """The elements of a page, their nesting checked."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((name, dict(attributes)))
        if name not in ("meta", "br"):
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name


def test_page_stands_alone_and_is_well_formed(factory: Factory) -> None:
    factory.several()
    html = page.render(factory.content())
    elements = Elements(html).found
    names = [name for name, _ in elements]
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "plain &lt;PyTorch&gt;" in html
    for name, attributes in elements:
        if name == "svg" and attributes.get("role") == "img":
            assert attributes["aria-label"]
        elif name == "svg" and "viewbox" not in attributes:
            assert attributes.get("aria-hidden") == "true"  # the table it stands in has the numbers
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    targets = [str(attributes["href"])[1:] for _, attributes in elements if "href" in attributes]
    assert set(targets) <= set(ids)


def test_scales_name_round_values() -> None:
    for low, high in ((0.5, 40.0), (0.97, 1.02), (1e-6, 3.0), (1.0, 1.0), (1.0, 900.0)):
        scale = log_scale([low, high], formats.tick_ratio, baseline=1.0)
        assert scale.low < low <= high < scale.high
        assert 1 <= len(scale.ticks) <= 10
        places = [scale.at(tick) for tick in scale.ticks]
        assert places == sorted(places)
        assert 0 < places[0] <= places[-1] < 100


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
addEventListener("load", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
  const root = document.documentElement, box = (one) => one.getBoundingClientRect();
  const drawn = [...document.querySelectorAll("svg.panel, svg.strip")].filter((one) => box(one).width > 60);
  const text = [...document.querySelectorAll("svg.panel text")].map((one) => box(one));
  parent.document.documentElement.dataset.found = JSON.stringify({
    width: innerWidth, wide: root.scrollWidth, requests: performance.getEntriesByType("resource").length,
    headings: [...document.querySelectorAll("h2, h3")].map((one) => one.innerText), drawn: drawn.length,
    outside: text.filter((one) => one.right > innerWidth + 1 || one.left < -1).length,
    small: Math.min(...text.map((one) => one.height)),
  });
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_opens_in_a_browser(factory: Factory, tmp_path: Path, width: int) -> None:
    factory.several()
    html = page.render(factory.content())
    assert page.POLICY in html.replace("&#x27;", "'")
    probed = html.replace("style-src", "script-src &#x27;unsafe-inline&#x27;; style-src", 1).replace("</body>", PROBE)
    path = tmp_path / "frame.html"  # a window has a least width, a frame is as wide as it is told
    path.write_text(f'<iframe srcdoc="{escape(probed)}" style="width: {width}px; height: 900px; border: 0"></iframe>')
    assert CHROMIUM is not None
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000")
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ":CONSOLE" not in done.stderr, done.stderr
    probe = re.search(r'data-found="([^"]*)"', done.stdout)
    assert probe is not None, done.stdout[:2000]
    found = json.loads(unescape(probe.group(1)))
    assert found["width"] == width
    assert found["wide"] <= width
    assert found["requests"] == 0
    assert found["outside"] == 0
    assert found["small"] >= 9  # pixels: a label can be read
    assert found["drawn"] > 50
    for heading in ("Speedup by size", "Goals", "Scaling", "Share of the physical limit", "Memory", "Whole models"):
        assert found["headings"].count(heading) == 2
