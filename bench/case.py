"""What a benchmark case is: inputs, providers that compute the same from them, what is exact, what must be reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Mode = Literal["forward", "forward+backward", "memory"]
Inputs = dict[str, Any]
Outputs = dict[str, Tensor]
Size = Mapping[str, int]

OURS = "flashsloth"


@dataclass(frozen=True)
class Provider:
    """One way to compute the outputs of a case.

    Attributes:
        name: as it is shown and stored.
        run: inputs to outputs by name; what is timed.
        prepare: what the user of this provider has at hand before the call (a dense mask, an image's state). Its
            result is given to ``run``; its time does not count.
        ours: held to the error rule of the project; the others are peers.
    """

    name: str
    run: Callable[[Inputs], Outputs]
    prepare: Callable[[Inputs], Inputs] | None = None
    ours: bool = False


class Goal(NamedTuple):
    """What a provider must reach.

    ``speedup``: time of ``peer`` over ours, ``at_least``. ``overhead``: our time over that of ``peer``, ``at_most``.
    ``kept``: bytes that stay for backward besides inputs over those of ``peer``, a tensor of the case, ``at_most``.
    """

    kind: Literal["speedup", "overhead", "kept"]
    peer: str
    at_least: float | None = None
    at_most: float | None = None
    provider: str = OURS

    def reached(self, value: float) -> bool:
        """Whether a measured value satisfies the goal."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def text(self) -> str:
        return f"≥ {self.at_least:.3g}" if self.at_least is not None else f"≤ {self.at_most:.3g}"


class Work(NamedTuple):
    """What any implementation of a case must do: multiply-adds count two flops; bytes are read or written once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """A case, declared once for the timer, the tests and pytest-benchmark.

    Attributes:
        name: ``<op>/<what>``, what ``--case`` matches.
        op: the op in the backend table.
        title: as the table shows it.
        mode: forward in inference mode; forward and gradients of all of ``differentiable``; memory kept for backward.
        size, small: dimensions as they are measured, and small ones on which the same code is tested.
        inputs: makes them for a size, in fp32, from a seeded generator.
        work: flops and bytes for a size and mode.
        providers: ours first.
        exact: the outputs in fp64, from inputs in fp64, by a plain path.
        plain: name of the provider whose error sets what is allowed; see :mod:`bench.check`.
        goals: what must be reached; a peer without a goal is measured too.
        differentiable: inputs (names) whose gradients are taken.
        compared: the part of the outputs that is defined, for the check; None for all of it.
        kept_peer: bytes of the tensor that ``kept`` goals compare with, for a size.
    """

    name: str
    op: str
    title: str
    mode: Mode
    size: Size
    small: Size
    inputs: Callable[[Size], Inputs]
    work: Callable[[Size], Work]
    providers: tuple[Provider, ...]
    exact: Callable[[Inputs], Outputs]
    plain: str
    goals: tuple[Goal, ...]
    differentiable: tuple[str, ...] = ()
    compared: Callable[[Outputs, Inputs], Outputs] | None = None
    kept_peer: Callable[[Size], int] | None = None

    def provider(self, name: str) -> Provider:
        """The provider of that name."""
        return next(provider for provider in self.providers if provider.name == name)

    def with_goals_only(self) -> Case:
        """The same case without peers that no goal names."""
        wanted = {self.plain, *(goal.peer for goal in self.goals)}
        return replace(self, providers=tuple(p for p in self.providers if p.ours or p.name in wanted))


def prepared(provider: Provider, inputs: Inputs) -> Inputs:
    """The inputs of this provider's ``run``."""
    return inputs if provider.prepare is None else provider.prepare(inputs)


def forward(provider: Provider, inputs: Inputs) -> Callable[[], Outputs]:
    """A call of the provider as inference makes it."""

    @torch.inference_mode()
    def call() -> Outputs:
        return provider.run(inputs)

    return call


def forward_backward(provider: Provider, inputs: Inputs, differentiable: tuple[str, ...]) -> Callable[[], Outputs]:
    """A call that returns the outputs and, as ``d<input>``, the gradients of a fixed random functional of them."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in differentiable}
    inputs = {**inputs, **leaves}
    cotangents: dict[str, Tensor] = {}

    def call() -> Outputs:
        outputs = provider.run(inputs)
        if not cotangents:
            generator = torch.Generator().manual_seed(7)
            for name, value in outputs.items():
                cotangents[name] = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(cotangents.values()))
        found = {name: value.detach() for name, value in outputs.items()}
        return found | {f"d{name}": value for name, value in zip(leaves, gradients, strict=True)}

    return call


def callable_of(case: Case, provider: Provider, inputs: Inputs) -> Callable[[], Outputs]:
    """The call that is timed, prepared, in the mode of the case."""
    if case.mode == "forward":
        with torch.inference_mode():
            inputs = prepared(provider, inputs)
        return forward(provider, inputs)
    return forward_backward(provider, prepared(provider, inputs), case.differentiable)


def kept_bytes(case: Case, provider: Provider, inputs: Inputs) -> int:
    """Bytes of the tensors autograd keeps between forward and backward, without the inputs. Storage counts once."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in case.differentiable}
    given = {t.untyped_storage().data_ptr() for t in (inputs | leaves).values() if isinstance(t, Tensor)}
    kept: list[Tensor] = []  # holds them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = provider.run(prepared(provider, inputs | leaves))
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del outputs
    return sum(size for address, size in sizes.items() if address not in given)


def widened(value: Any) -> Any:
    """The same inputs in fp64, through dicts and named tuples."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: widened(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [widened(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
