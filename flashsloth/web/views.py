"""Fragments of the page as HTML: the picture, the conversation, the two maps, times and messages."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from flashsloth.chat import Answer, Conversation
from flashsloth.overlay import onto_picture, relative_attention, relative_pooling, tint

PICTURE_SIDE, MAP_SIDE, SMALL_SIDE = 640, 480, 180  # pixels
NO_MAPS = (
    '<p class="quiet">Once a question is asked, two maps show here: which parts of the picture pooling keeps, '
    "and where the embedded queries look for the answer.</p>"
)


def small_copy(picture: Image.Image, side: int = PICTURE_SIDE) -> Image.Image:
    """In the proportions of the picture, its longer side ``side`` pixels."""
    factor = side / max(picture.size)
    width, height = (max(1, round(length * factor)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def picture_view(picture: Image.Image) -> str:
    return f'<img class="picture" src="{_data_url(picture)}" alt="The picture the questions are about">'


def talk_view(turns: Sequence[tuple[str, str]], writing: bool = False) -> str:
    """Questions and answers; ``writing``: the last answer is not finished."""
    if not turns:
        return ""
    rows = []
    for number, (question, answer) in enumerate(turns):
        unfinished = writing and number == len(turns) - 1
        kind = "answer writing" if unfinished else "answer"
        shown = escape(answer) or ("" if unfinished else '<span class="quiet">(no answer)</span>')
        rows.append(
            f'<p class="question"><span class="who">You</span>{escape(question)}</p>'
            f'<p class="{kind}"><span class="who">FlashSloth</span>{shown}</p>'
        )
    busy = "true" if writing else "false"  # a screen reader waits for the whole answer
    label = f'role="log" aria-label="Conversation" aria-busy="{busy}"'
    return f'<div class="talk" {label} tabindex="0"><div>{"".join(rows)}</div></div>'


def message_view(text: str, error: bool = False) -> str:
    if not text:
        return ""
    kind, role = ("error", "alert") if error else ("note", "status")
    return f'<p class="message {kind}" role="{role}">{escape(text)}</p>'


def times_view(answer: Answer | None, visual: tuple[int, int] | None = None) -> str:
    """The times of the last answer. ``visual``: vision tokens of the picture, and visual tokens the decoder reads."""
    if answer is None or not answer.ids:
        return ""
    rows = [
        ("Picture encoded", f"{answer.image_seconds * 1000:.0f} ms" if answer.image_seconds else "before, kept"),
        ("First token", f"{answer.first_token_seconds * 1000:.0f} ms"),
        ("Speed", f"{answer.tokens_per_second:.0f} tokens/s" if answer.tokens_per_second else "one token"),
        ("Prompt", f"{answer.prompt_tokens} tokens, {answer.cached_tokens} kept"),
    ]
    if visual is not None:
        rows.append(("Vision tokens", f"{visual[0]} &rarr; {visual[1]}"))
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<dl class="times" aria-label="Times of the last answer">{items}</dl>'


def maps_view(picture: Image.Image, conversation: Conversation, question: str) -> str:
    """Pooling and query maps of the last question over the picture."""
    config, processor = conversation.model.config, conversation.processor.image_processor
    padded = processor.image_aspect_ratio == "pad"
    shown, small = small_copy(picture, MAP_SIDE), small_copy(picture, SMALL_SIDE)

    def drawn(values: np.ndarray, photo: Image.Image, smooth: bool) -> str:
        laid = onto_picture(values, photo.size, padded=padded, smooth=smooth)
        return _data_url(Image.fromarray((tint(np.asarray(photo) / 255, laid) * 255).round().astype(np.uint8)))

    pooling = relative_pooling(conversation.pooling_map().numpy(), config.pool_window)
    queries = [relative_attention(one) for one in conversation.query_map().numpy()]
    mean = np.mean(queries, axis=0)
    asked = escape(question, quote=True)
    singles = "".join(
        f'<img src="{drawn(one, small, True)}" alt="Query {number}: {_range(one)} times an even share">'
        for number, one in enumerate(queries, 1)
    )
    return (
        _figure(
            "Spatial attention pooling",
            drawn(pooling, shown, False),
            "Map of the pooling weights over the picture",
            f"Weight of each vision token in its {config.pool_window} &times; {config.pool_window} window, "
            f"{_range(pooling)}; 1 is a plain average.",
        )
        + _figure(
            "Embedded queries",
            drawn(mean, shown, True),
            f"Map of where the embedded queries look for: {asked}",
            f"Attention of all {len(queries)} queries for &ldquo;{escape(_short(question))}&rdquo;, {_range(mean)}; "
            "1 is an even share.",
        )
        + f'<details><summary>Each query alone</summary><div class="singles">{singles}</div></details>'
        + '<p class="quiet">Bright is much, dark is little; colours span each map on its own.</p>'
    )


def _figure(title: str, source: str, alternative: str, caption: str) -> str:
    return (
        f'<figure><h3>{title}</h3><img src="{source}" alt="{alternative}"><figcaption>{caption}</figcaption></figure>'
    )


def _range(values: np.ndarray) -> str:
    return f"{values.min():.2f} to {values.max():.2f}"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "\u2026"


def _data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
