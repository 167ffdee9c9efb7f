"""Muon (Jordan et al., 2024) for the matrices of layers, AdamW for all else, as one optimizer.

``torch.optim.Muon`` orthogonalises in bf16, matrix by matrix, which takes longer than the rest of a step on a processor
without bf16; here it is fp32 unless bf16 is asked for, and all matrices of a shape at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # pushes singular values towards 1 fast, and lets them end between 0.7 and 1.2
_MOMENTUM = 0.95


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices, roughly, with all singular values 1. ``(count, rows, columns)``."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """``matrices``: Nesterov momentum, orthogonalised, times ``muon_lr * sqrt(max(1, rows / columns))``.

    Args:
        matrices: parameters of two dimensions.
        others: parameter groups of AdamW, with their own settings or those that follow; matrices among them are left
            out.
        muon_lr: of the matrices; ``weight_decay`` is that of all.
        bf16: orthogonalise in bf16, where that is fast.

    Raises:
        ValueError: a matrix that is none.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Sequence[dict[str, Any]],
        *,
        muon_lr: float = 0.02,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bf16: bool = False,
    ) -> None:
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        matrices = list(matrices)
        for one in matrices:
            if one.dim() != 2:
                raise ValueError(f"matrices: expected two dimensions, got a parameter of shape {tuple(one.shape)}")
        taken = {id(one) for one in matrices}
        groups: list[dict[str, Any]] = [{"params": matrices, "lr": muon_lr, "muon": True}]
        for other in others:
            groups.append({**other, "params": [one for one in other["params"] if id(one) not in taken], "muon": False})
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
            else:
                self._step_others(group)

    def _step_others(self, group: dict[str, Any]) -> None:
        """AdamW (Loshchilov and Hutter, 2019)."""
        lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state[parameter]
            if not state:
                state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
            state["step"] += 1
            state["mean"].lerp_(gradient, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            scale = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(eps)
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.addcdiv_(state["mean"], scale, value=-lr / (1 - beta1 ** state["step"]))

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                gradient = parameter.grad
                assert gradient is not None
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
                updates.append(gradient.lerp(state["momentum"], _MOMENTUM))
            scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(parameters, orthogonal(torch.stack(updates).to(self._dtype)), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.to(parameter.dtype), alpha=scale)


def matrices_of_layers(model: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers that are trained, except those that are embeddings too."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad and id(module.weight) not in embeddings:
            found[id(module.weight)] = module.weight  # type: ignore[assignment]
    return list(found.values())
