"""Comparing two results, or two revisions timed in turns: what is found, what goes wrong, and what is left behind."""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench import compare
from bench.cases import CASES
from bench.compare import main, points_of, results
from bench.interleaved import Limits, Point, Worker, WorkerError, interleaved
from bench.result import ROOT, Result, save
from bench.revisions import RevisionError, cache_folder, checked_out, of_result, resolve, workplace
from bench.slowdown import Line, short_sizes
from tests.bench.test_regression import drift, noise, result_of, row_of
from tests.support import needs_extension

# ---- two results ----


def stored(seed: int, slower: float = 1.0, *, kind: str = "cpu", machine: float = 1.0, **header: Any) -> Result:
    """Two cases of ours; the first is ``slower`` than usual, on a ``machine`` that takes so many times as long."""
    rng = np.random.default_rng(seed)
    method = "wall" if kind == "cpu" else "graph"
    rows = []
    for case, factor in (("pool/a", slower), ("pool/b", 1.0)):
        common = drift(rng, (40,))
        for provider, level in (
            ("flashsloth/cpu", factor),
            ("flashsloth/reference", 3.0),
            ("eager", 2.0),
            ("loop", 5.0),
        ):
            samples = 1e-3 * machine * level * np.exp(common + noise(rng, (40,), sd=0.02))
            rows.append(row_of(case, provider, method, ours=provider.startswith("flashsloth"), samples=samples))
    return result_of(rows, kind=kind, **header)


def by_case(lines: Sequence[Line]) -> dict[str, Line]:
    return {line.key[0]: line for line in lines}


@pytest.mark.parametrize(("kind", "machine"), [("cpu", 1.7), ("cuda", 1.0)])
def test_two_results_show_what_differs(kind: str, machine: float) -> None:
    lines = results(stored(1, kind=kind), stored(2, 1.3, kind=kind, machine=machine))
    assert [line.key[4] for line in lines] == ["flashsloth/cpu"] * 2  # the reference is no promise
    found = by_case(lines)
    for case, truth in (("pool/a", 1.3), ("pool/b", 1.0)):
        ratio = found[case].ratio
        assert ratio is not None
        low, high = ratio.interval()
        assert low < truth < high < 1.2 * low


def test_what_only_one_result_has_is_listed() -> None:
    a, b = stored(1), stored(2)
    a.rows = [row for row in a.rows if row.case == "pool/a"]
    b.rows[0] = row_of("pool/a", "flashsloth/cpu", ours=True, failure="y: error 1, allowed 0.1")
    never = [row_of("pool/a", "flashsloth/cuda", ours=True, missing="made for cuda tensors")]
    a.rows += never
    b.rows += never
    lines = results(a, b)
    assert [(line.key[0], line.note) for line in lines] == [
        ("pool/a", "check failed in B: y: error 1, allowed 0.1"),
        ("pool/b", "only in B"),
    ]
    assert [line.failed for line in lines] == [True, False]


def test_a_table_shows_the_part_of_a_size_that_differs() -> None:
    rows = [replace(row_of(case, "flashsloth/cpu"), size={"batch": batch, "side": 27}) for case, batch in CURVE]
    assert list(short_sizes(row.key for row in rows).values()) == ["batch=1", "batch=2", ""]


CURVE = (("pool/a", 1), ("pool/a", 2), ("pool/b", 1))


def test_results_of_different_devices_or_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="slug: expected two results of the same, got 'a-cpu' and 'b-cpu'"):
        results(stored(1), stored(2, slug="b-cpu"))
    with pytest.raises(ValueError, match="small: expected two results of the same"):
        results(stored(1), stored(2, small=True))


def run(root: Path, a: object, b: object, **options: Any) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    given = parser.parse_args([str(a), str(b)])
    for name, usual in (("case", None), ("budget", 0.5), ("threads", 1), ("small", True)):
        setattr(given, name, options.get(name, usual))
    console = Console(file=io.StringIO(), width=200)
    code = main(given, cases=CASES, console=console, root=root, device="cpu", launches=1)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_the_command_compares_two_files(tmp_path: Path) -> None:
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, result in zip(paths, (stored(1), stored(2, 1.3)), strict=True):
        save(result, path)
    code, text = run(ROOT, *paths)
    assert code == 0
    assert "pool/a" in text
    assert "B slower" in text
    code, text = run(ROOT, *paths, case="b")
    assert "pool/a" not in text
    with pytest.raises(OSError, match=r"nowhere\.json"):
        run(ROOT, paths[0], "nowhere.json")
    with pytest.raises(RevisionError, match="nothing-like-it: expected a file of results, a git revision"):
        run(ROOT, paths[0], "nothing-like-it")


# ---- the protocol, with workers that are told how to behave ----

FAKE = """
import json, os, sys, time
seconds, mood = float(sys.argv[1]), sys.argv[2]
print("starting", file=sys.stderr)
if mood == "dies at start":
    print("cannot import what is not there", file=sys.stderr)
    sys.exit(3)
def say(what):
    print(json.dumps(what), flush=True)
say({"ops": "x", "device": "cpu"})
rounds = 0
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "prepare":
        if mood == "hangs":
            time.sleep(60)
        if mood == "babbles":
            print("hello", flush=True)
        elif mood == "fails":
            say({"missing": None, "failure": "y: error 1, allowed 0.1"})
        elif mood == "lacks":
            say({"missing": "made for cuda tensors", "failure": None})
        elif mood == "raises":
            say({"error": "RuntimeError: out of memory"})
        else:
            say({"missing": None, "failure": None, "seconds": seconds})
        case = asked["case"]
    else:
        rounds += 1
        if mood == "dies at pool/b" and case == "pool/b":
            print("Fatal error: segmentation fault", file=sys.stderr, flush=True)
            os._exit(139)
        start = time.perf_counter()
        for _ in range(asked["repeats"]):
            time.sleep(seconds)
        say({"seconds": (time.perf_counter() - start) / asked["repeats"]})
"""


def point(case: str) -> Point:
    row = row_of(case, "flashsloth/cpu")
    return Point(row.key, row.size)


LIMITS = Limits(start=60.0, prepare=60.0, round=60.0)


class Workers:
    """Starts fake workers, and remembers all of them."""

    def __init__(self, folder: Path, a: tuple[float, str], b: tuple[float, str], limits: Limits = LIMITS) -> None:
        self.folder, self.behaviour, self.limits = folder, {"A": a, "B": b}, limits
        self.started: list[Worker] = []
        (folder / "fake.py").write_text(FAKE)

    @contextmanager
    def __call__(self, name: str) -> Iterator[Worker]:
        seconds, mood = self.behaviour[name]
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        command = [sys.executable, str(self.folder / "fake.py"), str(seconds), mood]
        with Worker(name, command, folder=folder, limits=self.limits) as worker:
            self.started.append(worker)
            yield worker

    def all_gone(self) -> bool:
        return all(worker.process.poll() is not None for worker in self.started)


FINE = (0.004, "fine")


def test_a_slower_revision_is_found(tmp_path: Path) -> None:
    workers = Workers(tmp_path, FINE, (0.008, "fine"))
    (line,) = interleaved([point("pool/a")], workers, budget=0.6, launches=3)
    assert line.ratio is not None
    low, high = line.ratio.interval()
    assert 1.4 < low < line.ratio.ratio < high < 2.6
    assert float(line.ratio.freedom) == 2  # a launch is one sample
    assert len(workers.started) == 6
    assert workers.all_gone()


@pytest.mark.parametrize(
    ("mood", "note", "failed"),
    [
        ("fails", "check failed in B: y: error 1, allowed 0.1", True),
        ("lacks", "missing in B: made for cuda tensors", False),
        ("raises", "B: prepare: RuntimeError: out of memory", True),
        ("babbles", "B: prepare: expected a JSON object, got 'hello'", True),
    ],
)
def test_what_cannot_be_timed_has_a_reason(tmp_path: Path, mood: str, note: str, failed: bool) -> None:
    workers = Workers(tmp_path, FINE, (0.004, mood))
    (line,) = interleaved([point("pool/a")], workers, budget=0.1)
    assert (line.ratio, line.note, line.failed) == (None, note, failed)
    assert workers.all_gone()


def test_a_worker_that_dies_is_quoted_and_the_others_cases_are_measured(tmp_path: Path) -> None:
    workers = Workers(tmp_path, FINE, (0.004, "dies at pool/b"))
    lines = interleaved([point(f"pool/{name}") for name in "abc"], workers, budget=0.1, launches=2)
    assert [line.ratio is not None for line in lines] == [True, False, True]
    assert "B: round: the worker died, exit code 139; its last lines:" in lines[1].note
    assert "Fatal error: segmentation fault" in lines[1].note
    assert lines[1].failed
    assert len(workers.started) == 6  # a fresh pair for what was left of the first launch; the second goes without it
    assert workers.all_gone()


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    workers = Workers(tmp_path, (0.004, "hangs"), FINE, LIMITS._replace(prepare=1.0))
    begin = time.monotonic()
    (line,) = interleaved([point("pool/a")], workers, budget=0.1)
    assert "A: prepare: no answer within 1 s; its last lines:\n  starting" in line.note
    assert time.monotonic() - begin < 20
    assert workers.all_gone()


def test_a_worker_that_does_not_start_ends_the_comparison(tmp_path: Path) -> None:
    workers = Workers(tmp_path, FINE, (0.004, "dies at start"))
    with pytest.raises(WorkerError, match=r"(?s)B: start: the worker died, exit code 3.*cannot import what is not"):
        interleaved([point("pool/a"), point("pool/b")], workers, budget=0.1)
    assert workers.all_gone()


def test_ops_of_another_revision_are_refused(tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    command = [sys.executable, str(tmp_path / "fake.py"), "0.01", "fine"]
    with (
        Worker("A", command, folder=tmp_path, ops=tmp_path / "flashsloth_ops", limits=LIMITS) as worker,
        pytest.raises(WorkerError, match=r"A: start: expected the ops of .*flashsloth_ops, got those of x"),
    ):
        worker.started()


def test_an_interrupt_ends_the_workers(tmp_path: Path) -> None:
    workers = Workers(tmp_path, FINE, FINE)

    def interrupt(key: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleaved([point("pool/a")], workers, budget=0.1, step=interrupt)
    assert len(workers.started) == 2
    assert workers.all_gone()


# ---- revisions ----


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, "-C", str(root), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(root: Path, message: str) -> str:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", message)
    return git(root, "rev-parse", "HEAD")


SETUP = """
import pathlib, sys
if pathlib.Path("broken").exists():
    sys.exit("error: kernel.cpp:7: expected ';'")
pathlib.Path("builds.txt").open("a").write("built\\n")
pathlib.Path("flashsloth_ops/_C.so").write_text(pathlib.Path("flashsloth_ops/__init__.py").read_text())
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of a package whose "build" copies a file; the second, HEAD, does not build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "repository"
    (root / "flashsloth_ops").mkdir(parents=True)
    git(root, "init", "-q")
    (root / "setup.py").write_text(SETUP)
    (root / ".gitignore").write_text("*.so\nbuilds.txt\n")
    (root / "flashsloth_ops" / "__init__.py").write_text("version = 1\n")
    commit(root, "one")
    (root / "broken").write_text("")
    commit(root, "two")
    return root


def test_a_revision_is_built_once_and_its_worktree_is_removed(repository: Path) -> None:
    first = resolve("HEAD~1", repository)
    said: list[str] = []
    for _ in range(2):
        with checked_out(first, repository, say=said.append) as tree:
            assert tree != repository
            assert not (tree / "broken").exists()
            assert (tree / "flashsloth_ops" / "_C.so").read_text() == "version = 1\n"
            assert len(git(repository, "worktree", "list").splitlines()) == 2
            with workplace(tree) as folder:
                assert (folder / "bench" / "worker.py").is_file()
                assert (folder / "flashsloth_ops" / "_C.so").is_file()
        assert not tree.exists()
        assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert said == [f"building {first}"]  # the second time it came from the cache
    assert [path.name for path in cache_folder().glob("*/*/*")] == ["_C.so"]


def test_the_worktree_is_removed_after_an_interrupt_too(repository: Path) -> None:
    with pytest.raises(KeyboardInterrupt), checked_out(resolve("HEAD~1", repository), repository) as tree:
        raise KeyboardInterrupt
    assert not tree.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_revision_that_does_not_build_says_what_the_compiler_said(repository: Path) -> None:
    with (
        pytest.raises(RevisionError, match=r"(?s)HEAD \(.*exit code 0, got 1:.*kernel\.cpp:7: expected ';'"),
        checked_out(resolve("HEAD", repository), repository),
    ):
        pass
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert not list(cache_folder().glob("*/*"))


def test_the_working_tree_is_built_where_it_is(repository: Path) -> None:
    (repository / "broken").unlink()
    with checked_out(resolve(".", repository), repository) as tree:
        assert tree == repository
    assert (repository / "builds.txt").read_text() == "built\n"


def test_a_result_stands_for_its_commit_unless_it_is_dirty(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert of_result("a.json", stored(1, commit=head), repository).commit == head
    for header, message in (
        ({"commit": head, "difference": "1234"}, "measured with uncommitted changes to"),
        ({"commit": "unknown", "difference": None}, "measured outside a repository"),
        ({"commit": "1" * 40}, "expected a commit of this repository, got 111111111111"),
    ):
        with pytest.raises(RevisionError, match=message):
            of_result("a.json", stored(1, **header), repository)


def test_a_dirty_result_is_refused_by_the_command(repository: Path, tmp_path: Path) -> None:
    result = stored(1, commit=git(repository, "rev-parse", "HEAD"), difference="1234")
    save(result, tmp_path / "a.json")
    with pytest.raises(RevisionError, match=r"a\.json: expected a result of a commit, got one measured with unc"):
        run(repository, tmp_path / "a.json", "HEAD~1")


# ---- the whole way, with the real ops and a planted slowdown ----


@pytest.fixture
def slowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of the real ops as they are here, in HEAD~1, and with a sleep in the pool, in HEAD."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "repository"
    shutil.copytree(
        ROOT / "flashsloth_ops", root / "flashsloth_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    libraries = [str(path) for path in (ROOT / "flashsloth_ops").glob("*.so")]
    (root / "setup.py").write_text(
        textwrap.dedent(f"""
        import shutil
        for library in {libraries!r}:
            shutil.copy(library, "flashsloth_ops")
        """)
    )
    (root / ".gitignore").write_text("*.so\n__pycache__/\n")
    git(root, "init", "-q")
    commit(root, "as it is")
    source = root / "flashsloth_ops" / "__init__.py"
    source.write_text(
        source.read_text()
        + textwrap.dedent("""
        import time as _time

        _quick = spatial_attention_pool

        def spatial_attention_pool(*arguments, **named):
            _time.sleep(0.004)
            return _quick(*arguments, **named)
        """)
    )
    commit(root, "slower")
    return root


@needs_extension
def test_a_slowdown_between_two_revisions_is_found(slowed: Path) -> None:
    # As many rounds as there may be: of few, on a machine that does something else too, the interval says nothing.
    code, text = run(slowed, "HEAD~1", "HEAD", case="spatial_pool/forward-b1", budget=10)
    assert code == 0
    line = next(line for line in text.splitlines() if "flashsloth/cpu" in line)
    assert "B slower" in line
    ratio, low = (float(cell) for cell in line.split("flashsloth/cpu")[1].split()[:2])
    assert ratio > 2
    assert low > 1.5
    assert len(git(slowed, "worktree", "list").splitlines()) == 1


@needs_extension
def test_a_wrong_revision_has_no_ratio(slowed: Path) -> None:
    source = slowed / "flashsloth_ops" / "__init__.py"
    source.write_text(
        source.read_text().replace("return _quick(*arguments, **named)", "return 1.01 * _quick(*arguments, **named)")
    )
    code, text = run(slowed, "HEAD~1", ".", case="spatial_pool/forward-b1")
    assert code == 1
    assert "check failed in B: y: error" in text


def test_points_are_ours_for_the_device() -> None:
    points = points_of(CASES, "cpu", None)
    assert {one.key[4].partition(",")[0] for one in points} == {"flashsloth/cpu"}
    assert not {case.name for case in CASES if case.axis} & {one.key[0] for one in points}
    assert len(points_of(CASES, "cpu", "spatial_pool/batch")) > 1
    on_gpu = points_of(CASES, "cuda", "spatial_pool/forward-b1")
    assert [one.key[2:] for one in on_gpu] == [
        ("bfloat16", "forward", f"flashsloth/{backend}", "graph") for backend in ("triton", "cuda")
    ]
