"""Numbers and sizes as the report writes them: few digits, a unit, the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.timing import Quantiles

MINUS, TIMES = "\u2212", "\u00d7"
METHODS = {
    "wall": "calls of all providers interleaved",
    "graph": "replayed CUDA graph, cold L2",
    "call": "plain call, launch included",
}


def ratio(value: float) -> str:
    """``5.8×``; near one with two digits after the point, where they matter."""
    return f"{number(value)}{TIMES}"


def number(value: float) -> str:
    """Two or three digits."""
    if value >= 99.5:
        return f"{value:.0f}" if value < 9999.5 else f"{value:.2g}"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 1.25 else f"{value:.2f}"


def precise(value: float) -> str:
    """A ratio with three digits, to be held against a limit: ``1.27×``."""
    return f"{three_digits(value)}{TIMES}"


def tick(value: float) -> str:
    """A round number on a scale: ``0.5``, ``20``, ``2k``."""
    return f"{value:g}" if value < 10_000 else f"{value / 1000:g}k"


def tick_ratio(value: float) -> str:
    return f"{value:g}{TIMES}"


def tick_seconds(value: float) -> str:
    """A round time: ``30 µs``, ``1 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale * 0.9999:
            return f"{value / scale:.4g} {unit}"
    return f"{value / 1e-9:.4g} ns"


def tick_size(value: float) -> str:
    """A size on an axis: ``729``, ``32k`` for 32768."""
    whole = int(value)
    return f"{whole // 1024}k" if whole >= 4096 and whole % 1024 == 0 else str(whole)


def spread(found: Quantiles) -> str:
    """``1.9 to 2.1``, from p20 to p80."""
    return f"{number(found.p20)} to {number(found.p80)}"


def seconds(value: float) -> str:
    """``12.3 µs``, ``4.56 ms``, ``1.20 s``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{three_digits(value / scale)} {unit}"
    return f"{three_digits(value / 1e-9)} ns"


def three_digits(value: float) -> str:
    """At most three digits, none invented: ``0.123``, ``1.23``, ``12.3``, ``123``, ``1230``."""
    if value == 0:
        return "0"
    for limit, digits in ((0.9995, 3), (9.995, 2), (99.95, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def amount(count: float) -> str:
    """Bytes: ``12.3 MiB``."""
    scale, unit = byte_unit(count)
    return f"{three_digits(count / scale)} {unit}" if scale > 1 else f"{count:.0f} B"


def byte_unit(count: float) -> tuple[float, str]:
    """The largest unit that is no larger, and its sign."""
    units = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
    return next((unit for unit in units if count >= unit[0]), units[-1])


def rate(per_second: float, unit: str) -> str:
    """``4.1 TB/s``, ``780 TFLOP/s``."""
    return f"{metric(per_second, unit)}/s"


def metric(value: float, unit: str) -> str:
    """``1.23 TFLOP``."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{three_digits(value / scale)} {prefix}{unit}"
    return f"{three_digits(value)} {unit}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def change(before: float, after: float) -> str:
    """``+3.1 %``; a real minus where it fell."""
    value = 100 * (after / before - 1)
    text = f"{abs(value):.1f}" if abs(value) < 99.95 else f"{abs(value):.0f}"
    if float(text) == 0:
        return "0.0 %"
    return f"{'+' if value > 0 else MINUS}{text} %"


def count(value: int, one: str, many: str = "") -> str:
    """``1 result``, ``3 results``."""
    return f"{value} {one if value == 1 else many or one + 's'}"


def size(entries: Mapping[str, int], names: Sequence[str] | None = None) -> str:
    """``batch 8, side 27``: all entries, or those named."""
    return ", ".join(f"{name.replace('_', ' ')} {entries[name]}" for name in names or entries if name in entries)


def commit(header: Mapping[str, object]) -> str:
    """The short commit, with a plus where uncommitted changes were measured."""
    return f"{str(header['commit'])[:7]}{'+' if header.get('dirty') else ''}"


def day(header: Mapping[str, object]) -> str:
    return str(header["date"])[:10]


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
