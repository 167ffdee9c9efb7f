"""Git revisions, checked out and built beside the working tree, so that two of them can be timed in turns.

A revision lives in a temporary worktree (``git worktree add --detach``) while it is needed. Its compiled extension is
kept in a cache ($XDG_CACHE_HOME/flashsloth-bench, by default ~/.cache/flashsloth-bench) under the commit, the versions
it was built for and the settings of the build, so that it is compiled once. The working tree itself, ``.``, is built
where it is, as ``make`` does.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from bench.result import ROOT, Result

HERE = "."
PACKAGES = ("flashsloth_ops", "flashsloth")  # of a revision; bench is always the one that asks
BUILD_SECONDS = 3600.0
SETTINGS = ("FLASHSLOTH_BUILD_CUDA", "FLASHSLOTH_CUDA_ARCHS", "CXX")


class RevisionError(ValueError):
    """A revision that does not exist, cannot be checked out or does not build."""


class Revision(NamedTuple):
    """``name``: as it was asked for. ``commit``: in full; None for the working tree as it is."""

    name: str
    commit: str | None

    def __str__(self) -> str:
        return "the working tree" if self.commit is None else f"{self.name} ({self.commit[:12]})"


def resolve(name: str, root: Path = ROOT) -> Revision:
    """The commit that a name means. Raises RevisionError."""
    if name == HERE:
        return Revision(name, None)
    found = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if found.returncode:
        raise RevisionError(f"{name}: expected a file of results, a git revision or '.', got neither")
    return Revision(name, found.stdout.strip())


def of_result(name: str, result: Result, root: Path = ROOT) -> Revision:
    """The revision that a stored result was measured at.

    Raises:
        RevisionError: it was measured outside a repository, or with changes that no commit holds, or the commit is
            not in this repository.
    """
    commit, dirty = result.header["commit"], bool(result.header["difference"])
    if commit == "unknown":
        raise RevisionError(f"{name}: expected a result of a commit, got one measured outside a repository")
    if dirty:
        raise RevisionError(
            f"{name}: expected a result of a commit, got one measured with uncommitted changes to {commit[:12]}: "
            "that code cannot be built again"
        )
    if _git(root, "cat-file", "-e", f"{commit}^{{commit}}").returncode:
        raise RevisionError(
            f"{name}: expected a commit of this repository, got {commit[:12]}: `git fetch` may bring it"
        )
    return Revision(name, commit)


@contextmanager
def checked_out(
    revision: Revision, root: Path = ROOT, *, say: Callable[[str], None] = lambda line: None
) -> Iterator[Path]:
    """A folder with the code of a revision, built; gone afterwards, whatever happened.

    Raises:
        RevisionError: git or the build fails.
    """
    if revision.commit is None:
        say("building the working tree")
        build(root, str(revision))
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="flashsloth-bench-") as temporary:
        tree = Path(temporary) / "tree"
        added = _git(root, "worktree", "add", "--quiet", "--detach", str(tree), revision.commit)
        try:
            if added.returncode:
                raise RevisionError(f"{revision}: git worktree: {added.stderr.strip()}")
            _built_once(tree, revision, say)
            yield tree
        finally:
            if _git(root, "worktree", "remove", "--force", str(tree)).returncode:
                shutil.rmtree(tree, ignore_errors=True)
                _git(root, "worktree", "prune")


def build(tree: Path, name: str) -> None:
    """Compile the extension in place. Raises RevisionError with the end of what the compiler said."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        # In a session of its own, so that an interrupt ends all compilers and not only the first process.
        with subprocess.Popen(
            command,
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=BUILD_SECONDS)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RevisionError(f"{name}: build: {error}") from error
    if process.returncode:
        end = "\n  ".join(said.strip().splitlines()[-15:])
        raise RevisionError(f"{name}: expected a build with exit code 0, got {process.returncode}:\n  {end}")


def cache_folder() -> Path:
    """Where extensions of revisions are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flashsloth-bench"


def _built_once(tree: Path, revision: Revision, say: Callable[[str], None]) -> None:
    """Put the extension into a fresh worktree, from the cache where it is there."""
    assert revision.commit is not None
    kept, package = cache_folder() / revision.commit / _setting(), tree / PACKAGES[0]
    if not kept.is_dir():
        say(f"building {revision}")
        build(tree, str(revision))
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Filled aside and renamed: a build is in the cache as a whole or not at all.
        filling = Path(tempfile.mkdtemp(dir=kept.parent, prefix=".new-"))
        try:
            for library in package.glob("*.so"):
                shutil.copy2(library, filling)
            filling.rename(kept)
        except OSError:
            if not kept.is_dir():  # not because another process was as fast
                raise
        finally:
            shutil.rmtree(filling, ignore_errors=True)
    for library in kept.iterdir():
        shutil.copy2(library, package)


def _setting() -> str:
    """What a binary depends on beside its sources."""
    parts = [platform.machine(), sysconfig.get_config_var("SOABI"), torch.__version__, torch.version.cuda]
    parts += [os.environ.get(name) for name in SETTINGS]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextmanager
def workplace(tree: Path, bench: Path = ROOT / "bench") -> Iterator[Path]:
    """A folder in which Python finds today's ``bench``, and the packages of a revision."""
    with tempfile.TemporaryDirectory(prefix="flashsloth-bench-") as temporary:
        folder = Path(temporary)
        (folder / "bench").symlink_to(bench)
        for package in PACKAGES:
            if (tree / package).is_dir():
                (folder / package).symlink_to(tree / package)
        yield folder


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise RevisionError(f"git: {error}") from error
