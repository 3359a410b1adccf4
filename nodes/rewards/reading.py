"""Rewards as the chain and the data beside it tell them: one consistent reading, a `Book`.

The chain holds a root and a data hash a round; the proposal under that hash (reveals, medians, weights, leaves) comes
from anybody and is believed only after it was checked against both. Knows a Ledger and a way to fetch a blob.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import msgspec

from p2pfm.errors import OperatorError, P2PFMError, Reject, WorldError
from p2pfm.messages import IncludedUpdate, Proposal, decode_message
from p2pfm.protocol.committee import compute_split
from p2pfm.protocol.shards import is_shard_name
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import (
    Accepted,
    Demand,
    Entry,
    FederationParams,
    Joined,
    LeafValue,
    Ledger,
    Left,
    Member,
    Roster,
    Rotated,
    SettledRound,
    Slashed,
    Sums,
    Withdrawn,
)
from p2pfm.settlement.rewards import from_wire
from p2pfm.types import WEIGHT_ONE, Contribution, Digest, MemberIndex, PeerId, Round, Wei, Weight, compute_digest

PROPOSAL_BYTES_MAX = 8_000_000
"""Far above a proposal of a full network (128 peers: some 200 kB)."""

FIRST = Round(0)

SUFFIX_MIN = 4
"""Fewer characters of a peer id name nobody: most would fit several, and the shorter ones look like an index."""

Fetch = Callable[[Digest], bytes | None]
"""Bytes of a content-addressed blob from wherever they are held; None: nobody serves it."""


class Reading(msgspec.Struct, frozen=True, dict=True):
    """A settled round, with its data if they could be had and are those that the chain names."""

    settled: SettledRound
    proposal: Proposal | None
    problem: str = ""
    """Why there is no proposal; empty when there is one."""
    is_lie: bool = False
    """The data have the hash on chain, but are no proposal, or not of the root: its signers lied."""
    shards: tuple[Proposal | None, ...] = ()
    """In a network of shards, by place in the proposal's updates: what that shard certified; None: nobody serves it.
    Empty where the proposal's list of them cannot be one."""
    flaw: str = ""
    """What no list of shards can be, though the leaves are those of the root: its signers lied. Empty: nothing."""

    @property
    def gap(self) -> str:
        """What of a round whose proposal is at hand is not known all the same; empty: nothing."""
        if self.flaw:
            return f"round {self.settled.round}: {self.flaw}"
        lacking = sum(shard is None for shard in self.shards)
        of = f"{lacking} of {len(self.shards)} shards"
        return f"round {self.settled.round}: nobody serves what {of} certified of their members" if lacking else ""

    @cached_property
    def updates(self) -> tuple[IncludedUpdate, ...]:
        """The peers' updates: in a network of shards those inside of what was merged, as far as it is known.

        There a peer's contribution is its part of its shard's, and its weight that inside times the shard's.
        """
        if self.proposal is None or not self.proposal.shards:
            return self.proposal.updates if self.proposal else ()
        found = []
        for update, shard in zip(self.proposal.updates, self.shards, strict=False):  # none, where there is a flaw
            split = compute_split(update.contribution, shard) if shard else {}
            for inner in shard.updates if shard else ():
                contribution = split.get(inner.member, Contribution(0))
                weight = Weight(update.weight * inner.weight // WEIGHT_ONE)
                found.append(msgspec.structs.replace(inner, contribution=contribution, weight=weight))
        return tuple(found)

    @property
    def ballots(self) -> tuple[Proposal, ...]:
        """Where peers' updates were scored and certified: the proposal, or those of its shards that are at hand."""
        if self.proposal is None or not self.proposal.shards:
            return (self.proposal,) if self.proposal else ()
        return tuple(shard for shard in self.shards if shard)

    @cached_property
    def _by_member(self) -> dict[MemberIndex, IncludedUpdate]:
        return {update.member: update for update in self.updates}

    @property
    def leaves(self) -> tuple[LeafValue, ...]:
        """Of the rewards tree; none without data."""
        return from_wire(self.proposal.leaves) if self.proposal else ()

    def get_update(self, member: MemberIndex) -> IncludedUpdate | None:
        """The member's update that the round merged."""
        return self._by_member.get(member)


class Book(msgspec.Struct, frozen=True):
    """All that there is to know of a federation's rewards, read once."""

    params: FederationParams
    roster: Roster
    claimed: tuple[Wei, ...]
    """By member [wei]."""
    pool: Wei
    demands: tuple[Demand, ...]
    entries: tuple[Entry, ...]
    readings: tuple[Reading, ...]
    """Every settled round, in order: readings[i].settled.position == i."""

    def get_reading(self, round: Round) -> Reading:
        """A settled round. Raises: OperatorError, saying which there are."""
        found = next((reading for reading in self.readings if reading.settled.round == round), None)
        if found is None:
            if not self.readings:
                raise OperatorError(f"round {round}: no round is on chain yet")
            first, last = self.readings[0].settled.round, self.readings[-1].settled.round
            raise OperatorError(
                f"round {round} is not on chain; {len(self.readings)} rounds from {first} to {last} are "
                "(a void round merges nothing and pays nobody). See: p2pfm rewards show --by round"
            )
        return found

    def get_before(self, reading: Reading) -> Reading | None:
        """The settled round before; None for the first."""
        return self.readings[reading.settled.position - 1] if reading.settled.position else None

    def get_newest(self) -> Reading | None:
        """The newest round whose data are at hand."""
        return next((reading for reading in reversed(self.readings) if reading.proposal), None)

    def get_final(self) -> Reading | None:
        """The newest final round whose data are at hand: claims are made against it."""
        final = (reading for reading in reversed(self.readings) if reading.settled.is_final and reading.proposal)
        return next(final, None)


class Row(msgspec.Struct, frozen=True):
    """One registered peer in one settled round."""

    round: Round
    member: MemberIndex
    peer: PeerId
    contribution: Contribution | None
    """Of this round's update [nano-nats/token]; None: no update of this peer was included, as far as is known."""
    total: Contribution
    """Accumulated over the epoch so far [nano-nats/token]."""
    weight: Weight
    """In this round's merge [parts per WEIGHT_ONE]."""
    reward_wei: Wei
    """Allotted by this round."""
    cumulative_wei: Wei
    """Allotted up to this round."""
    claimed_wei: Wei
    """Drawn up to now."""
    is_final: bool


def read_book(ledger: Ledger, fetch: Fetch) -> Book:
    """Everything, at once. Rounds without data are part of it, with the reason. Raises: ChainError."""
    # What may grow in the meantime comes after what refers to it.
    entries, demands = ledger.get_entries(), ledger.get_demands()
    readings = tuple(read_round(settled, fetch) for settled in ledger.get_rounds(FIRST))
    roster = ledger.get_roster()
    return Book(
        params=ledger.get_params(),
        roster=roster,
        claimed=tuple(ledger.get_claimed(member.index) for member in roster.members),
        pool=ledger.get_pool(),
        demands=demands,
        entries=entries,
        readings=readings,
    )


def read_round(settled: SettledRound, fetch: Fetch) -> Reading:
    """A settled round with its data, or with what is wrong with them."""
    data = fetch(settled.data_digest)
    if data is None:
        return Reading(settled, None, f"round {settled.round}: nobody serves its data {settled.data_digest.hex()}")
    found = compute_digest(data)
    if found != settled.data_digest:
        return Reading(
            settled,
            None,
            f"round {settled.round}: nobody serves its data; what was given has SHA-256 {found.hex()}, the chain "
            f"names {settled.data_digest.hex()}",
        )
    try:
        proposal = decode_proposal(data)
        faults = compare_root(settled, from_wire(proposal.leaves))
        if faults:
            raise Reject(faults[0])
    except Reject as error:
        return Reading(settled, None, f"round {settled.round}: {error}", is_lie=True)
    flaw = _find_flaw(proposal)
    if flaw:
        return Reading(settled, proposal, flaw=flaw)
    shards: list[Proposal | None] = []
    for update, digest in zip(proposal.updates, proposal.shards, strict=False):
        data = fetch(digest)
        try:
            is_right = data is not None and compute_digest(data) == digest
            shards.append(decode_proposal(data) if data is not None and is_right else None)
        except Reject as error:
            shards.append(None)
            flaw = f"{name_maker(update.peer, update.member)}: what it certified: {error}"
    return Reading(settled, proposal, shards=tuple(shards), flaw=flaw)


def _find_flaw(proposal: Proposal) -> str:
    """Why nothing is to be fetched of what a proposal's shards certified; empty: all of it is."""
    named = len(proposal.shards)
    if named and named != len(proposal.updates):
        return f"it has {len(proposal.updates)} updates of shards, and names what {named} certified"
    if len(set(proposal.shards)) < named:
        return "it names twice what one shard certified"
    if named > len(proposal.leaves):
        return f"it names what {named} shards certified, and has leaves for {len(proposal.leaves)} members"
    return ""


def read_rewards(ledger: Ledger, fetch: Fetch, first: Round = FIRST, is_partial: bool = False) -> tuple[Row, ...]:
    """All settled rounds from `first` on, by round and then by registry index.

    Args:
        is_partial: leave out rounds whose data nobody serves, or are a lie, instead of raising.

    Raises:
        ChainError: the chain cannot be read.
        WorldError: a round's data is not to be had.
        Reject: the data has the right hash, but its leaves are not those of the root on chain.
    """
    book = read_book(ledger, fetch)
    readings = [reading for reading in book.readings if reading.settled.round >= first]
    if not is_partial:
        for reading in readings:
            validate_reading(reading)
    return tuple(row for reading in readings for row in make_rows(book, reading))


def make_rows(book: Book, reading: Reading) -> tuple[Row, ...]:
    """One row for every member that the round's tree has a leaf for; none without data."""
    rows = []
    for member, leaf, drawn in zip(book.roster.members, reading.leaves, book.claimed, strict=False):
        update = reading.get_update(member.index)
        rows.append(
            Row(
                round=reading.settled.round,
                member=member.index,
                peer=member.peer,
                contribution=update.contribution if update else None,
                total=Contribution(leaf.contribution),
                weight=update.weight if update else Weight(0),
                reward_wei=leaf.reward_wei,
                cumulative_wei=leaf.cumulative_wei,
                claimed_wei=drawn,
                is_final=reading.settled.is_final,
            )
        )
    return tuple(rows)


def validate_reading(reading: Reading) -> Proposal:
    """The round's proposal.

    Raises:
        WorldError: nobody serves it; says how to force it.
        Reject: its signers lied.
    """
    if reading.proposal is not None:
        return reading.proposal
    error: type[P2PFMError] = Reject if reading.is_lie else WorldError
    raise error(f"{reading.problem}; {advise(reading)}")


def advise(reading: Reading) -> str:
    """The next step for whoever needs a round's data that are not to be had."""
    round = reading.settled.round
    if reading.settled.is_final:
        return "it is final and can be contested no more: try again when other peers are connected (--node URL)"
    return (
        "try again when other peers are connected (--node URL), or force it: "
        f"p2pfm rewards challenge --round {round} --demand PEER"
    )


def find_member(roster: Roster, name: str) -> Member:
    """Who is meant by a registry index, a whole peer id, or the unique end of one.

    Raises:
        OperatorError: nobody, or several.
    """
    if name.isdecimal() and int(name) < len(roster.members):
        return roster.members[int(name)]
    wanted = name.lstrip("….")
    exact = [member for member in roster.members if member.peer == wanted]
    fitting = exact or [m for m in roster.members if len(wanted) >= SUFFIX_MIN and m.peer.endswith(wanted)]
    # A peer that left and came back stands there twice: its present place is meant.
    active = [member for member in fitting if member.active]
    if len({member.peer for member in fitting}) == 1:
        return (active or fitting)[-1]
    if fitting:
        several = ", ".join(f"{member.index} ({member.peer})" for member in fitting)
        raise OperatorError(f"peer {name!r}: several fit: {several}; give more of the peer id, or the index")
    raise OperatorError(
        f"peer {name!r}: nobody of that name is registered. Expected a registry index (0 to "
        f"{len(roster.members) - 1}), a peer id, or at least its last {SUFFIX_MIN} characters; they are in: "
        "p2pfm rewards show"
    )


def name_maker(peer: PeerId, member: MemberIndex) -> str:
    """Whose update it is, for people: a member's, or a shard's."""
    return peer if is_shard_name(peer) else f"member {member}"


def list_rosters(book: Book, position: int) -> tuple[Roster, ...]:
    """The registry as it may have been when the round at `position` began, the newest first, each with the committee of
    the round's epoch.

    Its members saw the registry at some moment after that committee was drawn, before the next one was, and before the
    round was accepted; what happened in between is uncertain, since a chain may accept a round long after it was
    certified. Every member has a leaf, so that only a registry of as many members as leaves may be the one; none: the
    round's signers left somebody out, or made somebody up. Keys and accounts are today's.
    """
    settled = book.readings[position].settled
    committee = book.roster.committee  # of a ledger that does not tell what happened
    is_over = False
    members: tuple[Member, ...] = ()
    seen: list[tuple[Member, ...]] = [members]
    for entry in book.entries:
        match entry.what:
            case Joined(index=index, stake=stake):
                now = book.roster.members[index]
                members = (*members, msgspec.structs.replace(now, stake=stake, active=True))
            case Left(index=index):
                members = _change(members, index, active=False)
            case Slashed(index=index):
                members = _change(members, index, stake=Wei(0), active=False)
            case Withdrawn(index=index):
                members = _change(members, index, stake=Wei(0))
            case Accepted(settled=accepted) if accepted.position == position and accepted.root == settled.root:
                break
            case Rotated(epoch=settled.epoch, committee=drawn):
                committee, seen = drawn, []
            case Rotated(epoch=later) if later > settled.epoch:
                is_over = True
            case _:
                continue
        if not is_over:
            seen.append(members)
    else:
        seen = [book.roster.members[: settled.num_leaves]]  # a ledger that does not tell what happened
    fitting = dict.fromkeys(known for known in reversed(seen) if len(known) == settled.num_leaves)
    return tuple(
        msgspec.structs.replace(
            book.roster, epoch=settled.epoch, nonce=settled.nonce, members=known, committee=committee
        )
        for known in fitting
    )


def decode_proposal(data: bytes) -> Proposal:
    """A round's data. Raises: Reject."""
    try:
        message = decode_message(data, PROPOSAL_BYTES_MAX)
    except Reject as error:
        raise Reject(f"its data are no proposal: {error}") from error
    if not isinstance(message, Proposal):
        raise Reject(f"its data are no proposal, but a {type(message).__name__}")
    return message


def compare_root(settled: SettledRound, leaves: Sequence[LeafValue]) -> list[str]:
    """How these leaves differ from those of the root on chain; empty: they are the same."""
    try:
        tree = merkle.compute_root(leaves)
    except ValueError as error:
        return [f"leaves: {error}"]
    findings = []
    if len(leaves) != settled.num_leaves:
        findings.append(f"leaves: there are {len(leaves)}, the chain says {settled.num_leaves}")
    if tree.digest != settled.root:
        findings.append(f"leaves: their root is {tree.digest.hex()}, the chain holds {settled.root.hex()}")
    if tree.sums != settled.sums:
        findings.append(f"leaves: they sum to {_name_sums(tree.sums)}, the chain holds {_name_sums(settled.sums)}")
    return findings


def _name_sums(sums: Sums) -> str:
    return f"{sums.cumulative_wei:,} wei ({sums.reward_wei:,} of this round; contributions {sums.contribution:,})"


def _change(members: tuple[Member, ...], index: MemberIndex, **changes: object) -> tuple[Member, ...]:
    changed = msgspec.structs.replace(members[index], **changes)
    return (*members[:index], changed, *members[index + 1 :])
