"""Which record comes when, on which process: each one once an epoch, the same for a seed whatever the processes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from flashsloth.data.records import RecordSource

WINDOW = 8192
_CHUNK = 64  # steps whose records are sorted by length together


class EpochBatches(Sampler[list[int]]):
    """The batches of record indices of one process.

    The order of an epoch depends on ``seed`` and the epoch alone. It is cut into steps of ``batch_size * world_size *
    accumulation`` records; a step takes the same records however that product is made up, so two processes train on
    what one would. Every record comes once an epoch, also where the last step is short: its rows are shared out, and
    a process that gets none has an empty batch, so that all processes have as many batches.

    Args:
        source: the records; sizes and shards are used, nothing is read.
        batch_size: rows of a batch of one process.
        rank, world_size: this process, and how many there are.
        accumulation: batches of one optimizer step.
        seed: of the order.
        shuffle: False for the order of the source.
        group_by_length: rows of a step are of like length, which saves padding. Lengths are those of the records'
            text, in bytes: an image has the same number of tokens in every row.
        window: shards are shuffled, and then the records within so many that follow each other, so that a tar file is
            read nearly in order, and what was read ahead is used. A record of a JSON file is a shard of its own.
        drop_last: leave out the records of a last short step.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        source: RecordSource,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        group_by_length: bool = False,
        window: int = WINDOW,
        drop_last: bool = False,
    ) -> None:
        numbers = {"batch_size": batch_size, "world_size": world_size, "accumulation": accumulation, "window": window}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} with world_size={world_size}, got {rank}")
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        self._sizes, self._shards = source.sizes, source.shards
        self._seed, self._shuffle, self._by_length, self._window = seed, shuffle, group_by_length, window
        self._batch, self._step = batch_size * world_size, batch_size * world_size * accumulation  # of all processes
        total = len(self._sizes)
        self._used = total // self._step * self._step if drop_last else total
        if not self._used:
            raise ValueError(f"drop_last: expected at least {self._step} records, a whole step, got {total}")

    def __len__(self) -> int:
        """Batches of an epoch, the same for every process."""
        return -(-self._used // self._batch)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for start in range(0, self._used, self._batch):
            yield order[start : min(start + self._batch, self._used)][self.rank :: self.world_size].tolist()

    def order(self) -> np.ndarray:
        """The records of the epoch as all processes together take them, int64."""
        # Of NumPy's generators this is the one whose numbers never change with its version.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self._seed, self.epoch))))
        order = self._shuffled(random) if self._shuffle else np.arange(len(self._sizes))
        return self._grouped(order, random) if self._by_length else order

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on, for a checkpoint; the position is the trainer's own."""
        names = ("_seed", "_shuffle", "_by_length", "_window", "_step", "_used")
        settings = {name[1:]: getattr(self, name) for name in names}
        return settings | {"records": len(self._sizes), "sizes": zlib.crc32(self._sizes.astype("<i8").tobytes())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where a checkpoint's position means other records than it did."""
        for name, value in self.state_dict().items():
            if state.get(name) != value:
                raise ValueError(
                    f"data: expected {_MEANING[name]} to be as in the checkpoint, {state.get(name)}, to resume in the "
                    f"same order; got {value}"
                )

    def _shuffled(self, random: np.random.RandomState) -> np.ndarray:
        shard = random.permutation(len(self._shards))
        sizes = np.diff(self._shards, append=len(self._sizes))[shard]
        first = self._shards[shard] - (sizes.cumsum() - sizes)
        order = np.repeat(first, sizes) + np.arange(len(self._sizes))
        for start in range(0, len(order), self._window):
            random.shuffle(order[start : start + self._window])
        return order

    def _grouped(self, order: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Sort by length within some steps' records, then shuffle these steps."""
        whole = len(order) // self._step * self._step  # a short step stays last
        parts = []
        for start in range(0, whole, self._step * _CHUNK):
            chunk = order[start : min(start + self._step * _CHUNK, whole)]
            chunk = chunk[np.argsort(self._sizes[chunk], kind="stable")].reshape(-1, self._step)
            parts.append(chunk[random.permutation(len(chunk))].ravel() if self._shuffle else chunk.ravel())
        return np.concatenate([*parts, order[whole:]])


_MEANING = {
    "seed": "the seed",
    "shuffle": "shuffle",
    "by_length": "group_by_length",
    "window": "window",
    "step": "the records of a step (batch size x processes x accumulation)",
    "used": "the number of records used",
    "records": "the number of records",
    "sizes": "the records (a checksum of their sizes)",
}
