"""The instructions of the CUDA kernels against NumPy: emulated on the CPU, and on a GPU where there is one.

What passes in both places proves the emulator's reading of each instruction. Emulated runs repeat with shuffled
threads; mistakes that a GPU would punish by wrong numbers or a hang must be named.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator import build

CASES = [build.EMULATOR / name for name in ("cases.cu", "cases_sm80.cu", "cases_sm90.cu", "cases_wgmma.cu")]
EMULATED_LIBRARY = build.ROOT / "build" / "emulated_cases" / "cases.so"
GPU_LIBRARY = build.ROOT / "build" / "gpu_cases" / "cases.so"


class Cases:
    """The compiled cases of one place; ``run`` copies arrays in and, changed, out."""

    def __init__(self, library: Path, emulated: bool) -> None:
        self.emulated = emulated
        self.function = ctypes.CDLL(str(library)).run_case
        self.function.restype = ctypes.c_char_p

    def run(self, name: str, *arrays: np.ndarray, numbers: tuple[int, ...] = ()) -> None:
        assert all(array.flags.c_contiguous for array in arrays)
        error = self.function(
            name.encode(),
            (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays)),
            (ctypes.c_int64 * len(arrays))(*(array.nbytes for array in arrays)),
            len(arrays),
            (ctypes.c_int * max(1, len(numbers)))(*numbers),
        )
        if error is not None:
            raise RuntimeError(error.decode())


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def built(compile: Callable[[Path, Sequence[Path]], None], library: Path) -> Path:
    """The library, compiled where its sources changed; skips the test where a tool is missing."""
    try:
        compile(library, CASES)
    except SystemExit as missing:
        pytest.skip(str(missing))
    return library


@pytest.fixture(scope="session")
def emulated_cases() -> Cases:
    return Cases(built(build.build, EMULATED_LIBRARY), emulated=True)


@pytest.fixture(scope="session")
def device_cases() -> Cases:
    return Cases(built(build.build_for_gpu, GPU_LIBRARY), emulated=False)


EMULATED = [pytest.param(seed, id=f"seed{seed}") for seed in range(4)]
DEVICE = pytest.param(
    "gpu",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")],
    id="gpu",
)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set in the C library's environment too, which is what the emulator reads."""
    os.environ["FLASHSLOTH_EMULATE_SEED"] = str(seed)
    try:
        yield
    finally:
        del os.environ["FLASHSLOTH_EMULATE_SEED"]


@pytest.fixture(params=[*EMULATED, DEVICE])
def cases(request: pytest.FixtureRequest) -> Iterator[Cases]:
    """Every place: the emulator in natural and in shuffled order, and the GPU."""
    if request.param == "gpu":
        yield request.getfixturevalue("device_cases")
        return
    emulated = request.getfixturevalue("emulated_cases")
    with seeded(request.param):
        yield emulated


@pytest.fixture
def hopper(cases: Cases) -> Cases:
    if not cases.emulated and capability() != 90:
        pytest.skip("needs compute capability 9.0")
    return cases


RANDOM = np.random.default_rng(20)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, dtype=np.float32)


def nan(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def packed(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The 16-bit patterns of x rounded to the dtype, and what they stand for, in fp64."""
    t = torch.from_numpy(x).to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    return t.view(torch.int16).numpy().copy(), t.double().numpy()


def assert_close(got: np.ndarray, want: np.ndarray, scale: float = 1.0) -> None:
    """Within fp32 accumulation of the exact products: 2^-18 of the largest result, times ``scale``."""
    assert np.isfinite(got).all(), f"{np.count_nonzero(~np.isfinite(got))} of {got.size} are not finite"
    error, largest = np.abs(got - want).max(), np.abs(want).max()
    assert error <= scale * largest * 2.0**-18, f"error {error:.3g}, largest {largest:.3g}"


# ---- sm_80 ----


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_loaded_tiles(cases: Cases, dtype: str, transposed: bool) -> None:
    c = nan(64, 64)
    (a, exact_a), (b, exact_b) = packed(normal(64, 64), dtype), packed(normal(64, 64), dtype)
    cases.run(f"product_{dtype}" + "_trans" * transposed, c, a, b)
    assert_close(c, exact_a @ (exact_b if transposed else exact_b.T))


def test_load_matrices(cases: Cases) -> None:
    tiles = RANDOM.integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    out = np.zeros((2, 4, 32, 2), np.uint16)
    cases.run("load_matrices", out, tiles)
    np.testing.assert_array_equal(out[0].reshape(4, 8, 8), tiles)
    np.testing.assert_array_equal(out[1].reshape(4, 8, 8), tiles.transpose(0, 2, 1))


def test_tf32(cases: Cases) -> None:
    a, b, c = normal(16, 64), normal(64, 8), nan(16, 8)
    cases.run("product_tf32", c, a, b)
    cut_a, cut_b = ((x.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32).astype(np.float64) for x in (a, b))
    assert_close(c, cut_a @ cut_b)
    cases.run("product_3xtf32", c, a, b)
    assert_close(c, a.astype(np.float64) @ b)


def test_numbers(cases: Cases) -> None:
    x = np.concatenate([normal(250) * 20, np.array([0, -0.0, 1, -140, -126, 127], np.float32)])
    out = nan(4, 256)
    cases.run("numbers", out, x, numbers=(256,))
    np.testing.assert_array_equal(out[0], packed(x, "bf16")[1])
    np.testing.assert_array_equal(out[1], packed(x, "fp16")[1])
    powers = np.exp2(x.astype(np.float64))
    np.testing.assert_allclose(out[2], np.where(powers < 2.0**-126, 0, powers), rtol=2.0**-21)
    bits = x.view(np.uint32)
    np.testing.assert_array_equal(out[3], ((bits + np.uint32(0x1000)) & ~np.uint32(0x1FFF)).view(np.float32))


def test_reductions(cases: Cases) -> None:
    x, out = normal(9, 32), nan(7, 9, 32)
    cases.run("reductions", out, x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(out[0], np.broadcast_to(wide.sum(1, keepdims=True), x.shape), atol=1e-5)
    np.testing.assert_array_equal(out[1], np.broadcast_to(x.max(1, keepdims=True), x.shape))
    fours = np.repeat(wide.reshape(9, 8, 4).sum(2), 4, axis=1)
    np.testing.assert_allclose(out[2], fours, atol=1e-5)
    np.testing.assert_allclose(out[3], wide.cumsum(1), atol=1e-5)
    np.testing.assert_array_equal(out[4], np.broadcast_to((x > 0).sum(1, keepdims=True), x.shape))
    lanes = np.arange(32)
    np.testing.assert_array_equal(out[5], x[:, np.where(lanes % 8 + 3 < 8, lanes + 3, lanes)])
    np.testing.assert_array_equal(out[6], x[:, lanes // 2])


@pytest.mark.parametrize("n", [4, 512, 10_000])
def test_the_last_block_reduces(cases: Cases, n: int) -> None:
    x, out, counter = normal(n), np.zeros(1, np.float32), np.zeros(1, np.uint32)
    cases.run("split_sum", out, nan((n + 511) // 512, 4), counter, x, numbers=(n,))
    np.testing.assert_allclose(out[0], 3 * x.astype(np.float64).sum(), atol=1e-3)
    assert counter[0] == 0


def test_blocks_that_wait_for_blocks(cases: Cases) -> None:
    x, out, counter = normal(100), nan(100), np.zeros(1, np.uint32)
    cases.run("chain", out, counter, x, numbers=(100,))
    np.testing.assert_allclose(out, x.astype(np.float64).cumsum(), atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 7, 32])
def test_named_barriers(cases: Cases, rows: int) -> None:
    x, out = normal(rows, 32), nan(rows, 32)
    cases.run("pipeline", out, x, numbers=(rows,))
    np.testing.assert_array_equal(out, 2 * x)


@pytest.mark.parametrize("threads", [32, 128])
def test_barriers(cases: Cases, threads: int) -> None:
    x, out = normal(threads), nan(threads)
    cases.run("hand_on", out, x, numbers=(threads, 5))
    np.testing.assert_array_equal(out, np.roll(x, 5))


def test_dependent_launches(cases: Cases) -> None:
    x, middle, out = normal(256), nan(256), nan(256)
    cases.run("add_one_twice", out, middle, x)
    np.testing.assert_array_equal(out, (x + np.float32(1)) + np.float32(1))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "grid is too large"),
        (1, "1 to 1024 threads"),
        (2, "too much shared memory: the device allows"),
        (3, "divides the grid"),
        (4, "grid is empty"),
    ],
)
def test_launches_are_checked(cases: Cases, number: int, words: str) -> None:
    with pytest.raises(RuntimeError, match=words) as raised:
        cases.run("limits", numbers=(number,))
    assert re.match(r"limits: .*\(grid \d+ x \d+ x \d+, block \d+ x 1 x 1, \d+ bytes", str(raised.value))


# ---- sm_90 ----


def check_wgmma(cases: Cases, name: str, columns: int, dtype: str) -> None:
    c = nan(64, columns)
    (a, exact_a), (b, exact_b) = packed(normal(64, 64), dtype), packed(normal(columns, 64), dtype)
    cases.run(name, c, a, b)
    assert_close(c, exact_a @ exact_b.T)


@pytest.mark.parametrize("swizzle", [128, 64, 32, 16])
@pytest.mark.parametrize("majors", ["kk", "km", "mk", "mm"])
def test_wgmma_layouts(hopper: Cases, swizzle: int, majors: str) -> None:
    check_wgmma(hopper, f"wgmma_{swizzle}_{majors}", 64 if majors[0] == "k" else 128, "bf16")


@pytest.mark.parametrize("columns", [8, 16, 32, 64, 72, 80, 96, 128, 144, 160, 192, 256])
def test_wgmma_widths(hopper: Cases, columns: int) -> None:
    check_wgmma(hopper, f"wgmma_width_{columns}", columns, "bf16")


@pytest.mark.parametrize("columns", [16, 32, 64, 80, 96, 128, 144, 160, 192, 256])
def test_wgmma_from_registers(hopper: Cases, columns: int) -> None:
    check_wgmma(hopper, f"wgmma_mn_width_{columns}", columns, "fp16")


def test_wgmma_columns_past_a_swizzled_row(hopper: Cases) -> None:
    check_wgmma(hopper, "wgmma_width_72_columns", 72, "bf16")
    check_wgmma(hopper, "wgmma_registers_k", 80, "fp16")


@pytest.mark.parametrize(("m", "k"), [(64, 64), (150, 320)])
def test_tma_feeds_wgmma(hopper: Cases, m: int, k: int) -> None:
    c = nan(m, 128)
    (a, exact_a), (b, exact_b) = packed(normal(m, k), "bf16"), packed(normal(k, 128), "bf16")
    hopper.run("tma_product", c, a, b, numbers=(m, k))
    assert_close(c, exact_a @ exact_b)


BOXES = {
    "boxes2": ((40, 20), (8, 4), (36, -2), 3, 16),
    "boxes3": ((24, 10, 6), (12, 3, 4), (4, 8, 3), -3, 16),
    "boxes4": ((8, 5, 4, 3), (8, 3, 2, 2), (-4, 1, 3, 1), 0, 16),
    "boxes2_128": ((64, 30), (32, 16), (32, 18), -2, 128),
    "boxes2_64": ((64, 30), (16, 16), (-3, -1), 1, 64),
    "boxes3_32": ((24, 10, 6), (8, 5, 4), (20, 7, 4), -4, 32),
}


@pytest.mark.parametrize("name", BOXES)
def test_tma_boxes(hopper: Cases, name: str) -> None:
    """A box that hangs over the edges: zeros come in, and only what is inside goes out, swizzled alike."""
    sizes, box, at, shift, width = BOXES[name]
    x, out, raw = normal(*sizes[::-1]), nan(*sizes[::-1]), nan(int(np.prod(box)))
    hopper.run(name, raw, out, x, numbers=(*sizes, *box, *at, shift))
    margin = 16
    wide = np.pad(x, margin)
    cut = wide[tuple(slice(margin + a, margin + a + n) for a, n in zip(at[::-1], box[::-1], strict=True))]
    offsets = np.arange(0, cut.size * 4, 4)
    want = np.empty(cut.size, np.float32)
    want[(offsets ^ ((offsets >> 7 & (width // 16 - 1)) << 4)) // 4] = cut.ravel()
    np.testing.assert_array_equal(raw, want)
    if name == "boxes4":
        return
    target = np.pad(nan(*sizes[::-1]), margin)
    region = [(margin + a + shift, n) for a, n in zip(at[::-1], box[::-1], strict=True)]
    target[tuple(slice(start, start + n) for start, n in region)] = cut
    np.testing.assert_array_equal(out, target[tuple(slice(margin, -margin) for _ in sizes)])


def test_copies_arrive_at_barriers(hopper: Cases) -> None:
    x, out = normal(2, 512), nan(2, 8, 128)
    hopper.run("arriving_copies", out, x)
    want = np.concatenate([x.reshape(2, 4, 128)] * 2, axis=1)[:, :, ::-1]
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_clusters(hopper: Cases, size: int) -> None:
    x, out = normal(3, size, 128), nan(3, size, 128)
    hopper.run("cluster_sum", out, x, numbers=(size,))
    want = np.broadcast_to(x.astype(np.float64).sum(1, keepdims=True), x.shape)
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_multicast(hopper: Cases) -> None:
    x, out = normal(256), nan(2, 256)
    hopper.run("multicast", out, x)
    np.testing.assert_array_equal(out, np.stack([x, x]))


def test_refused_tensor_map(hopper: Cases) -> None:
    with pytest.raises(RuntimeError, match=r"refused .*sizes \(8, 32\), strides \(20\) bytes, box \(8, 32\)"):
        hopper.run("refused_map", normal(256))


# ---- Mistakes, emulated alone ----


@pytest.mark.parametrize("seed", [0, 1])
def test_a_missing_wait_is_a_wrong_result(emulated_cases: Cases, seed: int) -> None:
    c = nan(64, 64)
    a, b = packed(normal(64, 64), "bf16")[0], packed(normal(64, 64), "bf16")[0]
    with seeded(seed):
        emulated_cases.run("product_without_wait", c, a, b)
    assert np.isnan(c).all()


@pytest.mark.parametrize("threads", [32, 128])
@pytest.mark.parametrize("left_out", ["write", "read"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_missing_barrier_is_a_wrong_result(emulated_cases: Cases, threads: int, left_out: str, seed: int) -> None:
    x, out = normal(threads), nan(threads)
    with seeded(seed):
        emulated_cases.run(f"hand_on_no_barrier_after_{left_out}", out, x, numbers=(threads, 5))
    assert (out != np.roll(x, 5)).any()


MISTAKES = [
    r"deadlock: block \(\d, 0, 0\): 32 threads at named_barrier_sync 1, the first \(0, 0, 0\)",
    r"deadlock: .*31 threads at __syncwarp",
    r"ldmatrix: shared address \d+ \(byte \d+ of the block's\) is not a multiple of 16",
    r"ldmatrix: bytes 512 to 528 are not in the block's 512 bytes",
    r"wrote 0 bytes past the end of its 512 bytes",
    r"block \(\d, 0, 0\), thread \(\d+, 0, 0\): ended with cp_async copies that it never waited for",
    r"lanes of a warp disagree: .*(ldmatrix_x4|__syncwarp)",
    r"deadlock: .*1 threads at load_acquire",
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mistake", range(len(MISTAKES)))
def test_mistakes_are_named(emulated_cases: Cases, mistake: int, seed: int) -> None:
    with seeded(seed), pytest.raises(RuntimeError, match=MISTAKES[mistake]) as raised:
        emulated_cases.run("wrong", numbers=(mistake,))
    assert str(raised.value).startswith("wrong: cudaLaunchKernelEx failed: cudaErrorLaunchFailure")


@pytest.mark.parametrize("mistake", [0, 1], ids=["no wgmma_wait", "no fence_proxy_async"])
def test_mistakes_of_wgmma_are_wrong_results(emulated_cases: Cases, mistake: int) -> None:
    out = np.zeros(128, np.float32)
    emulated_cases.run("wrong_wgmma", out, numbers=(mistake,))
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("mistake", "words"),
    [(2, "wgmma: no wgmma_fence since the last group"), (3, r"wgmma, operand B: bytes \d+ to \d+ are not in")],
)
def test_mistakes_of_wgmma_are_named(emulated_cases: Cases, mistake: int, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        emulated_cases.run("wrong_wgmma", np.zeros(128, np.float32), numbers=(mistake,))


HOPPER_MISTAKES = [
    "mbarrier_arrive: there is no mbarrier at shared address",
    "mbarrier: more arrivals than the 1",
    r"store_cluster: before cluster_sync block \d may not have started",
    "store_cluster: block 1 of the cluster has ended",
    r"block \(\d, 0, 0\): ended while a copy to its shared memory was under way",
    r"tma_load 2D: shared address \d+ is not a multiple of 128",
    r"deadlock: block \(\d, 0, 0\): 1 threads at mbarrier_wait, the first \(0, 0, 0\)",
    "ended with bulk stores that still read its shared memory",
    "tma_load 2D: no mbarrier_init_fence since the mbarrier",
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mistake", range(len(HOPPER_MISTAKES)))
def test_mistakes_on_hopper_are_named(emulated_cases: Cases, mistake: int, seed: int) -> None:
    with seeded(seed), pytest.raises(RuntimeError, match=HOPPER_MISTAKES[mistake]):
        emulated_cases.run("wrong_hopper", np.zeros(256, np.float32), numbers=(mistake,))


def test_launches_that_would_hang_or_race_are_named(emulated_cases: Cases) -> None:
    with pytest.raises(RuntimeError, match="want 720 registers for each of 128 threads, there are 512"):
        emulated_cases.run("too_many_registers", numbers=(0,))
    with pytest.raises(RuntimeError, match="launched to overlap the kernel before it"):
        emulated_cases.run("overlap_without_wait")


def test_sm80_has_no_instructions_of_sm90(emulated_cases: Cases) -> None:
    script = (
        "from tests.ops.test_cuda_instructions import *\n"
        "cases = Cases(EMULATED_LIBRARY, True)\n"
        "test_products_of_loaded_tiles(cases, 'bf16', False)\n"
        "cases.run('arriving_copies', np.zeros(2048, np.float32), np.zeros(1024, np.float32))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FLASHSLOTH_EMULATE_ARCH": "80"},
        cwd=build.ROOT,
        capture_output=True,
        text=True,
    )
    assert "mbarrier_init needs sm_90, this is sm_80" in done.stderr, done.stderr


def test_cases_compile_for_gpus() -> None:
    built(build.build_for_gpu, GPU_LIBRARY)
