"""How unequally amounts are spread: Gini coefficient and Lorenz curve. Pure; knows no peer and no wei.

Exact integers up to the last division, so that amounts of 10**26 wei lose nothing.
"""

from collections.abc import Sequence
from fractions import Fraction


def compute_gini(amounts: Sequence[int]) -> float:
    """The Gini coefficient: mean absolute difference of all pairs over twice the mean, 0 (equal) to (n - 1) / n (one
    has all). It is 1 minus twice the area under `compute_lorenz`. Nothing at all is equally spread: 0.

    Raises:
        ValueError: no amounts, or a negative one.
    """
    ordered = _sort(amounts)
    count, total = len(ordered), sum(ordered)
    if total == 0:
        return 0.0
    ranked = sum(rank * amount for rank, amount in enumerate(ordered, start=1))
    return float(Fraction(2 * ranked - (count + 1) * total, count * total))


def compute_lorenz(amounts: Sequence[int]) -> tuple[tuple[float, float], ...]:
    """Points (share of people, poorest first; their share of the total) from (0, 0) to (1, 1): n + 1 of them.

    Convex and never above the diagonal; nothing at all is spread equally: the diagonal.

    Raises:
        ValueError: no amounts, or a negative one.
    """
    ordered = _sort(amounts)
    if sum(ordered) == 0:
        ordered = [1] * len(ordered)
    count, total, below = len(ordered), sum(ordered), 0
    points = [(0.0, 0.0)]
    for rank, amount in enumerate(ordered, start=1):
        below += amount
        points.append((rank / count, float(Fraction(below, total))))
    return tuple(points)


def _sort(amounts: Sequence[int]) -> list[int]:
    if not amounts or min(amounts) < 0:
        raise ValueError(f"expected at least one amount, none negative, got {list(amounts)[:10]}")
    return sorted(amounts)
