"""The report on an ablation: Markdown with tables, sentences and one plot, all computed from the runs on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flashsloth.ablation.findings import Group, groups, paired, sentences, times_over
from flashsloth.ablation.plot import draw
from flashsloth.ablation.runs import load_runs
from flashsloth.ablation.timing import load_times
from flashsloth.ablation.variants import QUERIES
from flashsloth.files import replacing

REPORT, PLOT = "ablation.md", "ablation.svg"

_METHOD = """\
`flashsloth ablate` trains every variant at the same budget and compares what they answer.

* **The same for all**: the vision tower (a trained one, frozen), the decoder it starts from ({init}),
  {pictures:,} training pictures with all their questions, {steps:,} steps of {batch}, AdamW with a peak rate of
  {rate:g}{muon} (warmup over {warmup:.0%} of the steps, then a cosine to zero), weight decay {decay:g} on matrices,
  gradients clipped at norm {clip:g}{fast}. Nothing was tuned for a variant, and no checkpoint was chosen: the weights
  behind the last step count.
* **A seed** sets the order of the pictures, the weights that are drawn and dropout. It is the same for every variant,
  so differences are taken seed by seed. Parts that two variants share start from the same numbers.
* **What is trained**: pooling, projector, queries and decoder, in one stage. The tower's output is computed once a
  picture and kept in float16.
* **Accuracy**: {asked:,} questions on {tested:,} pictures of the test split, each asked alone, answered greedily, and
  right or wrong as a whole. The validation split is not used. Spread is the standard deviation over seeds; intervals
  are Student's t over seeds, and say nothing of other questions than these.
* **Flops** are counted from shapes, for one picture and the question of median length, to the first token: matrix
  products, convolutions and attention, a multiply-add as two.{times}
* **What to keep in mind**: tower and decoder may come from a model that was itself trained with one of the variants,
  which may favour it; and a small model on drawn pictures says little about a large one on photographs.
"""


_TIMES = """ **Time to first token** is that of the same
  request from pixels on, batch 1, float32, over the time of {mark}: the median of {rounds} rounds, variants timed in
  turns and compared within a round, with the 20th and 80th percentile."""


def write_report(folder: Path) -> list[Path]:
    """Write ``ablation.md`` and ``ablation.svg`` from the runs in ``folder``; returns both paths.

    Raises:
        ValueError: no runs, runs of different settings, or a file that is none.
    """
    runs = load_runs(folder)
    if not runs:
        raise ValueError(f"--out: expected a folder with runs of an ablation, got {folder} without any")
    times = load_times(folder, runs[0].settings)
    found = groups(runs, None if times is None else times["seconds"])
    plot = draw(found, folder / PLOT)
    path = folder / REPORT
    with replacing(path) as partial:
        partial.write_text(render(found, times), encoding="utf-8")
    return [path, plot]


def render(found: Sequence[Group], times: dict[str, Any] | None) -> str:
    """The report as Markdown."""
    claims = sentences(found) or ["The runs that the paper's claims are about are not here yet."]
    parts = [
        "# Ablation: what compression costs, and what the queries give back",
        f"Written by `flashsloth ablate --report` from {_runs(found)}.",
        "## Do the paper's claims hold here?",
        "\n".join(f"* {claim}" for claim in claims),
        "## Results",
        f"![Accuracy over the tokens of a picture, points marked with the letters of the table]({PLOT})",
        _results(found),
        "Accuracy: mean ± standard deviation over seeds, as the error bars of the plot. Points with as many tokens "
        "stand side by side there.",
        "## By kind of question",
        _kinds(found),
    ]
    whole = next((group for group in found if group.one.variant == QUERIES), None)
    if whole is not None and len(found) > 1:
        parts += [f"## Against {whole.mark}, {whole.one.title}", _against(found, whole)]
    parts += ["## How it was measured", _method(found, times).strip()]
    return "\n\n".join(parts) + "\n"


def _runs(found: Sequence[Group]) -> str:
    seeds = sorted({seed for group in found for seed in group.runs})
    count = sum(len(group.runs) for group in found)
    said = f"{count} runs: {len(found)} variants, seeds {', '.join(map(str, seeds))}"
    missing = [f"{group.mark} without seed {seed}" for group in found for seed in seeds if seed not in group.runs]
    return said + (f" (missing: {', '.join(missing)})" if missing else "")


def _results(found: Sequence[Group]) -> str:
    header = ["", "variant", "visual tokens", "queries", "accuracy", "Mflops to the first token", "of it prefill"]
    timed = times_over(found[0], found[0]) is not None
    lines = []
    for group in found:
        run = group.one
        line = [group.mark, run.title, str(run.visual_tokens), str(run.queries), _accuracy(group)]
        line += [f"{sum(run.flops.values()) / 1e6:,.0f}", f"{run.flops['prefill'] / 1e6:,.0f}"]
        if timed:
            ratio = times_over(group, found[0])
            line.append("" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})")
        lines.append(line)
    return _table([*header, *([f"first token, over {found[0].mark}"] if timed else [])], lines, left=2)


def _kinds(found: Sequence[Group]) -> str:
    kinds = sorted({kind for group in found for run in group.runs.values() for kind in run.scores})
    lines = []
    for kind in kinds:
        values = [group.of_kind(kind) for group in found]
        asked = next(run.scores[kind]["asked"] for group in found for run in group.runs.values() if kind in run.scores)
        lines.append([kind, f"{asked:,}", *("" if value is None else f"{100 * value:.1f}" for value in values)])
    return _table(["right, %", "asked", *(group.mark for group in found)], lines, left=1)


def _against(found: Sequence[Group], whole: Group) -> str:
    lines = []
    for group in found:
        difference = None if group is whole else paired(group, whole)
        if difference is None:
            continue
        interval = "one seed"
        if difference.low is not None and difference.high is not None:
            interval = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
        verdict = {1: "better", 0: "cannot be told apart", -1: "worse"}[difference.sign]
        lines.append([group.mark, group.one.title, f"{100 * difference.mean:+.1f}", interval, verdict])
    return _table(["", "variant", "points", "95 % interval", ""], lines, left=2)


def _accuracy(group: Group) -> str:
    spread = group.spread
    return f"{100 * group.mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _method(found: Sequence[Group], times: dict[str, Any] | None) -> str:
    run = found[0].one
    settings = run.settings
    text = _METHOD.format(
        init="a checkpoint's" if settings["init"] else "drawn by the seed",
        pictures=settings["train_pictures"],
        steps=settings["steps"],
        batch=settings["batch"],
        rate=settings["learning_rate"],
        muon=""
        if settings["muon"] is None
        else f", Muon with one of {settings['muon']:g} for matrices of linear layers",
        warmup=settings["warmup"],
        decay=settings["weight_decay"],
        clip=settings["clip"],
        fast=", products in bfloat16" if settings["bf16"] else "",
        asked=sum(one["asked"] for one in run.scores.values()),
        tested=settings["test_pictures"],
        times="" if times is None else _TIMES.format(mark=found[0].mark, rounds=times["rounds"]),
    )
    where = sorted({_environment(one.environment) for group in found for one in group.runs.values()})
    text += f"* **Where**: trained on {'; '.join(where)}"
    text += "" if times is None else f"; timed on {_environment(times['environment'])}"
    return text + ".\n"


def _environment(given: Any) -> str:
    threads = given["threads"]
    return f"{given['device']}, {threads} thread{'s' if threads > 1 else ''}, torch {given['torch']}"


def _table(header: list[str], lines: Iterable[Sequence[str]], left: int) -> str:
    """A Markdown table; columns behind the first ``left`` stand to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    rows = [header, rule, *(list(line) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
