"""What a kernel is launched with: measured on this GPU if it was, else a heuristic; a search only on request."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch

from flashsloth_ops import measured

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
    """
    if device.type != "cuda":
        return heuristic
    gpu = torch.cuda.get_device_name(device)
    found = measured.config(gpu, kernel, key)
    if found is None and AUTOTUNE and not torch.cuda.is_current_stream_capturing():
        found = _search(heuristic, space(), run)
        measured.keep(gpu, kernel, key, found)
    return heuristic if found is None else found


AUTOTUNE = os.environ.get("FLASHSLOTH_AUTOTUNE", "0") not in ("", "0")


def bucket(length: int) -> int:
    """The next power of two: lengths that are tuned together."""
    return 1 << max(length - 1, 0).bit_length()


def _search(heuristic: Config, space: Iterable[Config], run: Callable[[Config], object]) -> Config:
    from triton.testing import do_bench

    best, least = heuristic, do_bench(lambda: run(heuristic), warmup=5, rep=20, return_mode="median")
    for candidate in space:
        try:
            time = do_bench(lambda c=candidate: run(c), warmup=5, rep=20, return_mode="median")
        except RuntimeError:  # more shared memory or registers than this GPU has
            continue
        if time < least:
            best, least = candidate, time
    return best
