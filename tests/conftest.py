"""Settings of all tests."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when kernels are defined, so before flashsloth_ops is imported

# A shared machine may be slow, which is no failure; and CI tries the same shapes each time, other runs new ones.
settings.register_profile("machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("machine"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "machine")
