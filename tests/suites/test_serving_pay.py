"""What is paid for serving: out of a pool of its own, by the same trees, alike on every ledger."""

import msgspec
from ledger_worlds import ACCOUNTS, PARAMS, SPONSOR, TOKENS, World, refuses

from p2pfm.types import MemberIndex, Round, Wei


def test_serving_is_paid_from_its_own_pool_once_and_to_the_member(world: World) -> None:
    world.found(4)
    sponsor = world.ledgers[SPONSOR]
    sponsor.fund_serving(Wei(500))
    assert (world.any.get_serving_pool(), world.any.get_pool()) == (500, 1500)
    assert world.any.get_params().serving_per_epoch == PARAMS.serving_per_epoch
    world.any.submit_round(world.submission(1, [5, -3, 9, 0], served=[0, 200, 100]))
    leaves = world.leaves
    with refuses("NotFinal"):
        sponsor.claim_served(Round(1), MemberIndex(1), leaves)
    with refuses("UnknownRound"):
        sponsor.claim_served(Round(0), MemberIndex(1), leaves)
    world.advance(PARAMS.challenge_window_s)
    before = world.any.get_balance(ACCOUNTS[SPONSOR])
    assert [sponsor.claim_served(Round(1), MemberIndex(index), leaves) for index in range(4)] == [0, 200, 100, 0]
    assert sponsor.claim_served(Round(1), MemberIndex(1), leaves) == 0, "once"
    assert world.any.get_balance(ACCOUNTS[SPONSOR]) == before
    assert world.any.get_balance(ACCOUNTS[2]) == TOKENS - 10 + 200
    assert [world.any.get_claimed_served(MemberIndex(index)) for index in range(4)] == [0, 200, 100, 0]
    assert world.any.get_serving_pool() == 200
    assert world.any.claim(Round(1), MemberIndex(1), leaves) == 0, "for learning it is owed nothing"
    assert world.any.get_claimed(MemberIndex(1)) == 0
    world.check_books()


def test_what_is_served_adds_up_over_rounds(world: World) -> None:
    world.found(4, pool=2000)
    world.ledgers[6].fund_serving(Wei(600))
    world.any.submit_round(world.submission(1, [1, 1], served=[100, 50]))
    world.any.submit_round(world.submission(2))
    world.any.submit_round(world.submission(3, [1, 1], served=[30]))
    world.advance(PARAMS.challenge_window_s)
    assert world.any.claim_served(Round(3), MemberIndex(0), world.leaves) == 130
    assert world.any.claim_served(Round(3), MemberIndex(1), world.leaves) == 50


def test_a_pool_that_runs_dry_pays_on_when_a_sponsor_comes_and_learning_is_paid_all_the_same(world: World) -> None:
    world.found(4)
    world.ledgers[6].fund_serving(Wei(120))
    world.any.submit_round(world.submission(1, [1, 1], served=[100, 100]))
    world.advance(PARAMS.challenge_window_s)
    assert world.any.claim_served(Round(1), MemberIndex(0), world.leaves) == 100
    assert world.any.claim_served(Round(1), MemberIndex(1), world.leaves) == 20
    assert world.any.claim_served(Round(1), MemberIndex(1), world.leaves) == 0
    assert world.any.claim(Round(1), MemberIndex(1), world.leaves) == 500
    world.ledgers[6].fund_serving(Wei(500))
    assert world.any.claim_served(Round(1), MemberIndex(1), world.leaves) == 80


def test_a_committee_cannot_draw_more_than_an_epoch_allots(world: World) -> None:
    world.found(4)
    world.ledgers[6].fund_serving(Wei(1000))
    world.any.submit_round(world.submission(1, [1, 1], served=[200, 200]))  # 300 is an epoch's
    world.advance(PARAMS.challenge_window_s)
    assert world.any.claim_served(Round(1), MemberIndex(0), world.leaves) == 200
    with refuses("OverBudget"):
        world.any.claim_served(Round(1), MemberIndex(1), world.leaves)
    world.any.submit_round(world.submission(3))  # a second epoch has ended
    world.advance(PARAMS.challenge_window_s)
    assert world.any.claim_served(Round(3), MemberIndex(1), world.leaves) == 200


def test_served_leaves_must_be_of_the_root(world: World) -> None:
    world.found(4)
    world.ledgers[SPONSOR].fund_serving(Wei(300))
    world.any.submit_round(world.submission(1, [1, 1], served=[10, 20]))
    leaves = world.leaves
    world.advance(PARAMS.challenge_window_s)
    greedy = (msgspec.structs.replace(leaves[0], served_wei=Wei(200)), *leaves[1:])
    swapped = (leaves[1], leaves[0], *leaves[2:])
    for wrong in (greedy, swapped, leaves[:3]):
        with refuses("BadProof"):
            world.any.claim_served(Round(1), MemberIndex(0), wrong)
    assert world.any.get_serving_pool() == 300


def test_of_a_voided_round_nothing_is_paid_for_serving(world: World) -> None:
    world.found(4)
    world.ledgers[SPONSOR].fund_serving(Wei(300))
    world.any.submit_round(world.submission(1, [1, 1], served=[10]))
    before = world.leaves
    unpaid = tuple(
        msgspec.structs.replace(leaf, reward_wei=Wei(0), contribution=0, served_wei=Wei(leaf.served_wei + 200))
        for leaf in before
    )
    wrong = (msgspec.structs.replace(unpaid[0], cumulative_wei=Wei(0)), *unpaid[1:])
    wrong = (*wrong[:1], msgspec.structs.replace(unpaid[1], cumulative_wei=Wei(1000)), *wrong[2:])
    world.cheat(2, wrong)
    world.any.prove_transition(Round(2), MemberIndex(0), before, wrong)
    world.advance(PARAMS.challenge_window_s)
    with refuses("UnknownRound"):
        world.any.claim_served(Round(2), MemberIndex(1), wrong)
    assert world.any.claim_served(Round(1), MemberIndex(0), before) == 10
