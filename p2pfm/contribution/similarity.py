"""How alike sparse updates are: cosines, and shares of common positions, of all pairs at once.

Knows sparse vectors only; no model, peer, stake or threshold. What is done with the figures is in `duplicates` and
`repeats`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

BLOCK = 4096
"""Parameters multiplied at once: 384 rows of float32 are 6 MB, which stay in a cache; eight times as many took twice as
long."""

FEW = 8
"""So few rows are compared with others one by one: to make those dense would take longer."""


class Sparse(NamedTuple):
    """A vector by its nonzero part: sorted distinct positions, and one value each."""

    positions: NDArray[np.int64]
    values: NDArray[np.float32]


def compute_norms(rows: Sequence[Sparse]) -> Matrix:
    """(num_rows,) Euclidean norms."""
    return np.array([np.sqrt(np.sum(row.values.astype(np.float64) ** 2)) for row in rows], np.float64)


def compute_cosines(rows: Sequence[Sparse], size: int, others: Sequence[Sparse] | None = None) -> Matrix:
    """(num_rows, num_others) cosines; 0 for a row of zeros, also with itself.

    Good to about 1e-6: products of float32, summed in float64 from block to block.

    Args:
        size: length of the vectors; bounds what is held at once to BLOCK columns.
        others: what the rows are compared with; None: with each other.

    Raises:
        ValueError: positions that are not sorted and distinct, or outside of the vector.
    """
    return _multiply(_to_units(rows), size, None if others is None else _to_units(others))


def _to_units(rows: Sequence[Sparse]) -> list[Sparse]:
    norms = compute_norms(rows)
    scales = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return [
        Sparse(row.positions, (row.values * scale).astype(np.float32)) for row, scale in zip(rows, scales, strict=True)
    ]


def compute_overlaps(rows: Sequence[Sparse], size: int) -> Matrix:
    """(num_rows, num_rows) shares of the smaller row's positions that the larger one has too, over chance.

    Two random choices of so many positions give 0 on average, the same choice (or a part of it) gives 1. Corrected for
    chance, since at 25% density a quarter is common anyway. 0 for a row without positions.

    Raises:
        ValueError: as `compute_cosines`.
    """
    ones = [Sparse(row.positions, np.ones(len(row.positions), np.float32)) for row in rows]
    common = _multiply(ones, size)
    counts = np.array([len(row.positions) for row in rows], np.float64)
    smaller, chance = np.minimum.outer(counts, counts), np.maximum.outer(counts, counts) / max(size, 1)
    share = np.divide(common, smaller, out=np.zeros_like(common), where=smaller > 0)
    # Where every position is kept, positions tell nothing.
    return np.divide(share - chance, 1 - chance, out=np.zeros_like(share), where=(chance < 1) & (smaller > 0))


def _multiply(rows: Sequence[Sparse], size: int, others: Sequence[Sparse] | None = None) -> Matrix:
    """All inner products, with each other or with `others`."""
    for row in (*rows, *(others or ())):
        _validate(row, size)
    if others is not None and len(rows) <= FEW:
        return np.stack([_gather(row, others, size) for row in rows]) if rows else np.zeros((0, len(others)))
    products = np.zeros((len(rows), len(rows if others is None else others)), np.float64)
    right = None if others is None else _spread(others, size)
    for block in _spread(rows, size):
        products += block @ (block if right is None else next(right)).T
    return products


def _gather(row: Sparse, others: Sequence[Sparse], size: int) -> Matrix:
    """Inner products of one row, without making the others dense."""
    dense = np.zeros(size, np.float32)
    dense[row.positions] = row.values
    return np.array([dense[other.positions] @ other.values for other in others], np.float64)


def _spread(rows: Sequence[Sparse], size: int) -> Iterator[NDArray[np.float32]]:
    """Dense blocks of at most BLOCK columns."""
    starts = range(0, size, BLOCK)
    cuts = [np.searchsorted(row.positions, [*starts, size]) for row in rows]
    for number, start in enumerate(starts):
        block = np.zeros((len(rows), min(BLOCK, size - start)), np.float32)
        for index, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
            part = slice(cut[number], cut[number + 1])
            block[index, row.positions[part] - start] = row.values[part]
        yield block


def _validate(row: Sparse, size: int) -> None:
    positions = row.positions
    if len(positions) and not (positions[0] >= 0 and positions[-1] < size and (np.diff(positions) > 0).all()):
        raise ValueError(f"expected sorted distinct positions from 0 to {size - 1}, got others")
