"""What a node tells people of itself: /status, and the bytes of each round.

Reads other parts' public state; changes nothing.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from p2pfm.messages import MICRO, PICO, DeclaredPrivacy
from p2pfm.protocol.ballot import Ballot
from p2pfm.protocol.events import AnyEvent, Trained
from p2pfm.protocol.membership import get_member
from p2pfm.protocol.peer import Peer
from p2pfm.protocol.phases import Level, Phase, compute_position, get_durations
from p2pfm.protocol.place import NO_SHARD
from p2pfm.runtime.endpoints import name_endpoint
from p2pfm.settlement.rewards import NOTHING, from_wire
from p2pfm.types import NANO, Millis, Round

if TYPE_CHECKING:
    from p2pfm.runtime.node import Node

ROUNDS_MAX = 256
"""Rounds whose figures are kept for /status."""

SENT = ("gossip_bytes_out", "request_bytes_out")
"""The transport's counters that make up the bytes sent."""


class RoundFigures:
    """Bytes, training loss and payload of each round, as this node saw them."""

    def __init__(self) -> None:
        self.by_round: dict[Round, dict[str, int]] = {}
        self.epsilon: float | None = None
        """What training has cost of the samples' privacy so far; None: unknown, or nothing bounds it."""
        self._before: Counter[str] = Counter()

    def on_event(self, round: Round, event: AnyEvent, counters: Mapping[str, int]) -> None:
        """Note what happened in `round`, and what has been sent in it so far."""
        figures = self.by_round.get(round)
        if figures is None:
            self._before = Counter(counters)
            figures = self.by_round[round] = {}
            for old in sorted(self.by_round)[:-ROUNDS_MAX]:
                del self.by_round[old]
        figures["sent_bytes"] = sum(counters.get(name, 0) - self._before[name] for name in SENT)
        if isinstance(event, Trained):
            figures["payload_bytes"] = event.payload_bytes
            figures["num_tokens"] = event.num_tokens
            if event.loss_nano is not None:
                figures["train_loss_nano"] = event.loss_nano
            self.epsilon = None if event.privacy is None else event.privacy.epsilon_micro / MICRO


def make_status(node: "Node", now_ms: Millis) -> dict[str, Any]:
    """What `/status` shows; JSON-able. Secrets never come here."""
    network = node.config.network
    level = _get_level(node, now_ms)
    position = compute_position(network, now_ms, level)
    status: dict[str, Any] = {
        "peer": node.keys.peer,
        "account": node.keys.account_address,
        "network": {"name": network.name, "id": node.network_id.hex(), "backbone": network.backbone},
        "stage": node.stage,
        "round": position.round,
        "level": level.name if network.has_shards else None,
        "phase": position.phase.name,
        "phase_ends_in_ms": position.ends_ms - now_ms,
        "phases_ms": {phase.name: ms for phase, ms in zip(Phase, get_durations(network, level), strict=True)},
        "addresses": list(node.transport.addresses()),
        "peers": list(node.transport.connected()),
        "reach": node.transport.reach(),
        "traffic": dict(sorted(node.transport.counters.items())),
        "clock": node.clock.to_status(),
        "chain": _chain_status(node),
    }
    if node.config.privacy.enabled:
        privacy = node.config.privacy
        status["privacy"] = {
            "epsilon": node.figures.epsilon,
            "delta": privacy.delta,
            "epsilon_max": privacy.epsilon_max or None,
        }
    if node.personal is not None:
        status["personal"] = {"round": node.personal.round, "losses_nats": node.personal.losses}
    if node.peer is not None:
        status["protocol"] = _protocol_status(node)
        status["rewards"] = _rewards_status(node)
        status["serving"] = _serving_status(node, now_ms)
    return status


def _get_level(node: "Node", now_ms: Millis) -> Level:
    """The level at which something happens now: the shards' last phase goes on while the level above is at work."""
    network = node.config.network
    is_at_top = network.has_shards and compute_position(network, now_ms, Level.TOP).phase > Phase.TRAIN
    return Level.TOP if is_at_top else Level.SHARD


def _get_ballot(peer: Peer) -> Ballot:
    return peer.top if peer.top.state.phase > Phase.TRAIN else peer.leaf


def _describe_wait(ballot: Ballot) -> str:
    """What must come next, for a person."""
    state = ballot.state
    updates, size = state.updates, len(state.roster.committee) if state.roster else 0
    if state.round < 0 or state.is_certified:
        return "the level above" if state.is_certified and ballot.shard is not None else "the next round"
    if state.phase == Phase.MERGE and state.failure:
        return f"the next round: {state.failure}"
    if (state.phase >= Phase.ATTEST and ballot.get_my_index() is None) or ballot.is_outside():
        return "the certificate"
    match state.phase:
        case Phase.TRAIN:
            return f"announcements: {len(updates.announcements)} heard"
        case Phase.EXCHANGE:
            return f"payloads: {len(updates.makers)} of {len(updates.announcements)} are here"
        case Phase.SCORE:
            return f"commitments: {len(state.commitments)} of {size}"
        case Phase.REVEAL:
            return f"vectors: {len(state.reveals)} of {size}"
        case Phase.ATTEST | Phase.MERGE:
            return f"signatures: {len(state.attestations)} of {size}" if state.proposal else "the proposal"


def _chain_status(node: "Node") -> dict[str, Any]:
    settler, chain = node.settler, node.config.network.chain
    member = get_member(settler.roster, node.keys.peer) if settler.roster else None
    return {
        "chain_id": chain.chain_id,
        "federation": chain.federation,
        "rpc": name_endpoint(node.config.rpc),
        "error": settler.chain_error,
        "member": member.index if member else None,
        "members": len(settler.roster.members) if settler.roster else 0,
        "committee": list(settler.roster.committee) if settler.roster else [],
        "settled_round": settler.head.round if settler.head else None,
        "findings": list(node.auditor.findings),
    }


def _rewards_status(node: "Node") -> dict[str, str | None]:
    """What the newest certificate allots this node over all rounds, for learning and for serving, and what it has
    drawn; None: the chain has not told."""
    assert node.peer is not None, "asked only of a running node"
    settler, head = node.settler, node.peer.durable.head
    member = get_member(settler.roster, node.keys.peer) if settler.roster else None
    leaves = from_wire(head.proposal.leaves) if head else ()
    # a newcomer has no leaf yet
    leaf = leaves[member.index] if member is not None and member.index < len(leaves) else NOTHING
    return {
        "allotted_wei": str(leaf.cumulative_wei),
        "claimed_wei": None if settler.claimed is None else str(settler.claimed),
        "served_wei": str(leaf.served_wei),
        "claimed_served_wei": None if settler.claimed_served is None else str(settler.claimed_served),
    }


def _serving_status(node: "Node", now_ms: Millis) -> dict[str, Any]:
    gateway, config = node.gateway, node.config.serving
    return {
        "versions": [version.hex() for version in gateway.versions()],
        "sessions": gateway.num_sessions,
        "sessions_max": config.sessions_max if config.enabled else 0,
        "replicas": sum(bool(state.record.versions) for state in gateway.table.live(now_ms)),
        "generated_tokens": _count(node, "p2pfm_generated_tokens_total"),
        "replaced_replicas": _count(node, "p2pfm_replaced_replicas_total"),
        "rechecked_tokens": _count(node, "p2pfm_rechecked_tokens_total"),
        **node.serving.rechecker.to_status(),
        "receipts": node.serving.receipts.to_status(),
    }


def _count(node: "Node", name: str) -> int:
    """A counter of /metrics."""
    return int(node.registry.get_sample_value(name) or 0)


def _declared(privacy: DeclaredPrivacy | None) -> dict[str, float]:
    """A peer's own word on its privacy; nothing where it gave none."""
    if privacy is None:
        return {}
    return {"epsilon": privacy.epsilon_micro / MICRO, "delta": privacy.delta_pico / PICO}


def _protocol_status(node: "Node") -> dict[str, Any]:
    assert node.peer is not None, "asked only of a running node"
    durable = node.peer.durable
    head = durable.head
    return {
        "shard": node.peer.leaf.shard if node.peer.leaf.shard != NO_SHARD else None,
        "waits_for": _describe_wait(_get_ballot(node.peer)),
        "base": durable.base.hex(),
        "dense_bytes": node.effects.dense_bytes,
        "certified_round": head.proposal.round if head else None,
        "updates": [
            {
                "peer": update.peer,
                "member": update.member,
                "contribution_nats": update.contribution / NANO,
                "weight": update.weight / NANO,
                **_declared(node.peer.privacy.get(update.peer)),
            }
            for update in (head.proposal.updates if head else ())
        ],
        "absent": list(head.absent) if head else [],
        "cumulative_wei": [str(leaf.cumulative_wei) for leaf in from_wire(head.proposal.leaves)] if head else [],
        "announced_round": durable.announced_round,
        "losses_nats": {str(round): loss / NANO for round, loss in sorted(node.peer.losses.items())},
        "rounds": {str(round): figures for round, figures in sorted(node.figures.by_round.items())},
        "notes": [{"round": round, "text": text} for round, text in node.effects.notes[-20:]],
        "blamed": dict(node.effects.num_blamed),
    }
