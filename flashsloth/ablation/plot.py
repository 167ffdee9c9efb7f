"""Accuracy over the tokens a picture takes, as one picture: readable in black and white, and without telling colours
apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flashsloth.ablation.findings import Group
from flashsloth.ablation.variants import ATTENTION, AVERAGE, NONE, QUERIES, SHUFFLE
from flashsloth.figures import figure, plain

# Colours of Okabe and Ito, which differ in brightness too; a marker of its own for each family, and a letter at each
# point, say the same without colour.
_FAMILIES = {
    NONE: ("no compression", "#000000", "s"),
    AVERAGE: ("average", "#E69F00", "v"),
    SHUFFLE: ("pixel shuffle", "#56B4E9", "D"),
    ATTENTION: ("attention", "#009E73", "^"),
    QUERIES: ("attention and queries", "#D55E00", "o"),
}
_APART = 1.08  # points at the same place stand side by side, by this factor


def draw(groups: Sequence[Group], path: Path) -> Path:
    """Write the plot; its kind is the ending of ``path``. The same results give the same bytes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with figure(path, (9.0, 5.0)) as drawn:
        axes = drawn.add_subplot()
        labelled: set[str] = set()
        for group, place in zip(groups, places([group.tokens for group in groups]), strict=True):
            label, colour, marker = _FAMILIES.get(group.one.family, (group.one.family, "#CC79A7", "P"))
            mean, spread = 100 * group.mean, 100 * (group.spread or 0.0)
            axes.errorbar(
                place,
                mean,
                yerr=spread,
                fmt=marker,
                color=colour,
                ecolor="black",
                markeredgecolor="black",
                markersize=8,
                elinewidth=1.5,
                capsize=4,
                label=None if label in labelled else label,
            )
            labelled.add(label)
            axes.annotate(group.mark, (place, mean), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
        ticks = readable([group.tokens for group in groups])
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("visual tokens and embedded queries of a picture, in the prompt")
        axes.set_ylabel("right answers, %")
        plain(axes, linewidth=0.8)
        axes.margins(x=0.08, y=0.12)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return path


def places(tokens: Sequence[int]) -> list[float]:
    """Where points stand: at their number of tokens, those that share one side by side around it."""
    seen: Counter[int] = Counter()
    many = Counter(tokens)
    found = []
    for count in tokens:
        found.append(count * _APART ** (seen[count] - (many[count] - 1) / 2))
        seen[count] += 1
    return found


def readable(tokens: Sequence[int]) -> list[int]:
    """Ticks that do not run into each other; where many points stand rather than where few do."""
    kept: list[int] = []
    for tick, _ in Counter(tokens).most_common():
        if all(abs(math.log(tick / other)) > 0.11 for other in kept):
            kept.append(tick)
    return sorted(kept)
