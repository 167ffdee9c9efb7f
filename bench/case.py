"""What a benchmark case is: inputs, providers that compute the same from them, what is exact, what must be reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flashsloth_ops import backend, use_backend

Mode = Literal["forward", "forward+backward"]
Inputs = dict[str, Any]
Outputs = dict[str, Tensor]
Size = Mapping[str, int]

OURS = "flashsloth"
DTYPES: Mapping[str, torch.dtype] = {"cpu": torch.float32, "cuda": torch.bfloat16}  # as each kind of device is used
OUR_BACKENDS: Mapping[str, str] = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # backend: device it is made for


@dataclass(frozen=True)
class Provider:
    """One way to compute the outputs of a case.

    Attributes:
        name: as it is shown and stored.
        run: inputs to outputs by name; what is timed.
        prepare: what the user of this provider has at hand before the call (a dense mask, an image's state). Its
            result is given to ``run``; its time does not count.
        ours: held to the error rule of the project; the others are peers.
        variant: which use of our op it is ("state reused"), where a case has several; goals name it.
        backend: the backend of ours.
        missing: why it cannot run on a device at a size, None where it can: a package that is not installed, a
            matrix that does not fit.
        timed: False for a path that only the check needs.
    """

    name: str
    run: Callable[[Inputs], Outputs]
    prepare: Callable[[Inputs], Inputs] | None = None
    ours: bool = False
    variant: str = ""
    backend: str = ""
    missing: Callable[[str, Size], str | None] = lambda device, size: None
    timed: bool = True


def ours(
    run: Callable[[Inputs], Outputs],
    variant: str = "",
    prepare: Callable[[Inputs], Inputs] | None = None,
    *,
    reference: bool = True,
) -> tuple[Provider, ...]:
    """Our op by each of its backends, and by the reference, which is slow: a curve goes without."""

    def forced(name: str, device: str | None) -> Provider:
        def call(given: Inputs) -> Outputs:
            with use_backend(name):
                return run(given)

        def before(given: Inputs) -> Inputs:
            assert prepare is not None
            with use_backend(name):
                return prepare(given)

        def missing(on: str, size: Size) -> str | None:
            return None if device in (on, None) else f"made for {device} tensors"

        label = f"{OURS}/{name}" + (f", {variant}" if variant else "")
        return Provider(label, call, before if prepare else None, True, variant, name, missing)

    found = {**OUR_BACKENDS, "reference": None} if reference else OUR_BACKENDS
    return tuple(forced(name, device) for name, device in found.items())


def compiled(run: Callable[[Inputs], Outputs], name: str = "torch.compile") -> Provider:
    """A plain path through torch.compile, compiled at its first call."""
    found: list[Callable[[Inputs], Outputs]] = []

    def call(given: Inputs) -> Outputs:
        if not found:
            found.append(torch.compile(run, fullgraph=True, dynamic=False))
        return found[0](given)

    return Provider(name, call)


@dataclass(frozen=True)
class Goal:
    """What the fastest of our backends must reach on a kind of device.

    ``speedup``: time of the fastest of ``peers`` over ours, at least. ``overhead``: ours over the fastest of ``peers``,
    at most. ``seconds``: our time, at most. ``share``: of the measured limit, at least. ``kept``: bytes that stay for
    backward over the case's ``kept_unit``, at most. Peers may be ours, in another variant: then of the same backend.

    ``variant``: of ours, see :class:`Provider`. ``size``: entries a size must have, for a goal of one point of a curve.
    """

    device: str
    kind: Literal["speedup", "overhead", "seconds", "share", "kept"]
    limit: float
    peers: tuple[str, ...] = ()
    variant: str = ""
    size: Size = field(default_factory=dict)

    def reached(self, value: float) -> bool:
        """Whether a measured value satisfies the goal."""
        return value >= self.limit if self.kind in ("speedup", "share") else value <= self.limit


class Work(NamedTuple):
    """What any implementation of a case must do: multiply-adds count two flops; elements are read or written once.

    Of ``elements``, ``bytes`` follow from the dtype.
    """

    flops: float
    elements: float


@dataclass(frozen=True)
class Case:
    """A case, declared once for every device, for the timer, the tests and pytest-benchmark.

    Attributes:
        name: ``<op>/<what>``, what ``--case`` matches.
        op: the op in the backend table; another name for a case of a whole model, in which all of them run.
        title: as tables show it.
        mode: forward in inference mode; or forward and the gradients of all of ``differentiable``, with the memory
            kept in between.
        sizes: dimensions as they are measured; the points of a curve, where there are several.
        small: on which the same code is tested.
        inputs: makes them for a size, in fp32 on a CPU, from a seeded generator.
        work: flops and elements for a size.
        providers: ours first.
        exact: the outputs in fp64, from inputs in fp64, by a plain path.
        plain: name of the provider whose error sets what is allowed; see :mod:`bench.check`.
        goals: what must be reached; a peer without a goal is measured too.
        devices: kinds of device it is measured on.
        axis: the entry of a size along which a curve runs, empty where there is one size. Points of a curve that differ
            in another entry belong to other lines.
        differentiable: inputs (names) whose gradients are taken; ``params.up_weight`` is a field of a named tuple.
        compared: the part of the outputs that is defined, for the check; None for all of it.
        kept_unit: elements of the tensor that ``kept`` goals compare with, for a size.
        stored: the relative error from rounding what ours store on the way and the plain provider does not.
    """

    name: str
    op: str
    title: str
    mode: Mode
    sizes: tuple[Size, ...]
    small: Size
    inputs: Callable[[Size], Inputs]
    work: Callable[[Size], Work]
    providers: tuple[Provider, ...]
    exact: Callable[[Inputs], Outputs]
    plain: str
    goals: tuple[Goal, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    axis: str = ""
    differentiable: tuple[str, ...] = ()
    compared: Callable[[Outputs, Inputs], Outputs] | None = None
    kept_unit: Callable[[Size], int] | None = None
    stored: float = 0.0

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops in the backend table that run in it."""
        return (self.op,) if self.op in backend.OPS else backend.OPS

    def provider(self, name: str) -> Provider:
        """The provider of that name."""
        return next(provider for provider in self.providers if provider.name == name)

    def goals_on(self, device: str, size: Size) -> tuple[Goal, ...]:
        """The goals of a size on a kind of device."""
        return tuple(g for g in self.goals if g.device == device and g.size.items() <= size.items())

    def only(self, names: Callable[[Provider], bool]) -> Case:
        """The same case with fewer providers; what the check needs stays, untimed."""
        kept = tuple(
            p if names(p) else replace(p, timed=False) for p in self.providers if names(p) or p.name == self.plain
        )
        return replace(self, providers=kept)

    def for_goals(self, device: str) -> Case:
        """The same case without the reference and without peers that no goal of this device names."""
        named = {self.plain, *(peer for goal in self.goals if goal.device == device for peer in goal.peers)}
        return self.only(lambda p: p.name in named or (p.ours and p.backend != "reference"))


def moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    """Inputs on a device, floating-point tensors in ``dtype``, through dicts and (named) tuples."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [moved(item, device, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def widened(value: Any) -> Any:
    """The same inputs in fp64 where they lie, through dicts and (named) tuples."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: widened(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [widened(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def forward(provider: Provider, inputs: Inputs) -> Callable[[], Outputs]:
    """A call of the provider as inference makes it."""

    @torch.inference_mode()
    def call() -> Outputs:
        return provider.run(inputs)

    return call


def with_leaves(inputs: Inputs, differentiable: tuple[str, ...]) -> tuple[Inputs, dict[str, Tensor]]:
    """The inputs with fresh leaves for what is differentiable, and those leaves by name."""
    inputs, leaves = dict(inputs), {}
    for name in differentiable:
        outer, _, field = name.partition(".")
        value = getattr(inputs[outer], field) if field else inputs[outer]
        leaves[name] = value.detach().clone().requires_grad_()
        inputs[outer] = inputs[outer]._replace(**{field: leaves[name]}) if field else leaves[name]
    return inputs, leaves


def forward_backward(provider: Provider, inputs: Inputs, differentiable: tuple[str, ...]) -> Callable[[], Outputs]:
    """A call that returns the outputs and, as ``d<input>``, the gradients of a fixed random functional of them."""
    inputs, leaves = with_leaves(inputs, differentiable)
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


def prepared(provider: Provider, inputs: Inputs) -> Inputs:
    """The inputs of this provider's ``run``."""
    return inputs if provider.prepare is None else provider.prepare(inputs)


def callable_of(case: Case, provider: Provider, inputs: Inputs) -> Callable[[], Outputs]:
    """The call that is timed, prepared, in the mode of the case."""
    if case.mode == "forward":
        with torch.inference_mode():
            inputs = prepared(provider, inputs)
        return forward(provider, inputs)
    return forward_backward(provider, prepared(provider, inputs), case.differentiable)


def why_missing(case: Case, provider: Provider, device: str, dtype: torch.dtype, size: Size) -> str | None:
    """Why a provider cannot run, as far as that is known without a call."""
    reason = provider.missing(device, size)
    if reason is None and provider.ours:
        for op in case.ops:
            rule = next(r for r in backend.RULES if (r.op, r.backend) == (op, provider.backend))
            reason = reason or rule.why_not(device, dtype, head_dim=size.get("head_dim", 0), batch=size.get("batch", 0))
    return reason
