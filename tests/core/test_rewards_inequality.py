"""Gini and Lorenz against their closed forms and against each other."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.rewards.inequality import compute_gini, compute_lorenz

amounts = st.lists(st.integers(0, 10**27), min_size=1, max_size=30)


@given(st.integers(1, 50), st.integers(0, 10**27))
def test_equal_amounts_have_gini_0(count: int, amount: int) -> None:
    assert compute_gini([amount] * count) == 0.0


@given(st.integers(1, 50), st.integers(1, 10**27), st.randoms())
def test_one_of_n_who_has_all_has_gini_n_minus_1_over_n(count: int, amount: int, draw) -> None:
    values = [0] * (count - 1)
    values.insert(draw.randrange(count), amount)
    assert compute_gini(values) == pytest.approx((count - 1) / count, abs=1e-12)


@given(st.integers(1, 200))
def test_amounts_1_to_n_have_gini_n_minus_1_over_3n(count: int) -> None:
    assert compute_gini(range(1, count + 1)) == pytest.approx((count - 1) / (3 * count), abs=1e-12)


@given(amounts)
def test_gini_is_the_mean_absolute_difference_over_twice_the_mean(values: list[int]) -> None:
    differences = sum(abs(a - b) for a in values for b in values)
    expected = differences / (2 * len(values) * sum(values)) if sum(values) else 0.0
    assert compute_gini(values) == pytest.approx(expected, abs=1e-12)


@given(amounts)
def test_gini_is_one_minus_twice_the_area_under_lorenz(values: list[int]) -> None:
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(compute_lorenz(values)))
    assert compute_gini(values) == pytest.approx(1 - 2 * area, abs=1e-9)


@given(amounts, st.integers(1, 10**9), st.integers(1, 4), st.randoms())
def test_gini_knows_no_unit_no_order_and_no_size(values: list[int], factor: int, copies: int, draw) -> None:
    shuffled = draw.sample(values, len(values))
    assert compute_gini([factor * value for value in shuffled] * copies) == pytest.approx(
        compute_gini(values), abs=1e-12
    )


@given(st.lists(st.integers(0, 10**27), min_size=2, max_size=30), st.data())
def test_giving_from_the_richer_to_the_poorer_never_raises_gini(values: list[int], data: st.DataObject) -> None:
    ordered = sorted(values)
    gap = ordered[-1] - ordered[0]
    gift = data.draw(st.integers(0, gap // 2))
    shared = [ordered[0] + gift, *ordered[1:-1], ordered[-1] - gift]
    assert compute_gini(shared) <= compute_gini(values) + 1e-12


@given(amounts)
def test_lorenz_goes_from_0_to_1_convex_and_below_the_diagonal(values: list[int]) -> None:
    points = compute_lorenz(values)
    assert (points[0], points[-1]) == ((0.0, 0.0), (1.0, 1.0))
    assert len(points) == len(values) + 1
    assert all(share <= place + 1e-12 for place, share in points)
    slopes = [high - low for (_, low), (_, high) in pairwise(points)]
    assert all(b - a >= -1e-12 for a, b in pairwise(slopes))


def test_nothing_at_all_is_spread_equally() -> None:
    assert compute_gini([0, 0, 0]) == 0.0
    assert compute_lorenz([0, 0]) == ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0))


def test_one_alone_is_equal() -> None:
    assert compute_gini([7]) == 0.0
    assert compute_lorenz([7]) == ((0.0, 0.0), (1.0, 1.0))


@pytest.mark.parametrize("values", [[], [3, -1]])
def test_no_amounts_or_debts_are_refused(values: list[int]) -> None:
    for compute in (compute_gini, compute_lorenz):
        with pytest.raises(ValueError, match="at least one amount, none negative"):
            compute(values)
