"""Contributions into merge weights, rewards and the 32 bytes that members sign. Pure integers.

Everything here is recomputed by every member and compared byte for byte; wei are rounded once, in `compute_leaves`.
Knows no signature scheme, socket or clock.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from eth_hash.auto import keccak

from p2pfm.config import ChainConfig
from p2pfm.messages import Certificate, Leaf, Proposal, ScoreReveal, proposal_digest, wei_from_wire, wei_to_wire
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue, Submission, Sums
from p2pfm.types import WEIGHT_ONE, Contribution, Digest, MemberIndex, Round, Wei, Weight

Number = TypeVar("Number", bound=int)

CONTRIBUTION_MAX = 2**60
"""An epoch's accumulated contribution saturates here: the wire's bound [nano-nats]."""

NOBODY: Mapping[MemberIndex, Wei] = {}

NOTHING = LeafValue(Wei(0), Wei(0), 0)
"""Of a member that the tree before had no leaf for."""

ROUND_TYPEHASH = keccak(
    b"Round(uint256 chainId,address federation,uint32 epoch,uint32 nonce,uint48 round,bytes32 prevRoot,bytes32 root,"
    b"uint32 numLeaves,uint128 cumulative,uint128 reward,uint128 contribution,bytes32 data,bytes32 base)"
)


def compute_median(values: Sequence[Number]) -> Number:
    """The lower median: an element of `values`, the smaller of the middle two. Raises: ValueError if empty."""
    if not values:
        raise ValueError("expected at least one value")
    return sorted(values)[(len(values) - 1) // 2]


def compute_weights(contributions: Sequence[int]) -> tuple[Weight, ...]:
    """Merge weights proportional to max(0, contribution), by largest remainder; ties go to the lower position.

    They sum to WEIGHT_ONE exactly, or all are 0 when no contribution is positive.
    """
    positive = [max(0, value) for value in contributions]
    total = sum(positive)
    if total == 0:
        return tuple(Weight(0) for _ in positive)
    weights = [value * WEIGHT_ONE // total for value in positive]
    by_remainder = sorted(range(len(positive)), key=lambda i: (-(positive[i] * WEIGHT_ONE % total), i))
    for position in by_remainder[: WEIGHT_ONE - sum(weights)]:
        weights[position] += 1
    return tuple(Weight(weight) for weight in weights)


def is_payout_round(round: Round, last_round: Round, rounds_per_epoch: int) -> bool:
    """Whether a round pays: a settlement epoch's end lies after the last certified round (-1: none) and not after it.

    A void last round so defers the payment, and does not lose it.
    """
    return (round + 1) // rounds_per_epoch > (last_round + 1) // rounds_per_epoch


def compute_reward(pool: Wei, contribution: int, sum_positive: int) -> Wei:
    """The floor rule: floor(pool * max(0, contribution) / sum of all positive ones), 0 if that sum is 0 [wei]."""
    return Wei(pool * max(0, contribution) // sum_positive) if sum_positive else Wei(0)


def compute_leaves(
    previous: tuple[LeafValue, ...],
    contributions: Mapping[MemberIndex, int],
    num_members: int,
    pool: Wei,
    is_payout: bool,
    is_epoch_start: bool,
    served: Mapping[MemberIndex, Wei] = NOBODY,
) -> tuple[LeafValue, ...]:
    """The next rewards tree's leaves, one a registered member, in registry order.

    A leaf's contribution accumulates over the epoch (from 0 at `is_epoch_start`), saturating at +-CONTRIBUTION_MAX. At
    `is_payout`, reward = floor(pool * max(0, Phi_i) / sum of max(0, Phi)); in other rounds it is 0; the cumulative sum
    grows by it. The rewards never exceed `pool`, and fall short of it by less than one wei a member (or pay nothing
    when nobody's contribution is positive). What is given for serving saturates, too: no sum on chain bounds it.

    Args:
        served: what each is given for serving (`compute_served`).

    Raises:
        ValueError: fewer members than before, or a contribution of somebody who is not registered.
    """
    if num_members < len(previous):
        raise ValueError(f"expected at least {len(previous)} members (a registry never shrinks), got {num_members}")
    strangers = sorted(index for index in {*contributions, *served} if not 0 <= index < num_members)
    if strangers:
        raise ValueError(f"expected registry indices below {num_members}, got {strangers}")
    totals: list[int] = []
    for position in range(num_members):
        is_carried = position < len(previous) and not is_epoch_start
        total = (previous[position].contribution if is_carried else 0) + contributions.get(MemberIndex(position), 0)
        totals.append(max(-CONTRIBUTION_MAX, min(CONTRIBUTION_MAX, total)))
    divisor = sum(max(0, total) for total in totals)
    leaves = []
    for position, total in enumerate(totals):
        reward = compute_reward(pool, total, divisor) if is_payout else 0
        before = previous[position] if position < len(previous) else NOTHING
        given = served.get(MemberIndex(position), 0)
        leaves.append(
            LeafValue(
                Wei(before.cumulative_wei + reward),
                Wei(reward),
                total,
                Wei(min(merkle.AMOUNT_MAX, before.served_wei + given)),
            )
        )
    return tuple(leaves)


def compute_served_epoch(round: Round, rounds_per_epoch: int) -> int | None:
    """Whose receipts a round pays that ends a settlement epoch: the epoch before that one; None: there is none.

    Receipts of the epoch that ends are still on their way.
    """
    epoch = (round + 1) // rounds_per_epoch - 2
    return epoch if epoch >= 0 else None


def compute_served(reveals: Sequence[ScoreReveal], pool: Wei) -> dict[MemberIndex, Wei]:
    """What each member is given for serving: floor(pool * share), with the lower median of the shares revealed for it.

    Whom half of the committee or fewer name gets nothing. Medians of vectors that differ may add up to more than a
    whole: then they are cut down in proportion.
    """
    named = sorted({service.member for reveal in reveals for service in reveal.served})
    by_member = [{service.member: service.share for service in reveal.served} for reveal in reveals]
    shares = {member: compute_median([known.get(member, 0) for known in by_member]) for member in named}
    whole = max(WEIGHT_ONE, sum(shares.values()))
    return {member: Wei(pool * share // whole) for member, share in shares.items() if share}


def compute_sums(leaves: Sequence[LeafValue]) -> Sums:
    """Totals over the leaves; of the contributions only the positive ones count."""
    return Sums(
        Wei(sum(leaf.cumulative_wei for leaf in leaves)),
        Wei(sum(leaf.reward_wei for leaf in leaves)),
        sum(max(0, leaf.contribution) for leaf in leaves),
    )


def to_wire(leaves: Sequence[LeafValue]) -> tuple[Leaf, ...]:
    """The leaves as a proposal carries them."""
    return tuple(
        Leaf(
            wei_to_wire(leaf.cumulative_wei),
            wei_to_wire(leaf.reward_wei),
            Contribution(leaf.contribution),
            wei_to_wire(leaf.served_wei),
        )
        for leaf in leaves
    )


def from_wire(leaves: Sequence[Leaf]) -> tuple[LeafValue, ...]:
    """Inverse of `to_wire`."""
    return tuple(
        LeafValue(
            wei_from_wire(leaf.cumulative_wei),
            wei_from_wire(leaf.reward_wei),
            leaf.contribution,
            wei_from_wire(leaf.served_wei),
        )
        for leaf in leaves
    )


def round_message(
    chain: ChainConfig,
    *,
    epoch: int,
    nonce: int,
    round: Round,
    prev_root: Digest,
    root: Digest,
    num_leaves: int,
    sums: Sums,
    data_digest: Digest,
    base: Digest,
) -> Digest:
    """The 32 bytes that committee members sign: exactly what the contract rebuilds from a submission.

    keccak256 over 32-byte words; binds chain, contract, committee epoch and restart nonce, so that a signature is good
    for one round of one federation only.
    """
    words = (chain.chain_id, int(chain.federation, 16), epoch, nonce, round)
    totals = (sums.cumulative_wei, sums.reward_wei, sums.contribution)
    return Digest(
        keccak(
            ROUND_TYPEHASH
            + b"".join(word.to_bytes(32, "big") for word in words)
            + prev_root
            + root
            + num_leaves.to_bytes(32, "big")
            + b"".join(total.to_bytes(32, "big") for total in totals)
            + data_digest
            + base
        )
    )


def proposal_message(chain: ChainConfig, proposal: Proposal) -> Digest:
    """`round_message` of a proposal: what an attestation signs."""
    known: dict[ChainConfig, Digest] = proposal.__dict__.setdefault("_messages", {})
    if chain not in known:
        known[chain] = round_message(
            chain,
            epoch=proposal.epoch,
            nonce=proposal.nonce,
            round=proposal.round,
            prev_root=proposal.prev_root,
            root=proposal.root,
            num_leaves=len(proposal.leaves),
            sums=compute_sums(from_wire(proposal.leaves)),
            data_digest=proposal_digest(proposal),
            base=proposal.new_base,
        )
    return known[chain]


def submission_message(chain: ChainConfig, submission: Submission) -> Digest:
    """`round_message` of a submission: what its signature must be of."""
    return round_message(
        chain,
        epoch=submission.epoch,
        nonce=submission.nonce,
        round=submission.round,
        prev_root=submission.prev_root,
        root=submission.root,
        num_leaves=submission.num_leaves,
        sums=submission.sums,
        data_digest=submission.data_digest,
        base=submission.base,
    )


def make_submission(certificate: Certificate) -> Submission:
    """The transaction that settles a certified round.

    Raises:
        ValueError: the proposal's root is not the root of its leaves, so no claim against it could ever succeed.
    """
    proposal = certificate.proposal
    tree = merkle.compute_root(from_wire(proposal.leaves))
    if tree.digest != proposal.root:
        raise ValueError(f"expected root {tree.digest.hex()} of the proposal's leaves, got {proposal.root.hex()}")
    return Submission(
        round=proposal.round,
        epoch=proposal.epoch,
        nonce=proposal.nonce,
        prev_root=proposal.prev_root,
        root=proposal.root,
        num_leaves=len(proposal.leaves),
        sums=tree.sums,
        data_digest=proposal_digest(proposal),
        base=proposal.new_base,
        absent=certificate.absent,
        signature=certificate.signature,
    )
