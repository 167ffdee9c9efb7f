"""``flashsloth eval --task sight|sort-of-clevr|FILE.json``: runs, shows and stores an evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flashsloth import loading
from flashsloth.chat_command import printable
from flashsloth.data.broken import BatchReport, BrokenLog, Skipped, TooManyBroken
from flashsloth.evaluation import store
from flashsloth.evaluation.running import BATCH_SIZE, MAX_NEW_TOKENS, Result, evaluate
from flashsloth.evaluation.scoring import Score
from flashsloth.evaluation.tasks import SPECIAL, SPLITS, Task, file_task, folder_task, generated_task
from flashsloth.files import write_json
from flashsloth.tokenization import special_tokens

GENERATED = ("sight", "sort-of-clevr")
SHOWN = 10  # misses on the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, metavar="TASK", help="sight, sort-of-clevr, or a file of records")
    parser.add_argument("--data", type=Path, metavar="DIR", help="of `flashsloth data make sight`; default: made now")
    parser.add_argument("--images", type=Path, metavar="DIR", help="images of a file's records; default: its folder")
    parser.add_argument("--split", choices=SPLITS, help="of sight and sort-of-clevr; default: test")
    parser.add_argument("--seed", type=int, metavar="S", help="of pictures that are made; default: 0")
    parser.add_argument("--limit", type=loading.positive, metavar="N", help="the first N questions; default: all")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="scores and misses; answers in FILE.jsonl")
    parser.add_argument("--resume", action="store_true", help="go on with an evaluation that was interrupted")
    for name, default in (("--batch-size", BATCH_SIZE), ("--max-new-tokens", MAX_NEW_TOKENS)):
        parser.add_argument(name, type=loading.positive, default=default, metavar="N", help="default: %(default)s")
    loading.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Runs with the options of :func:`add_arguments`. Returns 0.

    Raises:
        ValueError, OSError: input that cannot be used; more than 1 % of the records cannot be, after all is written.
    """
    check_options(options)
    loaded = loading.load(options)
    task = _task(options, special=(*SPECIAL, *special_tokens(loaded.processor.tokenizer)))
    if not task.questions:
        raise ValueError(f"--task: expected questions, got none that can be used {_reasons(task.skipped)}")
    about = {
        "task": task.name,
        "questions": task.fingerprint,
        "model": store.model_fingerprint(loaded.directory),
        "image_hd": loaded.processor.image_processor.image_hd if loaded.image_hd is None else loaded.image_hd,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "max_new_tokens": options.max_new_tokens,
    }
    arguments: dict[str, Any] = {
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "image_hd": loaded.image_hd,
    }
    if options.out is None:
        result = _run(loaded, task, arguments, None, None)
    else:
        lines = store.Store(options.out.with_suffix(".jsonl"), about, resume=options.resume)
        known = lines.known(task)
        with lines:
            result = _run(loaded, task, arguments, known, lines)
        write_json(options.out, summary(result, about))
    show(result, SHOWN)
    if options.out is not None:
        print(f"\nall of it in {options.out}")
    _check_broken(result)
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for options that contradict each other, before anything is loaded."""
    own = options.task in GENERATED
    for name, value, allowed, why in (
        ("--data", options.data, own, "with --task sight or sort-of-clevr"),
        ("--split", options.split, own, "with --task sight or sort-of-clevr"),
        ("--seed", options.seed, own and options.data is None, "where pictures are made"),
        ("--images", options.images, not own, "with a file for --task"),
        ("--resume", options.resume or None, options.out is not None, "with --out, whose run it continues"),
    ):
        if value is not None and not allowed:
            raise ValueError(f"{name}: expected only {why}, got {value}")
    if not own and not Path(options.task).is_file():
        raise FileNotFoundError(f"--task: expected {', '.join(GENERATED)} or a file of records, got {options.task}")
    if options.out is None:
        return
    if options.out.suffix != ".json":
        raise ValueError(f"--out: expected a file ending in .json, got {options.out}")
    if not options.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out: expected a file in an existing directory, got {options.out}")
    if not own and options.out.with_suffix(".jsonl").resolve() == Path(options.task).resolve():
        raise ValueError(f"--out: expected another name than that of --task, got {options.out}")
    for path in (options.out, options.out.with_suffix(".jsonl")):
        if path.is_dir() or (path.exists() and not options.resume):
            raise FileExistsError(f"--out: {path} is there already; --resume goes on with it")


def summary(result: Result, about: Mapping[str, Any]) -> dict[str, Any]:
    """Scores, misses and what could not be used, as JSON values."""
    from flashsloth_ops import __version__

    return {
        **about,
        "all": _score(result.total),
        "groups": {name: _score(score) for name, score in result.groups.items()},
        "kinds": {name: _score(score) for name, score in result.kinds.items()},
        "pictures": len({result.task.questions[i].picture for i in result.answers} - {None}),
        "records": {"read": result.task.records, "skipped": [vars(one) for one in result.skipped]},
        "seconds": round(result.seconds, 3),
        "versions": {"flashsloth": __version__, "torch": torch.__version__},
        "misses": result.misses,
    }


def show(result: Result, misses: int) -> None:
    """A table of scores, the first misses, and what could not be used."""
    print(f"{result.task.name}: {result.total.count} questions, {result.seconds:.1f} s\n")
    rows = [*result.kinds.items(), *result.groups.items(), ("all", result.total)]
    width = max(len(name) for name, _ in rows)
    print(f"{'kind':<{width}}  right     of  accuracy  95 % interval")
    for name, score in rows:
        low, high = score.interval
        share = f"{100 * score.accuracy:6.1f} %" if score.count else f"{'-':>8}"
        print(f"{name:<{width}} {score.correct:6d} {score.count:6d}  {share}  {100 * low:.1f} to {100 * high:.1f} %")
    wrong = result.misses
    if wrong and misses:
        print(f"\nthe first {min(misses, len(wrong))} of {len(wrong)} misses")
    for one in wrong[:misses]:
        line = f"{one['image'] or one['record']}: {one['question']} expected {one['expected']!r}, got {one['got']!r}"
        print(f"  {printable(line)}")
    if result.skipped:
        print(f"\n{len(result.skipped)} of {result.task.records} records cannot be used {_reasons(result.skipped)}")
        for broken in result.skipped[:misses]:
            print(f"  {printable(f'{broken.name}: {broken.reason}: {broken.detail}')}")


def _run(
    loaded: loading.Loaded, task: Task, arguments: Mapping[str, Any], known: Result | None, lines: store.Store | None
) -> Result:
    done = 0 if known is None else len(known.answers)
    with tqdm(total=len(task.questions), initial=done, unit=" questions", disable=None) as bar:

        def report(answers: dict[int, str], skipped: list[Skipped]) -> None:
            if lines is not None:
                lines.add(answers, skipped)
            bar.update(len(answers))

        return evaluate(loaded.model, loaded.processor, task, known=known, report=report, **arguments)


def _task(options: argparse.Namespace, special: tuple[str, ...]) -> Task:
    if options.task not in GENERATED:
        return file_task(options.task, options.images, limit=options.limit, special=special)
    published, split = options.task == "sort-of-clevr", options.split or "test"
    if options.data is not None:
        return folder_task(options.data, published, split, limit=options.limit)
    return generated_task(published, split, seed=options.seed or 0, limit=options.limit)


def _score(score: Score) -> dict[str, Any]:
    low, high = score.interval
    return {
        "right": score.correct,
        "of": score.count,
        "accuracy": score.accuracy if score.count else None,
        "interval_95": [low, high],
    }


def _reasons(skipped: Any) -> str:
    counts: dict[str, int] = {}
    for one in skipped:
        counts[one.reason] = counts.get(one.reason, 0) + 1
    return "(" + ", ".join(f"{count} {reason}" for reason, count in counts.items()) + ")"


def _check_broken(result: Result) -> None:
    """The rule of training: a run of which more than 1 % of the records cannot be used fails."""
    log = BrokenLog(minimum=0)
    try:
        log.add(BatchReport(seen=result.task.records, skipped=tuple(result.skipped)))
    except TooManyBroken as error:
        raise ValueError(str(error)) from error
