"""``flashsloth`` where FSDP shards on CPUs too; for torchrun.

accelerate does so on accelerators alone: on CPUs it drops the plugin, and each process keeps whole weights.

``out`` gets ``held-N.json``: how much process N holds of weights, gradients and moments, and how much there is of each.
``FULL_DISK=NAME`` in the environment: ``torch.save`` finds no room for files whose path ends in NAME.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from flashsloth.cli import main
from flashsloth.training import command
from flashsloth.training.trainer import FlashSlothTrainer


def shard_on_cpus() -> None:
    real = AcceleratorState.__init__

    def init(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        # Every later AcceleratorState() takes the type from here again, so it is not enough to change this one's.
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        real(self, *arguments, fsdp_plugin=fsdp_plugin, **named)

    AcceleratorState.__init__ = init


def held(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Numbers in this process, and in all."""
    tensors = list(tensors)
    mine = sum((one.to_local() if isinstance(one, DTensor) else one).numel() for one in tensors)
    return mine, sum(one.numel() for one in tensors)


class _Held(TrainerCallback):
    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        moments = [one[name] for one in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        found = {"weights": held(model.parameters()), "gradients": held(gradients), "moments": held(moments)}
        (Path(args.output_dir) / f"held-{args.process_index}.json").write_text(json.dumps(found))


class _Trainer(FlashSlothTrainer):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.add_callback(_Held())


def fill_disk(name: str) -> None:
    real = torch.save

    def save(value: Any, file: Any, *arguments: Any, **named: Any) -> None:
        if str(file).endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, file, *arguments, **named)

    torch.save = save


if __name__ == "__main__":
    shard_on_cpus()
    command.FlashSlothTrainer = _Trainer  # type: ignore[misc]
    if "FULL_DISK" in os.environ:
        fill_disk(os.environ["FULL_DISK"])
    sys.exit(main())
