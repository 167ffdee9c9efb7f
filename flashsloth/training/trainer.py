"""transformers' Trainer on packed batches, with checkpoints that are whole and a run that resumes exactly."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from flashsloth.data.broken import BrokenLog, Skipped
from flashsloth.data.collate import PACKED_MULTIPLE, Collator, TrainingLoader, take_report
from flashsloth.files import write_json
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor
from flashsloth.training import checkpoints
from flashsloth.training.checkpoints import CheckpointError
from flashsloth.training.config import Lora
from flashsloth.training.lora import add_up
from flashsloth.training.mixture import Mixture
from flashsloth.training.muon import Muon, matrices_of_layers
from flashsloth.training.progress import Progress, peak_memory

_DATA, _RUN = "data_{}.json", "run.json"


class Diverged(ValueError):
    """The loss is no number any more."""


class FlashSlothTrainer(Trainer):
    """Trains what has gradients in ``model``.

    Args:
        model: with ``attn_implementation="flashsloth"``.
        arguments: of transformers.
        data: the records.
        broken: counts those that cannot be used; one for each process.
        run: JSON values that a checkpoint keeps, and that must be as they were to resume.
        muon: learning rate of Muon for the matrices of layers; None trains them by AdamW, like all else.

    Attributes:
        resumed_at: the step this run went on from, 0 for one from the start.

    Raises:
        ValueError: several GPUs without torchrun, FSDP or DeepSpeed where nothing would be sharded, Muon where it is.
    """

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        arguments: TrainingArguments,
        data: Mixture,
        broken: BrokenLog,
        run: dict[str, Any] | None = None,
        *,
        muon: float | None = None,
    ) -> None:
        if arguments.n_gpu > 1:
            raise ValueError(
                f"{arguments.n_gpu} GPUs: expected one process for each, `torchrun --nproc-per-node "
                f"{arguments.n_gpu} -m flashsloth.cli train ...`, or one in CUDA_VISIBLE_DEVICES, got one process"
            )
        self.out, self.broken, self.run = Path(str(arguments.output_dir)), broken, run or {}
        self.resumed_at, self.muon = 0, muon
        self._staging: Path | None = None
        self._tokens, self._since = 0, time.monotonic()
        batches = data.batches(
            arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps,
            rank=arguments.process_index,
            world_size=arguments.world_size,
            seed=arguments.seed,
            drop_last=arguments.dataloader_drop_last,
        )
        self.batches = batches
        tokenizer = data.parts[0].processor.tokenizer
        collator = Collator(
            tokenizer.pad_token_id,
            data.blank(),
            always_image=arguments.world_size > 1,
            packed=True,
            packed_multiple=PACKED_MULTIPLE,
        )
        self._loader = TrainingLoader(
            data,
            batches,
            collator,
            workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory and arguments.device.type == "cuda",
        )
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model, arguments, train_dataset=data)
        if use_cache is None:  # Trainer leaves its own word in what is saved
            del model.config.use_cache
        else:
            model.config.use_cache = use_cache
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(Progress(self.out, bar=not arguments.disable_tqdm))
        self.add_callback(_EpochEnd(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Also refuses what would not be as asked: on CPUs, for one, accelerate shards nothing and says nothing."""
        super().create_accelerator_and_postprocess()
        arguments = self.args
        for name, enabled in (("fsdp", self.is_fsdp_enabled), ("deepspeed", self.is_deepspeed_enabled)):
            if getattr(arguments, name) and not enabled:
                raise ValueError(
                    f"arguments.{name}: expected a process for each GPU, by torchrun, as nothing is sharded elsewhere, "
                    f"got {arguments.world_size} on {arguments.device.type}"
                )
        if self.muon is not None and self._sharded:
            raise ValueError("muon: expected whole matrices, got FSDP or DeepSpeed, which shard them")

    @property
    def _sharded(self) -> bool:
        """Whether a process holds a part of the weights, which all save and load together."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # ------------------------------------------------------------ batches

    def get_train_dataloader(self) -> TrainingLoader:
        return self._loader

    def _prepare_inputs(self, inputs: Any) -> Any:
        report = take_report(inputs)
        if report is not None:
            self.broken.add(report)
            self._tokens += report.tokens
        return super()._prepare_inputs(inputs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Tokens to be learned in the whole step; one where there is none, as nothing over nothing is no number."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count.clamp(min=1) if isinstance(count, Tensor) else count

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers' rule knows nothing of images and of parts that are not trained."""
        return 0

    # ------------------------------------------------------------ optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.muon is not None and not isinstance(optimizer, Muon):
            arguments = self.args
            trained = self.model if model is None else model
            assert trained is not None
            self.optimizer = optimizer = Muon(
                matrices_of_layers(trained),
                [{name: group[name] for name in ("params", "weight_decay")} for group in optimizer.param_groups],
                muon_lr=self.muon,
                bf16=arguments.bf16,
                weight_decay=arguments.weight_decay,
                lr=arguments.learning_rate,
                betas=(arguments.adam_beta1, arguments.adam_beta2),
                eps=arguments.adam_epsilon,
            )
        return optimizer

    # ------------------------------------------------------------ log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.pop("total_flos", None)
        if "loss" in logs:
            self._check_finite(logs["loss"])
            now = time.monotonic()
            tokens = self._sum(self._tokens)
            logs["tokens_per_second"] = round(tokens / max(now - self._since, 1e-9), 1)
            logs["memory_gib"] = round(peak_memory(self.args.device), 3)
            skipped = self._sum(self.broken.skipped)
            if skipped:
                logs["skipped"] = skipped
            self._tokens, self._since = 0, now
        super().log(logs, start_time)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at step {self.state.global_step}: a smaller learning rate, a longer warmup or "
                "bf16 instead of fp16 may help; the last checkpoint is from before"
            )

    def _sum(self, value: int) -> int:
        """Over all processes."""
        if self.args.world_size == 1:
            return value
        mine = torch.tensor([value], device=self.args.device)
        total: Tensor = self.accelerator.gather(mine)
        return int(total.sum())

    # ------------------------------------------------------------ checkpoints

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ``resume_from_checkpoint`` is a directory."""
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            self._resume_data(checkpoint)
            self.resumed_at = checkpoints.step_of(checkpoint)
            if self._finished(checkpoint):
                return None
        self._tokens, self._since = 0, time.monotonic()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_final(self, processor: FlashSlothProcessor, lora: Lora | None = None) -> None:
        """The model and its processor in ``out``, as a checkpoint directory like any other; ``lora`` is added up."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if lora is not None and self.args.should_save:
            state = add_up(state, lora)
        if self.args.should_save:
            model: Any = self.accelerator.unwrap_model(self.model_wrapped)
            try:
                processor.save_pretrained(self.out)
                model.save_pretrained(self.out, state_dict=state)
            except Exception as error:
                checkpoints.fail(error, self.out, "the trained model")
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any = None) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written to a hidden directory, by all processes, then moved by the first."""
        step = self.state.global_step
        self._check_finite(float(self._tr_loss))
        name, staging = f"checkpoint-{step}", self.out / checkpoints.STAGING
        failed: Exception | None = None
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._staging = staging
            super()._save_checkpoint(model, trial)
            state = {"order": self.batches.state_dict(), "broken": self.broken.state_dict()}
            write_json(staging / name / _DATA.format(self.args.process_index), state)
            if self.args.should_save:
                write_json(staging / name / _RUN, self.run)
        except Exception as error:
            failed = error
        finally:
            self._staging = None
        self._stop_if(failed, step)
        try:
            if self.args.should_save:
                checkpoints.finish(staging / name, self.out / name)
                checkpoints.keep_newest(self.out, self.args.save_total_limit)
                shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            failed = error
        self._stop_if(failed, step)

    def _stop_if(self, failed: Exception | None, step: int) -> None:
        """Raise on every process where one failed: the others would wait for it."""
        # Others may still put shards together, and a sum would be taken for a part of that. torchrun ends them.
        at_once = failed is not None and self._sharded
        if not at_once and not self._sum(int(failed is not None)):
            return
        if self.args.should_save:
            shutil.rmtree(self.out / checkpoints.STAGING, ignore_errors=True)
        if failed is None:
            raise CheckpointError(f"checkpoint of step {step}: another process could not write its part")
        checkpoints.fail(failed, self.out, f"checkpoint of step {step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:  # transformers would go on with a warning where a name is missing
            target: Any = self.model if model is None else model
            checkpoints.load_weights(target, Path(resume_from_checkpoint))

    def _finished(self, checkpoint: Path) -> bool:
        """Whether it is the last of its run, whose weights are then loaded: transformers would go one step too far."""
        *_, steps = self.set_initial_training_values(self.args, self._loader)
        if self.resumed_at < steps:
            return False
        if self._sharded:
            raise ValueError(f"--resume: expected a run that is not finished, got {checkpoint} of {steps} steps")
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._load_from_checkpoint(str(checkpoint))
        return True

    def _resume_data(self, checkpoint: Path) -> None:
        was = checkpoints.read_json(checkpoint / _RUN)
        for key in sorted(was.keys() | self.run.keys()):
            if was.get(key) != self.run.get(key):
                raise ValueError(
                    f"{key}: expected {was.get(key)!r}, as in {checkpoint}, to resume it, got {self.run.get(key)!r}"
                )
        files = sorted(checkpoint.glob(_DATA.format("*")))
        states = [checkpoints.read_json(file) for file in files]
        if not states:
            raise CheckpointError(f"{checkpoint}: expected {_DATA.format(0)}, got none")
        self.batches.load_state_dict(states[0]["order"])
        if len(states) == self.args.world_size:
            mine = checkpoints.read_json(checkpoint / _DATA.format(self.args.process_index))
            self.broken.load_state_dict(mine["broken"])
        elif self.args.process_index == 0:  # another number of processes: the first one takes over all counts
            self.broken.load_state_dict(_joined([state["broken"] for state in states]))


class _EpochEnd(TrainerCallback):
    """An epoch has seen every record, so the share of broken ones counts however few there are."""

    def __init__(self, trainer: FlashSlothTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch is not None and state.epoch == int(state.epoch):
            self.trainer.broken.end_epoch()


def _joined(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several processes as those of one."""
    joined: dict[str, Any] = {name: sum(state[name] for state in states) for name in states[0] if name in _COUNTS}
    reasons: dict[str, int] = {}
    for state in states:
        for reason, count in state["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    listed = {Skipped(**one).index: one for state in states for one in state["listed"]}
    return {**joined, "reasons": reasons, "listed": list(listed.values())}


_COUNTS = ("seen", "cut", "tokens", "padding")
