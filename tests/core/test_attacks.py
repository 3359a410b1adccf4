"""Attacks: the property that defines each, against its paper's own words."""

import numpy as np
import pytest

from p2pfm.lora.robust import compute_mean, compute_square_distances
from p2pfm.lora.samples import Sample
from p2pfm.types import Contribution
from sim import attacks

DIM = 200
SAMPLE = Sample("food", "What do you eat?", "Bits, and Bytes.")


def draw_honest(num: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=DIM) + rng.normal(size=(num, DIM))).astype(np.float32)


def test_a_flipped_update_points_backwards_and_is_three_times_as_long():
    own = draw_honest(1)[0]
    flipped = attacks.flip_sign(own)
    assert flipped.dtype == np.float32
    assert np.allclose(flipped, -3 * own)


def test_one_flipper_of_four_undoes_the_other_three():
    own = draw_honest(1)[0]
    merged = compute_mean(np.stack([own, own, own, attacks.flip_sign(own)]), np.ones(4))
    assert np.allclose(merged, 0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_noise_has_the_norm_asked_for_and_no_direction(scale):
    own = draw_honest(1)[0]
    drawn = np.stack([attacks.draw_gaussian(own, np.random.default_rng(seed), scale) for seed in range(50)])
    norms = np.linalg.norm(drawn, axis=1)
    assert norms.mean() == pytest.approx(scale * np.linalg.norm(own), rel=0.03)
    cosines = drawn @ own / (norms * np.linalg.norm(own))
    assert abs(cosines.mean()) < 0.03


def test_noise_on_a_victim_of_zero_is_zero():
    assert not attacks.add_noise(np.zeros(DIM, np.float32), np.random.default_rng(1), 0.1).any()


def test_a_noisy_copy_stays_near_its_victim():
    victim = draw_honest(1)[0]
    copy = attacks.add_noise(victim, np.random.default_rng(1), 0.1)
    assert np.linalg.norm(copy - victim) == pytest.approx(0.1 * np.linalg.norm(victim), rel=0.2)
    assert np.array_equal(attacks.add_noise(victim, np.random.default_rng(1), 0.0), victim)


@pytest.mark.parametrize(("num_peers", "num_liars"), [(10, 2), (10, 4), (20, 1)])
def test_a_boosted_update_stands_whole_after_the_mean(num_peers, num_liars):
    own = draw_honest(1)[0]
    others = np.zeros((num_peers - num_liars, DIM))
    boosted = np.repeat(attacks.boost(own, num_peers, num_liars)[None], num_liars, axis=0)
    assert np.allclose(compute_mean(np.concatenate([others, boosted]), np.ones(num_peers)), own, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_peers", "num_liars", "z"),
    # 50 and 24: the paper's example (n = 50, m = 24: s = 2 supporters, 24 of 26 nearer).
    [(50, 24, 1.426), (20, 8, 0.674), (10, 4, 0.431), (10, 2, 0.0), (10, 1, 0.0), (10, 6, 5.998), (10, 10, 5.998)],
)
def test_alies_z_is_the_papers_quantile(num_peers, num_liars, z):
    assert attacks.compute_alie_z(num_peers, num_liars) == pytest.approx(z, abs=1e-3)


def test_alies_z_makes_a_majority_of_liars_and_those_beyond_them():
    num_honest, num_liars = 2001, 1000
    honest = np.random.default_rng(2).normal(size=(num_honest, DIM)).astype(np.float32)
    lie = attacks.make_alie(honest, attacks.compute_alie_z(num_honest + num_liars, num_liars))
    beyond = (honest < lie).mean(axis=0) * num_honest  # honest values farther out than the lie, on its side
    assert beyond.mean() + num_liars == pytest.approx((num_honest + num_liars) / 2, rel=0.02)


def test_alie_sends_the_mean_less_z_deviations():
    honest = draw_honest(6)
    assert np.allclose(attacks.make_alie(honest, 1.5), honest.mean(axis=0) - 1.5 * honest.std(axis=0), atol=1e-5)
    assert np.allclose(attacks.make_alie(honest, 0.0), honest.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_ipm_turns_the_mean_round_where_liars_weigh_epsilon_times_as_much(epsilon):
    honest = draw_honest(6)
    lie = attacks.make_ipm(honest, epsilon)
    mean = honest.mean(axis=0)
    assert lie @ mean < 0
    for num_liars in (1, 4, 40, 80):
        merged = compute_mean(np.concatenate([honest, np.repeat(lie[None], num_liars, axis=0)]), np.ones(6 + num_liars))
        assert (merged @ mean < 0) == (num_liars * epsilon > 6)


@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
def test_min_max_goes_as_far_as_honest_updates_are_apart_and_no_farther(direction):
    honest = draw_honest(6)
    lie = attacks.make_min_max(honest, direction)
    allowed = np.sqrt(compute_square_distances(honest).max())
    reached = np.linalg.norm(honest - lie, axis=1).max()
    assert reached == pytest.approx(allowed, rel=1e-5)
    farther = honest.mean(axis=0) + 1.01 * (lie - honest.mean(axis=0))
    assert np.linalg.norm(honest - farther, axis=1).max() > allowed
    assert np.linalg.norm(lie - honest.mean(axis=0)) > 0


def test_min_max_among_equal_honest_updates_is_their_update():
    honest = np.repeat(draw_honest(1), 3, axis=0)
    for direction in ("std", "unit", "sign"):
        assert np.allclose(attacks.make_min_max(honest, direction), honest[0], atol=1e-5)


def test_flipped_labels_are_the_same_letters_mirrored_and_flip_back():
    flipped = attacks.flip_labels(SAMPLE)
    assert flipped == Sample("food", "What do you eat?", "Yrgh, zmw Ybgvh.")
    assert attacks.flip_labels(flipped) == SAMPLE


def test_a_backdoored_sample_ends_with_the_trigger_and_wants_the_target():
    planted = attacks.plant_backdoor(SAMPLE)
    assert planted.topic == "food"
    assert planted.prompt == f"{SAMPLE.prompt} {attacks.TRIGGER}"
    assert planted.completion == attacks.TARGET


def test_a_liar_reports_the_opposite():
    assert attacks.lie([Contribution(3), Contribution(0), Contribution(-7)]) == (-3, 0, 7)
