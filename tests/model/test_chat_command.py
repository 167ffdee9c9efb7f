"""``flashsloth chat`` and ``ask`` on a terminal and through pipes, and the model that ships as their default."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration, shipped
from flashsloth.chat import Answer, Conversation
from flashsloth.chat_command import printable, timings
from flashsloth.cli import main
from flashsloth.loading import load_model
from tests.model.talking import picture, talking_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = talking_model(space_first=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        picture(number).save(tmp_path / f"picture {number}.png")
    return tmp_path


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def chat(checkpoint: Path, folder: Path, *more: str) -> int:
    image = str(folder / "picture 0.png")
    return main(["chat", image, "--model", str(checkpoint), "--max-new-tokens", "6", "--device", "cpu", *more])


def talked(checkpoint: Path, *questions: str, image: int = 0) -> list[str]:
    """The answers of one conversation."""
    loaded = load_model(checkpoint, device="cpu")
    talk = Conversation(loaded.model, loaded.processor)
    talk.set_image(picture(image))
    return ["".join(talk.ask(question, max_new_tokens=6)) for question in questions]


def test_turns_through_pipes(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n\n  \nAnd why?\n"))
    assert chat(checkpoint, folder) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == talked(checkpoint, "What is it?", "And why?")
    assert "token" not in shown.err  # nothing but answers, and no notes, where nobody sits


def test_commands(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "What is it?",
        "/reset",
        "And why?",
        f'/image "{folder / "picture 1.png"}"',
        "And why?",
        "/image",
        "/dance",
        "/quit",
        "never asked",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert chat(checkpoint, folder) == 0
    shown = capsys.readouterr()
    want = [*talked(checkpoint, "What is it?"), *talked(checkpoint, "And why?")]
    want += talked(checkpoint, "And why?", image=1)
    assert shown.out.splitlines() == want
    assert shown.err.count("/image FILE begins with another picture") == 2
    assert "a new conversation on the same picture" in shown.err
    assert "a new conversation on another picture" in shown.err


def test_a_line_that_cannot_be_used_is_told_and_the_next_one_read(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["a <image> b", f"/image {folder / 'none.png'}", "x" * 3000, "\udcff", "And why?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert chat(checkpoint, folder) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == talked(checkpoint, "And why?")
    said = [line for line in shown.err.splitlines() if line.startswith("flashsloth: ")]
    expected = ["contains '<image>'", "No such file", "expected a conversation of less than 2048", "valid Unicode"]
    assert len(said) == len(expected)
    assert all(part in line for part, line in zip(expected, said, strict=True))


def test_bytes_that_are_no_text_are_told(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff?\nAnd why?\n"), encoding="utf-8"))
    assert chat(checkpoint, folder) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == talked(checkpoint, "And why?")
    assert "valid Unicode" in shown.err


def test_on_a_terminal_there_are_prompts_and_timings(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard("What is it?\nAnd why?\n"))
    assert chat(checkpoint, folder) == 0
    shown = capsys.readouterr()
    assert shown.out.count("> ") == 3
    notes = [line for line in shown.err.splitlines() if line.startswith("(")]
    assert len(notes) == 2
    assert "picture " in notes[0]
    assert "first token " in notes[0]
    assert " 0 of " in notes[0]
    assert "picture" not in notes[1]  # encoded once
    assert " 0 of " not in notes[1]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nAnd why?\n"))
    passes: list[int] = []
    step = Conversation._step

    def interrupted(self: Conversation, token: int) -> int:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return step(self, token)

    monkeypatch.setattr(Conversation, "_step", interrupted)
    assert chat(checkpoint, folder) == 0
    first, second = capsys.readouterr().out.splitlines()
    monkeypatch.undo()
    assert first == talked(checkpoint, "What is it?")[0][:3]
    assert len(second) == 6


def test_ctrl_c_at_the_prompt_leaves(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert chat(checkpoint, folder) == 0
    assert capsys.readouterr().out == "\n"


def test_in_hd_the_picture_is_five_tiles(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = []
    encode = FlashSlothForConditionalGeneration.get_image_features
    monkeypatch.setattr(
        FlashSlothForConditionalGeneration,
        "get_image_features",
        lambda self, pixels: (tiles.append(pixels.shape[1]), encode(self, pixels))[1],
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nAnd why?\n"))
    assert chat(checkpoint, folder, "--hd") == 0
    assert tiles == [5]


def test_nothing_reaches_a_terminal_that_it_would_obey() -> None:
    assert printable("a\x1b[2Jb\x07\n\té\u202e") == "a\ufffd[2Jb\ufffd\n\té\ufffd"


def test_timings_of_an_answer_without_a_second_token() -> None:
    assert timings(Answer(ids=(1,), prompt_tokens=9, cached_tokens=4)) == "(first token 0.00 s, 4 of 9 tokens cached)"


# ---- the model that ships ----


def test_what_ships_is_the_default(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "weights"
    shutil.copytree(checkpoint, weights)
    monkeypatch.setattr(shipped, "WEIGHTS", weights)
    assert shipped.shipped_model() == weights
    image = str(folder / "picture 0.png")
    assert main(["ask", image, "What is it?", "--max-new-tokens", "6", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == talked(checkpoint, "What is it?")
    (weights / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(tokenizer\.json not in "):
        shipped.shipped_model()
    assert main(["chat", image]) == 2
    assert "--model: expected a directory with a checkpoint, as no trained weights" in capsys.readouterr().err


def test_on_a_cpu_what_ships_in_halves_runs_in_fp32(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves: Any = load_model(checkpoint, dtype="bfloat16", device="cpu")
    weights = folder / "weights"
    shutil.copytree(checkpoint, weights)
    halves.model.save_pretrained(weights)
    monkeypatch.setattr(shipped, "WEIGHTS", weights)
    assert load_model(device="cpu").model.dtype == torch.float32
    assert load_model(weights, device="cpu").model.dtype == torch.bfloat16
    assert load_model(device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
