"""Schedules: curves [0, 1] -> [0, 1] that say what share of the tokens is known at a given share of the steps.

One curve serves sampling (how many tokens a step reveals) and training (how many are masked).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from .errors import unknown_name

Schedule = str | float
"""A name of :data:`CURVES`, or a power p > 0 (the curve t ** p)."""

CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "arccos": lambda t: 1 - torch.acos(t) / (math.pi / 2),
    "square": lambda t: t**2,
    "cosine": lambda t: 1 - torch.cos(t * math.pi / 2),
    "linear": lambda t: t,
    "root": lambda t: t**0.5,
}


def power_of(schedule: Schedule) -> float | None:
    """The power of a schedule that is one ("square", 3, "2.5"), else None; ValueError for an unknown name."""
    if isinstance(schedule, str) and schedule in CURVES:
        return {"square": 2.0, "linear": 1.0, "root": 0.5}.get(schedule)
    try:
        power = float(schedule)
    except ValueError:
        raise unknown_name("schedule", schedule, [*CURVES, "or a power such as 3"]) from None
    if not (math.isfinite(power) and power > 0):
        raise ValueError(f"a schedule's power must be a positive number, got {schedule}")
    return power


def curve(schedule: Schedule, t: Tensor) -> Tensor:
    """Share known (same shape and dtype as t) at time t in [0, 1]; 0 at 0, 1 at 1, rising."""
    power = power_of(schedule)
    return CURVES[str(schedule)](t) if power is None else t**power


def mask_ratio(schedule: Schedule, u: Tensor) -> Tensor:
    """Share masked while training for u uniform in [0, 1]: 1 - curve(u). For "arccos" this is the public code's
    arccos(u) / (pi / 2)."""
    return 1 - curve(schedule, u)


def cumulative_counts(schedule: Schedule, n: int, steps: int) -> list[int]:
    """Tokens known after each step: max(i + 1, floor(curve((i + 1) / steps) * n)), the public code's rule, and n after
    the last step.

    Integer powers use exact integer arithmetic, so that square on 1,024 tokens and 32 steps is (i + 1) ** 2, which is
    Table 4's column. Where the rule itself would leave a step without a token (curves that flatten at the end), the
    count is moved by the least that gives every step one.
    """
    if steps < 1:
        raise ValueError(f"the number of steps must be at least 1, got {steps}")
    if steps > n:
        raise ValueError(f"{steps} steps are more than the {n} tokens to reveal: use at most {n}")
    power = power_of(schedule)
    if power is not None and power.is_integer():
        shares = [Fraction(i + 1, steps) ** int(power) for i in range(steps)]
        floors = [int(share * n) for share in shares]
    else:
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        floors = torch.floor(curve(schedule, t) * n).long().tolist()
    floors[-1] = n
    counts: list[int] = []
    for i, floor in enumerate(floors):
        least = max(i + 1, counts[-1] + 1 if counts else 1)
        counts.append(min(max(least, floor), n - (steps - 1 - i)))
    return counts


def reveal_counts(schedule: Schedule, n: int, steps: int) -> list[int]:
    """Tokens each step reveals.

    Parameters
    ----------
    schedule : str or float
        A name of CURVES or a power.
    n : int
        Tokens to reveal in all.
    steps : int
        At least 1, at most n (ValueError otherwise).

    Returns
    -------
    list of int
        One entry a step, each at least 1, their sum n.

    Notes
    -----
    Paper, Table 4: on 1,024 tokens and 32 steps "square" reveals 2, 8, 16, 28, 43, 61, 82, 100 % after steps 5, 9,
    13, 17, 21, 25, 29, 32.

    Examples
    --------
    >>> reveal_counts("square", 16, 4)
    [1, 3, 5, 7]
    """
    counts = cumulative_counts(schedule, n, steps)
    return [b - a for a, b in zip([0, *counts], counts, strict=False)]
