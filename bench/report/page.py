"""The page: one HTML file with its style and drawings inside, that opens anywhere and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources

from bench.report import charts, formats, models, sections
from bench.report.content import Content, Fact
from bench.report.html import Markup, tag
from bench.report.plots import marks
from bench.report.summary import first_method

TITLE = "FlashSloth: fused ops, measured"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser then refuses to fetch anything at all
FEW = 4  # failures that the first screen lists

SECTIONS: tuple[tuple[str, str, Callable[[Content], Markup | None]], ...] = (
    ("speedup", "Speedup by size", sections.speedup),
    ("goals", "Goals", sections.goals),
    ("scaling", "Scaling", sections.scaling),
    ("limit", "Share of the physical limit", sections.limit),
    ("memory", "Memory", sections.memory),
    ("models", "Whole models", models.whole_models),
    ("claims", "The paper's claims", models.claims),
    ("history", "History on this device", sections.history),
    ("missing", "What could not be measured", sections.missing),
    ("machine", "Machine and code", sections.machine),
)


def render(contents: Sequence[Content], unread: Sequence[str] = ()) -> str:
    """The whole document. The same contents give the same bytes."""
    style = resources.files("bench.report").joinpath("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", TITLE),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        marks(),
        tag("header", tag("h1", TITLE), _devices(contents)),
        tag("main", *(_device(content) for content in contents)),
        tag("footer", *_footer(unread)),
    )
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def _devices(contents: Sequence[Content]) -> Markup | None:
    """A line a device, where there are several."""
    if len(contents) < 2:
        return None
    lines = [
        tag(
            "li",
            tag("a", one.device.name, href=f"#{one.device.slug}"),
            tag("span", one.finding),
            tag("small", *(tag("span", f"{fact.value}. ", class_=fact.tone or None) for fact in one.facts[:2])),
        )
        for one in contents
    ]
    return tag("nav", tag("ul", *lines), class_="devices", aria_label="Devices")


def _device(content: Content) -> Markup:
    slug = content.device.slug
    parts = [(name, title, part) for name, title, make in SECTIONS if (part := make(content)) is not None]
    links = [tag("li", tag("a", title, href=f"#{slug}-{name}")) for name, title, _ in parts]
    return tag(
        "section",
        tag("h2", tag("small", f"Fused ops on {content.device.name}"), content.finding),
        tag("p", content.about, class_="lead"),
        tag("dl", *map(_fact, content.facts), class_="facts"),
        *(tag("p", note, class_="note") for note in content.device.notes),
        _alarm(content),
        _overview(content),
        tag("nav", tag("ul", *links), class_="sections", aria_label=f"Sections on {content.device.name}"),
        *(tag("section", tag("h3", title), part, id=f"{slug}-{name}") for name, title, part in parts),
        id=slug,
        class_="device",
    )


def _fact(fact: Fact) -> Markup:
    note = tag("small", fact.note) if fact.note else None
    return tag("div", tag("dt", fact.name), tag("dd", fact.value, note), class_=fact.tone or None)


def _alarm(content: Content) -> Markup | None:
    """What is wrong, before any number."""
    if not content.failures:
        return None
    rows = content.failures.rows
    lines = [tag("li", tag("b", row[1]), f", {row[0]}: {row[2]}") for row in rows[:FEW]]
    more = sections.numbers(content.failures, f"All {len(rows)}") if len(rows) > FEW else None
    return tag(
        "div",
        tag("h3", f"{formats.count(content.checks.failed, 'result')} failed the check"),
        tag("p", "A wrong result has no speedup, whatever its time. None of these is in a chart or a median."),
        tag("ul", *lines),
        more,
        class_="alarm",
        role="note",
    )


def _overview(content: Content) -> Markup | None:
    if not content.opponents:
        return None
    method = first_method(content.points)[0].method
    about = (
        f"Time of each peer over ours: a dot a measurement ({formats.METHODS.get(method, method)}), the bar and the "
        "number their median. In the shade left of the line ours is slower."
    )
    return tag(
        "div",
        tag("h3", "Faster than what?"),
        tag("p", tag("small", about)),
        charts.overview(content.opponents),
        tag("p", tag("small", content.choice)) if content.choice else None,
        class_="overview",
    )


def _footer(unread: Sequence[str]) -> list[Markup]:
    said = [tag("p", "A speedup stands only beside a result that passed its check in the same run. Times are medians.")]
    if unread:
        said.append(tag("p", "Files that were not used: ", "; ".join(unread), "."))
    return said
