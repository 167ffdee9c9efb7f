"""The command line: ``flashsloth demo``, ``ask IMAGE QUESTION``, ``chat IMAGE``, ``serve``, ``eval --task TASK``,
``inspect DIR``, ``data make sight --out DIR``, ``train --config FILE``, ``ablate --config FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashsloth import chat_command
from flashsloth.evaluation import command as evaluation
from flashsloth.loading import image_source
from flashsloth_ops import BackendError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on standard error for input that cannot be used."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else ""
    if arguments is None and command in ("train", "ablate"):
        import torch  # in a process of its own: threads that are made later take the setting over

        torch.set_flush_denormal(True)  # denormal numbers, many in a softmax, are slow on processors
    try:
        options = _parser(command).parse_args(given)
        options.run(options)
    except ModuleNotFoundError as error:
        extra = {"data": "data", "eval": "data", "serve": "serve", "train": "train"}.get(command, "demo")
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
    from transformers.utils import logging

    from flashsloth.demo import run_demo

    logging.disable_progress_bar()  # of transformers, for every file it reads
    run_demo(options.image, options.question, options.out, console=_console())


def _inspect(options: argparse.Namespace) -> None:
    from flashsloth.inspection import inspect_checkpoint, render

    _console().print(render(inspect_checkpoint(options.directory)), highlight=False)


def _make_sight(options: argparse.Namespace) -> None:
    from flashsloth.data.sight import make

    make.main(options)


def _ablate(options: argparse.Namespace) -> None:
    from flashsloth.ablation import command

    command.main(options)


def _train(options: argparse.Namespace) -> None:
    from flashsloth.training import command

    command.main(options)


def _console() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def _parser(command: str = "") -> argparse.ArgumentParser:
    """``command``: the one that is given; arguments that need a package to be known are added for it alone."""
    parser = argparse.ArgumentParser(prog="flashsloth", description="FlashSloth: a multimodal model that compresses.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="full-size ops beside their peers, then questions to the model that ships")
    demo.add_argument("--image", type=image_source, metavar="FILE", help="your own picture; default: a sketch")
    demo.add_argument("--question", metavar="TEXT", help="on your own picture")
    out = Path("flashsloth-demo.png")
    demo.add_argument("--out", type=Path, default=out, metavar="FILE", help="default: %(default)s")
    demo.set_defaults(run=_demo)

    ask = commands.add_parser("ask", help="a question about an image")
    chat_command.add_ask_arguments(ask)
    ask.set_defaults(run=chat_command.ask)

    chat = commands.add_parser("chat", help="a conversation about an image")
    chat_command.add_chat_arguments(chat)
    chat.set_defaults(run=chat_command.chat)

    evaluate = commands.add_parser("eval", help="score a model: eval --task sight, sort-of-clevr or FILE.json")
    evaluation.add_arguments(evaluate)
    evaluate.set_defaults(run=evaluation.main)

    inspect = commands.add_parser("inspect", help="parameters, tokens and memory of a checkpoint, without loading it")
    inspect.add_argument("directory", type=Path, metavar="DIR")
    inspect.set_defaults(run=_inspect)

    serve = commands.add_parser("serve", help="a page to ask about pictures, with maps of where the model looks")
    if command == "serve":
        from flashsloth.web import server

        server.add_arguments(serve)
        serve.set_defaults(run=server.main)

    data = commands.add_parser("data", help="make a data set of pictures and questions: data make sight --out DIR")
    if command == "data":
        from flashsloth.data.sight import make

        made = data.add_subparsers(required=True, metavar="make").add_parser("make", help="make a data set")
        sight = made.add_subparsers(required=True, metavar="sight").add_parser(
            "sight", help="shapes, digits, words, charts, small print"
        )
        make.add_arguments(sight)
        sight.set_defaults(run=_make_sight)

    train = commands.add_parser("train", help="train a model by a configuration: train --config FILE")
    if command == "train":
        from flashsloth.training import command as training

        training.add_arguments(train)
        train.set_defaults(run=_train)

    ablate = commands.add_parser("ablate", help="train variants of a model at the same budget and compare them")
    if command == "ablate":
        from flashsloth.ablation import command as ablation

        ablation.add_arguments(ablate)
        ablate.set_defaults(run=_ablate)
    return parser


if __name__ == "__main__":
    sys.exit(main())
