"""The table of a GPU check, as plain text: it must print wherever the check runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = ("case", "provider", "median", "p20 to p80", "of the limit", "goal", "measured", "")


def render(document: Mapping[str, Any]) -> str:
    """Times, shares of the measured limit, and goals of every case; what failed has no time."""
    header, limits = document["header"], document["ceilings"]
    lines = [f"{header['device']}, driver {header['driver']}, torch {header['torch']}, triton {header['triton']}"]
    if limits is not None:
        lines.append(
            f"measured here: copy {limits['bytes_per_second'] / 1e12:.2f} TB/s, "
            f"bf16 product {limits['flops_per_second'] / 1e12:.0f} TFLOP/s"
        )
    rows = document["rows"]
    if rows:
        table: list[tuple[str, ...]] = [
            ("case", "provider", "median", "p20 to p80", "of the limit", "goal", "measured", "")
        ]
        table += [line for row in rows for line in _lines(row)]
        lines += ["", *_aligned(table)]
    if document["faster_in_cuda"]:
        lines += ["", f"faster in CUDA C++ than in Triton: {', '.join(document['faster_in_cuda'])}"]
    return "\n".join(lines)


def _lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    first: tuple[str, ...] = (row["case"], row["provider"])
    if row["failure"]:
        return [(*first, row["failure"][:100], "", "", "", "", "")]
    if row.get("kept_bytes") is not None:
        shown = (f"{row['kept_bytes'] / 2**20:.1f} MiB", "kept", "")
    elif row["seconds"] is None:
        return []  # checked, and no goal asks for its time
    else:
        times, share = row["seconds"], row["share"]
        spread = f"{_time(times['p20'])} to {_time(times['p80'])}"
        shown = (_time(times["p50"]), spread, f"{100 * share:.0f} %" if share is not None else "")
    goals = [_goal(goal) for goal in row["goals"]] or [("", "", "")]
    return [(*first, *shown, *goals[0])] + [("", "", "", "", "", *goal) for goal in goals[1:]]


def _goal(goal: Mapping[str, Any]) -> tuple[str, str, str]:
    value = goal["measured"]
    if value is None:
        return goal["text"], "", "unmeasured"
    shown = _time(value) if goal["kind"] == "seconds" else f"{value:.4f}" if goal["kind"] == "kept" else f"{value:.2f}"
    return goal["text"], shown, "reached" if goal["reached"] else "missed"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
