"""A packed batch is the padded one without its padding: same loss, same gradients, one row of logits for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.model.support import IMAGE, LEARNABLE, PHI, QWEN2, Row, batch, small_model

ROWS = [Row(5, 3, seed=1), Row(4, image=False, seed=2), Row(0, 7, turn=1, seed=3), Row(2, seed=4)]


def with_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    hidden = (inputs["attention_mask"] == 0) | (ids == IMAGE) | (ids == LEARNABLE)
    return inputs | {"labels": ids.masked_fill(hidden, -100)}


def packed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = inputs["attention_mask"]
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return inputs | {"token_rows": mask.flatten().nonzero().flatten(), "cu_seqlens": cu_seqlens}


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("text", [PHI, QWEN2], ids=["phi", "qwen2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_logits_and_gradients_are_those_of_the_padded_batch(text: Any, side: str, checkpointing: bool) -> None:
    model = small_model(text)
    model.set_attn_implementation("flashsloth")
    inputs = with_labels(batch(ROWS, side, extra=3))
    first = (inputs["attention_mask"].cumsum(1) == 1) & inputs["attention_mask"].bool()
    hidden = inputs | {"labels": inputs["labels"].masked_fill(first, -100)}  # with padding before it, it is predicted
    wanted, gradients = run(model, hidden)
    if checkpointing:
        model.train()  # the model has no dropout here but that of pooling
        model.pooling.dropout = 0.0
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    out, got = run(model, packed(inputs))
    keep = inputs["attention_mask"].bool()
    assert out.logits.shape == (1, int(keep.sum()), model.config.text_config.vocab_size)
    assert torch.allclose(out.logits[0], wanted.logits[keep], rtol=1e-4, atol=1e-4)
    assert torch.allclose(out.loss, wanted.loss, rtol=1e-5)
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert (got[name] - gradient).abs().max().item() <= 2e-4 * scale + 1e-7, name


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # which nothing writes to
def test_layers_that_get_copies_of_their_arguments() -> None:
    """FSDP2 with mixed precision casts what a layer gets, and makes new containers for it."""
    model = small_model()
    model.set_attn_implementation("flashsloth")
    inputs = packed(with_labels(batch(ROWS)))
    wanted, gradients = run(model, inputs)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, half = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)
        for part in (*model.get_decoder().layers, model):
            fully_shard(part, mesh=mesh, mp_policy=half)
        out, got = run(model, inputs)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(out.loss.float(), wanted.loss, rtol=2e-2, atol=0)
    assert got.keys() == gradients.keys()


def test_rows_do_not_see_each_other() -> None:
    model = small_model()
    model.set_attn_implementation("flashsloth")
    inputs = packed(batch(ROWS))
    first = model(**inputs).logits[0]
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][0, 0] += 1
    second = model(**changed).logits[0]
    start = int(inputs["cu_seqlens"][1])
    assert torch.equal(first[start:], second[start:])
    assert not torch.equal(first[:start], second[:start])


def test_wrong_arguments_are_named() -> None:
    model = small_model()
    inputs = packed(batch(ROWS))
    with pytest.raises(ValueError, match="token_rows: expected attn_implementation='flashsloth'"):
        model(**inputs)
    model.set_attn_implementation("flashsloth")
    for change, message in (
        ({"cu_seqlens": None}, "token_rows, cu_seqlens: expected both"),
        ({"cu_seqlens": inputs["cu_seqlens"][1:]}, r"cu_seqlens: expected \(5,\) for 4 rows, got \(4,\)"),
        ({"token_rows": inputs["token_rows"].float()}, "token_rows: expected an integer tensor of one dimension"),
        ({"position_ids": inputs["input_ids"]}, "token_rows: expected neither past_key_values nor position_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**inputs, **change})
