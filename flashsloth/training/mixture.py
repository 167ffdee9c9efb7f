"""Several sources as one data set, also where images of one are five tiles and of another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from flashsloth.data.broken import Skipped
from flashsloth.data.llava import LlavaDataset, Sample
from flashsloth.data.order import EpochBatches
from flashsloth.data.records import JoinedRecords, RecordSource, open_records
from flashsloth.processing import FlashSlothProcessor
from flashsloth.training.config import TrainConfig
from flashsloth.training.stages import STAGES


class Mixture(Dataset[Sample | Skipped]):
    """The sources of a configuration, one behind the other.

    Args:
        config: its ``data``, ``stage``, ``max_length`` and ``seed``.
        processor: of the model.
        max_length: tokens of a row.

    Raises:
        ValueError, FileNotFoundError: sources that cannot be opened.
    """

    def __init__(self, config: TrainConfig, processor: FlashSlothProcessor, max_length: int | None) -> None:
        self.parts: list[LlavaDataset] = []
        self.hd: list[bool] = []
        # A batch has one number of tiles, so records are kept apart by it: HD or not -> parts.
        self.kinds: dict[bool, list[int]] = {}
        for i, source in enumerate(config.data):
            images = None if source.images is None else list(source.images)
            try:
                opened = open_records(list(source.records), images)
            except ValueError as error:
                raise ValueError(f"data.{i}: {error}") from error
            captions = STAGES[config.stage].captions if source.captions is None else source.captions
            hd = processor.image_processor.image_hd if source.image_hd is None else source.image_hd
            joined = opened if source.repeat == 1 else JoinedRecords([opened] * source.repeat)
            part = LlavaDataset(joined, processor, captions=captions, max_length=max_length, image_hd=hd)
            self.kinds.setdefault(hd, []).append(len(self.parts))
            self.parts.append(part)
            self.hd.append(hd)
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Sample | Skipped:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return replace(self.parts[part][index - int(self.starts[part])], index=index)

    def blank(self) -> Sample:
        """See :meth:`~flashsloth.data.llava.LlavaDataset.blank`."""
        return self.parts[0].blank()

    def batches(self, batch_size: int, accumulation: int, **options: Any) -> EpochBatches | MixedBatches:
        """The order of an epoch; ``options`` are those of :class:`~flashsloth.data.order.EpochBatches`."""
        orders = []
        for parts in self.kinds.values():
            sources: list[RecordSource] = [self.parts[i].source for i in parts]
            joined = sources[0] if len(sources) == 1 else JoinedRecords(sources)
            order = EpochBatches(joined, batch_size, accumulation=accumulation, **options)
            places = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in parts])
            orders.append((places, order))
        return orders[0][1] if len(orders) == 1 else MixedBatches(orders, accumulation, options.get("seed", 0))


class MixedBatches(Sampler[list[int]]):
    """Steps of several orders, each step of one of them, in an order that depends on seed and epoch alone.

    So every step takes the same records however batch size, processes and accumulation make it up, as within one
    order; and a batch has images of one kind.

    Args:
        orders: for each kind, the index in the data set of each of its records, int64, and the order of these.
        accumulation: batches of one optimizer step.
        seed: of the order of steps.
    """

    def __init__(self, orders: Sequence[tuple[np.ndarray, EpochBatches]], accumulation: int, seed: int) -> None:
        self.orders, self.accumulation, self.seed, self.epoch = list(orders), accumulation, seed, 0

    def __len__(self) -> int:
        """Batches of an epoch; a kind's last, short step is filled up with empty ones."""
        return sum(self._steps(order) for _, order in self.orders) * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        for _, order in self.orders:
            order.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        kinds = np.repeat(np.arange(len(self.orders)), [self._steps(order) for _, order in self.orders])
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self.seed, self.epoch, 1))))
        random.shuffle(kinds)
        running = [iter(order) for _, order in self.orders]
        for kind in kinds:
            places = self.orders[kind][0]
            for _ in range(self.accumulation):
                yield [int(places[i]) for i in next(running[kind], [])]

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on, for a checkpoint."""
        return {str(i): order.state_dict() for i, (_, order) in enumerate(self.orders)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where a checkpoint's position means other records than it did."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"data: expected sources of {len(self.orders)} numbers of tiles, as in the configuration, got a "
                "checkpoint with others"
            )
        for i, (_, order) in enumerate(self.orders):
            order.load_state_dict(state[str(i)])

    def _steps(self, order: EpochBatches) -> int:
        return -(-len(order) // self.accumulation)
