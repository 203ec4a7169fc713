"""Orders against the paper's algorithm, SciPy's sequences and exact enumerations."""

import json
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import qmc

from reference import algorithm1, van_der_corput
from unmask.orders import ORDERS, halton_order, radical_inverse, random_order, raster_order, roll_order, sobol_order
from unmask.unmaskers import image_order

PUBLIC = json.loads((Path(__file__).parent / "data" / "schedules_orders.json").read_text())["halton_order_row_col"]
POINTS = 8000  # the squares up to 48 need at most 6,911


@pytest.fixture(scope="module")
def literal() -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Points of Algorithm 1 as exact fractions, (row, column)."""
    return list(zip(algorithm1(2, POINTS), algorithm1(3, POINTS), strict=True))


def first_visits(cells: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(cells))


def exact_order(grid: tuple[int, int]) -> list[int]:
    """Cells in the order in which the radical inverses of 1, 2, 3, ... first reach them, one integer at a time."""
    h, w = grid

    def mirrored(index: int, base: int) -> tuple[int, int]:
        n, d = 0, 1
        while index:
            index, digit = divmod(index, base)
            n, d = n * base + digit, d * base
        return n, d

    seen: dict[int, None] = {}
    index = 0
    while len(seen) < h * w:
        index += 1
        (n2, d2), (n3, d3) = mirrored(index, 2), mirrored(index, 3)
        seen[n2 * h // d2 * w + n3 * w // d3] = None
    return list(seen)


@pytest.mark.parametrize("size", range(4, 49))
def test_halton_is_algorithm_1(size: int, literal: list) -> None:
    """The floors are taken of exact fractions: n / d * size in floats may land on the wrong side of an integer."""
    cells = first_visits(n2 * size // d2 * size + n3 * size // d3 for (n2, d2), (n3, d3) in literal)
    assert halton_order((size, size)).tolist() == cells


def scipy_cells(size: int, points: Iterator[tuple[float, float]]) -> Iterator[int]:
    """Cells of SciPy's float points. Where a product is within 1e-9 of an integer, and its floor therefore a matter of
    rounding, the integer is taken: SciPy's points are below the true ones by rounding alone, and the true product of
    such a point is that integer (checked in test_scipy_points)."""
    for row, column in points:
        r, c = row * size, column * size
        yield int(r + 1e-9) * size + int(c + 1e-9)


@pytest.fixture(scope="module")
def scipy_points() -> list[tuple[float, float]]:
    return qmc.Halton(d=2, scramble=False).random(POINTS + 1)[1:].tolist()  # SciPy's sequence begins at 0


def test_scipy_points(scipy_points: list, literal: list) -> None:
    """SciPy, Algorithm 1 and our numerators are one sequence; no product lies within 1e-9 of an integer but those that
    are integers, so that scipy_cells takes no wrong floor."""
    (n2, d2), (n3, d3) = radical_inverse(1, POINTS + 1, 2), radical_inverse(1, POINTS + 1, 3)
    for i, ((row, column), (a, b)) in enumerate(zip(scipy_points, literal, strict=True)):
        assert abs(row - a[0] / a[1]) < 1e-14
        assert abs(column - b[0] / b[1]) < 1e-14
        assert int(n2[i]) * a[1] == a[0] * d2
        assert int(n3[i]) * b[1] == b[0] * d3
    assert 1 / max(d2, d3) > 1e-9
    for i in range(200):
        assert Fraction(int(n3[i]), d3) == van_der_corput(i + 1, 3)


@pytest.mark.parametrize("size", range(4, 49))
def test_halton_is_scipys_sequence(size: int, scipy_points: list) -> None:
    assert halton_order((size, size)).tolist() == first_visits(scipy_cells(size, iter(scipy_points)))


@pytest.mark.parametrize("size", PUBLIC)
def test_halton_is_the_public_order(size: str) -> None:
    side = int(size)
    assert halton_order((side, side)).tolist() == [row * side + column for row, column in PUBLIC[size]]


@pytest.mark.parametrize("grid", [(64, 64), (96, 96), (24, 40), (1, 64), (64, 1), (1, 1), (27, 32)])
def test_halton_is_the_exact_enumeration(grid: tuple[int, int]) -> None:
    assert halton_order(grid).tolist() == exact_order(grid)


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40))
def test_halton_on_any_rectangle(h: int, w: int) -> None:
    assert halton_order((h, w)).tolist() == exact_order((h, w))


@pytest.mark.parametrize("start", [1, 2, 8, 9, 1000])
@pytest.mark.parametrize("base", [2, 3, 10])
def test_radical_inverse_of_a_range(start: int, base: int) -> None:
    numerators, denominator = radical_inverse(start, start + 30, base)
    values = [Fraction(int(n), denominator) for n in numerators]
    assert values == [van_der_corput(i, base) for i in range(start, start + 30)]


@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (32, 32), (5, 12), (1, 7)])
def test_sobol_is_scipys_sequence(grid: tuple[int, int]) -> None:
    """Sobol points are dyadic: a float holds them and their products with small integers exactly."""
    points = qmc.Sobol(d=2, scramble=False).random(2**14)
    cells = [int(row * grid[0]) * grid[1] + int(column * grid[1]) for row, column in points]
    assert sobol_order(grid).tolist() == first_visits(cells)


@given(st.sampled_from(sorted(ORDERS)), st.integers(1, 24), st.integers(1, 24), st.booleans(), st.integers(0, 2**32))
def test_every_order_is_a_permutation(name: str, h: int, w: int, roll: bool, seed: int) -> None:
    order = image_order(name, (h, w), torch.Generator().manual_seed(seed), roll)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(h * w))


def test_raster() -> None:
    assert raster_order((2, 3)).tolist() == [0, 1, 2, 3, 4, 5]


def test_random_comes_from_the_generator() -> None:
    def order(seed: int) -> list[int]:
        return random_order((6, 6), torch.Generator().manual_seed(seed)).tolist()

    assert order(1) == order(1) == torch.randperm(36, generator=torch.Generator().manual_seed(1)).tolist()
    assert order(1) != order(2)


@pytest.mark.parametrize("offset", [0, 1, 7, 63])
def test_roll(offset: int) -> None:
    order = halton_order((8, 8))
    rolled = roll_order(order, offset)
    assert all(rolled[i] == order[(i - offset) % 64] for i in range(64))


def test_image_order_rolls_by_the_images_own_generator() -> None:
    generator = torch.Generator().manual_seed(3)
    offset = int(torch.randint(64, (1,), generator=torch.Generator().manual_seed(3)))
    assert offset
    assert image_order("halton", (8, 8), generator, True).tolist() == roll_order(halton_order((8, 8)), offset).tolist()


@pytest.mark.parametrize("order", [halton_order, sobol_order])
def test_a_caller_cannot_spoil_the_cache(order) -> None:
    first = order((4, 4))
    kept = first.tolist()
    first.zero_()
    assert order((4, 4)).tolist() == kept


@pytest.mark.parametrize("order", [halton_order, sobol_order, raster_order])
@pytest.mark.parametrize("grid", [(0, 4), (4, 0), (-1, 4)])
def test_empty_grids_are_refused(order, grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{grid[0]}x{grid[1]}"):
        order(grid)


def test_an_unknown_order_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown order 'holton': did you mean halton.*raster"):
        image_order("holton", (4, 4), torch.Generator(), False)


@pytest.mark.usefixtures("global_random_state_kept")
def test_no_order_touches_the_global_generators() -> None:
    for name in ORDERS:
        image_order(name, (9, 11), torch.Generator().manual_seed(0), True)
