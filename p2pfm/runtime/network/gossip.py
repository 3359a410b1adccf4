"""py-libp2p 0.8.1's GossipSub for one topic, with its doors closed: readers survive any bytes.

Each subclass overrides the one place where the measured fault lies (NETWORK, "Gossip"). Hands messages to a callback
and tells a `Blame` callback who broke which rule.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import trio
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import MessageTooLarge
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.validators import signature_validator
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from p2pfm.runtime.network.host import GuardedHost, GuardedTasks
from p2pfm.runtime.network.limits import Blame, RuleBroken, TokenBucket, TransportLimits

log = logging.getLogger(__name__)


class GuardedRouter(GossipSub):  # type: ignore[misc]
    """GossipSub 1.1 without the features that punish honest forwarders."""

    def __init__(self, limits: TransportLimits) -> None:
        super().__init__(
            protocols=[PROTOCOL_ID_V11],
            degree=6,
            degree_low=4,
            degree_high=limits.connections_max,  # below the number of connections, pruning isolates nodes
            heartbeat_interval=1,
            prune_back_off=5,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,
        )

    @property
    def manager(self) -> Any:
        """The service's tasks, guarded."""
        return GuardedTasks(self._manager)

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        """Forward to the mesh. The stock method adds a signed address record to every copy, which costs more than
        the message, and files state under topics that strangers choose."""
        self.mcache.put(pubsub_msg)
        msg_id = self.pubsub.get_message_id(pubsub_msg)
        rpc = rpc_pb2.RPC(publish=[pubsub_msg])
        for peer_id in self._get_peers_to_send(
            pubsub_msg.topicIDs, msg_forwarder=msg_forwarder, origin=ID(pubsub_msg.from_id), msg_id=msg_id
        ):
            self.send_rpc(peer_id, rpc)


class GuardedPubsub(Pubsub):  # type: ignore[misc]
    """Pubsub for one topic, whose readers survive any bytes and hand messages to `deliver`.

    `gate` judges the payload before it is delivered or forwarded: True lets it pass, False blames the forwarder (an
    honest one has the same gate). There are no topic validators: one that raises ends a stock node, and one that says
    no is remembered for 300 s against a message that may only have come too early.
    """

    def __init__(
        self,
        host: GuardedHost,
        topic: str,
        limits: TransportLimits,
        blame: Blame,
        deliver: Callable[[str, bytes], None],
        gate: Callable[[bytes], bool],
    ) -> None:
        super().__init__(
            host,
            GuardedRouter(limits),
            strict_signing=True,
            allowed_topics={topic},
            max_subscriptions_per_rpc=16,
            max_subscriptions_per_peer=1,
        )
        # Message ids are author + this counter. The stock one starts at the time in seconds, so that a node which is
        # restarted within the seen-cache's 120 s repeats its numbers and is not heard.
        self.counter = time.time_ns()
        self._topic = topic
        self._limits = limits
        self._blame = blame
        self._deliver = deliver
        self._gate = gate
        self._buckets: OrderedDict[bytes, TokenBucket] = OrderedDict()
        self.dropped: Counter[str] = Counter()

    @property
    def manager(self) -> Any:
        """The service's tasks, guarded."""
        return GuardedTasks(self._manager)

    async def stream_handler(self, stream: Any) -> None:
        """Read one peer's gossip until its stream ends, whatever it sends."""
        peer_id = stream.muxed_conn.peer_id
        try:
            await self.continuously_read_stream(stream)
        except (RuleBroken, MessageTooLarge, ParseError) as error:
            self._blame(str(peer_id), f"gossip: {error}")
        except Exception as error:  # noqa: BLE001 - strangers' protobuf; ends a stock host with one packet
            log.debug("gossip stream of %s ended with %r", peer_id, error)
        with trio.move_on_after(1.0):
            await stream.reset()
        self._handle_dead_peer(peer_id)

    async def continuously_read_stream(self, stream: Any) -> None:
        """Messages of our topic, subscriptions, and control entries about our topic; nothing else enters."""
        peer_id = stream.muxed_conn.peer_id
        while True:
            data = await read_varint_prefixed_bytes_limited(stream, self.max_inbound_rpc_size)
            rpc = rpc_pb2.RPC()
            try:
                rpc.ParseFromString(data)
            except Exception as error:  # protobuf's own error classes differ between its back ends
                raise RuleBroken("a gossip frame that is no protobuf") from error
            rpc.ClearField("senderRecord")  # addresses of strangers, verified anew with every message
            for subscription in rpc.subscriptions[: self.max_subscriptions_per_rpc]:
                self.handle_subscription(peer_id, subscription)
            for message in rpc.publish:
                if list(message.topicIDs) == [self._topic]:
                    await self.push_msg(peer_id, message)
                else:
                    self.dropped["topic"] += 1
            if rpc.HasField("control"):
                self._keep_own_topic(rpc.control)
                await self.router.handle_rpc(rpc, peer_id)

    def _keep_own_topic(self, control: rpc_pb2.ControlMessage) -> None:
        # State by topic grows for ever in the router; keep only entries about the one topic there is.
        lists: tuple[Any, ...] = (control.ihave, control.graft, control.prune)
        for entries in lists:
            kept = [entry for entry in entries if entry.topicID == self._topic]
            del entries[:]
            entries.extend(kept[:16])

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Check, deliver and forward one message, each at most once. No checkpoint between the check and the mark, so
        that two forwarders of one message cannot both pass."""
        is_own = msg_forwarder == self.my_id
        if not is_own and not self._is_admitted(msg_forwarder, msg):
            return
        self._mark_msg_seen(msg)
        if not is_own:
            self._deliver(str(msg_forwarder), msg.data)
        await self.router.publish(msg_forwarder, msg)

    def _is_admitted(self, forwarder: ID, msg: rpc_pb2.Message) -> bool:
        name = str(forwarder)
        if not msg.from_id or not msg.seqno or len(msg.seqno) > 16 or len(msg.from_id) > 64:
            self._blame(name, "a gossip message without author or number")
        elif len(msg.data) > self._limits.gossip_bytes_max:
            self._blame(name, f"a gossip message of {len(msg.data)} bytes")
        elif self._is_msg_seen(msg) or ID(msg.from_id) == self.my_id:
            self.dropped["seen"] += 1
        elif self._is_too_fast(b"from " + forwarder.to_bytes(), self._limits.forwarder_burst_max):
            self.dropped["rate"] += 1
        elif not self._is_signed(msg):
            self._blame(name, "a gossip message whose signature is not its author's")
        elif self._is_too_fast(b"by " + msg.from_id, self._limits.author_burst_max):
            self.dropped["rate"] += 1
        elif not self._gate(msg.data):
            self._mark_msg_seen(msg)
            self._blame(name, "forwarded a message that every honest peer rejects")
        else:
            return True
        return False

    def _is_too_fast(self, sender: bytes, burst: int) -> bool:
        bucket = self._buckets.get(sender)
        if bucket is None:
            bucket = self._buckets[sender] = TokenBucket(burst, burst / 2)
            if len(self._buckets) > self._limits.known_peers_max:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(sender)
        return bucket.take(trio.current_time()) > 0

    def _is_signed(self, msg: rpc_pb2.Message) -> bool:
        try:
            return bool(signature_validator(msg))
        except Exception:  # noqa: BLE001 - a bad key raises anything in here, and ends a stock host
            return False

    async def _handle_new_peer(self, peer_id: ID) -> None:
        await super()._handle_new_peer(peer_id)
        queue = self.peer_queues.get(peer_id)
        if queue is not None:
            queue._queue.max_size = self._limits.peer_queue_max

    def _handle_dead_peer(self, peer_id: ID) -> None:
        try:
            super()._handle_dead_peer(peer_id)
        except Exception:
            log.debug("forgetting %s failed", peer_id, exc_info=True)
