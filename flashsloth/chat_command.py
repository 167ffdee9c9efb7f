"""``flashsloth ask IMAGE QUESTION`` and ``flashsloth chat IMAGE``: a conversation on the terminal or through pipes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from flashsloth import loading
from flashsloth.chat import MAX_NEW_TOKENS, Answer, Conversation
from flashsloth.image_processing import load_rgb

HELP = "/image FILE begins with another picture, /reset forgets what was said, /quit (or Ctrl-D) leaves"


def add_ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=loading.image_source, metavar="IMAGE", help="a file or a URL")
    parser.add_argument("question", metavar="QUESTION")
    _add_common(parser)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=loading.image_source, metavar="IMAGE", help="a file or a URL")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    loading.add_arguments(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=loading.positive,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="default: %(default)s",
    )


def ask(options: argparse.Namespace) -> None:
    """One question and its answer, as it comes."""
    image = load_rgb(options.image, "IMAGE")  # before the model, which takes longer to load
    loaded = loading.load(options)
    talk = Conversation(loaded.model, loaded.processor, image_hd=loaded.image_hd)
    _show(talk.ask(options.question, image, max_new_tokens=options.max_new_tokens))


def chat(options: argparse.Namespace) -> None:
    """Questions line by line until the input ends; a line that cannot be used is told, and the next one is read."""
    image = load_rgb(options.image, "IMAGE")
    loaded = loading.load(options)
    talk = Conversation(loaded.model, loaded.processor, image_hd=loaded.image_hd)
    talk.set_image(image)
    terminal = sys.stdin.isatty()
    if terminal:
        _note(HELP)
    for line in _lines(terminal):
        try:
            if line.startswith("/"):
                if _command(talk, line):
                    return
                continue
            _show(talk.ask(line, max_new_tokens=options.max_new_tokens))
            if terminal and talk.last is not None:
                _note(timings(talk.last))
        except KeyboardInterrupt:
            talk.stop()
            print(flush=True)
            _note("(stopped; what was said stays in the conversation)")
        except (ValueError, TypeError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise  # nobody reads any more
            _note(f"flashsloth: {' '.join(str(error).split())}")


def timings(answer: Answer) -> str:
    """One line on the latest answer."""
    parts = [f"picture {answer.image_seconds:.2f} s"] if answer.image_seconds else []
    parts.append(f"first token {answer.first_token_seconds:.2f} s")
    parts.append(f"{answer.cached_tokens} of {answer.prompt_tokens} tokens cached")
    if answer.tokens_per_second:
        parts.append(f"{answer.tokens_per_second:.0f} tokens/s")
    return "(" + ", ".join(parts) + ")"


def _command(talk: Conversation, line: str) -> bool:
    """Does what a line with a slash says; True where that is to leave."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/quit":
        return True
    if name == "/reset":
        talk.reset()
        _note("(a new conversation on the same picture)")
    elif name == "/image" and rest:
        if len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "'\"":
            rest = rest[1:-1]
        source = loading.image_source(rest)
        talk.set_image(source if isinstance(source, str) else source.expanduser())
        _note("(a new conversation on another picture)")
    else:
        _note(HELP)
    return False


def _lines(terminal: bool) -> Iterator[str]:
    """Lines of standard input that hold something, until its end, or Ctrl-C where a question is awaited."""
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  editing and history for input()
    _forgiving(sys.stdin, "surrogateescape")  # bytes that are no text become a message, not an end
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            print()
            return
        if line.strip():
            yield line


def _show(pieces: Iterator[str]) -> None:
    _forgiving(sys.stdout, "replace")
    for piece in pieces:
        print(printable(piece), end="", flush=True)
    print(flush=True)


def printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _forgiving(stream: object, errors: str) -> None:
    if hasattr(stream, "reconfigure"):
        with contextlib.suppress(OSError):  # something was read from it already
            stream.reconfigure(errors=errors)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
