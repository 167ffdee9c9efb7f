"""The sections of a page about whole models."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import charts, e2e, formats
from bench.report.content import Content
from bench.report.e2e import Run, Setting
from bench.report.html import Markup, joined, tag
from bench.report.plots import MARKS, OURS, Line, Panel
from bench.report.sections import numbers, table
from bench.timing import Quantiles

LOOKS = ("0", "4", "3")  # of vision, compression and prefill


def whole_models(content: Content) -> Markup | None:
    if not content.settings:
        return None
    device, found = content.device, content.settings
    lead = "Full architectures with random weights, from pixels to an answer. Models were measured one after the other."
    if not device.absolute:
        lead = (
            "On a CPU these are small architectures and a self-test, which says nothing about full size. Times are "
            "multiples of FlashSloth's at the same size."
        )
    training = e2e.training(found, device)
    return joined(
        tag("p", lead, class_="lead"),
        _first_token(content),
        _answers(content),
        _memory(found),
        joined(tag("h4", "A training step"), table(training)) if training else None,
        numbers(e2e.models(found, device)),
    )


def claims(content: Content) -> Markup | None:
    if not content.claims:
        return None
    about = (
        "What the paper (arXiv 2412.04317) says FlashSloth saves against other small models, beside what is counted "
        "from their configurations or measured in this run."
    )
    return joined(tag("p", about, class_="lead"), table(content.claims))


def _first_token(content: Content) -> Markup | None:
    """A chart a batch, each to its own scale; those of larger batches on demand, as one user waits for batch 1."""
    batches: dict[int, list[Setting]] = {}
    for setting in content.settings:
        batches.setdefault(setting.batch, []).append(setting)
    unit_name = "milliseconds" if content.device.absolute else "multiples of FlashSloth's"
    parts: list[Markup] = []
    for batch, own in sorted(batches.items()):
        groups = [(setting.title, _bars(content, setting)) for setting in own]
        groups = [(title, bars) for title, bars in groups if bars]
        if groups:
            drawn = charts.stacked(groups, LOOKS, f"Time to first token at batch {batch}, in {unit_name}")
            parts.append(tag("details", tag("summary", f"At batch {batch}"), drawn) if parts else drawn)
    if not parts:
        return None
    about = f"Time to first token in {unit_name}"
    legend = charts.bar_key(*zip(LOOKS, e2e.PARTS, strict=True))
    return joined(tag("h4", about), legend, *parts)


def _bars(content: Content, setting: Setting) -> list[tuple[object, list[float], str]]:
    unit = setting.unit(content.device, lambda run: run.first_token)
    if not unit:
        return []
    scale = 1e3 if content.device.absolute else 1 / unit
    return [
        (
            tag("b", run.model) if run.ours else run.model,
            [part * scale for part in run.parts],
            e2e.time(setting, content.device, run, lambda one: one.first_token),
        )
        for run in setting.runs
        if sum(run.parts)
    ]


def _answers(content: Content) -> Markup | None:
    """Answers a second by batch, a panel an image size; a single batch stands in the table alone."""
    images: dict[tuple[int, int], list[Setting]] = {}
    for setting in content.settings:
        images.setdefault((setting.width, setting.height), []).append(setting)
    drawn = []
    for (width, height), own in images.items():
        unit = own[0].unit(content.device, lambda run: run.requests_per_second)
        lines = _lines(own, unit) if unit and len(own) > 1 else []
        if lines:
            name = f"{width}{formats.TIMES}{height}"
            panel = Panel(
                title=f"Answers a second on images of {name}",
                horizontal="batch",
                vertical="answers a second" if content.device.absolute else "answers a second, ours at the first is 1",
                lines=lines,
                names={float(setting.batch): str(setting.batch) for setting in own},
                value=formats.tick,
            )
            drawn.append(tag("figure", tag("figcaption", f"Images of {name}"), panel.draw()))
    return joined(tag("h4", "Answers a second, by batch"), tag("div", *drawn, class_="panels")) if drawn else None


def _lines(own: Sequence[Setting], unit: float) -> list[Line]:
    names = {run.model: run.ours for setting in own for run in setting.runs}
    lines, mine, others = [], 0, 0
    for name, ours in names.items():
        runs: list[tuple[Setting, Run]] = [(s, run) for s in own for run in s.runs if run.model == name]
        measured = [(float(s.batch), run.requests_per_second) for s, run in runs]
        points = [(x, Quantiles(*[value / unit] * 3)) for x, value in measured if value is not None]
        look = (OURS if mine == 0 else f"{OURS}-{min(mine, 3)}") if ours else str(others % MARKS)
        mine, others = (mine + 1, others) if ours else (mine, others + 1)
        if points:
            lines.append(Line(look, name, points, dashed=look.startswith(f"{OURS}-")))
    return lines


def _memory(found: Sequence[Setting]) -> Markup | None:
    """At the largest batch, where memory decides what fits."""
    most = max(setting.batch for setting in found)
    groups = []
    for setting in found:
        entries = [(peak, peak.peak_bytes or 0) for run in setting.runs if (peak := run.peak) is not None]
        if setting.batch == most and entries:
            groups.append((setting.title, entries))
    if not groups:
        return None
    about = f"Peak memory of an answer at batch {most}, weights included"
    return joined(tag("h4", about), charts.memory_bars(groups, about))
