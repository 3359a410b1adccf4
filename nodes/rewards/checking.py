"""Whether settled rounds follow the rules: everything that follows from the revealed vectors, recomputed.

What a member revealed may be wrong all the same: `measuring` measures it again. Knows no model.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Self

import msgspec

from nodes.rewards.reading import (
    Book,
    Fetch,
    Reading,
    compare_root,
    list_rosters,
    name_maker,
    read_book,
    validate_reading,
)
from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject
from p2pfm.messages import IncludedUpdate, Proposal
from p2pfm.protocol.committee import (
    announce_updates,
    are_members,
    draft_proposal,
    draft_shard_proposal,
    draft_top_proposal,
    validate_shard,
    validate_vector,
)
from p2pfm.protocol.shards import Deal, deal, get_shard_name
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue, Ledger, Roster, SettledRound
from p2pfm.settlement.rewards import from_wire
from p2pfm.settlement.sampling import compute_quorum
from p2pfm.types import WEIGHT_ONE, Digest, MemberIndex, Round

UNFIT_REGISTRY = "leaves: at no time of the round's committee were so many members registered"
STRANGE_REVEALS = "reveals: one member's stand there twice, or are nobody's, or of another round"


class Unchecked(str):
    """A finding that accuses nobody: what it tells of keeps something from being checked."""

    __slots__ = ()

    def __new__(cls, why: str) -> Self:
        """The reason, with what follows from it."""
        return super().__new__(cls, f"{why}: it cannot be checked")


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
        return [Unchecked(reading.problem)]
    if reading.flaw:
        return [f"shards: {reading.flaw}"]
    if reading.gap:
        return [Unchecked(reading.gap)]
    before = book.get_before(reading)
    findings = verify_by_any(reading, list_rosters(book, position), before.proposal if before else None, network)
    return [*findings, *_compare_committee(reading.proposal, committee)]


def verify_by_any(
    reading: Reading, rosters: Sequence[Roster], previous: Proposal | None, network: NetworkConfig
) -> list[str]:
    """As `verify_proposal`, by the registry by which the least is wrong."""
    least = [UNFIT_REGISTRY]
    for number, roster in enumerate(rosters):
        findings = verify_proposal(reading, roster, previous, network)
        if not findings:
            return []
        least = findings if not number else min(least, findings, key=len)
    return least


def is_accusation(findings: Sequence[str]) -> bool:
    """Whether something is wrong, and not only what cannot be checked."""
    return not all(isinstance(finding, Unchecked) for finding in findings)


def find_roster(book: Book, position: int, network: NetworkConfig) -> Roster | None:
    """The registry by which the round at a position recomputes; None: it has leaves of no registry of its time.

    If it recomputes by none, since something in it is wrong: the newest of those by whose deal most shards certified
    updates of their own members only.
    """
    reading, before = book.readings[position], book.get_before(book.readings[position])
    rosters = list_rosters(book, position)
    proposal, previous = reading.proposal, before.proposal if before else None
    if proposal is None or not rosters:
        return rosters[0] if rosters else None
    for roster in rosters:
        if not verify_proposal(reading, roster, previous, network):
            return roster
    deals = (deal(network, roster, proposal.round) for roster in rosters)
    fits = [len(list_fitting(dealt, proposal, reading.shards)) if dealt else 0 for dealt in deals]
    return rosters[fits.index(max(fits))]


def verify_proposal(reading: Reading, roster: Roster, previous: Proposal | None, network: NetworkConfig) -> list[str]:
    """What is wrong with a settled round; empty: medians, weights, leaves and root all recompute.

    Commitments are gossip of their round and not part of a proposal: that every reveal matched one is what the
    committee's signatures say.

    Args:
        reading: with its data.
        roster: of then, with the committee of the round's epoch.
        previous: the proposal of the settled round before; None only for the first.
    """
    settled, proposal = reading.settled, validate_reading(reading)
    findings = [*_compare_header(settled, proposal), *compare_root(settled, from_wire(proposal.leaves))]
    try:
        return [*findings, *_compare_content(reading, proposal, roster, previous, network)]
    except (ValueError, LookupError, OverflowError) as error:
        # What a committee signed may be any nonsense that has the right root.
        return [*findings, f"it cannot be recomputed: {error}"]


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
    reading: Reading, proposal: Proposal, roster: Roster, previous: Proposal | None, network: NetworkConfig
) -> list[str]:
    """Medians, weights, leaves and root, recomputed from the revealed vectors by the peers' own rule.

    Who proposed, at which epoch, from which base the first round started: the committee's signatures say so; that is
    taken from the proposal.
    """
    if (previous.root if previous else merkle.EMPTY_ROOT) != reading.settled.prev_root:
        return [Unchecked("the settled round before this one is not at hand")]
    findings = []
    if previous is not None and proposal.base != previous.new_base:
        findings.append(
            f"base: the round before ended with {previous.new_base.hex()}, this one starts from {proposal.base.hex()}"
        )
    strange = _find_strange(proposal, roster)
    if strange:
        return [*findings, *strange]
    then = msgspec.structs.replace(roster, epoch=proposal.epoch, nonce=proposal.nonce)
    dealt = deal(network, then, proposal.round)
    if dealt is not None:
        return [*findings, *_compare_shards(proposal, reading.shards, then, dealt, previous, network)]
    if proposal.shards:
        return [*findings, f"updates: they are shards', and {len(then.by_peer)} active members are one shard"]
    try:
        right = draft_proposal(
            network, then, previous, proposal.round, proposal.base, proposal.reveals, announce_updates(proposal)
        )
    except Reject as error:
        return [*findings, f"reveals: {error}"]
    return [*findings, *_compare_updates(right, proposal), *_compare_leaves(right, proposal)]


def _find_strange(proposal: Proposal, roster: Roster) -> list[str]:
    """What no honest member reveals, or counts as revealed."""
    revealed = [reveal.member for reveal in proposal.reveals]
    if len(set(revealed)) < len(revealed) or any(
        reveal.round != proposal.round or reveal.member not in roster.by_index for reveal in proposal.reveals
    ):
        return [STRANGE_REVEALS]
    findings = []
    for reveal in proposal.reveals:
        try:
            validate_vector(reveal, len(roster.members))
        except Reject as error:
            findings.append(f"reveal of member {reveal.member}: {error}")
        if not are_members(reveal.served, roster):
            findings.append(f"reveal of member {reveal.member}: it names a replica that is no member")
    return findings


# --- networks of shards


def list_fitting(dealt: Deal, proposal: Proposal, shards: Sequence[Proposal | None]) -> tuple[int, ...]:
    """Places of the shards whose updates are all of members that were dealt to them: all, by the registry of then."""
    return tuple(
        place
        for place, (update, shard) in enumerate(zip(proposal.updates, shards, strict=False))
        if shard is not None
        and update.member < len(dealt.shards)
        and all(dealt.shard_of.get(inner.peer) == update.member for inner in shard.updates)
    )


def _compare_shards(
    proposal: Proposal,
    shards: Sequence[Proposal | None],
    roster: Roster,
    dealt: Deal,
    previous: Proposal | None,
    network: NetworkConfig,
) -> list[str]:
    """Both levels: each shard's round by its members' reveals, and by what they certified the one above."""
    if len(shards) != len(proposal.updates):
        return [f"updates: {len(proposal.updates)} shards were merged, and what {len(shards)} certified is named"]
    findings: list[str] = []
    certified: dict[Digest, tuple[int, Proposal]] = {}
    for update, shard in zip(proposal.updates, shards, strict=True):
        number = update.member
        if number >= len(dealt.shards) or update.peer != get_shard_name(number):
            return [f"updates: {update.peer!r} (member {number}) is none of the round's {len(dealt.shards)} shards"]
        if shard is None:
            return [Unchecked(f"{update.peer}: nobody serves what it certified")]
        certified[update.payload] = (number, shard)
        found = _verify_shard(proposal, update, shard, dealt, previous, network)
        findings += [f"{update.peer}: {finding}" for finding in found]
    # Of two words of one shard the lower digest stands: what else was scored, of a higher digest than some shard's, is
    # taken for that one's second word. Where a shard is absent, it may be its only word as well.
    counts = Counter(score.payload for reveal in proposal.reveals for score in reveal.scores)
    scored = {payload for payload, count in counts.items() if 2 * count > len(proposal.reveals)}
    second = {payload for payload in scored - certified.keys() if any(payload > known for known in certified)}
    if second and len({number for number, _ in certified.values()}) < len(dealt.shards):
        names = ", ".join(payload.hex()[:10] for payload in sorted(second))
        why = (
            f"updates: {names}: scored and not merged, as a shard's second word should be, but perhaps the only one "
            "of a shard that is absent"
        )
        findings.append(Unchecked(why))
    certified |= {payload: certified[min(certified)] for payload in second}
    try:
        right = draft_top_proposal(
            network, roster, dealt, previous, proposal.round, proposal.base, proposal.reveals, certified
        )
    except Reject as error:
        return [*findings, f"reveals: {error}"]
    return [*findings, *_compare_updates(right, proposal), *_compare_leaves(right, proposal)]


def _verify_shard(
    proposal: Proposal,
    update: IncludedUpdate,
    shard: Proposal,
    dealt: Deal,
    previous: Proposal | None,
    network: NetworkConfig,
) -> list[str]:
    """What is wrong with what one shard certified. As above, that reveals match commitments its signatures say."""
    roster = dealt.shards[update.member]
    pairs = (
        ("round", proposal.round, shard.round),
        ("base", proposal.base.hex(), shard.base.hex()),
        ("payload", update.payload.hex(), shard.new_base.hex()),
        ("leaves", 0, len(shard.leaves)),
    )
    findings = [f"{name}: should be {right}, is {told}" for name, right, told in pairs if right != told]
    strange = _find_strange(shard, roster)
    if strange:
        return [*findings, *strange]
    findings += _compare_committee(shard, roster.committee)
    try:
        right = draft_shard_proposal(
            network,
            roster,
            len(dealt.shards),
            previous,
            shard.round,
            shard.base,
            shard.reveals,
            announce_updates(shard),
        )
        findings += _compare_updates(right, shard)
        if not findings:  # what has no words of its own above, the rule of the peers themselves finds
            validate_shard(network, dealt, update.member, previous, proposal.round, shard)
    except Reject as error:
        findings.append(f"reveals: {error}")
    return findings


# --- differences


def _compare_leaves(right: Proposal, told: Proposal) -> list[str]:
    if right.leaves == told.leaves:
        return []
    pairs = zip(from_wire(right.leaves), from_wire(told.leaves), strict=False)
    return [
        f"leaf of member {index}: {', '.join(_describe_difference(computed, given))}"
        for index, (computed, given) in enumerate(pairs)
        if computed != given
    ]


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


def _compare_updates(right: Proposal, told: Proposal) -> list[str]:
    findings = []
    computed = {update.payload: update for update in right.updates}
    for payload, given in {update.payload: update for update in told.updates}.items():
        maker = name_maker(given.peer, given.member)
        name, expected = f"update {payload.hex()[:10]} of {maker}", computed.get(payload)
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
            right_maker = f"{expected.peer} (member {expected.member})"
            findings.append(f"{name}: it is of {right_maker}, the proposal says {given.peer} (member {given.member})")
    if not findings and right.updates != told.updates:
        # What is merged and what is paid go by the list: a payload that stands there twice counts twice.
        findings.append(
            f"updates: expected {len(right.updates)}, each once and in the order of their payloads; the proposal's "
            f"{len(told.updates)} are another list"
        )
    return findings
