"""CHAIN's pitfalls, one test each, on every ledger. What a longer test of tests/suites holds too is short here."""

from collections.abc import Iterator

import msgspec
import pytest
from ledger_worlds import IMPLEMENTATIONS, PARAMS, World, chain_world, memory_world, refuses, running_chain

from p2pfm.settlement.ledger import LeafValue
from p2pfm.types import Digest, MemberIndex, Round, Wei

WINDOW, RESPONSE = PARAMS.challenge_window_s, PARAMS.response_s


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def chain_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "memory":
        yield None
        return
    with running_chain(request.param) as url:
        yield url


@pytest.fixture
def world(chain_url: str | None) -> World:
    return memory_world() if chain_url is None else chain_world(chain_url)


def member(index: int) -> MemberIndex:
    return MemberIndex(index)


def leaf(cumulative: int, reward: int = 0, contribution: int = 0) -> LeafValue:
    return LeafValue(Wei(cumulative), Wei(reward), contribution)


def numbers(world: World) -> list[int]:
    return [int(settled.round) for settled in world.any.get_rounds(Round(0))]


def test_pitfall_1_anyone_restarts_after_a_missed_window(world: World) -> None:
    world.found(4)
    missed = world.submission(0)
    world.advance(PARAMS.restart_s)
    world.ledgers[6].restart()
    with refuses("BadNonce"):
        world.any.submit_round(missed)
    world.settle(1)
    assert numbers(world) == [1]


def test_pitfall_2_a_garbage_root_falls_by_a_demand(world: World) -> None:
    world.found(5)
    world.any.submit_round(world.submission(0, root=Digest(b"\x07" * 32)))
    number = world.any.demand_leaf(Round(0), member(0))
    world.advance(RESPONSE)
    world.any.close_demand(number)
    assert numbers(world) == []


def test_pitfall_3_a_voided_signature_dies_and_a_pending_rounds_equivocation_stays_provable(world: World) -> None:
    world.found(5)
    spared = world.any.get_roster().committee[0]
    one = world.submission(0)
    two = world.submission(0, base=Digest(b"\x09" * 32))
    world.any.submit_round(world.submission(0, absent=[spared], root=Digest(b"\x07" * 32)))
    number = world.any.demand_leaf(Round(0), member(0))
    world.advance(RESPONSE)
    world.any.close_demand(number)
    with refuses("BadNonce"):
        world.any.submit_round(one)
    assert world.any.get_roster().members[spared].stake == 10
    world.any.prove_equivocation(one, two)
    assert world.any.get_roster().members[spared].stake == 0


def test_pitfall_4_a_demand_for_a_round_holds_all_later_rounds(world: World) -> None:
    world.found(4, pool=1900)
    world.settle(0)
    world.settle(1, [1, 1, 0, 0])
    world.advance(WINDOW - 60)
    world.any.demand_leaf(Round(0), member(0))
    world.advance(80)
    assert [settled.is_final for settled in world.any.get_rounds(Round(0))] == [False, False]
    with refuses("NotFinal"):
        world.any.claim(Round(1), member(0), world.leaves)
    world.advance(2 * RESPONSE)
    assert [settled.is_final for settled in world.any.get_rounds(Round(0))] == [True, True]


def test_pitfall_5_unbonding_outlasts_the_longest_contest(world: World) -> None:
    assert PARAMS.unbonding_s >= WINDOW + 2 * RESPONSE == PARAMS.contest_s
    short = msgspec.structs.replace(PARAMS, unbonding_s=PARAMS.contest_s - 1)
    with refuses("BadParameter"):
        memory_world(short)
    world.found(4)
    world.settle(0)
    world.advance(WINDOW)
    with refuses("NotContestable"):  # no demand after demand for ever
        world.any.demand_leaf(Round(0), member(0))


def test_pitfall_6_who_joins_after_the_seed_is_fixed_is_not_in_its_draw(world: World) -> None:
    world.found(4)
    world.join(5, 100)
    world.advance(PARAMS.rotation_s)
    world.any.rotate()
    assert set(world.any.get_roster().committee) == {0, 1, 2, 3}, "however large its stake"


def test_pitfall_7_the_floor_leaves_less_than_a_wei_a_member_in_the_pool(world: World) -> None:
    world.found(4, pool=1000)
    world.settle(1, [1, 1, 1, 0])
    head = world.any.get_head()
    assert head is not None
    assert (head.sums.cumulative_wei, world.any.get_pool()) == (999, 1)


def test_pitfall_8_one_bad_root_does_not_drain_what_is_not_its_own(world: World) -> None:
    world.found(4, pool=1900)
    world.settle(1, [1, 1, 0, 0])
    world.advance(WINDOW)
    world.any.claim(Round(1), member(0), world.leaves)
    thief = (leaf(0), leaf(0), leaf(1000), leaf(0))
    world.cheat(2, thief)
    world.advance(WINDOW)
    with refuses("Drained"):
        world.any.claim(Round(2), member(2), thief)
    world.check_books()
