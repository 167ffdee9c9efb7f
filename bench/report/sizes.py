"""What tells the sizes of a case apart: all that differs, or the place on a curve and the line it belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bench.report import formats
from bench.result import Row

SAME_SHARE = 0.1  # log of a ratio: kept rows are a whole number, so a share of 1/9 is now 28/256, now 57/512


def sizes_of(rows: Sequence[Row]) -> dict[str, list[dict[str, int]]]:
    """The sizes of each case, in the order of the file."""
    found: dict[str, list[dict[str, int]]] = {}
    for row in rows:
        if row.size not in found.setdefault(row.case, []):
            found[row.case].append(row.size)
    return found


def label(size: Mapping[str, int], sizes: Sequence[Mapping[str, int]], axis: str, line: str) -> str:
    """What tells a size from others of its case: the place on the axis and the line, or all that differs."""
    if len(sizes) == 1:
        return ""
    if axis:
        return ", ".join(part for part in (formats.size(size, [axis]), line) if part)
    return formats.size(size, varying(sizes))


def varying(sizes: Sequence[Mapping[str, int]]) -> list[str]:
    """The entries in which sizes differ."""
    names = dict.fromkeys(name for size in sizes for name in size)
    return [name for name in names if len({size.get(name) for size in sizes}) > 1]


def lines_of(sizes: Sequence[Mapping[str, int]], axis: str) -> list[str]:
    """For each size, the line it belongs to: its other entries where these differ within the case.

    An entry that goes along with the axis (rows kept of rows) is known by its share of it.
    """
    parts: list[list[str]] = [[] for _ in sizes]
    for name in varying(sizes):
        if name == axis:
            continue
        values = [size.get(name, 0) for size in sizes]
        shares = _shares(values, [size[axis] for size in sizes])
        words = [f"{name.replace('_', ' ')} {value}" for value in values]
        if len(set(shares)) < len(set(values)) and all(shares):
            words = [f"{name.replace('_', ' ')} {share} of {axis.replace('_', ' ')}" for share in shares]
        for part, word in zip(parts, words, strict=True):
            part.append(word)
    return [", ".join(part) for part in parts]


def _shares(values: Sequence[int], whole: Sequence[int]) -> list[str]:
    """Each value as a share of the whole, close ones alike: ``1/9``, ``2x``. Empty for a value of zero."""
    if any(value <= 0 for value in (*values, *whole)):
        return ["" for _ in values]
    logs = [math.log(value / total) for value, total in zip(values, whole, strict=True)]
    names: dict[float, str] = {}
    ordered = sorted(set(logs))
    start = 0
    for i, one in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] - one > SAME_SHARE:
            group = ordered[start : i + 1]
            share = math.exp(group[len(group) // 2])
            name = (
                "all" if abs(share - 1) < 0.02 else f"1/{1 / share:.2g}" if share < 1 else f"{share:.2g}{formats.TIMES}"
            )
            names.update(dict.fromkeys(group, name))
            start = i + 1
    return [names[one] for one in logs]
