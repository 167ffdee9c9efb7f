"""What a run tells while it runs: a bar on a terminal, a line for each logged step, and the same in a file."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

LOG = "log.jsonl"


class Progress(TrainerCallback):
    """Prints and writes what :meth:`~flashsloth.training.trainer.FlashSlothTrainer.log` has.

    Args:
        out: where ``log.jsonl`` is written; a resumed run begins with what its checkpoint had.
        bar: draw a bar where standard error is a terminal.
    """

    def __init__(self, out: Path, bar: bool = True) -> None:
        self.path, self.draw = out / LOG, bar
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in state.log_history)
        disable = None if self.draw else True  # None: where standard error is no terminal
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, disable=disable, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n if not self.bar.disable else 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(state.log_history[-1]) + "\n")
        if "loss" in (logs or {}):
            tqdm.write(line(state.log_history[-1], state.max_steps), file=sys.stdout)
            sys.stdout.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def line(entry: dict[str, Any], steps: int) -> str:
    """One logged step for people."""
    parts = [f"step {entry['step']}/{steps}", f"loss {entry['loss']:.4f}", f"lr {entry['learning_rate']:.3g}"]
    if "grad_norm" in entry:
        parts.append(f"grad {entry['grad_norm']:.3g}")
    parts += [f"{entry['tokens_per_second']:,.0f} tokens/s", f"{entry['memory_gib']:.2f} GiB"]
    if entry.get("skipped"):
        parts.append(f"{entry['skipped']} skipped")
    return "  ".join(parts)


def peak_memory(device: torch.device) -> float:
    """GiB: what torch held of a GPU at most, or, on a CPU, this process of memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
