"""A batch equals its rows one by one; padding and neighbours change nothing; bad batches get one clear error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsloth import FlashSlothForConditionalGeneration
from tests.model.support import (
    IMAGE,
    LEARNABLE,
    OFFSET,
    QUERIES,
    VISUAL,
    Row,
    batch,
    images,
    small_model,
    words,
)

ROWS = [
    Row(4, seed=1),
    Row(6, 0, 3, seed=2),
    Row(5, 2, image=False, seed=3),
    Row(0, seed=4),
    Row(image=False, seed=5),
    Row(seed=6),
]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model() -> FlashSlothForConditionalGeneration:
    return small_model()


def logits_alone(model: FlashSlothForConditionalGeneration, rows: list[Row], tiles: int = 1) -> list[Tensor]:
    with torch.no_grad():
        return [model(**batch([row], seed=i, tiles=tiles)).logits[0] for i, row in enumerate(rows)]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flashsloth"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_its_rows_one_by_one(side: str, attention: str) -> None:
    model = small_model(attn_implementation=attention)
    alone = logits_alone(model, ROWS)
    inputs = batch(ROWS, side, extra=3)
    with torch.no_grad():
        together = model(**inputs).logits
    for i, want in enumerate(alone):
        got = together[i][inputs["attention_mask"][i].bool()]
        assert (got - want).abs().max() < TOLERANCE, f"row {i}"


def test_padding_may_hold_any_id(model: FlashSlothForConditionalGeneration) -> None:
    inputs = batch(ROWS, "right", extra=4)
    with torch.no_grad():
        want = model(**inputs).logits
        inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 11)
        got = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    assert (got - want)[valid].abs().max() < TOLERANCE


def test_five_tiles_are_pooled_one_by_one(model: FlashSlothForConditionalGeneration) -> None:
    tiles = images(2, 5)
    with torch.no_grad():
        whole = model.get_image_context(tiles)
        single = model.get_image_context(tiles.flatten(0, 1).unsqueeze(1))
    assert whole.tokens.shape == (2, 5 * VISUAL, 32)
    assert (whole.tokens.flatten(0, 1) - single.tokens.flatten(0, 1)).abs().max() < 1e-6
    assert whole.features.shape == (2, 5 * 16, 24)
    rows = [Row(4, seed=1, tiles=5), Row(3, image=False, seed=2), Row(2, 3, seed=3, tiles=5)]
    alone = logits_alone(model, rows, tiles=5)
    inputs = batch(rows, "left", tiles=5)
    with torch.no_grad():
        together = model(**inputs).logits
    for i, want in enumerate(alone):
        assert (together[i][inputs["attention_mask"][i].bool()] - want).abs().max() < TOLERANCE


def test_a_row_without_image_gets_its_queries_and_nothing_from_the_image(
    model: FlashSlothForConditionalGeneration,
) -> None:
    row = Row(5, image=False)
    inputs = batch([row])
    with torch.no_grad():
        alone = model(**inputs).logits
        mixed = model(**batch([row, Row(7, seed=9)]))
        got = mixed.logits[0, : len(row.ids)]
        by_hand = model.get_input_embeddings()(inputs["input_ids"])
        start = row.spans[0][1]
        offset = model.get_input_embeddings().weight[OFFSET]
        by_hand[0, start : start + QUERIES] = model.learnable_tokens.token + offset
        want = model.language_model(inputs_embeds=by_hand).logits
    assert (alone[0] - got).abs().max() < TOLERANCE
    assert (alone - want).abs().max() < TOLERANCE


def test_without_spans_ids_are_taken_literally(model: FlashSlothForConditionalGeneration) -> None:
    ids = torch.tensor([words(4, 0) + [LEARNABLE] * 2 + words(3, 1)])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.language_model(input_ids=ids).logits)


def test_a_question_changes_only_what_reads_it(model: FlashSlothForConditionalGeneration) -> None:
    """The second group's span moves its queries; rows before them are untouched, and an empty span is allowed."""
    inputs = batch([Row(4, 5, seed=3)])
    start, end = inputs["question_spans"][0, 1].tolist()
    moved = {**inputs, "question_spans": inputs["question_spans"].clone()}
    moved["question_spans"][0, 1, 0] = start + 2
    empty = {**inputs, "question_spans": inputs["question_spans"].clone()}
    empty["question_spans"][0, 1, 0] = end + 20
    with torch.no_grad():
        want, got, none = (model(**i).logits[0] for i in (inputs, moved, empty))
    assert torch.equal(want[:end], got[:end])
    assert torch.equal(want[:end], none[:end])
    assert (want[end:] - got[end:]).abs().max() > 1e-3
    assert (want[end:] - none[end:]).abs().max() > 1e-3
    assert none.isfinite().all()


def test_nan_pixels_of_one_image_stay_in_its_row(model: FlashSlothForConditionalGeneration) -> None:
    rows = [Row(4, seed=1), Row(5, image=False, seed=2), Row(3, seed=3)]
    inputs = batch(rows)
    with torch.no_grad():
        want = model(**inputs).logits
        inputs["pixel_values"][0] = torch.nan
        got = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    assert got[0][valid[0]].isnan().any()
    assert (got - want)[1:][valid[1:]].abs().max() < TOLERANCE


def test_hidden_state_before_query_layer_is_after_the_queries(model: FlashSlothForConditionalGeneration) -> None:
    inputs = batch([Row(4, seed=1)])
    other = {**inputs, "pixel_values": images(1, seed=77)}
    with torch.no_grad():
        a, b = (model(**i, output_hidden_states=True).hidden_states for i in (inputs, other))
    start = int(inputs["question_spans"][0, 0, 1])
    change = (a[2] - b[2])[0, start : start + QUERIES].abs().max()
    assert change > 1e-3
    assert len(a) == 5


def test_bad_batches_are_refused_by_name(model: FlashSlothForConditionalGeneration) -> None:
    good = batch([Row(4, seed=1), Row(3, seed=2)])

    def refused(kind: type[Exception], match: str, **changes: object) -> None:
        with pytest.raises(kind, match=match):
            model(**{**good, **changes})

    pixel_values = good["pixel_values"]
    refused(ValueError, "pixel_values: expected one image for each row", pixel_values=pixel_values[:1])
    refused(ValueError, "pixel_values: expected one image for each row", pixel_values=images(3))
    refused(ValueError, "pixel_values: expected images for the image tokens", pixel_values=None)
    refused(ValueError, r"pixel_values: expected \(images, tiles, 3, 28, 28\), got", pixel_values=images(2)[..., :14])
    refused(TypeError, "pixel_values: expected a floating-point", pixel_values=pixel_values.long())
    refused(ValueError, f"input_ids: expected {5 * VISUAL} image tokens", pixel_values=images(2, tiles=5))
    fewer = torch.where(good["input_ids"] == LEARNABLE, 9, good["input_ids"])
    refused(ValueError, f"input_ids: expected {QUERIES} learnable tokens", input_ids=fewer)
    refused(ValueError, f"input_ids: expected {QUERIES} learnable tokens", question_spans=torch.full((2, 1, 2), -1))
    refused(ValueError, "question_spans: expected questions without image", question_spans=good["question_spans"] - 2)
    refused(ValueError, "question_spans: expected each question", question_spans=good["question_spans"] + 100)
    refused(ValueError, r"question_spans: expected \(2, groups, 2\)", question_spans=good["question_spans"][0])
    refused(TypeError, "question_spans: expected an integer", question_spans=good["question_spans"].float())
    refused(ValueError, r"attention_mask: expected \(2, ", attention_mask=good["attention_mask"][:, 1:])
    refused(ValueError, "input_ids, inputs_embeds: expected exactly one", input_ids=None)
    refused(ValueError, "inputs_embeds: expected input_ids", input_ids=None, inputs_embeds=torch.zeros(2, 3, 32))
    refused(ValueError, "logits_to_keep: expected 0", labels=good["input_ids"], logits_to_keep=1)
    context = model.get_image_context(pixel_values)
    refused(ValueError, "pixel_values, image_context: expected one", image_context=context)
    one = model.get_image_context(pixel_values[:1])
    refused(ValueError, "image_context: expected one of 2 rows", image_context=one, pixel_values=None)
    twice = good["input_ids"].clone()
    twice[0, -1] = IMAGE
    refused(ValueError, f"input_ids: expected {VISUAL} image tokens", input_ids=twice)
    with torch.no_grad():
        assert model(**good).logits.isfinite().all()


def test_an_image_changes_nothing_before_it_is_shown(model: FlashSlothForConditionalGeneration) -> None:
    row, blind = Row(4, 6, seed=1, turn=1), Row(4, 6, seed=1, image=False)
    shown = row.ids.index(IMAGE)
    with torch.no_grad():
        got, without = model(**batch([row])).logits[0], model(**batch([blind])).logits[0]
    assert (got[:shown] - without[:shown]).abs().max() < TOLERANCE
    assert (got[-2:] - without[-2:]).abs().max() > 1e-3


def test_groups_may_be_none(model: FlashSlothForConditionalGeneration) -> None:
    inputs = batch([Row(seed=1), Row(image=False, seed=2)])
    assert inputs["question_spans"].shape == (2, 0, 2)
    with torch.no_grad():
        got = model(**inputs).logits
        inputs.pop("question_spans")
        assert torch.equal(got, model(**inputs).logits)


def test_tuples_and_embeddings(model: FlashSlothForConditionalGeneration) -> None:
    inputs = batch([Row(4, seed=1)])
    with torch.no_grad():
        out = model(**inputs, labels=inputs["input_ids"])
        loss, logits, *_ = model(**inputs, labels=inputs["input_ids"], return_dict=False)
        assert torch.equal(loss, out.loss)
        assert torch.equal(logits, out.logits)
        ids = torch.tensor([words(6, 0)])
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    want = torch.nn.functional.cross_entropy(out.logits[0, :-1].double(), inputs["input_ids"][0, 1:])
    assert abs(out.loss.item() - want.item()) < 1e-5


def test_no_value_of_a_tensor_is_read_on_the_way() -> None:
    """On the meta device tensors have no values: whatever waited for a GPU would fail here."""
    model = small_model(attn_implementation="flashsloth").to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in batch(ROWS, "left").items()}
    out = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    assert out.logits.shape == (*inputs["input_ids"].shape, 96)
    out.loss.backward()
    assert model.embedded_query.up_projector.weight.grad is not None
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        length = inputs["input_ids"].shape[1]
        second = model(
            inputs["input_ids"][:, -9:],
            attention_mask=torch.ones(6, length + 9, dtype=torch.long, device="meta"),
            question_spans=inputs["question_spans"] + length,
            past_key_values=first.past_key_values,
            image_context=first.image_context,
        )
    assert second.logits.shape == (6, 9, 96)
