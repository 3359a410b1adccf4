"""What peers serve beside the chain about a round, and whether it may be believed. Knows no socket and no page."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from nodes.rewards.checking import is_accusation, verify_by_any
from nodes.rewards.reading import Fetch, read_round
from p2pfm.config import NetworkConfig
from p2pfm.messages import IncludedUpdate, Proposal
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import Roster, SettledRound

State = Literal["verified", "matched", "wrong", "missing"]
"""verified: medians, weights, leaves and root recompute from the revealed vectors. matched: the leaves are those of the
root on chain, but the round before is not at hand, so that nothing can be recomputed. wrong: what the committee signed
is not what the rules give; see the findings. missing: nobody serves it, or what its shards certified (perhaps of a word
that was not merged)."""

FINDINGS_MAX = 20
"""So many are shown; a proposal has thousands of places to be wrong in."""


class Evidence(msgspec.Struct, frozen=True):
    """What is known of a round beside the chain."""

    state: State
    proposal: Proposal | None = None
    """None: nobody serves it, or its leaves are not those of the root on chain."""
    findings: tuple[str, ...] = ()
    updates: tuple[IncludedUpdate, ...] = ()
    """The peers', as far as they are known."""


MISSING = Evidence("missing")


def judge(
    settled: SettledRound,
    fetch: Fetch,
    rosters: Sequence[Roster],
    previous: Proposal | None,
    network: NetworkConfig,
) -> Evidence:
    """What is served by whomever under the round's data hash is worth.

    Args:
        rosters: as the registry may have been when the round was signed (`nodes.rewards.reading.list_rosters`); one by
            which all recomputes is enough.
        previous: the believed proposal of the settled round before; None: not at hand, or there is none.
    """
    reading = read_round(settled, fetch)
    if reading.is_lie:
        return Evidence("wrong", findings=(reading.problem,))
    if reading.proposal is None:
        return MISSING
    if reading.flaw:
        return Evidence("wrong", reading.proposal, (f"shards: {reading.flaw}",), reading.updates)
    if reading.gap:
        return Evidence("missing", reading.proposal, updates=reading.updates)
    if previous is None and settled.prev_root != merkle.EMPTY_ROOT:
        return Evidence("matched", reading.proposal, updates=reading.updates)
    findings = verify_by_any(reading, rosters, previous, network)
    state: State = "wrong" if is_accusation(findings) else "missing" if findings else "verified"
    return Evidence(state, reading.proposal, tuple(findings[:FINDINGS_MAX]), reading.updates)
