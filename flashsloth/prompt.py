"""The conversation format of FlashSloth (phi-2 style): inference prompts, training texts, and where the questions are.

A text is kept as one string in which ``<image>`` and ``<learnable>`` mark the two kinds of placeholder; the processor
turns each into its run of token ids. This module knows the structure of that string and nothing of tokens: every span
here is a pair of character offsets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IMAGE_TOKEN = "<image>"
QUERY_TOKEN = "<learnable>"
EOS_TOKEN = "</s>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# An answer that already starts with a space (what a model generates after "ASSISTANT:") gets no second one, so that an
# answer put back into the conversation gives the tokens it was made of; an empty one adds nothing for the same reason.
CHAT_TEMPLATE = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for part in content -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{{- '" + SYSTEM.replace("'", "\\'") + " ' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- 'USER: ' -}}"
    "{%- if message['content'] is not string -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] != 'text' -%}{{- '" + IMAGE_TOKEN + "\\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- text(message['content']) + '" + QUERY_TOKEN + " ' -}}"
    "{%- else -%}"
    "{%- set answer = text(message['content']) -%}"
    "{{- 'ASSISTANT:' + ('' if not answer or answer[0] == ' ' else ' ') + answer + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)

_USER_HEADER = re.compile(r"USER: ?")
_IMAGE_HEADER = re.compile(re.escape(IMAGE_TOKEN) + r"\n?")
_DIALOGUE_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_IMAGE_KEYS = ("image", "url", "path", "base64")


@dataclass(frozen=True)
class Prompt:
    """A text with its structure, in character offsets of ``text``.

    ``questions``: one ``(start, end)`` for each ``<learnable>``, in order: the text its queries attend to.
    ``targets``: the stretches a model is trained to predict (empty for a text used at inference).
    """

    text: str
    questions: tuple[tuple[int, int], ...]
    targets: tuple[tuple[int, int], ...] = ()


def find_questions(text: str, eos_token: str = EOS_TOKEN) -> tuple[tuple[int, int], ...]:
    """Finds the question of each ``<learnable>`` in a text.

    The question of a group is the text of its own turn: it ends where ``<learnable>`` starts and begins after
    ``<image>`` and one newline when the turn has an image, else after ``USER: ``. A turn begins after the end of the
    previous answer (``eos_token``) or, where there is none, after the previous ``<learnable>``. Only the first
    ``USER: `` of a turn is its header, so a question may contain these words. A text without any of these marks is a
    question as a whole, and the plain form ``<image>caption<learnable>`` gives the caption. Where the image is the
    last thing before ``<learnable>`` and text stands before it, that text is the question.

    Returns:
        One ``(start, end)`` pair of character offsets for each ``<learnable>``; ``start == end`` for an empty question.
    """
    spans = []
    turn = 0
    for match in re.finditer(re.escape(QUERY_TOKEN), text):
        end = match.start()
        eos = text.rfind(eos_token, turn, end)
        if eos >= 0:
            turn = eos + len(eos_token)
        spans.append(_question_of_turn(text, turn, end))
        turn = match.end()
    return tuple(spans)


def _question_of_turn(text: str, turn: int, end: int) -> tuple[int, int]:
    image = text.rfind(IMAGE_TOKEN, turn, end)
    header = _USER_HEADER.search(text, turn, end if image < 0 else image)
    start = header.end() if header else turn
    if image < 0:
        return start, end
    after_image = _IMAGE_HEADER.match(text, image, end)
    assert after_image is not None  # rfind just found the token there
    after = after_image.end()
    if header is None and (late := _USER_HEADER.match(text, after, end)):
        after = late.end()
    if after == end and text[start:image].strip():
        return start, image
    return after, end


def dialogue_prompt(
    conversation: Sequence[Mapping[str, Any]], eos_token: str = EOS_TOKEN, reserved: Sequence[str] = ()
) -> Prompt:
    """Builds the fine-tuning text of a dialogue: ``question <learnable> ASSISTANT: answer</s>`` for each turn.

    Unlike the inference prompt this has a space before ``<learnable>``; released weights were trained so.

    Args:
        conversation: turns in the form of the official data, ``{"from": "human" | "gpt", "value": str}``, where
            ``<image>`` anywhere in a question says that it has an image, or chat messages ``{"role": ..., "content":
            ...}``. Questions and answers alternate, beginning with a question and ending with an answer.
        eos_token: what ends an answer.
        reserved: strings that must not occur in what people wrote (the special tokens of a tokenizer).

    Raises:
        ValueError, TypeError: naming the message that is wrong and what was expected.
    """
    messages = _read_dialogue(conversation)
    check_messages(messages, reserved, name="conversation")
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"conversation[{len(messages) - 1}]: a dialogue to train on ends with an answer, but its last message "
            "is a question"
        )
    text = SYSTEM + " "
    questions, targets = [], []
    for message in messages:
        content = message_text(message)
        if message["role"] == "user":
            text += "USER: "
            start = len(text)
            if any(part["type"] != "text" for _, part in _parts(message, "conversation")):
                # The official data code strips a turn that has an image, so an empty question leaves no newline.
                body = (IMAGE_TOKEN + "\n" + content.strip()).strip()
                start += min(len(IMAGE_TOKEN) + 1, len(body))
                text += body
            else:
                text += content
            text += " "
            questions.append((start, len(text)))
            text += QUERY_TOKEN + " "
        else:
            text += "ASSISTANT:"
            start = len(text)
            text += " " + content + eos_token
            targets.append((start, len(text)))
    return Prompt(text, tuple(questions), tuple(targets))


def caption_prompt(caption: str, reserved: Sequence[str] = ()) -> Prompt:
    """Builds the pre-training text ``<image>caption<learnable>\\n``. The caption is both question and target, and the
    newline after the queries is a target too.

    Raises:
        TypeError: ``caption`` is not a string.
        ValueError: it contains a reserved string.
    """
    if not isinstance(caption, str):
        raise TypeError(f"caption: expected a string, got {type(caption).__name__}")
    _check_text(caption, "caption", reserved)
    start, end = len(IMAGE_TOKEN), len(IMAGE_TOKEN) + len(caption)
    text = IMAGE_TOKEN + caption + QUERY_TOKEN + "\n"
    return Prompt(text, ((start, end),), ((start, end), (len(text) - 1, len(text))))


def check_messages(messages: Sequence[Mapping[str, Any]], reserved: Sequence[str] = (), name: str = "messages") -> None:
    """Checks a conversation in the chat format of transformers.

    Args:
        messages: ``{"role": "user" | "assistant", "content": str | list}``; a list holds ``{"type": "text", "text":
            str}`` and, in a user's message, ``{"type": "image", ...}`` (``image_url`` too).
        reserved: strings no message may contain: a special token in a text would become a placeholder, or end a turn.
        name: what messages are called in errors.

    Raises:
        ValueError: empty conversation, unknown role, wrong order, unknown part, image in an answer, more than one
            image, or a reserved string in a text.
        TypeError: something that should be a dict, list or string is not.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"{name}: expected a list of messages, got {type(messages).__name__}")
    if len(messages) == 0:
        raise ValueError(f"{name}: expected at least one message, got none")
    images = 0
    for i, message in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(message, Mapping) or "role" not in message:
            raise TypeError(f"{where}: expected a dict with 'role' and 'content', got {message!r}")
        role, expected = message["role"], ("user", "assistant")[i % 2]
        if role == "system":
            raise ValueError(f"{where}: a system message is not part of this format, whose first sentence is fixed")
        if role != expected:
            raise ValueError(
                f"{where}: expected role {expected!r} (user and assistant alternate, user first), got {role!r}"
            )
        for part_name, part in _parts(message, where):
            if part["type"] == "text":
                _check_text(part["text"], part_name, reserved)
            elif role != "user":
                raise ValueError(f"{part_name}: an image belongs to a user's message, got one in an assistant's")
            else:
                images += 1
        _check_text(message_text(message), where, reserved)  # parts are joined: "<ima" and "ge>" are one token too
    if images > 1:
        raise ValueError(f"{name}: expected at most one image in a conversation, got {images}")


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a checked message, its parts joined without a separator."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def message_images(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The images that checked messages carry (``image``, ``url``, ``path``, ``base64`` or ``image_url``), in order.
    A part that carries none, a bare ``{"type": "image"}``, gives nothing: its image is passed beside the messages."""
    found = []
    for message in messages:
        if isinstance(message["content"], str):
            continue
        for part in message["content"]:
            if part["type"] == "image_url":
                link = part["image_url"]
                found.append(link["url"] if isinstance(link, Mapping) else link)
            elif part["type"] == "image":
                found.extend(part[key] for key in _IMAGE_KEYS if part.get(key) is not None)
    return found


def _parts(message: Mapping[str, Any], where: str) -> list[tuple[str, Mapping[str, Any]]]:
    content = message.get("content")
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})]
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise TypeError(f"{where}: expected 'content' to be a string or a list of parts, got {type(content).__name__}")
    parts = []
    for j, part in enumerate(content):
        name = f"{where}.content[{j}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image", "image_url"):
            raise ValueError(f"{name}: expected a part of type 'text', 'image' or 'image_url', got {part!r:.80}")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise TypeError(f"{name}: expected 'text' to be a string, got {type(part.get('text')).__name__}")
        if kind == "image_url" and part.get("image_url") is None:
            raise ValueError(f"{name}: expected an 'image_url', got none")
        parts.append((name, part))
    return parts


def _check_text(text: str, where: str, reserved: Sequence[str]) -> None:
    for token in (IMAGE_TOKEN, QUERY_TOKEN, *reserved):
        if token in text:
            hint = "; pass the image as a part {'type': 'image'}" if token == IMAGE_TOKEN else ""
            raise ValueError(
                f"{where}: the text contains {token!r}, which is reserved for the prompt's structure{hint}"
            )


def _read_dialogue(conversation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Brings both forms of dialogue to chat messages."""
    if isinstance(conversation, (str, Mapping)) or not isinstance(conversation, Sequence):
        raise TypeError(f"conversation: expected a list of messages, got {type(conversation).__name__}")
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(conversation):
        if not isinstance(turn, Mapping):
            raise TypeError(f"conversation[{i}]: expected a dict, got {type(turn).__name__}")
        if "from" not in turn:
            messages.append(dict(turn))
            continue
        value = turn.get("value")
        if not isinstance(value, str):
            raise TypeError(f"conversation[{i}]: expected 'value' to be a string, got {type(value).__name__}")
        role = _DIALOGUE_ROLES.get(turn["from"], turn["from"])
        content: Any = value
        if role == "user" and IMAGE_TOKEN in value:
            images = [{"type": "image"}] * value.count(IMAGE_TOKEN)
            content = [*images, {"type": "text", "text": value.replace(IMAGE_TOKEN, "")}]
        messages.append({"role": role, "content": content})
    return messages
