"""Acting on the chain: claim a reward, contest a round by proof or by demand, show a leaf. Knows a Ledger and a Fetch.

Whoever acts pays the gas; rewards always go to the member's own account, whoever claims.
"""

import msgspec

from nodes.rewards.reading import (
    FIRST,
    Book,
    Fetch,
    Reading,
    find_member,
    read_round,
    validate_reading,
)
from p2pfm.errors import OperatorError, Reverted, WorldError
from p2pfm.settlement.faults import Fault, FaultKind, find_faults
from p2pfm.settlement.ledger import Closed, Contested, Demand, Ledger, Slashed
from p2pfm.settlement.proofs import claim_owed
from p2pfm.settlement.rewards import from_wire
from p2pfm.types import MemberIndex, PeerId, Round, Wei

REFUSALS = {
    "NotFinal": "the round can still be contested; claim once it is final (p2pfm rewards show --by round says when)",
    "NotContestable": "its time is over: the round is final, or its window for demands has passed",
    "UnknownRound": "the chain does not hold this round any more: somebody has had it voided",
    "UnknownLeaf": "the round's tree has no leaf for that peer: it joined later",
    "UnknownDemand": "no open demand has this number: p2pfm rewards demands lists them",
    "TooEarly": "the signers still have time to show the leaf",
    "TooLate": "the deadline to show the leaf has passed: p2pfm rewards close-demand voids the round",
    "NoFault": "the chain finds nothing wrong with this leaf",
    "BadProof": "the leaves at hand are not those of the root on chain",
    "ERC20InsufficientBalance": "the account holds too few tokens for the bond; send it some",
    "ERC20InsufficientAllowance": "the account holds too few tokens for the bond; send it some",
    "Drained": "the roots on chain allot less than is claimed: contest them (p2pfm rewards verify)",
}
"""What the contract's custom errors mean to whoever ran the command, and what to do."""


class Contest(msgspec.Struct, frozen=True):
    """What was found in a round, and what became of it."""

    round: Round
    faults: tuple[Fault, ...]
    """Provable ones; empty: nothing was sent."""
    proven: Fault | None
    """The one whose proof the chain took."""
    num_slashed: int = 0
    slashed_wei: Wei = Wei(0)
    bounty_wei: Wei = Wei(0)
    """Paid to the caller."""


def explain_refusal(error: Reverted) -> str:
    """The contract's answer with the next step."""
    advice = REFUSALS.get(error.reason)
    return f"{error}: {advice}" if advice else str(error)


def claim_newest(ledger: Ledger, peer: PeerId, fetch: Fetch) -> Wei:
    """Draw all that the newest final round owes `peer`, for learning and for serving, into the peer's account whoever
    asks; 0 if nothing is owed.

    Raises:
        WorldError: no round is final yet, or nobody serves its data.
        Reverted: the contract refused.
    """
    members = [member for member in ledger.get_roster().members if member.peer == peer]
    final = [settled for settled in ledger.get_rounds(FIRST) if settled.is_final]
    if not members or not final:
        raise WorldError("nothing to claim yet: " + ("no round is final" if members else "this peer is not registered"))
    leaves = from_wire(validate_reading(read_round(final[-1], fetch)).leaves)
    # a peer that left and came back has two leaves
    return Wei(sum(sum(claim_owed(ledger, final[-1].round, member.index, leaves)) for member in members))


def search_round(book: Book, reading: Reading) -> tuple[Fault, ...]:
    """What is provably wrong with a round.

    Raises:
        WorldError: its data, or those of the round before, are not to be had; says how to force them.
        Reject: they are a lie; the same.
    """
    before = book.get_before(reading)
    validate_reading(reading)
    if before is not None:
        validate_reading(before)
    return find_faults(
        book.params,
        reading.settled,
        before.settled if before else None,
        before.leaves if before else (),
        reading.leaves,
    )


def contest_round(ledger: Ledger, book: Book, reading: Reading, *, is_dry: bool = False) -> Contest:
    """Search a round for provable faults, and send the proof of the cheapest one: that voids it and all after it.

    Args:
        is_dry: only search.

    Raises:
        OperatorError: the round is final.
        WorldError, Reject: as `search_round`.
        Reverted: somebody was faster, or the window closed.
    """
    round = reading.settled.round
    if reading.settled.is_final and not is_dry:
        raise OperatorError(f"round {round} is final: it can be contested no more (--dry-run searches it all the same)")
    faults = search_round(book, reading)
    if is_dry or not faults:
        return Contest(round, faults, None)
    # One leaf's proof is cheaper than two.
    fault = min(faults, key=lambda fault: (fault.kind != FaultKind.REWARD, fault.index))
    before = book.get_before(reading)
    num_entries = len(ledger.get_entries())
    match fault.kind:
        case FaultKind.REWARD:
            ledger.prove_reward(round, fault.index, reading.leaves)
        case FaultKind.TRANSITION:
            ledger.prove_transition(round, fault.index, before.leaves if before else (), reading.leaves)
    happened = [entry.what for entry in ledger.get_entries()[num_entries:]]
    slashed = [what for what in happened if isinstance(what, Slashed)]
    bounty = sum(what.bounty for what in happened if isinstance(what, Contested) and what.round == round)
    return Contest(round, faults, fault, len(slashed), Wei(sum(what.amount for what in slashed)), Wei(bounty))


def demand_leaf(ledger: Ledger, book: Book, round: Round, name: str) -> Demand:
    """Put up a bond to make the signers show a peer's leaf; returns the demand.

    Raises:
        OperatorError: unknown round or peer.
        Reverted: the window for demands has passed, or the account lacks the bond.
    """
    book.get_reading(round)
    member = find_member(book.roster, name)
    number = ledger.demand_leaf(round, member.index)
    return ledger.get_demands()[number]


def show_leaf(ledger: Ledger, fetch: Fetch, number: int) -> MemberIndex:
    """Answer a demand with the leaf from the data at hand, for the bond; returns whose leaf it is.

    Raises:
        OperatorError: no such open demand.
        WorldError, Reject: the round's data are not to be had, or are not of its root: nobody can show its leaves.
        Reverted: too late, or somebody was faster.
    """
    demand = get_open_demand(ledger, number)
    rounds = ledger.get_rounds(FIRST)
    if demand.position >= len(rounds):
        raise OperatorError(f"demand {number}: its round was voided; p2pfm rewards close-demand returns the bond")
    settled = rounds[demand.position]
    leaves = from_wire(validate_reading(read_round(settled, fetch)).leaves)
    ledger.show_leaf(number, leaves)
    return demand.index


def close_demand(ledger: Ledger, number: int) -> bool:
    """End a demand that nobody answered; the bond goes back. Returns whether its round was voided by it.

    Raises:
        OperatorError: no such open demand.
        Reverted: TooEarly.
    """
    get_open_demand(ledger, number)
    num_entries = len(ledger.get_entries())
    ledger.close_demand(number)
    happened = [entry.what for entry in ledger.get_entries()[num_entries:]]
    assert any(isinstance(what, Closed) for what in happened)
    return any(isinstance(what, Contested) and what.fault == "leaf" for what in happened)


def get_open_demand(ledger: Ledger, number: int) -> Demand:
    """The open demand of this number. Raises: OperatorError."""
    demands = ledger.get_demands()
    if not 0 <= number < len(demands):
        raise OperatorError(f"demand {number}: there are {len(demands)}; p2pfm rewards demands lists them")
    if not demands[number].is_open:
        raise OperatorError(f"demand {number} was answered or closed already")
    return demands[number]


def list_contestable(book: Book) -> tuple[Reading, ...]:
    """Rounds that can still be contested, oldest first: voiding one voids all after it."""
    return tuple(reading for reading in book.readings if not reading.settled.is_final)
