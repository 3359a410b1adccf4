"""One suite, every ledger: the executable specification and the contract accept, refuse and pay the same."""

from collections.abc import Callable

import msgspec
from ledger_worlds import (
    ACCOUNTS,
    BLS_KEYS,
    PARAMS,
    PEERS,
    SECRETS,
    SPONSOR,
    TOKENS,
    World,
    refuses,
)

from p2pfm.config import ChainConfig
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import FederationParams, Submission, Sums
from p2pfm.types import Digest, MemberIndex, PeerId, Round, Wei


def test_members_stand_in_the_order_of_joining(world: World) -> None:
    assert [world.join(3, 30), world.join(1, 10)] == [0, 1]
    roster = world.any.get_roster()
    assert [(m.index, m.account, m.peer, m.bls_key, m.stake, m.active) for m in roster.members] == [
        (0, ACCOUNTS[3], PEERS[3], BLS_KEYS[3], 30, True),
        (1, ACCOUNTS[1], PEERS[1], BLS_KEYS[1], 10, True),
    ]
    assert (roster.epoch, roster.nonce, roster.committee) == (0, 0, ())
    assert world.any.get_balance(ACCOUNTS[3]) == TOKENS - 30
    assert world.join(3, 30) == 0, "joining again with the same keys changes nothing"
    assert world.any.get_balance(ACCOUNTS[3]) == TOKENS - 30


def test_joining_refuses_what_is_taken_or_too_little(world: World) -> None:
    def join(account: int, peer: PeerId, secret: int, stake: int = 10) -> None:
        proof = bls.prove_possession(SECRETS[secret], world.chain, ACCOUNTS[account], peer)
        world.ledgers[account].register(peer, BLS_KEYS[secret], proof, Wei(stake))

    world.join(1)
    with refuses("AlreadyRegistered"):
        join(1, PEERS[2], 2)
    with refuses("PeerTaken"):
        join(2, PEERS[1], 2)
    with refuses("KeyTaken"):
        join(2, PEERS[2], 1)
    with refuses("StakeTooLow"):
        join(2, PEERS[2], 2, stake=9)
    with refuses("BadPeer"):
        join(2, PeerId(""), 2)
    with refuses("BadPeer"):
        join(2, PeerId("p" * 129), 2)
    with refuses("ERC20InsufficientBalance"):
        join(2, PEERS[2], 2, stake=TOKENS + 1)
    for member in range(2, 6):
        world.join(member)
    with refuses("RegistryFull"):
        world.join(6)


def test_joining_refuses_a_stolen_or_foreign_proof_of_possession(world: World) -> None:
    stolen = bls.prove_possession(SECRETS[1], world.chain, ACCOUNTS[1], PEERS[1])
    elsewhere = ChainConfig(world.chain.chain_id, world.chain.token, world.chain.token)
    foreign = bls.prove_possession(SECRETS[1], elsewhere, ACCOUNTS[2], PEERS[1])
    signature = bls.sign(SECRETS[1], bls.possession_message(world.chain, ACCOUNTS[2], PEERS[1], BLS_KEYS[1]))
    infinity = bytes([0xC0]) + bytes(95)
    for proof in (stolen, foreign, signature, infinity, bytes(96)):
        with refuses("BadPossession"):
            world.ledgers[2].register(PEERS[1], BLS_KEYS[1], proof, Wei(10))
    assert world.any.get_roster().members == ()


def test_a_small_registry_is_its_own_committee(world: World) -> None:
    with refuses("NoMembers"):
        world.any.rotate()
    world.found(3)
    roster = world.any.get_roster()
    assert roster.epoch == 1
    assert sorted(roster.committee) == [0, 1, 2]
    with refuses("TooEarly"):
        world.any.rotate()
    world.join(4)
    assert sorted(world.any.get_roster().committee) == [0, 1, 2], "who joins waits for the next draw"
    world.advance(PARAMS.rotation_s)
    world.any.rotate()
    assert sorted(world.any.get_roster().committee) == [0, 1, 2, 3]


def test_a_large_registry_draws_a_committee_of_those_who_had_joined_when_the_seed_was_fixed(world: World) -> None:
    world.found(4)
    world.join(5, 1000)
    world.advance(PARAMS.rotation_s)
    world.any.rotate()
    assert sorted(world.any.get_roster().committee) == [0, 1, 2, 3], "the newcomer knew this draw's seed"
    world.advance(PARAMS.rotation_s)
    world.any.rotate()
    committee = world.any.get_roster().committee
    assert len(set(committee)) == 4
    assert set(committee) <= {0, 1, 2, 3, 4}


def test_rounds_settle_with_all_signing_and_with_one_absent(world: World) -> None:
    world.found(4)
    first = world.submission(0)
    world.ledgers[SPONSOR].submit_round(first)
    second = world.submission(3, [5, -3, 9, 0], absent=[2])
    world.ledgers[1].submit_round(second)
    world.ledgers[2].submit_round(second)  # somebody was faster: no error
    rounds = world.any.get_rounds(Round(0))
    assert [(r.round, r.root, r.prev_root, r.sums, r.data_digest, r.base, r.is_final) for r in rounds] == [
        (0, first.root, merkle.EMPTY_ROOT, first.sums, first.data_digest, first.base, False),
        (3, second.root, first.root, second.sums, second.data_digest, second.base, False),
    ]
    assert world.any.get_head() == rounds[-1]
    assert world.any.get_rounds(Round(1)) == rounds[1:]
    assert world.any.get_pool() == 1500 - second.sums.reward_wei == 1500 - 999


def test_a_round_is_refused_unless_it_follows(world: World) -> None:
    world.found(4)
    with refuses("BadPrevRoot"):
        world.any.submit_round(world.submission(1, prev_root=Digest(b"x" * 32)))
    with refuses("BadNonce"):
        world.any.submit_round(world.submission(1, nonce=1))
    for epoch in (0, 2):
        with refuses("BadEpoch"):
            world.any.submit_round(world.submission(1, epoch=epoch))
    world.any.submit_round(world.submission(1))
    for round in (0, 1):
        with refuses("StaleRound"):
            world.any.submit_round(world.submission(round, [1, 1, 1, 1]))
    with refuses("BadPrevRoot"):
        world.any.submit_round(world.submission(2, prev_root=merkle.EMPTY_ROOT))


def test_a_round_never_allots_more_than_its_epoch_and_the_pool_hold(world: World) -> None:
    world.found(4, pool=1500)  # rounds 1, 3, 5, ... end epochs and pay at most 1000

    def offer(round: int, cumulative: int, reward: int) -> Submission:
        return world.submission(round, sums=Sums(Wei(cumulative), Wei(reward), 7))

    with refuses("BadSums"):
        world.any.submit_round(offer(1, 11, 10))
    with refuses("OverBudget"):  # in the middle of an epoch nothing is paid
        world.any.submit_round(offer(0, 1, 1))
    for round in (1, 9):  # however many epochs have passed unpaid
        with refuses("OverBudget"):
            world.any.submit_round(offer(round, 1001, 1001))
    world.any.submit_round(offer(1, 1000, 1000))
    with refuses("OverBudget"):  # the first epoch was paid
        world.any.submit_round(offer(2, 1001, 1))
    with refuses("BadSums"):  # a cumulative sum never falls
        world.any.submit_round(offer(2, 900, 0))
    with refuses("OverBudget"):  # the pool holds 500
        world.any.submit_round(offer(4, 1501, 501))  # round 3 was void: 4 pays in its place
    world.any.submit_round(offer(4, 1500, 500))
    assert world.any.get_pool() == 0
    with refuses("OverBudget"):
        world.any.submit_round(offer(5, 1501, 1))
    world.any.fund(Wei(10))
    world.any.submit_round(offer(5, 1510, 10))


def test_a_round_needs_the_signatures_of_more_than_two_thirds(world: World) -> None:
    world.found(4)
    with refuses("BadQuorum"):
        world.any.submit_round(world.submission(0, absent=[1, 2]))
    for absent in ([2, 2], [4], [3, 1]):
        with refuses("BadAbsent"):
            world.any.submit_round(world.sign(world.submission(0, absent=absent), signers=[0, 1, 2]))
    signed = world.submission(0, absent=[1])
    forgeries = (
        world.sign(signed, signers=[0, 2]),  # one more is missing than is admitted
        world.sign(signed, signers=[0, 1, 2]),  # the absent one instead of another
        msgspec.structs.replace(signed, base=Digest(b"z" * 32)),
        msgspec.structs.replace(signed, data_digest=Digest(b"z" * 32)),
        msgspec.structs.replace(signed, root=Digest(b"z" * 32)),
        msgspec.structs.replace(signed, round=Round(5)),
        msgspec.structs.replace(signed, sums=Sums(Wei(0), Wei(0), 1)),
        msgspec.structs.replace(signed, signature=bytes([0xC0]) + bytes(95)),
        msgspec.structs.replace(signed, signature=bytes(96)),
    )
    for forgery in forgeries:
        with refuses("BadSignature"):
            world.any.submit_round(forgery)
    world.any.submit_round(signed)


def test_a_certificate_outlives_one_rotation_and_not_two(world: World) -> None:
    world.found(4)
    early, late = world.submission(0), world.submission(1)
    for _ in range(2):
        world.advance(PARAMS.rotation_s)
        world.any.rotate()
        if world.any.get_head() is None:
            world.any.submit_round(early)
            late = world.sign(msgspec.structs.replace(late, prev_root=early.root))
    with refuses("BadEpoch"):
        world.any.submit_round(late)


def test_a_claim_waits_for_the_window_and_pays_the_member_once(world: World) -> None:
    world.found(4)
    world.any.submit_round(world.submission(1, [5, -3, 9, 0]))
    leaves = world.leaves
    with refuses("NotFinal"):
        world.ledgers[1].claim(Round(1), MemberIndex(0), leaves)
    with refuses("UnknownRound"):
        world.ledgers[1].claim(Round(0), MemberIndex(0), leaves)
    world.advance(PARAMS.challenge_window_s)
    stranger = world.ledgers[SPONSOR]
    before = world.any.get_balance(ACCOUNTS[SPONSOR])
    assert stranger.claim(Round(1), MemberIndex(0), leaves) == 357
    assert stranger.claim(Round(1), MemberIndex(0), leaves) == 0
    assert stranger.claim(Round(1), MemberIndex(1), leaves) == 0, "a negative contribution earns nothing"
    assert stranger.claim(Round(1), MemberIndex(2), leaves) == 642
    assert world.any.get_balance(ACCOUNTS[SPONSOR]) == before, "whoever calls, the member is paid"
    assert [world.any.get_balance(ACCOUNTS[i]) for i in (1, 2, 3)] == [
        TOKENS - 10 + 357,
        TOKENS - 10,
        TOKENS - 10 + 642,
    ]
    assert [world.any.get_claimed(MemberIndex(i)) for i in range(4)] == [357, 0, 642, 0]
    head = world.any.get_head()
    assert head is not None
    assert head.is_final


def test_a_claim_refuses_leaves_that_are_not_of_the_root(world: World) -> None:
    world.found(4)
    world.any.submit_round(world.submission(1, [5, -3, 9, 0]))
    leaves = world.leaves
    world.advance(PARAMS.challenge_window_s)
    greedy = (msgspec.structs.replace(leaves[0], cumulative_wei=Wei(999)), *leaves[1:])
    swapped = (leaves[2], leaves[1], leaves[0], leaves[3])
    for wrong in (greedy, swapped, leaves[:3], leaves[:1]):
        with refuses("BadProof"):
            world.any.claim(Round(1), MemberIndex(0), wrong)
    with refuses("BadProof"):
        world.any.claim(Round(1), MemberIndex(7), leaves)
    assert world.any.get_claimed(MemberIndex(0)) == 0


def test_claims_are_cumulative_against_any_final_round(world: World) -> None:
    world.found(4, pool=2000)
    world.any.submit_round(world.submission(1, [1, 1, 0, 0]))
    first = world.leaves
    world.advance(PARAMS.challenge_window_s)
    assert world.any.claim(Round(1), MemberIndex(0), first) == 500
    world.any.submit_round(world.submission(3, [3, 0, 1, 0]))
    second = world.leaves
    world.advance(PARAMS.challenge_window_s)
    assert world.any.claim(Round(3), MemberIndex(0), second) == 750
    assert world.any.claim(Round(3), MemberIndex(1), second) == 500
    assert world.any.claim(Round(1), MemberIndex(0), first) == 0, "an older root owes nothing more"
    assert world.any.get_pool() == 0


def test_a_root_whose_leaves_pay_more_than_it_announces_pays_nobody(world: World) -> None:
    world.found(4)
    world.any.submit_round(world.submission(1, [1, 1, 0, 0], sums=Sums(Wei(10), Wei(10), 2)))
    world.advance(PARAMS.challenge_window_s)
    for index in (0, 1):
        with refuses("BadProof"):
            world.any.claim(Round(1), MemberIndex(index), world.leaves)


def test_a_restart_kills_outstanding_signatures_and_keeps_what_is_final(world: World) -> None:
    world.found(4)
    with refuses("TooEarly"):
        world.any.restart()
    outstanding = world.submission(0)
    world.advance(PARAMS.restart_s)
    world.any.restart()
    assert world.any.get_roster().nonce == 1
    with refuses("BadNonce"):
        world.any.submit_round(outstanding)
    world.any.submit_round(world.submission(1, [1, 1, 1, 1]))
    with refuses("TooEarly"):
        world.any.restart()
    world.advance(PARAMS.restart_s)
    world.any.restart()
    head = world.any.get_head()
    assert head is not None
    assert head.is_final, "a restart comes after any contest could have ended"
    assert world.any.get_pool() == 500


def test_a_restart_waits_from_the_newest_round_on(world: World) -> None:
    world.found(4)
    world.advance(PARAMS.restart_s - 500)
    world.settle(0)
    world.advance(1000)
    with refuses("TooEarly"):
        world.any.restart()
    world.advance(PARAMS.restart_s)
    world.any.restart()


def test_rules_that_cannot_work_together_are_refused(make_world: Callable[[FederationParams], World]) -> None:
    for changes in (
        {"committee_size": 0},
        {"committee_size": 257, "members_max": 300},
        {"members_max": 3},
        {"min_stake": Wei(0)},
        {"rounds_per_epoch": 0},
        {"response_s": 0},
        {"leaf_bond": Wei(0)},
        {"restart_s": PARAMS.contest_s - 1},
        {"unbonding_s": PARAMS.contest_s - 1},
        {"challenge_window_s": 2**63, "restart_s": 2**64 - 1, "unbonding_s": 2**64 - 1},
        {"committee_size": 64, "members_max": 1002},  # a rotation would not fit into a transaction
    ):
        with refuses("BadParameter"):
            make_world(msgspec.structs.replace(PARAMS, **changes))
    assert make_world(PARAMS).any.get_params() == PARAMS


def test_sponsors_fill_the_pool_with_what_they_have(world: World) -> None:
    world.ledgers[1].fund(Wei(300))
    world.ledgers[2].fund(Wei(200))
    assert world.any.get_pool() == 500
    assert world.any.get_balance(ACCOUNTS[1]) == TOKENS - 300
    with refuses("ERC20InsufficientBalance"):
        world.ledgers[1].fund(Wei(TOKENS))
