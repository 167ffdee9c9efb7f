"""Pretraining of a vision tower: its start, its optimizer, and going on after a stop."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from flashsloth.nano import tower
from flashsloth.nano.neighbours import OFFSETS, look_at_neighbours, whiten_patches
from flashsloth.nano.tower import TowerTraining, train_tower, unit_features

pytest.importorskip("sklearn")


def small(heads: int = 4, attention: str = "sdpa") -> SiglipVisionConfig:
    config = SiglipVisionConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=heads,
        intermediate_size=64,
        image_size=36,
        patch_size=6,
        vision_use_head=False,
    )
    config._attn_implementation = attention
    return config


def test_heads_look_at_their_neighbours() -> None:
    torch.manual_seed(0)
    model = SiglipVisionModel(small(attention="eager"))
    look_at_neighbours(model)
    first = model(torch.zeros(1, 3, 36, 36), output_attentions=True).attentions[0][0]
    for weights, (down, right) in zip(first, OFFSETS[0], strict=True):
        seen = weights[2 * 6 + 3].argmax().item()
        assert divmod(seen, 6) == (2 + down, 3 + right)


def test_another_number_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="num_attention_heads: expected 4, got 2"):
        look_at_neighbours(SiglipVisionModel(small(heads=2)))


def test_channels_for_pixels_start_equally_strong() -> None:
    model = SiglipVisionModel(small())
    look_at_neighbours(model)
    generator = torch.Generator().manual_seed(0)
    # Smooth pictures, as real ones are: most of what is in a patch is its mean.
    pixels = torch.nn.functional.interpolate(torch.randn(64, 3, 9, 9, generator=generator), 36, mode="bilinear")
    whiten_patches(model, pixels)
    inner = getattr(model, "vision_model", model)
    channels = inner.embeddings.patch_embedding(pixels)[:, 16:].transpose(0, 1).flatten(1)
    assert channels.mean(1).abs().max() < 1e-3
    strong = channels.std(1)[:20]
    assert strong.max() / strong.min() < 1.2


def test_features_are_shifted_and_scaled_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = SiglipVisionModel(small())
    getattr(model, "vision_model", model).post_layernorm = torch.nn.Identity()
    pixels = torch.randn(8, 3, 36, 36)
    with torch.no_grad():
        before = 40 * model(pixels).last_hidden_state.double()
        for name, weight in model.named_parameters():
            if "embedding" in name or "out_proj" in name or "fc2" in name:
                weight.mul_(40)
        unit_features(model, pixels)
        after = model(pixels).last_hidden_state.double()
    wanted = before - before.mean((0, 1))
    assert after.mean((0, 1)).abs().max() < 1e-5
    assert after.std().item() == pytest.approx(1, abs=1e-3)
    assert (after - wanted / wanted.std()).abs().max() < 1e-3


def test_pretraining_learns_and_goes_on_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(tower, "_WHITENED", 2)
    training = TowerTraining(steps=50, batch=4, warmup=5, decay=20)
    train_tower(small(), tmp_path / "whole", training)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert log[1]["ink"] < log[0]["ink"]
    first = torch.load(tmp_path / "whole" / "tower.pt", weights_only=True)

    class Stopped(Exception):
        pass

    replace_file = os.replace

    def save_and_stop(source: Path, target: Path) -> None:
        replace_file(source, target)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", save_and_stop)
        with pytest.raises(Stopped):
            train_tower(small(), tmp_path / "parts", training, save_every=20)
    assert torch.load(tmp_path / "parts" / "tower.pt", weights_only=True)["step"] == 20
    with pytest.raises(ValueError, match=r"expected a state of .*'seed': 1.* got one of .*'seed': 0"):
        train_tower(small(), tmp_path / "parts", replace(training, seed=1))
    train_tower(small(), tmp_path / "parts", training)
    state = torch.load(tmp_path / "parts" / "tower.pt", weights_only=True)
    for name, weight in first["model"].items():
        assert torch.equal(weight, state["model"][name]), name
