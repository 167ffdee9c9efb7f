"""``flashsloth demo``: the whole path on one photograph, each op beside its peers, and a picture of where it looks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.case import Size
from bench.cases import sparse_prefill
from flashsloth import comparison, heatmaps
from flashsloth.comparison import FUSED, OFFICIAL, PLAIN, FirstToken, OpTimes
from flashsloth.config import FlashSlothConfig
from flashsloth.drawing import check_target, draw_attention
from flashsloth.image_processing import load_rgb
from flashsloth.processing import FlashSlothProcessor
from flashsloth.tiny import byte_tokenizer, demo_config, processor_for, random_model
from flashsloth_ops import backend

QUESTION, ANSWER, SECOND_QUESTION = "What is in the picture?", "I cannot say.", "What is in the background?"
SAME_IMAGE = "another on the same image: kept with, encoded again without"
WARNING = "No trained weights ship with this project yet: the weights are random, and the answer means nothing."
CAPTION = (
    "The weights are random: this shows how the model looks, not what a trained one would look at. "
    "Colours run from the least to the most of each map on its own."
)


class Demo(NamedTuple):
    """What a demo found: vision tokens and the visual tokens left of them, times, the answer and the picture."""

    tokens: tuple[int, int]
    ops: list[OpTimes]
    first_token: FirstToken
    answer: str
    picture: Path


def run_demo(
    image: str | Path | None,
    out: Path,
    *,
    console: Console,
    config: FlashSlothConfig | None = None,
    sparse_size: Size = sparse_prefill.CASES[0].sizes[0],
    budget: float = 3.0,
) -> Demo:
    """Run the demo, show it on ``console`` and write the picture to ``out``.

    ``image`` None takes a photograph that scikit-image ships. ``config`` (its ids those of the byte tokenizer) and
    ``sparse_size`` make it small, for tests; ``budget`` is the seconds spent measuring each op.

    Raises:
        ValueError, FileNotFoundError: an image that cannot be read, a picture that cannot be written.
    """
    check_target(out)
    photograph = _photograph() if image is None else load_rgb(image, "--image")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, torch.inference_mode():
        bar = progress.add_task("")

        def step(text: str) -> None:
            progress.update(bar, description=text)

        return _run(photograph, out, console, config, sparse_size, budget, step)


def _run(
    photograph: Image.Image,
    out: Path,
    console: Console,
    config: FlashSlothConfig | None,
    sparse_size: Size,
    budget: float,
    step: Callable[[str], None],
) -> Demo:
    def say(text: str = "", style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    say(WARNING, "bold yellow")
    step("building the model")
    tokenizer = byte_tokenizer()
    config = demo_config(tokenizer) if config is None else config
    model, processor = random_model(config), processor_for(config, tokenizer)
    rows, columns = config.vision_grid
    vision, text = config.vision_config, config.text_config
    served = backend.select("spatial_pool", torch.empty(0))
    say(
        f"model       tower {vision.hidden_size} wide with {config.vision_layers} layers, "
        f"decoder {text.hidden_size} wide with {text.num_attention_heads} heads and {text.num_hidden_layers} layers"
    )
    say(f"runs on     {torch.get_num_threads()} threads, fp32, fused ops served by the {served} backend")

    step("asking")
    asked = _prompt(processor, photograph)
    with heatmaps.watching(model) as seen:
        features = model(**asked, use_cache=True, logits_to_keep=1).image_context.features
    fewer = 1 - config.num_visual_tokens / (rows * columns)
    say(
        f"tokens      {rows * columns} vision tokens -> {config.num_visual_tokens} visual tokens (-{fewer:.0%}), "
        f"and {config.num_queries} embedded queries that read all {rows * columns}"
    )

    step("measuring spatial_attention_pool")
    ops = [comparison.measure_pooling(model, features, budget)]
    step("measuring embedded_query_attention")
    ops.append(comparison.measure_queries(model, seen[0], budget))
    step("measuring token_sparse_prefill")
    ops.append(comparison.measure_sparse(sparse_size, budget))
    console.print(_op_table(ops))

    step("measuring the time to the first token")
    again = _prompt(processor, photograph, ANSWER, SECOND_QUESTION)
    first_token = comparison.measure_first_token(model, asked, again)
    console.print(_first_token_table(first_token))

    step("answering")
    answering: Any = model  # the annotations of generate do not fit its own mixin
    ids = answering.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1] :]
    answer = _printable(str(tokenizer.decode(ids, skip_special_tokens=True)))
    say(f"question    {QUESTION}")
    say(f"answer      {answer}   (random weights: it means nothing)")

    step("drawing")
    draw_attention(
        out,
        photograph,
        heatmaps.pooling_weights(model, features)[0].view(rows, columns).numpy(),
        heatmaps.query_attention(model, seen[0])[0].view(-1, rows, columns).numpy(),
        window=config.pool_window,
        caption=CAPTION,
    )
    say(f"picture     {out}")
    return Demo((rows * columns, config.num_visual_tokens), ops, first_token, answer, out)


def _photograph() -> Image.Image:
    """A portrait of the astronaut Eileen Collins (NASA, public domain), which lies in the scikit-image package."""
    from skimage import data

    return Image.fromarray(data.astronaut())


def _prompt(processor: FlashSlothProcessor, photograph: Image.Image, *turns: str) -> dict[str, Any]:
    """The processed conversation: the first question, then answers and questions in turn."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    for number, text in enumerate(turns):
        messages.append({"role": "user" if number % 2 else "assistant", "content": text})
    return dict(processor(images=photograph, text=processor.apply_chat_template(messages)))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _op_table(ops: list[OpTimes]) -> Table:
    table = Table(title="Each op, median of interleaved runs", title_justify="left", box=SIMPLE)
    table.add_column("op")
    for heading in (FUSED, PLAIN, "", OFFICIAL, "", "largest difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for op in ops:
        fused, plain, official = (op.seconds[path] for path in (FUSED, PLAIN, OFFICIAL))
        table.add_row(
            op.name,
            _ms(fused),
            _ms(plain),
            f"{plain / fused:.1f}x",
            _ms(official),
            f"{official / fused:.1f}x",
            f"{op.difference:.1e}",
        )
    return table


def _first_token_table(found: FirstToken) -> Table:
    table = Table(title="Time to the first token", title_justify="left", box=SIMPLE)
    table.add_column("question")
    for heading in ("with the fused ops", "without", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, times in (("on a new image", found.new_image), (SAME_IMAGE, found.same_image)):
        table.add_row(name, _ms(times[FUSED]), _ms(times[PLAIN]), f"{times[PLAIN] / times[FUSED]:.2f}x")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"
