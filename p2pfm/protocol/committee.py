"""What a committee certifies, as pure functions: from revealed vectors to a proposal, and back as a check.

A proposal has one right content for given reveals, head and roster; everyone recomputes it with `draft_proposal`.
"""

import itertools
from collections.abc import Mapping, Sequence

import msgspec

from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject
from p2pfm.messages import (
    Announcement,
    IncludedUpdate,
    Proposal,
    Score,
    ScoreReveal,
    compute_commitment,
    encode,
)
from p2pfm.protocol.events import Merge, Weighted
from p2pfm.protocol.membership import compute_ranks, compute_shares, get_member
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue, Roster
from p2pfm.settlement.rewards import (
    compute_leaves,
    compute_median,
    compute_sums,
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

NO_DIGEST = Digest(bytes(32))
"""Stands for the new base while a proposal is a draft, and for the root before the first."""


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
    reveals = tuple(sorted(reveals, key=lambda reveal: reveal.member))
    readings: dict[Digest, list[Contribution]] = {}
    for reveal in reveals:
        for score in reveal.scores:
            readings.setdefault(score.payload, []).append(score.contribution)
    included = []
    for payload in sorted(payload for payload, values in readings.items() if 2 * len(values) > len(reveals)):
        announcement = announcements.get(payload)
        if announcement is None:
            raise Reject(f"update {payload.hex()[:10]} was scored, but its announcement is not known here")
        member = get_member(roster, announcement.peer)
        if member is not None:
            median = compute_median(readings[payload])
            included.append((announcement.peer, member.index, payload, Contribution(median)))
    if previous and len(previous.leaves) > len(roster.members):
        raise Reject("the registry known here is older than the newest certificate")
    measured = {member: contribution for _, member, _, contribution in included}
    leaves = _compute_next_leaves(config, roster, previous, round, measured)
    shares = compute_shares(roster, config.stake_cap())
    weights = compute_merge_weights(
        [leaves[member].contribution for _, member, *_ in included], [shares[peer] for peer, *_ in included]
    )
    updates = tuple(
        IncludedUpdate(peer, member_index, payload, contribution, weight)
        for (peer, member_index, payload, contribution), weight in zip(included, weights, strict=True)
    )
    ranks = compute_ranks(roster, round)
    return Proposal(
        round=round,
        proposer=ranks[0],
        epoch=roster.epoch,
        nonce=roster.nonce,
        base=base,
        new_base=NO_DIGEST,
        prev_root=previous.root if previous else NO_DIGEST,
        root=merkle.compute_root(leaves).digest,
        updates=updates,
        reveals=reveals,
        leaves=to_wire(leaves),
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
    updates = tuple(Weighted(update.payload, update.weight) for update in draft.updates)
    if not any(update.weight for update in updates):
        return None
    return Merge(request=draft_digest(draft), base=draft.base, updates=updates)


def draft_digest(proposal: Proposal) -> Digest:
    """What a proposal is known by before its new base is: the same for its proposer and whoever recomputes it."""
    return compute_digest(encode(msgspec.structs.replace(proposal, new_base=NO_DIGEST)))


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
    seen: set[MemberIndex] = set()
    num_late = 0
    for reveal in reveals:
        if reveal.round != round or reveal.member not in roster.committee or reveal.member in seen:
            raise Reject(f"reveal of member {reveal.member} is of another round, no committee member's, or twice there")
        seen.add(reveal.member)
        commitment = compute_commitment(reveal)
        if commitment not in commitments.get(reveal.member, ()):
            if commitment not in late.get(reveal.member, ()):
                raise Reject(f"reveal of member {reveal.member} does not match a commitment known here")
            num_late += 1
        validate_scores(reveal.scores, len(roster.members))
    needed = compute_quorum(len(roster.committee))
    if len(seen) < needed:
        raise Reject(f"expected reveals of at least {needed} committee members, got {len(seen)}")
    if 2 * num_late >= len(seen):
        raise Reject(f"{num_late} of {len(seen)} members committed here only after vectors were public")


def validate_scores(scores: Sequence[Score], num_members: int) -> None:
    """Sorted by payload, none twice, at most one a member (or a few could swell a proposal over its limit).

    Raises: Reject.
    """
    if len(scores) > num_members:
        raise Reject(f"scores {len(scores)} updates, but there are {num_members} members")
    if any(a.payload >= b.payload for a, b in itertools.pairwise(scores)):
        raise Reject("scores are not sorted by payload digest, or one payload is scored twice")


def validate_proposal(proposal: Proposal, expected: Proposal) -> None:
    """Compare a received proposal with the recomputed draft, field by field (all but `new_base`).

    Raises:
        Reject: names the first field that differs.
    """
    for name in Proposal.__struct_fields__:
        if name != "new_base" and getattr(proposal, name) != getattr(expected, name):
            raise Reject(f"proposal of round {proposal.round}: field {name!r} differs from what its reveals give here")


def _compute_next_leaves(
    config: NetworkConfig,
    roster: Roster,
    previous: Proposal | None,
    round: Round,
    measured: Mapping[MemberIndex, Contribution],
) -> tuple[LeafValue, ...]:
    leaves = from_wire(previous.leaves) if previous else ()
    last_round = previous.round if previous else Round(-1)
    return compute_leaves(
        leaves,
        measured,
        num_members=len(roster.members),
        pool=config.pool_per_epoch(),
        is_payout=is_payout_round(round, last_round, config.settlement.rounds_per_epoch),
        is_epoch_start=compute_sums(leaves).reward_wei > 0,
    )
