"""The report of kernels: faults are found in real binaries, loops in made-up ones, and every kernel is in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashsloth_ops import backend
from flashsloth_ops.report import architecture, binary, command, table
from flashsloth_ops.report.architecture import ARCHITECTURES, occupancy
from flashsloth_ops.report.table import Row
from tests.support import ROOT

needs_triton = pytest.mark.skipif(not backend.HAS_TRITON, reason="triton is not installed")
STORED = ROOT / "docs" / "kernels" / "kernels.json"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one's kernels are interpreted, and are no longer compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=env, cwd=ROOT)


# ---- kernels with faults ----


@pytest.fixture(scope="module")
def probes() -> dict[str, Any]:
    done = python("tests.ops.kernel_probes")
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@needs_triton
class TestProbes:
    def row(self, probes: dict[str, Any], case: str, arch: str) -> dict[str, Any]:
        (row,) = [r for r in probes["rows"] if (r["case"], r["arch"]) == (case, arch)]
        assert isinstance(row, dict)
        return row

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
    def test_a_good_product_passes(self, probes: dict[str, Any], arch: str) -> None:
        row = self.row(probes, "good", arch)
        assert (row["failures"], row["remarks"], row["matrix"]) == ([], [], True)
        kind = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[arch]
        assert all(name.startswith(kind) for name in row["tensor"])
        assert row["tensor"]
        assert row["warps"] == 4
        assert 16 <= row["registers"] <= 255
        assert row["shared"] >= 2 * 64 * 64 * 2  # one stage of both blocks
        assert row["blocks"] >= 1
        assert row["variant"] == "bf16 M=64 N=64 K=64 PRECISION=tf32 num_stages=3"

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
    def test_spills_in_a_loop_fail(self, probes: dict[str, Any], arch: str) -> None:
        row = self.row(probes, "spills", arch)
        stored, loaded = row["spilled_in_loops"]
        assert 0 < stored < row["spilled"][0]  # the values are first stored before the loop
        assert 0 < loaded < row["spilled"][1]
        assert row["stack"] > 0
        assert any("spills in a main loop" in f for f in row["failures"])
        fitting = self.row(probes, "spills not", arch)
        assert (fitting["spilled"], fitting["stack"], fitting["failures"]) == ([0, 0], 0, [])

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
    def test_too_much_shared_memory_fails(self, probes: dict[str, Any], arch: str) -> None:
        row = self.row(probes, "too much shared memory", arch)
        limit = ARCHITECTURES[int(arch[3:])].shared_of_block
        assert row["shared"] > limit
        assert any(f"a block has at most {limit}" in f for f in row["failures"])

    def test_products_for_tensor_cores(self, probes: dict[str, Any]) -> None:
        assert not self.row(probes, "fp32 ieee", "sm_90")["matrix"]  # asked for without
        assert self.row(probes, "fp32 tf32x3", "sm_90")["matrix"]
        few = self.row(probes, "few rows", "sm_90")
        assert few["failures"] == []
        assert few["remarks"] == ["product_kernel [few rows] on sm_90: 8 HMMA.16816, no HGMMA"]

    def test_compile_error_is_a_failure(self, probes: dict[str, Any]) -> None:
        (failure,) = self.row(probes, "broken", "sm_90")["failures"]
        assert failure.startswith("broken_kernel [broken] on sm_90: does not compile: ")
        assert "incompatible dimensions" in failure

    def test_a_case_that_raises_is_a_problem_and_its_launches_count(self, probes: dict[str, Any]) -> None:
        assert "case [raises] on sm_90: ValueError: no such size" in probes["problems"]
        assert self.row(probes, "raises", "sm_90")["kernel"] == "copy_kernel"

    def test_a_variant_is_compiled_once(self, probes: dict[str, Any]) -> None:
        assert not [r for r in probes["rows"] if r["case"] == "copies again"]

    def test_kernels_are_found_by_name(self, probes: dict[str, Any]) -> None:
        assert probes["kernels"] == ["broken_kernel", "copy_kernel", "product_kernel", "spilling_kernel"]


# ---- loops ----

SASS = """
        .section        .text.made_up_kernel,"ax",@progbits
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL.64 [R1], R2 ;
.L_x_0:
        /*0020*/                   LDG.E R4, [R2.64] ;
        /*0030*/                   LDL R5, [R1+0x10] ;
.L_x_1:
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0050*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/                   STL.128 [R1], R8 ;
        /*0080*/               @P1 BRA `(.L_x_0) ;
        /*0090*/                   STL.U8 [R1], R7 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00c0*/               @P0 BRA `(.L_x_2) ;
        /*00d0*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4) ;
"""


def test_loops_of_the_control_flow_graph() -> None:
    """The wait behind the end branches back into the loop, but what lies between is no loop."""
    (lines,) = binary.sections(SASS).values()
    instructions, labels = binary.parse(lines)
    assert [i.opcode.split(".")[0] for i in instructions][:3] == ["MOV", "STL", "LDG"]
    assert instructions[5].predicate == "@!P0"
    loops = binary.natural_loops(instructions, labels)
    assert sorted(sorted(loop) for loop in loops) == [[2, 3, 4, 5, 6, 7, 8, 11, 12, 13], [11, 12, 13]]
    assert binary.main_loops(instructions, labels) == [frozenset([2, 3, 4, 5, 6, 7, 8, 11, 12, 13])]


def test_local_memory_is_counted_in_bytes_and_by_place() -> None:
    (lines,) = binary.sections(SASS).values()
    found = binary.describe("made_up_kernel", 32, 16, 0, lines)
    assert found.local == binary.Local(stores=8 + 16 + 1, loads=4)
    assert found.local_in_loops == binary.Local(stores=16, loads=4)
    assert found.tensor == {"HGMMA.64x64x16": 1}


def test_spills_outside_the_innermost_loop_with_work_are_not_in_it() -> None:
    """An outer loop with a spill, around one with loads from global memory."""
    text = """
.L_x_0:
        /*0000*/                   STL [R1], R2 ;
.L_x_1:
        /*0010*/                   LDG.E R4, [R2.64] ;
        /*0020*/               @P1 BRA `(.L_x_1) ;
        /*0030*/                   LDL R2, [R1] ;
        /*0040*/               @P2 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
"""
    instructions, labels = binary.parse(text.splitlines())
    assert len(binary.natural_loops(instructions, labels)) == 2
    assert binary.main_loops(instructions, labels) == [frozenset([1, 2])]
    found = binary.describe("kernel", 32, 16, 0, text.splitlines())
    assert (found.local, found.local_in_loops) == (binary.Local(4, 4), binary.Local(0, 0))


# ---- CUDA C++ ----

CUDA_SOURCE = """
namespace flashsloth::cuda {
extern __shared__ float dynamic[];
template <int N> struct Sizes { static constexpr int kBytes = 39000 + 1000 * N; };

template <int N>
__global__ void __launch_bounds__(64, 2) reversed_kernel(float* x) {
  dynamic[threadIdx.x] = x[threadIdx.x * N];
  __syncthreads();
  x[threadIdx.x] = dynamic[63 - threadIdx.x];
}
template __global__ void reversed_kernel<1>(float*);
template __global__ void reversed_kernel<3>(float*);

__global__ void unbounded_kernel(float* x) { x[threadIdx.x] = 1; }

__global__ void __launch_bounds__(32) only_90_kernel(float* x) {
#if __CUDA_ARCH__ >= 900
  x[threadIdx.x] = 1;
#endif
}

__global__ void __launch_bounds__(32) array_kernel(float* x, const int* at, int n) {
  float values[100];
  for (int i = 0; i < 100; ++i) values[i] = x[i];
  for (int i = 0; i < n; ++i) values[at[i]] += values[at[i + 1]];
  for (int i = 0; i < 100; ++i) x[i] = values[i];
}
}  // namespace flashsloth::cuda
"""


@needs_triton
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("capability", [80, 90])
def test_cuda_kernels(tmp_path: Path, capability: int) -> None:
    from flashsloth_ops.report import cuda_kernels, triton_kernels

    source = tmp_path / "made_up.cu"
    source.write_text(CUDA_SOURCE)
    described = {
        "reversed_kernel": cuda_kernels.Kernel("made_up.cu", "Sizes<{0}>::kBytes + 960"),
        "array_kernel": cuda_kernels.Kernel("made_up.cu", tensor="HGMMA"),
        "elsewhere_kernel": cuda_kernels.Kernel("other.cu", "no_such_constant"),
    }
    on, tools = ARCHITECTURES[capability], triton_kernels.tools()
    found = cuda_kernels.compile_file(source, on, tools, described)
    assert {r.case: r.shared for r in found if r.kernel == "reversed_kernel"} == {"1": 40960, "3": 42960}
    rows = {row.kernel: row for row in found if row.case != "3"}
    assert ("only_90_kernel" in rows) == (capability == 90)
    row = rows["reversed_kernel"]
    assert (row.warps, row.error) == (2, "")
    assert row.blocks == {80: 4, 90: 5}[capability]
    assert row.limit == "shared memory"
    assert rows["unbounded_kernel"].error.startswith("without __launch_bounds__")
    array = rows["array_kernel"]
    assert min(array.spilled_in_loops) >= 4
    assert array.error == f"expected {'HMMA' if capability == 80 else 'HGMMA'} instructions, found none"
    undescribed = cuda_kernels.compile_file(source, on, tools, {})
    row = next(row for row in undescribed if row.kernel == "reversed_kernel")
    assert row.error == "has dynamic shared memory; say how much in KERNELS of cuda_kernels.py"
    wrong = {"reversed_kernel": cuda_kernels.Kernel("made_up.cu", "Sizes::kNoSuch")}
    (row,) = cuda_kernels.compile_file(source, on, tools, wrong)
    assert "does not compile" in row.error
    assert "kNoSuch" in row.error


# ---- occupancy, failures, comparison ----


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "columns", "wanted"),
    [
        (8, 128, 0, 0, (2, 16, "registers")),
        (8, 129, 0, 0, (1, 8, "registers")),  # 129 registers are allotted as 136: 15 warps, of which whole blocks count
        (4, 32, 0, 0, (16, 64, "warps")),
        (1, 32, 0, 0, (32, 32, "blocks")),
        (4, 32, 113 * 1024, 0, (2, 8, "shared memory")),
        (4, 32, 114 * 1024, 0, (1, 4, "shared memory")),
        (4, 32, 0, 256, (2, 8, "tensor memory")),
        (16, 168, 0, 0, (0, 0, "registers")),
    ],
)
def test_occupancy(warps: int, registers: int, shared: int, columns: int, wanted: tuple[int, int, str]) -> None:
    assert occupancy(ARCHITECTURES[90], warps, registers, shared, columns) == architecture.Occupancy(*wanted)


GOOD = Row("some_kernel", "case", "sm_90", "triton", warps=4, registers=96, shared=1024, blocks=5, matrix=True,
           tensor={"HGMMA.64x64x16": 4})  # fmt: skip


def test_failures() -> None:
    assert table.failures(GOOD) == []
    assert table.failures(replace(GOOD, spilled=(8, 8))) == []
    (found,) = table.failures(replace(GOOD, spilled=(8, 12), spilled_in_loops=(0, 4)))
    assert found == "some_kernel [case] on sm_90: spills in a main loop, 0 bytes stored and 4 loaded each pass"
    (found,) = table.failures(replace(GOOD, tensor={}))
    assert found == "some_kernel [case] on sm_90: a matrix product without tensor-core instructions"
    assert table.failures(replace(GOOD, tensor={}, matrix=False)) == []
    (found,) = table.failures(replace(GOOD, shared=232449, blocks=0))
    assert "232449 bytes of shared memory, a block has at most 232448" in found
    (found,) = table.failures(replace(GOOD, blocks=0, limit="registers"))
    assert found.endswith("no block fits on a multiprocessor (registers)")


def test_worse_is_what_costs_time() -> None:
    assert table.worse(replace(GOOD, registers=104), GOOD) == []
    assert table.changes(replace(GOOD, registers=104), GOOD) == ["registers 96 -> 104"]
    assert table.changes(replace(GOOD, spilled=binary.Local(4, 8)), GOOD) == ["spilled 0 -> 4/8"]
    assert table.worse(replace(GOOD, registers=128, blocks=4), GOOD) == ["resident warps 20 -> 16, registers 96 -> 128"]
    assert table.worse(replace(GOOD, registers=128, blocks=4, variant="BLOCK=128"), GOOD) == []
    assert table.worse(replace(GOOD, spilled=(4, 8)), GOOD) == ["spilled 0 -> 4/8 bytes"]
    (found,) = table.worse(replace(GOOD, tensor={"HMMA.16816": 32}), GOOD)
    assert found == "tensor-core instructions 4 HGMMA.64x64x16 -> 32 HMMA.16816"
    assert table.worse(GOOD, replace(GOOD, registers=128, blocks=4, spilled=(4, 8), tensor={})) == []


def test_only_rows_of_the_same_compilers_are_compared() -> None:
    now = {"triton": "3.6.0", "ptxas": "12.8", "ptxas_blackwell": "12.9", "nvcc": "13.0"}
    assert table.comparable(GOOD, now, now)
    assert not table.comparable(GOOD, {**now, "ptxas": "13.0"}, now)
    assert table.comparable(GOOD, {**now, "ptxas_blackwell": "13.0", "nvcc": "12.9"}, now)
    assert not table.comparable(replace(GOOD, arch="sm_100"), {**now, "ptxas_blackwell": "13.0"}, now)
    assert table.comparable(replace(GOOD, language="cuda"), {**now, "triton": "3.7.0"}, now)


def test_stored_rows_come_back(tmp_path: Path) -> None:
    rows = [replace(GOOD, arch=arch, spilled=(4, 8), error="none" * (arch == "sm_80")) for arch in ("sm_80", "sm_90")]
    rows.insert(0, replace(GOOD, case="", language="cuda"))
    table.write(tmp_path / "rows.json", rows, {"triton": "3.6.0"})
    assert table.read(tmp_path / "rows.json") == (rows, {"triton": "3.6.0"})
    assert len((tmp_path / "rows.json").read_text().splitlines()) == 2 + len(rows) + 1
    with pytest.raises(ValueError, match="no such report; `python -m flashsloth_ops kernels --json"):
        table.read(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text('{"rows": [{}]}')
    with pytest.raises(ValueError, match=r"broken\.json: expected a report of kernels"):
        table.read(tmp_path / "broken.json")


# ---- the command ----


@needs_triton
def test_every_kernel_passes_on_every_architecture() -> None:
    """Of each kernel its first variant, none worse than stored; `make kernels` compiles all."""
    done = python("flashsloth_ops", "kernels", "--quick", "--compare", str(STORED))
    hint = "If it is meant: python -m flashsloth_ops kernels --quick --json docs/kernels/kernels.json"
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{hint}"


def test_a_partial_run_keeps_other_rows(tmp_path: Path) -> None:
    path, versions = tmp_path / "rows.json", {"triton": "3.6.0"}
    other, variant = replace(GOOD, kernel="other_kernel"), replace(GOOD, case="another case")
    table.write(path, [GOOD, other, variant], versions)
    changed = replace(GOOD, registers=64)

    def stored(only: bool, quick: bool, with_versions: dict[str, str] = versions) -> set[tuple[str, str, int]]:
        copy = tmp_path / "copy.json"
        copy.write_text(path.read_text())
        command._store(copy, [changed], with_versions, only, quick)
        return {(row.kernel, row.case, row.registers) for row in table.read(copy)[0]}

    new = ("some_kernel", "case", 64)
    assert stored(only=False, quick=False) == {new}
    assert stored(only=False, quick=True) == {new, ("some_kernel", "another case", 96)}  # other_kernel is gone
    assert stored(only=True, quick=False) == {new, ("some_kernel", "another case", 96), ("other_kernel", "case", 96)}
    assert stored(only=True, quick=False, with_versions={"triton": "3.7.0"}) == {new}


@needs_triton
def test_command_refuses_what_it_cannot_do() -> None:
    done = python("flashsloth_ops", "kernels", "--arch", "75")
    assert done.returncode == 2
    assert "--arch: expected some of 80, 90, 100, got '75'" in done.stderr
    done = python("flashsloth_ops", "kernels", "--compare", "absent.json")
    assert done.returncode == 2
    assert "--compare: absent.json: no such report" in done.stderr
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = [sys.executable, "-m", "flashsloth_ops", "kernels"]
    done = subprocess.run(run, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
