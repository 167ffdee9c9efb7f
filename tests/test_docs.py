"""What the documents promise is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.support import ROOT


def test_every_difference_in_parity_has_its_test() -> None:
    text = (ROOT / "docs" / "parity.md").read_text()
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", text)
    assert len(named) > 20
    sources = {path.name: path.read_text() for path in (ROOT / "tests" / "model").glob("test_*.py")}
    for file, test in named:
        where = [sources[file]] if file else list(sources.values())
        assert any(f"def {test}(" in source for source in where), f"{file}::{test}"
    assert set(re.findall(r"`(test_\w+\.py)", text)) <= set(sources)


def released_query_module(prefix: str) -> dict[str, torch.Tensor]:
    """Random tensors under the names and shapes of the released query module."""
    model, inner, image = 2560, 576, 1152
    linear = {"down_projector_learnable_text": (inner, model), "down_projector_image": (inner, image)}
    linear |= {"up_projector": (model, image), "layers.0.i2q_attn.v_proj": (image, image)}
    linear |= {f"layers.0.t2q_attn.{x}_proj": (inner, inner) for x in "qkv"}
    linear |= {f"layers.0.i2q_attn.{x}_proj": (inner, inner) for x in "qk"}
    state = {f"{prefix}{name}.weight": torch.randn(shape) * shape[1] ** -0.5 for name, shape in linear.items()}
    state |= {f"{prefix}{name}.bias": torch.zeros(shape[0]) for name, shape in linear.items()}
    for norm in ("ln_q", "ln_text", "ln_kv"):
        state |= {f"{prefix}layers.0.{norm}.{kind}": torch.ones(inner) for kind in ("weight", "bias")}
    return state


def test_readme_is_short_and_its_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 150
    names: dict[str, object] = {"state_dict": released_query_module("model.lqformer.")}
    printed: list[str] = []
    names["print"] = lambda *values: printed.append(", ".join(str(tuple(v)) for v in values))
    examples = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "flashsloth_ops import" in code]
    assert len(examples) == 3
    for code in examples:
        assert code.count("\n") <= 11
        exec(code, names)  # each ends by printing the shapes its comment states
        assert re.findall(r"print\(.*\) +# (.*?)(?:;|$)", code, re.MULTILINE) == printed[-1:]


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "docs/parity.md"])
def test_links_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / Path(path).parent / target).exists(), target
