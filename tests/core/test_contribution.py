"""Contribution estimators against games whose values are known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.contribution.aumann_shapley import Player, compute_contributions
from p2pfm.contribution.games import make_additive, make_airport, make_glove, make_majority, make_quadratic
from p2pfm.contribution.rounding import CONTRIBUTION_MAX, to_contribution
from p2pfm.contribution.shapley import (
    compute_exact,
    compute_leave_one_out,
    compute_permutation,
    compute_singleton,
)

QUADRATIC = make_quadratic((0.5, -1.0, 2.0, 0.25), ((0, 1, -2, 0.5), (0, 0, 0.75, 3), (0, 0, 0, -1), (0, 0, 0, 0)))
GAMES = [
    make_additive((1.0, -2.0, 0.0, 3.5)),
    make_airport((1.0, 2.0, 2.0, 5.0, 9.0)),
    make_glove(1, 2),
    make_glove(3, 4),
    make_majority(7),
    QUADRATIC,
]


@pytest.mark.parametrize("game", GAMES)
def test_exact_enumeration_gives_the_known_values(game):
    assert compute_exact(game.utility, game.num_players) == pytest.approx(game.values, abs=1e-12)


def test_the_glove_market_pays_the_scarce_glove_two_thirds():
    assert make_glove(1, 2).values == pytest.approx((2 / 3, 1 / 6, 1 / 6))


@pytest.mark.parametrize("game", GAMES)
def test_values_sum_to_what_everyone_together_gains(game):
    everyone = (1 << game.num_players) - 1
    total = game.utility(everyone) - game.utility(0)
    assert sum(compute_exact(game.utility, game.num_players)) == pytest.approx(total)
    assert sum(compute_permutation(game.utility, game.num_players, 3, seed=1)) == pytest.approx(total)


def test_antithetic_permutations_are_exact_for_quadratic_games():
    assert compute_permutation(QUADRATIC.utility, 4, num_pairs=1, seed=5) == pytest.approx(QUADRATIC.values)


def test_permutations_approach_the_known_values():
    game = make_airport((1.0, 2.0, 2.0, 5.0, 9.0))
    assert compute_permutation(game.utility, 5, num_pairs=400, seed=2) == pytest.approx(game.values, abs=0.2)


def test_baselines_are_exact_only_without_interaction():
    game = make_additive((1.0, -2.0, 3.5))
    assert compute_leave_one_out(game.utility, 3) == pytest.approx(game.values)
    assert compute_singleton(game.utility, 3) == pytest.approx(game.values)
    assert compute_leave_one_out(QUADRATIC.utility, 4) != pytest.approx(QUADRATIC.values)


def test_exact_enumeration_refuses_games_that_never_end():
    with pytest.raises(ValueError, match="at most 12"):
        compute_exact(lambda coalition: 0.0, 13)


def make_players(seed, num_players, size):
    draw = np.random.default_rng(seed)
    return [
        Player(
            np.sort(draw.choice(size, size // 2, replace=False)),
            draw.standard_normal(size // 2).astype(np.float32),
            1 / num_players,
        )
        for _ in range(num_players)
    ]


@given(st.integers(0, 2**32), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_aumann_shapley_is_the_shapley_value_of_a_quadratic_loss(seed, points):
    draw = np.random.default_rng(seed)
    base = {"b": draw.standard_normal(6).astype(np.float32), "a": draw.standard_normal((2, 3)).astype(np.float32)}
    root = draw.standard_normal((12, 12))
    hessian, slope = root @ root.T, draw.standard_normal(12)
    players = make_players(seed + 1, 5, 12)

    def flat(tensors):
        return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float64)

    def loss(at):
        return at @ slope + at @ hessian @ at / 2

    def gradient(tensors):
        slopes = slope + hessian @ flat(tensors)
        return {"a": slopes[:6].reshape(2, 3), "b": slopes[6:]}

    def utility(coalition):
        moved = flat(base)
        for index, player in enumerate(players):
            if coalition >> index & 1:
                moved[player.positions] += player.weight * player.values
        return loss(flat(base)) - loss(moved)

    values = compute_contributions(gradient, base, players, points)
    assert values == pytest.approx(compute_exact(utility, 5), rel=1e-4, abs=1e-4)


def test_a_zero_update_earns_exactly_nothing_and_equal_updates_equal_values():
    base = {"t": np.ones(8, np.float32)}
    some = make_players(0, 1, 8)[0]
    players = [some, Player(np.zeros(0, np.int64), np.zeros(0, np.float32), 0.5), some]
    values = compute_contributions(lambda at: {"t": np.sin(at["t"])}, base, players)
    assert values[1] == 0.0
    assert values[0] == values[2]


def test_two_points_integrate_cubic_losses_exactly():
    base = {"t": np.float32([1.0, 2.0])}
    players = [Player(np.array([0, 1]), np.float32([0.5, -1.0]), 1.0)]
    expected = sum(base["t"] ** 3) - sum((base["t"] + np.float32([0.5, -1.0])) ** 3)
    assert compute_contributions(lambda at: {"t": 3 * at["t"] ** 2}, base, players) == pytest.approx([expected])
    assert compute_contributions(lambda at: {"t": 3 * at["t"] ** 2}, base, players, 1) != pytest.approx([expected])


@pytest.mark.parametrize(
    ("phi", "expected"),
    [
        (0.0, 0),
        (1.5e-9, 2),
        (-2.5e-9, -2),
        (-0.25, -250_000_000),
        (math.nan, 0),
        (math.inf, 0),
        (-math.inf, -CONTRIBUTION_MAX),
        (-1e30, -CONTRIBUTION_MAX),
    ],
)
def test_contributions_are_rounded_in_one_place(phi, expected):
    assert to_contribution(phi) == expected
