"""Claiming and contesting from the command line's side: what is provably wrong is proven, the rest is told plainly."""

import msgspec
import pytest
from ledger_worlds import ACCOUNTS, PARAMS, PEERS
from rewards_world import MEASURED, POOL_WEI, Settled, add_served, move_cumulative, move_reward

from nodes.rewards.contests import (
    claim_newest,
    close_demand,
    contest_round,
    demand_leaf,
    explain_refusal,
    list_contestable,
    show_leaf,
)
from nodes.rewards.reading import read_book
from p2pfm.errors import OperatorError, Reject, Reverted, WorldError
from p2pfm.messages import encode
from p2pfm.settlement.faults import FaultKind
from p2pfm.types import Digest, MemberIndex, Round, Wei

AUDITOR = 6
"""An account that is no member."""


@pytest.fixture
def settled() -> Settled:
    return Settled()


def test_a_stranger_claims_and_the_member_is_paid(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    settled.finish()
    stranger, ledger = settled.world.ledgers[AUDITOR], settled.world.any
    before = [ledger.get_balance(account) for account in ACCOUNTS]
    paid = claim_newest(stranger, PEERS[1], settled.blobs.get)
    assert paid == POOL_WEI * 100 // 280
    after = [ledger.get_balance(account) for account in ACCOUNTS]
    assert [new - old for new, old in zip(after, before, strict=True)] == [0, paid, *[0] * (len(ACCOUNTS) - 2)]
    assert claim_newest(stranger, PEERS[1], settled.blobs.get) == 0


def test_a_claim_draws_what_is_owed_for_serving_too(settled: Settled) -> None:
    settled.world.any.fund_serving(Wei(100))
    settled.settle(0)
    settled.settle(1, lambda proposal: add_served(proposal, 60, target=1))
    settled.finish()
    ledger = settled.world.any
    paid = [claim_newest(ledger, PEERS[index + 1], settled.blobs.get) for index in (0, 1)]
    assert paid == [POOL_WEI * 100 // 280, 60]
    assert ledger.get_claimed_served(MemberIndex(1)) == 60
    assert claim_newest(ledger, PEERS[2], settled.blobs.get) == 0


@pytest.mark.parametrize("member", [1, 3])
def test_who_never_contributed_claims_nothing_and_it_is_no_error(settled: Settled, member: int) -> None:
    for round in range(4):
        settled.settle(round)
    settled.finish()
    assert claim_newest(settled.world.any, PEERS[member + 1], settled.blobs.get) == 0


def test_an_honest_round_is_not_contested(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    book = settled.book()
    for reading in list_contestable(book):
        contest = contest_round(settled.world.ledgers[AUDITOR], book, reading)
        assert (contest.faults, contest.proven) == ((), None)
    assert len(settled.world.any.get_rounds(Round(0))) == 2


@pytest.mark.parametrize(("move", "kind"), [(move_reward, FaultKind.REWARD), (move_cumulative, FaultKind.TRANSITION)])
def test_a_colluders_round_is_voided_and_its_signers_pay_the_bounty(settled: Settled, move, kind: FaultKind) -> None:
    settled.settle(1)
    settled.settle(3, lambda proposal: move(proposal, 9, source=2, target=3))
    settled.settle(4)  # goes down with the round that it follows
    auditor, book = settled.world.ledgers[AUDITOR], settled.book()
    before = auditor.get_balance(ACCOUNTS[AUDITOR])
    dry = contest_round(auditor, book, book.get_reading(Round(3)), is_dry=True)
    assert {(fault.kind, fault.index) for fault in dry.faults} == {(kind, 2), (kind, 3)}
    assert len(auditor.get_rounds(Round(0))) == 3
    contest = contest_round(auditor, book, book.get_reading(Round(3)))
    assert contest.proven in dry.faults
    assert (contest.num_slashed, contest.slashed_wei) == (4, 4 * 10)
    assert contest.bounty_wei == auditor.get_balance(ACCOUNTS[AUDITOR]) - before == 4 * 10 // 4
    assert [round.round for round in auditor.get_rounds(Round(0))] == [1]
    settled.world.check_books()


def test_a_final_round_can_only_be_searched(settled: Settled) -> None:
    settled.settle(1, lambda proposal: move_reward(proposal, 9, source=2, target=3))
    settled.finish()
    book = settled.book()
    with pytest.raises(OperatorError, match="round 1 is final"):
        contest_round(settled.world.any, book, book.get_reading(Round(1)))
    assert len(contest_round(settled.world.any, book, book.get_reading(Round(1)), is_dry=True).faults) == 2
    assert list_contestable(book) == ()


def test_an_unknown_round_is_named_with_those_that_there_are(settled: Settled) -> None:
    with pytest.raises(OperatorError, match="round 3: no round is on chain yet"):
        settled.book().get_reading(Round(3))
    settled.settle(0)
    settled.settle(2)
    with pytest.raises(OperatorError, match="round 1 is not on chain; 2 rounds from 0 to 2 are"):
        settled.book().get_reading(Round(1))


def test_missing_data_say_how_to_force_them_and_the_demand_does(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    data = settled.lose(1)
    signer, auditor, book = settled.world.ledgers[1], settled.world.ledgers[AUDITOR], settled.book()
    with pytest.raises(WorldError, match="p2pfm rewards challenge --round 1 --demand PEER"):
        contest_round(auditor, book, book.get_reading(Round(1)))
    with pytest.raises(WorldError, match="nobody serves its data"):
        show_leaf(auditor, settled.blobs.get, demand_leaf(auditor, book, Round(1), "2").number)
    # A signer has the data, and shows the leaf: the bond is its own.
    before = signer.get_balance(ACCOUNTS[1])
    assert show_leaf(signer, lambda digest: data, 0) == 2
    assert signer.get_balance(ACCOUNTS[1]) - before == PARAMS.leaf_bond
    with pytest.raises(OperatorError, match="demand 0 was answered or closed already"):
        show_leaf(signer, lambda digest: data, 0)
    assert len(auditor.get_rounds(Round(0))) == 2


def test_a_demand_that_nobody_answers_voids_the_round_and_returns_the_bond(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    settled.lose(1)
    auditor, book = settled.world.ledgers[AUDITOR], settled.book()
    before = auditor.get_balance(ACCOUNTS[AUDITOR])
    demand = demand_leaf(auditor, book, Round(1), PEERS[3])
    assert (demand.number, demand.index) == (0, 2)
    assert auditor.get_balance(ACCOUNTS[AUDITOR]) == before - PARAMS.leaf_bond
    with pytest.raises(Reverted) as refusal:
        close_demand(auditor, 0)
    assert "the signers still have time" in explain_refusal(refusal.value)
    settled.world.advance(PARAMS.response_s)
    with pytest.raises(Reverted) as refusal:
        show_leaf(auditor, lambda digest: settled.blobs.get(digest) or _anything(settled), 0)
    assert "p2pfm rewards close-demand" in explain_refusal(refusal.value)
    assert close_demand(auditor, 0)
    assert auditor.get_balance(ACCOUNTS[AUDITOR]) == before + 4 * 10 // 4  # the bond, and the bounty
    assert [round.round for round in auditor.get_rounds(Round(0))] == [0]
    with pytest.raises(OperatorError, match="answered or closed"):
        close_demand(auditor, 0)


def _anything(settled: Settled) -> bytes:
    """The lost data: whoever kept them can prove the leaf, but too late."""
    assert settled.previous is not None
    return encode(settled.previous)


def test_a_root_that_is_of_no_leaves_is_a_lie_that_only_a_demand_can_contest(settled: Settled) -> None:
    settled.settle(0, lambda proposal: msgspec.structs.replace(proposal, root=Digest(b"r" * 32)))
    auditor, book = settled.world.ledgers[AUDITOR], settled.book()
    with pytest.raises(Reject, match=r"their root is .* --demand PEER"):
        contest_round(auditor, book, book.get_reading(Round(0)))
    demand_leaf(auditor, book, Round(0), "0")
    settled.world.advance(PARAMS.response_s)
    assert close_demand(auditor, 0)
    assert auditor.get_rounds(Round(0)) == ()


def test_a_demand_of_a_voided_round_gives_the_bond_back_and_voids_nothing(settled: Settled) -> None:
    settled.settle(1)
    settled.settle(3, lambda proposal: move_reward(proposal, 9, source=2, target=3))
    auditor, book = settled.world.ledgers[AUDITOR], settled.book()
    demand_leaf(auditor, book, Round(3), "0")
    contest_round(auditor, book, book.get_reading(Round(3)))
    with pytest.raises(OperatorError, match="its round was voided"):
        show_leaf(auditor, settled.blobs.get, 0)
    assert not close_demand(auditor, 0)
    assert [round.round for round in auditor.get_rounds(Round(0))] == [1]
    settled.world.check_books()


def test_a_lying_blob_is_as_good_as_none(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    lies = {digest: data + b"!" for digest, data in settled.blobs.items()}
    book = read_book(settled.world.any, lies.get)
    assert all("what was given has SHA-256" in reading.problem for reading in book.readings)
    with pytest.raises(WorldError, match="nobody serves its data"):
        contest_round(settled.world.any, book, book.get_reading(Round(1)))
    settled.finish()
    with pytest.raises(WorldError, match="nobody serves its data"):
        claim_newest(settled.world.any, PEERS[1], lies.get)


def test_refusals_of_the_contract_name_the_next_step(settled: Settled) -> None:
    settled.settle(0)
    book = settled.book()
    with pytest.raises(Reverted) as refusal:
        settled.world.any.claim(Round(0), book.roster.members[0].index, book.readings[0].leaves)
    assert "claim once it is final" in explain_refusal(refusal.value)
    poor = settled.world.ledgers[AUDITOR]
    poor.fund(Wei(poor.get_balance(ACCOUNTS[AUDITOR])))
    with pytest.raises(Reverted) as refusal:
        demand_leaf(poor, book, Round(0), "0")
    assert "too few tokens for the bond" in explain_refusal(refusal.value)
    settled.world.advance(PARAMS.challenge_window_s)
    with pytest.raises(Reverted) as refusal:
        demand_leaf(settled.world.any, book, Round(0), "0")
    assert "its time is over" in explain_refusal(refusal.value)
    assert explain_refusal(Reverted("Somewhat")) == "the contract refused: Somewhat"
    assert len(MEASURED) == 3
