"""Laws of the merge: the same bytes whatever the order, nobody beyond the median norm."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.config import CompressionConfig
from p2pfm.lora.compress import compress, decode_payload
from p2pfm.lora.delta import encode_tensors, flatten
from p2pfm.lora.merge import STRETCH_MAX, clip_factors, compute_clip_factors, merge
from p2pfm.types import WEIGHT_ONE, Weight

SHAPES = {"m.lora_A": (4, 50), "m.lora_B": (60, 4)}
CONFIG = CompressionConfig(chunk=64, keep=16)


def make_update(seed, scale=1.0):
    draw = np.random.default_rng(seed)
    tensors = {name: (draw.standard_normal(shape) * scale).astype(np.float32) for name, shape in SHAPES.items()}
    return decode_payload(compress(tensors, CONFIG)[0], SHAPES, CONFIG, 1 << 20)


def make_base(seed=99):
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=7), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_merged_bytes_do_not_depend_on_arrival_order(scales, shuffler):
    updates = [(make_update(seed, scale), Weight(WEIGHT_ONE // (seed + 2))) for seed, scale in enumerate(scales)]
    expected = encode_tensors(merge(make_base(), updates))
    shuffler.shuffle(updates)
    assert encode_tensors(merge(make_base(), updates)) == expected


def test_every_update_weighs_the_median_norm_unless_it_is_far_below():
    updates = [make_update(seed, scale) for seed, scale in enumerate((0.1, 1.8, 2.0, 1000.0, 3.0))]
    factors = clip_factors(updates)
    median = sorted(update.norm() for update in updates)[2]
    for update, factor in zip(updates, factors, strict=True):
        assert update.norm() * factor == pytest.approx(min(STRETCH_MAX * update.norm(), median), rel=1e-12)
    assert factors[0] == STRETCH_MAX


def test_zero_updates_do_not_pull_the_median_down():
    updates = [make_update(0), make_update(1), *[make_update(2, 0.0)] * 5]
    assert clip_factors(updates)[2:] == (1.0,) * 5
    assert all(0.5 < factor < STRETCH_MAX for factor in clip_factors(updates))


def test_a_merge_of_weight_zero_is_the_base():
    base = make_base()
    merged = merge(base, [(make_update(0), Weight(0))])
    assert encode_tensors(merged) == encode_tensors(base)


def test_the_merge_is_the_weighted_sum():
    base, update = make_base(), make_update(0)
    merged = merge(base, [(update, Weight(WEIGHT_ONE // 4))])
    delta = update.tensors()
    for name in base:
        np.testing.assert_allclose(merged[name], base[name] + 0.25 * delta[name], rtol=1e-6, atol=1e-7)


def test_no_update_at_all_is_the_base():
    base = make_base()
    assert encode_tensors(merge(base, [])) == encode_tensors(base)
    assert clip_factors([]) == ()


def test_zero_updates_of_full_weight_are_the_base():
    base = make_base()
    merged = merge(base, [(make_update(seed, 0.0), Weight(WEIGHT_ONE // 3)) for seed in range(3)])
    assert encode_tensors(merged) == encode_tensors(base)


def test_a_peer_alone_is_merged_as_it_is():
    base, update = make_base(), make_update(3, 7.0)
    merged = merge(base, [(update, Weight(WEIGHT_ONE))])
    exact = flatten(base).astype(np.float64) + flatten(update.tensors())
    np.testing.assert_array_equal(flatten(merged), exact.astype(np.float32))


def test_a_huge_update_moves_the_base_no_further_than_the_median_one():
    base = make_base()
    honest = [make_update(seed) for seed in range(3)]
    for scale in (1e6, 2.0**39):
        updates = [(update, Weight(WEIGHT_ONE // 4)) for update in [*honest, make_update(9, scale)]]
        merged = merge(base, updates)
        step = flatten(merged).astype(np.float64) - flatten(base)
        assert np.isfinite(step).all()
        assert np.linalg.norm(step) <= sorted(update.norm() for update in honest)[1] * (1 + 1e-6)


def test_huge_updates_of_all_peers_stay_finite():
    updates = [(make_update(seed, 2.0**39), Weight(WEIGHT_ONE)) for seed in range(20)]
    assert np.isfinite(flatten(merge(make_base(), updates))).all()


def test_one_payload_given_twice_merges_alike_in_any_order():
    base, update = make_base(), make_update(1, 3.0)
    pairs = [(update, Weight(WEIGHT_ONE // 7)), (update, Weight(WEIGHT_ONE // 3)), (make_update(2), Weight(5))]
    assert encode_tensors(merge(base, pairs)) == encode_tensors(merge(base, pairs[::-1]))


def test_a_merge_rejects_an_update_of_another_adapter():
    other = {"m.lora_A": (4, 50), "m.lora_B": (61, 4)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in other.items()}
    update = decode_payload(compress(tensors, CONFIG)[0], other, CONFIG, 1 << 20)
    with pytest.raises(AssertionError, match="another adapter"):
        merge(make_base(), [(update, Weight(WEIGHT_ONE))])


@pytest.mark.parametrize("norm", [np.nan, np.inf, -1.0])
def test_clipping_rejects_a_norm_that_is_none(norm):
    with pytest.raises(ValueError, match="finite norms"):
        compute_clip_factors([1.0, norm, 2.0])


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-100, 1e100)), max_size=9))
def test_clipping_brings_every_norm_down_to_the_median_of_those_that_move(norms):
    moving = sorted(norm for norm in norms if norm > 0)
    for norm, factor in zip(norms, compute_clip_factors(norms), strict=True):
        assert 0 <= factor <= 1
        assert norm == 0 or norm * factor <= moving[(len(moving) - 1) // 2] * (1 + 1e-12)
