"""Muon: momentum whose matrices are made orthogonal before they are applied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, tuned for a fast rise of small singular values (Jordan et al., 2024)."""


def orthogonalise(matrix: Tensor, rounds: int = 5) -> Tensor:
    """matrix (m, n) -> the same singular vectors with all singular values near 1 (within about 0.7 to 1.2).

    By Newton-Schulz iteration in the matrix's own precision, carried out on the smaller Gram matrix: the steps are
    polynomials of it, so the matrix itself is multiplied only once.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    gram, product = x @ x.T, None
    for last in [False] * (rounds - 1) + [True]:
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal().add_(a)
        product = step if product is None else step @ product
        if not last:
            gram = step @ gram @ step
    x = product @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For the weights of linear layers and convolutions; everything else is AdamW's.

    Source: Jordan et al., 2024, with the scale of Liu et al., 2025, section 2.2, under which it takes AdamW's learning
    rates. `torch.optim.Muon` differs in two points: it takes no convolutions, and it works in bfloat16, which
    processors without bfloat16 arithmetic emulate at a tenth of the speed.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if gradient is None:
                    continue
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(gradient, 1 - group["momentum"])
                ahead = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = 0.2 * max(ahead.shape) ** 0.5  # root mean square of an entry of AdamW's steps
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalise(ahead).reshape(parameter.shape), alpha=-group["lr"] * scale)


def muon_parameters(model: nn.Module) -> list[Tensor]:
    """The weights of linear layers and convolutions between hidden layers: those with at least 16 rows and columns."""
    return [module.weight for module in model.modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.requires_grad
            and min(module.weight.flatten(1).shape) >= 16]
