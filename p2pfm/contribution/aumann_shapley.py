"""Aumann-Shapley value of a round's game: a few gradients along the diagonal, whatever the number of peers.

Knows a gradient oracle, tensors and weights; no model, peer or message. The game, with weights p_i fixed before
scoring:  u(S) = L(w) - L(w + sum_{i in S} p_i D_i).  Its value on the diagonal (Aumann and Shapley 1974) by
Gauss-Legendre quadrature:

    Dbar = sum_j p_j D_j        phi_i = -p_i D_i . sum_k c_k grad L(w + t_k Dbar)

The values sum to u(N) up to the quadrature's error, a zero update gets exactly 0, and equal updates get equal values.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from p2pfm.types import Tensors

Gradient = Callable[[Tensors], Tensors]
"""The gradient of the held-out loss [nats/token] at an adapter, on one fixed sample."""

NODES: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((0.5, 1.0),),
    2: ((0.5 - 0.5 / math.sqrt(3), 0.5), (0.5 + 0.5 / math.sqrt(3), 0.5)),
    3: ((0.5 - 0.5 * math.sqrt(0.6), 5 / 18), (0.5, 8 / 18), (0.5 + 0.5 * math.sqrt(0.6), 5 / 18)),
}
"""Gauss-Legendre (t_k, c_k) on [0, 1] by number of points: two are exact for cubic losses."""


class Player:
    """An update in the game: its nonzero part in the flat vector of all tensors (sorted names), and its weight."""

    __slots__ = ("positions", "values", "weight")

    def __init__(self, positions: NDArray[np.int64], values: NDArray[np.float32], weight: float) -> None:
        """`values` as clipped; `weight` is p_i."""
        self.positions = positions
        self.values = values
        self.weight = weight


def compute_contributions(
    gradient: Gradient, base: Tensors, players: Sequence[Player], points: int = 2, repeated: Tensors | None = None
) -> list[float]:
    """phi [nats/token] of every player, in their order; `points` gradients in all (1, 2 or 3).

    Args:
        repeated: the last aggregate. What an update has of it (its projection, where positive) earns nothing: who
            replays the aggregate would else draw two thirds of honest pay (ALGORITHMS, part 4). An update that points
            against it is not excused for that part.
    """
    flat = _flatten(base)
    combined = np.zeros_like(flat)
    for player in players:
        combined[player.positions] += player.weight * player.values.astype(np.float64)
    slope = np.zeros_like(flat)
    for place, share in NODES[points]:
        slope += share * _flatten(gradient(_unflatten(flat + place * combined, base)))
    values = [-player.weight * _dot(slope[player.positions], player.values) for player in players]
    if repeated is None:
        return values
    old = _flatten(repeated)
    energy, gain = float(np.sum(old * old)), float(np.sum(slope * old))
    if energy == 0:
        return values
    parts = [max(0.0, _dot(old[player.positions], player.values)) / energy for player in players]
    return [value + player.weight * part * gain for value, player, part in zip(values, players, parts, strict=True)]


def _dot(left: NDArray[np.float64], right: NDArray[np.float32]) -> float:
    return float(np.sum(left * right.astype(np.float64)))


def _flatten(tensors: Tensors) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(tensors[name], np.float64).ravel() for name in sorted(tensors)])


def _unflatten(flat: NDArray[np.float64], like: Tensors) -> dict[str, NDArray[np.float32]]:
    tensors: dict[str, NDArray[np.float32]] = {}
    start = 0
    for name in sorted(like):
        size = like[name].size
        tensors[name] = flat[start : start + size].astype(np.float32).reshape(like[name].shape)
        start += size
    return tensors
