"""Laws of the cross term: what it measures is the distance between two merges, computed without forming either."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.config import AdapterConfig, CompressionConfig
from p2pfm.lora import cross_term
from p2pfm.lora.compress import compress, decode_payload
from p2pfm.lora.cross_term import compute_cross_term_ratio, compute_dense_ratio, has_cross_term
from p2pfm.lora.kinds import compute_initial, compute_shapes
from p2pfm.lora.merge import clip_factors, merge
from p2pfm.types import WEIGHT_ONE, Weight

SIZES = {"one": (30, 20), "two": (12, 44)}
CONFIG = CompressionConfig(chunk=64, keep=24)


def make_base(kind="lora", seed=99):
    draw = np.random.default_rng(seed)
    shapes = compute_shapes(AdapterConfig(kind=kind, rank=3), SIZES)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make_update(base, seed, scale=1.0):
    draw = np.random.default_rng(seed)
    tensors = {name: (draw.standard_normal(part.shape) * scale).astype(np.float32) for name, part in base.items()}
    shapes = {name: part.shape for name, part in base.items()}
    return decode_payload(compress(tensors, CONFIG)[0], shapes, CONFIG, 1 << 20)


def by_definition(updates, base):
    """|P - B A| / |P - B0 A0| with every product formed, in float64 (`merge` rounds B and A to float32)."""
    factors = clip_factors([update for update, _ in updates])
    deltas = [{k: v.astype(np.float64) for k, v in update.tensors().items()} for update, _ in updates]
    merged = {
        name: part + sum(w / WEIGHT_ONE * f * d[name] for (_, w), f, d in zip(updates, factors, deltas, strict=True))
        for name, part in base.items()
    }
    for name, part in merge(base, updates).items():
        np.testing.assert_allclose(part, merged[name], rtol=1e-6, atol=1e-6)
    cross, moved = 0.0, 0.0
    for module in SIZES:
        a, b = (base[f"{module}.lora_{side}"].astype(np.float64) for side in "AB")
        mean = b @ a
        for (_, weight), factor, delta in zip(updates, factors, deltas, strict=True):
            own_a, own_b = (base[name] + factor * delta[name] for name in (f"{module}.lora_A", f"{module}.lora_B"))
            mean = mean + weight / WEIGHT_ONE * (own_b @ own_a - b @ a)
        cross += np.sum((mean - merged[f"{module}.lora_B"] @ merged[f"{module}.lora_A"]) ** 2)
        moved += np.sum((mean - b @ a) ** 2)
    return np.sqrt(cross / moved)


@given(st.lists(st.tuples(st.floats(1e-2, 10), st.integers(0, 5)), min_size=1, max_size=6), st.integers(5, 9))
@settings(max_examples=40, deadline=None)
def test_the_ratio_is_the_distance_of_what_was_merged_from_the_mean_of_products(parts, parts_of):
    # Weights that sum to one, to less, and single zeros among them.
    total = max(sum(part for _, part in parts), parts_of)
    base = make_base()
    updates = [
        (make_update(base, seed, scale), Weight(WEIGHT_ONE * part // total)) for seed, (scale, part) in enumerate(parts)
    ]
    if any(weight for _, weight in updates):
        assert compute_cross_term_ratio(updates, base) == pytest.approx(
            by_definition(updates, base), rel=1e-6, abs=1e-7
        )
    else:
        assert compute_cross_term_ratio(updates, base) == 0.0


def test_equal_updates_have_no_cross_term_and_different_ones_do():
    base = make_base()
    half = Weight(WEIGHT_ONE // 2)
    assert compute_cross_term_ratio([(make_update(base, 0), half)] * 2, base) < 1e-9
    assert compute_cross_term_ratio([(make_update(base, 0), half), (make_update(base, 1), half)], base) > 0.01


def test_half_a_step_has_a_cross_term_even_alone():
    base = make_base()
    update = make_update(base, 0)
    assert compute_cross_term_ratio([(update, Weight(WEIGHT_ONE))], base) < 1e-9
    assert compute_cross_term_ratio([(update, Weight(WEIGHT_ONE // 2))], base) > 0.01


@pytest.mark.parametrize("kind", ["ffa", "fed_sb"])
def test_exact_kinds_have_no_cross_term(kind):
    base = make_base(kind)
    updates = [(make_update(base, seed), Weight(WEIGHT_ONE // 2)) for seed in range(2)]
    assert not has_cross_term(base)
    assert compute_cross_term_ratio(updates, base) == 0.0
    assert has_cross_term(make_base("lora"))


def test_scales_and_prompts_have_no_cross_term():
    shapes = {"one.ia3_l": (30, 1), "prompt_embeddings": (4, 20)}
    base = compute_initial(shapes, 0, np.ones((9, 20), np.float32))
    updates = [(make_update(base, seed), Weight(WEIGHT_ONE // 2)) for seed in range(2)]
    assert not has_cross_term(base)
    assert compute_cross_term_ratio(updates, base) == 0.0


def test_nothing_moved_has_no_cross_term():
    base = make_base()
    assert compute_cross_term_ratio([], base) == 0.0
    assert compute_cross_term_ratio([(make_update(base, 0), Weight(0))], base) == 0.0
    assert compute_cross_term_ratio([(make_update(base, 0, 0.0), Weight(WEIGHT_ONE))], base) == 0.0
    assert compute_dense_ratio([], base) == 0.0


def test_huge_updates_have_a_finite_ratio():
    base = make_base()
    updates = [(make_update(base, seed, 2.0**39), Weight(WEIGHT_ONE // 2)) for seed in range(2)]
    assert 0 < compute_cross_term_ratio(updates, base) < 1


def test_dense_deltas_have_the_ratio_of_the_same_updates():
    base = make_base()
    updates = [make_update(base, seed) for seed in range(3)]
    share = 1 / 4
    factors = clip_factors(updates)
    dense = [
        (share, {name: np.float64(factor) * part for name, part in update.tensors().items()})
        for update, factor in zip(updates, factors, strict=True)
    ]
    wanted = compute_cross_term_ratio([(update, Weight(WEIGHT_ONE // 4)) for update in updates], base)
    assert compute_dense_ratio(dense, base) == pytest.approx(wanted, rel=1e-9)


def test_the_sketch_of_many_updates_is_within_a_tenth_of_the_exact_ratio(monkeypatch):
    base = make_base()
    updates = [(make_update(base, seed), Weight(WEIGHT_ONE // 60)) for seed in range(60)]
    exact = compute_cross_term_ratio(updates, base)
    monkeypatch.setattr(cross_term, "EXACT_RANK_MAX", 8)
    sketched = compute_cross_term_ratio(updates, base)
    assert sketched != exact
    assert sketched == pytest.approx(exact, rel=0.1)
