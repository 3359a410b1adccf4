"""What peers serve beside the chain about a round, and whether it may be believed. Knows no socket and no page."""

from typing import Literal

import msgspec

from nodes.rewards import PROPOSAL_BYTES_MAX, verify_round
from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject
from p2pfm.messages import Proposal, decode_message
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import Roster, SettledRound
from p2pfm.settlement.rewards import from_wire
from p2pfm.types import compute_digest

State = Literal["verified", "matched", "wrong", "missing"]
"""verified: medians, weights, leaves and root recompute from the revealed vectors. matched: the leaves are those of the
root on chain, but the round before is not at hand, so that nothing can be recomputed. wrong: see the findings."""

FINDINGS_MAX = 20
"""So many are shown; a proposal has thousands of places to be wrong in."""


class Evidence(msgspec.Struct, frozen=True):
    """What is known of a round beside the chain."""

    state: State
    proposal: Proposal | None = None
    """None: nobody serves it, or its leaves are not those of the root on chain."""
    findings: tuple[str, ...] = ()


MISSING = Evidence("missing")


def judge(
    settled: SettledRound, data: bytes | None, roster: Roster, previous: Proposal | None, network: NetworkConfig
) -> Evidence:
    """What `data`, served by whomever under the round's data hash, is worth.

    Args:
        previous: the believed proposal of the settled round before; None: not at hand, or there is none.
    """
    if data is None:
        return MISSING
    try:
        proposal = _open(settled, data)
    except Reject as error:
        return Evidence("wrong", findings=(str(error),))
    if previous is None and settled.prev_root != merkle.EMPTY_ROOT:
        return Evidence("matched", proposal)
    try:
        findings = tuple(verify_round(settled, data, roster, previous, network)[:FINDINGS_MAX])
    except (ValueError, LookupError) as error:  # what a committee signed may be any nonsense that has the right root
        findings = (f"it cannot be recomputed: {error}",)
    return Evidence("wrong" if findings else "verified", proposal, findings)


def _open(settled: SettledRound, data: bytes) -> Proposal:
    if compute_digest(data) != settled.data_digest:
        raise Reject(
            f"expected data with SHA-256 {settled.data_digest.hex()}, a node gave {compute_digest(data).hex()}"
        )
    proposal = decode_message(data, PROPOSAL_BYTES_MAX)
    if not isinstance(proposal, Proposal):
        raise Reject(f"expected a proposal under the data hash, got a {type(proposal).__name__}")
    try:
        tree = merkle.compute_root(from_wire(proposal.leaves))
    except ValueError as error:
        raise Reject(f"the leaves make no tree: {error}") from error
    if (tree.digest, tree.sums, len(proposal.leaves)) != (settled.root, settled.sums, settled.num_leaves):
        raise Reject(f"the leaves' root is {tree.digest.hex()}, the chain holds {settled.root.hex()}")
    return proposal
