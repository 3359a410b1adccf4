"""Baseline merge rules: what each withstands, what it gives on clean input, and what it refuses."""

import numpy as np
import pytest

from p2pfm.lora.robust import (
    Rule,
    compute_clipped_mean,
    compute_coordinate_median,
    compute_gate,
    compute_geometric_median,
    compute_krum,
    compute_mean,
    compute_square_distances,
    compute_trimmed_mean,
    mix_nearest,
)

NUM_PEERS, DIM, NUM_LIARS = 11, 30, 4


def mix_and_trim(updates, weights):
    return compute_trimmed_mean(mix_nearest(updates, NUM_LIARS), weights, NUM_LIARS / NUM_PEERS)


ROBUST: dict[str, Rule] = {
    "geometric median": compute_geometric_median,
    "coordinate median": compute_coordinate_median,
    "trimmed mean": lambda updates, weights: compute_trimmed_mean(updates, weights, NUM_LIARS / NUM_PEERS),
    "Krum": lambda updates, weights: compute_krum(updates, weights, NUM_LIARS),
    "Multi-Krum": lambda updates, weights: compute_krum(updates, weights, NUM_LIARS, NUM_PEERS - NUM_LIARS),
    "NNM + trimmed mean": mix_and_trim,
}
RULES: dict[str, Rule] = {"mean": compute_mean, "clip": compute_clipped_mean, **ROBUST}


def draw_honest(seed: int, num: int = NUM_PEERS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=DIM) + rng.normal(size=(num, DIM)) * 0.3


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_equal_updates_merge_to_themselves(rule):
    update = draw_honest(1, 1)
    assert np.allclose(rule(np.repeat(update, NUM_PEERS, axis=0), np.ones(NUM_PEERS)), update[0], rtol=1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_peers_and_the_scale_of_weights_do_not_matter(rule, seed):
    updates = draw_honest(seed)
    order = np.random.default_rng(seed).permutation(NUM_PEERS)
    assert np.allclose(rule(updates[order], np.full(NUM_PEERS, 7.0)), rule(updates, np.ones(NUM_PEERS)), atol=1e-7)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_moves_and_grows_with_its_updates(rule):
    updates, shift = draw_honest(2), draw_honest(3, 1)
    weights = np.ones(NUM_PEERS)
    assert np.allclose(rule(3 * updates, weights), 3 * rule(updates, weights), atol=1e-6)
    if rule is not compute_clipped_mean:  # clipping knows where zero is
        assert np.allclose(rule(updates + shift, weights), rule(updates, weights) + shift, atol=1e-6)


@pytest.mark.parametrize("rule", ROBUST.values(), ids=ROBUST)
@pytest.mark.parametrize("size", [10.0, 1e4, 1e15])
def test_a_robust_rule_stays_near_honest_updates_however_far_liars_go(rule, size):
    honest = draw_honest(4, NUM_PEERS - NUM_LIARS)
    lies = size * draw_honest(5, NUM_LIARS)
    step = rule(np.concatenate([lies, honest]), np.ones(NUM_PEERS))
    spread = np.sqrt(compute_square_distances(honest).max())
    # The coordinate median of 7 honest and 4 liars may take the honest values' ends: hence twice the spread.
    assert np.linalg.norm(step - honest.mean(axis=0)) < 2 * spread


@pytest.mark.parametrize("rule", ROBUST.values(), ids=ROBUST)
def test_liars_of_one_mind_do_not_win_either(rule):
    honest = draw_honest(6, NUM_PEERS - NUM_LIARS)
    lies = np.repeat(-20 * honest.mean(axis=0, keepdims=True), NUM_LIARS, axis=0)
    step = rule(np.concatenate([honest, lies]), np.ones(NUM_PEERS))
    assert step @ honest.mean(axis=0) > 0


def test_the_mean_goes_where_one_liar_wants():
    updates = draw_honest(7)
    updates[0] = -100 * NUM_PEERS
    assert (compute_mean(updates, np.ones(NUM_PEERS)) < -90).all()


def test_clipping_bounds_what_a_liar_adds_to_its_share_of_a_median_norm():
    updates = draw_honest(8)
    before = compute_clipped_mean(updates[1:], np.ones(NUM_PEERS - 1)) * (NUM_PEERS - 1) / NUM_PEERS
    updates[0] *= 1e6
    median = np.median(np.linalg.norm(updates, axis=1))
    assert np.linalg.norm(compute_clipped_mean(updates, np.ones(NUM_PEERS)) - before) < 1.5 * median / NUM_PEERS


def test_weights_count_like_that_many_equal_peers():
    updates = draw_honest(9, 4)
    counts = np.array([3, 1, 2, 5])
    each, repeated = np.ones(11), np.repeat(updates, counts, axis=0)
    for rule in (compute_mean, compute_geometric_median, compute_coordinate_median):
        assert np.allclose(rule(updates, counts), rule(repeated, each), atol=1e-6)
    trimmed = compute_trimmed_mean(updates, counts, 2 / 11)
    assert np.allclose(trimmed, compute_trimmed_mean(repeated, each, 2 / 11))


def test_a_weight_of_zero_is_an_absent_peer():
    updates = draw_honest(10)
    weights = np.ones(NUM_PEERS)
    weights[3] = 0
    others = np.delete(updates, 3, axis=0)
    for rule in (compute_mean, compute_geometric_median, compute_coordinate_median):
        assert np.allclose(rule(updates, weights), rule(others, np.ones(NUM_PEERS - 1)), atol=1e-6)


@pytest.mark.parametrize("num_peers", [1, 2, 5, 8])
def test_the_coordinate_median_is_numpys(num_peers):
    updates = draw_honest(11, num_peers).round(1)  # with ties
    assert np.allclose(compute_coordinate_median(updates, np.ones(num_peers)), np.median(updates, axis=0))


@pytest.mark.parametrize("num_trimmed", [0, 1, 5])
def test_the_trimmed_mean_drops_that_many_at_each_end(num_trimmed):
    updates = draw_honest(12)
    kept = np.sort(updates, axis=0)[num_trimmed : NUM_PEERS - num_trimmed]
    trimmed = compute_trimmed_mean(updates, np.ones(NUM_PEERS), num_trimmed / NUM_PEERS)
    assert np.allclose(trimmed, kept.mean(axis=0))


@pytest.mark.parametrize("seed", range(5))
def test_no_small_step_from_the_geometric_median_is_nearer_to_all(seed):
    rng = np.random.default_rng(seed)
    updates, weights = draw_honest(seed, 6) * rng.exponential(size=(6, 1)), rng.exponential(size=6)

    def distance(at):
        return weights @ np.linalg.norm(updates - at, axis=1)

    median = compute_geometric_median(updates, weights)
    for direction in rng.normal(size=(50, DIM)):
        assert distance(median) < distance(median + 1e-3 * direction)


def test_the_geometric_median_of_zero_updates_is_zero():
    assert not compute_geometric_median(np.zeros((3, 5)), np.ones(3)).any()


def test_krum_takes_the_update_with_the_nearest_neighbours():
    updates = draw_honest(13)
    scores = []
    for i in range(NUM_PEERS):
        others = sorted(float(np.sum((updates[i] - updates[j]) ** 2)) for j in range(NUM_PEERS) if j != i)
        scores.append(sum(others[: NUM_PEERS - NUM_LIARS - 2]))
    ranked = np.argsort(scores)
    assert np.allclose(compute_krum(updates, np.ones(NUM_PEERS), NUM_LIARS), updates[ranked[0]])
    assert np.allclose(compute_krum(updates, np.ones(NUM_PEERS), NUM_LIARS, 3), updates[ranked[:3]].mean(axis=0))


def test_mixing_brings_honest_updates_together_and_never_uses_a_far_one():
    honest = draw_honest(14, NUM_PEERS - NUM_LIARS)
    mixed = mix_nearest(np.concatenate([honest, 1e6 * draw_honest(15, NUM_LIARS)]), NUM_LIARS)
    near = mixed[: len(honest)]
    assert np.allclose(near, honest.mean(axis=0))  # here the 7 nearest of an honest one are the 7 honest ones


def test_the_gate_gives_the_judged_useful_their_own_share_and_nobody_more():
    updates = draw_honest(16, 3)
    step = compute_gate(updates, np.array([1, 1, 2]), [5, 0, -3])
    assert np.allclose(step, updates[0] / 4)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("updates", "weights", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0), "at least one peer"),
        (np.zeros(3), np.ones(3), "num_peers, dim"),
        (np.zeros((11, 3)), np.ones(2), "one for each of 11"),
        (np.full((11, 3), np.nan), np.ones(11), "not finite"),
        (np.full((11, 3), np.inf), np.ones(11), "not finite"),
        (np.zeros((11, 3)), np.zeros(11), "not all 0"),
        (np.zeros((11, 3)), np.full(11, -1.0), "not all 0"),
        (np.zeros((11, 3)), np.full(11, np.nan), "not all 0"),
    ],
)
def test_rules_reject_what_is_no_round(rule, updates, weights, message):
    if rule is mix_and_trim and message in ("one for each of 11", "not all 0"):
        pytest.skip("mixing takes no weights")
    with pytest.raises(ValueError, match=message):
        rule(updates, weights)


def test_rules_reject_more_liars_than_they_withstand():
    updates, weights = draw_honest(17), np.ones(NUM_PEERS)
    with pytest.raises(ValueError, match="num_liars = 5"):
        compute_krum(updates, weights, 5)
    with pytest.raises(ValueError, match="expected 1 to 7 chosen"):
        compute_krum(updates, weights, 4, 8)
    with pytest.raises(ValueError, match="num_liars = 6"):
        mix_nearest(updates, 6)
    with pytest.raises(ValueError, match=r"share < 0\.5"):
        compute_trimmed_mean(updates, weights, 0.5)
