"""Laws of settlement that hold for any numbers: nothing is paid that was not allotted, and a root binds its leaves."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue
from p2pfm.settlement.rewards import (
    CONTRIBUTION_MAX,
    compute_leaves,
    compute_median,
    compute_sums,
    compute_weights,
    from_wire,
    to_wire,
)
from p2pfm.settlement.sampling import compute_quorum, draw_committee
from p2pfm.types import WEIGHT_ONE, Contribution, MemberIndex, Wei

contributions = st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=40)
amounts = st.integers(0, 10**26)
leaves = st.lists(
    st.builds(LeafValue, amounts.map(Wei), amounts.map(Wei), st.integers(-(2**60), 2**60)), min_size=1, max_size=33
)


@given(contributions)
def test_weights_sum_to_one_exactly_or_are_all_zero(values: list[int]) -> None:
    weights = compute_weights(values)
    assert sum(weights) == (WEIGHT_ONE if max(values) > 0 else 0)
    assert all(weight == 0 for weight, value in zip(weights, values, strict=True) if value <= 0)


@given(contributions)
def test_weights_are_within_one_of_proportional_and_never_reverse_an_order(values: list[int]) -> None:
    weights = compute_weights(values)
    total = sum(max(0, value) for value in values)
    for weight, value in zip(weights, values, strict=True):
        if total:
            assert abs(weight * total - max(0, value) * WEIGHT_ONE) < total
    ordered = sorted(zip(values, weights, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(ordered) if a[0] < b[0])


def test_weights_give_a_tie_to_the_lower_position() -> None:
    assert compute_weights([1, 1, 1]) == (333_333_334, 333_333_333, 333_333_333)


@given(contributions, amounts)
def test_a_payout_never_exceeds_its_pool_and_leaves_less_than_a_wei_a_member(values: list[int], pool: int) -> None:
    given_values = {MemberIndex(index): value for index, value in enumerate(values)}
    after = compute_leaves((), given_values, len(values), Wei(pool), is_payout=True, is_epoch_start=True)
    paid = compute_sums(after).reward_wei
    assert paid <= pool
    if max(values) > 0:
        assert pool - paid < len(values)
    else:
        assert paid == 0
    assert all(leaf.reward_wei == 0 for leaf, value in zip(after, values, strict=True) if value <= 0)


@given(st.lists(contributions, min_size=1, max_size=6), amounts)
@settings(max_examples=50)
def test_cumulative_sums_count_exactly_what_was_allotted(rounds: list[list[int]], pool: int) -> None:
    state: tuple[LeafValue, ...] = ()
    allotted = 0
    num_members = 0
    for position, values in enumerate(rounds):
        num_members = max(num_members, len(values))
        given_values = {MemberIndex(index): value for index, value in enumerate(values)}
        is_payout = position % 2 == 1
        before = state
        state = compute_leaves(state, given_values, num_members, Wei(pool), is_payout, is_epoch_start=position % 2 == 0)
        allotted += compute_sums(state).reward_wei
        assert is_payout or compute_sums(state).reward_wei == 0
        assert all(new.cumulative_wei >= old.cumulative_wei for new, old in zip(state, before, strict=False))
        assert all(abs(leaf.contribution) <= CONTRIBUTION_MAX for leaf in state)
    assert compute_sums(state).cumulative_wei == allotted
    assert from_wire(to_wire(state)) == state


def test_leaves_refuse_a_stranger_and_a_shrinking_registry() -> None:
    with pytest.raises(ValueError, match="below 2"):
        compute_leaves((), {MemberIndex(2): 1}, 2, Wei(1), is_payout=True, is_epoch_start=True)
    with pytest.raises(ValueError, match="never shrinks"):
        compute_leaves((LeafValue(Wei(0), Wei(0), 0),) * 3, {}, 2, Wei(1), is_payout=True, is_epoch_start=True)


def test_a_liars_sum_for_serving_ends_no_later_round() -> None:
    """No sum on chain holds it, so nothing contests it: the next leaves must still be leaves of a tree."""
    full = (LeafValue(Wei(0), Wei(0), 0, Wei(merkle.AMOUNT_MAX)),)
    served = {MemberIndex(0): Wei(7)}
    after = compute_leaves(full, {}, 1, Wei(1), is_payout=True, is_epoch_start=True, served=served)
    assert after[0].served_wei == merkle.AMOUNT_MAX
    merkle.compute_root(after)


@given(st.lists(st.integers(-100, 100).map(Contribution), min_size=1))
def test_the_median_is_a_value_that_half_do_not_exceed(values: list[Contribution]) -> None:
    median = compute_median(values)
    assert median in values
    assert 2 * sum(value <= median for value in values) >= len(values)
    assert 2 * sum(value >= median for value in values) >= len(values)
    assert median == compute_median(list(reversed(values)))


@given(leaves, st.data())
def test_every_leaf_proves_itself_and_nothing_else(values: list[LeafValue], data: st.DataObject) -> None:
    levels = merkle.build(values)
    root = levels[-1][0]
    assert root.sums == compute_sums(values)
    index = MemberIndex(data.draw(st.integers(0, len(values) - 1)))
    leaf, proof = values[index], merkle.prove(levels, index)
    assert merkle.verify(root.digest, root.sums, len(values), index, leaf, proof)
    other = MemberIndex(data.draw(st.integers(0, 2 * len(values))))
    if other != index and (other >= len(values) or values[other] != leaf):
        assert not merkle.verify(root.digest, root.sums, len(values), other, leaf, proof)
    greedy = msgspec.structs.replace(leaf, cumulative_wei=Wei(leaf.cumulative_wei + 1))
    assert not merkle.verify(root.digest, root.sums, len(values), index, greedy, proof)
    inflated = msgspec.structs.replace(root.sums, reward_wei=Wei(root.sums.reward_wei + 1))
    assert not merkle.verify(root.digest, inflated, len(values), index, leaf, proof)
    assert not merkle.verify(root.digest, root.sums, len(values), index, leaf, proof[:-1]) or not proof


@given(st.lists(st.integers(0, 1000).map(Wei), max_size=30), st.integers(0, 10), st.binary(min_size=32, max_size=32))
def test_a_draw_takes_distinct_members_with_stake(stakes: list[Wei], size: int, seed: bytes) -> None:
    committee = draw_committee(seed, stakes, size)
    assert len(committee) == len(set(committee)) == min(size, sum(stake > 0 for stake in stakes))
    assert all(stakes[index] > 0 for index in committee)
    assert committee == draw_committee(seed, stakes, size)


def test_a_draw_follows_stake() -> None:
    stakes = [Wei(1), Wei(2), Wei(5)]
    first = [draw_committee(seed.to_bytes(32, "big"), stakes, 1)[0] for seed in range(4000)]
    shares = [first.count(MemberIndex(index)) / 4000 for index in range(3)]
    # Four standard deviations of a binomial share of 4000 draws: at most 0.032.
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.032)


@given(st.integers(1, 10_000))
def test_a_quorum_is_more_than_two_thirds_and_no_more_than_needed(size: int) -> None:
    quorum = compute_quorum(size)
    assert 3 * quorum > 2 * size >= 3 * (quorum - 1)
    assert quorum <= size
