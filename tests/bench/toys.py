"""A case that is no op: twice x, right, wrong or slow, for tests of the suite itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.case import Case, Goal, Inputs, Outputs, Provider, Work
from bench.runner import Effort

FAST = Effort(0.05, 3, 5)
NAME = "flashsloth/cpu"


def toy(run: Callable[[Inputs], Outputs], **changes: Any) -> Case:
    """``run`` is ours, on a CPU; "sum" is the plain path and "slow" takes 5 ms."""
    case = Case(
        name="toy/double",
        op="spatial_pool",
        title="toy",
        mode="forward",
        sizes=({"rows": 8},),
        small={"rows": 4},
        inputs=lambda size: {"x": torch.randn(size["rows"], 16, generator=torch.Generator().manual_seed(0))},
        work=lambda size: Work(1.0, 1.0),
        providers=(
            Provider(NAME, run, ours=True, backend="cpu"),
            Provider("sum", lambda given: {"y": given["x"] + given["x"]}),
            Provider("slow", slow),
        ),
        exact=lambda given: {"y": 2 * given["x"]},
        plain="sum",
        goals=(Goal("cpu", "speedup", 3.0, ("slow",)), Goal("cpu", "speedup", 1e6, ("sum",))),
        devices=("cpu",),
    )
    return replace(case, **changes)


def slow(given: Inputs) -> Outputs:
    time.sleep(0.005)
    return {"y": given["x"] * 2}


def right(given: Inputs) -> Outputs:
    return {"y": given["x"] * 2}


def wrong(given: Inputs) -> Outputs:
    return {"y": given["x"] * 2.001}


def raises(given: Inputs) -> Outputs:
    raise RuntimeError("kernel lost its way")
