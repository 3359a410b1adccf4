"""What an attacker tries on the contract: by raw transactions, since an honest client would not send most of them.

Each attempt is a function: its name says what is tried, its decorator in which scene, and the error that refuses it. It
is sent as a dry run, which names the error, and as a transaction; after it nothing that the contract holds or owes has
changed. There is no attempt by a hostile token: the token is an immutable of the federation, and PFMToken calls nobody
back. A network that is deployed with another token trusts that token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from ledger_worlds import ACCOUNTS, BLS_KEYS, IMPLEMENTATIONS, PARAMS, PEERS, SECRETS, World, running_chain
from py_ecc.bls import G2ProofOfPossession
from py_ecc.bls.g2_primitives import pubkey_to_G1
from py_ecc.optimized_bls12_381 import add, field_modulus, neg, normalize
from raw_chain import (
    NO_RECORD,
    Deployed,
    key_outside_the_subgroup,
    padded,
    raw_certificate,
    raw_node,
    raw_proof,
    signature_outside_the_subgroup,
    words,
)

from p2pfm.config import ChainConfig
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import LeafValue, Submission, Sums
from p2pfm.settlement.rewards import submission_message
from p2pfm.types import Digest, MemberIndex, Round, Wei

RULES = msgspec.structs.replace(
    PARAMS, challenge_window_s=6000, response_s=2000, unbonding_s=15_000, restart_s=20_000, rotation_s=6000
)
"""Long: the tests themselves take time, and the chain's clock runs meanwhile."""
OUTSIDER = 6
"""An account with tokens, without a seat."""
HUGE = 2**128 - 1


@dataclass
class Scene:
    """A federation at a moment at which attempts are made; none of them changes it."""

    deployed: Deployed
    before: tuple[LeafValue, ...] = ()
    leaves: tuple[LeafValue, ...] = ()
    """Trees of the accepted rounds: the one before the newest, and the newest."""
    kept: tuple[Submission, ...] = ()
    """Certificates of earlier."""
    records: tuple[Any, ...] = ()
    """Records of earlier."""

    @property
    def world(self) -> World:
        return self.deployed.world

    @property
    def do(self) -> Any:
        return self.deployed.contract.functions

    def draft(self, round: int, **changes: Any) -> Submission:
        """A certificate of a round that pays nothing, on the head, signed by whom it should be, then false."""
        self.world.leaves = self.leaves
        return self.world.submission(round, **changes)

    def resign(self, submission: Submission, chain: ChainConfig, tag: bytes = bls.SIGNATURE_TAG) -> Submission:
        """The same statement, signed by all for another chain or under another tag."""
        message = submission_message(chain, submission)
        parts = [bls.BEST.sign(SECRETS[i + 1], message, tag) for i in self.world.any.get_roster().committee]
        return msgspec.structs.replace(submission, signature=bls.aggregate(parts))

    def sums(self, reward: int, extra: int = 0) -> Sums:
        """Of a round that allots `reward`; `extra`: what the sum is wrong by."""
        head = self.world.any.get_head()
        assert head is not None
        return Sums(Wei(head.sums.cumulative_wei + reward + extra), Wei(reward), 1)


Try = tuple[Any, int]
"""A function of the contract with its arguments, and the account that calls it."""


@dataclass(frozen=True)
class Attack:
    scene: str
    error: str
    attempt: Callable[[Scene], Try]


ATTACKS: list[Attack] = []
SCENES: dict[str, Callable[[Scene], None]] = {}


def attack(scene: str, error: str) -> Callable[[Callable[[Scene], Try]], Callable[[Scene], Try]]:
    """Put an attempt on the list; an empty error: the call passes and does nothing."""

    def listed(attempt: Callable[[Scene], Try]) -> Callable[[Scene], Try]:
        ATTACKS.append(Attack(scene, error, attempt))
        return attempt

    return listed


def scene(build: Callable[[Scene], None]) -> Callable[[Scene], None]:
    SCENES[build.__name__] = build
    return build


# --- scenes -----------------------------------------------------------------------------------------------------------


@scene
def open_rounds(scene: Scene) -> None:
    """Four members, a round that paid nothing and one that paid, both contestable; 500 wei are left in the pool."""
    world = scene.world.found(4, pool=1500)
    first = world.settle(0)
    scene.before = world.leaves
    second = world.settle(1, [5, -3, 9, 0])
    scene.leaves, scene.kept = world.leaves, (first, second)


@scene
def final_rounds(scene: Scene) -> None:
    """The same rounds, final; the newest is false, and nobody contested it; member 0 has drawn its reward."""
    world = scene.world.found(4, pool=1500)
    world.settle(0)
    scene.before = world.leaves
    overpaid = tuple(LeafValue(Wei(c), Wei(c), v) for c, v in ((900, 1), (100, 1), (0, 0), (0, 0)))
    world.cheat(1, overpaid)
    scene.leaves = overpaid
    world.advance(RULES.challenge_window_s)
    world.any.claim(Round(1), MemberIndex(0), overpaid)


@scene
def drained(scene: Scene) -> None:
    """A final round moved all that was allotted to member 2, after member 0 had drawn its part."""
    world = scene.world.found(4, pool=1500)
    world.settle(1, [1, 1, 0, 0])
    world.advance(RULES.challenge_window_s)
    world.any.claim(Round(1), MemberIndex(0), world.leaves)
    thief = tuple(LeafValue(Wei(c), Wei(0), 0) for c in (0, 0, 1000, 0))
    world.cheat(2, thief)
    scene.leaves = thief
    world.advance(RULES.challenge_window_s)


def demand_of_garbage(scene: Scene) -> None:
    world = scene.world.found(5, pool=1500)
    world.settle(0)
    scene.before = world.leaves
    garbage = world.submission(1, [1, 1, 0, 0, 0], root=Digest(b"\x07" * 32))
    world.any.submit_round(garbage)
    scene.leaves, scene.kept = world.leaves, (garbage,)
    world.any.demand_leaf(Round(1), MemberIndex(0))
    scene.records = (scene.deployed.record(0), scene.deployed.record(1))


@scene
def demanded(scene: Scene) -> None:
    """A leaf of a root without a tree was demanded."""
    demand_of_garbage(scene)


@scene
def overdue(scene: Scene) -> None:
    """Nobody has shown it in time."""
    demand_of_garbage(scene)
    scene.world.advance(RULES.response_s)


@scene
def voided(scene: Scene) -> None:
    """The demand was closed: the round is void, its committee slashed."""
    overdue(scene)
    scene.kept = (*scene.kept, scene.draft(3))
    scene.world.any.close_demand(0)


@scene
def restarted(scene: Scene) -> None:
    """A certificate was signed and not submitted before a restart."""
    scene.world.found(4)
    scene.kept = (scene.world.submission(0),)
    scene.world.advance(RULES.restart_s)
    scene.world.any.restart()


@scene
def rotated(scene: Scene) -> None:
    """A certificate is older than two rotations."""
    scene.world.found(4)
    scene.kept = (scene.world.submission(0),)
    for _ in range(2):
        scene.world.advance(RULES.rotation_s)
        scene.world.any.rotate()


@scene
def leaving(scene: Scene) -> None:
    """Account 4 is unbonding; the last committee that it may sit on is dead, its stake not yet free."""
    scene.world.found(5)
    scene.world.ledgers[4].unbond()
    for _ in range(3):
        scene.world.advance(RULES.rotation_s)
        scene.world.any.rotate()


@scene
def left(scene: Scene) -> None:
    """Account 4 has its stake back."""
    leaving(scene)
    scene.world.advance(RULES.unbonding_s)
    scene.world.ledgers[4].withdraw()


# --- joining ----------------------------------------------------------------------------------------------------------


def join(scene: Scene, key: list[int] | None = None, proof: bytes | list[int] | None = None, **changes: Any) -> Try:
    """Register the outsider with its own key, but for what is given."""
    peer = changes.get("peer", PEERS[OUTSIDER])
    if proof is None:
        proof = bls.prove_possession(SECRETS[OUTSIDER], scene.world.chain, ACCOUNTS[OUTSIDER], peer)
    point = words(bls.decompress_signature(proof)) if isinstance(proof, bytes) else proof
    own = words(bls.decompress_key(BLS_KEYS[OUTSIDER]))
    return scene.do.register(peer, key or own, point, changes.get("stake", 10)), changes.get("account", OUTSIDER)


def possession_for(scene: Scene, account: int = OUTSIDER, **changes: Any) -> bytes:
    chain = msgspec.structs.replace(scene.world.chain, **changes)
    return bls.prove_possession(SECRETS[OUTSIDER], chain, ACCOUNTS[account], PEERS[OUTSIDER])


@attack("open_rounds", "BadPossession")
def join_with_a_rogue_key(scene: Scene) -> Try:
    """mine - theirs: its holder could sign for both alone."""
    rogue = add(pubkey_to_G1(BLS_KEYS[OUTSIDER]), neg(pubkey_to_G1(BLS_KEYS[1])))
    return join(scene, key=words(padded([int(c) for c in normalize(rogue)])))


@attack("open_rounds", "BadPossession")
def join_with_a_proof_stolen_from_the_mempool(scene: Scene) -> Try:
    return join(scene, proof=possession_for(scene, account=7))


@attack("open_rounds", "BadPossession")
def join_with_a_proof_made_for_another_chain(scene: Scene) -> Try:
    return join(scene, proof=possession_for(scene, chain_id=1))


@attack("open_rounds", "BadPossession")
def join_with_a_proof_made_for_another_contract(scene: Scene) -> Try:
    return join(scene, proof=possession_for(scene, federation=scene.world.chain.token))


@attack("open_rounds", "BadPossession")
def join_with_a_proof_made_for_another_peer(scene: Scene) -> Try:
    return join(scene, proof=possession_for(scene), peer="12D3KooWsomebody")


@attack("open_rounds", "BadPossession")
def join_with_a_plain_proof_that_is_bound_to_nothing(scene: Scene) -> Try:
    return join(scene, proof=bytes(G2ProofOfPossession.PopProve(SECRETS[OUTSIDER])))


@attack("open_rounds", "BadPossession")
def join_with_a_proof_under_the_tag_of_rounds(scene: Scene) -> Try:
    message = bls.possession_message(scene.world.chain, ACCOUNTS[OUTSIDER], PEERS[OUTSIDER], BLS_KEYS[OUTSIDER])
    return join(scene, proof=bls.sign(SECRETS[OUTSIDER], message))


@attack("open_rounds", "BadPossession")
def join_with_the_key_at_infinity(scene: Scene) -> Try:
    return join(scene, key=[0] * 4)


@attack("open_rounds", "BadPossession")
def join_with_key_and_proof_at_infinity(scene: Scene) -> Try:
    return join(scene, key=[0] * 4, proof=[0] * 8)


@attack("open_rounds", "BadPossession")
def join_with_a_key_off_the_curve(scene: Scene) -> Try:
    own = words(bls.decompress_key(BLS_KEYS[OUTSIDER]))
    return join(scene, key=[*own[:3], own[3] ^ 1])


@attack("open_rounds", "BadPossession")
def join_with_a_key_outside_the_subgroup(scene: Scene) -> Try:
    return join(scene, key=key_outside_the_subgroup())


@attack("open_rounds", "BadPossession")
def join_with_a_second_encoding_of_a_taken_key(scene: Scene) -> Try:
    """Its x plus the modulus: other bytes, so not the key that is taken, were it accepted."""
    own = bls.decompress_key(BLS_KEYS[1])
    x = int.from_bytes(own[:64], "big") + int(field_modulus)
    return join(scene, key=words(x.to_bytes(64, "big") + own[64:]))


@attack("open_rounds", "BadPossession")
def join_with_a_proof_outside_the_subgroup(scene: Scene) -> Try:
    return join(scene, proof=signature_outside_the_subgroup())


@attack("open_rounds", "BadPossession")
def join_with_a_proof_off_the_curve(scene: Scene) -> Try:
    good = words(bls.decompress_signature(possession_for(scene)))
    return join(scene, proof=[*good[:7], good[7] ^ 1])


@attack("open_rounds", "KeyTaken")
def join_with_the_key_of_a_member(scene: Scene) -> Try:
    return join(scene, key=words(bls.decompress_key(BLS_KEYS[1])))


@attack("open_rounds", "PeerTaken")
def join_under_the_peer_id_of_a_member(scene: Scene) -> Try:
    return join(scene, peer=PEERS[1])


@attack("open_rounds", "AlreadyRegistered")
def join_twice_for_two_seats(scene: Scene) -> Try:
    return join(scene, account=1)


@attack("open_rounds", "StakeTooLow")
def join_with_dust(scene: Scene) -> Try:
    return join(scene, stake=RULES.min_stake - 1)


@attack("open_rounds", "ERC20InsufficientAllowance")
def join_without_paying_the_stake(scene: Scene) -> Try:
    return join(scene)


# --- settling ---------------------------------------------------------------------------------------------------------


def submit(scene: Scene, submission: Submission, *signature: list[int], absent: int = 0) -> Try:
    return scene.do.submitRound(raw_certificate(submission, absent, *signature)), OUTSIDER


@attack("open_rounds", "StaleRound")
def settle_a_round_twice(scene: Scene) -> Try:
    return submit(scene, scene.kept[1])


@attack("open_rounds", "StaleRound")
def settle_an_older_round_on_top(scene: Scene) -> Try:
    return submit(scene, scene.draft(0))


@attack("open_rounds", "BadSignature")
def settle_a_round_with_another_rounds_signature(scene: Scene) -> Try:
    return submit(scene, msgspec.structs.replace(scene.draft(2), signature=scene.kept[1].signature))


@attack("open_rounds", "BadSignature")
def settle_with_a_certificate_for_another_contract(scene: Scene) -> Try:
    other = msgspec.structs.replace(scene.world.chain, federation=scene.world.chain.token)
    return submit(scene, scene.resign(scene.draft(2), other))


@attack("open_rounds", "BadSignature")
def settle_with_a_certificate_for_another_chain(scene: Scene) -> Try:
    return submit(scene, scene.resign(scene.draft(2), msgspec.structs.replace(scene.world.chain, chain_id=1)))


@attack("open_rounds", "BadSignature")
def settle_with_signatures_under_the_tag_of_possession(scene: Scene) -> Try:
    return submit(scene, scene.resign(scene.draft(2), scene.world.chain, bls.POSSESSION_TAG))


@attack("open_rounds", "BadSignature")
def settle_with_another_base_than_was_signed(scene: Scene) -> Try:
    return submit(scene, msgspec.structs.replace(scene.draft(2), base=Digest(b"\x01" * 32)))


@attack("open_rounds", "BadSignature")
def settle_with_the_signature_at_infinity(scene: Scene) -> Try:
    return submit(scene, scene.draft(2), [0] * 8)


@attack("open_rounds", "BadSignature")
def settle_with_a_signature_outside_the_subgroup(scene: Scene) -> Try:
    return submit(scene, scene.draft(2), signature_outside_the_subgroup())


@attack("open_rounds", "BadSignature")
def settle_with_a_signature_off_the_curve(scene: Scene) -> Try:
    draft = scene.draft(2)
    good = words(bls.decompress_signature(draft.signature))
    return submit(scene, draft, [*good[:7], good[7] ^ 1])


@attack("open_rounds", "BadSignature")
def settle_with_one_signer_counted_twice(scene: Scene) -> Try:
    draft = scene.draft(2)
    return submit(scene, scene.world.sign(draft, signers=[0, 1, 2, 2]))


@attack("open_rounds", "BadSignature")
def settle_with_an_absent_member_counted_as_present(scene: Scene) -> Try:
    return submit(scene, scene.world.sign(scene.draft(2), signers=[0, 1, 2]))


@attack("open_rounds", "BadSignature")
def settle_with_a_stranger_in_an_absent_members_seat(scene: Scene) -> Try:
    return submit(scene, scene.world.sign(scene.draft(2), signers=[0, 1, 2, OUTSIDER - 1]))


@attack("open_rounds", "BadQuorum")
def settle_without_a_quorum(scene: Scene) -> Try:
    committee = scene.world.any.get_roster().committee
    draft = scene.world.sign(scene.draft(2), signers=[committee[0], committee[1]])
    return submit(scene, draft, absent=0b1100)


@attack("open_rounds", "BadQuorum")
def settle_with_nobody_and_the_signature_of_nobody(scene: Scene) -> Try:
    return submit(scene, scene.draft(2), [0] * 8, absent=0b1111)


@attack("open_rounds", "BadAbsent")
def settle_with_an_absent_bit_beyond_the_seats(scene: Scene) -> Try:
    return submit(scene, scene.draft(2), absent=1 << 4)


@attack("open_rounds", "BadAbsent")
def settle_with_more_absent_than_seats(scene: Scene) -> Try:
    return submit(scene, scene.draft(2), absent=2**256 - 1)


@attack("open_rounds", "BadNonce")
def settle_under_a_nonce_of_the_future(scene: Scene) -> Try:
    return submit(scene, scene.draft(2, nonce=1))


@attack("open_rounds", "BadEpoch")
def settle_by_a_committee_that_is_not_drawn(scene: Scene) -> Try:
    return submit(scene, scene.draft(2, epoch=2))


@attack("open_rounds", "BadEpoch")
def settle_by_the_empty_committee_of_epoch_0(scene: Scene) -> Try:
    return submit(scene, scene.draft(2, epoch=0))


@attack("open_rounds", "BadPrevRoot")
def settle_a_fork_of_the_line_of_roots(scene: Scene) -> Try:
    return submit(scene, scene.draft(2, prev_root=scene.kept[0].root))


@attack("open_rounds", "BadLeaves")
def settle_a_tree_that_forgets_a_member(scene: Scene) -> Try:
    return submit(scene, scene.draft(2, num_leaves=3))


@attack("open_rounds", "BadLeaves")
def settle_a_tree_with_members_that_do_not_exist(scene: Scene) -> Try:
    return submit(scene, scene.draft(2, num_leaves=5))


@attack("open_rounds", "OverBudget")
def settle_more_than_an_epochs_budget(scene: Scene) -> Try:
    return submit(scene, scene.draft(3, sums=scene.sums(RULES.pool_per_epoch + 1)))


@attack("open_rounds", "OverBudget")
def settle_more_than_the_pool_holds(scene: Scene) -> Try:
    return submit(scene, scene.draft(3, sums=scene.sums(scene.world.any.get_pool() + 1)))


@attack("open_rounds", "OverBudget")
def settle_a_reward_in_a_round_that_does_not_pay(scene: Scene) -> Try:
    return submit(scene, scene.draft(2, sums=scene.sums(1)))


@attack("open_rounds", "BadSums")
def settle_a_sum_that_grows_by_more_than_the_reward(scene: Scene) -> Try:
    return submit(scene, scene.draft(2, sums=scene.sums(0, extra=1)))


@attack("open_rounds", "BadSums")
def settle_a_reward_that_would_wrap_around(scene: Scene) -> Try:
    return submit(scene, scene.draft(3, sums=Sums(Wei(0), Wei(HUGE), 1)))


@attack("open_rounds", "TooEarly")
def rotate_again_for_a_kinder_draw(scene: Scene) -> Try:
    return scene.do.rotate(), OUTSIDER


@attack("open_rounds", "TooEarly")
def restart_while_rounds_go_on(scene: Scene) -> Try:
    return scene.do.restart(), OUTSIDER


@attack("restarted", "BadNonce")
def replay_a_certificate_across_a_restart(scene: Scene) -> Try:
    return submit(scene, scene.kept[0])


@attack("restarted", "BadSignature")
def replay_a_signature_across_a_restart_under_the_new_nonce(scene: Scene) -> Try:
    return submit(scene, msgspec.structs.replace(scene.kept[0], nonce=1))


@attack("rotated", "BadEpoch")
def settle_by_the_committee_before_the_last(scene: Scene) -> Try:
    return submit(scene, scene.kept[0])


@attack("rotated", "BadSignature")
def settle_an_old_committees_signature_as_the_new_ones(scene: Scene) -> Try:
    return submit(scene, msgspec.structs.replace(scene.kept[0], epoch=3))


# --- claiming ---------------------------------------------------------------------------------------------------------


def claim(scene: Scene, position: int = 1, index: int = 1, **changes: Any) -> Try:
    record = changes.get("record", scene.deployed.record(1))
    proof = changes.get("proof", raw_proof(scene.leaves, 1))
    return scene.do.claim(position, record, index, proof), changes.get("account", OUTSIDER)


def altered(record: Any, **fields: Any) -> Any:
    """A record with other values: by position in the statement ("f3"), or `absent`, or `accepted_at`."""
    statement = list(record[0])
    for name, value in fields.items():
        if name.startswith("f"):
            statement[int(name[1:])] = value
    return tuple(statement), fields.get("absent", record[1]), fields.get("accepted_at", record[2])


@attack("open_rounds", "NotFinal")
def claim_before_the_window_is_over(scene: Scene) -> Try:
    return claim(scene, index=2, proof=raw_proof(scene.leaves, 2))


@attack("open_rounds", "UnknownRound")
def claim_early_by_a_record_accepted_earlier(scene: Scene) -> Try:
    return claim(scene, record=altered(scene.deployed.record(1), accepted_at=1))


@attack("final_rounds", "")
def claim_twice(scene: Scene) -> Try:
    """Passes, since anybody may ask again, and pays nothing."""
    return claim(scene, index=0, proof=raw_proof(scene.leaves, 0), account=1)


@attack("final_rounds", "UnknownRound")
def claim_with_the_record_of_another_position(scene: Scene) -> Try:
    return claim(scene, position=0)


@attack("final_rounds", "UnknownRound")
def claim_with_an_altered_root(scene: Scene) -> Try:
    mine = tuple(LeafValue(Wei(1000 * (i == 1)), Wei(1000 * (i == 1)), i) for i in range(4))
    record = altered(scene.deployed.record(1), f4=merkle.compute_root(mine).digest)
    return claim(scene, record=record, proof=raw_proof(mine, 1))


@attack("final_rounds", "UnknownRound")
def claim_with_an_altered_number_of_leaves(scene: Scene) -> Try:
    return claim(scene, record=altered(scene.deployed.record(1), f5=2))


@attack("final_rounds", "UnknownRound")
def claim_from_a_position_that_holds_nothing(scene: Scene) -> Try:
    return claim(scene, position=2, record=NO_RECORD)


@attack("final_rounds", "BadProof")
def claim_the_leaf_of_another(scene: Scene) -> Try:
    return claim(scene, index=2)


@attack("final_rounds", "BadProof")
def claim_for_an_index_beyond_the_tree(scene: Scene) -> Try:
    """Index 5 has the path of index 1, but for the bit that nobody looks at."""
    return claim(scene, index=5)


@attack("final_rounds", "BadProof")
def claim_more_than_the_leaf_says(scene: Scene) -> Try:
    (_, *rest), siblings = raw_proof(scene.leaves, 1)
    return claim(scene, proof=((101, *rest), siblings))


@attack("final_rounds", "BadProof")
def claim_with_an_inner_node_posing_as_a_leaf(scene: Scene) -> Try:
    """The node above leaves 0 and 1, whose sums are both their rewards, with its own path."""
    levels = merkle.build(scene.leaves)
    sums = levels[1][0].sums
    return claim(
        scene,
        index=0,
        proof=((sums.cumulative_wei, sums.reward_wei, sums.contribution, 0), [raw_node(levels[1][1])]),
    )


@attack("final_rounds", "BadProof")
def claim_with_the_root_posing_as_a_leaf(scene: Scene) -> Try:
    sums = merkle.compute_root(scene.leaves).sums
    return claim(scene, index=0, proof=((sums.cumulative_wei, sums.reward_wei, sums.contribution, 0), []))


@attack("final_rounds", "BadProof")
def claim_with_a_proof_that_is_too_long(scene: Scene) -> Try:
    leaf, siblings = raw_proof(scene.leaves, 1)
    return claim(scene, proof=(leaf, [*siblings, (bytes(32), 0, 0, 0)]))


@attack("final_rounds", "BadProof")
def claim_with_a_proof_that_is_too_short(scene: Scene) -> Try:
    leaf, siblings = raw_proof(scene.leaves, 1)
    return claim(scene, proof=(leaf, siblings[:1]))


@attack("final_rounds", "BadProof")
def claim_with_sums_that_overflow_128_bits(scene: Scene) -> Try:
    leaf, siblings = raw_proof(scene.leaves, 1)
    digest = siblings[0][0]
    return claim(scene, proof=(leaf, [(digest, HUGE, HUGE, HUGE), siblings[1]]))


@attack("drained", "Drained")
def claim_what_others_have_drawn_by_a_false_final_root(scene: Scene) -> Try:
    return claim(scene, index=2, proof=raw_proof(scene.leaves, 2))


# --- contests ---------------------------------------------------------------------------------------------------------


@attack("open_rounds", "NoFault")
def frame_an_honest_reward(scene: Scene) -> Try:
    return scene.do.proveReward(scene.deployed.place(1), 0, raw_proof(scene.leaves, 0)), OUTSIDER


@attack("open_rounds", "NoFault")
def frame_the_reward_of_a_negative_contribution(scene: Scene) -> Try:
    return scene.do.proveReward(scene.deployed.place(1), 1, raw_proof(scene.leaves, 1)), OUTSIDER


@attack("open_rounds", "BadProof")
def frame_a_reward_with_a_leaf_of_ones_own(scene: Scene) -> Try:
    (cumulative, _, contribution, served), siblings = raw_proof(scene.leaves, 0)
    return scene.do.proveReward(scene.deployed.place(1), 0, ((cumulative, 0, contribution, served), siblings)), OUTSIDER


@attack("open_rounds", "UnknownRound")
def frame_a_paying_round_by_a_false_round_before_it(scene: Scene) -> Try:
    """Had round 1 been accepted before, this one would pay nothing, and every reward were a fault."""
    position, record, previous = scene.deployed.place(1)
    place = (position, record, altered(previous, f2=1))
    return scene.do.proveReward(place, 0, raw_proof(scene.leaves, 0)), OUTSIDER


@attack("open_rounds", "NoFault")
def frame_an_honest_transition(scene: Scene) -> Try:
    proofs = (raw_proof(scene.before, 2), raw_proof(scene.leaves, 2))
    return scene.do.proveTransition(scene.deployed.place(1), 2, *proofs), OUTSIDER


@attack("open_rounds", "UnknownRound")
def frame_a_transition_by_a_false_tree_before_it(scene: Scene) -> Try:
    false = tuple(LeafValue(Wei(7), Wei(0), 0) for _ in range(4))
    tree = merkle.compute_root(false)
    position, record, previous = scene.deployed.place(1)
    place = (position, record, altered(previous, f4=tree.digest, f6=28))
    proofs = (raw_proof(false, 2), raw_proof(scene.leaves, 2))
    return scene.do.proveTransition(place, 2, *proofs), OUTSIDER


@attack("open_rounds", "BadProof")
def frame_a_transition_by_another_members_leaf_before(scene: Scene) -> Try:
    proofs = (raw_proof(scene.leaves, 0), raw_proof(scene.leaves, 2))
    return scene.do.proveTransition(scene.deployed.place(1), 2, *proofs), OUTSIDER


def accuse(scene: Scene, first: Any, second: Any) -> Try:
    return scene.do.proveEquivocation(first, second), OUTSIDER


@attack("open_rounds", "NoFault")
def frame_signers_of_the_same_statement_twice(scene: Scene) -> Try:
    same = scene.world.sign(scene.kept[1], signers=[0, 1, 2])
    seat = scene.world.any.get_roster().committee.index(MemberIndex(3))
    return accuse(scene, raw_certificate(scene.kept[1]), raw_certificate(same, absent=1 << seat))


@attack("open_rounds", "NoFault")
def frame_signers_of_two_different_rounds(scene: Scene) -> Try:
    return accuse(scene, raw_certificate(scene.kept[0]), raw_certificate(scene.kept[1]))


@attack("open_rounds", "BadSignature")
def frame_signers_with_a_forged_second_statement(scene: Scene) -> Try:
    forged = msgspec.structs.replace(scene.kept[1], base=Digest(b"\x01" * 32))
    return accuse(scene, raw_certificate(scene.kept[1]), raw_certificate(forged))


@attack("open_rounds", "BadSignature")
def frame_all_by_the_signature_of_nobody(scene: Scene) -> Try:
    """All absent: the key that remains is infinity, of which infinity would be the signature."""
    forged = msgspec.structs.replace(scene.kept[1], base=Digest(b"\x01" * 32))
    return accuse(scene, raw_certificate(scene.kept[1]), raw_certificate(forged, 0b1111, [0] * 8))


@attack("open_rounds", "BadSignature")
def frame_honest_members_by_ones_own_double_signature(scene: Scene) -> Try:
    own = scene.world.sign(msgspec.structs.replace(scene.kept[1], base=Digest(b"\x01" * 32)), signers=[3])
    return accuse(scene, raw_certificate(scene.kept[1]), raw_certificate(own))


@attack("open_rounds", "BadAbsent")
def accuse_with_bits_beyond_the_seats(scene: Scene) -> Try:
    other = scene.world.sign(msgspec.structs.replace(scene.kept[1], base=Digest(b"\x01" * 32)))
    return accuse(scene, raw_certificate(scene.kept[1]), raw_certificate(other, 1 << 200))


@attack("open_rounds", "UnknownLeaf")
def demand_a_leaf_that_the_tree_has_not(scene: Scene) -> Try:
    return scene.do.demandLeaf(1, scene.deployed.record(1), 4), OUTSIDER


@attack("open_rounds", "UnknownRound")
def demand_a_leaf_of_an_altered_record(scene: Scene) -> Try:
    return scene.do.demandLeaf(1, altered(scene.deployed.record(1), f5=9), 8), OUTSIDER


@attack("open_rounds", "ERC20InsufficientAllowance")
def demand_a_leaf_without_a_bond(scene: Scene) -> Try:
    return scene.do.demandLeaf(1, scene.deployed.record(1), 0), OUTSIDER


@attack("final_rounds", "NotContestable")
def prove_a_reward_wrong_after_it_is_final(scene: Scene) -> Try:
    return scene.do.proveReward(scene.deployed.place(1), 0, raw_proof(scene.leaves, 0)), OUTSIDER


@attack("final_rounds", "NotContestable")
def prove_a_transition_wrong_after_it_is_final(scene: Scene) -> Try:
    proofs = (raw_proof(scene.before, 0), raw_proof(scene.leaves, 0))
    return scene.do.proveTransition(scene.deployed.place(1), 0, *proofs), OUTSIDER


@attack("final_rounds", "NotContestable")
def demand_a_leaf_after_the_window(scene: Scene) -> Try:
    return scene.do.demandLeaf(1, scene.deployed.record(1), 0), OUTSIDER


@attack("demanded", "BadProof")
def show_a_leaf_of_no_tree(scene: Scene) -> Try:
    return scene.do.showLeaf(0, scene.records[1], raw_proof(scene.leaves, 0)), OUTSIDER


@attack("demanded", "BadProof")
def show_another_leaf_than_was_demanded(scene: Scene) -> Try:
    return scene.do.showLeaf(0, scene.records[1], raw_proof(scene.leaves, 1)), OUTSIDER


@attack("demanded", "UnknownRound")
def show_the_leaf_of_another_round(scene: Scene) -> Try:
    return scene.do.showLeaf(0, scene.records[0], raw_proof(scene.before, 0)), OUTSIDER


@attack("demanded", "UnknownDemand")
def show_a_leaf_that_nobody_demanded(scene: Scene) -> Try:
    return scene.do.showLeaf(1, scene.records[1], raw_proof(scene.leaves, 0)), OUTSIDER


@attack("demanded", "TooEarly")
def close_a_demand_before_its_deadline(scene: Scene) -> Try:
    return scene.do.closeDemand(0, scene.deployed.place(1)), OUTSIDER


@attack("demanded", "NotFinal")
def claim_from_a_round_on_demand(scene: Scene) -> Try:
    return claim(scene, record=scene.records[1])


@attack("overdue", "TooLate")
def show_a_leaf_after_the_deadline(scene: Scene) -> Try:
    return scene.do.showLeaf(0, scene.records[1], raw_proof(scene.leaves, 0)), OUTSIDER


@attack("overdue", "UnknownRound")
def close_a_demand_with_another_rounds_place(scene: Scene) -> Try:
    """It would void an honest round."""
    return scene.do.closeDemand(0, scene.deployed.place(0)), OUTSIDER


@attack("overdue", "UnknownRound")
def close_a_demand_with_an_altered_record(scene: Scene) -> Try:
    """Nobody absent, when one was: it would slash more members than signed."""
    position, record, previous = scene.deployed.place(1)
    return scene.do.closeDemand(0, (position, altered(record, absent=1), previous)), OUTSIDER


@attack("overdue", "UnknownRound")
def void_back_to_a_false_previous_record(scene: Scene) -> Try:
    """Its root and sums would become the head: money from nowhere."""
    position, record, previous = scene.deployed.place(1)
    return scene.do.closeDemand(0, (position, record, altered(previous, f4=b"\x01" * 32, f6=500))), OUTSIDER


@attack("overdue", "UnknownRound")
def void_back_to_nothing(scene: Scene) -> Try:
    return scene.do.closeDemand(0, (1, scene.records[1], NO_RECORD)), OUTSIDER


@attack("voided", "UnknownDemand")
def close_a_demand_twice_for_two_bounties(scene: Scene) -> Try:
    return scene.do.closeDemand(0, (1, *reversed(scene.records))), OUTSIDER


@attack("voided", "UnknownRound")
def contest_a_voided_round_again(scene: Scene) -> Try:
    place = (1, scene.records[1], scene.records[0])
    return scene.do.proveReward(place, 0, raw_proof(scene.leaves, 0)), OUTSIDER


@attack("voided", "UnknownRound")
def claim_from_a_voided_round(scene: Scene) -> Try:
    return claim(scene, record=scene.records[1])


@attack("voided", "UnknownRound")
def demand_a_leaf_of_a_voided_round(scene: Scene) -> Try:
    return scene.do.demandLeaf(1, scene.records[1], 0), OUTSIDER


@attack("voided", "BadNonce")
def replay_a_voided_round(scene: Scene) -> Try:
    return submit(scene, scene.kept[0])


@attack("voided", "BadNonce")
def settle_what_a_slashed_committee_had_signed_before(scene: Scene) -> Try:
    return submit(scene, scene.kept[1])


@attack("voided", "BadEpoch")
def settle_by_a_slashed_committee(scene: Scene) -> Try:
    scene.world.leaves = scene.before
    return submit(scene, scene.world.submission(2))


@attack("voided", "NotActive")
def unbond_after_a_slash(scene: Scene) -> Try:
    return scene.do.unbond(), slashed_account(scene)


@attack("voided", "NotLeaving")
def withdraw_after_a_slash(scene: Scene) -> Try:
    return scene.do.withdraw(), slashed_account(scene)


@attack("voided", "RegistryFull")
def join_a_full_registry_after_a_slash(scene: Scene) -> Try:
    return join(scene)


def slashed_account(scene: Scene) -> int:
    return next(int(member.index) + 1 for member in scene.world.any.get_roster().members if not member.stake)


# --- leaving ----------------------------------------------------------------------------------------------------------


@attack("open_rounds", "UnknownMember")
def unbond_as_a_stranger(scene: Scene) -> Try:
    return scene.do.unbond(), OUTSIDER


@attack("open_rounds", "UnknownMember")
def withdraw_as_a_stranger(scene: Scene) -> Try:
    return scene.do.withdraw(), OUTSIDER


@attack("open_rounds", "NotLeaving")
def withdraw_without_leaving(scene: Scene) -> Try:
    return scene.do.withdraw(), 1


@attack("leaving", "NotActive")
def leave_twice_for_an_earlier_end(scene: Scene) -> Try:
    return scene.do.unbond(), 4


@attack("leaving", "StillLiable")
def withdraw_before_the_unbonding_is_over(scene: Scene) -> Try:
    return scene.do.withdraw(), 4


@attack("left", "UnknownMember")
def withdraw_twice(scene: Scene) -> Try:
    return scene.do.withdraw(), 4


# --- the test ---------------------------------------------------------------------------------------------------------


class Stage:
    """A chain for each scene, since time is a chain's: built when the first attempt in it is made."""

    def __init__(self, implementation: str) -> None:
        self._implementation = implementation
        self._chains = ExitStack()
        self._scenes: dict[str, Scene] = {}

    def get(self, name: str) -> Scene:
        if name not in self._scenes:
            url = self._chains.enter_context(running_chain(self._implementation))
            scene = Scene(Deployed(url, RULES))
            SCENES[name](scene)
            self._scenes[name] = scene
        return self._scenes[name]

    def close(self) -> None:
        self._chains.close()


@pytest.fixture(scope="module", params=IMPLEMENTATIONS[1:])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    stage = Stage(request.param)
    yield stage
    stage.close()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.attempt.__name__)
def test_an_attack_is_refused_and_changes_nothing(stage: Stage, attack: Attack) -> None:
    scene = stage.get(attack.scene)
    call, account = attack.attempt(scene)
    before = scene.deployed.snapshot()
    assert scene.deployed.revert_of(call, account) == attack.error
    assert scene.deployed.send(call, account) == (attack.error == "")
    assert scene.deployed.snapshot() == before


def test_the_list_is_as_long_as_it_claims() -> None:
    assert len({attack.attempt.__name__ for attack in ATTACKS}) == len(ATTACKS) >= 30
    assert {attack.scene for attack in ATTACKS} == set(SCENES)
