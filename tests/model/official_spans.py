"""The rule by which the official code finds question spans, written from its description in the golden notes.

Only tests use it: to show where the spans of our processor equal the official ones, and where the rule errs.
"""

from __future__ import annotations

from collections.abc import Sequence

IGNORE = -100
TEXT_ONLY, WITH_IMAGE = 1, 2
FIRST = 32  # tokens of the fixed sentence and " USER: " before an image
PLAIN_BATCH = 20


def official_spans(
    labels: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], n_visual: int, modal: Sequence[int]
) -> list[list[list[int]]]:
    """Spans of a batch from its expanded labels and the positions of its query groups.

    The batch size alone decides which format is assumed: from 20 on the plain one. In the conversation format the first
    span starts at a constant, a later one three tokens after the end of an answer; an answer is only seen in labels, so
    without them every further group repeats the last span.
    """
    return [
        _plain(places, n_visual) if len(groups) >= PLAIN_BATCH else _dialogue(row, places, n_visual, kind)
        for row, places, kind in zip(labels, groups, modal, strict=True)
    ]


def _plain(places: Sequence[int], n_visual: int) -> list[list[int]]:
    return [[n_visual + 1, place] for place in places[:1]]


def _dialogue(labels: Sequence[int], places: Sequence[int], n_visual: int, kind: int) -> list[list[int]]:
    if not places:
        return []
    spans = [[FIRST if kind == TEXT_ONLY else FIRST + n_visual + 1, places[0]]]
    answers = [i for i in range(len(labels) - 1) if labels[i] != IGNORE and labels[i + 1] == IGNORE]
    for answer_end, place in zip(answers, places[1:], strict=False):
        spans.append([answer_end + 3, place])
    return spans + [list(spans[-1]) for _ in range(len(places) - len(spans))]
