"""Shapley values by sampled orders of arrival: plain, antithetic, truncated, and GTG-Shapley's guided sampling.

Knows only a game and a seed. A public seed gives everyone the same orders, so a sampled value can be audited: what
committees fall back to in a dispute with too many players for exact enumeration.
"""

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from p2pfm.contribution.utility import Counted, Estimate, Game

GTG_WITHIN_NATS = 1e-3
GTG_BETWEEN_NATS = 1e-2
GTG_PERMUTATIONS_MIN = 30
GTG_LAST = 10
GTG_CONVERGED = 0.05
"""GTG-Shapley's constants as its authors' code sets them (there in units of accuracy)."""
PERMUTATIONS_MAX = 10_000
"""More orders than any audit pays for; bounds the memory of marginals."""

Marginals = NDArray[np.float64]
"""(num_orders, num_players): what each player added when it came in."""


def compute_permutation(
    game: Game, num_permutations: int, seed: int, *, is_antithetic: bool = False, truncation: float = 0.0
) -> Estimate:
    """Mean marginals over random orders (Castro et al. 2009), with standard errors.

    The parts sum to u(N) - u(empty), up to `truncation`.

    Args:
        is_antithetic: every second order is the reverse of the one before it (Mitchell et al. 2021): exact for games
            quadratic in the coalition. The standard errors are then from the means of pairs.
        truncation: once a coalition's utility is within this of u(N), who comes later adds 0 and is not evaluated
            (TMC, Ghorbani and Zou 2019); the bias it makes is not part of the standard errors. 0: none.

    Raises:
        ValueError: no permutations, too many, an odd number where they come in pairs, or a utility that is not finite.
    """
    _check(num_permutations, is_antithetic, truncation)
    counted = Counted(game)
    draw = random.Random(seed)
    orders: list[list[int]] = []
    while len(orders) < num_permutations:
        orders.append(_shuffle(range(game.num_players), draw))
        if is_antithetic:
            orders.append(orders[-1][::-1])
    marginals = _walk(counted, orders, truncation)
    samples = (marginals[::2] + marginals[1::2]) / 2 if is_antithetic else marginals
    return _to_estimate(samples.mean(axis=0), _standard_errors(samples[:, None]), counted)


def compute_gtg(
    game: Game,
    seed: int,
    *,
    within: float = GTG_WITHIN_NATS,
    between: float = GTG_BETWEEN_NATS,
    permutations_max: int = PERMUTATIONS_MAX,
) -> Estimate:
    """GTG-Shapley (Liu et al. 2022, arXiv 2109.02053): guided truncation over orders that each player leads in turn.

    Its authors' game is the renormalised one (`RoundGame(..., is_renormalised=True)`), but any game will do. Sweeps of
    n orders, one led by each player, until the mean has settled: more than 30 orders, and none of the last 10 running
    means further than 5% from the last one (relative, mean over players). A sweep is a stratified sample, and so are
    the standard errors; they leave out the bias of truncation.

    Args:
        within: truncation inside an order, as in `compute_permutation`. (The authors' code also remembers a truncated
            coalition's guess as if it had been evaluated; their paper does not, and neither does this.)
        between: a round that moves the utility by no more than this pays everybody 0.
        permutations_max: stop there even if not settled; whole sweeps.

    Raises:
        ValueError: a utility is no finite number, or a bound is negative.
    """
    _check(permutations_max, False, min(within, between))
    counted = Counted(game)
    num_players = game.num_players
    nothing, full = counted.utilities([0, counted.everyone])
    if abs(full - nothing) <= between or num_players == 0:
        return Estimate((0.0,) * num_players, None, counted.num_evaluations, 0)
    sweeps: list[Marginals] = []
    for orders in _guided_sweeps(num_players, random.Random(seed)):
        sweeps.append(_walk(counted, orders, within))
        num_orders = len(sweeps) * num_players
        if _has_settled(np.concatenate(sweeps)) or num_orders + num_players > permutations_max:
            break
    samples = np.stack(sweeps)  # (num_sweeps, num_leaders, num_players)
    return _to_estimate(samples.mean(axis=(0, 1)), _standard_errors(samples), counted)


def _check(num_permutations: int, is_antithetic: bool, truncation: float) -> None:
    if not 0 < num_permutations <= PERMUTATIONS_MAX:
        raise ValueError(f"expected 1 to {PERMUTATIONS_MAX} permutations, got {num_permutations}")
    if is_antithetic and num_permutations % 2:
        raise ValueError(f"antithetic permutations come in pairs: expected an even number, got {num_permutations}")
    if not truncation >= 0:
        raise ValueError(f"expected a truncation bound of at least 0, got {truncation}")


def _shuffle(players: Sequence[int], draw: random.Random) -> list[int]:
    """A random order. By keys from `random()`: its stream is guaranteed for all Python versions, `shuffle`'s is not."""
    return [player for _, player in sorted((draw.random(), player) for player in players)]


def _guided_sweeps(num_players: int, draw: random.Random) -> Iterator[list[list[int]]]:
    while True:
        yield [
            [leader, *_shuffle([player for player in range(num_players) if player != leader], draw)]
            for leader in range(num_players)
        ]


def _walk(counted: Counted, orders: Sequence[Sequence[int]], truncation: float) -> Marginals:
    """The marginals of each order, all orders in step, so that a game can evaluate many coalitions at once."""
    nothing, full = counted.utilities([0, counted.everyone])
    marginals = np.zeros((len(orders), counted.num_players))
    coalitions, before = [0] * len(orders), np.full(len(orders), nothing)
    for position in range(counted.num_players):
        arriving = [order[position] for order in orders]
        coalitions = [coalition | 1 << player for coalition, player in zip(coalitions, arriving, strict=True)]
        # Once within the bound the utility stands still, so an order that is truncated stays so.
        going = np.flatnonzero(np.abs(full - before) >= truncation if truncation > 0 else np.ones(len(orders), bool))
        after = before.copy()
        after[going] = counted.utilities([coalitions[index] for index in going])
        marginals[np.arange(len(orders)), arriving] = after - before
        before = after
    return marginals


def _has_settled(marginals: Marginals) -> bool:
    """GTG-Shapley's convergence criterion on all orders so far."""
    if len(marginals) <= GTG_PERMUTATIONS_MIN:
        return False
    means = np.cumsum(marginals, axis=0)[-GTG_LAST:]
    means /= np.arange(len(marginals) - GTG_LAST + 1, len(marginals) + 1)[:, None]
    errors = np.mean(np.abs(means - means[-1]) / (np.abs(means[-1]) + 1e-12), axis=1)
    return bool(errors.max() <= GTG_CONVERGED)


def _standard_errors(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """(num_players,) of the mean of a stratified sample (num_draws, num_strata, num_players)."""
    num_draws, num_strata, num_players = samples.shape
    if num_draws < 2:
        return np.full(num_players, math.inf)
    errors: NDArray[np.float64] = np.sqrt(samples.var(axis=0, ddof=1).sum(axis=0) / num_draws) / num_strata
    return errors


def _to_estimate(values: NDArray[np.float64], errors: NDArray[np.float64], counted: Counted) -> Estimate:
    return Estimate(tuple(values.tolist()), tuple(errors.tolist()), counted.num_evaluations, 0)
