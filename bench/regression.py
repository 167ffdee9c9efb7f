"""``python -m bench check``: is anything of ours slower here than it was when this device's baseline was stored.

What is compared is what :mod:`bench.slowdown` compares: times on a GPU, ratios to plain peers on a CPU. A case is
slower when the whole interval of its slowdown lies beyond the tolerance. Many cases are looked at, and nobody reads a
check that cries wolf:

* What looks slower (at :data:`SCREEN`) is measured again, twice, each time afresh. Only what every measurement shows is
  kept; the others were noise.
* The verdict is on all three together. Its bound is wrong with probability :data:`FAMILY` divided by the number of
  comparisons (Bonferroni), so a check raises a false alarm with probability :data:`FAMILY` at most, whatever the number
  of cases and however they depend on each other. A case at exactly the tolerance counts as not slower here.
* Measuring again says nothing about the baseline, which was off by something too. That is in the interval: see
  ``RUN_TO_RUN`` in :mod:`bench.slowdown`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from bench import suite
from bench.case import Case
from bench.result import RESULTS, Result, Row, load, make_header, stored
from bench.slowdown import WHOLE_MODELS, Key, View, label, matches, percent, short_sizes, slowdown, span, times
from bench.statistics import Array, Estimate

FAMILY = 0.005  # probability of a false alarm of a whole check
SCREEN = 0.05  # one-sided, of one measurement of one case
MEASUREMENTS = 3  # at most, the first included

Measure = Callable[[Sequence[str]], Result]  # names of cases, to a result with rows of all their providers
Verdict = Literal["regression", "not confirmed", "no slower", "failed", "not judged", "missing", "new"]


class NoBaseline(ValueError):
    """There is nothing of this device to compare with."""


@dataclass(frozen=True)
class Finding:
    """What came of one provider at one size of a case. ``slowdown``: ours now over then, of all ``measurements``."""

    key: Key
    verdict: Verdict
    slowdown: Estimate | None = None
    measurements: int = 0
    note: str = ""


class Report(NamedTuple):
    """All findings, and the tolerance they were held to (0.05: 5 % slower is accepted)."""

    findings: list[Finding]
    tolerance: float

    def of(self, *verdicts: Verdict) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict in verdicts]

    @property
    def exit_code(self) -> int:
        """1: a regression or a failed check of ours. 2: nothing could be compared. 0: all is well."""
        if self.of("regression", "failed"):
            return 1
        return 0 if self.of("no slower", "not confirmed") else 2


def beyond(estimate: Estimate, tolerance: float, error: float) -> Array:
    """Whether a slowdown is larger than the tolerance, which is wrong with probability ``error`` at most."""
    return np.asarray(estimate.lower(error) > np.log1p(tolerance))


def check(
    baseline: Result,
    measure: Measure,
    names: Sequence[str],
    *,
    tolerance: float,
    partial: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure the cases ``names`` and compare with the baseline; what looks slower, up to twice again.

    ``partial``: sizes that are not measured at all are left out on purpose, and not missing. ``say`` is told what is
    measured again, and what else has changed.

    Raises:
        ValueError: the baseline or a measurement is of another device or size than the other.
    """
    old = View(baseline)
    views = [View(measure(names))]
    for line in differences(old, views[0]):
        say(line)
    if partial:
        measured = {row.point for row in views[0].result.rows}
        old = View(replace(baseline, rows=[row for row in baseline.rows if row.point in measured]))
    findings = _without_times(old, views[0])
    settled = {finding.key for finding in findings}
    judged = [key for key in old.ours if key not in settled]
    found: dict[Key, Finding] = {}
    suspects = []
    for key in judged:
        now = slowdown(old, views, key)
        if isinstance(now, str):
            found[key] = Finding(key, "not judged", note=now)
            continue
        found[key] = Finding(key, "no slower", now, 1)
        if beyond(now, tolerance, SCREEN):
            suspects.append(key)
    comparisons = sum(finding.slowdown is not None for finding in found.values())
    while suspects and len(views) < MEASUREMENTS:
        say(f"measured again, as they look slower: {', '.join(label(key) for key in suspects)}")
        views.append(View(measure(list(dict.fromkeys(key[0] for key in suspects)))))
        for key in suspects:
            found[key] = _again(old, views, key, tolerance, last=found[key])
        suspects = [key for key in suspects if found[key].verdict == "no slower"]
    for key in suspects:
        together = found[key].slowdown
        assert together is not None
        sure = beyond(together, tolerance, FAMILY / comparisons)
        found[key] = replace(found[key], verdict="regression" if sure else "not confirmed")
    return Report([*found.values(), *findings], tolerance)


def _again(old: View, views: list[View], key: Key, tolerance: float, last: Finding) -> Finding:
    """The finding after one more measurement: all of them together, or why it is settled."""
    row = views[-1].rows.get(key)
    if row is not None and row.failure is not None:
        return Finding(key, "failed", measurements=len(views), note=row.failure)
    alone, together = slowdown(old, views[-1:], key), slowdown(old, views, key)
    if isinstance(alone, str) or isinstance(together, str):
        return replace(last, verdict="not judged", note=f"measured again: {alone}")
    verdict: Verdict = "no slower" if beyond(alone, tolerance, SCREEN) else "not confirmed"
    return Finding(key, verdict, together, len(views))


def _without_times(old: View, new: View) -> list[Finding]:
    """What cannot be compared, each with the reason: a failed check of ours, what is missing now, what is new."""
    findings = []
    for row in new.result.rows:
        if row.ours and row.failure is not None:
            findings.append(Finding(row.key, "failed", measurements=1, note=row.failure))
    failed = {finding.key for finding in findings}
    for key in old.ours:
        now = new.rows.get(key)
        if key not in failed and (now is None or now.missing is not None):
            reason = None if now is None else now.missing
            findings.append(Finding(key, "missing", note=reason or "it was not measured now"))
    for key in new.ours:
        if key not in old.ours and key not in failed and new.rows[key].passed:
            before = old.rows.get(key)
            note = "it is not in the baseline" if before is None else f"in the baseline it had no time: {_why(before)}"
            findings.append(Finding(key, "new", note=note))
    return findings


def differences(old: View, new: View) -> list[str]:
    """What differs beside the code, in words: with it peers, and so ratios to them, may have changed too."""
    before, now = old.result.header, new.result.header
    lines = [
        f"{name} was {before.get(name)} when the baseline was measured and is {now.get(name)} now"
        for name in ("torch", "triton", "cuda", "driver", "python")
        if before.get(name) != now.get(name)
    ]
    for header, when in ((before, "when the baseline was measured"), (now, "now")):
        load, cores = header.get("load"), header.get("cores")
        if old.kind == "cpu" and load and cores and load > 1.5 * cores:
            lines.append(f"the load was {load:.1f} on {cores} processors {when}: that may shift ratios")
    return lines


def _why(row: Row) -> str:
    return row.missing or row.failure or "nothing was stored"


def find_baseline(slug: str, *, file: Path | None = None, folder: Path = RESULTS) -> tuple[Path, Result]:
    """The newest complete result of full size of a device; or ``file``, which must be of that device.

    Raises:
        NoBaseline: there is none.
        ValueError: ``file`` is of another device or of small sizes, or a file is no result of this schema.
        OSError: ``file`` cannot be read.
    """
    if file is not None:
        result = load(file)
        if result.header["slug"] != slug:
            raise ValueError(
                f"--baseline: expected a result of this device, {slug}, got one of {result.header['slug']}"
            )
        if result.header["small"]:
            raise ValueError(f"--baseline: expected a result of full size, got one of small sizes: {file}")
        return file, result
    usable = [(path, one) for path, one in stored(folder, slug) if one.complete and not one.header["small"]]
    if not usable:
        raise NoBaseline(
            f"no baseline for this device: expected a complete result in {folder / slug}; "
            "`python -m bench run` stores one"
        )
    return usable[-1]


def render(report: Report) -> Group:
    """The table of a check, worst first, and below it in words what needs attention."""
    table = Table(title="Ours now over ours in the baseline", title_justify="left", box=SIMPLE)
    for name in ("case", "size", "provider"):
        table.add_column(name)
    for name in ("now / then", "95 % interval", "measured"):
        table.add_column(name, justify="right")
    table.add_column("")
    timed = [(finding.slowdown, finding) for finding in report.findings if finding.slowdown is not None]
    sizes = short_sizes(finding.key for finding in report.findings)
    for slower, finding in sorted(timed, key=lambda pair: -pair[0].ratio):
        case, _, _, _, provider, _ = finding.key
        style = "bold red" if finding.verdict == "regression" else ""
        cells = (f"{slower.ratio:.3f}", span(slower), times(finding.measurements), Text(finding.verdict, style=style))
        table.add_row(case, sizes[finding.key], provider, *cells)
    notes = [Text(line, style=style) for line, style in _notes(report)]
    return Group(table, *notes, Text(summary(report)))


def _notes(report: Report) -> list[tuple[str, str]]:
    """What needs attention, in words, with a style; what is the same at many sizes once."""
    lines = []
    for finding in report.of("regression"):
        assert finding.slowdown is not None
        low, high = (100 * (bound - 1) for bound in finding.slowdown.interval())
        text = (
            f"{label(finding.key)}: REGRESSION: {100 * (finding.slowdown.ratio - 1):.1f} % slower than the baseline "
            f"(95 % interval {low:.1f} to {high:.1f} %), in {times(finding.measurements)}; "
            f"tolerance {100 * report.tolerance:.3g} %"
        )
        lines.append((text, "bold red"))
    for finding in report.of("failed"):
        lines.append((f"{label(finding.key)}: check failed, so it has no time: {finding.note}", "bold red"))
    alike: dict[tuple[str, ...], list[Key]] = {}
    for finding in report.of("missing", "new", "not judged"):
        case, _, _, _, provider, _ = finding.key
        alike.setdefault((case, provider, finding.verdict, finding.note), []).append(finding.key)
    for (case, provider, verdict, note), keys in alike.items():
        name = label(keys[0]) if len(keys) == 1 else f"{case} at {len(keys)} sizes, {provider}"
        lines.append((f"{name}: {verdict}: {note}", "yellow"))
    return lines


def summary(report: Report) -> str:
    """One line: how many of what."""
    compared = report.of("regression", "not confirmed", "no slower")
    worst = f"{len(report.of('regression'))} slower by more than {100 * report.tolerance:.3g} %"
    rest = [(verdict, len(report.of(verdict))) for verdict in ("failed", "missing", "new", "not judged")]
    return "; ".join([f"{len(compared)} compared, {worst}", *(f"{count} {name}" for name, count in rest if count)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the check itself; which cases, for how long and where is common to all commands."""
    parser.add_argument(
        "--tolerance", type=percent, default=0.05, metavar="PERCENT", help="slowdown that is accepted, default: 5%%"
    )
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="default: this device's newest complete result")
    parser.add_argument("--if-any", action="store_true", help="without a baseline for this device, succeed and say so")


def measurer(
    cases: Sequence[Case], device: str, *, quick: bool, budget: float | None, tell: Callable[[str, int], None]
) -> Measure:
    """Measures cases as ``python -m bench run`` does, into a file that is not kept.

    ``quick``, ``budget``, ``tell``: as for :func:`bench.suite.plan` and :func:`bench.suite.go`.
    """
    whole = suite.plan(cases, device, quick=quick, budget=budget)

    def measure(names: Sequence[str]) -> Result:
        plan = whole._replace(points=tuple(point for point in whole.points if point[0].name in names))
        result = Result(make_header(device, quick=quick))  # without ceilings: no share of a limit is asked for
        with tempfile.TemporaryDirectory(prefix="flashsloth-bench-") as folder:
            suite.go(plan, result, result.path(Path(folder)), tell=tell)
        return result

    return measure


def main(
    options: argparse.Namespace,
    *,
    slug: str,
    names: Sequence[str],
    measure: Measure,
    console: Console,
    folder: Path = RESULTS,
) -> int:
    """Exit code 0: no slower. 1: a regression, or a check of ours failed. 2: nothing to compare with.

    ``slug``: of this device. ``names``: all cases that are declared; ``options.case``, if there is one, chooses;
    ``options.quick``: ``measure`` leaves out sizes.

    Raises:
        ValueError: the pattern matches nothing, or the baseline cannot be used.
        OSError: the baseline cannot be read.
    """
    pattern = getattr(options, "case", None)
    chosen = [name for name in names if matches(name, pattern)]
    if not chosen:
        raise ValueError(f"--case: expected a pattern that matches one of {', '.join(names)}, got {pattern!r}")
    try:
        path, baseline = find_baseline(slug, file=options.baseline, folder=folder)
    except NoBaseline as error:
        if not options.if_any:
            raise
        console.print(str(error), soft_wrap=True, markup=False, highlight=False)
        return 0
    console.print(f"baseline {path}, commit {baseline.header['commit'][:12]}", soft_wrap=True, markup=False)
    asked = [row for row in baseline.rows if matches(row.case, pattern) and row.op != WHOLE_MODELS]
    kept = replace(baseline, rows=asked)  # whole models take minutes each: two results of them can be compared

    def tell(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    partial = getattr(options, "quick", False)
    report = check(kept, measure, chosen, tolerance=options.tolerance, partial=partial, say=tell)
    console.print(render(report), highlight=False)
    return report.exit_code
