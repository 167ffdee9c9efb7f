"""All that a report says of a device, gathered once for the page and for Markdown."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from bench.report import e2e, formats, summary, tables
from bench.report.collect import Device, full
from bench.report.curves import Curve, curves
from bench.report.e2e import Claims, Setting
from bench.report.history import Track, tracks
from bench.report.points import Cases, Point, backend, points
from bench.report.summary import Checks, JudgedGoal, Opponent
from bench.report.tables import Table


@dataclass(frozen=True)
class Fact:
    """A line of the first screen. ``tone``: "good", "warn", "bad" or none."""

    name: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Content:
    """A device's report.

    Attributes:
        finding, about: the sentence of the first screen, and what it is over.
        headings: how the point of a row is called.
        claims: the paper's, beside what was measured.
    """

    device: Device
    finding: str
    about: str
    checks: Checks
    facts: list[Fact]
    points: list[Point]
    opponents: list[Opponent]
    goals: list[JudgedGoal]
    headings: tables.Headings
    curves: list[Curve]
    tracks: list[Track]
    settings: list[Setting]
    claims: Table
    failures: Table
    missing: Table

    @property
    def choice(self) -> str:
        """Where the fastest of our backends, which is shown, is not the one that serves by itself."""
        chosen = self.device.header.get("backends") or {}
        total, other = Counter[str](), Counter[tuple[str, str]]()
        for point in summary.first_method(self.points):
            if point.ours is not None and point.op in chosen:
                total[point.op] += 1
                if backend(point.ours) != chosen[point.op]:
                    other[point.op, backend(point.ours)] += 1
        words = [
            f"{op.replace('_', ' ')}, {best} at {count} of {formats.count(total[op], 'measurement')}, where "
            f"{chosen[op]} is the automatic choice"
            for (op, best), count in other.items()
        ]
        return f"Shown is the fastest of our backends: {'; '.join(words)}." if words else ""


def gather(device: Device, cases: Cases, claims: Claims = e2e.unmeasured_claims) -> Content:
    """Everything of one device. ``claims``: from its rows to the table of the paper's claims."""
    result = device.current
    found = points(result, cases)
    headings = tables.headings(result.rows, cases)
    finding, about = summary.headline(device, found)
    checks, goals = summary.checks(result), summary.goals(result)
    whole = e2e.rows_of(result.rows)
    return Content(
        device=device,
        finding=finding,
        about=about,
        checks=checks,
        facts=_facts(device, checks, goals),
        points=found,
        opponents=summary.opponents(found),
        goals=goals,
        headings=headings,
        curves=curves(result, cases),
        tracks=tracks(device, cases),
        settings=e2e.settings(result.rows),
        claims=claims(whole),
        failures=tables.failures(result.rows, headings),
        missing=tables.missing(result.rows),
    )


def _facts(device: Device, checks: Checks, goals: list[JudgedGoal]) -> list[Fact]:
    head = device.header
    return [_right(checks), _goals(goals), _code(device), *_conditions(head)]


def _right(checks: Checks) -> Fact:
    name = "Is it right?"
    if checks.failed:
        value = f"{formats.count(checks.failed, 'check')} failed"
        return Fact(name, value, f"{checks.passed} passed; what failed has no speedup below", "bad")
    if not checks.passed:
        return Fact(name, "Nothing was checked", "no result in this run", "warn")
    return Fact(name, f"All {checks.passed} results passed", "against fp64, in this run", "good")


def _goals(goals: list[JudgedGoal]) -> Fact:
    name, states = "Is it fast enough?", [goal.state for goal in goals]
    if not goals:
        return Fact(name, "No goals at these sizes")
    reached, missed, unmeasured = (states.count(state) for state in ("reached", "missed", "unmeasured"))
    rest = [f"{missed} missed"] * bool(missed) + [f"{unmeasured} unmeasured"] * bool(unmeasured)
    tone = "bad" if missed else "warn" if unmeasured else "good"
    return Fact(name, f"{reached} of {len(goals)} goals reached", ", ".join(rest), tone)


def _code(device: Device) -> Fact:
    head = device.header
    kind = "full run" if full(device.current) else "quick run" if device.current.complete else "unfinished run"
    name, value, when = "Commit", formats.commit(head), f"{formats.day(head)}, {kind}"
    if head.get("dirty"):
        return Fact(name, f"{value}, uncommitted changes", f"{when}; the commit does not say what ran", "bad")
    if head.get("dirty") is None:
        return Fact(name, value, f"{when}; whether the tree was clean is unknown", "warn")
    return Fact(name, value, when, "" if full(device.current) else "warn")


def _conditions(head: dict[str, object]) -> list[Fact]:
    """What the machine did meanwhile: clocks held back on a GPU, other load on a CPU."""
    if head["kind"] != "cuda":
        value = f"{head.get('threads')} threads, torch {head.get('torch')}"
        return [Fact("Conditions", value, f"load {head.get('load')} at the start; only ratios within the run count")]
    clocks, after = head.get("clocks") or {}, head.get("clocks_after") or {}
    assert isinstance(clocks, dict)
    assert isinstance(after, dict)
    reasons = tables.throttling(clocks, after)
    speed = clocks.get("clocks.sm")
    value = f"SM clock {tables.before_after(speed, after.get('clocks.sm'))}" if speed else "Clocks unknown"
    note = f"held back: {formats.listed(reasons)}" if reasons else "nothing held the clocks back" if clocks else ""
    return [Fact("Conditions", value, note, "warn" if reasons or not clocks else "")]
