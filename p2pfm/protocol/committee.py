"""What a committee certifies, as pure functions: from revealed vectors to a proposal, and back as a check.

A proposal has one right content for given reveals, head and roster; everyone recomputes it with `draft_proposal`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from p2pfm.config import ChainConfig, NetworkConfig
from p2pfm.errors import Reject
from p2pfm.messages import (
    NO_DIGEST,
    Announcement,
    IncludedUpdate,
    Proposal,
    ScoreReveal,
    Service,
)
from p2pfm.protocol.events import Merge, Weighted
from p2pfm.protocol.membership import compute_ranks, get_member
from p2pfm.protocol.shards import Deal, compute_shard_shares, compute_shares_of, get_shard_name
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue, Member, Roster
from p2pfm.settlement.rewards import (
    compute_leaves,
    compute_median,
    compute_served,
    compute_weights,
    from_wire,
    is_payout_round,
    to_wire,
)
from p2pfm.settlement.sampling import compute_quorum
from p2pfm.types import Contribution, Digest, MemberIndex, Round, Weight, compute_digest

MERGE_CAP = 2
"""An update was measured at its share of the step; merged alone at the whole step it overshoots (demonstration, one
update in a round: held-out loss 3.50 to 3.97). With a third of the peers silent or worthless the cap does not bind."""

ONCE_MAX = 8
"""Results kept a roster, the newest: what one round's committee computes."""

T = TypeVar("T")

SHARD_DOMAIN = b"p2pfm/1 shard"
"""A shard's certificates are worth nothing on chain, and cannot be taken for what is."""


def draft_proposal(
    config: NetworkConfig,
    roster: Roster,
    previous: Proposal | None,
    round: Round,
    base: Digest,
    reveals: Sequence[ScoreReveal],
    announcements: Mapping[Digest, Announcement],
) -> Proposal:
    """The one right proposal for these reveals, its `new_base` left open (`NO_DIGEST`).

    An update is included if more than half of the reveals scored it; its contribution is their lower median. Its merge
    weight is proportional to max(0, what its peer contributed in this epoch so far, this round included), at most
    MERGE_CAP times its share in the scoring game: the same sum that the epoch pays by (ALGORITHMS, parts 4 and 5).

    Args:
        previous: what the newest certificate certifies.
        announcements: by payload digest; an update nobody here saw announced raises `Reject`.
    """
    included = _get_included(roster, reveals, announcements)

    def make() -> Proposal:
        measured = {member.index: contribution for member, _, contribution in included}
        leaves = _compute_next_leaves(config, roster, previous, round, measured, reveals)
        shares = compute_shares_of(roster, config.stake_cap())
        weights = compute_merge_weights(
            [leaves[member.index].contribution for member, *_ in included],
            [shares[member.peer] for member, *_ in included],
        )
        return _make_proposal(roster, previous, round, base, reveals, _to_updates(included, weights), leaves)

    members = tuple(member.index for member, *_ in included)
    return _once(roster, (config, previous, *reveals), ("draft", round, base, members), make)


def draft_shard_proposal(
    config: NetworkConfig,
    shard: Roster,
    num_shards: int,
    previous: Proposal | None,
    round: Round,
    base: Digest,
    reveals: Sequence[ScoreReveal],
    announcements: Mapping[Digest, Announcement],
) -> Proposal:
    """The same for one shard's round: it pays nobody, so it has no leaves, and its `new_base` will be a payload."""
    included = _get_included(shard, reveals, announcements)

    def make() -> Proposal:
        measured = [(member.index, contribution) for member, _, contribution in included]
        sums = compute_shard_sums(previous, num_shards, measured)
        shares = compute_shares_of(shard, config.stake_cap())
        weights = compute_merge_weights(sums, [shares[member.peer] for member, *_ in included])
        return _make_proposal(shard, None, round, base, reveals, _to_updates(included, weights), ())

    members = tuple(member.index for member, *_ in included)
    return _once(shard, (config, previous, *reveals), ("shard draft", num_shards, round, base, members), make)


def compute_shard_sums(
    previous: Proposal | None, num_shards: int, measured: Sequence[tuple[MemberIndex, Contribution]]
) -> list[int]:
    """What members have contributed in this epoch so far, with what a shard's round measured [nano-nats/token].

    The former stands in the leaves of the level above, where a shard is one of `num_shards`: it is scaled back before
    this round's contribution is added to it.
    """
    so_far = previous.leaves if previous and not _is_epoch_start(previous) else ()
    return [
        (so_far[index].contribution if index < len(so_far) else 0) * num_shards + contribution
        for index, contribution in measured
    ]


def draft_top_proposal(
    config: NetworkConfig,
    roster: Roster,
    dealt: Deal,
    previous: Proposal | None,
    round: Round,
    base: Digest,
    reveals: Sequence[ScoreReveal],
    certified: Mapping[Digest, tuple[int, Proposal]],
) -> Proposal:
    """The same one level up, where the shards are the members and each one's certified merge is its update.

    A peer's contribution is its shard's, times its own share in the shard.

    Args:
        certified: by payload digest: the shard's number and what its certificate certifies (`validate_shard`).
    """
    reveals = tuple(sorted(reveals, key=lambda reveal: reveal.member))
    included: list[tuple[int, Proposal, Contribution]] = []
    for payload, contribution in _compute_medians(roster, reveals):
        if payload not in certified:
            raise Reject(f"a shard's update {payload.hex()[:10]} was scored, but its certificate is not known here")
        number, proposal = certified[payload]
        if any(number == other for other, *_ in included):
            continue  # two certificates of one shard: the lower digest stands
        included.append((number, proposal, contribution))

    def make() -> Proposal:
        contributions: dict[MemberIndex, Contribution] = {}
        for _, proposal, contribution in included:
            contributions |= compute_split(contribution, proposal)
        leaves = _compute_next_leaves(config, roster, previous, round, contributions, reveals)
        shares = compute_shard_shares(dealt, compute_shares_of(roster, config.stake_cap()))
        weights = compute_merge_weights(
            [
                sum(leaves[member.index].contribution for member in dealt.shards[number].members)
                for number, *_ in included
            ],
            [shares[number] for number, *_ in included],
        )
        updates = tuple(
            IncludedUpdate(get_shard_name(number), MemberIndex(number), proposal.new_base, contribution, weight)
            for (number, proposal, contribution), weight in zip(included, weights, strict=True)
        )
        shards = tuple(proposal.digest for _, proposal, _ in included)
        return _make_proposal(roster, previous, round, base, reveals, updates, leaves, shards)

    numbers, proposals = tuple(number for number, *_ in included), (proposal for _, proposal, _ in included)
    return _once(roster, (config, dealt, previous, *reveals, *proposals), ("top draft", round, base, numbers), make)


def announce_updates(proposal: Proposal, bytes_max: int = 0) -> dict[Digest, Announcement]:
    """What a proposal's updates must have been announced by, by payload; made once for all peers of a process."""
    known: dict[int, dict[Digest, Announcement]] = proposal.__dict__.setdefault("_announced", {})
    if bytes_max not in known:
        known[bytes_max] = {
            update.payload: Announcement(proposal.round, update.peer, proposal.base, update.payload, bytes_max, 0)
            for update in proposal.updates
        }
    return known[bytes_max]


def validate_shard(
    config: NetworkConfig, dealt: Deal, number: int, previous: Proposal | None, round: Round, proposal: Proposal
) -> None:
    """Recompute what a shard certified from the vectors that its committee revealed; its signatures say the rest.

    So two thirds of one shard's committee can lie about what their members are worth to each other, and about nothing
    else: not for members of other shards, and not about weights.

    Raises:
        Reject: names the rule.
    """
    if number >= len(dealt.shards):
        raise Reject(f"shard {number} certified something, and there are {len(dealt.shards)} shards")
    shard = dealt.shards[number]

    def judge() -> str:
        announced, reveals = announce_updates(proposal), proposal.reveals
        try:
            _validate_members(shard, reveals, round)
            expected = draft_shard_proposal(
                config, shard, len(dealt.shards), previous, round, proposal.base, reveals, announced
            )
            validate_proposal(proposal, expected)
        except Reject as error:
            return str(error)
        return ""

    fault = _once(shard, (config, previous, proposal), ("certified", round), judge)
    if fault:
        raise Reject(f"what shard {number} certified is not right: {fault}")


def compute_split(contribution: Contribution, shard: Proposal) -> dict[MemberIndex, Contribution]:
    """A shard's contribution divided over its members, in proportion to what each contributed inside.

    What harmed the shard counts against its maker in the same proportion, but for no more than the whole shard brought:
    where members' harm nearly outweighs what the others gained, the proportion is no measure. Of a shard that did harm
    nobody gains.
    """
    positive = sum(max(0, update.contribution) for update in shard.updates)
    if not positive:
        return {}
    split = {}
    for update in shard.updates:
        part = abs(update.contribution) * abs(contribution) // positive
        is_gain = update.contribution > 0 and contribution > 0
        split[update.member] = Contribution(part if is_gain else -min(part, abs(contribution)))
    return split


def shard_message(chain: ChainConfig, shard: int, proposal: Proposal) -> Digest:
    """The 32 bytes that a shard's committee signs: binds chain, contract, shard and proposal."""
    words = chain.chain_id.to_bytes(32, "big") + bytes.fromhex(chain.federation[2:]) + shard.to_bytes(8, "big")
    return compute_digest(SHARD_DOMAIN + words + proposal.digest)


def _once(roster: Roster, same: tuple[object, ...], words: tuple[object, ...], make: Callable[[], T]) -> T:
    """What `make` gave for the very same objects and equal words under this roster before, else what it gives now.

    A simulation of thousands is thousands of peers that recompute one proposal from the same objects.
    """
    known: dict[tuple[object, ...], tuple[object, T]] = roster.__dict__.setdefault("_once", {})
    key = (*words, *map(id, same))
    if key not in known:
        if len(known) >= ONCE_MAX:
            del known[next(iter(known))]
        known[key] = (same, make())  # kept alive, so that their ids stay theirs
    return known[key][1]


def _compute_medians(roster: Roster, reveals: Sequence[ScoreReveal]) -> tuple[tuple[Digest, Contribution], ...]:
    """Every payload that more than half of the reveals scored, sorted, with the lower median of its scores."""

    def make() -> tuple[tuple[Digest, Contribution], ...]:
        readings: dict[Digest, list[Contribution]] = {}
        for reveal in reveals:
            for score in reveal.scores:
                readings.setdefault(score.payload, []).append(score.contribution)
        return tuple(
            (payload, compute_median(readings[payload]))
            for payload in sorted(payload for payload, values in readings.items() if 2 * len(values) > len(reveals))
        )

    return _once(roster, tuple(reveals), ("medians",), make)


def _get_included(
    roster: Roster, reveals: Sequence[ScoreReveal], announcements: Mapping[Digest, Announcement]
) -> list[tuple[Member, Digest, Contribution]]:
    included = []
    for payload, contribution in _compute_medians(roster, reveals):
        announcement = announcements.get(payload)
        if announcement is None:
            raise Reject(f"update {payload.hex()[:10]} was scored, but its announcement is not known here")
        member = get_member(roster, announcement.peer)
        if member is not None:
            included.append((member, payload, contribution))
    return included


def _to_updates(
    included: Sequence[tuple[Member, Digest, Contribution]], weights: Sequence[Weight]
) -> tuple[IncludedUpdate, ...]:
    return tuple(
        IncludedUpdate(member.peer, member.index, payload, contribution, weight)
        for (member, payload, contribution), weight in zip(included, weights, strict=True)
    )


def _make_proposal(
    roster: Roster,
    previous: Proposal | None,
    round: Round,
    base: Digest,
    reveals: Sequence[ScoreReveal],
    updates: tuple[IncludedUpdate, ...],
    leaves: tuple[LeafValue, ...],
    shards: tuple[Digest, ...] = (),
) -> Proposal:
    return Proposal(
        round=round,
        proposer=compute_ranks(roster, round)[0],
        epoch=roster.epoch,
        nonce=roster.nonce,
        base=base,
        new_base=NO_DIGEST,
        prev_root=previous.root if previous else NO_DIGEST,
        root=merkle.compute_root(leaves).digest if leaves else NO_DIGEST,
        updates=updates,
        reveals=tuple(sorted(reveals, key=lambda reveal: reveal.member)),
        leaves=to_wire(leaves),
        shards=shards,
    )


def compute_merge_weights(contributions: Sequence[int], shares: Sequence[Weight]) -> tuple[Weight, ...]:
    """What each update weighs in the merge: in proportion to max(0, contribution), at most MERGE_CAP times its share.

    `contributions`: of each update's peer, accumulated over the epoch with this round's.

    All are 0 when no contribution is positive; they sum to at most WEIGHT_ONE.
    """
    wanted = compute_weights(contributions)
    return tuple(min(weight, Weight(MERGE_CAP * share)) for weight, share in zip(wanted, shares, strict=True))


def merge_request(draft: Proposal) -> Merge | None:
    """The merge that gives a draft's new base; None when no update has a positive weight (then the base stays).

    Updates of weight 0 are part of it: all of them were clipped to their median norm when they were measured.
    """
    known: dict[str, Merge | None] = draft.__dict__  # the same for all peers of a process
    if "_merge" not in known:
        updates = tuple(Weighted(update.payload, update.weight) for update in draft.updates)
        is_changed = any(update.weight for update in updates)
        known["_merge"] = Merge(draft.draft_digest, draft.base, updates) if is_changed else None
    return known["_merge"]


def validate_reveals(
    roster: Roster,
    reveals: Sequence[ScoreReveal],
    round: Round,
    commitments: Mapping[MemberIndex, Sequence[Digest]],
    late: Mapping[MemberIndex, Sequence[Digest]],
) -> None:
    """Enough members, each once, each as it committed; more than half of them before any vector was public.

    A proposer takes punctual commitments only, but whether one was punctual depends on where it was heard: if every
    reveal had to be punctual everywhere, one member that commits at the last moment could void every round. The median
    stands on the majority.

    Args:
        commitments: by member, heard in time; `late`: heard after SCORE.

    Raises:
        Reject: names the rule and the member.
    """
    _validate_members(roster, reveals, round)
    num_late = 0
    for reveal in reveals:
        commitment = reveal.commitment
        if commitment not in commitments.get(reveal.member, ()):
            if commitment not in late.get(reveal.member, ()):
                raise Reject(f"reveal of member {reveal.member} does not match a commitment known here")
            num_late += 1
    if 2 * num_late >= len(reveals):
        raise Reject(f"{num_late} of {len(reveals)} members committed here only after vectors were public")


def _validate_members(roster: Roster, reveals: Sequence[ScoreReveal], round: Round) -> None:
    """Enough members, each once, with well-formed vectors of this round. Raises: Reject."""
    seen: set[MemberIndex] = set()
    for reveal in reveals:
        if reveal.round != round or reveal.member not in roster.committee or reveal.member in seen:
            raise Reject(f"reveal of member {reveal.member} is of another round, no committee member's, or twice there")
        seen.add(reveal.member)
        validate_vector(reveal, len(roster.members))
        if not are_members(reveal.served, roster):
            raise Reject(f"reveal of member {reveal.member} names a replica that is no member")
    needed = compute_quorum(len(roster.committee))
    if len(seen) < needed:
        raise Reject(f"expected reveals of at least {needed} committee members, got {len(seen)}")


def validate_vector(reveal: ScoreReveal, num_members: int) -> None:
    """Scores sorted by payload, none twice, at most one a member (or a few could swell a proposal over its limit);
    services sorted by member, none twice, together at most a whole.

    Raises: Reject.
    """
    if len(reveal.scores) > num_members:
        raise Reject(f"scores {len(reveal.scores)} updates, but there are {num_members} members")
    if reveal.disorder:
        raise Reject(reveal.disorder)


def are_members(served: Sequence[Service], roster: Roster) -> bool:
    """Whether all of these are registered, as far as is known here."""
    return all(service.member in roster.by_index for service in served)


def validate_proposal(proposal: Proposal, expected: Proposal) -> None:
    """Compare a received proposal with the recomputed draft, field by field (all but `new_base`).

    Raises:
        Reject: names the first field that differs.
    """
    if proposal.__dict__.get("_expected") is expected:
        return  # compared by another peer of this process
    for name in Proposal.__struct_fields__:
        if name != "new_base" and getattr(proposal, name) != getattr(expected, name):
            raise Reject(f"proposal of round {proposal.round}: field {name!r} differs from what its reveals give here")
    proposal.__dict__["_expected"] = expected


def _compute_next_leaves(
    config: NetworkConfig,
    roster: Roster,
    previous: Proposal | None,
    round: Round,
    measured: Mapping[MemberIndex, Contribution],
    reveals: Sequence[ScoreReveal],
) -> tuple[LeafValue, ...]:
    if previous and len(previous.leaves) > len(roster.members):
        raise Reject("the registry known here is older than the newest certificate")
    last_round = previous.round if previous else Round(-1)
    is_payout = is_payout_round(round, last_round, config.settlement.rounds_per_epoch)
    try:
        return compute_leaves(
            from_wire(previous.leaves) if previous else (),
            measured,
            num_members=len(roster.members),
            pool=config.pool_per_epoch(),
            is_payout=is_payout,
            is_epoch_start=previous is None or _is_epoch_start(previous),
            served=compute_served(reveals, config.serving_per_epoch()) if is_payout else {},
        )
    except ValueError as error:  # of what others signed
        raise Reject(f"leaves: {error}") from error


def _is_epoch_start(previous: Proposal) -> bool:
    """Whether what was contributed up to `previous` has been paid."""
    return any(any(leaf.reward_wei) for leaf in previous.leaves)
