"""Triton kernels: records what calls launch, and compiles each variant ahead of time as a launch there would."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flashsloth_ops.report import binary
from flashsloth_ops.report.architecture import RESERVED_SHARED, Architecture, occupancy
from flashsloth_ops.report.cases import Case
from flashsloth_ops.report.table import Row
from flashsloth_ops.triton.launch import Launch, recording


class Variant(NamedTuple):
    """A kernel with the types, constants and options of one launch: what Triton compiles once. Can go to a process."""

    module: str
    name: str
    case: str  # the first one that launches it
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def kernel(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)

    @property
    def key(self) -> tuple[str, ...]:
        parts = (self.signature, self.constants, self.attributes, self.options)
        return (self.module, self.name, *map(str, parts))

    def described(self) -> str:
        """Dtypes of its tensors, values of its constants, and how deep loads are pipelined."""
        types = dict.fromkeys(t.removeprefix("*") for t in self.signature.values() if t.startswith("*"))
        names = list(self.signature)
        constants = (f"{names[path[0]]}={_short(value)}" for path, value in self.constants.items() if len(path) == 1)
        return " ".join([*types, *constants, f"num_stages={self.options['num_stages']}"])


def kernels(package: str = "flashsloth_ops.triton") -> dict[str, Any]:
    """Every kernel of a package: functions under ``@triton.jit`` whose names end in ``_kernel``."""
    from triton.runtime.jit import JITFunction

    root = importlib.import_module(package)
    modules = [root, *(importlib.import_module(m.name) for m in pkgutil.walk_packages(root.__path__, f"{package}."))]
    found: dict[str, Any] = {}
    for module in modules:
        for name, value in inspect.getmembers(module, lambda v: isinstance(v, JITFunction)):
            if name.endswith("_kernel") and value.__module__ == module.__name__:
                if name in found:
                    raise ValueError(f"{name}: two kernels have this name, in {found[name].__module__} and {module}")
                found[name] = value
    return found


def record(cases: Iterable[Case], on: Architecture) -> tuple[list[Variant], list[str]]:
    """Variants that the cases launch on an architecture, each once, and what went wrong in a case."""
    found: dict[tuple[str, ...], Variant] = {}
    problems: list[str] = []
    for case in cases:
        times: dict[str, int] = {}
        with recording((on.capability // 10, on.capability % 10)) as launches:
            try:
                case.call()
            except Exception as error:  # the other cases still count
                problems.append(f"case [{case.name}] on {on.name}: {type(error).__name__}: {error}")
        for launch in launches:
            one = variant(launch, case.name, on)
            if one.key not in found:
                times[one.name] = times.get(one.name, 0) + 1
                found[one.key] = one if times[one.name] == 1 else one._replace(case=f"{case.name} #{times[one.name]}")
    return list(found.values()), problems


def variant(launch: Launch, case: str, on: Architecture) -> Variant:
    """Types, constants and alignment exactly as Triton's own launcher derives them."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(_target(on))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**launch.options, "debug": False}
    bound, specialization, _ = binder(*launch.args, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, None)
    return Variant(kernel.__module__, kernel.__name__, case, signature, constants, attributes, options.__dict__)


def compile_variant(one: Variant, on: Architecture) -> list[Row]:
    """The row of a variant. A compiler's error is a row as well."""
    import triton
    from triton.compiler import ASTSource

    row = Row(kernel=one.name, case=one.case, arch=on.name, language="triton", variant=one.described())
    try:
        source = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
        compiled = triton.compile(source, target=_target(on), options=one.options)
    except Exception as error:  # whatever a compiler raises
        return [replace(row, error=f"does not compile: {' '.join(str(error).split())[:400]}")]
    reserved = RESERVED_SHARED if on.capability >= 90 else 0
    (code,) = binary.read_bytes(compiled.asm["cubin"], tools(), reserved)
    metadata = compiled.metadata
    columns = getattr(metadata, "tmem_size", None) or 0
    shared = metadata.shared + code.static_shared
    fits = occupancy(on, metadata.num_warps, code.registers, shared, columns)
    done = replace(
        row, warps=metadata.num_warps, registers=code.registers, stack=code.stack, shared=shared,
        spilled=code.local, spilled_in_loops=code.local_in_loops, blocks=fits.blocks, limit=fits.limit,
        tensor=code.tensor, matrix=has_matrix_product(compiled.asm["ttir"]),
    )  # fmt: skip
    return [done]


def has_matrix_product(ttir: str) -> bool:
    """Whether a kernel has a product meant for tensor cores: any but those asked for in plain fp32, Triton's "ieee"."""
    products = re.findall(r"\btt\.dot(?:_scaled)?\b(.*?): tensor<[\dx]*x(\w+)>", ttir)
    return any(dtype != "f32" or "inputPrecision" in how for how, dtype in products)


def tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def versions() -> dict[str, str]:
    """Versions that the numbers depend on."""
    import triton
    from triton import knobs

    return {
        "triton": triton.__version__,
        "ptxas": knobs.nvidia.ptxas.version,
        "ptxas_blackwell": knobs.nvidia.ptxas_blackwell.version,
    }


def _target(on: Architecture) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", on.capability, 32)


def _short(value: Any) -> str:
    return str(getattr(value, "value", value)).removeprefix("triton.language.")
