"""The page itself: Gradio's components, and which of them a view of the desk goes to."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from flashsloth.web.desk import Desk, View
from flashsloth.web.uploads import ENDINGS, Limits
from flashsloth.web.views import NO_MAPS

STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("uploads.js")
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build_page(desk: Desk, about: str) -> gr.Blocks:
    """The page of one desk. ``about``: a short line on the model, plain text."""
    limits = desk.limits
    with gr.Blocks(title="FlashSloth", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_heading(about), elem_id="heading")
        with gr.Row(elem_id="columns", equal_height=False):
            with gr.Column(elem_id="left", min_width=300):
                drop = gr.File(
                    label=f"Picture, at most {limits.megabytes:g} MB and {limits.megapixels:g} megapixels",
                    file_types=list(ENDINGS),
                    height=220,
                    elem_id="drop",
                )
                gr.HTML('<p id="refused" class="message error" role="alert" hidden></p>', elem_id="file")
                picture = gr.HTML(elem_id="picture")
                message = gr.HTML(elem_id="message")
                talk = gr.HTML(elem_id="talk")
                question = gr.Textbox(
                    label="Question",
                    placeholder="What is in the picture?",
                    lines=1,
                    max_lines=5,
                    max_length=8000,
                    elem_id="question",
                )
                with gr.Row(elem_id="buttons"):
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=90)
                    stop = gr.Button("Stop", elem_id="stop", min_width=90, interactive=False)
                    another = gr.UploadButton(
                        "Another picture",
                        file_types=list(ENDINGS),
                        visible=False,
                        elem_id="another",
                        size="lg",
                        min_width=150,
                    )
            with gr.Column(elem_id="right", min_width=300):
                gr.HTML("<h2>Where it looks</h2>", elem_id="title")
                maps = gr.HTML(NO_MAPS, elem_id="maps")
                times = gr.HTML(elem_id="times")

        shown = [message, picture, talk, maps, times]

        def parts(view: View) -> list[Any]:
            return [gr.skip() if part is None else part for part in view[:5]]

        def open_picture(uploaded: Any, request: gr.Request) -> list[Any]:
            path = uploaded.get("path") if isinstance(uploaded, dict) else None
            if not isinstance(path, str):  # the field was emptied
                return [*parts(View()), gr.skip(), gr.skip()]
            view = desk.open(_key(request), path)
            took = view.done
            return [
                *parts(view),
                gr.File(value=None, visible=False) if took else gr.File(value=None),
                gr.UploadButton(visible=True) if took else gr.UploadButton(),
            ]

        def ask_question(text: str, request: gr.Request) -> Iterator[list[Any]]:
            # Gradio closes this generator when its event is cancelled, and that closes the desk's.
            answering = desk.ask(_key(request), text)
            try:
                for view in answering:
                    running = gr.Button(interactive=view.done) if view.done else gr.skip()
                    yield [*parts(view), "" if view.done else gr.skip(), running]
            finally:
                answering.close()

        def finished() -> Any:
            return gr.Button(interactive=False)

        def stop_answer(request: gr.Request) -> None:
            desk.stop(_key(request))

        def close(request: gr.Request) -> None:
            desk.close(_key(request))

        # One thing at a time is done with the model, over all sessions; the others wait in a queue.
        alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        # Without preprocessing Gradio neither copies the file nor looks at its name; the guard has seen to its path.
        opened = {"fn": open_picture, "outputs": [*shown, drop, another], "preprocess": False, **alone}
        drop.upload(inputs=drop, api_name="picture", **opened)
        another.upload(inputs=another, api_visibility="private", **opened)
        asked = gr.on(
            [ask.click, question.submit],
            ask_question,
            question,
            [*shown, question, stop],
            api_name="ask",
            trigger_mode="once",
            **alone,
        )
        # Through the queue as well, beside what runs there: past the queue there is no way to this server (guard.py).
        beside: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
        asked.then(finished, None, stop, api_visibility="private", **beside)
        stop.click(stop_answer, None, None, api_name="stop", **beside)
        page.unload(close)
    return page


def head(limits: Limits) -> str:
    """What goes into the head of the page."""
    return f"<script>{SCRIPT.read_text().replace('MOST_BYTES', str(limits.bytes))}</script>"


def theme() -> gr.themes.Base:
    """Quiet colours, and fonts that are on every machine: nothing is fetched from anywhere."""
    base = gr.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=list(FONT),
        font_mono=list(MONO),
    )
    # Gradio's own are too pale to read: these have a contrast of 4.5 and more (WCAG AA).
    return base.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
    )


def _key(request: gr.Request) -> str:
    return str(request.session_hash)


def _heading(about: str) -> str:
    return (
        "<h1>FlashSloth</h1><p>Ask about a picture. The model reads a compressed copy, and looks again at the whole "
        f'one for your question.</p><p class="quiet">{escape(about)}</p>'
    )
