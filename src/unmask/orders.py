"""Orders: permutations of the positions of a token grid.

Every order is a LongTensor (N,) of row-major positions, N = h * w, each position exactly once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

GridSize = tuple[int, int]


def _check(grid: GridSize) -> GridSize:
    h, w = grid
    if h < 1 or w < 1:
        raise ValueError(f"a grid needs at least one row and one column, got {h}x{w}")
    return int(h), int(w)


def radical_inverse(start: int, stop: int, base: int) -> tuple[np.ndarray, int]:
    """Numerators (int64) and the common denominator of the radical inverses of start, ..., stop - 1 in `base`.

    The radical inverse mirrors the digits of an integer at the radix point (Halton 1960; the sequence of Algorithm 1
    of the paper is that of 1, 2, 3, ...).
    """
    index = np.arange(start, stop, dtype=np.int64)
    numerator, denominator = np.zeros_like(index), 1
    while index.any():
        numerator = numerator * base + index % base
        index //= base
        denominator *= base
    return numerator, denominator


def _halton_cells(start: int, stop: int, grid: GridSize) -> np.ndarray:
    (n2, d2), (n3, d3) = radical_inverse(start, stop, 2), radical_inverse(start, stop, 3)
    return n2 * grid[0] // d2 * grid[1] + n3 * grid[1] // d3


def _first_visits(cells: Callable[[int, int], np.ndarray], n: int) -> Tensor:
    """Order of the first visit to each of n cells by a sequence of points, drawn until every cell was visited."""
    seen, start, stop = np.empty(0, dtype=np.int64), 1, 4 * n + 1
    while True:
        both = np.concatenate([seen, cells(start, stop)])
        _, first = np.unique(both, return_index=True)
        seen = both[np.sort(first)]
        if len(seen) == n:
            return torch.from_numpy(seen)
        start, stop = stop, 2 * stop


@functools.lru_cache(maxsize=64)
def _halton(grid: GridSize) -> Tensor:
    return _first_visits(lambda a, b: _halton_cells(a, b, grid), grid[0] * grid[1])


@functools.lru_cache(maxsize=64)
def _sobol(grid: GridSize) -> Tensor:
    size = torch.tensor(grid, dtype=torch.float64)

    def cells(start: int, stop: int) -> np.ndarray:
        engine = torch.quasirandom.SobolEngine(dimension=2).fast_forward(start - 1)
        row, column = (engine.draw(stop - start, dtype=torch.float64) * size).long().unbind(1)
        return (row * grid[1] + column).numpy()

    return _first_visits(cells, grid[0] * grid[1])


def halton_order(grid: GridSize) -> Tensor:
    """The Halton order of a grid.

    Parameters
    ----------
    grid : (h, w)
        Any rectangle; h and w at least 1.

    Returns
    -------
    LongTensor (N,)
        Row-major positions in the order in which the two-dimensional Halton sequence (base 2 for the row, base 3 for
        the column) first visits their cells. Points are drawn until every cell is covered, and the arithmetic is
        exact (integers), so no cell is lost or misplaced at any size.

    Notes
    -----
    Paper, section 5 and Algorithm 1. On square grids from 4 to 48 this is the order of the public code; that code
    stops after 10,000 points, which leaves 6 cells of a 64x64 grid masked for ever.

    Examples
    --------
    >>> halton_order((2, 2)).tolist()
    [2, 1, 0, 3]
    """
    return _halton(_check(grid)).clone()


def sobol_order(grid: GridSize) -> Tensor:
    """First visits of the two-dimensional Sobol sequence (Sobol 1967; no scrambling) to the cells of a grid."""
    return _sobol(_check(grid)).clone()


def raster_order(grid: GridSize) -> Tensor:
    """Left to right, top to bottom."""
    h, w = _check(grid)
    return torch.arange(h * w)


def random_order(grid: GridSize, generator: torch.Generator) -> Tensor:
    """A uniform random permutation drawn from `generator`."""
    h, w = _check(grid)
    return torch.randperm(h * w, generator=generator)


ORDERS: dict[str, Callable[[GridSize, torch.Generator], Tensor]] = {
    "halton": lambda grid, _: halton_order(grid),
    "random": random_order,
    "raster": lambda grid, _: raster_order(grid),
    "sobol": lambda grid, _: sobol_order(grid),
}


def roll_order(order: Tensor, offset: int) -> Tensor:
    """The order begun at another place: element i of the result is element (i - offset) mod N of `order`. The public
    code rolls each picture's order by a random offset, so that pictures of a batch differ in their first token."""
    return torch.roll(order, offset)
