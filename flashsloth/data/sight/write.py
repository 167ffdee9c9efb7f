"""One split on disk, by one process or several; the order and the bytes are the same."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from flashsloth.data.sight.sample import PER_FOLDER, Sample, Settings, make_sample
from flashsloth.data.sight.sources import Sources

_CHUNK = 250  # pictures a task: one of the divisors of PER_FOLDER


class _Task(NamedTuple):
    folder: Path
    settings: Settings
    split: str
    first: int
    last: int
    shards: bool


class _Done(NamedTuple):
    pictures: int
    records: list[str]
    captions: list[str]
    kinds: Counter[str]
    hashes: bytes


def write_split(
    folder: Path,
    settings: Settings,
    split: str,
    count: int,
    sources: Sources | None,
    shards: bool,
    jobs: int,
    report: Callable[[str, int, int], None] | None,
) -> dict[str, Any]:
    """Writes ``count`` pictures and their records. Returns the numbers of questions and the hash of the content."""
    step = PER_FOLDER if shards else _CHUNK
    tasks = [_Task(folder, settings, split, i, min(i + step, count), shards) for i in range(0, count, step)]
    pictures, kinds, content = 0, Counter[str](), hashlib.sha256()
    if report is not None:
        report(split, 0, count)
    with _JsonList(folder / "questions.json") as records, _JsonList(folder / "captions.json") as captions:
        for done in _run(tasks, sources, min(jobs, len(tasks))):
            records.extend(done.records)
            captions.extend(done.captions)
            kinds.update(done.kinds)
            content.update(done.hashes)
            pictures += done.pictures
            if report is not None:
                report(split, pictures, count)
    if not captions.length:
        captions.path.unlink()
    return {"questions": kinds.total(), "kinds": dict(sorted(kinds.items())), "hash": content.hexdigest()}


def _run(tasks: list[_Task], sources: Sources | None, jobs: int) -> Iterator[_Done]:
    """What tasks return, in their order."""
    if jobs == 1:
        for task in tasks:
            yield _do(task, sources)
        return
    # Forked where possible: a fresh process would import the whole model package first.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(sources,))
    try:
        waiting: list[Future[_Done]] = []
        for task in tasks:
            waiting.append(pool.submit(_work, task))
            if len(waiting) > 4 * jobs:  # finished work that nobody has taken fills the memory
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed, perhaps for want of memory: try a smaller --jobs") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_sources: Sources | None = None


def _start(sources: Sources | None) -> None:
    global _sources
    _sources = sources
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it


def _work(task: _Task) -> _Done:
    return _do(task, _sources)


def _do(task: _Task, sources: Sources | None) -> _Done:
    samples = (make_sample(task.settings, task.split, i, sources) for i in range(task.first, task.last))
    records, captions, kinds, hashes = [], [], Counter[str](), []
    store = _Shard(task) if task.shards else _Files(task)
    with store:
        for sample in samples:
            store.add(sample)
            records.append(json.dumps(sample.record))
            if sample.caption is not None:
                captions.append(json.dumps(sample.caption_record))
            kinds.update(sample.record["kinds"])
            hashes.append(sample.hash)
    return _Done(task.last - task.first, records, captions, kinds, b"".join(hashes))


class _Files:
    def __init__(self, task: _Task):
        self._folder = task.folder
        (task.folder / f"images/{task.first // PER_FOLDER:03d}").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass

    def add(self, sample: Sample) -> None:
        (self._folder / sample.name).write_bytes(sample.encoded)


class _Shard:
    """Members of a sample stand together: the image, under the name its record gives it, and the record."""

    def __init__(self, task: _Task):
        path = task.folder / "shards" / f"{task.first // PER_FOLDER:06d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self._tar.close()

    def add(self, sample: Sample) -> None:
        self._member(sample.name, sample.encoded)
        self._member(f"{sample.name.rsplit('.', 1)[0]}.json", json.dumps(sample.record).encode())

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # without time and owner: the same bytes on every run
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


class _JsonList:
    """A JSON list on disk that grows entry by entry, one a line."""

    def __init__(self, path: Path):
        self.path, self.length = path, 0

    def __enter__(self) -> _JsonList:
        self._file = self.path.open("w")
        self._file.write("[")
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._file.write("\n]\n")
        finally:
            self._file.close()

    def extend(self, entries: list[str]) -> None:
        for entry in entries:
            self._file.write(("," if self.length else "") + "\n" + entry)
            self.length += 1
