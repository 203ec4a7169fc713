"""Unmaskers: which positions a step reveals.

A fixed order knows the positions of every step before the model runs, so the model computes those alone. The
confidence rule chooses among all masked positions after their tokens were drawn.

Shapes: B images, n masked positions an image at the start, k revealed in this step, m masked when the step begins.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .errors import unknown_name
from .orders import ORDERS, GridSize, roll_order


class Unmasker(Protocol):
    """One instance serves one call of the sampler and one batch."""

    def propose(self, count: int) -> Tensor:
        """Positions (B, k or m) the model has to evaluate in a step that reveals `count`."""
        ...

    def choose(self, log_probability: Tensor, count: int, progress: float) -> Tensor:
        """Given the log-probability (B, k or m) of the token drawn at each proposed position, the indices (B, count)
        into the proposed positions that are revealed. progress: share of the steps done after this one."""
        ...


class FixedOrder:
    """Reveals the positions in a given order: the paper's rule with Halton, or any other permutation.

    order: (B, n) positions still masked, in the order of their revelation.
    """

    def __init__(self, order: Tensor) -> None:
        self.order, self.done = order, 0

    def propose(self, count: int) -> Tensor:
        self.done += count
        return self.order[:, self.done - count : self.done]

    def choose(self, log_probability: Tensor, count: int, progress: float) -> Tensor:
        return torch.arange(count, device=log_probability.device).expand(len(log_probability), -1)


class Confidence:
    """Reveals the tokens the model is surest of, with Gumbel noise that fades linearly (MaskGIT; Chang et al., 2022).

    score = log p(token) + r_temp * (1 - progress) * gumbel. masked: (B, n) masked positions; noise: uniform
    (B, steps, N) in (0, 1), one an image, step and position.
    """

    def __init__(self, masked: Tensor, noise: Tensor, r_temp: float) -> None:
        self.masked, self.noise, self.r_temp, self.step = masked, noise, r_temp, 0

    def propose(self, count: int) -> Tensor:
        return self.masked

    def choose(self, log_probability: Tensor, count: int, progress: float) -> Tensor:
        uniform = self.noise[:, self.step].gather(1, self.masked)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
        score = log_probability.float().cpu() + self.r_temp * (1 - progress) * gumbel
        chosen = score.argsort(dim=1, descending=True, stable=True)[:, :count]
        keep = torch.ones_like(self.masked, dtype=torch.bool).scatter_(1, chosen, False)
        self.masked = self.masked[keep].unflatten(0, (len(keep), -1))
        self.step += 1
        return chosen


ORDER_NAMES = [*ORDERS, "confidence"]
"""All values of the sampler's `order`."""


def image_order(name: str, grid: GridSize, generator: torch.Generator, roll: bool) -> Tensor:
    """The order (N,) of one image: `name` of ORDERS, begun at a random offset drawn from the image's generator where
    roll is set."""
    if name not in ORDERS:
        raise unknown_name("order", name, ORDER_NAMES)
    order = ORDERS[name](grid, generator)
    if roll:
        order = roll_order(order, int(torch.randint(len(order), (1,), generator=generator)))
    return order
