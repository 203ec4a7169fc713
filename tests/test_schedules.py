"""Counts against the paper's Table 4 and the public code, and what every schedule keeps."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from unmask.schedules import CURVES, cumulative_counts, curve, mask_ratio, power_of, reveal_counts
from unmask.training.objective import draw_mask

PUBLIC = json.loads((Path(__file__).parent / "data" / "schedules_orders.json").read_text())["cumulative_counts"]

TABLE_4 = {4: (25, 2), 8: (81, 8), 12: (169, 16), 16: (289, 28), 20: (441, 43), 24: (625, 61), 28: (841, 82),
           31: (1024, 100)}
"""Step index (from 0) of 32 on a 32x32 grid: (tokens known after it, per cent as the paper prints it)."""

SCHEDULES = [*CURVES, 1, 2, 3, 2.5, "0.25", 7, 20.0, 0.1, 30.0]


def check(schedule: str | float, n: int, steps: int) -> None:
    counts = reveal_counts(schedule, n, steps)
    assert len(counts) == steps
    assert sum(counts) == n
    assert min(counts) >= 1


def test_table_4() -> None:
    known = cumulative_counts("square", 1024, 32)
    for index, (count, per_cent) in TABLE_4.items():
        assert known[index] == count
        assert abs(100 * count / 1024 - per_cent) < 1  # the paper prints 7.9 as 8 and 16.5 as 16
    assert known == [(i + 1) ** 2 for i in range(32)]


@pytest.mark.parametrize("key", PUBLIC)
def test_counts_of_the_public_code(key: str) -> None:
    name, n, steps = key.split("_")
    assert cumulative_counts(name, int(n[1:]), int(steps[1:])) == PUBLIC[key]


@given(st.sampled_from(SCHEDULES) | st.floats(0.01, 100), st.integers(1, 4096), st.data())
def test_every_step_reveals_and_all_is_revealed(schedule: str | float, n: int, data: st.DataObject) -> None:
    check(schedule, n, data.draw(st.integers(1, n)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_steps_of_small_grids(schedule: str | float) -> None:
    for n in range(1, 41):
        for steps in range(1, n + 1):
            check(schedule, n, steps)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [*CURVES, 3, 0.1])
@pytest.mark.parametrize("n", [64, 255, 256, 576, 1024, 4096])
def test_all_steps_of_large_grids(schedule: str | float, n: int) -> None:
    for steps in range(1, n + 1):
        check(schedule, n, steps)


@pytest.mark.parametrize("schedule", [*CURVES, 1, 3, 5, 2.5])
@pytest.mark.parametrize(("n", "steps"), [(64, 16), (256, 12), (576, 8), (100, 100), (7, 3), (1024, 33), (3000, 10)])
def test_the_rule(schedule: str | float, n: int, steps: int) -> None:
    """max(i + 1, floor(curve * n)), lowered so as to leave one for each step to come; n at the end. The floor of a
    whole power is exact."""
    *ours, end = cumulative_counts(schedule, n, steps)
    assert end == n
    for i, count in enumerate(ours):
        if power_of(schedule) in (1, 2, 3, 5):
            floor = math.floor(Fraction(i + 1, steps) ** int(power_of(schedule)) * n)
        else:
            floor = math.floor(reference.curve(schedule, (i + 1) / steps) * n)
        assert count == min(max(i + 1, floor), n - (steps - 1 - i))


def test_a_huge_power_is_quick() -> None:
    assert reveal_counts(1e9, 64, 8) == [1] * 7 + [57]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_curves_rise_from_0_to_1(schedule: str | float) -> None:
    known = [curve(schedule, i / 100) for i in range(101)]
    assert known[0] == pytest.approx(0, abs=1e-12)
    assert known[-1] == pytest.approx(1)
    assert all(a <= b for a, b in zip(known, known[1:], strict=False))


@pytest.mark.parametrize("schedule", [*CURVES, 2.5])
def test_curves_are_what_their_names_say(schedule: str | float) -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64).view(101, 1)
    expected = torch.tensor([reference.curve(schedule, float(t)) for t in u], dtype=torch.float64).view(101, 1)
    torch.testing.assert_close(mask_ratio(schedule, u), 1 - expected)
    assert mask_ratio(schedule, u.float()).dtype == torch.float32
    assert curve(schedule, 0.3) == pytest.approx(reference.curve(schedule, 0.3))


def test_powers() -> None:
    assert [power_of(s) for s in ("square", "linear", "root", "arccos", "cosine")] == [2, 1, 0.5, None, None]
    assert [power_of(s) for s in (3, "3", 2.5, "2.5")] == [3, 3, 2.5, 2.5]
    assert reveal_counts("square", 100, 7) == reveal_counts(2, 100, 7) == reveal_counts("2", 100, 7)
    assert reveal_counts("square", 100, 7) != reveal_counts(3, 100, 7) != reveal_counts(2.5, 100, 7)


@pytest.mark.parametrize("schedule", ["arccos", "square", 3])
def test_sampling_and_training_share_the_curve(schedule: str | float) -> None:
    """The share masked in training is that of a sampler stopped at a uniformly random time: their means agree."""
    mask = draw_mask(20_000, 64, schedule, torch.Generator().manual_seed(0))
    known = cumulative_counts(schedule, 10**6, 500)
    assert mask.double().mean().item() == pytest.approx(1 - sum(known) / 500 / 10**6, abs=0.01)
    assert mask.any(dim=1).all()


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {steps}"):
        reveal_counts("square", 16, steps)


def test_more_steps_than_tokens() -> None:
    with pytest.raises(ValueError, match="17 steps are more than the 16 tokens"):
        reveal_counts("square", 16, 17)


@pytest.mark.parametrize("power", [0, -1, math.inf, math.nan, "-2", "nan"])
def test_powers_that_are_none(power: float | str) -> None:
    with pytest.raises(ValueError, match=f"positive number, got {power}"):
        power_of(power)


@pytest.mark.parametrize("name", ["sqare", "", None])
def test_an_unknown_schedule_lists_the_choices(name: str | None) -> None:
    with pytest.raises(ValueError, match=f"unknown schedule '{name}'.*arccos, square, cosine, linear, root"):
        reveal_counts(name, 16, 4)
