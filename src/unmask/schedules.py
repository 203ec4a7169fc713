"""Schedules: curves [0, 1] -> [0, 1] that say what share of the tokens is known at a given share of the steps.

One curve serves sampling (how many tokens a step reveals) and training (how many are masked).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import unknown_name

Schedule = str | float
"""A name of :data:`CURVES`, or a power p > 0 (the curve t ** p)."""

CURVES: dict[str, float | Callable[[float], float]] = {
    "arccos": lambda t: 1 - math.acos(t) / (math.pi / 2),
    "square": 2.0,
    "cosine": lambda t: 1 - math.cos(t * math.pi / 2),
    "linear": 1.0,
    "root": 0.5,
}
"""A curve, or the power of t that it is. Python floats, not tensors: the last bit of torch.acos depends on the machine,
and decides the count where curve * n is a whole number (arccos, 576 tokens, half-way)."""

EXACT_POWERS = range(1, 17)
"""Powers whose counts use integers of any length; beyond them a float is as good and stays quick."""


def _look_up(schedule: Schedule) -> float | Callable[[float], float]:
    """The entry of CURVES, or the power; ValueError for an unknown name."""
    if isinstance(schedule, str) and schedule in CURVES:
        return CURVES[schedule]
    try:
        power = float(schedule)
    except (TypeError, ValueError):
        raise unknown_name("schedule", schedule, [*CURVES, "or a power such as 3"]) from None
    if not (math.isfinite(power) and power > 0):
        raise ValueError(f"a schedule's power must be a positive number, got {schedule}")
    return power


def power_of(schedule: Schedule) -> float | None:
    """The power of a schedule that is one ("square", 3, "2.5"), else None; ValueError for an unknown name."""
    entry = _look_up(schedule)
    return None if callable(entry) else entry


def curve(schedule: Schedule, t: float) -> float:
    """Share known at time t in [0, 1]; 0 at 0, 1 at 1, rising."""
    entry = _look_up(schedule)
    return entry(t) if callable(entry) else t**entry


def mask_ratio(schedule: Schedule, u: Tensor) -> Tensor:
    """Share masked while training (same shape and dtype as u) for u uniform in [0, 1]: 1 - curve(u). For "arccos" this
    is the public code's arccos(u) / (pi / 2)."""
    shares = [1 - curve(schedule, t) for t in u.flatten().tolist()]
    return torch.tensor(shares, dtype=u.dtype, device=u.device).view_as(u)


def cumulative_counts(schedule: Schedule, n: int, steps: int) -> list[int]:
    """Tokens known after each step: max(i + 1, floor(curve((i + 1) / steps) * n)), the public code's rule, and n after
    the last step.

    Integer powers use exact integer arithmetic, so that square on 1,024 tokens and 32 steps is (i + 1) ** 2, which is
    Table 4's column. Where the rule would leave the steps to come less than a token each (curves that flatten at the
    end), the count is lowered to leave them one. That makes every step reveal: a curve that bends one way only, as all
    here do, runs below i + 1 or above that limit wherever it gains less than a token a step.
    """
    if steps < 1:
        raise ValueError(f"the number of steps must be at least 1, got {steps}")
    if steps > n:
        raise ValueError(f"{steps} steps are more than the {n} tokens to reveal: use at most {n}")
    power = power_of(schedule)
    if power is not None and power in EXACT_POWERS:
        p = int(power)
        floors = [(i + 1) ** p * n // steps**p for i in range(steps)]
    else:
        floors = [math.floor(curve(schedule, (i + 1) / steps) * n) for i in range(steps)]
    floors[-1] = n
    return [min(max(i + 1, floor), n - (steps - 1 - i)) for i, floor in enumerate(floors)]


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
