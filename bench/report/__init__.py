"""``python -m bench report``: what was measured, as Markdown and as one page."""

from bench.report.command import add_arguments, main

__all__ = ["add_arguments", "main"]
