"""Shapley values of any coalition game without sampling: exact by enumeration, and two cheap baselines.

Knows only a game; no model, no peer. The exact value is the audit's truth for up to 12 players.
"""

from math import comb

from p2pfm.contribution.utility import Counted, Estimate, Game, compute_all, weigh_marginals


def compute_exact(game: Game) -> Estimate:
    """The Shapley value (Shapley 1953) from all 2**n coalitions; the parts sum to u(N) - u(empty) up to rounding.

    Raises:
        ValueError: more than PLAYERS_EXACT_MAX players, or a utility is no finite number.
    """
    num_players = game.num_players
    worth = compute_all(game)
    share = [1 / (num_players * comb(num_players - 1, size)) for size in range(num_players)]
    return Estimate(tuple(weigh_marginals(worth, share)), None, len(worth), 0)


def compute_leave_one_out(game: Game) -> Estimate:
    """u(N) - u(N - i): n + 1 evaluations, a baseline; the parts do not sum to u(N).

    Raises:
        ValueError: a utility is no finite number.
    """
    counted = Counted(game)
    everyone = counted.everyone
    full, *rest = counted.utilities([everyone, *(everyone & ~(1 << player) for player in range(game.num_players))])
    return Estimate(tuple(float(full - worth) for worth in rest), None, counted.num_evaluations, 0)


def compute_singleton(game: Game) -> Estimate:
    """u({i}) - u(empty): the other baseline (Gauntlet's LossScore).

    Raises:
        ValueError: a utility is no finite number.
    """
    counted = Counted(game)
    nothing, *alone = counted.utilities([0, *(1 << player for player in range(game.num_players))])
    return Estimate(tuple(float(worth - nothing) for worth in alone), None, counted.num_evaluations, 0)
