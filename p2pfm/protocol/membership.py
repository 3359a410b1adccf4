"""Who a peer id is in the registry, and what it counts for. Pure look-ups on one Roster."""

from p2pfm.messages import Proposal
from p2pfm.settlement.ledger import EPOCH_LAG_MAX, Member, Roster
from p2pfm.settlement.rewards import compute_weights
from p2pfm.types import MemberIndex, PeerId, Round, Wei, Weight


def get_member(roster: Roster, peer: PeerId) -> Member | None:
    """The active member with this peer id."""
    return roster.by_peer.get(peer)


def get_peer(roster: Roster, index: MemberIndex) -> PeerId | None:
    """The peer id at a registry index."""
    member = roster.by_index.get(index)
    return member.peer if member else None


def is_outdated_for(roster: Roster, proposal: Proposal) -> bool:
    """The chain takes it no more: it has slashed or restarted since, or the committee is too old, or dead."""
    return proposal.nonce < roster.nonce or proposal.epoch < max(roster.epoch_min, roster.epoch - EPOCH_LAG_MAX)


def compute_shares(roster: Roster, stake_cap: Wei) -> dict[PeerId, Weight]:
    """The scoring game's fixed weights p_i: capped stake, normalised over all active members (sum WEIGHT_ONE).

    Fixed by the registry before anyone trains, so that nobody's absence or presence moves another's weight.
    """
    active = [member for member in roster.members if member.active]
    weights = compute_weights([min(member.stake, stake_cap) for member in active])
    return {member.peer: weight for member, weight in zip(active, weights, strict=True)}


def compute_ranks(roster: Roster, round: Round) -> tuple[MemberIndex, ...]:
    """The committee from the first-ranked member on; the rank rotates, so a dead proposer costs one round."""
    size = len(roster.committee)
    return tuple(roster.committee[(round + i) % size] for i in range(size))
