"""How alike sparse updates are: cosines, and shares of common positions, of all pairs at once.

Knows sparse vectors only; no model, peer, stake or threshold. What is done with the figures is in `duplicates` and
`repeats`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

BLOCK = 8192
"""Parameters made dense at once: 128 rows of float32 are 4 MB, which stay in a cache. A block of 32 MB took twice as
long, for a half of that the kernel cleared its pages."""

FEW = 8
"""So few rows are compared with others one by one: to make those dense would take longer."""


class Vector(Protocol):
    """By its nonzero part: an update is one."""

    @property
    def positions(self) -> NDArray[np.int64]:
        """Ascending and distinct, of at least 0."""
        ...

    @property
    def values(self) -> NDArray[np.float32]:
        """One each."""
        ...

    def norm(self) -> float:
        """Euclidean."""
        ...


class Sparse:
    """Implements Vector."""

    __slots__ = ("_norm", "positions", "values")

    def __init__(self, positions: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Raises: ValueError: positions that are negative, or not ascending and distinct."""
        if len(positions) and not (positions[0] >= 0 and (positions[1:] > positions[:-1]).all()):
            raise ValueError("expected ascending distinct positions of at least 0, got others")
        self.positions = positions
        self.values = values
        self._norm: float | None = None

    def norm(self) -> float:
        """See Vector."""
        if self._norm is None:
            self._norm = math.sqrt(np.sum(self.values.astype(np.float64) ** 2))
        return self._norm


def compute_norms(rows: Sequence[Vector]) -> Matrix:
    """(num_rows,) Euclidean norms."""
    return np.array([row.norm() for row in rows], np.float64)


def compute_cosines(rows: Sequence[Vector], size: int, others: Sequence[Vector] | None = None) -> Matrix:
    """(num_rows, num_others) cosines; 0 for a row of zeros, also with itself.

    Good to about 1e-6: products of float32, summed in float64 from block to block.

    Args:
        size: length of the vectors; what is held at once is bounded to BLOCK columns.
        others: what the rows are compared with; None: with each other.

    Raises:
        ValueError: positions outside of the vector.
    """
    return _multiply(_to_units(rows), size, None if others is None else _to_units(others))


class _Scaled(NamedTuple):
    """A vector whose values count `scale` times."""

    positions: NDArray[np.int64]
    values: NDArray[np.float32]
    scale: float


def _to_units(rows: Sequence[Vector]) -> list[_Scaled]:
    """Each with norm 1; a row of zeros stays one."""
    return [_Scaled(row.positions, row.values, 1 / row.norm() if row.norm() > 0 else 0.0) for row in rows]


def compute_overlaps(rows: Sequence[Vector], size: int) -> Matrix:
    """(num_rows, num_rows) shares of the smaller row's positions that the larger one has too, over chance.

    Two random choices of so many positions give 0 on average, the same choice (or a part of it) gives 1. Corrected for
    chance, since at 25% density a quarter is common anyway. 0 for a row without positions.

    Raises:
        ValueError: as `compute_cosines`.
    """
    ones = [_Scaled(row.positions, np.ones(len(row.positions), np.float32), 1.0) for row in rows]
    common = _multiply(ones, size)
    counts = np.array([len(row.positions) for row in rows], np.float64)
    smaller, chance = np.minimum.outer(counts, counts), np.maximum.outer(counts, counts) / max(size, 1)
    share = np.divide(common, smaller, out=np.zeros_like(common), where=smaller > 0)
    # Where every position is kept, positions tell nothing.
    return np.divide(share - chance, 1 - chance, out=np.zeros_like(share), where=(chance < 1) & (smaller > 0))


def _multiply(rows: Sequence[_Scaled], size: int, others: Sequence[_Scaled] | None = None) -> Matrix:
    """All inner products, with each other or with `others`."""
    for row in (*rows, *(others or ())):
        if len(row.positions) and row.positions[-1] >= size:
            raise ValueError(f"expected positions from 0 to {size - 1}, got {row.positions[-1]}")
    if others is not None and len(rows) <= FEW:
        return np.stack([_gather(row, others, size) for row in rows]) if rows else np.zeros((0, len(others)))
    products = np.zeros((len(rows), len(rows if others is None else others)), np.float64)
    blocks = _spread(rows, size), _spread(others or (), size)
    for left, right in zip(*blocks, strict=True):
        products += left @ (left if others is None else right).T
    return products


def _gather(row: _Scaled, others: Sequence[_Scaled], size: int) -> Matrix:
    """Inner products of one row, without making the others dense."""
    dense = np.zeros(size, np.float32)
    dense[row.positions] = row.values * np.float32(row.scale)
    return np.array([dense[other.positions] @ other.values * other.scale for other in others], np.float64)


def _spread(rows: Sequence[_Scaled], size: int) -> Iterator[NDArray[np.float32]]:
    """Dense blocks of at most BLOCK columns, each only until the next is asked for."""
    starts = range(0, size, BLOCK)
    # Scaled before they are multiplied: products of small ones would vanish.
    values = [row.values * np.float32(row.scale) for row in rows]
    cuts = [np.searchsorted(row.positions, [*starts, size]).tolist() for row in rows]
    whole = np.empty((len(rows), min(BLOCK, size)), np.float32)
    for number, start in enumerate(starts):
        block = whole[:, : size - start]
        block[:] = 0
        for dense, row, scaled, cut in zip(block, rows, values, cuts, strict=True):
            dense[row.positions[cut[number] : cut[number + 1]] - start] = scaled[cut[number] : cut[number + 1]]
        yield block
