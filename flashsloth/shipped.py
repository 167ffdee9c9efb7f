"""The trained model that comes with this package."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "nano" / "weights"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json")


def shipped_model() -> Path:
    """The directory of its weights, with configuration, tokenizer and processor: what ``from_pretrained`` takes.

    Raises:
        FileNotFoundError: this copy of the package lacks them, with the files that are missing.
    """
    missing = [name for name in FILES if not (WEIGHTS / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"--model: expected a directory with a checkpoint, as no trained weights ship with this copy of flashsloth "
            f"({', '.join(missing)} not in {WEIGHTS})"
        )
    return WEIGHTS
