"""Loads the compiled kernels, if they are there."""

from __future__ import annotations

from types import ModuleType

import torch  # noqa: F401  The extension needs libtorch in the process.

module: ModuleType | None
error: str | None  # why `module` is None

try:
    from flashsloth_ops import _C as _loaded  # type: ignore[attr-defined]

    module, error = _loaded, None
except ImportError as exception:
    module = None
    missing = getattr(exception, "name", None) == "flashsloth_ops" or "cannot import name '_C'" in str(exception)
    error = "not built (run `pip install --no-build-isolation -e .`)" if missing else f"does not load: {exception}"

emulated = False  # CUDA kernels built for the CPU serve CPU tensors; tests/emulator sets it


def cuda_missing() -> str | None:
    """Why CUDA C++ kernels are absent; None when they are there."""
    if module is None:
        return f"the extension is {error}"
    return None if module.build_info()["cuda"] else "the extension was built without CUDA"
