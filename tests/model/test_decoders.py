"""Other decoders, towers and attention implementations, by configuration alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration
from flashsloth.attention import KeptTokens, flashsloth_attention, flashsloth_mask, registered_name
from tests.model.support import IMAGE, PHI, QWEN2, VISION, VISUAL, Row, batch, small_config, small_model

ROWS = [Row(4, seed=1), Row(6, 2, seed=2), Row(5, image=False, seed=3)]
TOWER = {
    **VISION,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 4,
    "num_hidden_layers": 2,
}


@pytest.mark.parametrize("text", [PHI, QWEN2], ids=["phi", "qwen2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_implementations_agree(text: dict[str, Any], side: str) -> None:
    inputs = batch(ROWS, side, extra=2)
    valid = inputs["attention_mask"].bool()
    model = small_model(text)
    found = {}
    for name in ("eager", "sdpa", "flashsloth"):
        model.set_attn_implementation(name)
        for part in (model, model.language_model, model.vision_tower):
            assert part.config._attn_implementation == registered_name(name)
        with torch.no_grad():
            found[name] = model(**inputs).logits[valid]
            alone = model(**batch(ROWS[:1])).logits
        assert (alone[0] - found[name][: alone.shape[1]]).abs().max() < 5e-5
    assert (found["eager"] - found["sdpa"]).abs().max() < 5e-5
    assert (found["eager"] - found["flashsloth"]).abs().max() < 5e-5


@pytest.mark.parametrize("name", ["eager", "sdpa", "flashsloth"])
def test_gradients_agree_between_attention_implementations(name: str) -> None:
    def gradients(implementation: str) -> dict[str, torch.Tensor]:
        model = small_model(attn_implementation=implementation)
        inputs = batch(ROWS, "left")
        # The first word of a row would be learned from the padding before it, which no two implementations define.
        learned = inputs["attention_mask"].cumsum(1) > 1
        labels = torch.where(learned, inputs["input_ids"], -100)
        model(**inputs, labels=labels).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    want, got = gradients("eager"), gradients(name)
    assert want.keys() == got.keys()
    for key, gradient in want.items():
        assert (gradient - got[key]).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, key


def test_qwen2_and_another_tower_run_and_learn() -> None:
    model = small_model(QWEN2, vision_config=TOWER, pool_window=3, query_layer=1)
    assert isinstance(model.language_model, Qwen2ForCausalLM)
    assert model.config.tokens_per_tile == 9
    assert model.config.query_heads == 4
    assert len(model.vision_tower.encoder.layers) == 1
    row = Row(4, 3, seed=1)
    at = row.ids.index(IMAGE)
    row.ids[at:at] = [IMAGE] * (9 - VISUAL)
    row.spans = [(a + 5, b + 5) for a, b in row.spans]
    inputs = batch([row])
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    assert out.logits.shape == (1, len(row.ids), 96)
    for part in (model.embedded_query, model.pooling, model.projector, model.learnable_tokens):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
    assert model.language_model.lm_head.weight is model.get_input_embeddings().weight
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert ids.shape == (1, len(row.ids) + 4)


@pytest.mark.parametrize("freeze", [True, False])
def test_the_tower_learns_only_when_it_is_not_frozen(freeze: bool) -> None:
    model = small_model(freeze_vision_tower=freeze)
    inputs = batch(ROWS)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all((p.grad is None) == freeze for p in model.vision_tower.parameters())


def test_select_layer_trims_the_tower_and_takes_the_raw_output() -> None:
    model = small_model()
    names = set(model.vision_tower.state_dict())
    assert not any("post_layernorm" in name or "head." in name for name in names)
    assert not any("layers.2." in name for name in names)
    assert any("layers.1." in name for name in names)
    pixel_values = batch(ROWS[:1])["pixel_values"]
    with torch.no_grad():
        out = model.vision_tower(pixel_values[:, 0], output_hidden_states=True)
        features = model.get_image_features(pixel_values)
    assert torch.equal(features, out.hidden_states[-1])
    assert len(out.hidden_states) == 3


def test_initial_weights() -> None:
    model = FlashSlothForConditionalGeneration(small_config())
    bound = 32**-0.5
    token = model.learnable_tokens.token
    assert token.abs().max() <= bound
    assert token.abs().max() > 0.8 * bound
    assert token.mean().abs() < 0.2 * bound
    query = model.embedded_query
    assert 0.015 < query.down_projector_image.weight.std() < 0.025
    assert all((p == 0).all() for n, p in query.named_parameters() if n.endswith("bias"))
    assert (query.layers[0].ln_q.weight == 1).all()
    assert model.pooling.mlp["0"].weight.abs().max() <= 24**-0.5
    assert model.pooling.mlp["0"].weight.std() > 0.4 * 24**-0.5


def test_pooling_drops_in_training_only() -> None:
    model = small_model(pool_dropout=0.5)
    features = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.pooling(features), model.pooling(features))
        model.train()
        assert not torch.equal(model.pooling(features), model.pooling(features))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_layer": 0}, "query_layer: expected 1 to 3"),
        ({"query_layer": 4}, "query_layer: expected 1 to 3"),
        ({"query_heads": 3}, "query_heads: expected a divisor of query_dim = 16"),
        ({"query_heads": 16}, "query_heads: expected a divisor of vision_config.hidden_size = 24"),
        ({"vision_select_layer": -4}, "vision_select_layer: expected -3 to -1"),
        ({"image_token_id": 96}, "image_token_id: expected an id below the vocabulary size 96"),
        ({"learnable_token_id": 90}, "expected different ids"),
        ({"pool_window": 0}, "pool_window: expected 1 or more"),
        ({"pool_dropout": 1.0}, "pool_dropout: expected 0 <= p < 1"),
        ({"image_aspect_ratio": "wide"}, "image_aspect_ratio: expected 'square' or 'pad'"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision_config: expected model_type"),
        ({"vision_config": {**VISION, "patch_size": [7, 7]}}, "vision_config: expected image_size and patch_size"),
        ({"text": {"model_type": "no-such"}}, "text_config: expected a model_type that transformers knows"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_configuration_goes_through_json(tmp_path: Any) -> None:
    config = small_config(QWEN2, image_hd=True, image_aspect_ratio="pad")
    config.save_pretrained(tmp_path)
    again = FlashSlothConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.num_tiles, again.tokens_per_tile, again.num_visual_tokens) == (5, 4, 20)
    full = FlashSlothConfig()
    assert (full.vision_grid, full.vision_layers, full.num_visual_tokens) == ((27, 27), 26, 81)
    assert FlashSlothConfig(image_hd=True).num_visual_tokens == 405


def test_flashsloth_attention_falls_back_loudly() -> None:
    module = torch.nn.Module()
    module.is_causal, module.training = True, False  # type: ignore[assignment]
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind(0)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    kept = flashsloth_mask(2, 5, 5, attention_mask=mask)
    assert isinstance(kept, KeptTokens)
    out, weights = flashsloth_attention(module, query, key, value, kept)
    assert weights is None
    dense, _ = flashsloth_attention(module, query, key, value, kept.dense(5))
    assert (out - dense)[mask].abs().max() < 1e-5
    assert (out[~mask] == 0).all()
    dropped, _ = flashsloth_attention(module, query, key, value, kept, dropout=1e-9)
    assert (out - dropped)[mask].abs().max() < 1e-5
    window = flashsloth_mask(2, 5, 5, attention_mask=mask, local_size=2)
    assert isinstance(window, torch.Tensor)
    assert window.shape == (2, 1, 5, 5)
    assert flashsloth_mask(2, 5, 5) is None
    with pytest.raises(ValueError, match="softcap: expected None"):
        flashsloth_attention(module, query, key, value, kept, softcap=30.0)


def test_sliding_windows_run_through_sdpa() -> None:
    text = {**QWEN2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    model = small_model(text)
    inputs = batch(ROWS, "left")
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits[valid]
        model.set_attn_implementation("flashsloth")
        got = model(**inputs, use_cache=False).logits[valid]
        full = small_model(QWEN2)(**inputs, use_cache=False).logits[valid]
    assert (got - want).abs().max() < 5e-5
    assert (got - full).abs().max() > 1e-3
