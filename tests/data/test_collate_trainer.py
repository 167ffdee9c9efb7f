"""Batches in transformers' Trainer: resumed training is training that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from flashsloth.data.broken import BrokenLog, TooManyBroken
from flashsloth.data.collate import Collator, TrainingLoader, take_report
from flashsloth.data.llava import LlavaDataset
from flashsloth.data.order import EpochBatches
from flashsloth.tiny import random_model, tiny_config
from tests.data.llava_cases import dataset_of, write_folder

pytest.importorskip("accelerate")


class Watched(Trainer):
    """The least that a trainer has to do: its own loader, and the reports to the log."""

    def __init__(self, dataset: LlavaDataset, log: BrokenLog, **arguments: Any) -> None:
        torch.manual_seed(0)
        model = random_model(tiny_config())
        model.set_attn_implementation("flashsloth")
        settings = TrainingArguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        )
        super().__init__(model, settings, train_dataset=dataset)
        self.broken, self.losses, self.read = log, [], []

    def get_train_dataloader(self) -> TrainingLoader:
        arguments, dataset = self.args, self.train_dataset
        batches = EpochBatches(
            dataset.source,
            arguments.per_device_train_batch_size,
            rank=arguments.process_index,
            world_size=arguments.world_size,
            accumulation=arguments.gradient_accumulation_steps,
            seed=arguments.seed,
        )
        return TrainingLoader(dataset, batches, Collator.of(dataset, packed=True))

    def _prepare_inputs(self, inputs: Any) -> Any:
        report = take_report(inputs)
        if report is not None:
            self.broken.add(report)
        return super()._prepare_inputs(inputs)

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        self.losses.append(loss.item())
        return loss


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LlavaDataset:
    """23 records, 12 batches of at most 2 an epoch; one picture is missing."""
    folder = tmp_path_factory.mktemp("data")
    records = write_folder(folder, 23)
    (folder / "3.png").unlink()
    return dataset_of(folder, records)


def test_resuming_gives_the_same_losses(dataset: LlavaDataset, tmp_path: Path) -> None:
    """Bit for bit, from within either epoch, with dropout; and the counts go on."""
    log = BrokenLog(tmp_path / "broken.jsonl", limit=0.1)
    whole = Watched(dataset, log, output_dir=str(tmp_path), save_strategy="steps", save_steps=4)
    whole.train()
    assert (len(whole.losses), whole.state.global_step) == (24, 12)
    assert (log.seen, log.skipped, len(log.listed)) == (46, 2, 1)
    for step in (4, 8):
        resumed = Watched(dataset, BrokenLog(limit=1.0), output_dir=str(tmp_path / "resumed"), save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.losses == whole.losses[2 * step :]
    assert resumed.broken.seen == 15  # the second epoch without the four batches of two that came before


def test_too_many_broken_records_stop_training(dataset: LlavaDataset, tmp_path: Path) -> None:
    trainer = Watched(dataset, BrokenLog(limit=0.001, minimum=100), output_dir=str(tmp_path), save_strategy="no")
    with pytest.raises(TooManyBroken, match=r"the first is train\.json\[3\]: no such image"):
        trainer.train()
