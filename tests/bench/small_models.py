"""Models of a few thousand parameters, of the classes and on the path of those that are measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.case import Work
from bench.e2e import flops
from bench.e2e.check import check
from bench.e2e.models import MODELS, Model

TEXT, NEW = 8, 4
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


class Built:
    """A small model and a request to it."""

    def __init__(self, model: Model, attention: str = "sdpa", batch: int = 2, dtype: torch.dtype = torch.float32):
        self.model, self.batch = model, batch
        self.module = model.build(True, "cpu", dtype, attention)
        self.config, self.parts = self.module.config, model.parts(self.module)
        self.layout = model.layout(self.config, 147, 98)
        self.request = model.request(self.config, self.layout, batch, TEXT, "cpu", dtype)
        self.prompt = model.prompt(self.layout, self.config, TEXT)

    def works(self) -> dict[str, Work]:
        return flops.works(self.model, self.config, self.layout, self.batch, TEXT, NEW)

    def check(self) -> Any:
        return check(self.model, self.module, self.request, self.prompt, small=True)
