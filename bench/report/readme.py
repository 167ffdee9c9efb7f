"""The table of README.md, from the newest complete full result of a device, between two marks."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from bench.report import formats
from bench.report.collect import Collection, Device, full
from bench.report.markdown import table
from bench.report.points import Cases, Point, points
from bench.report.summary import first_method
from bench.report.tables import Table
from bench.result import ROOT, ResultError

README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def rewrite(path: Path, collection: Collection, cases: Cases) -> Device:
    """Replace what stands between the marks, and nothing else; and say which device it is from.

    Raises:
        ResultError: no mark or more than one of a kind, several devices to choose from, or no complete full result.
        OSError: the file cannot be read or written.
    """
    device = chosen(collection)
    before = path.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise ResultError(f"{path}: expected one {BEGIN} and after it one {END}, where the table goes")
    head, rest = before.split(BEGIN)
    tail = rest.split(END)[1]
    after = f"{head}{BEGIN}\n{block(device, cases)}\n{END}{tail}"
    if after != before:
        path.write_text(after, encoding="utf-8")
    return device


def chosen(collection: Collection) -> Device:
    """The one device with a complete full result. Raises ResultError for none or several."""
    found = [device for device in collection.devices if full(device.current)]
    if not found:
        raise ResultError("--readme: expected a complete full result, which `python -m bench run` stores; got none")
    if len(found) > 1:
        raise ResultError(f"--readme: expected --device with one of {', '.join(device.slug for device in found)}")
    return found[0]


def block(device: Device, cases: Cases) -> str:
    """The sentence that names machine and commit, and the table."""
    head = device.header
    shown = first_method(points(device.current, cases))
    dtypes = formats.listed(sorted({point.dtype for point in shown}))
    isa = f" ({head['isa']})" if head.get("isa") else ""
    place = device.name if device.absolute else f"{device.name}{isa}, {head.get('threads')} threads"
    sentence = (
        f"What peers take over what ours takes, on {place}: {dtypes}, torch {head.get('torch')}, commit "
        f"{formats.commit(head)} of {formats.day(head)}, medians. `python -m bench report --readme` writes this table."
    )
    rows = [row for point in _notable(shown) for row in _rows(point)]
    columns = ("case", "peers over ours", *(("our time",) if device.absolute else ()))
    right = frozenset({2}) if device.absolute else frozenset()
    return f"\n{fill(sentence, 120)}\n\n{table(Table(columns, [row[: len(columns)] for row in rows], right))}\n"


def _notable(found: list[Point]) -> list[Point]:
    """The points that have a goal; of a case without any, its first. A curve without goals is one for the page."""
    with_goal = {point.case for point in found if _has_goal(point)}
    first = {point.case: point for point in reversed(found) if not point.axis}
    return [
        point for point in found if _has_goal(point) or (point.case not in with_goal and point is first.get(point.case))
    ]


def _has_goal(point: Point) -> bool:
    return any(row.goals for row in (*point.backends, *point.failed))


def _rows(point: Point) -> list[tuple[str, str, str]]:
    """Time against every peer; where goals speak of them, bytes kept for backward, and what an extra output costs."""
    if point.ours is None:
        return [(point.heading, "check failed, no speedup", "")]
    peers = [f"{against.peer.provider} {formats.ratio(against.ratio.p50)}" for against in point.against]
    rows = [(point.heading, "; ".join(peers) or "no peer to compare with", formats.seconds(point.ours.p50 or 0.0))]
    kept = point.ours.kept_bytes
    for goal in point.ours.goals:
        if goal.kind == "kept" and kept:
            others = [(against.peer.provider, against.peer.kept_bytes) for against in point.against]
            bytes_ = [f"{name} {formats.ratio(count / kept)}" for name, count in others if count is not None]
            rows.append((f"{point.heading}, bytes kept for backward", "; ".join(bytes_), ""))
        elif goal.kind == "overhead" and goal.measured:
            rows.append(
                (f"{point.heading}, our time over {formats.listed(goal.peers)}", formats.precise(goal.measured), "")
            )
    return rows
