"""The command line: ``flashsloth demo``, ``ask IMAGE QUESTION``, ``inspect DIR``, ``data make sight --out DIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashsloth_ops import BackendError

NO_MODEL = (
    "--model: expected a directory with a checkpoint (this project's layout or the official one); no trained weights "
    "ship with this project yet. `flashsloth demo` runs on random ones"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on standard error for input that cannot be used."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else ""
    try:
        options = _parser(command).parse_args(given)
        options.run(options)
    except ModuleNotFoundError as error:
        extra = "data" if command == "data" else "demo"
        return _fail(f"the package {error.name} is missing: pip install 'flashsloth[{extra}]'")
    except (ValueError, TypeError, OSError, BackendError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(message: str) -> int:
    line = " ".join(message.split())  # libraries write paragraphs
    print(f"flashsloth: {line}", file=sys.stderr)
    return 2


def _demo(options: argparse.Namespace) -> None:
    from flashsloth.demo import run_demo

    run_demo(options.image, options.out, console=_console())


def _inspect(options: argparse.Namespace) -> None:
    from flashsloth.inspection import inspect_checkpoint, render

    _console().print(render(inspect_checkpoint(options.directory)), highlight=False)


def _ask(options: argparse.Namespace) -> None:
    if options.model is None:
        raise ValueError(NO_MODEL)
    import torch
    from transformers import TextStreamer

    from flashsloth.image_processing import load_rgb
    from flashsloth.modeling import FlashSlothForConditionalGeneration
    from flashsloth.processing import FlashSlothProcessor

    image = load_rgb(options.image, "IMAGE")  # before the model, which takes longer to load
    if not (options.model / "config.json").is_file():
        raise FileNotFoundError(f"--model: expected a directory with a checkpoint (config.json), got {options.model}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, as torch finds no CUDA device here, got cuda")
    given: dict[str, Any] = {"image_hd": True} if options.hd else {}
    processor = FlashSlothProcessor.from_pretrained(options.model, **given)
    content = [{"type": "image"}, {"type": "text", "text": options.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    batch = processor(images=image, text=prompt).to(device)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = FlashSlothForConditionalGeneration.from_pretrained(
        options.model, dtype=dtype, attn_implementation="flashsloth"
    )
    model = model.to(device).eval()
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**batch, max_new_tokens=options.max_new_tokens, do_sample=False, streamer=streamer)


def _make_sight(options: argparse.Namespace) -> None:
    from flashsloth.data.sight import make

    make.main(options)


def _console() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def _parser(command: str = "") -> argparse.ArgumentParser:
    """``command``: the one that is given; arguments that need a package to be known are added for it alone."""
    parser = argparse.ArgumentParser(prog="flashsloth", description="FlashSloth: a multimodal model that compresses.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="one photograph through full-size ops: times, differences, a picture")
    demo.add_argument("--image", type=_image, metavar="FILE", help="your own photograph (default: one of scikit-image)")
    out = Path("flashsloth-demo.png")
    demo.add_argument("--out", type=Path, default=out, metavar="FILE", help="default: %(default)s")
    demo.set_defaults(run=_demo)

    ask = commands.add_parser("ask", help="ask a checkpoint about an image")
    ask.add_argument("image", type=_image, metavar="IMAGE", help="a file or a URL")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--model", type=Path, metavar="DIR", help="checkpoint, in our layout or the official one")
    ask.add_argument("--hd", action="store_true", help="five tiles an image, for detail and text")
    ask.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="default: %(default)s")
    ask.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    ask.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    ask.set_defaults(run=_ask)

    inspect = commands.add_parser("inspect", help="parameters, tokens and memory of a checkpoint, without loading it")
    inspect.add_argument("directory", type=Path, metavar="DIR")
    inspect.set_defaults(run=_inspect)

    data = commands.add_parser("data", help="make a data set of pictures and questions: data make sight --out DIR")
    if command == "data":
        from flashsloth.data.sight import make

        made = data.add_subparsers(required=True, metavar="make").add_parser("make", help="make a data set")
        sight = made.add_subparsers(required=True, metavar="sight").add_parser(
            "sight", help="shapes, digits, words, charts, small print"
        )
        make.add_arguments(sight)
        sight.set_defaults(run=_make_sight)
    return parser


def _image(text: str) -> str | Path:
    """A path stays one, so that a name that is not there is never taken for anything else."""
    return text if text.startswith(("http://", "https://")) else Path(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
