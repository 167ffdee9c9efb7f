"""Whole models: are they what they are called, are their tokens, flops and bytes counted right."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.e2e import flops, memory, phases, tokens
from bench.e2e.models import (
    AVERAGE,
    CONTROL,
    FLASHSLOTH,
    FLASHSLOTH_HD,
    INTERNVL_1B,
    INTERNVL_2B,
    QWEN2_VL,
    RESOLUTIONS,
    SHUFFLE,
    SMALL_RESOLUTIONS,
    SMOLVLM,
    Model,
)
from flashsloth_ops import EmbeddedQueryParams
from flashsloth_ops.reference.embedded_query import absorbed_forward
from flashsloth_ops.reference.spatial_pool import spatial_attention_pool
from tests.bench.small_models import NEW, TEXT, Built, every_model

# ---- tokens ----

VISUAL_TOKENS = {
    FLASHSLOTH: (81, 81, 81),
    FLASHSLOTH_HD: (405, 405, 405),
    CONTROL: (729, 729, 729),
    AVERAGE: (81, 81, 81),
    SHUFFLE: (81, 81, 81),
    QWEN2_VL: (14 * 14, 27 * 27, 48 * 32),
    INTERNVL_2B: (256, 5 * 256, 7 * 256),
    INTERNVL_1B: (256, 5 * 256, 7 * 256),
    SMOLVLM: (17 * 81, 17 * 81, 13 * 81),
}


@every_model
def test_visual_tokens_of_full_models(model: Model) -> None:
    config = model.config(False)
    found = tuple(model.layout(config, *resolution).visual_tokens for resolution in RESOLUTIONS)
    assert found == VISUAL_TOKENS[model]


@every_model
def test_small_models_cut_small_images_into_as_many_tiles(model: Model) -> None:
    full, small = model.config(False), model.config(True)
    assert type(full) is type(small)
    for large_image, small_image in zip(RESOLUTIONS, SMALL_RESOLUTIONS, strict=True):
        assert model.layout(full, *large_image).tiles == model.layout(small, *small_image).tiles


SIDES = (57, 224, 383, 384, 385, 448, 700, 768, 896, 1000, 1344, 1536, 2000)


def test_qwen_tokens_are_those_of_transformers() -> None:
    processor = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    config = QWEN2_VL.config(False)
    for width in SIDES:
        for height in SIDES:
            rows, columns = processor.smart_resize(height, width, min_pixels=3136, max_pixels=12845056)
            assert tokens.qwen2_vl(config, width, height).grid == (rows // 14, columns // 14)


def test_internvl_tiles_are_those_of_transformers() -> None:
    processor = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    config = INTERNVL_2B.config(False)
    for width in SIDES:
        for height in SIDES:
            columns, rows = processor.get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
            tiles = columns * rows + (columns * rows > 1)
            assert tokens.internvl(config, width, height).tiles == tiles, (width, height)


def test_smolvlm_tiles_are_those_of_transformers() -> None:
    module = pytest.importorskip("transformers.models.smolvlm.image_processing_pil_smolvlm")
    import numpy as np

    processor = module.SmolVLMImageProcessorPil(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384})
    config = SMOLVLM.config(False)
    for width, height in [*RESOLUTIONS, (384, 385), (1000, 57), (57, 1000), (1344, 700), (896, 1344)]:
        image = np.zeros((1, height, width), dtype=np.uint8)
        image = processor.resize(image, processor.size, resample=0)
        image = processor.resize_for_vision_encoder(image, 384, resample=0)
        frames, rows, columns = processor.split_images(image, {"longest_edge": 384}, resample=0)
        layout = tokens.smolvlm(config, width, height)
        # Two tags a tile, one line break a row, and a tag behind everything.
        assert (layout.tiles, layout.marks) == (len(frames), 2 * len(frames) + rows + 1), (width, height)
        assert rows * columns + 1 == len(frames)


# ---- models ----

# As the pages of the checkpoints state them, in billions; the control has no page.
PARAMETERS = {FLASHSLOTH: 3.2, QWEN2_VL: 2.21, INTERNVL_2B: 2.21, INTERNVL_1B: 0.94, SMOLVLM: 2.25}


def test_full_models_have_the_parameters_of_the_checkpoints() -> None:
    for model, billions in PARAMETERS.items():
        digits = len(str(billions).split(".")[1])
        assert round(memory.parameters(model, False).total / 1e9, digits) == billions, model.name


@every_model
def test_what_is_computed_and_not_drawn_is_right(model: Model) -> None:
    module = model.build(True, "cpu", torch.float32)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    seen = set()
    for name, buffer in module.named_buffers():
        kind = name.split(".")[-1]
        seen.add(kind)
        if kind == "position_ids":
            assert torch.equal(buffer.flatten(), torch.arange(buffer.numel()))
        elif kind in ("inv_freq", "original_inv_freq"):
            theta = buffer[-1].item() ** (-buffer.numel() / max(buffer.numel() - 1, 1))
            expected = theta ** -(torch.arange(buffer.numel()) / buffer.numel())
            assert torch.allclose(buffer, expected)
    assert "inv_freq" in seen


@every_model
def test_the_same_weights_every_time(model: Model) -> None:
    first, second = (model.build(True, "cpu", torch.float32).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_pooling_peers_pool_windows() -> None:
    features = torch.arange(36.0).view(1, 36, 1).expand(-1, -1, 32)
    for model, width in ((AVERAGE, 32), (SHUFFLE, 9 * 32)):
        projector = model.build(True, "cpu", torch.float32).model.multi_modal_projector
        given: list[torch.Tensor] = []
        projector.linear_1.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0]))
        projector(features)
        assert given[0].shape == (1, 4, width)
        # The first window of a 6x6 grid holds 0 1 2, 6 7 8, 12 13 14; the last is 21 further on.
        assert given[0][0, :, ::32].mean(-1).tolist() == [7.0, 10.0, 25.0, 28.0]


# ---- flops ----


def counted(counter: FlopCounterMode) -> int:
    """All, but for the angles of rotary embeddings, which some versions of transformers compute as a product."""
    by_module = counter.get_flop_counts().items()
    angles = sum(sum(ops.values()) for name, ops in by_module if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


@every_model
def test_flops_are_those_of_the_counter(model: Model) -> None:
    """Exactly: both count products and attention. Fused ops hide theirs from the counter and are compared below."""
    built = Built(model, "eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        built.module(**built.request, use_cache=True, logits_to_keep=1)
    works = built.works()
    assert counted(counter) == works["first token"].flops - _fused(built)
    parts = sum(works[phase].flops for phase in ("vision", "compression", "prefill"))
    assert parts == works["first token"].flops


def _fused(built: Built) -> float:
    """Flops of the ops in a forward pass."""
    if not built.model.ours:
        return 0.0
    forward = flops.forward(built.model, built.config, built.layout, built.batch, TEXT)
    hidden, score, *_, state = forward.compression
    return sum(product.flops for product in (hidden, score, state, *forward.queries)) + forward.query_attention


def test_decode_flops_are_those_of_the_counter() -> None:
    built = Built(QWEN2_VL, "eager")
    module, request = built.module, built.request
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module.generate(**request, max_new_tokens=NEW, do_sample=False)
    works = built.works()
    assert counted(counter) == works["answer"].flops
    assert works["answer"].flops == works["first token"].flops + (NEW - 1) * works["decode"].flops


@pytest.mark.parametrize("stage", flops.STAGES)
@every_model
def test_training_flops_are_those_of_the_counter(model: Model, stage: str) -> None:
    built = Built(model, "eager")
    with (
        phases.Training(model, built.module, built.request, stage) as training,
        FlopCounterMode(display=False) as counter,
    ):
        training.loss().backward()
    expected = built.works()[stage].flops
    if model.ours:
        forward = flops.forward(model, built.config, built.layout, built.batch, TEXT)
        hidden, score, *_, state = forward.compression
        trained = 3 if stage == flops.TRAINING_2 else 2
        # The gradient of the down-projection of the image is an ordinary product outside of the op.
        expected -= 2 * hidden.flops + 3 * score.flops + state.flops
        expected -= trained * sum(product.flops for product in forward.queries) + 3 * forward.query_attention
    assert counted(counter) == expected


def test_flops_of_the_fused_ops_are_those_of_their_reference() -> None:
    built = Built(FLASHSLOTH_HD, "sdpa")
    forward = flops.forward(built.model, built.config, built.layout, built.batch, TEXT)
    hidden, score, *_, state = forward.compression
    width, patches, side = built.config.vision_config.hidden_size, built.layout.patches, built.layout.grid
    mlp = built.module.pooling.mlp
    weights = (mlp["0"].weight, mlp["0"].bias, mlp["3"].weight, mlp["3"].bias)
    tiles = torch.randn(built.batch * built.layout.tiles, side[0] * side[1], width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        spatial_attention_pool(tiles, *weights, grid=side)
    # The counter leaves out a product with a vector, which the scores are.
    assert counter.get_total_flops() in (hidden.flops, hidden.flops + score.flops)

    params: EmbeddedQueryParams = built.module.embedded_query.params()
    wide, inner, asked = built.config.text_config.hidden_size, built.config.query_dim, TEXT - TEXT // 2
    rows = [torch.randn(built.batch, count, wide) for count in (built.config.num_queries, asked)]
    image = torch.randn(built.batch, patches, width)
    named = [value for name, value in params._asdict().items() if not name.startswith("down_image")]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = image @ params.down_image_weight.T
        assert counter.get_total_flops() == state.flops
        rstd = torch.ones(y.shape[:2])
        absorbed_forward(rows[0], rows[1], None, image, y, rstd, named, built.config.query_heads, 1e-5)
    assert y.shape[-1] == inner
    expected = sum(product.flops for product in forward.queries) + forward.query_attention
    assert counter.get_total_flops() - state.flops == expected


# ---- memory ----


@pytest.mark.parametrize("stage", flops.STAGES)
@every_model
def test_memory_at_least(model: Model, stage: str) -> None:
    """A bound from below that is of use: what autograd keeps of the language model is at least a quarter of all."""
    built = Built(model)
    with phases.Training(model, built.module, built.request, stage) as training:
        kept = training.kept_bytes()
        trained = sum(p.numel() for p in built.module.parameters() if p.requires_grad)
    counted = memory.parameters(model, True)
    assert counted.total == sum(p.numel() for p in built.module.parameters())
    assert counted.trained[stage] == trained
    shape = (built.layout, built.batch, TEXT, NEW)
    least = memory.bytes_at_least(model, built.config, *shape, stage, True, 4) - 4 * (counted.total + 3 * trained)
    assert kept / 4 < least < kept


@every_model
def test_trained_sets(model: Model) -> None:
    built = Built(model)
    tower = {id(p) for p in built.parts.tower.parameters()}
    projector = {id(p) for module in built.parts.projector for p in module.parameters()}
    every = {id(p) for p in built.module.parameters()}
    for stage, expected in zip(flops.STAGES, (projector, every - (tower - projector)), strict=True):
        memory.choose_trained(built.module, built.parts, stage)
        assert {id(p) for p in built.module.parameters() if p.requires_grad} == expected
    assert projector
    assert not model.ours or not projector & tower
