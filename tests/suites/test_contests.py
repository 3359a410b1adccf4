"""Leaving, and every way to contest a round: one suite, every ledger."""

from collections.abc import Callable, Iterator

import msgspec
import pytest
from ledger_worlds import ACCOUNTS, BLS_KEYS, PARAMS, PEERS, SECRETS, SPONSOR, TOKENS, World, refuses

from p2pfm.settlement import bls
from p2pfm.settlement.ledger import (
    Accepted,
    Claimed,
    Closed,
    Contested,
    Demanded,
    FederationParams,
    Funded,
    Joined,
    LeafValue,
    Left,
    Restarted,
    Rotated,
    Shown,
    Slashed,
    Sums,
    Voided,
    Withdrawn,
)
from p2pfm.types import Digest, MemberIndex, Round, Wei

BOND, WINDOW, RESPONSE = PARAMS.leaf_bond, PARAMS.challenge_window_s, PARAMS.response_s


def leaf(cumulative: int, reward: int, contribution: int) -> LeafValue:
    return LeafValue(Wei(cumulative), Wei(reward), contribution)


def index(position: int) -> MemberIndex:
    return MemberIndex(position)


OVERPAID = (leaf(900, 900, 1), leaf(100, 100, 1), leaf(0, 0, 0), leaf(0, 0, 0))
"""Of two with equal contributions one gets all but everything: sums are right, the floor rule is broken."""


@pytest.fixture(autouse=True)
def books(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does: the books balance after it."""
    world = request.getfixturevalue("world") if "world" in request.fixturenames else None
    yield
    if world is not None:
        world.check_books()


# --- contests by proof ------------------------------------------------------------------------------------------------


def test_an_overpaid_leaf_voids_the_round_slashes_its_signers_and_pays_who_proved_it(world: World) -> None:
    world.found(5, pool=1500)
    committee = world.any.get_roster().committee
    spared = committee[2]
    world.cheat(1, (*OVERPAID, leaf(0, 0, 0)), absent=[spared])
    assert world.any.get_pool() == 500
    world.any.prove_reward(Round(1), index(0), world.leaves)
    assert world.any.get_head() is None
    guilty = set(committee) - {spared}
    stakes = {member.index: (member.stake, member.active) for member in world.any.get_roster().members}
    assert stakes == {i: (0, False) if i in guilty else (10, True) for i in range(5)}
    assert world.any.get_balance(ACCOUNTS[SPONSOR]) == TOKENS - 1500 + 30 // 4
    assert world.any.get_pool() == 1500 + 30 - 30 // 4
    assert world.any.get_roster().nonce == 1


def test_an_underpaid_leaf_is_a_fault_too(world: World) -> None:
    world.found(4)
    world.cheat(1, OVERPAID)
    world.any.prove_reward(Round(1), index(1), world.leaves)
    assert world.any.get_head() is None


def test_a_reward_in_a_round_that_pays_nothing_is_a_fault(world: World) -> None:
    world.found(4)
    # The sums say 0, so the chain takes it; a leaf that says more is not of a tree with such sums.
    world.settle(0)
    with refuses("NoFault"):
        world.any.prove_reward(Round(0), index(0), world.leaves)
    world.cheat(2, tuple(leaf(0, 0, 5) for _ in range(4)))  # the epoch ended with round 1: 2 pays in its place
    world.any.prove_reward(Round(2), index(0), world.leaves)
    head = world.any.get_head()
    assert head is not None
    assert head.round == 0


def test_a_sum_that_was_moved_from_one_to_another_is_a_fault(world: World) -> None:
    world.found(4, pool=2000)
    world.settle(1, [1, 1, 0, 0])
    before = world.leaves
    stolen = (leaf(1500, 500, 1), leaf(500, 500, 1), leaf(0, 0, 0), leaf(0, 0, 0))
    world.cheat(3, stolen)
    for position in range(4):
        with refuses("NoFault"):
            world.any.prove_reward(Round(3), index(position), stolen)
    with refuses("NoFault"):
        world.any.prove_transition(Round(3), index(2), before, stolen)
    world.any.prove_transition(Round(3), index(1), before, stolen)
    head = world.any.get_head()
    assert head is not None
    assert (head.round, world.any.get_pool()) == (1, 1000 + 40 - 10)
    world.advance(WINDOW)
    assert world.any.claim(Round(1), index(1), before) == 500


def test_a_newcomer_begins_with_nothing(world: World) -> None:
    world.found(4, pool=2000)
    world.settle(1, [1, 1, 0, 0])
    before = world.leaves
    world.join(5)
    gift = (leaf(500, 0, 0), leaf(0, 0, 0), leaf(0, 0, 0), leaf(0, 0, 0), leaf(500, 0, 0))
    world.cheat(2, gift)
    with refuses("NoFault"):
        world.any.prove_transition(Round(2), index(0), before, gift)
    world.any.prove_transition(Round(2), index(4), before, gift)
    head = world.any.get_head()
    assert head is not None
    assert (head.round, head.num_leaves) == (1, 4)


def test_the_first_round_begins_with_nothing(world: World) -> None:
    world.found(4)
    with refuses("BadSums"):
        world.cheat(0, (leaf(5, 0, 0), *(leaf(0, 0, 0),) * 3))
    gift = (leaf(1000, 0, 0), leaf(0, 1000, 5), leaf(0, 0, 0), leaf(0, 0, 0))
    world.cheat(1, gift)
    with refuses("NoFault"):
        world.any.prove_reward(Round(1), index(1), gift)
    world.any.prove_transition(Round(1), index(1), (), gift)
    assert world.any.get_head() is None


def test_an_honest_round_cannot_be_framed(world: World) -> None:
    world.found(4, pool=2000)
    world.settle(1, [5, -3, 9, 0])
    before = world.leaves
    world.settle(3, [1, 1, 1, 0])
    leaves = world.leaves
    for position in range(4):
        with refuses("NoFault"):
            world.any.prove_reward(Round(3), index(position), leaves)
        with refuses("NoFault"):
            world.any.prove_transition(Round(3), index(position), before, leaves)
        with refuses("NoFault"):
            world.any.prove_reward(Round(1), index(position), before)
    false = (leaf(999, 999, 5), *leaves[1:])
    for wrong in (false, leaves[:2], ()):
        with refuses("BadProof"):
            world.any.prove_reward(Round(3), index(0), wrong)
        with refuses("BadProof"):
            world.any.prove_transition(Round(3), index(0), before, wrong)
    for wrong in (false, leaves, before[:2], ()):
        with refuses("BadProof"):
            world.any.prove_transition(Round(3), index(0), wrong, leaves)
    with refuses("UnknownRound"):
        world.any.prove_reward(Round(2), index(0), leaves)
    assert [settled.round for settled in world.any.get_rounds(Round(0))] == [1, 3]
    assert all(member.stake == 10 for member in world.any.get_roster().members)


def test_a_final_round_stands_whatever_it_says(world: World) -> None:
    world.found(4)
    world.cheat(1, OVERPAID)
    world.advance(WINDOW)
    with refuses("NotContestable"):
        world.any.prove_reward(Round(1), index(0), OVERPAID)
    with refuses("NotContestable"):
        world.any.prove_transition(Round(1), index(0), (), OVERPAID)
    with refuses("NotContestable"):
        world.any.demand_leaf(Round(1), index(0))


def test_a_void_takes_what_follows_with_it_and_their_signatures_die(world: World) -> None:
    world.found(5, pool=2000)
    world.settle(0)
    world.cheat(1, (*OVERPAID, leaf(0, 0, 0)))
    false = world.leaves
    world.settle(2)
    pending = world.submission(3)
    world.any.prove_reward(Round(1), index(0), false)
    assert [settled.round for settled in world.any.get_rounds(Round(0))] == [0]
    with refuses("BadNonce"):
        world.any.submit_round(pending)
    world.leaves = ()
    with refuses("BadEpoch"):  # the slashed committee has nothing to lose any more
        world.any.submit_round(world.submission(3))
    world.any.rotate()  # at once, although the rotation period is not over
    assert world.any.get_roster().committee == tuple(
        member.index for member in world.any.get_roster().members if member.stake
    )


def test_who_was_spared_goes_on_after_a_void(world: World) -> None:
    world.found(5, pool=2000)
    spared = world.any.get_roster().committee[0]
    world.cheat(1, (*OVERPAID, leaf(0, 0, 0)), absent=[spared])
    world.any.prove_reward(Round(1), index(0), world.leaves)
    world.any.rotate()
    world.leaves = ()
    world.settle(3, [0, 1, 0, 0, 1])
    world.advance(WINDOW)
    assert world.any.claim(Round(3), index(1), world.leaves) == 500, "a slashed member keeps what it earned"


# --- contests by demand -----------------------------------------------------------------------------------------------


def test_a_shown_leaf_gives_the_bond_to_who_showed_it_and_time_to_prove(world: World) -> None:
    world.found(4)
    world.cheat(1, OVERPAID)
    number = world.any.demand_leaf(Round(1), index(3))
    assert world.any.get_balance(ACCOUNTS[SPONSOR]) == TOKENS - 1500 - BOND
    (demand,) = world.any.get_demands()
    assert (demand.number, demand.account, demand.index, demand.is_open) == (number, ACCOUNTS[SPONSOR], 3, True)
    with refuses("TooEarly"):
        world.any.close_demand(number)
    for wrong in (world.leaves[:2], (*OVERPAID[:3], leaf(1, 0, 0))):
        with refuses("BadProof"):
            world.ledgers[2].show_leaf(number, wrong)
    world.ledgers[2].show_leaf(number, world.leaves)
    assert world.any.get_balance(ACCOUNTS[2]) == TOKENS - 10 + BOND
    for again in (lambda: world.any.close_demand(number), lambda: world.any.show_leaf(number, world.leaves)):
        with refuses("UnknownDemand"):
            again()
    world.advance(WINDOW)
    head = world.any.get_head()
    assert head is not None
    assert head.is_final, "the window outlasts the demand here"


def test_a_leaf_that_is_not_shown_voids_its_round(world: World) -> None:
    """So a root that stands for no tree at all, which no proof can touch, does not stand."""
    world.found(5)
    world.settle(0)
    garbage = world.submission(1, [1, 1, 0, 0, 0], root=Digest(b"\x07" * 32))
    world.any.submit_round(garbage)
    before = world.any.get_balance(ACCOUNTS[SPONSOR])
    number = world.any.demand_leaf(Round(1), index(0))
    with refuses("BadProof"):
        world.ledgers[1].show_leaf(number, world.leaves)
    world.advance(RESPONSE)
    with refuses("TooLate"):
        world.ledgers[1].show_leaf(number, world.leaves)
    world.ledgers[2].close_demand(number)
    head = world.any.get_head()
    assert head is not None
    assert head.round == 0
    assert world.any.get_balance(ACCOUNTS[SPONSOR]) == before + 40 // 4, "bond and bounty are of who demanded"
    assert world.any.get_roster().nonce == 1


def test_a_demand_holds_its_round_and_those_after_it_but_never_for_ever(world: World) -> None:
    world.found(4, pool=1900)
    world.settle(0)
    world.settle(1, [1, 1, 0, 0])
    world.advance(WINDOW - 60)
    world.any.demand_leaf(Round(1), index(0))
    later = world.leaves
    world.advance(60)
    finals = [settled.is_final for settled in world.any.get_rounds(Round(0))]
    assert finals == [True, False], "what was accepted before the contested round is final in time"
    with refuses("NotFinal"):
        world.any.claim(Round(1), index(0), later)
    with refuses("NotContestable"):
        world.any.demand_leaf(Round(1), index(1))  # its window is over: no demand after demand for ever
    world.settle(2)
    world.any.demand_leaf(Round(2), index(0))
    world.advance(2 * RESPONSE - 30)
    assert not world.any.get_rounds(Round(1))[0].is_final
    world.advance(60)
    assert [settled.is_final for settled in world.any.get_rounds(Round(1))] == [True, False]
    assert world.any.claim(Round(1), index(0), later) == 500


def test_a_bond_comes_back_when_its_round_is_void_or_final_already(world: World) -> None:
    world.found(5, pool=2000)
    world.settle(0)
    world.cheat(1, (*OVERPAID, leaf(0, 0, 0)))
    false = world.leaves
    numbers = [world.ledgers[i].demand_leaf(Round(round), index(0)) for i, round in ((6, 0), (6, 1))]
    balance = world.any.get_balance(ACCOUNTS[6])
    world.any.prove_reward(Round(1), index(0), false)
    with refuses("UnknownRound"):
        world.any.show_leaf(numbers[1], false)
    world.any.close_demand(numbers[1])
    assert world.any.get_balance(ACCOUNTS[6]) == balance + BOND
    world.advance(PARAMS.contest_s)
    world.any.close_demand(numbers[0])  # nobody closed it in time: the round is final, and stands
    assert world.any.get_balance(ACCOUNTS[6]) == balance + 2 * BOND
    assert [settled.round for settled in world.any.get_rounds(Round(0))] == [0]


def test_a_demand_needs_a_leaf_a_round_and_a_bond(world: World) -> None:
    world.found(4)
    world.settle(0)
    with refuses("UnknownLeaf"):
        world.any.demand_leaf(Round(0), index(4))
    with refuses("UnknownRound"):
        world.any.demand_leaf(Round(1), index(0))
    with refuses("UnknownDemand"):
        world.any.close_demand(0)
    poor = world.ledgers[6]
    poor.fund(Wei(TOKENS))
    with refuses("ERC20InsufficientBalance"):
        poor.demand_leaf(Round(0), index(0))


# --- equivocation -----------------------------------------------------------------------------------------------------


def test_two_statements_about_one_round_slash_who_signed_both_and_void_nothing(world: World) -> None:
    world.found(4)
    one = world.settle(0)
    other = world.submission(0, absent=[0], prev_root=one.prev_root, base=Digest(b"\x09" * 32))
    other = world.sign(msgspec.structs.replace(other, absent=(0, 3)), signers=[1, 2])
    world.any.prove_equivocation(one, other)
    stakes = [member.stake for member in world.any.get_roster().members]
    assert stakes == [10, 0, 0, 10], "only the intersection, and no quorum is needed for either"
    head = world.any.get_head()
    assert head is not None
    assert (head.root, world.any.get_roster().nonce) == (one.root, 1)
    with refuses("NoFault"):
        world.any.prove_equivocation(one, other)
    world.any.rotate()
    assert set(world.any.get_roster().committee) == {0, 3}


def test_equivocation_about_a_voided_or_pending_round_is_still_a_fault(world: World) -> None:
    world.found(5)
    pending = world.submission(1, nonce=0)
    twin = world.submission(1, nonce=0, base=Digest(b"\x09" * 32))
    spared = world.any.get_roster().committee[0]
    twin = world.sign(msgspec.structs.replace(twin, absent=(spared,)))
    world.settle(0)
    world.advance(PARAMS.restart_s)
    world.any.restart()  # the nonce has moved on; theirs was true when they signed
    world.any.prove_equivocation(pending, twin)
    assert sum(member.stake == 0 for member in world.any.get_roster().members) == 3


def test_nobody_is_framed_for_equivocation(world: World) -> None:
    world.found(4)
    one = world.submission(1)
    other = world.submission(1, base=Digest(b"\x09" * 32))
    harmless = (
        (one, one),
        (one, world.sign(msgspec.structs.replace(one, absent=(2,)))),  # the same statement, fewer signatures
        (one, world.submission(2)),
        (one, world.submission(1, nonce=1)),
    )
    for first, second in harmless:
        with refuses("NoFault"):
            world.any.prove_equivocation(first, second)
    forged = (
        msgspec.structs.replace(other, signature=one.signature),
        msgspec.structs.replace(other, absent=(1,)),
        world.sign(other, signers=[0, 1, 2]),
        world.sign(msgspec.structs.replace(other, absent=(0, 1, 2, 3)), signers=[0]),
    )
    for wrong in forged:
        for pair in ((one, wrong), (wrong, one)):
            with refuses("BadSignature"):
                world.any.prove_equivocation(*pair)
    apart = [
        world.sign(msgspec.structs.replace(one, absent=(2, 3)), signers=[0, 1]),
        world.sign(msgspec.structs.replace(other, absent=(0, 1)), signers=[2, 3]),
    ]
    with refuses("NoFault"):  # nobody signed both
        world.any.prove_equivocation(*apart)
    with refuses("BadAbsent"):
        world.any.prove_equivocation(one, world.sign(msgspec.structs.replace(other, absent=(4,)), signers=[0]))
    assert all(member.stake == 10 for member in world.any.get_roster().members)


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_a_leaver_gets_its_stake_when_nothing_it_signed_can_be_contested(world: World) -> None:
    world.found(5)
    with refuses("UnknownMember"):
        world.ledgers[6].unbond()
    with refuses("NotLeaving"):
        world.ledgers[5].withdraw()
    world.ledgers[5].unbond()
    with refuses("NotActive"):
        world.ledgers[5].unbond()
    member = world.any.get_roster().members[4]
    assert (member.stake, member.active) == (10, False)
    for _ in range(3):  # epoch 2 may have it; its certificates are dead from epoch 4 on
        with refuses("StillLiable"):
            world.ledgers[5].withdraw()
        world.advance(PARAMS.rotation_s)
        world.any.rotate()
    assert 4 not in world.any.get_roster().committee
    world.advance(PARAMS.unbonding_s - 60)
    with refuses("StillLiable"):
        world.ledgers[5].withdraw()
    world.advance(60)
    assert world.ledgers[5].withdraw() == 10
    assert world.any.get_balance(ACCOUNTS[5]) == TOKENS
    with refuses("UnknownMember"):
        world.ledgers[5].withdraw()


def test_who_left_may_come_back_as_a_new_member(make_world: Callable[[FederationParams], World]) -> None:
    world = make_world(msgspec.structs.replace(PARAMS, members_max=6)).found(5)
    world.ledgers[5].unbond()
    with refuses("AlreadyRegistered"):
        proof = bls.prove_possession(SECRETS[5], world.chain, ACCOUNTS[5], PEERS[5])
        world.ledgers[5].register(PEERS[5], BLS_KEYS[5], proof, Wei(10))
    for _ in range(3):
        world.advance(PARAMS.rotation_s)
        world.any.rotate()
    world.advance(PARAMS.unbonding_s)
    world.ledgers[5].withdraw()
    assert world.join(5) == 5
    assert [m.active for m in world.any.get_roster().members if m.peer == PEERS[5]] == [False, True]


def test_a_leaver_stays_in_the_draw_whose_seed_it_knows_and_in_none_after(world: World) -> None:
    world.found(5)
    for account in (1, 2):
        world.ledgers[account].unbond()
    drawn: list[set[int]] = []
    for _ in range(3):
        world.advance(PARAMS.rotation_s)
        world.any.rotate()
        drawn.append(set(world.any.get_roster().committee))
    assert len(drawn[0]) == 4, "nobody steers a draw by leaving it"
    assert drawn[1] == drawn[2] == {2, 3, 4}


def test_a_leaver_can_be_slashed_until_it_has_withdrawn(world: World) -> None:
    world.found(5)
    cheat = world.submission(1)
    twin = world.submission(1, base=Digest(b"\x09" * 32))
    signer = world.any.get_roster().committee[0]
    world.ledgers[signer + 1].unbond()
    world.any.prove_equivocation(cheat, twin)
    for _ in range(3):
        world.advance(PARAMS.rotation_s)
        world.any.rotate()
    world.advance(PARAMS.unbonding_s)
    with refuses("NotLeaving"):
        world.ledgers[signer + 1].withdraw()


def test_a_federation_that_everybody_left_draws_an_empty_committee(world: World) -> None:
    world.found(3)
    signed = world.submission(0)
    for account in (1, 2, 3):
        world.ledgers[account].unbond()
    for _ in range(3):
        world.advance(PARAMS.rotation_s)
        world.any.rotate()
    assert world.any.get_roster().committee == ()
    with refuses("BadQuorum"):
        world.any.submit_round(msgspec.structs.replace(signed, epoch=4))
    world.advance(PARAMS.unbonding_s)
    assert [world.ledgers[account].withdraw() for account in (1, 2, 3)] == [10, 10, 10]


# --- what a bad root cannot do ----------------------------------------------------------------------------------------


def test_a_false_final_root_draws_no_more_than_all_rounds_allotted(world: World) -> None:
    """UMA's issue 3933: one bad root must not drain what is not its own: pool, stakes, other epochs' funds."""
    world.found(4, pool=5000 - 3500)
    world.settle(1, [1, 1, 0, 0])
    world.advance(WINDOW)
    assert world.any.claim(Round(1), index(0), world.leaves) == 500
    thief = (leaf(0, 0, 0), leaf(0, 0, 0), leaf(1500, 500, 1), leaf(0, 0, 0))
    world.cheat(3, thief)
    world.advance(WINDOW)  # nobody contested it
    with refuses("Drained"):
        world.any.claim(Round(3), index(2), thief)
    assert world.any.get_balance(world.chain.federation) == 40 + 500 + 500


def test_an_unknown_round_is_refused_as_such_whatever_else_is_wrong(world: World) -> None:
    world.found(4)
    with refuses("UnknownRound"):
        world.any.claim(Round(7), index(0), ())
    with refuses("UnknownRound"):
        world.any.prove_reward(Round(7), index(0), ())
    with refuses("UnknownRound"):
        world.any.prove_transition(Round(7), index(0), (), ())


def test_a_registry_that_has_grown_is_not_taken_back(world: World) -> None:
    world.found(4, pool=2000)
    world.settle(1, [1, 1, 1, 1])
    with refuses("BadLeaves"):
        world.cheat(2, world.leaves[:3])
    with refuses("BadLeaves"):
        world.cheat(2, (*world.leaves[:1], *(leaf(0, 0, 0),) * 4))


def test_everything_that_happens_is_told_in_order(world: World) -> None:
    world.found(2, pool=1950)
    world.ledgers[2].unbond()
    world.settle(0)
    number = world.any.demand_leaf(Round(0), index(1))
    world.any.show_leaf(number, world.leaves)
    other = world.submission(0, [], prev_root=Digest(b"x" * 32))
    world.settle(1, [3, 1])
    one = world.any.get_rounds(Round(0))[0]
    first = world.sign(
        msgspec.structs.replace(
            other, root=one.root, prev_root=one.prev_root, sums=one.sums, base=one.base, data_digest=one.data_digest
        )
    )
    world.advance(WINDOW)
    world.any.claim(Round(1), index(0), world.leaves)
    world.cheat(3, (leaf(1650, 900, 9), leaf(250, 0, 0)))
    unanswered = world.any.demand_leaf(Round(3), index(0))
    world.any.prove_equivocation(first, world.sign(msgspec.structs.replace(other, absent=(0,))))
    world.advance(RESPONSE)
    world.any.close_demand(unanswered)
    committee = world.any.get_committee(1)
    told = [entry.what for entry in world.any.get_entries()]
    kinds = [type(what) for what in told]
    assert kinds == [
        *(Joined, Joined, Funded, Rotated, Left, Accepted, Demanded, Shown, Accepted, Claimed, Accepted),
        *(Demanded, Slashed, Restarted, Contested, Closed, Slashed, Voided, Contested),
    ]
    assert told[3] == Rotated(1, committee)
    assert told[5] == Accepted(msgspec.structs.replace(one, is_final=False))
    assert told[7] == Shown(0, ACCOUNTS[SPONSOR], leaf(0, 0, 0))
    assert told[9] == Claimed(index(0), Round(1), Wei(750))
    assert told[12:] == [
        Slashed(index(1), Wei(10)),
        Restarted(1),
        Contested(Round(0), "equivocation", ACCOUNTS[SPONSOR], Wei(2)),
        Closed(unanswered),
        Slashed(index(0), Wei(10)),
        Voided(2, Round(3), 2),
        Contested(Round(3), "leaf", ACCOUNTS[SPONSOR], Wei(2)),
    ]
    times = [entry.time_s for entry in world.any.get_entries()]
    assert times == sorted(times)
    assert not any(isinstance(what, Withdrawn | Sums) for what in told)


def test_what_a_slashed_committee_had_signed_and_not_settled_is_dead(world: World) -> None:
    """Also for a lesser fault: else a certificate that can no longer be accepted would block every later one."""
    world.found(5)
    one = world.settle(0)
    pending = world.submission(1)
    twin = world.submission(0, base=Digest(b"\x09" * 32), prev_root=one.prev_root)
    keep = [seat for seat in world.any.get_roster().committee if seat not in one.absent][:3]
    world.any.prove_equivocation(one, world.sign(msgspec.structs.replace(twin, absent=tuple(sorted(keep)))))
    with refuses("BadNonce"):
        world.any.submit_round(pending)
    with refuses("BadEpoch"):
        world.any.submit_round(world.submission(1))
    world.any.rotate()
    world.settle(1)


# --- what a void leaves behind ----------------------------------------------------------------------------------------


def test_a_demand_is_not_answered_with_what_took_its_rounds_place(world: World) -> None:
    world.found(5, pool=2000)
    spared = world.any.get_roster().committee[0]
    world.cheat(1, (*OVERPAID, leaf(0, 0, 0)), absent=[spared])
    number = world.ledgers[6].demand_leaf(Round(1), index(3))
    world.any.prove_reward(Round(1), index(0), world.leaves)
    world.any.rotate()
    world.leaves = ()
    world.settle(1, [1, 1, 0, 0, 0])
    before = world.any.get_balance(ACCOUNTS[2])
    with refuses("UnknownRound"):
        world.ledgers[2].show_leaf(number, world.leaves)
    assert world.any.get_balance(ACCOUNTS[2]) == before
    world.advance(RESPONSE)
    world.ledgers[6].close_demand(number)  # a refund: the round that stands there now is not the one in question
    assert [settled.round for settled in world.any.get_rounds(Round(0))] == [1]
    assert world.any.get_balance(ACCOUNTS[6]) == TOKENS


def test_a_void_ends_the_hold_of_the_demands_it_settles(make_world: Callable[[FederationParams], World]) -> None:
    rules = msgspec.structs.replace(PARAMS, response_s=4 * WINDOW, unbonding_s=10 * WINDOW, restart_s=10 * WINDOW)
    world = make_world(rules).found(5, pool=1900)
    spared = world.any.get_roster().committee[0]
    world.cheat(1, (*OVERPAID, leaf(0, 0, 0)), absent=[spared])
    world.any.demand_leaf(Round(1), index(3))
    world.any.prove_reward(Round(1), index(0), world.leaves)
    world.any.rotate()
    world.leaves = ()
    world.settle(1, [1, 1, 0, 0, 0])
    world.advance(WINDOW)
    assert [settled.is_final for settled in world.any.get_rounds(Round(0))] == [True]
    assert world.any.claim(Round(1), index(0), world.leaves) == 500
    world.check_books()


def test_a_void_gives_the_federation_its_time_to_go_on(world: World) -> None:
    world.found(4)
    world.cheat(1, OVERPAID)
    world.advance(WINDOW - 60)
    world.any.prove_reward(Round(1), index(0), world.leaves)
    world.advance(PARAMS.restart_s - 100)
    with refuses("TooEarly"):
        world.any.restart()
    world.advance(100)
    world.any.restart()


def test_what_follows_a_held_round_is_held_with_it(world: World) -> None:
    world.found(4, pool=1900)
    world.settle(0)
    world.settle(1, [1, 1, 0, 0])
    world.settle(2)
    world.advance(WINDOW - 60)
    world.any.demand_leaf(Round(1), index(0))
    world.advance(60)
    assert [settled.is_final for settled in world.any.get_rounds(Round(0))] == [True, False, False]
    with refuses("NotFinal"):
        world.any.claim(Round(2), index(0), world.leaves)
    world.advance(2 * RESPONSE)
    assert world.any.claim(Round(2), index(0), world.leaves) == 500


def test_a_round_between_payouts_owes_nothing_for_its_contributions(world: World) -> None:
    world.found(4)
    world.cheat(0, (leaf(0, 0, 5), leaf(0, 0, 3), leaf(0, 0, -1), leaf(0, 0, 0)))
    for position in range(4):
        with refuses("NoFault"):
            world.any.prove_reward(Round(0), index(position), world.leaves)


def test_no_chain_of_demands_holds_a_round_longer_than_one_contest(world: World) -> None:
    world.found(4, pool=1900)
    world.settle(1, [1, 1, 0, 0])
    leaves = world.leaves
    world.advance(WINDOW - 60)
    world.any.demand_leaf(Round(1), index(0))
    world.settle(2)
    world.advance(RESPONSE)
    world.any.demand_leaf(Round(2), index(0))  # holds rounds 1 and 2 for two more response periods
    world.advance(RESPONSE + 90)
    assert [settled.is_final for settled in world.any.get_rounds(Round(1))] == [True, False]
    assert world.any.claim(Round(1), index(0), leaves) == 500


def test_a_void_takes_back_the_number_of_leaves_too(world: World) -> None:
    world.found(4, pool=2000)
    world.settle(1, [1, 1, 0, 0])
    before, spared = world.leaves, world.any.get_roster().committee[0]
    world.join(5)
    gift = (leaf(500, 0, 0), leaf(0, 0, 0), leaf(0, 0, 0), leaf(0, 0, 0), leaf(500, 0, 0))
    world.cheat(2, gift, absent=[spared])
    world.any.prove_transition(Round(2), index(4), before, gift)
    world.any.rotate()
    world.cheat(2, (leaf(500, 0, 0), leaf(500, 0, 0), leaf(0, 0, 0), leaf(0, 0, 0)))
    head = world.any.get_head()
    assert head is not None
    assert (head.round, head.num_leaves) == (2, 4)
