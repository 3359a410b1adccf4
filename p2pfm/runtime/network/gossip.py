"""py-libp2p 0.8.1's GossipSub for a few topics, with its doors closed: readers survive any bytes.

Each subclass overrides the one place where the measured fault lies (NETWORK, "Gossip"). Hands messages to a callback
and tells a `Blame` callback who broke which rule.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import PriorityQueue, RpcQueue
from libp2p.pubsub.validators import signature_validator
from libp2p.utils import encode_varint_prefixed

from p2pfm.config import TransportLimits
from p2pfm.runtime.network.frames import end_stream
from p2pfm.runtime.network.host import GuardedHost, GuardedTasks
from p2pfm.runtime.network.limits import Blame, RuleBroken, TokenBucket
from p2pfm.runtime.network.mesh import GuardedRouter

log = logging.getLogger(__name__)

SEEN_S = 120.0
SEEN_MAX = 65_536
READ_BYTES = 64 * 1024
WRITE_BYTES = 48 * 1024  # what waits for a peer is written together, in one frame and one encryption
LENGTH_BYTES_MAX = 5  # of the varint before an RPC
TOPICS_MAX = 4  # that one peer hears: everybody's, its shard's, that of its committee, and the one above the shards
RPC_S = 30.0  # an RPC that has begun must end within this


class Seen:
    """Ids of messages that were seen, for a time and up to a number; the oldest go first.

    The library's cache knows no bound, and has a thread of its own that nobody ends.
    """

    def __init__(self) -> None:
        self._times: OrderedDict[bytes, float] = OrderedDict()

    def has(self, mid: bytes) -> bool:
        """Whether a message of this id was seen lately."""
        seen_at = self._times.get(mid)
        return seen_at is not None and trio.current_time() - seen_at < SEEN_S

    def add(self, mid: bytes) -> None:
        """A message was seen now."""
        now = trio.current_time()
        self._times[mid] = now
        self._times.move_to_end(mid)
        while len(self._times) > SEEN_MAX or now - next(iter(self._times.values())) > SEEN_S:
            self._times.popitem(last=False)


class GuardedPubsub(Pubsub):  # type: ignore[misc]
    """Pubsub for a few topics, whose readers survive any bytes and hand messages to `deliver`.

    The first topic is everybody's. Who hears another one is remembered only while this peer hears it too, or where it
    may have to speak without hearing (`watched`): what strangers name leaves no trace.

    `gate` judges the payload before it is delivered or forwarded: True lets it pass, False blames the forwarder (an
    honest one has the same gate). There are no topic validators: one that raises ends a stock node, and one that says
    no is remembered for 300 s against a message that may only have come too early.
    """

    seen_messages: Any
    allowed_topics: set[str]

    def __init__(
        self,
        host: GuardedHost,
        topic: str,
        limits: TransportLimits,
        blame: Blame,
        deliver: Callable[[str, str, bytes], None],
        gate: Callable[[bytes], bool],
        watched: Iterable[str] = (),
    ) -> None:
        """`deliver` is told the forwarder, the topic and the data of each new message."""
        self.dropped: Counter[str] = Counter()
        """Messages and entries that went no further, by reason, and what lazy gossip asked for and sent again."""
        super().__init__(
            host,
            GuardedRouter(limits, self.dropped),
            strict_signing=True,
            max_subscriptions_per_rpc=16,
            max_subscriptions_per_peer=TOPICS_MAX,
        )
        self.allowed_topics = {topic, *watched}  # a frozen set in the stock one
        self.seen_messages.stop()
        self.seen_messages = Seen()
        # Message ids are author + this counter. The stock one starts at the time in seconds, so that a node which is
        # restarted within the seen-cache's 120 s repeats its numbers and is not heard.
        self.counter = time.time_ns()
        self._topic = topic
        self._watched = frozenset(watched)
        self._limits = limits
        self._blame = blame
        self._deliver = deliver
        self._gate = gate
        self._buckets: OrderedDict[bytes, TokenBucket] = OrderedDict()
        self._reading: dict[ID, trio.CancelScope] = {}
        """By peer, of the one stream that is read."""

    @property
    def manager(self) -> Any:
        """The service's tasks, guarded."""
        return GuardedTasks(self._manager)

    async def stream_handler(self, stream: Any) -> None:
        """Read one peer's gossip until its stream ends, whatever it sends. A further stream takes the former's place:
        each may hold a whole RPC in memory."""
        peer_id = stream.muxed_conn.peer_id
        if former := self._reading.get(peer_id):
            former.cancel()  # to reset its stream would not wake its reader (py-libp2p 0.8.1)
        with trio.CancelScope() as scope:
            self._reading[peer_id] = scope
            try:
                await self.continuously_read_stream(stream)
            except RuleBroken as error:
                self._blame(str(peer_id), f"gossip: {error}")
            except Exception as error:  # noqa: BLE001 - strangers' protobuf; ends a stock host with one packet
                log.debug("gossip stream of %s ended with %r", peer_id, error)
        await end_stream(stream, is_clean=False)
        if self._reading.get(peer_id) is scope:
            del self._reading[peer_id]
            self._handle_dead_peer(peer_id)

    async def continuously_read_stream(self, stream: Any) -> None:
        """Messages of our topics, subscriptions, and control entries about our topics; nothing else enters."""
        buffer = bytearray()
        try:
            await self._read_rpcs(stream, buffer)
        finally:
            buffer.clear()  # the error that ends a stream keeps this frame alive until the next garbage collection

    async def _read_rpcs(self, stream: Any, buffer: bytearray) -> None:
        peer_id = stream.muxed_conn.peer_id
        begun_at = 0.0
        while True:
            while (data := _cut_rpc(buffer, self.max_inbound_rpc_size)) is not None:
                begun_at = 0.0
                await self._read_rpc(peer_id, data)
            begun_at = begun_at or trio.current_time()
            with trio.CancelScope(deadline=begun_at + RPC_S if buffer else float("inf")) as scope:
                chunk = await stream.read(READ_BYTES)
            if scope.cancelled_caught:
                raise RuleBroken("an RPC that stalls")
            if not chunk:
                return
            buffer += chunk

    async def _read_rpc(self, peer_id: ID, data: bytes) -> None:
        rpc = rpc_pb2.RPC()
        try:
            rpc.ParseFromString(data)
        except Exception as error:  # protobuf's own error classes differ between its back ends
            raise RuleBroken("a gossip frame that is no protobuf") from error
        for subscription in rpc.subscriptions[: self.max_subscriptions_per_rpc]:
            self.handle_subscription(peer_id, subscription)
        for position, message in enumerate(rpc.publish):
            if position % 64 == 63:
                await trio.lowlevel.checkpoint()  # an RPC may hold thousands
            if len(message.topicIDs) == 1 and message.topicIDs[0] in self.topic_ids:
                await self.push_msg(peer_id, message)
            else:
                self.dropped["topic"] += 1
        if rpc.HasField("control"):
            await self.router.handle_rpc(rpc, peer_id)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Check, deliver and forward one message, each at most once. No checkpoint between the check and the mark, so
        that two forwarders of one message cannot both pass."""
        is_own = msg_forwarder == self.my_id
        if not is_own and not self._is_admitted(msg_forwarder, msg):
            return
        self._mark_msg_seen(msg)
        if not is_own:
            self._deliver(str(msg_forwarder), msg.topicIDs[0], msg.data)
        await self.router.publish(msg_forwarder, msg)

    def _is_admitted(self, forwarder: ID, msg: rpc_pb2.Message) -> bool:
        name = str(forwarder)
        if not msg.from_id or not msg.seqno or len(msg.seqno) > 16 or len(msg.from_id) > 64:
            self._blame(name, "a gossip message without author or number")
        elif len(msg.data) > self._limits.gossip_bytes_max:
            self._blame(name, f"a gossip message of {len(msg.data)} bytes")
        elif self._is_msg_seen(msg) or ID(msg.from_id) == self.my_id:
            self.dropped["seen"] += 1
        elif self._is_too_fast(b"from " + forwarder.to_bytes(), self._limits.forwarder_burst_max) or self._is_too_fast(
            b"bytes from " + forwarder.to_bytes(), self._limits.forwarder_bytes_max, len(msg.data)
        ):
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

    def _is_too_fast(self, sender: bytes, burst: int, amount: int = 1) -> bool:
        bucket = self._buckets.get(sender)
        if bucket is None:
            bucket = self._buckets[sender] = TokenBucket(burst, burst / 2)
            if len(self._buckets) > self._limits.known_peers_max:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(sender)
        return bucket.take(trio.current_time(), amount) > 0

    def _is_signed(self, msg: rpc_pb2.Message) -> bool:
        try:
            return bool(signature_validator(msg))
        except Exception:  # noqa: BLE001 - a bad key raises anything in here, and ends a stock host
            return False

    async def _handle_new_peer(self, peer_id: ID) -> None:
        await super()._handle_new_peer(peer_id)
        queue = self.peer_queues.get(peer_id)
        if queue is not None:
            stock, queue._queue = queue._queue, _BoundedQueue(self._limits)
            while (rpc := stock.pop()) is not None:
                queue.push(rpc)

    # --- topics ---

    async def listen(self, topics: Collection[str]) -> None:
        """From now on hear these topics beside everybody's, and no others."""
        for topic in sorted(self.topic_ids - {self._topic, *topics}):
            await self.unsubscribe(topic)
            if topic not in self._watched:
                self.allowed_topics.discard(topic)
                for peer_id in tuple(self.peer_topics.get(topic, ())):
                    self._forget_subscription(peer_id, topic)
        for topic in sorted(set(topics) - self.topic_ids):
            self.allowed_topics.add(topic)
            await self.subscribe(topic)

    def handle_subscription(self, origin_id: ID, sub_message: rpc_pb2.RPC.SubOpts) -> None:
        """Who comes to a topic learns that we hear it: when we said so, it may have had no use for it."""
        topic = sub_message.topicid
        was_known = origin_id in self.peer_topics.get(topic, ())
        super().handle_subscription(origin_id, sub_message)
        is_known = origin_id in self.peer_topics.get(topic, ())
        if is_known and not was_known and topic != self._topic and topic in self.topic_ids:
            self.router.send_rpc(origin_id, self._build_announce_rpc(topic, True)[0], priority=True)

    def _build_announce_rpc(self, topic_id: str, subscribe: bool) -> tuple[rpc_pb2.RPC, rpc_pb2.RPC.SubOpts]:
        # Without the address record that the stock method signs.
        entry = rpc_pb2.RPC.SubOpts(subscribe=subscribe, topicid=topic_id)
        return rpc_pb2.RPC(subscriptions=[entry]), entry

    def get_hello_packet(self) -> rpc_pb2.RPC:
        """Our subscriptions, without the address record that the stock method signs."""
        return rpc_pb2.RPC(
            subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic) for topic in self.topic_ids]
        )

    async def handle_sending_messages(self, peer_id: ID, stream: Any, queue: RpcQueue) -> None:
        """Write what waits for one peer until its queue is closed. The stock loop writes each RPC alone."""
        try:
            while (rpc := await queue.pop()) is not None:
                data = encode_varint_prefixed(rpc.SerializeToString())
                while len(data) < WRITE_BYTES and (rpc := queue._queue.pop()) is not None:
                    data += encode_varint_prefixed(rpc.SerializeToString())
                await stream.write(data)
        except Exception as error:  # noqa: BLE001 - the library's streams raise a dozen unrelated classes when they end
            log.debug("sending gossip to %s ended with %r", peer_id, error)
            if self.peers.get(peer_id) is stream:
                self._handle_dead_peer(peer_id)
            await end_stream(stream, is_clean=False)  # or each further one to a slow reader leaks a stream

    def forget_ended(self, peer_id: ID) -> None:
        """Drop the stream to a peer if it ended, or its connection did: while nothing is written nobody notices, and a
        peer that froze and came back on a new connection would stay unheard."""
        stream = self.peers.get(peer_id)
        if stream is None:
            return
        muxed = stream.muxed_stream
        if muxed.closed or muxed.send_closed or stream.muxed_conn.is_closed:
            self._handle_dead_peer(peer_id)

    def _handle_dead_peer(self, peer_id: ID) -> None:
        # Its subscriptions came on its own stream: while that one lives, they are not said again.
        is_heard = peer_id in self._reading
        topics = [topic for topic, peers in self.peer_topics.items() if is_heard and peer_id in peers]
        self.router.forget(peer_id)
        try:
            super()._handle_dead_peer(peer_id)
        except Exception:
            log.debug("forgetting %s failed", peer_id, exc_info=True)
        for topic in topics:
            self.handle_subscription(peer_id, rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic))


class _BoundedQueue(PriorityQueue):  # type: ignore[misc]
    """What waits for one peer, bounded in bytes too: the stock queue counts RPCs, whatever they weigh."""

    def __init__(self, limits: TransportLimits) -> None:
        super().__init__(limits.peer_queue_max)
        self._bytes_max = limits.peer_queue_bytes_max
        self._num_bytes = 0

    def push(self, rpc: rpc_pb2.RPC, priority: bool = False) -> bool:
        size = rpc.ByteSize()
        if self._num_bytes + size > self._bytes_max or not super().push(rpc, priority):
            return False
        self._num_bytes += size
        return True

    def pop(self) -> rpc_pb2.RPC | None:
        rpc: rpc_pb2.RPC | None = super().pop()
        if rpc is not None:
            self._num_bytes -= rpc.ByteSize()
        return rpc


def _cut_rpc(buffer: bytearray, bytes_max: int) -> bytes | None:
    """The next RPC that is whole, taken off the buffer's front; None when there is none yet.

    Raises:
        RuleBroken: it is announced longer than `bytes_max`, or in a length without an end.
    """
    size = 0
    for position, byte in enumerate(buffer[:LENGTH_BYTES_MAX]):
        size |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            break
    else:
        if len(buffer) >= LENGTH_BYTES_MAX:
            raise RuleBroken("an RPC whose length does not end")
        return None
    if size > bytes_max:
        raise RuleBroken(f"an RPC of {size} bytes, at most {bytes_max} are allowed")
    start = position + 1
    if len(buffer) < start + size:
        return None
    data = bytes(buffer[start : start + size])
    del buffer[: start + size]
    return data
