"""Conversations: a later turn from caches is the whole conversation without them, whatever happened before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.chat import Answer, Conversation
from tests.model.talking import picture, saying, talking_model

QUESTIONS = ("What is it?", "Which colour is the larger one, would you say?", "Why?")
Talk = Callable[..., Conversation]


@pytest.fixture(scope="module")
def parts() -> Any:
    return talking_model()


@pytest.fixture
def talk(parts: Any) -> Conversation:
    return Conversation(*parts)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tiles of each call of the vision tower."""
    calls: list[int] = []
    encode = FlashSlothForConditionalGeneration.get_image_features

    def counted(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        calls.append(pixel_values.shape[1])
        return encode(model, pixel_values)

    monkeypatch.setattr(FlashSlothForConditionalGeneration, "get_image_features", counted)
    return calls


def say(talk: Conversation, question: str, image: Any = None, count: int = 12) -> Answer:
    pieces = [*talk.ask(question, image, max_new_tokens=count)]
    assert talk.last is not None
    assert "".join(pieces) == talk.last.text
    return talk.last


def uncached(talk: Conversation, image: Any, count: int = 12) -> tuple[int, ...]:
    """What one call of generate makes of the whole conversation, nothing kept from before."""
    prompt = talk.processor.apply_chat_template(talk.messages[:-1])
    batch = talk.processor(images=image, text=prompt, image_hd=talk.image_hd)
    model: Any = talk.model
    ids = model.generate(**batch, max_new_tokens=count, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return tuple(ids.tolist())


# ---- turns ----


@pytest.mark.parametrize(
    ("hd", "space_first", "attention"),
    [(False, True, "flashsloth"), (False, False, "sdpa"), (True, True, "sdpa"), (True, False, "flashsloth")],
)
def test_turns_equal_one_uncached_generate(encoded: list[int], hd: bool, space_first: bool, attention: str) -> None:
    model, processor = talking_model(space_first)
    model.set_attn_implementation(attention)
    talk = Conversation(model, processor, image_hd=hd)
    image = picture()
    known = 0
    answers = []
    for number, question in enumerate(QUESTIONS):
        answer = say(talk, question, image if number == 0 else None)
        assert encoded == [5 if hd else 1]  # by the first question, never again
        assert (answer.image_seconds > 0) == (number == 0)
        assert answer.first_token_seconds > 0
        assert answer.cached_tokens >= known
        assert len(talk.messages) == 2 * number + 2
        assert answer.ids == uncached(talk, image), question
        encoded.pop()
        # All that was said but the last id, which no pass has seen; an answer without its space in front is tokenized
        # otherwise when it stands in a conversation, and then only what was before it is known.
        known = answer.prompt_tokens + (len(answer.ids) - 1 if space_first else 0)
        answers.append(answer)
    assert not space_first or len({answer.ids for answer in answers}) > 1
    assert answers[-1].cached_tokens > answers[0].prompt_tokens


def test_ended_answers_stay_in_the_cache() -> None:
    model, processor = talking_model(end=60.0)
    talk = Conversation(model, processor)
    first = say(talk, QUESTIONS[0], picture())
    assert first.ended == "stop"
    assert first.ids[-1] == model.config.eos_token_id
    second = say(talk, QUESTIONS[1])
    assert second.cached_tokens == first.prompt_tokens + len(first.ids) - 1
    assert second.ids == uncached(talk, picture())


def test_the_picture_is_looked_at_in_every_turn(talk: Conversation) -> None:
    answers = []
    for seed in (0, 1):
        answers.append([say(talk, q, picture(seed) if q == QUESTIONS[0] else None).text for q in QUESTIONS])
    assert answers[0][0] != answers[1][0]
    assert answers[0][2] != answers[1][2]


def test_without_a_picture(talk: Conversation, encoded: list[int]) -> None:
    for question in QUESTIONS:
        answer = say(talk, question)
        assert answer.ids == uncached(talk, None)
    assert encoded == []
    assert not talk.has_image
    with pytest.raises(ValueError, match="expected a question about a picture to have been asked, got none"):
        talk.pooling_map()


def test_reset_keeps_the_picture_and_what_stands_before_the_question(talk: Conversation, encoded: list[int]) -> None:
    say(talk, QUESTIONS[0], picture())
    said = say(talk, QUESTIONS[1])
    talk.reset()
    assert talk.messages == []
    assert talk.last is None
    answer = say(talk, QUESTIONS[1])
    assert encoded == [1]
    start = talk.processor(images=picture(), text=talk.processor.apply_chat_template(talk.messages[:-1]))
    assert answer.cached_tokens == int(start["question_spans"][0, 0, 0])
    assert answer.ids == uncached(talk, picture())
    assert answer.ids != said.ids  # which had a question before it


def test_the_same_picture_is_not_encoded_again(talk: Conversation, encoded: list[int]) -> None:
    say(talk, QUESTIONS[0], picture(3))
    say(talk, QUESTIONS[1], picture(3))
    assert encoded == [1]
    assert len(talk.messages) == 2
    talk.set_image(picture(4))
    assert talk.messages == []
    answer = say(talk, QUESTIONS[1])
    assert encoded == [1, 1]
    assert answer.cached_tokens == 0
    assert answer.ids == uncached(talk, picture(4))


# ---- stopping ----


def test_an_answer_that_is_not_read_to_its_end_is_a_short_one(talk: Conversation) -> None:
    pieces = talk.ask(QUESTIONS[0], picture(), max_new_tokens=12)
    begun = next(pieces) + next(pieces)
    answer = talk.last
    assert answer is not None
    assert answer.ended is None
    second = say(talk, QUESTIONS[1])  # ends the first
    assert answer.ended == "interrupted"
    assert answer.text == begun
    assert [*pieces] == []
    assert [m["content"] for m in talk.messages[1::2]] == [" " + begun, second.text.join((" ", ""))]
    assert second.ids == uncached(talk, picture())


def test_an_answer_nobody_reads_was_never_asked_for(talk: Conversation, encoded: list[int]) -> None:
    talk.ask(QUESTIONS[0], picture())
    assert say(talk, QUESTIONS[1]).prompt_tokens
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert talk.messages[0]["content"][1]["text"] == QUESTIONS[1]
    assert encoded == [1]


@pytest.mark.parametrize("at", [0, 3])
def test_an_interrupt_within_the_model_leaves_no_half_cache(talk: Conversation, at: int) -> None:
    say(talk, QUESTIONS[0], picture())
    passes = []

    def interrupt(*_: Any) -> None:
        passes.append(1)
        if len(passes) == at + 1:
            raise KeyboardInterrupt

    handle = talk.model.language_model.base_model.layers[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            say(talk, QUESTIONS[1])
    finally:
        handle.remove()
    assert len(talk.messages) == (4 if at else 2)  # without a token there is no turn
    assert talk.last is not None
    assert talk.last.ended == "interrupted"
    answer = say(talk, QUESTIONS[2])
    assert answer.ids == uncached(talk, picture())


def test_one_question_at_a_time(talk: Conversation) -> None:
    errors: list[BaseException] = []

    def ask_too(*_: Any) -> None:
        try:
            talk.ask(QUESTIONS[1])
        except RuntimeError as error:
            errors.append(error)

    handle = talk.model.register_forward_pre_hook(ask_too)
    try:
        say(talk, QUESTIONS[0], picture(), count=2)
    finally:
        handle.remove()
    assert errors
    assert all("expected one question at a time" in str(error) for error in errors)
    assert len(talk.messages) == 2


# ---- texts ----


def test_letters_come_whole(talk: Conversation) -> None:
    text = " Straße, 東京 \U0001f9a5"
    ids = talk.processor.tokenizer(text)["input_ids"]
    with saying(talk.model, [*ids, talk.model.config.eos_token_id]):
        pieces = [*talk.ask("What?", picture())]
    assert "".join(pieces) == text[1:]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "ß" in pieces
    assert talk.messages[-1]["content"] == text


def test_half_a_letter_at_the_end_is_shown_as_such(talk: Conversation) -> None:
    ids = talk.processor.tokenizer(" a東")["input_ids"]
    with saying(talk.model, ids[:-1]):
        answer = say(talk, "What?", picture(), count=len(ids) - 1)
    assert answer.text == "a\ufffd"
    assert say(talk, "And?").ids == uncached(talk, picture())


def test_an_answer_that_spells_a_special_token_ends_nothing(talk: Conversation) -> None:
    vocabulary = talk.processor.tokenizer.get_vocab()
    letters = talk.processor.tokenizer(" <ima")["input_ids"]
    ids = [*letters, vocabulary["<image>"], *talk.processor.tokenizer("ge> x")["input_ids"]]
    with saying(talk.model, ids):
        say(talk, "What?", picture(), count=len(ids))
    assert talk.messages[-1]["content"] == "  x"
    assert say(talk, "And?").ids == uncached(talk, picture())


def test_an_empty_answer_is_one(talk: Conversation) -> None:
    with saying(talk.model, [talk.model.config.eos_token_id]):
        answer = say(talk, "What?", picture())
    assert (answer.text, answer.ended) == ("", "stop")
    assert say(talk, "And?").ids == uncached(talk, picture())
    assert len(talk.messages) == 4


# ---- heat maps ----


@pytest.mark.parametrize("hd", [False, True], ids=["plain", "hd"])
def test_maps_are_distributions_over_the_tiles(parts: Any, hd: bool) -> None:
    talk = Conversation(*parts, image_hd=hd)
    talk.set_image(picture())
    with pytest.raises(ValueError, match="got none"):
        talk.query_map()
    maps = []
    for question in QUESTIONS[:2]:
        say(talk, question)
        tiles = 5 if hd else 1
        pooling, queries = talk.pooling_map(), talk.query_map()
        assert pooling.shape == (tiles, 6, 6)
        torch.testing.assert_close(pooling.view(tiles, 2, 3, 2, 3).sum((2, 4)), torch.ones(tiles, 2, 2))
        assert queries.shape == (9, tiles, 6, 6)
        torch.testing.assert_close(queries.sum((1, 2, 3)), torch.ones(9))
        maps.append(queries)
    assert not torch.allclose(*maps)  # queries follow the question
    fresh = Conversation(*parts, image_hd=hd)
    say(fresh, QUESTIONS[0], picture())
    torch.testing.assert_close(fresh.query_map(), maps[0])


def test_maps_of_a_later_turn_are_those_of_its_question(talk: Conversation) -> None:
    say(talk, QUESTIONS[0], picture())
    say(talk, QUESTIONS[1])
    cached = talk.query_map()
    talk._forget()  # the same conversation from its beginning: now both questions go through the model at once
    talk.messages = talk.messages[:2]
    say(talk, QUESTIONS[1])
    assert talk.last is not None
    assert talk.last.cached_tokens == 0
    torch.testing.assert_close(talk.query_map(), cached, rtol=1e-4, atol=1e-6)


# ---- what cannot be used ----


def test_wrong_input_is_named_and_changes_nothing(talk: Conversation) -> None:
    say(talk, QUESTIONS[0], picture())
    before = list(talk.messages)
    limit = talk.model.config.text_config.max_position_embeddings
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        (("",), {}, ValueError, "question: expected a text, got none"),
        (("  \n",), {}, ValueError, "question: expected a text, got none"),
        ((None,), {}, TypeError, "question: expected a string, got NoneType"),
        (("\ud800",), {}, ValueError, "question: expected valid Unicode"),
        (("a <image> b",), {}, ValueError, "contains '<image>'"),
        (("a </s> b",), {}, ValueError, "contains '</s>'"),
        (("x" * limit,), {}, ValueError, f"question: expected a conversation of less than {limit} tokens"),
        (("x" * limit, picture(5)), {}, ValueError, f"expected a conversation of less than {limit} tokens"),
        (("a", "no such file.png"), {}, ValueError, "No such file|no such file"),
        (("a", [picture(), picture()]), {}, ValueError, "image: expected one picture, got 2"),
        (("a", 3), {}, TypeError, "expected a path"),
        (("a",), {"max_new_tokens": 0}, ValueError, "max_new_tokens: expected a whole number of at least 1, got 0"),
    ]
    for given, options, kind, said in cases:
        with pytest.raises(kind, match=said):
            talk.ask(*given, **options)
    with pytest.raises(ValueError, match="o such file"):
        talk.set_image("no such file.png")
    assert talk.messages == before
    answer = say(talk, QUESTIONS[1])
    assert answer.cached_tokens > 0
    assert answer.ids == uncached(talk, picture())


def test_a_conversation_ends_where_positions_do() -> None:
    model, processor = talking_model(text={"max_position_embeddings": 240})
    talk = Conversation(model, processor)
    first = say(talk, QUESTIONS[0], picture(), count=1000)
    assert first.ended == "length"
    assert first.prompt_tokens + len(first.ids) == 240
    with pytest.raises(ValueError, match="begin a new conversation"):
        talk.ask("More?")
    talk.reset()
    assert say(talk, "More?").ids
