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

from p2pfm.contribution.utility import Estimate, SmoothGame
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
        """`positions` are distinct; `values` as clipped; `weight` is p_i.

        Raises:
            ValueError: not one value a position, or a weight that is negative or no finite number.
        """
        if positions.shape != values.shape or positions.ndim != 1:
            raise ValueError(f"expected one value a position, got {values.shape} values at {positions.shape} positions")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"expected a finite weight of at least 0, got {weight}")
        self.positions = positions
        self.values = values
        self.weight = weight


class Diagonal:
    """A round's game where every update is in to the same degree."""

    def __init__(self, gradient: Gradient, base: Tensors, players: Sequence[Player]) -> None:
        """Add up the players' steps.

        Raises:
            ValueError: a player has a position outside of the base's tensors.
        """
        self._gradient = gradient
        self._base = base
        self._players = players
        self._flat = flatten(base)
        self._combined = np.zeros_like(self._flat)
        for player in players:
            if player.positions.size and player.positions.view(np.uint64).max() >= self._flat.size:  # negative: huge
                raise ValueError(f"expected positions from 0 to {self._flat.size - 1}, got others")
            self._combined[player.positions] += player.weight * player.values.astype(np.float64)

    def gradient_at(self, place: float) -> NDArray[np.float64]:
        """(num_parameters,) gradient of the loss at w + place * Dbar.

        Raises:
            ValueError: the oracle's names or shapes are not the base's.
        """
        answer = self._gradient(unflatten(self._flat + place * self._combined, self._base))
        expected = {name: values.shape for name, values in self._base.items()}
        if {name: np.shape(values) for name, values in answer.items()} != expected:
            raise ValueError(f"expected a gradient of {expected}, got {sorted(answer)}, or other shapes")
        return flatten(answer)

    def compute_slope(self, points: int = 2) -> NDArray[np.float64]:
        """(num_parameters,) mean gradient along the diagonal, by `points` gradients.

        Raises:
            ValueError: another number of points, or a gradient of another adapter.
        """
        if points not in NODES:
            raise ValueError(f"expected {sorted(NODES)} points, got {points}")
        slope = np.zeros_like(self._flat)
        for place, share in NODES[points]:
            slope += share * self.gradient_at(place)
        return slope

    def earn(self, slope: NDArray[np.float64]) -> list[float]:
        """-p_i D_i . slope of every player, in their order."""
        return [-player.weight * _dot(slope[player.positions], player.values) for player in self._players]


def compute_aumann_shapley(game: SmoothGame, points: int = 2) -> Estimate:
    """The values by `points` slopes (1, 2 or 3) on the game's diagonal.

    The Shapley value exactly where the game's multilinear extension is a polynomial of degree at most 2 * points.

    Raises:
        ValueError: another number of points, or a slope that is no finite number.
    """
    if points not in NODES:
        raise ValueError(f"expected {sorted(NODES)} points, got {points}")
    slopes = np.array([game.slopes(place) for place, _ in NODES[points]], np.float64)  # (points, num_players)
    if not np.isfinite(slopes).all():
        raise ValueError("expected finite slopes: the loss has no gradient on the way from the base to the merge")
    shares = np.array([share for _, share in NODES[points]])
    return Estimate(tuple((shares @ slopes).tolist()), None, 0, points)


def compute_contributions(gradient: Gradient, base: Tensors, players: Sequence[Player], points: int = 2) -> list[float]:
    """phi [nats/token] of every player, in their order; `points` gradients in all (1, 2 or 3). Not finite for a loss
    without a gradient there.

    Raises:
        ValueError: players or gradient of another adapter, or another number of points.
    """
    diagonal = Diagonal(gradient, base, players)
    return diagonal.earn(diagonal.compute_slope(points))


def flatten(tensors: Tensors) -> NDArray[np.float64]:
    """(num_parameters,) all values, names sorted."""
    if not tensors:
        return np.zeros(0, np.float64)
    return np.concatenate([np.asarray(tensors[name], np.float64).ravel() for name in sorted(tensors)])


def unflatten(flat: NDArray[np.float64], like: Tensors) -> dict[str, NDArray[np.float32]]:
    """Inverse of `flatten`, as float32 tensors of the names and shapes of `like`."""
    tensors: dict[str, NDArray[np.float32]] = {}
    start = 0
    for name in sorted(like):
        size = like[name].size
        tensors[name] = flat[start : start + size].astype(np.float32).reshape(like[name].shape)
        start += size
    return tensors


def _dot(left: NDArray[np.float64], right: NDArray[np.float32]) -> float:
    return float(left @ right.astype(np.float64))
