"""What every implementation of the Ledger does alike: proofs made of leaves, demands by number, rounds held already.

Knows no chain and no storage.
"""

from collections.abc import Sequence

import msgspec

from p2pfm.errors import Reverted
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import Demand, LeafValue, Ledger, SettledRound, Submission
from p2pfm.types import MemberIndex, Round, Wei


class Proof(msgspec.Struct, frozen=True):
    """A leaf and the siblings from it up to the root."""

    leaf: LeafValue
    siblings: tuple[merkle.Node, ...]


def make_proof(leaves: tuple[LeafValue, ...], index: MemberIndex) -> Proof:
    """The leaf at `index` of the tree with these leaves, with its siblings.

    Raises:
        Reverted: BadProof, as the contract would say: there is no such leaf, or the leaves make no tree.
    """
    try:
        return Proof(leaves[index], merkle.prove(merkle.build(leaves), index))
    except (IndexError, ValueError) as error:
        raise Reverted("BadProof", f"the tree has no leaf {index}") from error


def get_demand(ledger: Ledger, number: int) -> Demand:
    """The demand with this number. Raises: Reverted (UnknownDemand)."""
    demands = ledger.get_demands()
    if not 0 <= number < len(demands):
        raise Reverted("UnknownDemand")
    return demands[number]


def is_settled(rounds: Sequence[SettledRound], submission: Submission) -> bool:
    """Whether the first of `rounds` is this submission's round with the same root, data and base."""
    if not rounds or rounds[0].round != submission.round:
        return False
    held = rounds[0]
    return (held.root, held.data_digest, held.base) == (submission.root, submission.data_digest, submission.base)


def claim_owed(ledger: Ledger, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> tuple[Wei, Wei]:
    """Draw what a final round's leaf owes a member: what was paid for learning, and for serving [wei].

    Nothing is sent where nothing is owed: a newcomer has no leaf in rounds before it joined. Raises: Reverted.
    """
    if index >= len(leaves):
        return Wei(0), Wei(0)
    leaf, learned, served = leaves[index], Wei(0), Wei(0)
    if leaf.cumulative_wei > ledger.get_claimed(index):
        learned = ledger.claim(round, index, leaves)
    if leaf.served_wei > ledger.get_claimed_served(index):
        served = ledger.claim_served(round, index, leaves)
    return learned, served
