"""Coalition games whose Shapley values are known in closed form: what estimators are tested on.

Knows no model and no peer.
"""

from collections.abc import Sequence
from math import comb

from p2pfm.contribution.utility import CoalitionGame, Utility


class KnownGame(CoalitionGame):
    """A game with its known Shapley values."""

    def __init__(self, utility: Utility, values: Sequence[float]) -> None:
        super().__init__(utility, len(values))
        self.values = tuple(values)


def make_additive(worths: Sequence[float]) -> KnownGame:
    """u(S) = sum of the members' worths; each player's value is its worth."""
    return KnownGame(lambda coalition: sum(worths[player] for player in _members(coalition)), tuple(worths))


def make_airport(costs: Sequence[float]) -> KnownGame:
    """u(S) = -max cost in S; everyone shares the runway up to the length it needs (Littlechild and Owen 1973)."""
    ranked = sorted(range(len(costs)), key=lambda player: costs[player])
    values = [0.0] * len(costs)
    paid, before = 0.0, 0.0
    for rank, player in enumerate(ranked):
        paid += (costs[player] - before) / (len(costs) - rank)
        before = costs[player]
        values[player] = -paid
    return KnownGame(
        lambda coalition: -max((costs[player] for player in _members(coalition)), default=0.0), tuple(values)
    )


def make_glove(num_left: int, num_right: int) -> KnownGame:
    """u(S) = number of pairs of gloves; the first `num_left` players hold a left one. Values by counting coalitions.

    For player i: sum over coalitions (a left, b right) without i in which the other side is in surplus.
    """
    players = num_left + num_right

    def value(same: int, other: int) -> float:
        return sum(
            comb(same - 1, mine) * comb(other, theirs) / (players * comb(players - 1, mine + theirs))
            for mine in range(same)
            for theirs in range(other + 1)
            if mine < theirs
        )

    def utility(coalition: int) -> float:
        left = (coalition & ((1 << num_left) - 1)).bit_count()
        return float(min(left, coalition.bit_count() - left))

    left = [value(num_left, num_right)] * num_left
    return KnownGame(utility, (*left, *([value(num_right, num_left)] * num_right)))


def make_majority(num_players: int) -> KnownGame:
    """u(S) = 1 when more than half are in; by symmetry everyone's value is 1/n."""
    return KnownGame(lambda coalition: float(2 * coalition.bit_count() > num_players), (1 / num_players,) * num_players)


def make_quadratic(linear: Sequence[float], pairs: Sequence[Sequence[float]]) -> KnownGame:
    """u(S) = sum of linear[i] + sum over i < j in S of pairs[i][j]; each pair's worth is split in halves."""
    players = range(len(linear))

    def utility(coalition: int) -> float:
        members = _members(coalition)
        return sum(linear[i] for i in members) + sum(pairs[i][j] for i in members for j in members if i < j)

    halves = [sum(pairs[min(i, j)][max(i, j)] for j in players if j != i) / 2 for i in players]
    return KnownGame(utility, tuple(linear[i] + halves[i] for i in players))


def _members(coalition: int) -> list[int]:
    return [player for player in range(coalition.bit_length()) if coalition >> player & 1]
