"""Muon for matrices, AdamW for the rest: alone, and in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from flashsloth.tiny import random_model, tiny_config
from flashsloth.training.muon import Muon, matrices_of_layers, orthogonal
from tests.training.cases import configured, curve, prepare, train


def test_updates_are_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 8, 24), (2, 24, 8), (1, 8, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=generator)))
        assert (values > 0.3).all()
        assert (values < 1.3).all()
    with pytest.raises(ValueError, match=r"matrices: expected two dimensions, got a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], [])


def test_updates_in_bf16_are_those_of_fp32_but_for_rounding() -> None:
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.zeros(24, 8)) for _ in range(2)]
    for matrix, gradient in zip(matrices, torch.randn(24, 8).expand(2, -1, -1), strict=True):
        matrix.grad = gradient.clone()
    for matrix, bf16 in zip(matrices, (False, True), strict=True):
        Muon([matrix], [], muon_lr=1.0, bf16=bf16).step()
    torch.testing.assert_close(matrices[1], matrices[0], rtol=0.05, atol=0.02)
    assert not torch.equal(matrices[1], matrices[0])


def test_a_matrix_is_found() -> None:
    torch.manual_seed(0)
    wanted, found = torch.randn(6, 4), nn.Parameter(torch.zeros(6, 4))
    optimizer = Muon([found], [])
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        (found - wanted).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (found - wanted).abs().max() < 0.05


def test_the_rest_is_trained_as_by_adamw() -> None:
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2}
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    matrix = nn.Parameter(torch.eye(2))
    optimizers = [Muon([matrix], [{"params": [ours]}], **settings), torch.optim.AdamW([theirs], **settings)]
    for _ in range(5):
        for parameter in (ours, theirs):
            (parameter - torch.arange(3)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(matrix, torch.eye(2))  # without a gradient nothing moves


def test_matrices_are_those_of_linear_layers() -> None:
    model = random_model(tiny_config(text={"tie_word_embeddings": True}))
    model.get_input_embeddings().weight.requires_grad_(True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in model.projector.parameters():
        parameter.requires_grad_(False)
    chosen = [names[id(matrix)] for matrix in matrices_of_layers(model)]
    assert len(chosen) == len(set(chosen)) > 20
    assert any("q_proj" in name for name in chosen)
    assert not [name for name in chosen if "embed_tokens" in name or "lm_head" in name or name.startswith("projector")]


def test_a_run_with_muon_resumes_exactly_and_is_another(tmp_path: Path) -> None:
    folder = prepare(tmp_path, 12)
    whole = train(folder, out="whole", muon=0.02)
    assert {group["muon"] for group in whole.optimizer.param_groups} == {True, False}
    assert len({id(p) for group in whole.optimizer.param_groups for p in group["params"]}) == len(
        [p for p in whole.model.parameters() if p.requires_grad]
    )
    train(folder, out="stopped", muon=0.02, arguments={"max_steps": 4, "lr_scheduler_type": "constant"})
    steady = train(folder, out="steady", muon=0.02, arguments={"lr_scheduler_type": "constant"})
    resumed = train(folder, out="stopped", muon=0.02, arguments={"lr_scheduler_type": "constant"}, resume=True)
    assert curve(resumed) == curve(steady)
    assert curve(train(folder, out="adamw")) != curve(whole)
    with pytest.raises(ValueError, match=r"muon: expected 0.02, as in .* to resume it, got 0.01"):
        train(folder, out="stopped", muon=0.01, arguments={"lr_scheduler_type": "constant"}, resume=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"muon": 0}, "muon: expected a learning rate above 0, got 0"),
        ({"muon": -0.1}, "muon: expected 0 or more, got -0.1"),
        ({"muon": 0.02, "lora": {"rank": 2}}, "muon: expected no lora"),
        ({"muon": 0.02, "arguments": {"optim": "sgd"}}, r"muon: expected no arguments\.optim"),
    ],
)
def test_what_does_not_go_with_muon_is_told(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        configured(prepare(tmp_path, 2), **changes)


def test_weights_in_bfloat16_are_made_orthogonal_in_fp32() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(8, 8, dtype=torch.bfloat16)
    matrix = nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
    matrix.grad = gradient.clone()
    Muon([matrix], [], muon_lr=1.0).step()
    momentum = 0.05 * gradient.float()
    expected = orthogonal((0.05 * gradient.float() + 0.95 * momentum)[None])[0]
    torch.testing.assert_close(-matrix.detach().float(), expected, rtol=0.02, atol=0.02)
