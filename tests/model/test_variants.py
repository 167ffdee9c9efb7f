"""Variants to compare with: other poolings and no compression, and a model without embedded queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli import main
from flashsloth.data.llava import cut_row
from flashsloth.encoding import Row
from flashsloth.modules import PlainPool
from flashsloth.tiny import processor_for, random_model, tiny_config

# Fields, visual tokens of the 6x6 grid, width the projector takes.
VARIANTS = {
    "average": ({"pooling": "average"}, 4, 32),
    "average of windows that do not divide": ({"pooling": "average", "pool_window": 4}, 4, 32),
    "pixel shuffle": ({"pooling": "pixel_shuffle", "pool_window": 2}, 9, 128),
    "no compression": ({"pooling": "none"}, 36, 32),
    "no queries": ({"num_queries": 0}, 4, 32),
    "neither": ({"pooling": "none", "num_queries": 0}, 36, 32),
}
CASES = [pytest.param(*case, id=name) for name, case in VARIANTS.items()]


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def training_batch(config: FlashSlothConfig) -> dict[str, Tensor]:
    first = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    more = [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "No."}]
    return dict(processor_for(config).encode_dialogue([first + more, first], images=[picture(0), picture(1)]))


def features_of(model: FlashSlothForConditionalGeneration, seed: int = 0) -> Tensor:
    rows, columns = model.config.vision_grid
    shape = (2, rows * columns, model.config.vision_config.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("changes", "tokens", "width"), CASES)
def test_a_variant_runs_and_learns_with_all_it_has(changes: dict[str, Any], tokens: int, width: int) -> None:
    config = tiny_config(**changes)
    assert (config.tokens_per_tile, config.num_visual_tokens, config.pooled_width) == (tokens, tokens, width)
    model = random_model(config).train()
    inputs = training_batch(config)
    ids = inputs["input_ids"]
    assert ((ids == config.image_token_id).sum(1) == tokens).all()
    assert (ids == config.learnable_token_id).sum() == 3 * config.num_queries  # three questions
    model(**inputs).loss.backward()
    learned = {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None}
    expected = {"projector", "language_model"}
    expected |= {"pooling"} if config.pooling == "attention" else set()
    expected |= {"learnable_tokens", "embedded_query"} if config.num_queries else set()
    assert learned == expected
    assert {name.split(".")[0] for name in model.state_dict()} == expected | {"vision_tower"}
    assert model.projector[0].in_features == width


@pytest.mark.parametrize(("changes", "tokens", "width"), CASES)
def test_a_variant_goes_through_disk_bitwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], tokens: int, width: int
) -> None:
    config = tiny_config(**changes)
    model = random_model(config)
    model.save_pretrained(tmp_path / "model")
    processor_for(config).save_pretrained(tmp_path / "model")
    loaded = FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert (loaded.config.pooling, loaded.config.num_queries) == (config.pooling, config.num_queries)
    processor = FlashSlothProcessor.from_pretrained(tmp_path / "model")
    assert (processor.tokens_per_tile, processor.num_queries) == (tokens, config.num_queries)
    inputs = training_batch(config)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    assert main(["inspect", str(tmp_path / "model")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    words = {"attention": "attention within", "average": "average of", "pixel_shuffle": "pixel shuffle of"}
    assert f"pooling: {words.get(config.pooling, 'none')}" in shown
    assert f"{tokens} after pooling" in shown
    assert f"{config.num_queries or 'no'} embedded queries" in shown


def test_a_processor_without_files_counts_the_tokens_of_a_variant(tmp_path: Path) -> None:
    config = tiny_config(pooling="none", num_queries=0)
    config.save_pretrained(tmp_path)
    processor_for(config).tokenizer.save_pretrained(tmp_path)
    processor = FlashSlothProcessor.from_pretrained(tmp_path)
    assert (processor.tokens_per_tile, processor.num_queries) == (36, 0)


def test_weights_of_another_variant_are_refused(tmp_path: Path) -> None:
    random_model(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"embedded_query"):
        FlashSlothForConditionalGeneration.from_pretrained(tmp_path, config=tiny_config(num_queries=0))
    with pytest.raises(ValueError, match=r"pooling\.mlp"):
        FlashSlothForConditionalGeneration.from_pretrained(tmp_path, config=tiny_config(pooling="average"))
    random_model(tiny_config(pooling="pixel_shuffle")).save_pretrained(tmp_path)
    other = tiny_config(pooling="pixel_shuffle", pool_window=2)
    with pytest.raises(ValueError, match=r"projector\.0\.weight"):
        FlashSlothForConditionalGeneration.from_pretrained(tmp_path, config=other)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
def test_average_is_attention_with_equal_scores(window: int) -> None:
    """The same windows, smaller ones at the edge included."""
    model = random_model(tiny_config(pool_window=window))
    torch.nn.init.zeros_(model.pooling.mlp["3"].weight)
    features = features_of(model)
    average = PlainPool(tiny_config(pool_window=window, pooling="average"))(features)
    torch.testing.assert_close(average, model.pooling(features), rtol=1e-5, atol=1e-6)


def test_pixel_shuffle_puts_a_window_side_by_side() -> None:
    config = tiny_config(pooling="pixel_shuffle", pool_window=3)
    features = torch.arange(36 * 32, dtype=torch.float32).view(1, 36, 32)
    shuffled = PlainPool(config)(features)
    assert shuffled.shape == (1, 4, 9 * 32)
    grid = features.view(6, 6, 32)
    for window, (row, column) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        assert torch.equal(shuffled[0, window], grid[row : row + 3, column : column + 3].flatten())


def test_a_model_without_queries_reads_no_spans_and_takes_no_query_ids() -> None:
    config = tiny_config(num_queries=0)
    model = random_model(config)
    inputs = training_batch(config)
    with torch.no_grad():
        given = model(**inputs).logits
        without = model(**{name: value for name, value in inputs.items() if name != "question_spans"}).logits
    assert torch.equal(given, without)
    ids = model.generate(
        **{name: value[:1] for name, value in inputs.items() if name != "labels"}, max_new_tokens=3, do_sample=False
    )
    assert ids.shape[1] > inputs["input_ids"].shape[1]
    inputs["input_ids"][0, -1] = config.learnable_token_id
    with pytest.raises(ValueError, match="expected 0 learnable tokens"):
        model(**inputs)


@pytest.mark.parametrize("queries", [0, 9])
def test_features_that_were_kept_stand_for_pixels(queries: int) -> None:
    """The same loss and the same gradients."""
    config = tiny_config(num_queries=queries)
    model = random_model(config)
    inputs = training_batch(config)
    model(**inputs).loss.backward()
    wanted = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"))
    model(**inputs, image_context=model.context_of_features(features)).loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == (name not in wanted)
        assert weight.grad is None or torch.equal(weight.grad, wanted[name]), name
    with pytest.raises(ValueError, match=r"features: expected \(images, tiles \* 36, 32\), got \(2, 36, 31\)"):
        model.context_of_features(features[..., 1:])
    with pytest.raises(ValueError, match=r"features: expected .* got \(2, 35, 32\)"):
        model.context_of_features(features[:, 1:])


def test_the_packed_batch_of_a_variant_has_the_same_loss() -> None:
    config = tiny_config(pooling="average", num_queries=0)
    model = random_model(config)
    model.set_attn_implementation("flashsloth")
    inputs = training_batch(config)
    mask = inputs["attention_mask"]
    assert not mask.all()
    packing = {
        "token_rows": mask.flatten().nonzero().flatten(),
        "cu_seqlens": torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int(),
    }
    with torch.no_grad():
        padded, packed = model(**inputs).loss, model(**inputs, **packing).loss
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=0)


def test_a_row_without_queries_is_cut_behind_an_answer() -> None:
    row = Row(list(range(12)), [(1, 3), (7, 9)], [-100] * 4 + [4, 5] + [-100] * 4 + [10, 11])
    cut = cut_row(row, 8, learnable_token_id=99, num_queries=0)
    assert (cut.ids, cut.spans) == (list(range(6)), [(1, 3)])
    assert cut_row(row, 11, learnable_token_id=99, num_queries=0).spans == [(1, 3), (7, 9)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "max"}, "pooling: expected one of attention, average, pixel_shuffle, none, got 'max'"),
        ({"pooling": None}, "pooling: expected one of attention, average, pixel_shuffle, none, got None"),
        (
            {"pooling": "pixel_shuffle", "pool_window": 4},
            "pool_window: expected a divisor of the grid 6x6 with pooling='pixel_shuffle', got 4",
        ),
        ({"num_queries": -1}, "num_queries: expected 0 or more, got -1"),
        ({"pooling": "none", "pool_window": 0}, "pool_window: expected 1 or more, got 0"),
        ({"query_layer": 3}, "query_layer: expected 1 to 2"),
    ],
)
def test_fields_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_a_model_without_queries_asks_nothing_of_their_fields() -> None:
    assert tiny_config(num_queries=0, query_layer=7, query_heads=5).num_queries == 0
