"""What a node tells Prometheus of itself, but for serving, whose metrics are in `gateway`.

What is a state of other parts is read from them when somebody asks; what happens is counted when it happens. The page
docs/guides/watching-a-node.md lists all of it.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import trio
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from p2pfm.messages import Message, ShardMessage, peek_tag
from p2pfm.protocol.phases import Level, compute_position
from p2pfm.runtime.clock import now_ms
from p2pfm.runtime.network.blobs import Priority
from p2pfm.types import NANO, Millis, PeerId

if TYPE_CHECKING:
    from p2pfm.runtime.node import Node

FETCH_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
IN, OUT = "in", "out"


class Requester(Protocol):
    """What of a transport is metered."""

    async def request(self, peer: PeerId, data: bytes, timeout_s: float) -> bytes:
        """One request, one reply."""
        ...

    def blame(self, peer: PeerId, reason: str) -> None:
        """A peer broke a rule."""
        ...


class NodeMetrics:
    """Counters of what happens to a node."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.events = Counter("p2pfm_events", "Events handled by the core", ["kind"], registry=registry)
        self.core_failures = Counter(
            "p2pfm_core_failures", "Events on which the core raised: each is a bug, see the log", registry=registry
        )
        self._messages = Counter(
            "p2pfm_messages", "Messages, requests and replies by kind", ["direction", "kind"], registry=registry
        )
        self._message_bytes = Counter("p2pfm_message_bytes", "Their bytes", ["direction", "kind"], registry=registry)
        self._fetch_seconds = Histogram(
            "p2pfm_fetch_seconds",
            "From asking for a blob until it was whole",
            ["priority"],
            buckets=FETCH_SECONDS,
            registry=registry,
        )
        self._fetched_bytes = Counter("p2pfm_fetched_bytes", "Bytes of whole blobs", ["priority"], registry=registry)
        ProcessCollector(registry=registry)
        self.on_round_trip: Callable[[PeerId, float], None] = lambda peer, round_trip_ms: None
        """Told how long a peer took to answer each small request."""

    def on_fetched(self, priority: Priority, seconds: float, size: int) -> None:
        """A blob has come whole."""
        self._fetch_seconds.labels(priority.name.lower()).observe(seconds)
        self._fetched_bytes.labels(priority.name.lower()).inc(size)

    def on_gossip(self, direction: str, message: Message, num_bytes: int) -> None:
        """A message was heard and is genuine, or is published."""
        is_in_shard = isinstance(message, ShardMessage)
        word = message.message if isinstance(message, ShardMessage) else message
        kind = word.__struct_config__.tag
        self._count(direction, f"shard {kind}" if is_in_shard else kind, num_bytes)

    def on_frame(self, direction: str, data: bytes) -> None:
        """A request or reply, as it travels."""
        self._count(direction, peek_tag(data), len(data))

    def _count(self, direction: str, kind: object, num_bytes: int) -> None:
        self._messages.labels(direction, str(kind)).inc()
        self._message_bytes.labels(direction, str(kind)).inc(num_bytes)


SMALL_BYTES_MAX = 4096
"""Of a request and its reply, to tell how long the way is and not how wide."""


class MeteredRequests:
    """A transport's requests, counted by kind."""

    def __init__(self, transport: Requester, metrics: NodeMetrics) -> None:
        self._transport = transport
        self._metrics = metrics

    async def request(self, peer: PeerId, data: bytes, timeout_s: float) -> bytes:
        """As the transport's."""
        self._metrics.on_frame(OUT, data)
        asked_s = trio.current_time()
        reply = await self._transport.request(peer, data, timeout_s)
        if len(data) + len(reply) <= SMALL_BYTES_MAX:
            self._metrics.on_round_trip(peer, (trio.current_time() - asked_s) * 1000)
        self._metrics.on_frame(IN, reply)
        return reply

    def blame(self, peer: PeerId, reason: str) -> None:
        """As the transport's."""
        self._transport.blame(peer, reason)


class NodeState(Collector):
    """The present state of a node, read when Prometheus asks."""

    def __init__(self, node: "Node") -> None:
        self._node = node

    def describe(self) -> list[Metric]:
        """Nothing: the node is not whole yet when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every gauge, and the transport's counters."""
        now = now_ms()
        yield from self._collect_round(now)
        yield from self._collect_network()
        yield from self._collect_queues()

    def _collect_round(self, now: Millis) -> Iterator[Metric]:
        node = self._node
        peer = node.peer
        if peer is None:
            return
        head = peer.durable.head.proposal.round if peer.durable.head else -1
        shard = peer.leaf.shard
        settled = node.settler.head.round if node.settler.head else -1
        due_ms = node.effects.due_ms
        overdue_ms = 0 if due_ms is None else max(0, now - due_ms)
        network = node.config.network
        position, above = (compute_position(network, now, level) for level in Level)
        yield _gauge("p2pfm_round", "Round this node is in", peer.round)
        yield _gauge("p2pfm_shard", "Number of this node's shard; -1: none", -1 if shard is None else shard)
        yield _gauge("p2pfm_top_phase", "Phase above the shards, else the round's own", int(above.phase))
        yield _gauge("p2pfm_phase", "Phase of the round: 0 TRAIN to 5 MERGE", int(position.phase))
        yield _gauge("p2pfm_certified_round", "Newest certified round held here; -1: none", head)
        lag = max(0, position.round - 1 - max(head, -1))
        yield _gauge("p2pfm_round_lag", "Rounds that have ended since the newest certified one", lag)
        yield _gauge("p2pfm_timer_overdue_seconds", "How late the core is for what it must do now", overdue_ms / 1000)
        yield _gauge("p2pfm_settled_round", "Newest round on chain that is known here; -1: none", settled)
        yield _gauge("p2pfm_chain_lag_rounds", "Certified rounds that are not on chain", max(0, head - settled))
        yield _gauge("p2pfm_chain_up", "1: the last question to the chain was answered", not node.settler.chain_error)
        loss = peer.losses[max(peer.losses)] / NANO if peer.losses else math.nan
        yield _gauge("p2pfm_held_out_loss_nats", "Held-out loss at the newest evaluated base; NaN: none", loss)

    def _collect_network(self) -> Iterator[Metric]:
        node = self._node
        yield _gauge("p2pfm_peers", "Connected peers", len(node.transport.connected()))
        yield _gauge("p2pfm_banned_peers", "Peers that are banned now", node.transport.num_banned)
        yield _gauge("p2pfm_download_memory_bytes", "Held by blobs that have not come whole", node.downloads.held_bytes)
        offset_ms = node.clock.offset_ms
        yield _gauge(
            "p2pfm_clock_offset_seconds",
            "How far this machine's clock is ahead of the peers'; NaN: nobody told",
            math.nan if offset_ms is None else offset_ms / 1000,
        )
        network = CounterMetricFamily(
            "p2pfm_network", "The transport's counters: bytes, messages, drops, dials, blames", labels=["what"]
        )
        for name, value in sorted(node.transport.counters.items()):
            network.add_metric([name], value)
        yield network
        heard = CounterMetricFamily("p2pfm_topic_messages", "New messages of other peers, by topic", labels=["topic"])
        for topic, count in sorted(node.transport.heard.items()):
            heard.add_metric([topic], count)
        yield heard

    def _collect_queues(self) -> Iterator[Metric]:
        queues = GaugeMetricFamily("p2pfm_queue_length", "What waits", labels=["queue"])
        for name, length in (("core", self._node.num_events_waiting), *self._node.transport.get_queues().items()):
            queues.add_metric([name], length)
        yield queues


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=float(value))
