"""The same report as Markdown, for a terminal, a pull request or a file in the repository."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import curves, e2e, formats, tables
from bench.report.content import Content
from bench.report.summary import first_method
from bench.report.tables import Table


def render(contents: Sequence[Content], unread: Sequence[str] = ()) -> str:
    """All devices, one after the other. The same contents give the same text."""
    blocks = ["# FlashSloth: fused ops, measured", *(block for content in contents for block in _device(content))]
    blocks.append("A speedup stands only beside a result that passed its check in the same run. Times are medians.")
    if unread:
        blocks.append("Files that were not used:\n\n" + "\n".join(f"* {_escaped(line)}" for line in unread))
    return "\n\n".join(blocks) + "\n"


def _device(content: Content) -> list[str]:
    device = content.device
    blocks = [f"## {_escaped(device.name)}: {content.finding}", content.about]
    facts = [f"* **{fact.name}** {fact.value}{f' ({fact.note})' if fact.note else ''}" for fact in content.facts]
    blocks.append("\n".join(facts))
    blocks += [f"> {_escaped(note)}" for note in content.device.notes]
    if content.failures:
        failed = formats.count(content.checks.failed, "result")
        blocks += [
            f"### {failed} failed the check",
            "A wrong result has no speedup, whatever its time.",
            table(content.failures),
        ]
    shown = first_method(content.points)
    if content.opponents:
        method = shown[0].method
        blocks += [f"The peer's time over ours, medians ({formats.METHODS.get(method, method)}):"]
        blocks.append(table(tables.opponents(content.opponents)))
        blocks += [_escaped(content.choice)] if content.choice else []
    sections = (
        ("Speedup by size", tables.speedups(content.points, device.absolute)),
        ("Goals", tables.goals(content.goals, content.headings, device.absolute)),
        ("Scaling", tables.exponents(content.curves)),
        ("Share of the physical limit", tables.shares(content.points)),
        ("Memory", tables.memory(content.points)),
        ("Whole models", e2e.models(content.settings, device)),
        ("A training step", e2e.training(content.settings, device)),
        ("The paper's claims", content.claims),
        ("History on this device", tables.history(content.tracks, device)),
        ("What could not be measured", content.missing),
        ("Machine and code", tables.header(device)),
    )
    for title, found in sections:
        if found:
            blocks.append(f"### {title}")
            if title == "Scaling":
                blocks += [f"> {_escaped(sentence)}" for sentence in curves.verdicts(content.curves)]
            blocks.append(table(found))
    return blocks


def table(found: Table) -> str:
    """A table with columns as wide as their cells, so that it also reads as plain text."""
    rows = [[_escaped(cell) for cell in row] for row in (found.columns, *found.rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(found.columns))]
    lines = []
    for row in rows:
        cells = [
            c.rjust(w) if i in found.right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * (w - 1) + ":" if i in found.right else "-" * w for i, w in enumerate(widths)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def _escaped(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
