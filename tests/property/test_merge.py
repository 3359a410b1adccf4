"""Laws of the merge: the same bytes whatever the order, nobody beyond the median norm."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.config import CompressionConfig
from p2pfm.lora.compress import compress, decode_payload
from p2pfm.lora.delta import encode_tensors
from p2pfm.lora.merge import clip_factors, compute_cross_term_ratio, merge
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


def test_no_update_weighs_more_than_the_median_norm():
    updates = [make_update(seed, scale) for seed, scale in enumerate((1.0, 2.0, 1000.0, 3.0))]
    factors = clip_factors(updates)
    median = sorted(update.norm() for update in updates)[1]
    for update, factor in zip(updates, factors, strict=True):
        assert update.norm() * factor == pytest.approx(min(update.norm(), median), rel=1e-12)


def test_zero_updates_do_not_pull_the_median_down():
    updates = [make_update(0), make_update(1), *[make_update(2, 0.0)] * 5]
    assert clip_factors(updates)[2:] == (1.0,) * 5
    assert max(clip_factors(updates)) == 1.0
    assert min(clip_factors(updates)) > 0.5


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


def test_equal_factors_have_no_cross_term_and_different_ones_do():
    base = make_base()
    twice = [(make_update(0), Weight(1)), (make_update(0), Weight(1))]
    assert compute_cross_term_ratio(twice, base) < 1e-6
    assert compute_cross_term_ratio([(make_update(0), Weight(1)), (make_update(1), Weight(1))], base) > 0.01
