"""Model and processor as the command line names them: ``--model``, ``--hd``, ``--dtype``, ``--device``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor
from flashsloth.shipped import shipped_model

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """A model in inference mode and its processor. ``image_hd`` None: as the processor is set."""

    model: FlashSlothForConditionalGeneration
    processor: FlashSlothProcessor
    directory: Path
    image_hd: bool | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="checkpoint, in our layout or the official one; default: what ships"
    )
    parser.add_argument("--hd", action="store_true", help="five tiles an image, for detail and text")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored; what ships, fp32 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")


def load(options: argparse.Namespace) -> Loaded:
    """What the arguments of :func:`add_arguments` ask for. Raises as :func:`load_model`."""
    logging.disable_progress_bar()  # of transformers, for every file it reads
    return load_model(options.model, hd=options.hd, dtype=options.dtype, device=options.device)


def load_model(
    directory: Path | None = None, *, hd: bool = False, dtype: str = "auto", device: str | None = None
) -> Loaded:
    """Loads a checkpoint, or the shipped model where ``directory`` is None.

    Args:
        hd: five tiles an image; otherwise as the processor is set.
        dtype: "auto" is as stored, and float32 for the shipped model on a CPU, where it is small and halves are slow.
        device: "cpu" or "cuda"; None takes a GPU where there is one.

    Raises:
        FileNotFoundError: no such directory, no checkpoint in it, or no shipped model.
        ValueError: a device that is not there, a checkpoint that cannot be read.
    """
    found = shipped_model() if directory is None else directory
    if not (found / "config.json").is_file():
        raise FileNotFoundError(f"--model: expected a directory with a checkpoint (config.json), got {found}")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, as torch finds no CUDA device here, got cuda")
    if dtype == "auto" and directory is None and chosen == "cpu":
        dtype = "float32"
    processor = FlashSlothProcessor.from_pretrained(found)
    model: Any = FlashSlothForConditionalGeneration.from_pretrained(
        found, dtype=dtype if dtype == "auto" else getattr(torch, dtype), attn_implementation="flashsloth"
    )
    return Loaded(model.to(chosen).eval(), processor, found, True if hd else None)


def image_source(text: str) -> str | Path:
    """A URL as it is; else a path, so that a name that is not there is never taken for base64."""
    return text if text.startswith(("http://", "https://")) else Path(text)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)
