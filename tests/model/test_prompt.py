"""Prompt strings, questions in them, and training texts: text only, no tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flashsloth.prompt import (
    SYSTEM,
    caption_prompt,
    check_messages,
    dialogue_prompt,
    find_questions,
    message_images,
    message_text,
)
from tests.model.prompting import assistant, prompt_cases, user


def questions(text: str) -> list[str]:
    return [text[start:end] for start, end in find_questions(text)]


@pytest.mark.parametrize("image", ["<image>\n", ""])
def test_question_of_each_turn_in_the_official_prompts(image: str) -> None:
    found = 0
    for case in prompt_cases("inference_phi2"):
        if case["image"] == bool(image):
            assert questions(case["prompt"]) == case["questions"]
            found += 1
    assert found == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{SYSTEM} USER: What does USER: mean?<learnable> ASSISTANT:", ["What does USER: mean?"]),
        (f"{SYSTEM} USER: <image>\nUSER: no<learnable> ASSISTANT:", ["USER: no"]),
        (f"{SYSTEM} USER: a<learnable> ASSISTANT: USER: b</s>USER: c<learnable> ASSISTANT:", ["a", "c"]),
        (f"{SYSTEM} USER: a<learnable> ASSISTANT: x</s>USER: <image>\nc<learnable> ASSISTANT:", ["a", "c"]),
        (f"{SYSTEM} USER: <image>\n<learnable> ASSISTANT:", [""]),
        (f"{SYSTEM} USER: <learnable> ASSISTANT:", [""]),
        (f"{SYSTEM} USER: <image>q<learnable>", ["q"]),
        (f"{SYSTEM} USER: q\n<image><learnable>", ["q\n"]),
        (f"{SYSTEM} USER: q1 <image> q2<learnable>", [" q2"]),
        ("<image>\nUSER: q<learnable>", ["q"]),
        ("USER: a<learnable><learnable>b", ["a", ""]),
        ("USER: a<learnable> then b<learnable>", ["a", " then b"]),
        ("only words<learnable>", ["only words"]),
        ("<image>a caption<learnable>\n", ["a caption"]),
        ("<learnable>", [""]),
        ("USER: no queries ASSISTANT:", []),
        ("", []),
    ],
)
def test_question_of_other_strings(text: str, expected: list[str]) -> None:
    assert questions(text) == expected


@given(st.lists(st.text(st.sampled_from("ab \nUSER:ASITN<>/é"), max_size=20), min_size=1, max_size=4), st.booleans())
def test_any_question_is_found_as_it_is(texts: list[str], image: bool) -> None:
    assume(not any(token in text for text in texts for token in ("<image>", "<learnable>", "</s>")))
    prompt = SYSTEM + " "
    for i, text in enumerate(texts):
        prompt += (
            "USER: " + ("<image>\n" if image and i == 0 else "") + text + "<learnable> ASSISTANT: " + text + "</s>"
        )
    assert questions(prompt) == texts


def test_a_dialogue_gives_the_official_training_text() -> None:
    cases = prompt_cases("finetune_phi2")
    assert len(cases) == 3
    for case in cases:
        prompt = dialogue_prompt(case["conversation"])
        assert prompt.text == case["training_text"]
        asked = [t["value"].replace("<image>", "").strip() for t in case["conversation"] if t["from"] == "human"]
        # The space before <learnable> belongs to the question, as in the official spans.
        assert [prompt.text[a:b] for a, b in prompt.questions] == [question + " " for question in asked]
        answers = [t["value"] for t in case["conversation"] if t["from"] == "gpt"]
        assert [prompt.text[a:b] for a, b in prompt.targets] == [f" {answer}</s>" for answer in answers]
        assert find_questions(prompt.text) == prompt.questions


def test_chat_messages_train_as_the_official_form() -> None:
    case = prompt_cases("finetune_phi2")[0]
    turns = [t["value"].replace("<image>\n", "") for t in case["conversation"]]
    messages = [user(turns[0], True), assistant(turns[1]), user(turns[2]), assistant(turns[3])]
    assert dialogue_prompt(messages) == dialogue_prompt(case["conversation"])


def test_the_word_assistant_in_a_question_gets_no_queries() -> None:
    """The official code inserts queries before every "ASSISTANT" of a training text, the user's own included."""
    prompt = dialogue_prompt(
        [{"from": "human", "value": "Is ASSISTANT a word?"}, {"from": "gpt", "value": "ASSISTANT."}]
    )
    assert prompt.text.count("<learnable>") == 1
    assert prompt.text.endswith("USER: Is ASSISTANT a word? <learnable> ASSISTANT: ASSISTANT.</s>")


def test_an_empty_question_with_an_image() -> None:
    prompt = dialogue_prompt([{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": "A cat."}])
    assert prompt.text.endswith("USER: <image> <learnable> ASSISTANT: A cat.</s>")
    assert [prompt.text[a:b] for a, b in prompt.questions] == [" "]


def test_captions_give_the_official_pretraining_text() -> None:
    cases = prompt_cases("pretrain_plain")
    assert len(cases) == 2
    for case in cases:
        prompt = caption_prompt(case["caption"])
        assert prompt.text == case["training_text"]
        assert [prompt.text[a:b] for a, b in prompt.questions] == [case["caption"]]
        assert [prompt.text[a:b] for a, b in prompt.targets] == [case["caption"], "\n"]
        assert find_questions(prompt.text) == prompt.questions


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ("hello", TypeError, r"messages: expected a list of messages, got str"),
        ([], ValueError, r"at least one message"),
        (["hello"], TypeError, r"messages\[0\]: expected a dict"),
        ([{"content": "x"}], TypeError, r"messages\[0\]: expected a dict with 'role'"),
        ([{"role": "system", "content": "x"}], ValueError, r"messages\[0\]: a system message"),
        ([{"role": "tool", "content": "x"}], ValueError, r"messages\[0\]: expected role 'user'.*'tool'"),
        ([assistant("x")], ValueError, r"messages\[0\]: expected role 'user'.*'assistant'"),
        ([user("x"), user("y")], ValueError, r"messages\[1\]: expected role 'assistant'.*'user'"),
        ([{"role": "user"}], TypeError, r"messages\[0\]: expected 'content'.*NoneType"),
        ([{"role": "user", "content": 3}], TypeError, r"messages\[0\]: expected 'content'.*int"),
        ([{"role": "user", "content": ["x"]}], ValueError, r"messages\[0\]\.content\[0\]: expected a part"),
        ([{"role": "user", "content": [{"type": "video"}]}], ValueError, r"content\[0\]: expected a part.*video"),
        ([{"role": "user", "content": [{"type": "text"}]}], TypeError, r"content\[0\]: expected 'text' to be a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ValueError, r"content\[0\]: expected an 'image_url'"),
        (
            [user("x"), {"role": "assistant", "content": [{"type": "image"}]}],
            ValueError,
            r"messages\[1\].*user's message",
        ),
        ([user("x", True), assistant("y"), user("z", True)], ValueError, r"at most one image.*got 2"),
        ([user("see <image>")], ValueError, r"messages\[0\]\.content\[0\].*'<image>'.*'type': 'image'"),
        ([user("x"), assistant("a<learnable>")], ValueError, r"messages\[1\].*'<learnable>'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]}],
            ValueError,
            r"messages\[0\]: the text contains '<image>'",
        ),
        ([user("x</s>USER: y")], ValueError, r"messages\[0\].*'</s>'"),
    ],
)
def test_wrong_messages_are_named(messages: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_messages(messages, reserved=["</s>"])


@pytest.mark.parametrize(
    ("conversation", "error", "match"),
    [
        ([user("x")], ValueError, r"conversation\[0\].*ends with an answer"),
        ([{"from": "human", "value": 3}], TypeError, r"conversation\[0\].*'value'"),
        ([{"from": "gpt", "value": "x"}], ValueError, r"conversation\[0\]: expected role 'user'"),
        ([{"from": "human", "value": "<image><image>"}, assistant("x")], ValueError, "at most one image"),
        ([{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}], ValueError, r"conversation\[1\]"),
        ([{"from": "human", "value": "<ima<image>ge>"}, assistant("x")], ValueError, r"conversation\[0\].*'<image>'"),
        (["x"], TypeError, r"conversation\[0\]: expected a dict"),
        ("x", TypeError, "expected a list of messages"),
    ],
)
def test_wrong_dialogues_are_named(conversation: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        dialogue_prompt(conversation)


def test_wrong_captions_are_named() -> None:
    with pytest.raises(TypeError, match="caption: expected a string, got int"):
        caption_prompt(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"caption.*'<learnable>'"):
        caption_prompt("a <learnable> b")


def test_texts_and_images_of_messages() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "image", "url": "u"}, {"type": "text", "text": "b"}]
    link = [{"type": "image_url", "image_url": {"url": "v"}}, {"type": "text", "text": ""}]
    messages = [{"role": "user", "content": parts}, assistant("c"), {"role": "user", "content": link}]
    assert [message_text(m) for m in messages] == ["a b", "c", ""]
    assert message_images(messages) == ["u", "v"]
    assert message_images([user("x", True)]) == []
