"""HTML written safely: text is escaped unless it is already markup."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is HTML or SVG already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """A value as HTML."""
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def joined(*parts: object) -> Markup:
    """Parts one after the other; None is nothing."""
    return Markup("".join(text(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. ``class_`` stands for class and ``aria_label`` for aria-label; None leaves an attribute out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if not children and name in _VOID:
        return Markup(f"<{name}{given}>" if name not in _SHAPES else f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


_SHAPES = frozenset({"circle", "line", "path", "polyline", "rect", "use"})
_VOID = _SHAPES | {"br", "meta"}
