"""``sight``: pictures anyone can generate, with questions that have one right answer.

Coloured shapes, handwritten digits, printed words, bar charts and small print, on plain grounds and photographs.
:func:`make_sight` writes a data set, :func:`make_sample` makes one picture in memory.
"""

from flashsloth.data.sight.make import make_sight
from flashsloth.data.sight.questions import KINDS
from flashsloth.data.sight.sample import Sample, Settings, make_sample
from flashsloth.data.sight.sources import Sources, load_sources

__all__ = ["KINDS", "Sample", "Settings", "Sources", "load_sources", "make_sample", "make_sight"]
