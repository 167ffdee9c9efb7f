"""``python -m flashsloth_ops env``: versions, what was built, which backend serves what; and ``kernels``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata

import torch

import flashsloth_ops
from flashsloth_ops import _extension, backend, measured

PACKAGES = ("numpy", "transformers", "triton", "pybind11", "ninja")
VARIABLES = (
    "FLASHSLOTH_BACKEND", "FLASHSLOTH_LOG", "FLASHSLOTH_AUTOTUNE", "FLASHSLOTH_CONFIG_DIR", "TRITON_INTERPRET",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


def environment() -> str:
    """The report, as text. Needs nothing but torch: it is for when something else is broken."""
    lines = [
        f"flashsloth_ops  {flashsloth_ops.__version__}",
        f"python          {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch           {torch.__version__}, {torch.get_num_threads()} threads",
    ]
    lines += [f"{name:15} {_version(name)}" for name in PACKAGES]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            name = torch.cuda.get_device_name(i)
            lines.append(f"gpu             {name}, compute capability {major}.{minor}, {_tuned(name)}")
    else:
        lines.append("gpu             none")
    if _extension.module is None:
        lines.append(f"extension       {_extension.error}")
    else:
        info = _extension.module.build_info()
        lines.append(f"extension       built by {info['compiler']} against torch {info['torch']}")
        lines.append(f"                runs on torch {info['torch_target_version']} and later")
        lines.append(f"cpu kernels     {_extension.module.cpu_isa()}")
        lines.append(f"cuda kernels    {'built for ' + info['cuda'] if info['cuda'] else 'not built'}")
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return "\n".join([*lines, "", *table()])


def table() -> list[str]:
    """Backends of each op in order of preference, with what they serve or why they are absent."""
    rows = [("op", "backend", "device", "dtypes", "")]
    for rule in backend.RULES:
        dtypes = " ".join(backend.short(d) for d in rule.dtypes)
        devices = rule.devices or ("any",)
        served = [device for device in devices if rule.missing(device) is None]
        note = rule.limits() if served else rule.missing(devices[0]) or ""
        rows.append((rule.op, rule.backend, ",".join(served or devices[:1]), dtypes, note))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        ("  ".join(f"{cell:{w}}" for cell, w in zip(row[:4], widths, strict=True)) + f"  {row[4]}").rstrip()
        for row in rows
    ]


def _tuned(gpu: str) -> str:
    try:
        return f"{sum(map(len, measured.table(gpu)['configs'].values()))} tuned configurations"
    except ValueError as error:
        return str(error)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: list[str] | None = None) -> int:
    from flashsloth_ops.report import command as kernels

    parser = argparse.ArgumentParser(prog="python -m flashsloth_ops")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, what was built, the backend table")
    kernels.add_arguments(commands.add_parser("kernels", help="compile every GPU kernel, and check what came out"))
    given = parser.parse_args(arguments)
    if given.command == "kernels":
        return kernels.main(given)
    print(environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
