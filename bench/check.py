"""No speedup without a right result: every provider is compared with fp64 before it is timed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.case import Case, Inputs, Outputs, Provider, callable_of, widened

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float64: 2.0**-53}

# How far a peer may be from fp64, of the largest value: it need only compute the same thing, by whatever formula.
PEER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-12}


class Verdict(NamedTuple):
    """The output of a provider that is worst against what is allowed: its error, the allowance, the failure if any."""

    max_error: float
    allowed: float
    failure: str | None


def run_checks(case: Case, inputs: Inputs) -> dict[str, Verdict]:
    """Verdicts on all providers of a case, each over all of its outputs (and gradients, in that mode).

    Ours must keep the project's error rule: against fp64 at most twice the error of the plain provider, plus two
    units in the last place of the largest value. Peers are held to :data:`PEER_TOLERANCE`; a ratio against a peer that
    computes something else would mean nothing. A provider that raises has failed.
    """
    exact = _outputs(case, Provider("exact", case.exact), widened(inputs))
    plain = _outputs(case, case.provider(case.plain), inputs)
    return {provider.name: _verdict(case, provider, inputs, exact, plain) for provider in case.providers}


def _outputs(case: Case, provider: Provider, inputs: Inputs) -> Outputs:
    outputs = callable_of(case, provider, inputs)()
    return outputs if case.compared is None else case.compared(outputs, inputs)


def _verdict(case: Case, provider: Provider, inputs: Inputs, exact: Outputs, plain: Outputs) -> Verdict:
    try:
        outputs = _outputs(case, provider, inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        return Verdict(float("nan"), 0.0, f"raised {type(error).__name__}: {error}")
    if not outputs:
        return Verdict(float("nan"), 0.0, "gave no output")
    found = [
        verdict(name, value, exact[name], plain[name] if provider.ours else None) for name, value in outputs.items()
    ]
    failed = [one for one in found if one.failure]
    return failed[0] if failed else max(found, key=lambda one: one.max_error / max(one.allowed, 1e-300))


def verdict(name: str, value: Tensor, exact: Tensor, plain: Tensor | None) -> Verdict:
    """Compare one output with fp64: by the error rule where ``plain`` is given, else by the tolerance of peers."""
    if value.shape != exact.shape:
        return Verdict(float("nan"), 0.0, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(value.shape)}")
    if exact.numel() == 0:
        return Verdict(0.0, 0.0, None)
    largest = exact.abs().max().item()
    error = (value.double() - exact).abs().max().item()
    if plain is None:
        allowed = PEER_TOLERANCE[value.dtype] * largest
    else:
        allowed = 2 * (plain.double() - exact).abs().max().item() + 4 * EPS[value.dtype] * largest
    # Written so that a NaN fails.
    good = error <= allowed
    return Verdict(error, allowed, None if good else f"{name}: error {error:.3g}, allowed {allowed:.3g}")
