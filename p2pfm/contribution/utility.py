"""What a coalition is worth, and what an estimator answers: the one interface between games and estimators.

Knows no model and no peer. A coalition is a bit mask (bit i set: player i is in). Every estimator takes a game and its
own options, asks the game in batches, and gives an `Estimate`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Utility = Callable[[int], float]
"""Utility of one coalition [nats/token in a round's game]."""

PLAYERS_EXACT_MAX = 12
"""2**12 evaluations: the most that an audit waits for."""


class Game(Protocol):
    """Players and what each coalition of them is worth. Deterministic: one coalition, one utility."""

    @property
    def num_players(self) -> int:
        """Players in all."""
        ...

    def utilities(self, coalitions: Sequence[int]) -> Sequence[float]:
        """The utility of each coalition, in their order. Estimators ask for as many at once as they can."""
        ...


class SmoothGame(Game, Protocol):
    """A game that is defined between coalitions too: every player in to the same degree (the diagonal)."""

    def slopes(self, place: float) -> Sequence[float]:
        """Each player's partial derivative of the utility where all players are in to the degree `place` in [0, 1].

        In a round's game this is one gradient of the loss, whatever the number of players.
        """
        ...


class Estimate(NamedTuple):
    """What an estimator says of a game."""

    values: tuple[float, ...]
    """By player [the game's unit]."""
    standard_errors: tuple[float, ...] | None
    """Of the values, from the spread of samples; None where nothing was sampled; inf where one sample tells none."""
    num_evaluations: int
    """Distinct coalitions whose utility was asked: forward passes over the probe in a round's game."""
    num_gradients: int
    """Places whose slopes were asked: forward and backward passes."""


Estimator = Callable[[SmoothGame], Estimate]
"""An estimator with its options bound. Those that need no slopes take any `Game`."""


class CoalitionGame:
    """A game that is only a function of coalitions, continued by its multilinear extension (Owen 1972)."""

    def __init__(self, utility: Utility, num_players: int) -> None:
        """Wrap `utility`, which must be deterministic."""
        self.utility = utility
        self.num_players = num_players

    def utilities(self, coalitions: Sequence[int]) -> list[float]:
        """One call of the utility a coalition."""
        return [self.utility(coalition) for coalition in coalitions]

    def slopes(self, place: float) -> list[float]:
        """The expected marginal of each player when every other one is in with probability `place`.

        A polynomial in `place` whose integral over [0, 1] is the Shapley value. Asks all coalitions.

        Raises:
            ValueError: more than PLAYERS_EXACT_MAX players.
        """
        others = self.num_players - 1
        share = [place**size * (1 - place) ** (others - size) for size in range(self.num_players)]
        return weigh_marginals(compute_all(self), share)


class Counted:
    """A game's memory while one estimator asks it: each coalition is evaluated once, and counted.

    Holds one number a coalition asked for; an estimator's own bounds bound it.
    """

    def __init__(self, game: Game) -> None:
        self._game = game
        self._known: dict[int, float] = {}
        self.num_players = game.num_players
        self.everyone = (1 << game.num_players) - 1

    def utilities(self, coalitions: Sequence[int]) -> NDArray[np.float64]:
        """(num_coalitions,) utilities; only those not known yet are evaluated, in one batch.

        Raises:
            ValueError: a utility is no finite number.
        """
        missing = [coalition for coalition in dict.fromkeys(coalitions) if coalition not in self._known]
        if missing:
            for coalition, worth in zip(missing, self._game.utilities(missing), strict=True):
                if not math.isfinite(worth):
                    raise ValueError(f"expected a finite utility of coalition {coalition:b}, got {worth}")
                self._known[coalition] = float(worth)
        return np.array([self._known[coalition] for coalition in coalitions], np.float64)

    @property
    def num_evaluations(self) -> int:
        """Distinct coalitions asked so far."""
        return len(self._known)


def compute_all(game: Game) -> NDArray[np.float64]:
    """(2**num_players,) utilities of all coalitions, by mask.

    Raises:
        ValueError: more than PLAYERS_EXACT_MAX players, or a utility is no finite number.
    """
    if game.num_players > PLAYERS_EXACT_MAX:
        raise ValueError(f"exact enumeration: expected at most {PLAYERS_EXACT_MAX} players, got {game.num_players}")
    return Counted(game).utilities(range(1 << game.num_players))


def weigh_marginals(worth: NDArray[np.float64], share: Sequence[float]) -> list[float]:
    """Sum over coalitions S without i of share[|S|] * (u(S + i) - u(S)), for every player i.

    Args:
        worth: (2**num_players,) by mask.
        share: by the size of S, one number for each of 0 to num_players - 1.
    """
    masks = np.arange(len(worth))
    shares = np.array([*share, 0.0])[np.bitwise_count(masks)]  # (2**num_players,)
    values = []
    for player in range(len(share)):
        without = masks[(masks >> player & 1) == 0]
        values.append(float(np.sum(shares[without] * (worth[without | 1 << player] - worth[without]))))
    return values
