"""The tables of the report, as text: the page and the Markdown show the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.report import formats
from bench.report.collect import Device
from bench.report.curves import Curve
from bench.report.history import Track
from bench.report.points import END_TO_END, OURS_PREFIX, Cases, Point, backend
from bench.report.sizes import label, lines_of, sizes_of
from bench.report.summary import JudgedGoal, Opponent
from bench.result import Row

NONE = ""

Headings = Mapping[tuple[str, ...], str]


@dataclass(frozen=True)
class Table:
    """Columns, rows of as many cells, which columns hold numbers, and the tone of cells that begin with a word."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: frozenset[int] = frozenset()
    tones: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def without_empty(self) -> Table:
        """Without the columns that have nothing in any row."""
        kept = [i for i in range(len(self.columns)) if any(row[i] for row in self.rows)]
        rows = [tuple(row[i] for i in kept) for row in self.rows]
        right = frozenset(place for place, i in enumerate(kept) if i in self.right)
        return Table(tuple(self.columns[i] for i in kept), rows, right, self.tones)

    def tone(self, cell: str) -> str | None:
        """Of a cell that begins with one of the marked words."""
        return next((tone for word, tone in self.tones.items() if cell.startswith(word)), None)


TONES = {"missed": "bad", "unmeasured": "warn", "reached": "good"}


def opponents(found: Sequence[Opponent]) -> Table:
    """Every peer: median ratio, its range over the sizes, and over how many."""
    rows = []
    for one in found:
        rows.append((one.use, one.peer, *opponent_cells(one)))
    return Table(("op", "against", "median", "range", "measurements"), rows, frozenset({2, 3, 4}))


def opponent_cells(one: Opponent) -> tuple[str, str, str]:
    """Median, range, and how many, with those that failed."""
    ratios = sorted(one.ratios)
    failed = f"{one.failed} failed" if one.failed else ""
    if not ratios:
        return "no speedup", "", failed
    between = f"{formats.number(ratios[0])} to {formats.number(ratios[-1])}" if len(ratios) > 1 else ""
    return formats.ratio(one.median), between, ", ".join(filter(None, (str(len(ratios)), failed)))


def speedups(found: Sequence[Point], absolute: bool) -> Table:
    """Every ratio, with its spread; on a GPU the times too."""
    columns = ["case", "timed by", "ours", "against", "ratio", "p20 to p80"]
    rows = []
    for point in found:
        for against in point.against:
            assert point.ours is not None
            cells = [point.heading, point.method, backend(point.ours), against.peer.provider]
            cells += [formats.ratio(against.ratio.p50), formats.spread(against.ratio)]
            if absolute:
                cells += [times(point.ours), times(against.peer)]
            rows.append(tuple(cells))
    if absolute:
        columns += ["our time", "its time"]
    return Table(tuple(columns), rows, frozenset(range(4, len(columns))))


def times(row: Row) -> str:
    """The median, with half the distance from p20 to p80 where it shows."""
    if row.times is None:
        return NONE
    return formats.seconds(row.times.p50)


def exponents(found: Sequence[Curve]) -> Table:
    rows = []
    for curve in found:
        for line in curve.lines:
            verdict = "steeper than the work" if line.fit.steep else NONE
            rows.append((curve.heading, curve.method, line.provider, str(line.fit), verdict))
    return Table(
        ("curve", "timed by", "provider", "exponent of time over work", ""),
        rows,
        tones={"steeper than the work": "bad"},
    )


def shares(found: Sequence[Point]) -> Table:
    rows = []
    for point in found:
        row = point.ours
        if row is not None and row.share is not None:
            peers = [a.peer.share for a in point.against if a.peer.share is not None]
            best = formats.percent(max(peers)) if peers else NONE
            rows.append((point.heading, point.method, backend(row), formats.percent(row.share), best))
    return Table(("case", "timed by", "ours", "share of the limit", "best peer"), rows, frozenset({3, 4}))


def memory(found: Sequence[Point]) -> Table:
    """Bytes of ours and of every peer, a point once however it was timed."""
    rows: dict[tuple[str, str], tuple[str, ...]] = {}
    for point in found:
        for row in memory_rows(point):
            key = (point.heading, row.provider)
            rows.setdefault(key, (point.heading, row.provider, _amount(row.peak_bytes), _amount(row.kept_bytes)))
    columns = ("case", "provider", "peak above inputs", "kept for backward")
    return Table(columns, list(rows.values()), frozenset({2, 3})).without_empty()


def memory_rows(point: Point) -> list[Row]:
    """Ours first, and the peers, that have a memory."""
    rows = [*([point.ours] if point.ours is not None else []), *(against.peer for against in point.against)]
    return [row for row in rows if row.peak_bytes is not None or row.kept_bytes is not None]


def _amount(count: int | None) -> str:
    return NONE if count is None else formats.amount(count)


def history(found: Sequence[Track], device: Device) -> Table:
    """Every point that more than one result has: newest value, and how it moved since the one before."""
    rows = []
    for track in found:
        first, last = (device.history[track.values[i][0]].header for i in (0, -1))
        over = f"{formats.commit(first)} to {formats.commit(last)}, {len(track.values)} results"
        rows.append((track.title, track.what or "time", track.shown, track.moved, over))
    return Table(("case", "", "newest", "change", "over"), rows, frozenset({2, 3}))


def goals(found: Sequence[JudgedGoal], headings: Headings, absolute: bool) -> Table:
    rows = []
    for one in found:
        wanted, measured = goal_words(one, absolute)
        who = one.row.provider.removeprefix(OURS_PREFIX)
        rows.append((headings[one.row.point], who, wanted, measured, one.state))
    return Table(("case", "ours", "goal", "measured", ""), rows, frozenset({3}), tones=TONES)


def goal_words(one: JudgedGoal, absolute: bool) -> tuple[str, str]:
    """What was wanted, and what came."""
    goal = one.goal
    peers = formats.listed(goal.peers)
    peer = f"the fastest of {peers}" if len(goal.peers) > 1 else peers
    value = goal.measured
    if goal.kind == "speedup":
        return f"≥ {formats.tick_ratio(goal.limit)} as fast as {peer}", "" if value is None else formats.precise(value)
    if goal.kind == "overhead":
        return f"≤ {formats.tick_ratio(goal.limit)} the time of {peer}", "" if value is None else formats.precise(value)
    if goal.kind == "seconds":
        shown = "" if value is None or not absolute else formats.seconds(value)
        return f"≤ {formats.tick_seconds(goal.limit)}", shown
    if goal.kind == "share":
        return f"≥ {formats.percent(goal.limit)} of the limit", "" if value is None else formats.percent(value)
    return f"keeps ≤ {_part(goal.limit)} of the tensor it is compared with", "" if value is None else _part(value)


def _part(value: float) -> str:
    return f"1/{1 / value:.3g}" if 0 < value < 1 else f"{value:.3g}"


def failures(rows: Sequence[Row], headings: Headings) -> Table:
    """What was wrong, a result once however it was timed."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for row in rows:
        if row.failure is not None:
            error = "" if row.max_error is None else f"{row.max_error:.3g}"
            allowed = "" if row.error_allowed is None else f"{row.error_allowed:.3g}"
            key = (*row.point, row.provider, row.failure)
            found.setdefault(key, (headings[row.point], row.provider, row.failure, error, allowed))
    return Table(("case", "provider", "what was wrong", "error", "allowed"), list(found.values()), frozenset({3, 4}))


def missing(rows: Sequence[Row]) -> Table:
    """What could not run and why, the same reason once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.missing is not None:
            cases = groups.setdefault((row.provider, row.missing), [])
            if row.case not in cases:
                cases.append(row.case)
    found = [(provider, reason, ", ".join(cases)) for (provider, reason), cases in sorted(groups.items())]
    return Table(("provider", "why", "cases"), found)


def header(device: Device) -> Table:
    """Machine and code, as far as the result says."""
    head = device.header
    clocks, after = head.get("clocks") or {}, head.get("clocks_after") or {}
    facts: list[tuple[str, object]] = [
        ("device", device.name),
        ("cores, threads", None if device.absolute else f"{head.get('cores')}, {head.get('threads')}"),
        ("instructions of our CPU kernels", None if device.absolute else head.get("isa") or "none built"),
        ("compute capability", ".".join(map(str, head.get("capability") or [])) or None),
        ("driver", head.get("driver")),
        *(
            (_CLOCKS.get(name, name), before_after(value, after.get(name)))
            for name, value in clocks.items()
            if name != "driver_version"
        ),
        ("torch", head.get("torch")),
        ("triton", head.get("triton") or "absent"),
        ("CUDA of torch", head.get("cuda")),
        ("python", head.get("python")),
        ("peers installed", ", ".join(f"{name} {found}" for name, found in (head.get("peers") or {}).items()) or None),
        ("automatic choice", ", ".join(f"{op}: {name}" for op, name in (head.get("backends") or {}).items()) or None),
        ("load of the machine", head.get("load")),
        ("commit", head["commit"]),
        (
            "uncommitted changes",
            {None: "unknown", False: "none", True: f"yes, {head.get('difference')}"}[head.get("dirty")],
        ),
        ("date (UTC)", head["date"]),
    ]
    if device.absolute:
        ceilings = head.get("ceilings") or {}
        names = {"bytes_per_second": ("bandwidth measured", "B"), "flops_per_second": ("product rate measured", "FLOP")}
        for key, (name, unit) in names.items():
            if ceilings.get(key):
                facts.append((name, formats.rate(ceilings[key], unit)))
    return Table(("", ""), [(name, str(value)) for name, value in facts if value is not None])


_CLOCKS = {
    "clocks.sm": "SM clock, before and after",
    "clocks.mem": "memory clock, before and after",
    "clocks.max.sm": "highest SM clock",
    "temperature.gpu": "temperature (°C), before and after",
    "clocks_throttle_reasons.active": "throttle reasons, before and after",
}


def before_after(before: str, after: str | None) -> str:
    """A value before and after the run; once where it stayed."""
    return before if after in (None, before) else f"{before}, then {after}"


_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


def throttling(*states: Mapping[str, str]) -> list[str]:
    """Why the driver held the clocks back, from its bits; being idle and clocks that were asked for do not count."""
    bits = 0
    for state in states:
        try:
            bits |= int(state.get("clocks_throttle_reasons.active", "0"), 16)
        except ValueError:
            continue  # "N/A": this device does not tell
    return [name for bit, name in _REASONS.items() if bits & bit]


def headings(rows: Sequence[Row], cases: Cases) -> Headings:
    """How the point of every row is called."""
    named = {}
    sizes = sizes_of(rows)
    for row in rows:
        if row.op == END_TO_END:
            named[row.point] = f"{row.case}, {row.mode}"
            continue
        own = sizes[row.case]
        axis = cases.axis(row.case, own)
        axis = axis if all(axis in size for size in own) else ""
        line = lines_of(own, axis)[own.index(row.size)] if axis else ""
        found = label(row.size, own, axis, line)
        title = cases.title(row.case)
        named[row.point] = f"{title}, {found}" if found else title
    return named
