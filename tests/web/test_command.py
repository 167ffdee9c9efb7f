"""``flashsloth serve`` on the command line, what it says when it cannot start, and how it tidies up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashsloth import cli, tiny
from flashsloth.web import server
from flashsloth.web.server import listening, sweep
from tests.support import ROOT
from tests.web.client import Client
from tests.web.pictures import photo


def test_uploads_that_nobody_opened_are_swept_away(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    for path in (tmp_path / "old" / "a.png", tmp_path / "old.png", tmp_path / "new" / "b.png"):
        path.touch()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    hour_ago = time.time() - 3600
    for path in (tmp_path / "old" / "a.png", tmp_path / "old.png", tmp_path / "old", tmp_path / "link"):
        os.utime(path, (hour_ago, hour_ago), follow_symlinks=False)
    sweep(tmp_path, older_than=60)
    # Emptying a folder makes it young; it goes the next time.
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["new", "new/b.png", "old"]
    os.utime(tmp_path / "old", (hour_ago, hour_ago))
    sweep(tmp_path, older_than=60)
    assert not (tmp_path / "old").exists()
    sweep(tmp_path, older_than=-1)
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_a_port_that_is_taken_and_a_host_that_is_not_here() -> None:
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"--host, --port: cannot listen at 127\.0\.0\.1:{port} \("):
            listening("127.0.0.1", port)
    with pytest.raises(OSError, match=r"--host, --port: cannot listen at 192\.0\.2\.1:0"):
        listening("192.0.2.1", 0)
    with pytest.raises(OSError, match=r"--host: expected an address of this machine, got '300\.1\.1\.1'"):
        listening("300.1.1.1", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-mb", "0"], "megabytes: expected a positive number, got 0.0"),
        (["--max-megapixels", "nan"], "megapixels: expected a positive number, got nan"),
        (["--port", "70000"], "--port: expected 0 to 65535, got 70000"),
        (["--model", "/nowhere"], "--model: expected a directory with a checkpoint"),
    ],
)
def test_wrong_arguments_end_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_check_installed", lambda: None)
    assert cli.main(["serve", "--port", "0", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["serve", "--port", "0"]) == 2
    assert "the package gradio is missing: pip install 'flashsloth[serve]'" in capsys.readouterr().err


def test_the_command_serves_a_checkpoint_and_ends_when_interrupted(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs flashsloth[serve]")
    checkpoint = tmp_path / "a tiny one"
    config = tiny.tiny_config()
    tiny.random_model(config).save_pretrained(checkpoint)
    tiny.processor_for(config).save_pretrained(checkpoint)
    command = [sys.executable, "-m", "flashsloth.cli", "serve", "--model", str(checkpoint), "--port", "0", "--hd"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "temporary").mkdir()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            assert found is not None
            client = Client(found[0])
            until = time.monotonic() + 60
            while not answers(client):
                assert time.monotonic() < until, "the server does not answer"
                time.sleep(0.05)
            assert "a tiny one: 0.1 million parameters, float32 on cpu" in client.get("")
            photo().save(tmp_path / "good.png")
            assert client.picture(tmp_path / "good.png") == ""
            assert client.ask("What is it?") == ""
            assert client.answers()[0]
            assert "180" in client.text("times")  # five tiles of 36 vision tokens
            process.send_signal(signal.SIGINT)
            assert process.wait(60) in (0, 130, -signal.SIGINT)
        finally:
            process.kill()
    assert list((tmp_path / "temporary").glob("flashsloth-*")) == []


def answers(client: Client) -> bool:
    try:
        return bool(client.get("config"))
    except OSError:
        return False
