"""Generation, caches and turns: whatever the cache, the answer is that of the whole conversation without one."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from flashsloth import FlashSlothForConditionalGeneration
from tests.model.support import PHI, QWEN2, VISUAL, Row, batch, small_model

ROWS = [Row(4, seed=1), Row(6, 0, 3, seed=2), Row(5, 2, image=False, seed=3), Row(3, seed=6)]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
ATTENTION = ["eager", "sdpa", "flashsloth"]


@pytest.fixture(scope="module")
def model() -> FlashSlothForConditionalGeneration:
    return small_model()


def greedy_without_cache(model: FlashSlothForConditionalGeneration, row: Row, seed: int, steps: int) -> list[int]:
    """The plainest decoding there is: the whole sequence again for each token."""
    inputs = batch([row], seed=seed)
    made: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            made.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[made[-1]]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return made


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generate_equals_decoding_without_cache(attention: str, cache: str | None) -> None:
    model = small_model(attn_implementation=attention)
    want = [greedy_without_cache(model, row, i, 6) for i, row in enumerate(ROWS)]
    inputs = batch(ROWS, "left", extra=2)
    kwargs = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    ids = model.generate(**inputs, **GREEDY, **kwargs)
    assert ids[:, inputs["input_ids"].shape[1] :].tolist() == want


def test_streaming_gives_the_same_ids_one_by_one(model: FlashSlothForConditionalGeneration) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    inputs = batch(ROWS[:1])
    streamer = Collect()
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    thread.join(60)
    assert streamer.ended
    assert streamer.ids == model.generate(**inputs, **GREEDY)[0].tolist()


@pytest.mark.parametrize("text", [PHI, QWEN2], ids=["phi", "qwen2"])
def test_beams_equal_beams_row_by_row_and_encode_images_once(text: dict[str, Any]) -> None:
    model = small_model(text)
    encoded: list[int] = []
    handle = model.vision_tower.register_forward_hook(lambda *a: encoded.append(a[1][0].shape[0]))
    inputs = batch(ROWS, "left")
    kwargs = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    ids = model.generate(**inputs, **kwargs)
    handle.remove()
    assert encoded == [3]  # one pass over the three images, whatever the beams
    width = inputs["input_ids"].shape[1]
    for i, row in enumerate(ROWS):
        alone = model.generate(**batch([row], seed=i), **kwargs)
        assert ids[2 * i : 2 * i + 2, width:].tolist() == alone[:, len(row.ids) :].tolist()


def test_sampling_follows_its_seed(model: FlashSlothForConditionalGeneration) -> None:
    inputs = batch(ROWS, "left")
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 5.0, "eos_token_id": None}

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return model.generate(**inputs, **kwargs).tolist()

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_generation_stops_at_eos(model: FlashSlothForConditionalGeneration) -> None:
    inputs = batch(ROWS[:1])
    free = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    stop = free[2]
    ids = model.generate(**inputs, **{**GREEDY, "eos_token_id": stop})[0, inputs["input_ids"].shape[1] :].tolist()
    assert ids == free[: free.index(stop) + 1]
    assert model.generation_config.eos_token_id == 93
    assert model.generation_config.pad_token_id == 92


def two_turns(row: Row, seed: int = 0) -> tuple[dict[str, Tensor], int]:
    """A conversation of two questions, and the position where the first answer ends."""
    inputs = batch([row], seed=seed)
    return inputs, int(inputs["question_spans"][0, 1, 0])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cached_second_turn_equals_the_whole_conversation(attention: str, kind: str) -> None:
    model = small_model(attn_implementation=attention)
    rows = [Row(4, 6, seed=1), Row(4, 6, seed=1, image=False), Row(4, 6, seed=1, turn=1)]
    for row in rows:
        inputs, cut = two_turns(row)
        cut -= VISUAL if row is rows[2] else 0
        with torch.no_grad():
            want = model(**inputs, use_cache=False).logits[0]
            length = inputs["input_ids"].shape[1]
            cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(model.language_model.config, length + 7)
            context = model.get_image_context(inputs["pixel_values"]) if row is rows[0] else None
            first = model(
                inputs["input_ids"][:, :cut],
                question_spans=inputs["question_spans"][:, :1],
                past_key_values=cache,
                image_context=context,
            )
            # The second turn is told all spans, or its own alone.
            for spans in (inputs["question_spans"], inputs["question_spans"][:, 1:]):
                past = copy.deepcopy(cache)
                second = model(
                    inputs["input_ids"][:, cut:],
                    attention_mask=inputs["attention_mask"],
                    question_spans=spans,
                    past_key_values=past,
                    image_context=first.image_context,
                    pixel_values=inputs["pixel_values"] if row is rows[2] else None,
                )
                assert (second.logits[0] - want[cut:]).abs().max() < 2e-5
            assert (first.logits[0] - want[:cut]).abs().max() < 2e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_second_turns_of_a_batch(side: str) -> None:
    """Rows of different lengths: padding of the first turn stays in the middle, and changes nothing."""
    model = small_model()
    rows = [Row(4, 6, seed=1), Row(7, 2, seed=2), Row(3, 5, seed=3, image=False)]
    alone = []
    for i, row in enumerate(rows):
        inputs, cut = two_turns(row, seed=i)
        with torch.no_grad():
            alone.append(model(**inputs).logits[0, cut:])
    turns: list[list[Row]] = [[], []]
    for row in rows:
        cut = row.spans[1][0]
        for number, (piece, span) in enumerate(zip((row.ids[:cut], row.ids[cut:]), row.spans, strict=True)):
            turn = Row(image=row.image)
            turn.ids, turn.spans = piece, [(span[0] - number * cut, span[1] - number * cut)]
            turns[number].append(turn)
    first = batch(turns[0], side)
    second = batch(turns[1], side)
    second.pop("pixel_values")
    past = first["input_ids"].shape[1]
    with torch.no_grad():
        out = model(**first, use_cache=True)
        got = model(
            second["input_ids"],
            attention_mask=torch.cat([first["attention_mask"], second["attention_mask"]], 1),
            question_spans=second["question_spans"] + past,
            past_key_values=out.past_key_values,
            image_context=out.image_context,
        ).logits
    for i, want in enumerate(alone):
        assert (got[i][second["attention_mask"][i].bool()] - want).abs().max() < 2e-5


def test_generate_goes_on_from_the_cache_of_a_turn(model: FlashSlothForConditionalGeneration) -> None:
    row = Row(4, 6, seed=1)
    inputs, cut = two_turns(row)
    want = model.generate(**inputs, **GREEDY)
    context = model.get_image_context(inputs["pixel_values"])
    for images in ({"image_context": context}, {"pixel_values": inputs["pixel_values"]}):
        cache = DynamicCache()
        turn = {
            "input_ids": inputs["input_ids"][:, :cut],
            "question_spans": inputs["question_spans"][:, :1],
            "image_context": context,
        }
        with torch.no_grad():
            model(**turn, past_key_values=cache)
        rest = {name: inputs[name] for name in ("input_ids", "attention_mask", "question_spans")}
        assert torch.equal(model.generate(**rest, **images, **GREEDY, past_key_values=cache), want)


def test_the_question_of_a_later_turn_is_read(model: FlashSlothForConditionalGeneration) -> None:
    """Cached or not, the second group follows the second question, not a copy of the first one's span."""
    inputs, cut = two_turns(Row(4, 6, seed=1))
    copied = inputs["question_spans"].clone()
    copied[:, 1] = copied[:, 0]
    with torch.no_grad():
        own = model(**inputs).logits[0, cut:]
        first = model(**{**inputs, "question_spans": copied}).logits[0, cut:]
        silent = model(**{**inputs, "question_spans": torch.tensor([[[0, 0], [0, 0]]])}).logits[0, cut:]
    assert (own - first).abs().max() > 1e-3
    assert (own - silent).abs().max() > 1e-3


def test_image_state_is_computed_once_and_changes_nothing(model: FlashSlothForConditionalGeneration) -> None:
    inputs = batch(ROWS, "left")
    pixel_values = inputs.pop("pixel_values")
    row_image = torch.tensor([0, 1, -1, 2])
    with torch.no_grad():
        context = model.get_image_context(pixel_values, row_image)
        assert context.state is not None
        want = model(**inputs, pixel_values=pixel_values).logits
        got = model(**inputs, image_context=context).logits
        plain = model(**inputs, image_context=context._replace(state=None)).logits
    valid = inputs["attention_mask"].bool()
    assert torch.equal(want[valid], got[valid])
    assert (plain - want)[valid].abs().max() < 2e-5
    assert model.get_image_context(pixel_values, row_image).state is None


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])], ids=["1", "3", "rows"])
def test_logits_to_keep(model: FlashSlothForConditionalGeneration, keep: int | Tensor) -> None:
    inputs = batch(ROWS, "left")
    with torch.no_grad():
        whole = model(**inputs).logits
        kept = model(**inputs, logits_to_keep=keep).logits
    want = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    assert (kept - want).abs().max() < 1e-6


@pytest.mark.parametrize("text", [PHI, QWEN2], ids=["phi", "qwen2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(text: dict[str, Any], reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = small_model(text, pool_dropout=0.0)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        inputs = batch(ROWS)
        labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want, got = gradients(False), gradients(True)
    assert want.keys() == got.keys()
    assert any(name.startswith("embedded_query") for name in want)
    for name, gradient in want.items():
        assert (gradient - got[name]).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("attention", ["sdpa", "flashsloth"])
def test_forward_compiles_without_graph_breaks(attention: str) -> None:
    model = small_model(attn_implementation=attention)
    inputs = batch(ROWS, "left")
    labels = torch.where(inputs["attention_mask"].cumsum(1) > 1, inputs["input_ids"], -100)
    want = model(**inputs, labels=labels, use_cache=False)
    want.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(**inputs, labels=labels, use_cache=False)
    got.loss.backward()
    valid = inputs["attention_mask"].bool()
    assert (got.logits - want.logits)[valid].abs().max() < 2e-5
    for name, p in model.named_parameters():
        if name in gradients:
            assert p.grad is not None, name
            assert (p.grad - gradients[name]).abs().max() <= 1e-4 * gradients[name].abs().max() + 1e-7, name


def test_bfloat16_stays_close_to_fp32(model: FlashSlothForConditionalGeneration) -> None:
    inputs = batch(ROWS, "left")
    valid = inputs["attention_mask"].bool()
    half = small_model().to(torch.bfloat16)
    with torch.no_grad():
        want = model(**inputs).logits[valid]
        got = half(**inputs).logits[valid]
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.05 * want.norm()
    assert half.generate(**inputs, **GREEDY).shape == (4, inputs["input_ids"].shape[1] + 6)


def test_autocast_learns_like_fp32() -> None:
    inputs = batch(ROWS)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)

    def gradients(narrow: bool) -> tuple[float, Tensor]:
        model = small_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.item(), model.embedded_query.up_projector.weight.grad

    (want, exact), (got, rough) = gradients(False), gradients(True)
    assert abs(got - want) < 0.02 * want
    assert (rough - exact).norm() < 0.1 * exact.norm()
