"""No speedup without a right result: every provider is compared with fp64 before it is timed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.case import Case, Inputs, Outputs, Provider, Size, callable_of, why_missing, widened
from flashsloth_ops.backend import BackendError

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float64: 2.0**-53}

# How far a peer may be from fp64, of the largest value: it need only compute the same thing, by whatever formula.
PEER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-12}


class Verdict(NamedTuple):
    """The output of a provider that is worst against what is allowed: its error, the allowance, the failure if any.

    ``missing``: why there is nothing to judge.
    """

    max_error: float | None
    allowed: float | None
    failure: str | None = None
    missing: str | None = None


def run_checks(case: Case, inputs: Inputs, device: str, dtype: torch.dtype, size: Size) -> dict[str, Verdict]:
    """Verdicts on all providers of a case, each over all of its outputs (and gradients, in that mode).

    Ours must keep the project's error rule: against fp64 at most twice the error of the plain provider, plus two
    units in the last place of the largest value, plus what a case states for values stored on the way. Peers are held
    to :data:`PEER_TOLERANCE`; a ratio against a peer that computes something else would mean nothing. One of ours that
    raises has failed; a peer that raises is missing.
    """
    exact = _outputs(case, Provider("exact", case.exact), widened(inputs), inputs)
    plain = _outputs(case, case.provider(case.plain), inputs, inputs)
    found = {}
    for provider in case.providers:
        reason = why_missing(case, provider, device, dtype, size)
        if reason is not None:
            found[provider.name] = Verdict(None, None, missing=reason)
        else:
            found[provider.name] = _verdict(case, provider, inputs, exact, plain)
    return found


def _outputs(case: Case, provider: Provider, inputs: Inputs, given: Inputs) -> Outputs:
    outputs = callable_of(case, provider, inputs)()
    return outputs if case.compared is None else case.compared(outputs, given)


def _verdict(case: Case, provider: Provider, inputs: Inputs, exact: Outputs, plain: Outputs) -> Verdict:
    try:
        outputs = _outputs(case, provider, inputs, inputs)
    except BackendError as error:
        return Verdict(None, None, missing=str(error).rpartition("cannot serve it: ")[2])
    except Exception as error:  # whatever a peer's package raises
        reason = f"raised {type(error).__name__}: {first_line(error)}"
        return Verdict(None, None, failure=reason) if provider.ours else Verdict(None, None, missing=reason)
    if not outputs:
        return Verdict(None, None, "gave no output")
    found = [
        verdict(name, value, exact[name], plain[name] if provider.ours else None, case.stored)
        for name, value in outputs.items()
    ]
    failed = [one for one in found if one.failure]
    return failed[0] if failed else max(found, key=lambda one: (one.max_error or 0) / max(one.allowed or 0, 1e-300))


def verdict(name: str, value: Tensor, exact: Tensor, plain: Tensor | None, stored: float = 0.0) -> Verdict:
    """Compare one output with fp64: by the error rule where ``plain`` is given, else by the tolerance of peers."""
    if value.shape != exact.shape:
        return Verdict(None, None, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(value.shape)}")
    if exact.numel() == 0:
        return Verdict(0.0, 0.0)
    largest = exact.abs().max().item()
    error = (value.double() - exact).abs().max().item()
    if plain is None:
        allowed = PEER_TOLERANCE[value.dtype] * largest
    else:
        allowed = 2 * (plain.double() - exact).abs().max().item() + (4 * EPS[value.dtype] + stored) * largest
    good = error <= allowed  # false for a NaN
    failure = None if good else f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return Verdict(error if error == error else None, allowed, failure)


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a table."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]
