"""Rows to a batch for the model, and batches of an epoch to a loader for the trainer.

Rows are padded on the right to the longest; that is small, it is ids. With ``packed`` the batch says where its tokens
are, and the model's decoder computes these alone. Without, ``attn_implementation="flashsloth"`` makes a token index of
the mask, so attention never sees the padding, but the layers between do;
:class:`~flashsloth.data.order.EpochBatches` with ``group_by_length`` keeps it small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flashsloth.data.broken import BatchReport, Skipped
from flashsloth.data.llava import LlavaDataset, Sample
from flashsloth.data.order import EpochBatches
from flashsloth.encoding import pad_rows

REPORT = "report"
# What training rounds the tokens of a batch up to, where there is padding. oneDNN makes a kernel for each new shape and
# keeps it: with another number every time, memory grew by 10 to 20 MB a step.
PACKED_MULTIPLE = 256


class Collator:
    """Makes ``input_ids``, ``attention_mask``, ``labels`` int64 ``(B, L)``, ``question_spans`` int64 ``(B, G, 2)`` and
    ``pixel_values`` float32 ``(images, tiles, 3, S, S)``, for the rows that have one; and ``report``, a
    :class:`~flashsloth.data.broken.BatchReport`, to be taken out before the model (:func:`take_report`).

    A batch of which nothing can be used is one blank row, so that every process takes part in every step. It adds
    nothing to the loss when that is a sum over tokens divided by their number in the whole step, as Trainer has it.

    Args:
        pad_token_id: fills rows up.
        blank: the blank row, :meth:`~flashsloth.data.llava.LlavaDataset.blank`.
        always_image: add the blank row to a batch without any image, for several processes: FSDP's gather the weights
            of vision tower, pooling and queries together, and DDP waits for the gradients of all, unless it looks for
            those that are not used (Trainer has it look where nothing is checkpointed).
        pad_to_multiple_of: round the length up, for tensor cores.
        packed: add ``token_rows`` int64 ``(T,)``, the places of the tokens in the flattened ``input_ids``, and
            ``cu_seqlens`` int32 ``(B + 1,)``, where the rows begin among them. For
            ``attn_implementation="flashsloth"``.
        packed_multiple: round T up, by tokens of padding behind rows as far as there are any: they change no result,
            and a number of tokens that comes again needs no new kernels from libraries that make them by shape.
    """

    def __init__(
        self,
        pad_token_id: int,
        blank: Sample,
        *,
        always_image: bool = False,
        pad_to_multiple_of: int | None = None,
        packed: bool = False,
        packed_multiple: int = 1,
    ) -> None:
        if blank.pixel_values is None:
            raise ValueError("blank: expected a row with an image, got one without")
        self.pad_token_id, self.blank = pad_token_id, blank
        self.always_image, self.pad_to_multiple_of = always_image, pad_to_multiple_of
        self.packed, self.packed_multiple = packed, packed_multiple

    @classmethod
    def of(cls, dataset: LlavaDataset, **options: Any) -> Collator:
        """The collator for a data set's rows."""
        return cls(dataset.processor.tokenizer.pad_token_id, dataset.blank(), **options)

    def __call__(self, items: Sequence[Sample | Skipped]) -> dict[str, Any]:
        samples = [item for item in items if isinstance(item, Sample)]
        skipped = tuple(item for item in items if isinstance(item, Skipped))
        used = len(samples)
        if not samples or (self.always_image and all(sample.pixel_values is None for sample in samples)):
            samples.append(self.blank)
        arrays = pad_rows(
            [sample.row for sample in samples],
            self.pad_token_id,
            "right",
            labels=True,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        images = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        if images:
            batch["pixel_values"] = torch.from_numpy(np.stack(images))
        if self.packed:
            mask = _rounded(batch["attention_mask"], self.packed_multiple)
            batch["token_rows"] = mask.flatten().nonzero().flatten()
            batch["cu_seqlens"] = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        tokens = sum(len(sample.row.ids) for sample in samples[:used])
        cut = sum(sample.cut > 0 for sample in samples)
        batch[REPORT] = BatchReport(len(items), skipped, cut, tokens, batch["input_ids"].numel() - tokens)
        return batch


def _rounded(mask: Tensor, multiple: int) -> Tensor:
    """``mask`` ``(B, L)`` of rows padded on the right, and as much of their padding as makes its sum a multiple."""
    flat = mask.flatten().bool()
    missing = -int(flat.sum()) % multiple
    if not missing:
        return mask
    # Of all rows the first place of padding, then the second: what is taken of a row always follows its tokens.
    behind = torch.where(mask.bool(), mask.shape[1], (1 - mask).cumsum(1)).flatten()
    chosen = behind.argsort(stable=True)[:missing]
    flat[chosen] = True
    return flat.view_as(mask).to(mask.dtype)


def take_report(batch: dict[str, Any]) -> BatchReport | None:
    """Removes and returns the report of a batch; None where it was taken before."""
    report: BatchReport | None = batch.pop(REPORT, None)
    return report


class TrainingLoader(DataLoader):
    """The batches of one process, decoded by ``workers`` processes of its own.

    It is for ``Trainer.get_train_dataloader`` as it is: it knows its rank, so ``accelerator.prepare`` must not share
    its batches out again. Trainer tells it the epoch, and on resuming skips by index: no skipped image is read.

    Args:
        batches: batches of indices that know their rank and have ``set_epoch``, EpochBatches say.
        workers: processes that read and decode; 0 for none.
        pin_memory: page-locked tensors, for a GPU.
    """

    def __init__(
        self,
        dataset: Dataset[Sample | Skipped],
        batches: EpochBatches | Sampler[list[int]],
        collator: Collator,
        *,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(0),  # else each epoch would draw from the trainer's random numbers
        )

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each epoch."""
        batches: Any = self.batch_sampler
        batches.set_epoch(epoch)
