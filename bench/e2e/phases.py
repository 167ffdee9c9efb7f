"""Times and memory of one model at one resolution and batch: the first token in its parts, the answer, a training step.

A forward pass is timed whole and told apart by marks at the borders of its parts, so that vision, compression and
prefill add up to the time to the first token. On a GPU a mark is an event behind the kernels queued so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.e2e.flops import ANSWER, COMPRESSION, DECODE, FIRST_TOKEN, PREFILL, VISION
from bench.e2e.memory import choose_trained
from bench.e2e.models import Model, Parts, Request

IGNORED = -100  # a label that is not learned


class HostClock:
    """Marks by the host's clock, for work that is done when a call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def settle(self) -> None:
        """Wait for all work that was started."""


class EventClock:
    """Marks by CUDA events. Between two of them pass the kernels, and the host's time where a kernel waits for it."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def settle(self) -> None:
        torch.cuda.synchronize()


class Meter:
    """Most bytes of the GPU's allocator above ``base``, which is what was in use before the model: weights count."""

    def __init__(self, base: int) -> None:
        self.base = base

    def restart(self) -> None:
        """Forget peaks that were reached so far."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Since the last restart."""
        return torch.cuda.max_memory_allocated() - self.base


class Rounds(NamedTuple):
    """Seconds to spend on one kind of measurement, and bounds on its rounds."""

    budget: float
    least: int
    most: int


def repeat(once: Callable[[], dict[str, float]], rounds: Rounds) -> dict[str, list[float]]:
    """Warm up with one call, then collect what each further one gives."""
    once()
    found: dict[str, list[float]] = {}
    begin = time.perf_counter()
    for done in range(rounds.most):
        if done >= rounds.least and time.perf_counter() - begin >= rounds.budget:
            break
        for name, value in once().items():
            found.setdefault(name, []).append(value)
    return found


@contextmanager
def borders(parts: Parts, mark: Callable[[str], None]) -> Iterator[None]:
    """Calls ``mark`` with the name of the part that just ended: the tower's, then that of what compresses."""
    ends = parts.tower_end.register_forward_hook(lambda *_: mark(VISION))
    starts = parts.language.register_forward_pre_hook(lambda *_: mark(COMPRESSION))
    try:
        yield
    finally:
        ends.remove()
        starts.remove()


@contextmanager
def prompts_seen(parts: Parts) -> Iterator[list[int]]:
    """Collects how many positions a row has in each call of the language model."""
    seen: list[int] = []

    def note(module: nn.Module, arguments: Any, given: dict[str, Any]) -> None:
        seen.append(given["inputs_embeds"].shape[1])

    handle = parts.language.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@torch.inference_mode()
def first_token(built: Any, parts: Parts, request: Request, clock: Any) -> dict[str, float]:
    """Seconds from processed inputs on the device to the logits of the first token, and of its parts."""
    marks: dict[str, Any] = {}

    def mark(name: str) -> None:
        marks[name] = clock.mark()

    clock.settle()
    start = clock.mark()
    with borders(parts, mark):
        built(**request, use_cache=True, logits_to_keep=1)
    end = clock.mark()
    clock.settle()
    return {
        VISION: clock.seconds(start, marks[VISION]),
        COMPRESSION: clock.seconds(marks[VISION], marks[COMPRESSION]),
        PREFILL: clock.seconds(marks[COMPRESSION], end),
        FIRST_TOKEN: clock.seconds(start, end),
    }


@torch.inference_mode()
def answer(built: Any, request: Request, new_tokens: int, clock: Any) -> dict[str, float]:
    """Seconds of a whole request through ``generate``, greedily, and of one of its steps after the first token.

    Raises:
        RuntimeError: the answer has another length than was asked for.
    """
    ends: list[Any] = []
    handle = built.register_forward_hook(lambda *_: ends.append(clock.mark()))
    clock.settle()
    start = clock.mark()
    try:
        ids = built.generate(**request, max_new_tokens=new_tokens, do_sample=False)
    finally:
        handle.remove()
    end = clock.mark()
    clock.settle()
    made = ids.shape[1] - request["input_ids"].shape[1]
    if (made, len(ends)) != (new_tokens, new_tokens):
        raise RuntimeError(f"answer: expected {new_tokens} tokens in as many passes, got {made} in {len(ends)}")
    return {DECODE: clock.seconds(ends[0], ends[-1]) / (new_tokens - 1), ANSWER: clock.seconds(start, end)}


@torch.inference_mode()
def inference_peaks(built: Any, parts: Parts, request: Request, new_tokens: int, meter: Any) -> dict[str, int]:
    """Most bytes in use in each phase of a request, weights included."""
    found: dict[str, int] = {}

    def mark(name: str) -> None:
        found[name] = meter.peak()
        meter.restart()

    meter.restart()
    with borders(parts, mark):
        built(**request, use_cache=True, logits_to_keep=1)
    mark(PREFILL)
    found[FIRST_TOKEN] = max(found.values())
    before: list[int] = []

    def note(*_: Any) -> None:
        if not before:
            before.append(meter.peak())
            meter.restart()

    handle = built.register_forward_hook(note)
    meter.restart()
    try:
        built.generate(**request, max_new_tokens=new_tokens, do_sample=False)
    finally:
        handle.remove()
    found[DECODE] = meter.peak()
    found[ANSWER] = max(before[0], found[DECODE])
    return found


class Training:
    """Steps of one stage. The learning rate is zero: a step costs what it costs, and the weights stay as they were.

    In ``with``; then no gradient and no moment of the optimizer is left behind.
    """

    def __init__(self, model: Model, built: Any, request: Request, stage: str) -> None:
        self.stage, self.built, self.request = stage, built, request
        choose_trained(built, model.parts(built), stage)
        ids = request["input_ids"]
        placeholders = [built.config.image_token_id] + ([built.config.learnable_token_id] if model.ours else [])
        self.labels = ids.masked_fill(torch.isin(ids, torch.tensor(placeholders, device=ids.device)), IGNORED)
        trained = [p for p in built.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=ids.is_cuda or None)

    def __enter__(self) -> Training:
        self.built.train()
        return self

    def __exit__(self, *error: object) -> None:
        self.built.eval()
        self.optimizer.state.clear()
        self.built.zero_grad(set_to_none=True)
        self.built.requires_grad_(False)

    def loss(self) -> Tensor:
        """Forward, with logits at every position."""
        loss = self.built(**self.request, labels=self.labels, use_cache=False).loss
        assert isinstance(loss, Tensor)
        return loss

    def step(self) -> None:
        """Forward, backward and AdamW."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def time(self, clock: Any) -> dict[str, float]:
        """Seconds of one step."""
        clock.settle()
        start = clock.mark()
        self.step()
        end = clock.mark()
        clock.settle()
        return {self.stage: clock.seconds(start, end)}

    def peak(self, meter: Any) -> int:
        """Most bytes in use in a step, weights, gradients and moments included."""
        meter.restart()
        self.step()
        return int(meter.peak())

    def kept_bytes(self) -> int:
        """Bytes that autograd keeps between forward and backward, without the parameters. Storage counts once."""
        given = {p.untyped_storage().data_ptr() for p in self.built.parameters()}
        kept: list[Tensor] = []  # holds them, so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        del loss
        return sum(size for address, size in sizes.items() if address not in given)


def choose_attention(built: Any, candidates: tuple[str, ...], seconds: Callable[[], float]) -> str:
    """The fastest of the attention implementations, set on the model; one that raises is out, unless all do.

    ``seconds`` runs and times the model once.
    """
    if len(candidates) == 1:
        built.set_attn_implementation(candidates[0])
        return candidates[0]
    found: dict[str, float] = {}
    for name in candidates:
        try:
            built.set_attn_implementation(name)
            found[name] = min(seconds() for _ in range(3))
        except (RuntimeError, ValueError, ImportError):
            if name == candidates[-1] and not found:
                raise
    best = min(found, key=lambda name: found[name])
    built.set_attn_implementation(best)
    return best
