"""``flashsloth demo``: what the fused ops save at full size, then questions to the model that ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.case import Size
from bench.cases import sparse_prefill
from flashsloth import comparison, heatmaps
from flashsloth.chat import Conversation
from flashsloth.comparison import FUSED, OFFICIAL, PLAIN, FirstToken, OpTimes
from flashsloth.config import FlashSlothConfig
from flashsloth.data.sight import load_sources, make_sample
from flashsloth.data.sight.sample import Sample, Settings
from flashsloth.drawing import check_target, draw_attention
from flashsloth.evaluation.scoring import matches
from flashsloth.image_processing import load_rgb
from flashsloth.loading import Loaded, load_model
from flashsloth.processing import FlashSlothProcessor
from flashsloth.tiny import byte_tokenizer, demo_config, processor_for, random_model
from flashsloth_ops import backend

FULL_SIZE = "What the ops save, at the widths of the released model (random weights: times do not depend on them)."
ASKED = "What the model that ships answers, flashsloth-nano. Its world is shapes, digits, words and bar charts."
SAME_IMAGE = "another on the same image: kept with, encoded again without"
_TURNS = ("What is in the picture?", "I cannot say.", "What is in the background?")  # of what is timed
SKETCH_QUESTION = "Is the blue circle left or right of the red square?"
KINDS = ("word", "digit", "relation")  # of questions on the picture of the test split


class Answered(NamedTuple):
    """A question and what the model that ships said; ``expected`` is None where only the user can tell."""

    picture: str
    question: str
    answer: str
    expected: str | None


class Demo(NamedTuple):
    """What a demo found: vision tokens and the visual tokens left of them, times, answers and the picture."""

    tokens: tuple[int, int]
    ops: list[OpTimes]
    first_token: FirstToken
    answers: list[Answered]
    picture: Path


def run_demo(
    image: str | Path | None,
    question: str | None,
    out: Path,
    *,
    console: Console,
    config: FlashSlothConfig | None = None,
    sparse_size: Size = sparse_prefill.CASES[0].sizes[0],
    budget: float = 3.0,
    model: Path | None = None,
) -> Demo:
    """Run the demo, show it on ``console`` and write the picture to ``out``.

    Args:
        image, question: the user's own; None for a sketch that is drawn here and a question on it.
        config: its ids those of the byte tokenizer, and ``sparse_size``: smaller ones to measure, for tests.
        budget: seconds spent measuring each op.
        model: what answers; None for what ships.

    Raises:
        ValueError, FileNotFoundError: an image that cannot be read, a picture that cannot be written, no model.
    """
    check_target(out)
    if image is not None and question is None:
        raise ValueError("--question: expected a question on the picture of --image, got none")
    own = _sketch() if image is None else load_rgb(image, "--image")
    loaded = load_model(model, device="cpu")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, torch.inference_mode():
        bar = progress.add_task("")

        def step(text: str) -> None:
            progress.update(bar, description=text)

        run = _Run(console, step)
        tokens, ops, first_token = run.measure(config, sparse_size, budget)
        name = "a sketch" if image is None else str(image)
        answers, picture = run.ask(loaded, own, name, question or SKETCH_QUESTION), out
        run.draw(loaded, answers[0].question, out)
    return Demo(tokens, ops, first_token, answers, picture)


class _Run:
    def __init__(self, console: Console, step: Callable[[str], None]) -> None:
        self.console, self.step = console, step
        self.sample = _test_picture()

    def say(self, text: str = "", style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def measure(
        self, config: FlashSlothConfig | None, sparse_size: Size, budget: float
    ) -> tuple[tuple[int, int], list[OpTimes], FirstToken]:
        self.say(FULL_SIZE, "bold")
        self.step("building a model")
        tokenizer = byte_tokenizer()
        config = demo_config(tokenizer) if config is None else config
        model, processor = random_model(config), processor_for(config, tokenizer)
        rows, columns = config.vision_grid
        vision, text = config.vision_config, config.text_config
        served = backend.select("spatial_pool", torch.empty(0))
        self.say(
            f"model       tower {vision.hidden_size} wide with {config.vision_layers} layers, "
            f"decoder {text.hidden_size} wide with {text.num_attention_heads} heads and {text.num_hidden_layers} layers"
        )
        self.say(f"runs on     {torch.get_num_threads()} threads, fp32, fused ops served by the {served} backend")

        photograph = _photograph()
        asked = _prompt(processor, photograph, *_TURNS[:1])
        with heatmaps.watching(model) as seen:
            features = model(**asked, use_cache=True, logits_to_keep=1).image_context.features
        fewer = 1 - config.num_visual_tokens / (rows * columns)
        self.say(
            f"tokens      {rows * columns} vision tokens -> {config.num_visual_tokens} visual tokens (-{fewer:.0%}), "
            f"and {config.num_queries} embedded queries that read all {rows * columns}"
        )
        self.step("measuring spatial_attention_pool")
        ops = [comparison.measure_pooling(model, features, budget)]
        self.step("measuring embedded_query_attention")
        ops.append(comparison.measure_queries(model, seen[0], budget))
        self.step("measuring token_sparse_prefill")
        ops.append(comparison.measure_sparse(sparse_size, budget))
        self.console.print(_op_table(ops))
        self.step("measuring the time to the first token")
        first_token = comparison.measure_first_token(model, asked, _prompt(processor, photograph, *_TURNS))
        self.console.print(_first_token_table(first_token))
        return (rows * columns, config.num_visual_tokens), ops, first_token

    def ask(self, loaded: Loaded, own: Image.Image, name: str, question: str) -> list[Answered]:
        """Three questions on a picture of the test split, each in a conversation of its own, and one on ``own``."""
        self.step("asking")
        self.say(ASKED, "bold")
        sample = self.sample
        of_kind = {one.kind: one for one in sample.questions}
        three = [of_kind[kind] for kind in KINDS]
        asked = [(sample.image, f"test {sample.index}", one.text, one.answer) for one in three]
        answers = []
        for image, of, text, expected in [*asked, (own, name, question, None)]:
            talk = Conversation(loaded.model, loaded.processor)
            said = _printable("".join(talk.ask(text, image, max_new_tokens=32)).strip())
            answers.append(Answered(of, text, said, expected))
        self.console.print(_answer_table(answers))
        return answers

    def draw(self, loaded: Loaded, question: str, out: Path) -> None:
        self.step("drawing")
        model = loaded.model
        with heatmaps.watching(model) as seen:
            features = model(**_prompt(loaded.processor, self.sample.image, question)).image_context.features
        grid = model.config.vision_grid
        draw_attention(
            out,
            self.sample.image,
            heatmaps.pooling_weights(model, features)[0].view(*grid).numpy(),
            heatmaps.query_attention(model, seen[0])[0].view(-1, *grid).numpy(),
            window=model.config.pool_window,
            caption=f"{question}   Colours run from the least to the most of each map on its own.",
        )
        self.say(f"picture     {out}")


def _test_picture() -> Sample:
    """The first of the test split that has a word, a digit and shapes, with a question of each kind."""
    sources, index = load_sources(), 0
    while True:
        sample = make_sample(Settings(), "test", index, sources)
        if sample.scene.kind == "mixed" and {*KINDS} <= {one.kind for one in sample.questions}:
            return sample
        index += 1


def _sketch() -> Image.Image:
    """A picture that no data set has: drawn here, in other proportions."""
    image = Image.new("RGB", (480, 360), (250, 250, 245))
    draw = ImageDraw.Draw(image)
    draw.rectangle((70, 90, 160, 180), fill=(220, 30, 30))
    draw.ellipse((310, 190, 410, 290), fill=(30, 60, 220))
    return image


def _photograph() -> Image.Image:
    """A portrait of the astronaut Eileen Collins (NASA, public domain), which lies in the scikit-image package."""
    from skimage import data

    return Image.fromarray(data.astronaut())


def _prompt(processor: FlashSlothProcessor, photograph: Image.Image, *turns: str) -> dict[str, Any]:
    """The processed conversation: a question, then answers and questions in turn."""
    content = [{"type": "image"}, {"type": "text", "text": turns[0]}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    for number, text in enumerate(turns[1:]):
        messages.append({"role": "user" if number % 2 else "assistant", "content": text})
    return dict(processor(images=photograph, text=processor.apply_chat_template(messages)))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _answer_table(answers: Sequence[Answered]) -> Table:
    table = Table(box=SIMPLE)
    for heading in ("picture", "question", "answer", "expected", ""):
        table.add_column(heading)
    for one in answers:
        mark = "" if one.expected is None else "right" if matches(one.answer, one.expected) else "wrong"
        table.add_row(one.picture, one.question, one.answer, one.expected or "", mark)
    return table


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
