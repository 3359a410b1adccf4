"""A round's game as estimators see it: updates, weights, and oracles for the held-out loss and its gradient.

Knows adapters as named tensors; no model, peer or message. Two games over the same updates:

    fixed weights (ours)       u(S) = L(w) - L(w + sum_{i in S} p_i D_i)
    renormalised (FedSV, GTG)  u(S) = L(w) - L(w + sum_{i in S} p_i D_i / sum_{i in S} p_i * sum_{i in N} p_i)

The second pays for a zero update (it dilutes the others) and has no slopes.
"""

from collections.abc import Callable, Sequence

from p2pfm.contribution.aumann_shapley import Diagonal, Gradient, Player, flatten, unflatten
from p2pfm.types import Array, Tensors

Losses = Callable[[Sequence[Tensors]], Sequence[float]]
"""Held-out losses [nats/token] of several adapters, on one fixed sample."""

ADAPTERS_MAX = 32
"""Adapters handed to `Losses` at once: bounds memory."""


class RoundGame:
    """`utility.SmoothGame` of one round. The base's own loss is evaluated once, the first time it is needed."""

    def __init__(
        self,
        base: Tensors,
        players: Sequence[Player],
        losses: Losses,
        gradient: Gradient,
        *,
        is_renormalised: bool = False,
    ) -> None:
        """`losses` and `gradient` must be of the same loss on the same sample.

        Raises:
            ValueError: a player has a position outside of the base's tensors.
        """
        self.num_players = len(players)
        self._base = base
        self._flat = flatten(base)
        self._players = players
        self._losses = losses
        self._diagonal = Diagonal(gradient, base, players)
        self._is_renormalised = is_renormalised
        self._loss_nats: float | None = None

    def utilities(self, coalitions: Sequence[int]) -> list[float]:
        """u(S) [nats/token] of each coalition: one loss each; the empty one is worth exactly 0."""
        if self._loss_nats is None:
            self._loss_nats = float(self._losses([self._base])[0])
        found: list[float] = []
        asked = [coalition for coalition in coalitions if coalition]
        for start in range(0, len(asked), ADAPTERS_MAX):
            part = [self.get_adapter(coalition) for coalition in asked[start : start + ADAPTERS_MAX]]
            found += [self._loss_nats - float(loss) for loss in self._losses(part)]
        answers = iter(found)
        return [next(answers) if coalition else 0.0 for coalition in coalitions]

    def slopes(self, place: float) -> list[float]:
        """Each player's partial derivative of u on the diagonal: one gradient.

        Raises:
            ValueError: the renormalised game, which is not defined between coalitions.
        """
        if self._is_renormalised:
            raise ValueError("the renormalised game has no slopes: ask for the game of fixed weights")
        return self._diagonal.earn(self._diagonal.gradient_at(place))

    def get_adapter(self, coalition: int) -> dict[str, Array]:
        """The base after the coalition's updates."""
        members = [player for index, player in enumerate(self._players) if coalition >> index & 1]
        scale = 1.0
        if self._is_renormalised:
            present = sum(player.weight for player in members)
            scale = sum(player.weight for player in self._players) / present if present > 0 else 0.0
        moved = self._flat.copy()
        for player in members:
            moved[player.positions] += scale * player.weight * player.values
        return unflatten(moved, self._base)
