"""What a kernel is launched with: measured on this GPU if it was, else a heuristic; a search only on request."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable

import torch

from flashsloth_ops import measured
from flashsloth_ops.backend import BackendError

Config = dict[str, int]  # block sizes, num_warps and num_stages, by the names the kernel and the launch give them


def choose(
    kernel: str,
    key: str,
    device: torch.device,
    heuristic: Config,
    space: Callable[[], Iterable[Config]],
    run: Callable[[Config], object],
) -> Config:
    """The configuration of one launch.

    Args:
        kernel: name of the kernel, as in ``configs/<gpu>.json``.
        key: what the best configuration depends on: dtype, feature sizes, and lengths in buckets (:func:`bucket`), so
            that a new length does not ask for a new search.
        device: of the tensors.
        heuristic: what an unmeasured GPU gets.
        space: the candidates, few; called under ``FLASHSLOTH_AUTOTUNE=1`` only.
        run: launches the kernel with a candidate, on tensors it may overwrite.

    A stored configuration that names other parameters than the heuristic is of another version of the kernel, and is
    passed over.
    """
    if device.type != "cuda":
        return heuristic
    gpu = torch.cuda.get_device_name(device)
    found = measured.config(gpu, kernel, key)
    if found is not None and found.keys() != heuristic.keys():
        found = None
    if found is None and AUTOTUNE and not torch.cuda.is_current_stream_capturing():
        found = _search(heuristic, space(), run)
        measured.keep(gpu, kernel, key, found)
    return heuristic if found is None else found


AUTOTUNE = os.environ.get("FLASHSLOTH_AUTOTUNE", "0") not in ("", "0")


def bucket(length: int) -> int:
    """The next power of two: lengths that are tuned together."""
    return 1 << max(length - 1, 0).bit_length()


def _search(heuristic: Config, space: Iterable[Config], run: Callable[[Config], object]) -> Config:
    """The fastest of the heuristic and the candidates. One that needs more than this GPU has is passed over."""
    best, least = heuristic, math.inf
    for candidate in (heuristic, *(c for c in space if c != heuristic)):
        try:
            time = _milliseconds(lambda c=candidate: run(c))  # type: ignore[misc]
        except BackendError:
            continue
        if time < least:
            best, least = candidate, time
    return best


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    median: float = do_bench(run, warmup=5, rep=20, return_mode="median")
    return median
