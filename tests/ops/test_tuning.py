"""Launches and their configurations: limits, errors, what is stored, searched for and passed over."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsloth_ops import BackendError, backend, measured
from flashsloth_ops.report import cases

if not backend.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import flashsloth_ops.triton
from flashsloth_ops.triton import launch as launching
from flashsloth_ops.triton import tuning
from flashsloth_ops.triton.launch import gpu, is_recording, launch, num_sms, recording
from tests.ops import kernel_probes

CUDA = torch.device("cuda", 0)
GPU = "NVIDIA Made-Up 9000"
HEURISTIC = {"BLOCK": 64, "num_warps": 4}
TUNED = {"BLOCK": 128, "num_warps": 8}
interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="TRITON_INTERPRET is not set")


# ---- launches ----


@pytest.mark.parametrize(
    ("grid", "axis", "limit"), [((2**31,), 0, 2**31 - 1), ((1, 65536), 1, 65535), ((1, 1, 70000), 2, 65535)]
)
def test_a_grid_beyond_limits_raises_before_the_launch(grid: tuple[int, ...], axis: int, limit: int) -> None:
    """The kernel would fail if it were touched: it is none."""

    class Kernel:
        __name__ = "large_kernel"

    message = f"large_kernel: expected at most {limit} blocks along grid axis {axis}, got {grid[axis]}"
    with pytest.raises(BackendError, match=re.escape(message)):
        launch(Kernel(), grid, torch.empty(1))
    launch(Kernel(), (*grid[:axis], 0), torch.empty(1))  # empty


@interpreted
def test_an_error_names_kernel_grid_and_configuration() -> None:
    with pytest.raises(BackendError) as caught:
        launch(kernel_probes.broken_kernel, (1, 2), torch.empty(64), BLOCK=32)
    assert str(caught.value).startswith("broken_kernel[1, 2] with {'BLOCK': 32}: ")
    assert caught.value.__cause__ is not None


@interpreted
def test_a_kernel_runs() -> None:
    x = torch.arange(1500.0)
    y = torch.zeros(1500)
    launch(kernel_probes.copy_kernel, (2,), x, y, 1500, 2.0, BLOCK=1024)
    assert torch.equal(y, 2 * x)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "INTERPRETED", False)
    with pytest.raises(BackendError, match=r"copy_kernel: expected CUDA tensors, or TRITON_INTERPRET=1 for CPU"):
        launch(kernel_probes.copy_kernel, (1,), torch.empty(8), torch.empty(8), 8, 1.0, BLOCK=8)


def test_recording_keeps_launches_and_runs_none() -> None:
    x = torch.empty(8, device="meta")
    with recording((8, 0)) as outer:
        launch(kernel_probes.copy_kernel, (3,), x, x, 8, 1.0, BLOCK=8)
        assert (num_sms(x.device), gpu(x.device).capability) == (108, (8, 0))
        with recording((10, 0)) as inner:
            launch(kernel_probes.copy_kernel, (4,), x, x, 8, 1.0, BLOCK=8)
            assert gpu(x.device).capability == (10, 0)
        with pytest.raises(BackendError, match="expected at most"):
            launch(kernel_probes.copy_kernel, (1, 70000), x, x, 8, 1.0, BLOCK=8)
        assert is_recording()
    assert not is_recording()
    assert [one.grid for one in outer] == [(3,)]
    assert [one.grid for one in inner] == [(4,)]
    assert outer[0].options == {"BLOCK": 8}


# ---- choosing ----


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A GPU that nobody has, with folders of its own. The folder of the user's files."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("FLASHSLOTH_CONFIG_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(tuning, "AUTOTUNE", False)
    measured.table.cache_clear()
    yield tmp_path / "own"
    measured.table.cache_clear()


def store(folder: Path, configs: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / measured.file_name(GPU)).write_text(json.dumps({"gpu": GPU, "configs": configs}))
    measured.table.cache_clear()


def never(*_: object) -> Any:
    raise AssertionError("asked for")


def choose(
    key: str = "bf16", *, space: Callable[[], Any] = never, run: Callable[..., object] = never
) -> dict[str, int]:
    return tuning.choose("some_kernel", key, CUDA, HEURISTIC, space, run)


def test_an_unknown_gpu_gets_the_heuristic_and_no_search(made_up: Path) -> None:
    assert choose() == HEURISTIC
    assert not made_up.exists()


def test_tensors_elsewhere_get_the_heuristic(made_up: Path) -> None:
    store(made_up, {"some_kernel": {"bf16": TUNED}})
    assert tuning.choose("some_kernel", "bf16", torch.device("cpu"), HEURISTIC, never, never) == HEURISTIC


def test_stored_configurations_are_used_and_own_ones_come_first(made_up: Path) -> None:
    store(measured.SHIPPED, {"some_kernel": {"bf16": TUNED, "fp16": TUNED}})
    assert choose() == TUNED
    own = {"BLOCK": 256, "num_warps": 2}
    store(made_up, {"some_kernel": {"bf16": own}})
    assert (choose(), choose("fp16"), choose("fp32")) == (own, TUNED, HEURISTIC)


def test_configurations_of_another_version_are_passed_over(made_up: Path) -> None:
    store(measured.SHIPPED, {"some_kernel": {"bf16": {"BLOCK_M": 64, "num_warps": 4}}})
    assert choose() == HEURISTIC


def test_a_broken_file_is_named(made_up: Path) -> None:
    store(made_up, {})
    path = made_up / measured.file_name(GPU)
    path.write_text("{")
    measured.table.cache_clear()
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected tuned configurations as JSON")):
        choose()
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        choose()


class Timer:
    """Stands for the clock: configurations take as long as they are told; some cannot run."""

    def __init__(self, milliseconds: dict[int, float]) -> None:
        self.milliseconds, self.ran = milliseconds, list[int]()

    def run(self, config: dict[str, int]) -> None:
        self.ran.append(config["BLOCK"])
        if config["BLOCK"] not in self.milliseconds:
            raise BackendError("out of resource: shared memory")

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        return self.milliseconds[self.ran[-1]]


def blocks(*sizes: int) -> list[dict[str, int]]:
    return [{"BLOCK": size, "num_warps": 4} for size in sizes]


def test_search_takes_the_fastest_and_keeps_it(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer({64: 3.0, 128: 1.0, 256: 2.0})
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_milliseconds", timer)
    wanted = blocks(128)[0]
    assert choose(space=lambda: blocks(256, 512, 64, 128), run=timer.run) == wanted
    assert timer.ran == [64, 256, 512, 128]  # the heuristic once; 512 cannot run
    assert choose() == wanted  # no second search
    monkeypatch.setattr(tuning, "AUTOTUNE", False)
    measured.table.cache_clear()
    assert choose() == wanted  # in another process
    stored = json.loads((made_up / measured.file_name(GPU)).read_text())
    assert stored == {"gpu": GPU, "configs": {"some_kernel": {"bf16": wanted}}}


def test_search_keeps_the_heuristic_unless_something_is_faster(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer({64: 1.0, 128: 1.0})
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_milliseconds", timer)
    assert choose(space=lambda: blocks(128), run=timer.run) == HEURISTIC


def test_no_search_while_a_graph_is_captured(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == HEURISTIC


def test_what_cannot_be_kept_still_holds_in_this_process(made_up: Path) -> None:
    made_up.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="tuned configurations are not kept: .*FLASHSLOTH_CONFIG_DIR"):
        measured.keep(GPU, "some_kernel", "bf16", TUNED)
    assert choose() == TUNED


@pytest.mark.parametrize(
    ("length", "wanted"), [(0, 1), (1, 1), (2, 2), (3, 4), (729, 1024), (1024, 1024), (1025, 2048)]
)
def test_bucket(length: int, wanted: int) -> None:
    assert tuning.bucket(length) == wanted


# ---- what the columns ask for, and what is shipped ----


def modules() -> list[Any]:
    package = flashsloth_ops.triton
    return [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]


CALLS = {
    "spatial_pool": [partial(cases.pool, batch, torch.bfloat16) for batch in (33, 34, 44)],
    "embedded_query": [partial(cases.query, 3, 1, tokens, torch.bfloat16) for tokens in (700, 729, 1000)],
    "sparse_prefill": [
        partial(cases.prefill, 80, torch.bfloat16, sparse=True, causal=True, rows=rows, keys=rows)
        for rows in (1100, 1284, 2048)
    ],
}


@pytest.mark.parametrize("column", CALLS)
def test_lengths_in_one_bucket_share_a_key(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new length must not ask for a new search."""
    asked: list[tuple[str, str]] = []

    def remember(kernel: str, key: str, device: Any, heuristic: dict[str, int], *rest: Any) -> dict[str, int]:
        asked.append((kernel, key))
        return heuristic

    original = tuning.choose
    for module in (tuning, *modules()):
        if getattr(module, "choose", None) is original:
            monkeypatch.setattr(module, "choose", remember)
    found = []
    for call in CALLS[column]:
        asked.clear()
        with recording():
            call()
        assert asked
        found.append(set(asked))
    assert found[0] == found[1] == found[2]


def problems(path: Path, kernels: set[str]) -> list[str]:
    """What is wrong with a file of configurations."""
    stored = json.loads(path.read_text())
    found = [] if path.name == measured.file_name(stored["gpu"]) else [f"named {path.name}, of {stored['gpu']}"]
    found += [f"no op {op}" for op in stored.get("faster_in_cuda", ()) if op not in backend.OPS]
    for kernel, configs in stored.get("configs", {}).items():
        found += [] if kernel in kernels else [f"no kernel {kernel}"]
        for key, config in configs.items():
            if not config or not all(isinstance(v, int) and v > 0 for v in config.values()):
                found.append(f"{kernel} {key}: {config}")
    return found


def test_shipped_configurations_are_of_kernels_that_exist(made_up: Path) -> None:
    kernels = {name for module in modules() for name in vars(module) if name.endswith("_kernel")}
    assert kernels
    shipped = Path(measured.__file__).parent / "configs"
    assert {path.name: problems(path, kernels) for path in shipped.glob("*.json")} == {
        path.name: [] for path in shipped.glob("*.json")
    }
    store(made_up, {"some_kernel": {"bf16": {"BLOCK": "64"}}})
    wrong = problems(made_up / measured.file_name(GPU), kernels)
    assert wrong == ["no kernel some_kernel", "some_kernel bf16: {'BLOCK': '64'}"]
