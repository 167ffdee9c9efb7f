"""Alignment: which names a patch is told, and that words and pictures meet where they did not before."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from flashsloth.nano import model as nano
from flashsloth.nano.align import NAMES, Aligner, align, ids_of_names, in_windows, losses, names_shown
from flashsloth.nano.patches import INKS, KINDS
from flashsloth.nano.tokenizer import build_tokenizer
from flashsloth.nano.tower import TowerTraining, Views
from flashsloth.training.stages import load_model

pytest.importorskip("sklearn")
WORDS = [f" {name}" for name in NAMES if len(name) > 1]


def labels(grid: int = 6) -> dict[str, torch.Tensor]:
    shape = (1, grid, grid)
    empty = {name: torch.zeros(shape, dtype=torch.long) for name in ("kind", "ink")}
    return {**empty, "letter": torch.zeros(*shape, 3, dtype=torch.long)}


def named(shown: torch.Tensor) -> set[str]:
    return {NAMES[i] for i in shown.nonzero().flatten().tolist()}


def test_a_patch_is_told_what_it_shows_and_where_it_is() -> None:
    given = labels()
    given["kind"][0, 0, 5], given["ink"][0, 0, 5] = KINDS.index("star"), INKS.index("red")
    given["kind"][0, 3, 2], given["ink"][0, 3, 2] = KINDS.index("7"), INKS.index("black")
    given["kind"][0, 5, 0] = KINDS.index("small")
    given["letter"][0, 5, 0] = torch.tensor([1, 1, 26])
    shown = names_shown(given)
    assert named(shown[0, 0, 5]) == {"star", "red", "top", "right"}
    assert named(shown[0, 3, 2]) == {"7", "digit", "middle", "center"}
    assert named(shown[0, 5, 0]) == {"print", "a", "z", "bottom", "left"}
    assert named(shown[0, 2, 2]) == {"middle", "center"}
    windows = in_windows(shown, 3)
    assert windows.shape == (1, 4, len(NAMES))
    assert {"star", "red", "top", "right"} <= named(windows[0, 1])
    assert not {"star", "7"} & named(windows[0, 0])
    assert {"print", "7"} <= named(windows[0, 2])


def test_names_are_tokens() -> None:
    tokenizer = build_tokenizer(WORDS)
    ids = ids_of_names(tokenizer).tolist()
    assert len(set(ids)) == len(NAMES)
    assert [tokenizer.decode([one]).strip() for one in ids] == list(NAMES)
    with pytest.raises(ValueError, match=r"tokenizer: expected one token for 'star', got 5"):
        ids_of_names(build_tokenizer([word for word in WORDS if word != " star"]))


def test_words_and_pictures_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "words_of_questions", lambda: WORDS)
    torch.manual_seed(0)
    start = nano.write_start(tmp_path / "start")
    load_model(start, tower=None, seed=0, dtype="float32").vision_tower.save_pretrained(tmp_path / "tower")
    align(start, tmp_path / "tower", tmp_path / "out", TowerTraining(steps=6, batch=2, warmup=1, decay=3, seed=1))
    model = load_model(tmp_path / "out", tower=None, seed=0, dtype="float32")
    for layer in model.get_decoder().layers:
        assert torch.equal(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
    pixels = torch.stack([views["pixels"] for views in islice(Views(nano.vision_config(), TowerTraining(), 0), 1)])[0]
    with torch.no_grad():
        size = model.get_image_context(pixels[:, None]).tokens.norm(dim=-1).mean()
    words = model.get_input_embeddings().weight.norm(dim=-1).mean()
    assert 0.5 < size / words < 2
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert '"token"' in lines[1]


def test_each_part_learns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a start where a patch of a star has features of its own, all three logits of it come to say so."""
    monkeypatch.setattr(nano, "words_of_questions", lambda: WORDS)
    start = nano.write_start(tmp_path / "start")
    model = load_model(start, tower=None, seed=0, dtype="float32")
    aligner = Aligner(model, ids_of_names(build_tokenizer(WORDS)))
    given = labels(18)
    given["kind"][0, 4:6, 7] = KINDS.index("star")
    shown = names_shown(given)
    torch.manual_seed(0)
    features = shown.float() @ torch.randn(len(NAMES), 128)
    stepper = torch.optim.AdamW(aligner.parameters(), lr=3e-3)
    for _ in range(60):
        found = aligner(features.flatten(1, 2))
        torch.stack(list(losses(found, shown, 3).values())).sum().backward()
        stepper.step()
        stepper.zero_grad()
    star, there = NAMES.index("star"), shown[0, ..., NAMES.index("star")].flatten()
    for name in ("value", "key"):
        logits = found[name][0, :, star] if name == "value" else found[name][0, :, :, star].mean(1)
        assert logits[there].min() > logits[~there].max(), name
    window = in_windows(shown, 3)[0, :, star]
    assert found["token"][0, window, star].min() > found["token"][0, ~window, star].max()
