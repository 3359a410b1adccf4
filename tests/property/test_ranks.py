"""Laws of sums of low-rank products: exact untruncated, off by the tail when truncated, whatever the ranks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.lora.ranks import (
    Factors,
    compute_merge,
    compute_nested_masks,
    compute_start,
    compute_sum,
    merge_adapters,
    start_adapter,
)

EXACT = 1e-12
"""Relative, in float64."""


@st.composite
def sums(draw, min_terms=1, min_weight=-3.0):
    """Terms of one shape: any ranks (0, and above both dimensions), weights (0 among them) and scales."""
    size_out, size_in = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    terms = []
    for _ in range(draw(st.integers(min_terms, 6))):
        rank = draw(st.integers(0, 50))
        weight = draw(st.one_of(st.just(0.0), st.floats(min_weight, 3).filter(lambda w: abs(w) > 1e-3)))
        scale_b, scale_a = (10.0 ** draw(st.integers(-6, 6)) for _ in range(2))
        b, a = rng.standard_normal((size_out, rank)) * scale_b, rng.standard_normal((rank, size_in)) * scale_a
        terms.append((weight, Factors(b, a)))
    return terms


def dense(terms):
    return sum(weight * (b @ a) for weight, (b, a) in terms)


def size(terms):
    """What an error is relative to: the sum of the terms' norms (with signs they may cancel)."""
    return sum(abs(weight) * np.linalg.norm(b @ a) for weight, (b, a) in terms)


@given(sums())
@settings(max_examples=100, deadline=None)
def test_untruncated_the_sum_is_the_dense_sum(terms):
    made = compute_sum(terms)
    assert np.linalg.norm(made.factors.b @ made.factors.a - dense(terms)) <= EXACT * size(terms)
    assert made.error() == 0.0


@given(sums(min_weight=1e-3))
@settings(max_examples=60, deadline=None)
def test_untruncated_the_sum_of_shares_is_exact_relative_to_itself(terms):
    made = compute_sum(terms)
    wanted = dense(terms)
    assert np.linalg.norm(made.factors.b @ made.factors.a - wanted) <= EXACT * np.linalg.norm(wanted) + 1e-300


@given(sums(), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_truncated_the_error_is_the_tail_of_the_singular_values(terms, rank):
    made = compute_sum(terms, rank)
    wanted = dense(terms)
    tail = math.sqrt(np.sum(np.linalg.svd(wanted, compute_uv=False)[rank:] ** 2))
    found = np.linalg.norm(made.factors.b @ made.factors.a - wanted)
    assert found == pytest.approx(tail, rel=1e-6, abs=EXACT * size(terms))
    assert made.error() == pytest.approx(tail, rel=1e-6, abs=EXACT * size(terms))


@given(sums(), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_sum_has_the_shape_that_was_asked_for_and_balanced_factors(terms, rank):
    made = compute_sum(terms, rank)
    b, a = made.factors
    assert b.shape == (terms[0][1].b.shape[0], rank)
    assert a.shape == (rank, terms[0][1].a.shape[1])
    values = np.zeros(rank)
    values[: len(made.singular_values[:rank])] = made.singular_values[:rank]
    close = EXACT * max(size(terms), 1e-300)
    np.testing.assert_allclose(b.T @ b, np.diag(values), rtol=0, atol=close)
    np.testing.assert_allclose(a @ a.T, np.diag(values), rtol=0, atol=close)


@given(sums(min_terms=2), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_terms_does_not_matter(terms, shuffler):
    first = compute_sum(terms).factors
    shuffler.shuffle(terms)
    again = compute_sum(terms).factors
    assert np.linalg.norm(first.b @ first.a - again.b @ again.a) <= EXACT * size(terms)


def make_factors(size_out, size_in, rank, seed=0):
    rng = np.random.default_rng(seed)
    return Factors(rng.standard_normal((size_out, rank)), rng.standard_normal((rank, size_in)))


@pytest.mark.parametrize("rank", [None, 0, 3])
def test_a_sum_without_weight_is_zero(rank):
    made = compute_sum([(0.0, make_factors(7, 5, 3)), (0.0, make_factors(7, 5, 2))], rank)
    assert not (made.factors.b @ made.factors.a).any()
    assert made.factors.b.shape == (7, rank or 0)


def test_a_term_and_its_negative_cancel():
    factors = make_factors(9, 8, 4)
    made = compute_sum([(0.7, factors), (-0.7, factors)], 4)
    assert np.linalg.norm(made.factors.b @ made.factors.a) <= EXACT * size([(0.7, factors)])


def test_factors_of_opposite_scales_are_summed_exactly():
    terms = [
        (1.0, Factors(*(part * scale for part, scale in zip(make_factors(9, 8, 2, seed), scales, strict=True))))
        for seed, scales in enumerate([(1e100, 1e-100), (1e-100, 1e100), (1e140, 1e-140)])
    ]
    made = compute_sum(terms)
    assert np.linalg.norm(made.factors.b @ made.factors.a - dense(terms)) <= EXACT * size(terms)


def test_a_sum_rejects_products_beyond_float64():
    b, a = make_factors(9, 8, 2)
    with pytest.raises(ValueError, match="too large"):
        compute_sum([(1.0, Factors(b * 1e200, a * 1e200))])


def test_a_sum_rejects_no_terms():
    with pytest.raises(ValueError, match="at least one product"):
        compute_sum([])


@pytest.mark.parametrize(
    ("b_shape", "a_shape"),
    [((2, 7), (2, 5)), ((7, 2), (5, 2)), ((7, 2), (3, 5)), ((7,), (1, 5)), ((7, 2), (2, 5, 1)), ((8, 2), (2, 5))],
    ids=["b transposed", "a transposed", "other ranks", "a vector", "three dimensions", "another layer"],
)
def test_a_sum_rejects_shapes_that_do_not_fit(b_shape, a_shape):
    with pytest.raises(ValueError, match="expected"):
        compute_sum([(0.5, make_factors(7, 5, 2)), (0.5, Factors(np.ones(b_shape), np.ones(a_shape)))])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["weight", "b", "a"])
def test_a_sum_rejects_what_is_not_finite(value, place):
    factors = make_factors(7, 5, 2)
    weight = value if place == "weight" else 0.5
    if place != "weight":
        getattr(factors, place)[1, 1] = value
    with pytest.raises(ValueError, match=r"product 1.*not finite"):
        compute_sum([(0.5, make_factors(7, 5, 2)), (weight, factors)])


def test_a_sum_rejects_a_negative_rank():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        compute_sum([(1.0, make_factors(7, 5, 2))], -1)


# --- start and merge


def test_a_start_is_the_best_approximation_of_its_rank():
    base, fresh = make_factors(12, 10, 6), make_factors(1, 10, 6, 1).a
    start = compute_start(base, 3, fresh)
    values = np.linalg.svd(base.b @ base.a, compute_uv=False)
    assert start.b.shape == (12, 3)
    error = np.linalg.norm(base.b @ base.a - start.b @ start.a)
    assert error == pytest.approx(math.sqrt(np.sum(values[3:] ** 2)))
    np.testing.assert_allclose(np.linalg.norm(start.a, axis=1), np.linalg.norm(fresh[:3], axis=1))


def test_a_start_from_the_initial_adapter_is_its_first_rows():
    fresh = make_factors(1, 10, 6, 1).a
    start = compute_start(Factors(np.zeros((12, 6)), fresh), 4, fresh)
    np.testing.assert_array_equal(start.a, fresh[:4])
    np.testing.assert_array_equal(start.b, np.zeros((12, 4)))


def test_a_start_of_higher_rank_than_the_base_has_fresh_directions_and_the_same_product():
    base, fresh = make_factors(12, 10, 2), make_factors(1, 10, 6, 1).a
    start = compute_start(base, 6, fresh)
    np.testing.assert_allclose(start.b @ start.a, base.b @ base.a, atol=1e-12)
    np.testing.assert_array_equal(start.a[2:], fresh[2:])
    assert not start.b[:, 2:].any()


def test_a_start_of_rank_0_is_nothing():
    start = compute_start(make_factors(12, 10, 2), 0, make_factors(1, 10, 6).a)
    assert start.b.shape == (12, 0)
    assert start.a.shape == (0, 10)


@pytest.mark.parametrize("fresh", [np.ones((3, 10)), np.ones((6, 9)), np.ones(10), np.full((6, 10), np.nan)])
def test_a_start_rejects_fresh_rows_that_do_not_fit(fresh):
    with pytest.raises(ValueError, match="fresh rows"):
        compute_start(make_factors(12, 10, 2), 4, fresh)


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(0, 8), st.integers(0, 2**32), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_merge_adds_each_peers_step_in_product_space(ranks, base_rank, seed, parts):
    rng = np.random.default_rng(seed)
    base = Factors(rng.standard_normal((14, base_rank)), rng.standard_normal((base_rank, 11)))
    fresh = rng.standard_normal((9, 11))
    weight = 1 / max(parts, len(ranks))
    wanted = base.b @ base.a
    trained = []
    for rank in ranks:
        start = compute_start(base, rank, fresh)
        moved = Factors(*(part + 0.3 * rng.standard_normal(part.shape) for part in start))
        trained.append((weight, moved))
        wanted = wanted + weight * (moved.b @ moved.a - start.b @ start.a)
    merged = compute_merge(base, trained, 40).factors
    np.testing.assert_allclose(merged.b @ merged.a, wanted, atol=1e-11)


def test_peers_that_stood_still_leave_the_base_however_low_their_ranks():
    base, fresh = make_factors(12, 10, 6), make_factors(1, 10, 6, 1).a
    trained = [(1 / 3, compute_start(base, rank, fresh)) for rank in (1, 3, 6)]
    merged = compute_merge(base, trained, 6).factors
    np.testing.assert_allclose(merged.b @ merged.a, base.b @ base.a, atol=1e-12)


@pytest.mark.parametrize("weights", [(0.6, 0.6), (-0.1, 0.5), (math.nan, 0.5), (math.inf, 0.0)])
def test_a_merge_rejects_weights_that_are_no_shares(weights):
    base = make_factors(12, 10, 6)
    with pytest.raises(ValueError, match="sum of at most 1"):
        compute_merge(base, [(weight, make_factors(12, 10, 2)) for weight in weights], 6)


def make_adapter(rank, seed=0, sizes=None):
    rng = np.random.default_rng(seed)
    made = {}
    for module, (size_out, size_in) in (sizes or {"x.q_proj": (12, 10), "x.v_proj": (6, 10)}).items():
        made[f"{module}.lora_A"] = rng.standard_normal((rank, size_in)).astype(np.float32)
        made[f"{module}.lora_B"] = rng.standard_normal((size_out, rank)).astype(np.float32)
    return made


def test_adapters_of_mixed_ranks_merge_to_the_mean_of_their_products():
    base, fresh = make_adapter(8, 1), make_adapter(8, 2)
    starts = [start_adapter(base, rank, fresh) for rank in (2, 4, 8)]
    trained = [{name: part + np.float32(0.1) for name, part in start.items()} for start in starts]
    merged = merge_adapters(base, [(1 / 3, adapter) for adapter in trained], 20)
    for module in ("x.q_proj", "x.v_proj"):
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        steps = [after[b] @ after[a] - before[b] @ before[a] for after, before in zip(trained, starts, strict=True)]
        np.testing.assert_allclose(merged[b] @ merged[a], base[b] @ base[a] + np.mean(steps, axis=0), atol=1e-4)
        assert merged[a].shape == (20, 10)
        assert merged[a].dtype == merged[b].dtype == np.float32


@pytest.mark.parametrize("trained", [[], [(0.0, make_adapter(4, 3))]])
def test_a_merge_of_nobody_is_the_base_itself(trained):
    base = make_adapter(8, 1)
    merged = merge_adapters(base, trained, 8)
    assert merged.keys() == base.keys()
    for name in base:
        np.testing.assert_array_equal(merged[name], base[name])
    assert merge_adapters(base, trained, 3)["x.v_proj.lora_B"].shape == (6, 3)


@pytest.mark.parametrize(
    "names",
    [("x.lora_R",), ("x.lora_B",), ("x.lora_A", "x.lora_B", "y.lora_B"), ("prompt_embeddings",), ("x.ia3_l",), ()],
)
def test_mixed_ranks_reject_adapters_without_pairs(names):
    odd = {name: np.ones((4, 4), np.float32) for name in names}
    with pytest.raises(ValueError, match="one lora_A and one lora_B"):
        merge_adapters(odd, [], 4)
    with pytest.raises(ValueError, match="one lora_A and one lora_B"):
        start_adapter(odd, 2, odd)


def test_a_merge_rejects_an_adapter_of_other_modules():
    base = make_adapter(4)
    with pytest.raises(ValueError, match="amiss"):
        merge_adapters(base, [(1.0, make_adapter(4, sizes={"x.q_proj": (12, 10)}))], 4)
    with pytest.raises(ValueError, match="expected"):
        merge_adapters(base, [(1.0, make_adapter(4, sizes={"x.q_proj": (12, 10), "x.v_proj": (7, 10)}))], 4)


# --- nested ranks


@given(st.integers(0, 7))
def test_nested_ranks_train_the_first_directions_only(rank):
    masks = compute_nested_masks({"x.lora_A": (5, 9), "x.lora_R": (5, 5), "x.lora_B": (8, 5)}, rank)
    held = min(rank, 5)
    assert [int(masks[f"x.lora_{side}"].sum()) for side in "ARB"] == [held * 9, held * held, 8 * held]
    # Whatever moves under the masks moves dW within a product of that rank, as R does between frozen factors.
    rng = np.random.default_rng(rank)
    a, r, b = (rng.standard_normal(masks[f"x.lora_{side}"].shape) * masks[f"x.lora_{side}"] for side in "ARB")
    assert np.linalg.matrix_rank(b @ r @ a) <= held
    assert not a[held:].any()
    assert not b[:, held:].any()


@pytest.mark.parametrize("name", ["prompt_embeddings", "x.ia3_l", "x.lora_C"])
def test_nested_ranks_reject_tensors_without_a_rank(name):
    with pytest.raises(ValueError, match="with a rank"):
        compute_nested_masks({"x.lora_A": (5, 9), name: (5, 5)}, 2)


def test_nested_ranks_reject_a_negative_rank():
    with pytest.raises(ValueError, match="at least 0"):
        compute_nested_masks({"x.lora_A": (5, 9)}, -1)
