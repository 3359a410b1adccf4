"""py-libp2p 0.8.1 with its doors closed: a host that no stranger's bytes can end, stall or fill up.

Subclasses of the library's muxer, swarm, host, pubsub and router, each overriding the one place where the measured
fault lies (NETWORK, "What kills or stalls a stock host"). Knows nothing of rounds, requests or discovery: it gives a
`GuardedHost` and a `GuardedPubsub`, and tells a `Blame` callback who broke which rule.
"""

import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec
import trio
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import ParseError
from libp2p.host.basic_host import BasicHost
from libp2p.io.exceptions import IOException, MessageTooLarge
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.validators import signature_validator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

log = logging.getLogger(__name__)
# The library logs every failed dial as an error, and Python prints errors of loggers that have no handler.
logging.getLogger("libp2p").addHandler(logging.NullHandler())

Blame: TypeAlias = Callable[[str, str], None]
"""Called with a peer id (base58) and the rule that it broke."""

YAMUX_HEADER_BYTES = 12
YAMUX_DATA, YAMUX_WINDOW_UPDATE, YAMUX_PING = 0, 1, 2
YAMUX_SYN = 1
WINDOW_INITIAL_BYTES = 256 * 1024  # fixed by the Yamux specification
WINDOW_BYTES_MAX = 1024 * 1024  # a stream buffers at most this much for a reader that does not read
FRAME_BODY_BYTES_MAX = 65_507  # with its header it fits one Noise message; a full Yamux frame needs two (NETWORK)


class TransportLimits(msgspec.Struct, frozen=True):
    """Bounds of one node against any sender; all local, none agreed on. Times in seconds, sizes in bytes."""

    gossip_bytes_max: int = 512 * 1024
    gossip_queue_max: int = 2048
    """Messages that wait for the node; beyond it the oldest is dropped and counted."""
    gossip_burst_max: int = 30
    """Own messages published at once; the stock queues lose what exceeds 32."""
    gossip_per_s: float = 100.0
    author_burst_max: int = 400
    """Messages of one author at once, half as many a second: twice what an honest author can publish. The excess is
    dropped and blames nobody."""
    forwarder_burst_max: int = 4000
    """The same for one forwarder, counted before the signature is checked."""
    peer_queue_max: int = 256
    """RPCs that wait for one slow gossip peer."""
    request_bytes_max: int = 1_000_000
    reply_bytes_max: int = 8_000_000
    frame_bytes_max: int = 1_000_000
    requests_served_max: int = 64
    requests_served_per_peer_max: int = 16
    streams_served_max: int = 64
    connections_max: int = 300
    connections_per_address_max: int = 128
    handshakes_per_address_max: int = 32
    """Beyond it the oldest unfinished handshake of the same address is cut, so silent sockets block nobody."""
    streams_per_connection_max: int = 512
    syn_per_s: float = 500.0
    syn_burst_max: int = 1500
    buffered_per_connection_max: int = 32 * 1024 * 1024
    window_slack_bytes: int = 256 * 1024
    negotiate_s: float = 10.0
    """For each step of a handshake. Not short: a short one turns a busy machine into one that only retries; silent
    sockets are cut by number, not by time."""
    ping_s: float = 3.0
    silent_s: float = 9.0
    """A connection that sends nothing, not even pongs, for this long is closed."""
    write_stall_s: float = 30.0
    """A writer waits this long for window credit (back-pressure), then its stream is reset."""
    dials_max: int = 3
    dial_s: float = 10.0
    known_peers_max: int = 1024
    addresses_per_peer_max: int = 8


class RuleBroken(IOException):  # type: ignore[misc]
    """A peer broke a rule of the wire; its connection ends."""


class TokenBucket:
    """`burst` events at once, `per_s` in the long run; the caller brings the time [s]."""

    def __init__(self, burst: float, per_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._tokens = burst
        self._at = 0.0

    def take(self, now: float) -> float:
        """Take one token; returns 0.0 when there was one, else the seconds until there is (nothing is taken)."""
        if self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._per_s


# --- Yamux ---------------------------------------------------------------------------------------------------------


class _FrameReader:
    """The reading side of a secured connection, cut into Yamux frames and checked before the muxer sees them.

    The muxer asks for exactly a header, then for exactly its body; this reads whole Noise messages instead, which also
    takes away the library's limit of 100 reads a frame.
    """

    def __init__(self, conn: Any, check: Callable[[int, int, int, int], None]) -> None:
        self._conn = conn
        self._check = check
        self._buffer = bytearray()
        self._body_left = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)

    async def read(self, n: int | None = None) -> bytes:
        if self._body_left:
            size = self._body_left if n is None else min(n, self._body_left)
            self._body_left -= size
            return await self._take(size)
        header = await self._take(YAMUX_HEADER_BYTES)
        kind, flags = header[1], int.from_bytes(header[2:4], "big")
        stream, length = int.from_bytes(header[4:8], "big"), int.from_bytes(header[8:12], "big")
        self._check(kind, flags, stream, length)
        self._body_left = length if kind == YAMUX_DATA else 0
        return header

    async def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._buffer += await self._conn.read(None)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


class _BatchedStream(YamuxStream):  # type: ignore[misc]
    """A Yamux stream that gives credit back at half a window, and treats a slow reader as back-pressure."""

    _pending_recv_release: int

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        # The stock rule answers nearly every read with a frame; CPU a delivery falls 2 to 4 times without it (NETWORK).
        self._pending_recv_release += bytes_read
        if self._pending_recv_release * 2 < self.target_recv_window or self.recv_closed:
            return
        growth = min(self.target_recv_window, WINDOW_BYTES_MAX - self.target_recv_window)
        credit = self._pending_recv_release + growth
        self.target_recv_window += growth
        self._pending_recv_release = 0
        self.recv_window += credit
        await self.send_window_update(credit)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        sent = 0
        while sent < len(view):
            size = await self._take_credit(min(FRAME_BODY_BYTES_MAX, len(view) - sent))
            header = bytes((0, YAMUX_DATA, 0, 0)) + self.stream_id.to_bytes(4, "big") + size.to_bytes(4, "big")
            await self.conn._write_frame(header + view[sent : sent + size])
            sent += size

    async def _take_credit(self, wanted: int) -> int:
        """Bytes that may be sent now, waiting for the peer to read (the stock muxer gives up after 5 s)."""
        deadline = trio.current_time() + self.conn.limits.write_stall_s
        while True:
            if self.send_closed or self.closed:
                raise MuxedStreamError("the stream is closed for sending")
            if self.send_window > 0:
                size = min(self.send_window, wanted)
                self.send_window -= size
                return int(size)
            if trio.current_time() > deadline:
                raise MuxedStreamError("the peer has read nothing for too long")
            await trio.sleep(0.005)


class _Streams(dict[int, Any]):
    """The muxer's table of streams; the muxer creates stock streams inline, so they become ours as they enter."""

    def __setitem__(self, key: int, stream: Any) -> None:
        stream.__class__ = _BatchedStream
        super().__setitem__(key, stream)


class GuardedYamux(Yamux):  # type: ignore[misc]
    """Yamux with bounds on streams, windows and memory, and a heartbeat that finds frozen peers."""

    def __init__(self, conn: Any, peer_id: ID, limits: TransportLimits, blame: Blame) -> None:
        async def on_close() -> None: ...

        super().__init__(_FrameReader(conn, self._check), peer_id, is_initiator=conn.is_initiator, on_close=on_close)
        self.limits = limits
        self._blame = blame
        self.streams = _Streams()
        self._syn = TokenBucket(limits.syn_burst_max, limits.syn_per_s)
        self._heard_at = trio.current_time()
        self._unmeasured = 0

    def _check(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Refuse a frame that breaks a rule before a byte of its body is read."""
        self._heard_at = trio.current_time()
        stream = self.streams.get(stream_id)
        if kind in (YAMUX_DATA, YAMUX_WINDOW_UPDATE) and flags & YAMUX_SYN:
            if len(self.streams) >= self.limits.streams_per_connection_max:
                self._refuse(f"more than {self.limits.streams_per_connection_max} open streams")
            if self._syn.take(self._heard_at):
                self._refuse("opens streams too fast")
        if kind == YAMUX_DATA:
            # By what is held, not by the library's window: it sets that to zero at an overrun, and begins anew.
            window = stream.target_recv_window if stream is not None else WINDOW_INITIAL_BYTES
            held = len(self.stream_buffers.get(stream_id, b""))
            if held + length > window + self.limits.window_slack_bytes:
                self._refuse(f"ignores the window: {held} + {length} bytes into {window}")
            self._unmeasured += length
            if self._unmeasured > WINDOW_BYTES_MAX:
                self._unmeasured = 0
                if sum(map(len, self.stream_buffers.values())) > self.limits.buffered_per_connection_max:
                    self._refuse("fills streams that nobody reads")

    def _refuse(self, rule: str) -> None:
        self._blame(str(self.peer_id), rule)
        raise RuleBroken(rule)

    async def _measure_rtt_loop(self) -> None:
        """Ping at the muxer's level, and end the connection when nothing at all comes back.

        The stock loop pings every 30 s and ignores the answer, so that a stopped process went unnoticed for 45 s.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while not self.event_shutting_down.is_set():
                self._ping_id += 1
                self._ping_sent_time = trio.current_time()
                ping = bytes((0, YAMUX_PING, 0, YAMUX_SYN, 0, 0, 0, 0)) + (self._ping_id % 2**32).to_bytes(4, "big")
                try:
                    await self._write_frame(ping)
                except (IOException, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                    return
                await trio.sleep(self.limits.ping_s)

    async def _watch(self) -> None:
        # A task of its own: the pinging one blocks in a full socket buffer when the peer is frozen.
        while not self.event_shutting_down.is_set():
            asleep_at = trio.current_time()
            await trio.sleep(1.0)
            now = trio.current_time()
            if now - asleep_at > 3.0:
                self._heard_at = now  # it was us who stood still: judge nobody by that time
            if now - self._heard_at > self.limits.silent_s:
                log.info("peer %s is silent for %.0f s: closing", self.peer_id, now - self._heard_at)
                with trio.CancelScope(shield=True):
                    await self._cleanup_on_error()
                return

    async def start(self) -> None:
        """Run until the connection ends."""
        try:
            await super().start()
        except Exception:
            log.debug("connection of %s ended with an error", self.peer_id, exc_info=True)
            await self._cleanup_on_error()


class _GuardedMuxers(MuxerMultistream):  # type: ignore[misc]
    """Negotiates Yamux only. The stock class builds its own Yamux whatever class it was given."""

    def __init__(self, limits: TransportLimits, blame: Blame) -> None:
        super().__init__({TProtocol(YAMUX_PROTOCOL): Yamux}, int(limits.negotiate_s))
        self._limits = limits
        self._blame = blame

    async def new_conn(self, conn: Any, peer_id: ID) -> Any:
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return self._annotate_connection(GuardedYamux(conn, peer_id, self._limits, self._blame), conn, protocol)


# --- services ------------------------------------------------------------------------------------------------------


class _GuardedTasks:
    """A service's manager whose tasks cannot end the service: the stock one dies with its first failing task."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def run_task(self, function: Callable[..., Awaitable[None]], *args: Any, **options: Any) -> None:
        if not self._manager.is_running:
            return  # the stock manager raises when a stream ends during shutdown

        async def guarded() -> None:
            try:
                await function(*args)
            except Exception:
                log.debug("a task of the network ended with an error", exc_info=True)

        self._manager.run_task(guarded, **options)

    def run_daemon_task(self, function: Callable[..., Awaitable[None]], *args: Any, **options: Any) -> None:
        async def restarted() -> None:
            while True:
                try:
                    await function(*args)
                    return
                except Exception:
                    log.warning("a loop of the network failed; restarting it", exc_info=True)
                    await trio.sleep(1.0)

        self._manager.run_daemon_task(restarted, **options)


class GuardedSwarm(Swarm):  # type: ignore[misc]
    """Connections: capped in all and by address, never dialled behind the transport's back, slots given back."""

    def __init__(self, key_pair: KeyPair, limits: TransportLimits, blame: Blame) -> None:
        peer_id = ID.from_pubkey(key_pair.public_key)
        noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
        upgrader = TransportUpgrader(
            {TProtocol(NOISE_PROTOCOL): noise}, {TProtocol(YAMUX_PROTOCOL): Yamux}, int(limits.negotiate_s)
        )
        upgrader.muxer_multistream = _GuardedMuxers(limits, blame)
        store = PeerStore()
        store.add_key_pair(peer_id, key_pair)
        config = ConnectionConfig(
            max_connections=limits.connections_max,
            high_watermark=limits.connections_max,
            min_connections=0,
            low_watermark=0,
            auto_connect_interval=86_400.0,  # no auto-connector: discovery is the transport's own
            inbound_upgrade_timeout=limits.negotiate_s,
            outbound_upgrade_timeout=limits.negotiate_s,
            inbound_stream_protocol_negotiation_timeout=limits.negotiate_s,
            outbound_stream_protocol_negotiation_timeout=limits.negotiate_s,
        )
        super().__init__(peer_id, store, upgrader, [TCP()], RetryConfig(max_retries=0), config)
        self._limits = limits
        self._by_address: Counter[str] = Counter()
        self._handshakes: dict[str, deque[trio.CancelScope]] = {}
        self.banned_until: dict[str, float] = {}
        """Peer id (base58) to the trio time until which its connections are refused."""

    @property
    def manager(self) -> Any:
        """The service's tasks, guarded."""
        return _GuardedTasks(self._manager)

    async def dial_peer(self, peer_id: ID) -> list[Any]:
        """Only what is connected already: a stock dial tries one address, then locks the peer out for 60 s."""
        connections = [c for c in self.get_connections(peer_id) if not c.is_closed]
        if not connections:
            raise SwarmException(f"not connected to {peer_id}")
        return connections

    def _schedule_auto_connect(self) -> None:
        """Nothing: the transport dials."""

    async def add_conn(self, muxed_conn: Any, direction: str = "unknown") -> Any:
        """Take a connection into the swarm, unless its peer is banned."""
        until = self.banned_until.get(str(muxed_conn.peer_id), 0.0)
        if until > trio.current_time():
            await muxed_conn.close()
            raise SwarmException(f"{muxed_conn.peer_id} is banned")
        return await super().add_conn(muxed_conn, direction)

    async def _handle_inbound_connection(self, read_write_closer: Any, maddr: Any) -> None:
        # Replaces the stock handler, whose slots are given back only when the swarm ends: 250 connections in its
        # lifetime, then none. Returning from here closes the socket.
        remote = read_write_closer.get_remote_address()
        if remote is None:
            return
        address = remote[0]
        if (
            self._by_address[address] >= self._limits.connections_per_address_max
            or self._by_address.total() >= self._limits.connections_max
        ):
            return
        muxed_conn = await self._shake_hands(address, read_write_closer, maddr)
        if muxed_conn is None:
            return
        self._by_address[address] += 1
        try:
            await muxed_conn.event_closed.wait()
        finally:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    async def _shake_hands(self, address: str, stream: Any, maddr: Any) -> Any | None:
        waiting = self._handshakes.setdefault(address, deque())
        if len(waiting) >= self._limits.handshakes_per_address_max:
            waiting.popleft().cancel()
        try:
            with trio.move_on_after(self._limits.negotiate_s) as scope:
                waiting.append(scope)
                return await self.upgrade_inbound_raw_conn(RawConnection(stream, False), maddr)
        except Exception:
            log.debug("handshake with %s failed", address, exc_info=True)
        finally:
            if scope in waiting:
                waiting.remove(scope)
            if not waiting:
                self._handshakes.pop(address, None)
        return None


class GuardedHost(BasicHost):  # type: ignore[misc]
    """A host whose stream handlers cannot end it."""

    def __init__(self, key_pair: KeyPair, limits: TransportLimits, blame: Blame) -> None:
        self._blame = blame
        super().__init__(
            GuardedSwarm(key_pair, limits, blame),
            negotiate_timeout=int(limits.negotiate_s),
            disable_identify_address_discovery=True,
        )

    async def _swarm_stream_handler(self, net_stream: Any) -> None:
        # Any exception that escapes here ends a stock host; a disconnect-like one leaves a connection that is dead.
        try:
            await super()._swarm_stream_handler(net_stream)
        except Exception as error:  # noqa: BLE001 - the driver's top loop for one stream; Cancelled passes
            log.debug("stream of %s ended with %r", net_stream.muxed_conn.peer_id, error)
            with trio.move_on_after(1.0):
                await net_stream.reset()

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        """We answer identify (other implementations ask), but ask nobody: addresses come from peer exchange."""


# --- gossip --------------------------------------------------------------------------------------------------------


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
        return _GuardedTasks(self._manager)

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
        return _GuardedTasks(self._manager)

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
