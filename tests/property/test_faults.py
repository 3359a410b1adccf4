"""What the search for faults finds is exactly what the chain takes a proof of."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfm.config import ChainConfig
from p2pfm.errors import Reverted
from p2pfm.settlement import merkle
from p2pfm.settlement.faults import Fault, FaultKind, find_faults
from p2pfm.settlement.ledger import FederationParams, LeafValue, SettledRound, Submission
from p2pfm.settlement.memory_ledger import InMemoryLedger
from p2pfm.settlement.proofs import make_proof
from p2pfm.settlement.rewards import compute_leaves, submission_message
from p2pfm.types import Digest, MemberIndex, PeerId, Round, Wei
from sim.signatures import Signatures

PARAMS = FederationParams(
    committee_size=3,
    min_stake=Wei(10),
    challenge_window_s=600,
    pool_per_epoch=Wei(1000),
    rounds_per_epoch=2,
    response_s=200,
    unbonding_s=1500,
    restart_s=5000,
)


def accept(leaves: tuple[LeafValue, ...], round: int, position: int) -> SettledRound:
    """A settled round with the root of these leaves, whatever they say."""
    tree = merkle.compute_root(leaves)
    return SettledRound(
        round=Round(round),
        epoch=1,
        nonce=0,
        prev_root=merkle.EMPTY_ROOT,
        root=tree.digest,
        num_leaves=len(leaves),
        sums=tree.sums,
        data_digest=Digest(bytes(32)),
        base=Digest(bytes(32)),
        absent=(),
        position=position,
        accepted_s=0,
        is_final=False,
    )


class Case(NamedTuple):
    """Two rounds of an honest federation, and what they are judged by."""

    params: FederationParams
    before: SettledRound | None
    leaves_before: tuple[LeafValue, ...]
    round: int
    leaves: tuple[LeafValue, ...]

    def find(self, leaves: tuple[LeafValue, ...]) -> tuple[Fault, ...]:
        """Faults of a second round that has these leaves."""
        position = 0 if self.before is None else 1
        return find_faults(self.params, accept(leaves, self.round, position), self.before, self.leaves_before, leaves)


measured = st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=9)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """An honest pair of rounds, or an honest first round: any epoch length, pool, gap and growth of the registry."""
    epoch = draw(st.integers(1, 5))
    params = msgspec.structs.replace(PARAMS, pool_per_epoch=Wei(draw(st.integers(0, 10**21))), rounds_per_epoch=epoch)
    later = draw(measured)
    if draw(st.booleans()):
        first = draw(st.integers(0, 12))
        early = draw(st.lists(st.integers(-(10**9), 10**9), max_size=len(later)))
        leaves_before = compute_leaves(
            (),
            {MemberIndex(index): value for index, value in enumerate(early)},
            len(early),
            params.pool_per_epoch,
            is_payout=(first + 1) // epoch > 0,
            is_epoch_start=False,
        )
        before = accept(leaves_before, first, 0)
        round = first + draw(st.integers(1, 7))
        is_payout = (round + 1) // epoch > (first + 1) // epoch
    else:
        leaves_before, before = (), None
        round = draw(st.integers(0, 12))
        is_payout = (round + 1) // epoch > 0
    leaves = compute_leaves(
        leaves_before,
        {MemberIndex(index): value for index, value in enumerate(later)},
        len(later),
        params.pool_per_epoch,
        is_payout=is_payout,
        is_epoch_start=merkle.compute_root(leaves_before).sums.reward_wei > 0,
    )
    return Case(params, before, leaves_before, round, leaves)


@given(cases())
def test_an_honest_round_has_no_fault(case: Case) -> None:
    assert case.find(case.leaves) == ()


@given(cases(), st.data(), st.integers(1, 10**12))
def test_a_changed_cumulative_sum_is_that_leafs_transition(case: Case, data: st.DataObject, extra: int) -> None:
    index = data.draw(st.integers(0, len(case.leaves) - 1))
    right = case.leaves[index]
    greedy = msgspec.structs.replace(right, cumulative_wei=Wei(right.cumulative_wei + extra))
    found = case.find((*case.leaves[:index], greedy, *case.leaves[index + 1 :]))
    expected = Fault(FaultKind.TRANSITION, MemberIndex(index), right.cumulative_wei, greedy.cumulative_wei)
    assert found == (expected,)


@given(cases(), st.data(), st.integers(1, 10**12))
def test_a_consistent_overpayment_is_that_leafs_reward(case: Case, data: st.DataObject, extra: int) -> None:
    index = data.draw(st.integers(0, len(case.leaves) - 1))
    right = case.leaves[index]
    greedy = LeafValue(Wei(right.cumulative_wei + extra), Wei(right.reward_wei + extra), right.contribution)
    found = case.find((*case.leaves[:index], greedy, *case.leaves[index + 1 :]))
    assert found == (Fault(FaultKind.REWARD, MemberIndex(index), right.reward_wei, greedy.reward_wei),)


@given(cases(), st.data())
def test_a_reward_not_booked_is_a_transition_and_a_reward_withheld_is_a_reward(case: Case, data: st.DataObject) -> None:
    paid = [index for index, leaf in enumerate(case.leaves) if leaf.reward_wei]
    if not paid:
        return
    index = data.draw(st.sampled_from(paid))
    right = case.leaves[index]
    unbooked = msgspec.structs.replace(right, cumulative_wei=Wei(right.cumulative_wei - right.reward_wei))
    withheld = msgspec.structs.replace(unbooked, reward_wei=Wei(0))
    for wrong, kind in ((unbooked, FaultKind.TRANSITION), (withheld, FaultKind.REWARD)):
        found = case.find((*case.leaves[:index], wrong, *case.leaves[index + 1 :]))
        assert [(fault.kind, fault.index) for fault in found] == [(kind, index)]


@given(cases())
def test_leaves_that_are_not_of_the_root_are_refused(case: Case) -> None:
    settled = accept(case.leaves, case.round, 0 if case.before is None else 1)
    other = (*case.leaves[:-1], msgspec.structs.replace(case.leaves[-1], contribution=2**61))
    for leaves in (other, case.leaves[:-1]):
        with pytest.raises(ValueError, match="not those of its root"):
            find_faults(case.params, settled, case.before, case.leaves_before, leaves)
    if case.before is None:
        with pytest.raises(ValueError, match="before the first round"):
            find_faults(case.params, settled, None, case.leaves, case.leaves)


def test_a_pool_paid_twice_in_one_epoch_is_a_fault_of_every_paid_leaf() -> None:
    """Rounds 1 and 2 of epochs of two: round 1 ended the epoch, round 2 may pay nothing."""
    params = msgspec.structs.replace(PARAMS, pool_per_epoch=Wei(100), rounds_per_epoch=2)
    first = (LeafValue(Wei(75), Wei(75), 3), LeafValue(Wei(25), Wei(25), 1), LeafValue(Wei(0), Wei(0), -5))
    second = (LeafValue(Wei(150), Wei(75), 3), LeafValue(Wei(50), Wei(25), 1), LeafValue(Wei(0), Wei(0), -5))
    faults = find_faults(params, accept(second, 2, 1), accept(first, 1, 0), first, second)
    assert [(fault.kind, fault.index, fault.expected_wei) for fault in faults] == [
        (FaultKind.REWARD, 0, 0),
        (FaultKind.REWARD, 1, 0),
    ]


CHAIN = ChainConfig(1, "0x" + "f0" * 20, "0x" + "70" * 20)
SIGNATURES = Signatures(bytes(32))
NAMES = [PeerId(f"peer-{index}") for index in range(3)]


def found_ledger() -> InMemoryLedger:
    """Three members, all of them the committee, and a pool for two epochs."""
    ledger = InMemoryLedger(CHAIN, PARAMS, SIGNATURES, lambda: 1_000, {"sponsor": Wei(2000)} | dict.fromkeys(NAMES, 10))
    for name in NAMES:
        proof = SIGNATURES.prove_possession(CHAIN, name, name)
        ledger.register(name, name, SIGNATURES.bls_key(name), proof, Wei(10))
    ledger.fund("sponsor", Wei(2000))
    ledger.rotate()
    return ledger


def submit(ledger: InMemoryLedger, round: int, leaves: tuple[LeafValue, ...]) -> None:
    """All members sign a round with these leaves."""
    head, tree = ledger.get_head(), merkle.compute_root(leaves)
    unsigned = Submission(
        round=Round(round),
        epoch=1,
        nonce=0,
        prev_root=head.root if head else merkle.EMPTY_ROOT,
        root=tree.digest,
        num_leaves=len(leaves),
        sums=tree.sums,
        data_digest=Digest(bytes(32)),
        base=Digest(bytes(32)),
        absent=(),
        signature=b"",
    )
    message = submission_message(CHAIN, unsigned)
    signature = SIGNATURES.aggregate([SIGNATURES.sign(SIGNATURES.bls_key(name), message) for name in NAMES])
    ledger.submit_round(msgspec.structs.replace(unsigned, signature=signature))


def is_refused(prove: Callable[[], None]) -> bool:
    """Whether the chain says that there is no such fault."""
    try:
        prove()
    except Reverted as error:
        if error.reason != "NoFault":
            raise
        return True
    return False


def pay(before: tuple[LeafValue, ...], values: list[int]) -> tuple[LeafValue, ...]:
    """The leaves of a round that pays an epoch of one measured round."""
    measured = {MemberIndex(index): value for index, value in enumerate(values)}
    return compute_leaves(before, measured, 3, PARAMS.pool_per_epoch, is_payout=True, is_epoch_start=True)


shares = st.lists(st.integers(-20, 100), min_size=3, max_size=3)


@given(shares, shares, st.integers(0, 400), st.integers(0, 400), st.integers(0, 2), st.integers(0, 2))
def test_the_chain_takes_a_proof_of_every_fault_found_and_of_nothing_else(
    early: list[int], late: list[int], reward_moved: int, cumulative_moved: int, source: int, target: int
) -> None:
    """A committee moves money between members' leaves; what it may not move, the root's sums, stands already."""
    first = pay((), early)
    right = pay(first, late)
    wrong = list(right)
    reward = min(reward_moved, wrong[source].reward_wei)
    cumulative = min(cumulative_moved, wrong[source].cumulative_wei)
    for index, sign in ((source, -1), (target, 1)):
        leaf = wrong[index]
        wrong[index] = LeafValue(
            Wei(leaf.cumulative_wei + sign * cumulative), Wei(leaf.reward_wei + sign * reward), leaf.contribution
        )
    leaves = tuple(wrong)
    ledger = found_ledger()
    submit(ledger, 1, first)
    submit(ledger, 3, leaves)
    before, settled = ledger.get_rounds(Round(0))
    found = {(fault.kind, fault.index) for fault in find_faults(PARAMS, settled, before, first, leaves)}
    for index in map(MemberIndex, range(3)):
        for kind in FaultKind:
            trial = found_ledger()
            submit(trial, 1, first)
            submit(trial, 3, leaves)
            proof, earlier = make_proof(leaves, index), make_proof(first, index)
            prove = {
                FaultKind.REWARD: partial(trial.prove_reward, "auditor", Round(3), index, proof),
                FaultKind.TRANSITION: partial(trial.prove_transition, "auditor", Round(3), index, earlier, proof),
            }[kind]
            assert is_refused(prove) == ((kind, index) not in found)
            assert len(trial.get_rounds(Round(0))) == (1 if (kind, index) in found else 2)
