"""Results as runs would store them, for the tests of the report."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from bench.report import add_arguments, command, e2e
from bench.report.collect import collect
from bench.report.content import Content, gather
from bench.report.points import Cases
from bench.result import GoalResult, Result, Row, save
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


def run(*arguments: str, claims: Callable[..., Any] = e2e.unmeasured_claims) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return command.main(parser.parse_args(arguments), CASES, claims)


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
