"""Shapley values of any coalition game: exact by enumeration, estimated by antithetic permutations, and baselines.

Knows only a utility function of a coalition (a bit mask over players); no model, no peer. The exact value is the
audit's truth for up to 12 players; permutations from a public seed are the dispute path for more.
"""

import random
from collections.abc import Callable
from math import comb

from p2pfm.contribution.utility import Cached, Utility

PLAYERS_EXACT_MAX = 12
"""2**12 evaluations: the most that an audit waits for."""

Estimator = Callable[[Utility, int], list[float]]


def compute_exact(utility: Utility, num_players: int) -> list[float]:
    """The Shapley value (Shapley 1953) from all 2**n coalitions; the parts sum to u(N) - u(empty) up to rounding.

    Raises:
        ValueError: more than PLAYERS_EXACT_MAX players.
    """
    if num_players > PLAYERS_EXACT_MAX:
        raise ValueError(f"exact enumeration: expected at most {PLAYERS_EXACT_MAX} players, got {num_players}")
    worth = [utility(coalition) for coalition in range(1 << num_players)]
    share = [1 / (num_players * comb(num_players - 1, size)) for size in range(num_players)]
    return [
        sum(
            share[coalition.bit_count()] * (worth[coalition | 1 << player] - worth[coalition])
            for coalition in range(1 << num_players)
            if not coalition >> player & 1
        )
        for player in range(num_players)
    ]


def compute_permutation(utility: Utility, num_players: int, num_pairs: int, seed: int) -> list[float]:
    """Mean marginals over `num_pairs` random orders and their reverses (antithetic: exact for quadratic games)."""
    cached = Cached(utility)
    draw = random.Random(seed)
    totals = [0.0] * num_players
    order = list(range(num_players))
    for _ in range(num_pairs):
        draw.shuffle(order)
        for sequence in (order, order[::-1]):
            coalition = 0
            for player in sequence:
                totals[player] += cached(coalition | 1 << player) - cached(coalition)
                coalition |= 1 << player
    return [total / (2 * num_pairs) for total in totals]


def compute_leave_one_out(utility: Utility, num_players: int) -> list[float]:
    """u(N) - u(N - i): n + 1 evaluations, a baseline; the parts do not sum to u(N)."""
    everyone = (1 << num_players) - 1
    full = utility(everyone)
    return [full - utility(everyone & ~(1 << player)) for player in range(num_players)]


def compute_singleton(utility: Utility, num_players: int) -> list[float]:
    """u({i}) - u(empty): the other baseline."""
    nothing = utility(0)
    return [utility(1 << player) - nothing for player in range(num_players)]
