"""``flashsloth data make sight --out DIR``: the data set on disk.

    DIR/manifest.json                        settings, counts, hashes
    DIR/preview.png                          a contact sheet
    DIR/train/questions.json                 LLaVA's format, one record a picture, ``kinds`` beside ``conversations``
    DIR/train/captions.json                  one caption a picture, for the first stage of training
    DIR/train/images/000/000017.png          or, as shards: DIR/train/shards/000000.tar with image and record
    DIR/validation, DIR/test                 the same

A split is written beside its place and moved there when it is whole, so a split that is there is complete. A run that
was interrupted is continued by the same command: splits that are there stay, the one that was under way starts again.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flashsloth.data.sight import sort_of_clevr
from flashsloth.data.sight.dice import SPLITS
from flashsloth.data.sight.preview import draw_preview
from flashsloth.data.sight.progress import Progress
from flashsloth.data.sight.sample import SIZE, VERSION, Settings, make_sample
from flashsloth.data.sight.sources import Sources, load_sources
from flashsloth.data.sight.write import write_split
from flashsloth.files import replacing, write_json

COUNTS = {"train": 50_000, "validation": 1_000, "test": 2_000}
PREVIEWED = 30
_BYTES = {False: 9_500, True: 6_000}  # a picture and its records on a disk of 4 KiB blocks; the latter Sort-of-CLEVR
_MANIFEST, _PREVIEW, _SUMMARY = "manifest.json", "preview.png", "split.json"

Report = Callable[[str, int, int], None]  # (split, pictures done, pictures in all)


def make_sight(
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    counts: Mapping[str, int] | None = None,
    *,
    shards: bool = False,
    jobs: int = 1,
    report: Report | None = None,
) -> dict[str, Any]:
    """Writes the data set and returns its manifest.

    Args:
        out: a folder that is empty, not there yet, or holds an unfinished run with the same arguments.
        counts: pictures of each split; by default 50,000, 1,000 and 2,000, or the published 9,800 and 200.
        shards: webdataset tar shards of 1,000 pictures instead of image files.
        jobs: processes. Neither their number nor an interruption changes a byte.
        report: called as pictures get ready.

    Raises:
        ValueError: a number out of range, or a folder that holds something else; NotADirectoryError: a file is there;
        OSError: the disk is full or cannot be written.
    """
    settings = settings or Settings()
    counts = dict(counts or (sort_of_clevr.COUNTS if settings.sort_of_clevr else COUNTS))
    for split in SPLITS:
        count = counts.get(split)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"--{split}: expected a whole number of at least 1, got {count!r}")
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"--jobs: expected a whole number of at least 1, got {jobs!r}")
    folder = Path(out)
    wanted = {split: _summary(settings, split, counts[split], shards) for split in SPLITS}
    finished = _check_folder(folder, wanted)
    todo = [split for split in SPLITS if split not in finished]
    _check_space(folder, settings, sum(counts[split] for split in todo))
    sources = None if settings.sort_of_clevr else load_sources()
    for split in todo:
        partial = _partial(folder, split)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            done = write_split(partial, settings, split, counts[split], sources, shards, jobs, report)
            finished[split] = {**wanted[split], **done}
            write_json(partial / _SUMMARY, finished[split])
            os.replace(partial, folder / split)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    f"--out: no space left on the disk of {folder} while writing {split}; {_AGAIN}"
                ) from error
            raise
    manifest = _manifest(settings, shards, finished)
    _preview(folder / _PREVIEW, settings, min(PREVIEWED, counts["train"]), sources)
    write_json(folder / _MANIFEST, manifest)
    return manifest


_AGAIN = "finished splits are kept, and the same command continues"


def _summary(settings: Settings, split: str, count: int, shards: bool) -> dict[str, Any]:
    """What a split on disk must have been made with to be kept."""
    made_of = {"data": "sort-of-clevr" if settings.sort_of_clevr else "sight", "version": VERSION}
    form = {"seed": settings.seed, "size": settings.size, "shards": shards}
    return {**made_of, **form, "split": split, "pictures": count}


def _check_folder(folder: Path, wanted: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The splits that are there already and are what is wanted."""
    if not folder.exists():
        return {}
    if not folder.is_dir():
        raise NotADirectoryError(f"--out: expected a folder, got the file {folder}")
    ours = {_MANIFEST, _PREVIEW, *SPLITS, *(_partial(folder, split).name for split in SPLITS)}
    for entry in sorted(folder.iterdir()):
        if entry.name not in ours:
            raise ValueError(
                f"--out: expected an empty folder or one this command began, got {folder} with {entry.name}"
            )
    finished = {}
    for split in SPLITS:
        if not (folder / split).exists():
            continue
        try:
            found = json.loads((folder / split / _SUMMARY).read_text())
            there = {name: found[name] for name in wanted[split]}
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"--out: expected an empty folder or one this command began, got {folder / split}"
            ) from None
        if there != wanted[split]:
            change = ", ".join(f"{k} {there[k]}, not {v}" for k, v in wanted[split].items() if there[k] != v)
            raise ValueError(f"--out: {folder / split} was made with other settings ({change}); choose an empty folder")
        finished[split] = found
    return finished


def _check_space(folder: Path, settings: Settings, pictures: int) -> None:
    scale = 1.0 if settings.sort_of_clevr else max(1.0, (settings.size / SIZE) ** 2)
    needed = int(pictures * _BYTES[settings.sort_of_clevr] * scale)
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(f"--out: {pictures:,} pictures need about {needed / 1e6:,.0f} MB, {folder} has {free / 1e6:,.0f}")


def _manifest(settings: Settings, shards: bool, splits: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    import numpy
    import PIL
    from PIL import features

    content = hashlib.sha256("".join(splits[split]["hash"] for split in SPLITS).encode()).hexdigest()
    shared = {k: v for k, v in splits["train"].items() if k in ("data", "version", "seed", "size", "shards")}
    own = ("pictures", "questions", "kinds", "hash")
    return {
        **shared,
        "hash": content,
        "splits": {split: {name: splits[split][name] for name in own} for split in SPLITS},
        # Letters and edges are drawn by these; another version may move a pixel, and with it the hash.
        "made_with": {
            "pillow": PIL.__version__,
            "freetype": features.version("freetype2"),
            "numpy": numpy.__version__,
        },
    }


def _preview(path: Path, settings: Settings, count: int, sources: Sources | None) -> None:
    sheet = draw_preview([make_sample(settings, "train", i, sources) for i in range(count)])
    with replacing(path) as partial:
        sheet.save(partial, "PNG")


def _partial(folder: Path, split: str) -> Path:
    return folder / f".{split}.partial"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty folder, or an unfinished run")
    for split in SPLITS:
        help_ = f"pictures; default: {COUNTS[split]:,}, Sort-of-CLEVR {sort_of_clevr.COUNTS[split]:,}"
        parser.add_argument(f"--{split}", type=_count(1), metavar="N", help=help_)
    parser.add_argument("--seed", type=_count(0), default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--size", type=_count(1), metavar="PX", help=f"side of a picture; default: {SIZE}")
    parser.add_argument("--sort-of-clevr", action="store_true", help="the published protocol of Sort-of-CLEVR instead")
    parser.add_argument("--shards", action="store_true", help="webdataset tar shards instead of image files")
    parser.add_argument("--jobs", type=_count(1), default=_cores(), metavar="N", help="processes; default: %(default)s")


def main(options: argparse.Namespace) -> int:
    """Runs with the options of :func:`add_arguments`. Returns 0."""
    default = sort_of_clevr.SIZE if options.sort_of_clevr else SIZE
    settings = Settings(options.seed, default if options.size is None else options.size, options.sort_of_clevr)
    counts = dict(sort_of_clevr.COUNTS if options.sort_of_clevr else COUNTS)
    counts.update({split: n for split in SPLITS if (n := getattr(options, split)) is not None})
    with Progress() as progress:
        manifest = make_sight(
            options.out, settings, counts, shards=options.shards, jobs=options.jobs, report=progress.report
        )
    for split, made in manifest["splits"].items():
        print(f"{split}: {made['pictures']:,} pictures, {made['questions']:,} questions")
    kinds: Counter[str] = sum((Counter(made["kinds"]) for made in manifest["splits"].values()), Counter())
    print("questions by kind: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common()))
    print(f"hash: {manifest['hash']}\nlook at {options.out / _PREVIEW}")
    return 0


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return parse


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
