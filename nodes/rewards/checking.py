"""Whether settled rounds follow the rules: everything that follows from the revealed vectors, recomputed.

What a member revealed may be wrong all the same: `measuring` measures it again. Knows no model.
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from nodes.rewards.reading import Book, Fetch, compare_root, decode_proposal, list_rosters, read_book
from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject
from p2pfm.messages import Announcement, IncludedUpdate, Proposal
from p2pfm.protocol.committee import draft_proposal
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue, Ledger, Roster, SettledRound
from p2pfm.settlement.rewards import from_wire
from p2pfm.settlement.sampling import compute_quorum
from p2pfm.types import WEIGHT_ONE, Digest, MemberIndex, Round, compute_digest


def verify_rewards(ledger: Ledger, fetch: Fetch, network: NetworkConfig) -> dict[Round, list[str]]:
    """Findings by settled round; an empty list: everything recomputes to what the chain holds. Raises: ChainError."""
    book = read_book(ledger, fetch)
    committees = {epoch: ledger.get_committee(epoch) for epoch in {r.settled.epoch for r in book.readings}}
    return {
        reading.settled.round: verify_reading(book, position, network, committees[reading.settled.epoch])
        for position, reading in enumerate(book.readings)
    }


def verify_reading(book: Book, position: int, network: NetworkConfig, committee: Sequence[MemberIndex]) -> list[str]:
    """What is wrong with the round at a position; `committee`: that of its epoch."""
    reading = book.readings[position]
    if reading.proposal is None:
        return [f"{reading.problem}: it cannot be checked"]
    before = book.get_before(reading)
    previous = before.proposal if before else None
    findings: list[str] = []
    for roster in list_rosters(book, position):
        findings = verify_proposal(reading.settled, reading.proposal, roster, previous, network)
        if not findings:
            break
    return [*findings, *_compare_committee(reading.proposal, committee)]


def verify_round(
    settled: SettledRound, proposal_bytes: bytes, roster: Roster, previous: Proposal | None, network: NetworkConfig
) -> list[str]:
    """As `verify_proposal`, from bytes that anyone gave."""
    if compute_digest(proposal_bytes) != settled.data_digest:
        return [f"data: expected SHA-256 {settled.data_digest.hex()}, got {compute_digest(proposal_bytes).hex()}"]
    try:
        proposal = decode_proposal(proposal_bytes)
    except Reject as error:
        return [f"data: {error}"]
    return verify_proposal(settled, proposal, roster, previous, network)


def verify_proposal(
    settled: SettledRound, proposal: Proposal, roster: Roster, previous: Proposal | None, network: NetworkConfig
) -> list[str]:
    """What is wrong with a settled round; empty: medians, weights, leaves and root all recompute.

    Commitments are gossip of their round and not part of a proposal: that every reveal matched one is what the
    committee's signatures say. `previous` is the proposal of the settled round before; None only for the first.
    """
    return [
        *_compare_header(settled, proposal),
        *compare_root(settled, from_wire(proposal.leaves)),
        *_compare_content(settled, proposal, roster, previous, network),
    ]


def _compare_committee(proposal: Proposal, committee: Sequence[MemberIndex]) -> list[str]:
    """Whether the medians stand on vectors of enough committee members, and of nobody else."""
    members = {reveal.member for reveal in proposal.reveals}
    findings = [f"reveals: member {member} is not in the committee" for member in sorted(members - set(committee))]
    needed = compute_quorum(len(committee))
    if len(members & set(committee)) < needed:
        findings.append(f"reveals: {len(members)} members revealed a vector, at least {needed} must")
    return findings


def _compare_header(settled: SettledRound, proposal: Proposal) -> list[str]:
    pairs = (
        ("round", settled.round, proposal.round),
        ("epoch", settled.epoch, proposal.epoch),
        ("nonce", settled.nonce, proposal.nonce),
        ("prev_root", settled.prev_root.hex(), proposal.prev_root.hex()),
        ("root", settled.root.hex(), proposal.root.hex()),
        ("base", settled.base.hex(), proposal.new_base.hex()),
    )
    return [f"{name}: the chain says {chain}, the data {data}" for name, chain, data in pairs if chain != data]


def _compare_content(
    settled: SettledRound, proposal: Proposal, roster: Roster, previous: Proposal | None, network: NetworkConfig
) -> list[str]:
    """Medians, weights, leaves and root, recomputed from the revealed vectors by the peers' own rule.

    Who proposed, at which epoch, from which base: the committee's signatures say so; that is taken from the proposal.
    """
    if (previous.root if previous else merkle.EMPTY_ROOT) != settled.prev_root:
        return ["the settled round before this one is not at hand, so that its leaves cannot be recomputed"]
    members = [reveal.member for reveal in proposal.reveals]
    if len(set(members)) < len(members) or any(
        reveal.round != proposal.round or reveal.member >= len(proposal.leaves) for reveal in proposal.reveals
    ):
        return ["reveals: one member's stand there twice, or are nobody's, or of another round"]
    told = {update.payload: update for update in proposal.updates}
    announced = {
        payload: Announcement(proposal.round, update.peer, proposal.base, payload, 0, 0)
        for payload, update in told.items()
    }
    then = msgspec.structs.replace(
        roster, epoch=proposal.epoch, nonce=proposal.nonce, members=roster.members[: len(proposal.leaves)]
    )
    try:
        right = draft_proposal(network, then, previous, proposal.round, proposal.base, proposal.reveals, announced)
    except Reject as error:
        return [f"reveals: {error}"]
    findings = _compare_updates(right, told)
    if right.leaves != proposal.leaves:
        pairs = zip(from_wire(right.leaves), from_wire(proposal.leaves), strict=False)
        findings += [
            f"leaf of member {index}: {', '.join(_describe_difference(computed, given))}"
            for index, (computed, given) in enumerate(pairs)
            if computed != given
        ]
    return findings


def _describe_difference(computed: LeafValue, given: LeafValue) -> Iterator[str]:
    """Each value of a leaf that is not what the rules give."""
    units = {
        "cumulative_wei": "sum [wei]",
        "reward_wei": "reward [wei]",
        "contribution": "contribution [nano-nats]",
        "served_wei": "sum for serving [wei]",
    }
    for name, called in units.items():
        right, told = getattr(computed, name), getattr(given, name)
        if right != told:
            yield f"{called} should be {right:,}, the proposal says {told:,}"


def _compare_updates(right: Proposal, told: Mapping[Digest, IncludedUpdate]) -> list[str]:
    findings = []
    computed = {update.payload: update for update in right.updates}
    for payload, given in told.items():
        name, expected = f"update {payload.hex()[:10]} of member {given.member}", computed.get(payload)
        if expected is None:
            findings.append(f"{name}: included, but half of the reveals or fewer scored it")
        elif expected.contribution != given.contribution:
            findings.append(
                f"{name}: the reveals' median is {expected.contribution}, the proposal says {given.contribution}"
            )
        elif expected.weight != given.weight:
            findings.append(
                f"{name}: its merge weight should be {expected.weight / WEIGHT_ONE:.9f}, "
                f"the proposal says {given.weight / WEIGHT_ONE:.9f}"
            )
        elif expected != given:
            findings.append(f"{name}: expected peer {expected.peer}, the proposal says {given.peer}")
    return findings
