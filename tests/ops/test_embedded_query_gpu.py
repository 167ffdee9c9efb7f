"""embedded_query_attention on a GPU: full size, lengths beside the tiles, repeats, CUDA graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsloth_ops import EmbeddedQueryParams, ImageState, embedded_query_attention
from tests.ops.query_cases import attend, check_errors, each_dtype, make
from tests.support import CUDA, TRITON, Place, gradients

GPUS = (*TRITON[1:], *CUDA)
FULL: dict[str, int] = {"queries": 9, "heads": 32, "model": 2560, "inner": 576, "dim": 1152}


@pytest.mark.parametrize(("place", "dtype"), each_dtype(GPUS))
@pytest.mark.parametrize(
    ("batch", "images", "tokens", "text"), [(1, 1, 729, 64), (8, 8, 729, 32), (6, 2, 729, 100), (2, 2, 3645, 32)]
)
def test_error_rule_at_full_size(
    place: Place, dtype: torch.dtype, batch: int, images: int, tokens: int, text: int
) -> None:
    lengths = torch.tensor([text, 3, 0, text - 1, 17, 1, text, 30][:batch]).clamp(max=text)
    inputs = make(batch, images, tokens, text=text, dtype=dtype, **FULL)
    run = partial(attend, heads=32, text_lengths=lengths, return_weights=True)
    check_errors(run, [inputs], dtype, place, place.device)


@pytest.mark.parametrize("place", GPUS)
@pytest.mark.parametrize("tokens", [1, 31, 64, 65, 127, 300])
def test_token_counts_beside_the_tiles(place: Place, tokens: int) -> None:
    sizes: dict[str, int] = {"queries": 5, "model": 70, "inner": 72, "dim": 104}
    draws = [make(3, 1, tokens, text=9, dtype=torch.float16, seed=seed, **sizes) for seed in range(4)]
    run = partial(attend, text_lengths=torch.tensor([9, 0, 4]), return_weights=True)
    check_errors(run, draws, torch.float16, place, place.device)


@pytest.mark.parametrize("place", GPUS)
def test_repeats_are_bitwise_equal(place: Place) -> None:
    inputs = make(2, 2, 729, text=32, dtype=torch.bfloat16, **FULL)
    with place:
        out, grads = gradients(partial(attend, heads=32), inputs, device=place.device)
        for _ in range(3):
            again, again_grads = gradients(partial(attend, heads=32), inputs, device=place.device)
            assert torch.equal(out[0], again[0])
            assert all(torch.equal(a, b) for a, b in zip(grads, again_grads, strict=True))


@pytest.mark.parametrize("place", GPUS)
@pytest.mark.parametrize("batch", [1, 4])
def test_captured_in_a_graph(place: Place, batch: int) -> None:
    """Forward and backward replay with new data and new text lengths: the host reads no value and waits for none."""
    first, second = (
        [t.to(place.device) for t in make(batch, 1, 729, text=40, dtype=torch.bfloat16, seed=seed, **FULL)]
        for seed in (0, 1)
    )
    lengths = [torch.tensor(n[:batch], device=place.device) for n in ([40, 0, 7, 39], [3, 40, 1, 0])]

    def run(inputs: list[Tensor], text_lengths: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        params = EmbeddedQueryParams(*leaves[3:])
        options: dict[str, Any] = {"num_heads": 32, "text_lengths": text_lengths}
        state = ImageState.from_image(leaves[2], params)
        out = embedded_query_attention(*leaves[:3], params, image_state=state, **options)
        assert isinstance(out, Tensor)
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    with place:
        want = run(second, lengths[1])
        static, static_lengths = [t.clone() for t in first], lengths[0].clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels compile before the capture
            run(static, static_lengths)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(static, static_lengths)
    for to, new in zip(static, second, strict=True):
        to.copy_(new)
    static_lengths.copy_(lengths[1])
    graph.replay()
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b)
