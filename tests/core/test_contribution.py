"""Contribution estimators against games whose values are known."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.contribution.aumann_shapley import Player, compute_aumann_shapley, compute_contributions
from p2pfm.contribution.games import make_additive, make_airport, make_glove, make_majority, make_quadratic
from p2pfm.contribution.permutation import PERMUTATIONS_MAX, compute_gtg, compute_permutation
from p2pfm.contribution.round_game import ADAPTERS_MAX, RoundGame
from p2pfm.contribution.rounding import CONTRIBUTION_MAX, to_contribution
from p2pfm.contribution.shapley import compute_exact, compute_leave_one_out, compute_singleton
from p2pfm.contribution.utility import CoalitionGame

QUADRATIC = make_quadratic((0.5, -1.0, 2.0, 0.25), ((0, 1, -2, 0.5), (0, 0, 0.75, 3), (0, 0, 0, -1), (0, 0, 0, 0)))
GAMES = {
    "additive": make_additive((1.0, -2.0, 0.0, 3.5)),
    "airport": make_airport((1.0, 2.0, 2.0, 5.0, 9.0)),
    "glove 1:2": make_glove(1, 2),
    "glove 3:4": make_glove(3, 4),
    "majority": make_majority(7),
    "quadratic": QUADRATIC,
}
all_games = pytest.mark.parametrize("game", GAMES.values(), ids=GAMES)

SAMPLED = {
    "plain": lambda game, seed: compute_permutation(game, 60, seed),
    "antithetic": lambda game, seed: compute_permutation(game, 60, seed, is_antithetic=True),
    "gtg": lambda game, seed: compute_gtg(game, seed, within=0.0, between=0.0),
}
EVERY = {
    "exact": compute_exact,
    "leave one out": compute_leave_one_out,
    "singleton": compute_singleton,
    "aumann-shapley": compute_aumann_shapley,
    "truncated": lambda game: compute_permutation(game, 4, 1, truncation=0.1),
    **{name: partial(lambda estimate, game: estimate(game, 1), estimate) for name, estimate in SAMPLED.items()},
}
"""Every estimator under the one interface."""


def everyone(game):
    return (1 << game.num_players) - 1


@all_games
def test_exact_enumeration_gives_the_known_values(game):
    estimate = compute_exact(game)
    assert estimate.values == pytest.approx(game.values, abs=1e-12)
    assert estimate.standard_errors is None
    assert (estimate.num_evaluations, estimate.num_gradients) == (1 << game.num_players, 0)


def test_the_glove_market_pays_the_scarce_glove_two_thirds():
    assert make_glove(1, 2).values == pytest.approx((2 / 3, 1 / 6, 1 / 6))


@all_games
@pytest.mark.parametrize("estimate", SAMPLED.values(), ids=SAMPLED)
def test_sampled_values_sum_to_what_everyone_together_gains(game, estimate):
    total = game.utility(everyone(game)) - game.utility(0)
    assert sum(estimate(game, 1).values) == pytest.approx(total)


@all_games
@pytest.mark.parametrize("estimate", SAMPLED.values(), ids=SAMPLED)
def test_standard_errors_cover_the_known_values_at_their_rate(game, estimate):
    # The mean of 100 seeds lies within 4.5 of its standard errors, and 1.96 standard errors of one seed hold about 95%.
    runs = [estimate(game, seed) for seed in range(100)]
    errors = np.array([run.values for run in runs]) - game.values  # (num_seeds, num_players)
    spread = np.array([run.standard_errors for run in runs])
    slack = 1e-9  # where sampling cannot err, as in an additive game
    assert np.isfinite(spread).all()
    assert (np.abs(errors.mean(axis=0)) <= 4.5 * errors.std(axis=0) / 10 + slack).all()
    assert np.mean(np.abs(errors) <= 1.96 * spread + slack) >= 0.88
    if errors.std() > 1e-3:  # and they are not generous: they are the real spread
        assert 0.8 <= np.sqrt(np.mean(spread**2)) / errors.std() <= 1.2


def test_antithetic_permutations_are_exact_for_quadratic_games():
    estimate = compute_permutation(QUADRATIC, 2, seed=5, is_antithetic=True)
    assert estimate.values == pytest.approx(QUADRATIC.values)
    assert estimate.standard_errors == (math.inf,) * 4  # one pair tells nothing of its spread
    assert compute_permutation(QUADRATIC, 4, seed=5, is_antithetic=True).standard_errors == pytest.approx((0,) * 4)


def test_a_seed_gives_everyone_the_same_permutations():
    game = GAMES["airport"]
    assert compute_permutation(game, 8, seed=2) == compute_permutation(game, 8, seed=2)
    assert compute_permutation(game, 8, seed=2) != compute_permutation(game, 8, seed=3)


def test_permutations_count_each_coalition_once():
    game = make_additive((1.0,) * 9)
    estimate = compute_permutation(game, 2, seed=0, is_antithetic=True)
    assert estimate.num_evaluations == 2 + 2 * 8  # empty and full, and what lies between on each way
    assert compute_permutation(make_additive((1.0, 2.0)), 50, seed=0).num_evaluations == 4


def test_truncation_saves_what_comes_after_the_majority():
    game = make_majority(9)
    full = compute_permutation(game, 20, seed=4)
    cut = compute_permutation(game, 20, seed=4, truncation=0.5)
    assert cut.values == full.values
    assert cut.num_evaluations < 0.75 * full.num_evaluations


def test_truncation_errs_by_no_more_than_its_bound():
    worths = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)
    cut = compute_permutation(make_additive(worths), 20, seed=4, truncation=1.0)
    assert cut.values != pytest.approx(worths)
    assert max(abs(a - b) for a, b in zip(cut.values, worths, strict=True)) <= 1.0
    assert sum(cut.values) == pytest.approx(sum(worths), abs=1.0)


def test_gtg_pays_nobody_for_a_round_that_moves_nothing():
    game = make_additive((0.004, 0.005))
    estimate = compute_gtg(game, seed=0)
    assert (estimate.values, estimate.num_evaluations) == ((0.0, 0.0), 2)
    assert compute_gtg(game, seed=0, between=1e-3).values == pytest.approx(game.values)


def test_gtg_lets_every_player_lead_equally_often():
    game = CoalitionGame(lambda coalition: float(coalition != 0), 4)  # only who leads adds anything
    estimate = compute_gtg(game, seed=3, within=0.0, between=0.0, permutations_max=4)
    assert estimate.values == (0.25,) * 4
    assert estimate.standard_errors == (math.inf,) * 4  # one sweep is one sample


def test_gtg_stops_when_its_mean_has_settled_and_not_before_thirty_orders():
    def count(game, **options):
        asked = []

        def utility(coalition):
            asked.append(coalition)
            return game.utility(coalition)

        compute_gtg(CoalitionGame(utility, game.num_players), seed=1, within=0.0, between=0.0, **options)
        return len(asked)

    steady = make_additive(tuple(float(worth) for worth in range(1, 21)))
    assert count(steady) > 20 * 19 * 1.5  # two sweeps of twenty
    assert count(steady, permutations_max=20) <= 20 * 19 + 2
    assert compute_gtg(steady, seed=1).values == pytest.approx(steady.values)


@all_games
def test_three_points_integrate_the_diagonal_of_small_games_exactly(game):
    # The diagonal's slope is a polynomial of degree n - 1; three points are exact up to degree 5.
    estimate = compute_aumann_shapley(game, 3)
    assert (estimate.num_evaluations, estimate.num_gradients, estimate.standard_errors) == (0, 3, None)
    if game.num_players <= 6:
        assert estimate.values == pytest.approx(game.values)
    else:
        assert estimate.values == pytest.approx(game.values, abs=0.02)


def test_one_point_is_exact_for_quadratic_games():
    assert compute_aumann_shapley(QUADRATIC, 1).values == pytest.approx(QUADRATIC.values)
    assert compute_aumann_shapley(GAMES["glove 3:4"], 1).values != pytest.approx(GAMES["glove 3:4"].values, abs=1e-3)


def test_baselines_are_exact_only_without_interaction():
    game = make_additive((1.0, -2.0, 3.5))
    assert compute_leave_one_out(game).values == pytest.approx(game.values)
    assert compute_singleton(game).values == pytest.approx(game.values)
    assert compute_leave_one_out(game).num_evaluations == compute_singleton(game).num_evaluations == 4
    assert compute_leave_one_out(QUADRATIC).values != pytest.approx(QUADRATIC.values)


@pytest.mark.parametrize("estimate", EVERY.values(), ids=EVERY)
def test_a_game_without_players_has_no_values(estimate):
    assert estimate(make_additive(())).values == ()


@pytest.mark.parametrize("estimate", EVERY.values(), ids=EVERY)
def test_one_player_gets_all_there_is(estimate):
    assert estimate(make_additive((2.5,))).values == pytest.approx((2.5,))


@pytest.mark.parametrize("estimate", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("worth", [math.nan, math.inf])
def test_estimators_reject_utilities_that_are_no_finite_numbers(estimate, worth):
    game = CoalitionGame(lambda coalition: worth if coalition in (0b1, 0b110) else float(coalition.bit_count()), 3)
    with pytest.raises(ValueError, match="finite"):
        estimate(game)


def test_exact_enumeration_rejects_games_that_never_end():
    with pytest.raises(ValueError, match="at most 12"):
        compute_exact(CoalitionGame(lambda coalition: 0.0, 13))


@pytest.mark.parametrize(
    ("num_permutations", "options", "message"),
    [
        (0, {}, "1 to"),
        (PERMUTATIONS_MAX + 1, {}, "1 to"),
        (3, {"is_antithetic": True}, "pairs"),
        (4, {"truncation": -0.1}, "at least 0"),
        (4, {"truncation": math.nan}, "at least 0"),
    ],
)
def test_permutations_reject_impossible_options(num_permutations, options, message):
    with pytest.raises(ValueError, match=message):
        compute_permutation(QUADRATIC, num_permutations, 0, **options)


# --- a round's game ---------------------------------------------------------------------------------------------------


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


def flat(tensors):
    return np.concatenate([np.ravel(tensors[name]) for name in sorted(tensors)]).astype(np.float64)


class Bowl:
    """A quadratic loss of twelve parameters, and how often it was asked."""

    def __init__(self, seed):
        draw = np.random.default_rng(seed)
        self.base = {"b": draw.standard_normal(6).astype(np.float32), "a": np.zeros((2, 3), np.float32)}
        root = draw.standard_normal((12, 12))
        self.hessian, self.slope = root @ root.T, draw.standard_normal(12)
        self.asked = []

    def losses(self, adapters):
        self.asked.append(len(adapters))
        return [at @ self.slope + at @ self.hessian @ at / 2 for at in map(flat, adapters)]

    def gradient(self, tensors):
        slopes = self.slope + self.hessian @ flat(tensors)
        return {"a": slopes[:6].reshape(2, 3), "b": slopes[6:]}

    def play(self, players, **options):
        return RoundGame(self.base, players, self.losses, self.gradient, **options)


@given(st.integers(0, 2**32), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_aumann_shapley_is_the_shapley_value_of_a_quadratic_loss(seed, points):
    bowl, players = Bowl(seed), make_players(seed + 1, 5, 12)
    game = bowl.play(players)
    exact = compute_exact(game).values
    assert compute_contributions(bowl.gradient, bowl.base, players, points) == pytest.approx(exact, rel=1e-4, abs=1e-4)
    assert compute_aumann_shapley(game, points).values == pytest.approx(exact, rel=1e-4, abs=1e-4)


def test_a_round_s_utility_is_how_far_its_coalition_lowers_the_loss():
    bowl, players = Bowl(1), make_players(2, 3, 12)
    game = bowl.play(players)
    moved = flat(bowl.base)
    moved[players[0].positions] += players[0].values / 3
    moved[players[2].positions] += players[2].values / 3
    before, after = (at @ bowl.slope + at @ bowl.hessian @ at / 2 for at in (flat(bowl.base), moved))
    assert game.utilities([0, 0b101]) == pytest.approx([0.0, before - after])


def test_a_round_s_losses_are_asked_in_bounded_batches_and_the_base_once():
    bowl = Bowl(1)
    compute_exact(bowl.play(make_players(2, 7, 12)))
    assert max(bowl.asked) <= ADAPTERS_MAX
    assert sum(bowl.asked) == 1 << 7


def test_weights_of_the_renormalised_game_are_shared_by_who_is_there():
    bowl, players = Bowl(3), make_players(4, 4, 12)
    fixed, renormalised = bowl.play(players), bowl.play(players, is_renormalised=True)
    assert renormalised.utilities([0b1111]) == pytest.approx(fixed.utilities([0b1111]))
    alone = [Player(player.positions, player.values, 1.0) for player in players]
    assert renormalised.utilities([0b0100]) == pytest.approx(bowl.play(alone).utilities([0b0100]))
    nobody = [Player(player.positions, player.values, 0.0) for player in players]
    assert bowl.play(nobody, is_renormalised=True).utilities([0b11]) == [0.0]


def test_a_zero_update_is_paid_by_the_renormalised_game_only():
    bowl, players = Bowl(3), make_players(4, 3, 12)
    players.append(Player(np.zeros(0, np.int64), np.zeros(0, np.float32), 1 / 4))
    assert compute_exact(bowl.play(players)).values[3] == 0.0
    assert compute_aumann_shapley(bowl.play(players)).values[3] == 0.0
    assert abs(compute_exact(bowl.play(players, is_renormalised=True)).values[3]) > 1e-3


def test_the_renormalised_game_rejects_slopes():
    bowl = Bowl(3)
    with pytest.raises(ValueError, match="renormalised"):
        compute_aumann_shapley(bowl.play(make_players(4, 3, 12), is_renormalised=True))


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


def test_a_round_without_updates_has_no_contributions():
    base = {"t": np.ones(3, np.float32)}
    assert compute_contributions(lambda at: at, base, []) == []
    assert RoundGame(base, [], lambda adapters: [1.0] * len(adapters), lambda at: at).utilities([0]) == [0.0]


@pytest.mark.parametrize(
    ("positions", "values", "weight"),
    [
        ([0, 1], [1.0], 0.5),
        ([[0]], [[1.0]], 0.5),
        ([0], [1.0], math.nan),
        ([0], [1.0], math.inf),
        ([0], [1.0], -0.1),
    ],
)
def test_a_player_rejects_values_without_positions_and_weights_that_are_none(positions, values, weight):
    with pytest.raises(ValueError, match="expected"):
        Player(np.array(positions), np.float32(values), weight)


@pytest.mark.parametrize("position", [-1, 2])
def test_contributions_reject_updates_of_another_adapter(position):
    base = {"t": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match="positions from 0 to 1"):
        compute_contributions(lambda at: at, base, [Player(np.array([position]), np.float32([1.0]), 1.0)])


@pytest.mark.parametrize("answer", [{"u": np.ones(2)}, {"t": np.ones(3)}, {"t": np.ones((1, 2))}, {}])
def test_contributions_reject_a_gradient_of_another_adapter(answer):
    base = {"t": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match="gradient"):
        compute_contributions(lambda at: answer, base, make_players(0, 2, 2))


@pytest.mark.parametrize("points", [0, 4])
def test_contributions_reject_quadratures_that_are_not_there(points):
    base = {"t": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match=r"\[1, 2, 3\] points"):
        compute_contributions(lambda at: at, base, [], points)
    with pytest.raises(ValueError, match=r"\[1, 2, 3\] points"):
        compute_aumann_shapley(QUADRATIC, points)


def test_values_that_are_no_finite_numbers_are_given_back_for_the_caller_to_judge():
    # A node says what became of its probe (work.score_updates); here it is only arithmetic.
    base = {"t": np.ones(2, np.float32)}
    values = compute_contributions(lambda at: {"t": np.full(2, math.nan)}, base, make_players(0, 2, 2))
    assert all(math.isnan(value) for value in values)


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
