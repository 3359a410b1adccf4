"""The node's network: gossip, requests and token streams between peers, over TCP, Noise and Yamux.

`Libp2pTransport` carries bytes and puts the parts of the network together: who is known (`peer_book`), whom to dial
(`dialer`), who tells whom (`peer_exchange`), who is not heard (`bans`). It does not know what the bytes mean: messages,
blobs and rounds are its users' affair.
"""

import logging
import random
import socket
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeAlias

import trio
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from p2pfm.config import DiscoveryConfig, TransportLimits
from p2pfm.errors import OperatorError, PeerUnreachable, Reject
from p2pfm.runtime.clock import PeerClocks, now_ms
from p2pfm.runtime.network import mdns
from p2pfm.runtime.network.bans import Bans
from p2pfm.runtime.network.dht import PeerTable
from p2pfm.runtime.network.dialer import Dialer
from p2pfm.runtime.network.frames import FRAME_S, end_stream, read_frame, write_frame
from p2pfm.runtime.network.gossip import TOPICS_MAX, GuardedPubsub
from p2pfm.runtime.network.host import GuardedHost
from p2pfm.runtime.network.limits import RuleBroken, TokenBucket
from p2pfm.runtime.network.mdns import LocalPeers
from p2pfm.runtime.network.memory import EMPTY_MEMORY, NetworkMemory
from p2pfm.runtime.network.peer_book import LOOPBACK, NOWHERE, PRIVATE, PUBLIC, PeerBook, get_scope, parse_address
from p2pfm.runtime.network.peer_exchange import PEERS_PROTOCOL, PeerExchange
from p2pfm.runtime.network.server import Handler, Server, StreamHandler
from p2pfm.types import Digest, PeerId, short

log = logging.getLogger(__name__)

REQUEST_PROTOCOL = "/p2pfm/request/1"
STREAM_PROTOCOL = "/p2pfm/stream/1"
IDLE_STREAMS_MAX = 4  # kept open to one peer for the next request: 1,400 requests/s against 200 with a stream for each
SWEEP_S = 2.0
EVERYBODY = "all"  # the topic that all peers of a network hear
LISTENER_RETRY_S, LISTENER_TRIES = 1.0, 10
LISTENERS_DIALLED = 3  # at once, by who wants to be heard where it does not listen

SCOPE_NAMES = {NOWHERE: "nowhere", LOOPBACK: "this machine", PRIVATE: "the local network", PUBLIC: "the internet"}
RELAY_MISSING = "not built: two peers that nobody can dial do not meet directly"
HOLE_PUNCHING_MISSING = "not built: it needs a relay; open the port of `listen` instead"
DISCOVERY_DEFAULT = DiscoveryConfig()

Gate: TypeAlias = Callable[[bytes], None]


class Libp2pTransport:
    """One peer's network. Use as an async context manager inside trio; it owns and ends all its tasks.

    Args:
        keypair: the libp2p Ed25519 identity.
        listen: multiaddress to listen on, e.g. `/ip4/127.0.0.1/tcp/0`.
        bootstrap: addresses (with `/p2p/ID`) that are tried for ever, and first.
        network_id: peers of another network may connect, but share no gossip topic.
        limits: bounds against any sender.
        memory: what `get_memory` gave in an earlier run.
        discovery: further ways to find peers.
        watched: topics in which this peer may speak without hearing them.

    Raises (on entry):
        OperatorError: the address cannot be listened on, or a bootstrap address is malformed.
    """

    def __init__(
        self,
        keypair: KeyPair,
        listen: str,
        bootstrap: Sequence[str],
        network_id: Digest,
        limits: TransportLimits | None = None,
        memory: NetworkMemory = EMPTY_MEMORY,
        discovery: DiscoveryConfig = DISCOVERY_DEFAULT,
        watched: Sequence[str] = (),
    ) -> None:
        self.limits = limits or TransportLimits()
        self.peer_id = PeerId(str(ID.from_pubkey(keypair.public_key)))
        self._keypair = keypair
        self._listen = listen
        self._network_id = network_id
        self._topic = f"/p2pfm/{network_id.hex()[:32]}"
        self.book = PeerBook(self.peer_id, self.limits.known_peers_max, self.limits.addresses_per_peer_max)
        self._bootstrap = tuple(bootstrap)
        self._memory = memory
        self._discovery = discovery
        self._local_peers: LocalPeers | None = None
        self._table: PeerTable | None = None
        self.counters: Counter[str] = Counter()
        """What happened, by name: bytes and messages in and out, drops, dials, blames; for /metrics."""
        self.heard: Counter[str] = Counter()
        """New messages of other authors, by topic."""
        self._topics_lock = trio.Lock()
        self._gossip_in, self.gossip = trio.open_memory_channel[tuple[PeerId, bytes]](self.limits.gossip_queue_max)
        """`gossip`: (forwarder, data) of every new message of another author, once."""
        self._changes_in, self.peers_changed = trio.open_memory_channel[tuple[PeerId, ...]](1)
        """`peers_changed`: the peers connected now, whenever that set has changed; only the newest is kept."""
        self._last_peers: tuple[PeerId, ...] = ()
        self._addresses: tuple[str, ...] = ()
        self._gate: Gate | None = None
        self._idle: dict[PeerId, deque[Any]] = defaultdict(deque)
        self._publish_bucket = TokenBucket(self.limits.gossip_burst_max, self.limits.gossip_per_s)
        self._bans = Bans(self.limits.known_peers_max)
        self._server = Server(self.limits, self._blame, self._is_throttled, self.counters)
        self.has_banned = trio.Event()
        """Set, and replaced by a new one, at each ban: it must outlive a crash."""
        self._stack = AsyncExitStack()
        self._host = GuardedHost(keypair, self.limits, self._blame)
        swarm = self._host.get_network()
        swarm.banned_until = self._bans.until
        self._dialer = Dialer(swarm, self.book, self._bans, self.limits, self.counters, self._on_dialled)
        self.clocks = PeerClocks()
        """What peers told of their clocks."""
        self._peer_exchange = PeerExchange(
            self.book, self._dialer, self.limits, self.addresses, self._ask, self._blame, self.clocks
        )
        self._pubsub = GuardedPubsub(
            self._host,
            self._topic,
            self.limits,
            self._blame,
            self._on_gossip,
            self._is_passed_by_gate,
            [self._name(topic) for topic in watched],
        )
        self._nursery: trio.Nursery | None = None

    # --- life ---

    async def __aenter__(self) -> Self:
        for address in self._bootstrap:
            parsed = parse_address(address)
            if parsed is None or not parsed.peer:
                raise OperatorError(f"bootstrap: expected /ip4/HOST/tcp/PORT/p2p/PEER_ID, got {address!r}")
        _refuse_port_in_use(self._listen)
        self.book.add_bootstrap(self._bootstrap, trio.current_time())
        self.book.restore(self._memory.addresses, trio.current_time(), time.time())
        self._bans.restore(self._memory.bans, trio.current_time(), time.time())
        for protocol, serve in (
            (REQUEST_PROTOCOL, self._server.serve_requests),
            (STREAM_PROTOCOL, self._server.serve_stream),
            (PEERS_PROTOCOL, self._peer_exchange.serve),
        ):
            self._host.set_stream_handler(TProtocol(protocol), serve)
        stack = AsyncExitStack()
        try:
            await stack.enter_async_context(self._host.run([Multiaddr(self._listen)]))
            self._addresses = tuple(str(address) for address in self._host.get_addrs())
            if not self._addresses:
                raise OperatorError(f"listen: cannot listen on {self._listen}; is the address of this machine?")
            await stack.enter_async_context(background_trio_service(self._pubsub))
            await stack.enter_async_context(background_trio_service(self._pubsub.router))
            await self._pubsub.wait_until_ready()
            await self._pubsub.subscribe(self._topic)
            self._host.get_network().register_notifee(_Notices(self._on_connections_changed))
            self._nursery = await stack.enter_async_context(_cancelled_nursery())
            self._nursery.start_soon(self._dialer.run)
            self._nursery.start_soon(self._peer_exchange.run)
            self._nursery.start_soon(self._sweep_loop)
            if self._discovery.dht:
                self._table = PeerTable(
                    self._keypair, self._network_id, self._host, self.book, self._dialer, self.addresses, now_ms
                )
                self._dialer.lookup = self._table.look_up
                self._nursery.start_soon(self._table.run)
            if self._discovery.mdns:
                self._local_peers = LocalPeers(
                    self.peer_id, self._network_id, self._discovery.mdns, self.addresses, self._on_local_peer
                )
                await stack.enter_async_context(self._local_peers)
        except BaseException:
            await stack.aclose()
            raise
        self._stack = stack
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
            self._nursery = None
        with trio.CancelScope(shield=True), trio.move_on_after(3.0):
            async with trio.open_nursery() as nursery:  # one after the other, each would take 0.2 s
                for connection in self._host.get_network().get_connections():
                    nursery.start_soon(connection.close)
            await self._host.close()
        # Outside that scope: the stack holds nurseries, which must close in the order in which they were opened.
        await self._stack.aclose()
        self._gossip_in.close()
        self._changes_in.close()

    def addresses(self) -> tuple[str, ...]:
        """Where this peer listens, each with `/p2p/ID`."""
        return self._addresses

    def connected(self) -> tuple[PeerId, ...]:
        """Peers with a live connection, sorted."""
        return self._dialer.connected()

    async def _on_dialled(self, peer: PeerId) -> None:
        await self._peer_exchange.exchange(peer)

    def is_gossiping_with(self, peer: PeerId, topic: str = EVERYBODY) -> bool:
        """Whether this peer has a gossip stream to `peer` and knows that it listens to `topic`."""
        return ID.from_base58(peer) in self._pubsub.router.get_subscribers(self._name(topic))

    @property
    def num_banned(self) -> int:
        """Peers that are banned now."""
        return self._bans.count(trio.current_time())

    def get_queues(self) -> dict[str, int]:
        """What waits here: gossip for this node, the longest queue of gossip for a peer, dials, requests to answer."""
        for_peers = (len(queue) for queue in self._pubsub.peer_queues.values())
        return {
            "gossip": self.gossip.statistics().current_buffer_used,
            "gossip_out": max(for_peers, default=0),
            "dials": self._dialer.num_dialling,
            "requests": self._server.num_waiting,
        }

    # --- gossip ---

    def set_gate(self, gate: Gate) -> None:
        """`gate` raises `Reject` for gossip that no honest peer forwards: it is dropped and its forwarder blamed.

        Cheap and deterministic (the same answer at every peer at any time): a signature, a format; nothing that depends
        on what this peer knows.
        """
        self._gate = gate

    def _name(self, topic: str) -> str:
        return self._topic if topic == EVERYBODY else f"{self._topic}/{topic}"

    async def listen(self, topics: Sequence[str], mates: Sequence[Sequence[PeerId]] = ()) -> None:
        """From now on hear these topics beside everybody's, and no others. At most three.

        Args:
            mates: by topic: who speaks there; some are dialled, so that what they say comes over more than one way.
        """
        if len(set(topics)) >= TOPICS_MAX:
            raise ValueError(f"a peer hears at most {TOPICS_MAX - 1} topics beside everybody's, got {topics}")
        async with self._topics_lock:
            await self._pubsub.listen([self._name(topic) for topic in topics])
        if self._nursery is not None:
            for others in {frozenset(others) - {self.peer_id} for others in mates}:
                self._nursery.start_soon(self._meet, sorted(others))

    async def _meet(self, others: Sequence[PeerId]) -> None:
        """Until some of these are connected, or too much time is over."""
        for _ in range(LISTENER_TRIES):
            absent = [peer for peer in others if peer not in self.connected()]
            num_missing = min(LISTENERS_DIALLED, len(others)) - (len(others) - len(absent))
            if num_missing <= 0:
                return
            self._dial_some(absent, num_missing)
            await trio.sleep(LISTENER_RETRY_S)

    def _dial_some(self, absent: Sequence[PeerId], number: int) -> None:
        for peer in random.sample(absent, min(len(absent), number)):
            if self._nursery is not None:
                self._nursery.start_soon(self._dialer.dial_quietly, peer)

    async def publish(self, data: bytes, topic: str = EVERYBODY, listeners: Sequence[PeerId] = ()) -> None:
        """Send `data` to all peers that hear `topic`; waits when more than the burst is published.

        Args:
            listeners: who should hear it; dialled when this peer does not hear it and knows nobody who does.

        Raises:
            ValueError: longer than `gossip_bytes_max` (above 1 MB the library loses messages without a word).
        """
        if len(data) > self.limits.gossip_bytes_max:
            raise ValueError(f"gossip carries at most {self.limits.gossip_bytes_max} bytes, got {len(data)}")
        while wait_s := self._publish_bucket.take(trio.current_time()):
            await trio.sleep(wait_s)
        name = self._name(topic)
        if name not in self._pubsub.topic_ids and not await self._find_listeners(topic, listeners):
            log.warning("nobody was found who hears %r: what was said is heard by those who ask for it", topic)
        self.counters["gossip_published"] += 1
        self.counters["gossip_bytes_out"] += len(data)
        await self._pubsub.publish(name, data)

    async def _find_listeners(self, topic: str, listeners: Sequence[PeerId]) -> bool:
        """Until somebody is connected who hears a topic that this peer does not hear; False: too much time is over."""
        for number in range(LISTENER_TRIES):
            if self._pubsub.router.get_subscribers(self._name(topic)):
                return True
            log.info("nobody is connected who hears %r: dialling, try %d", topic, number + 1)
            self.counters["gossip_no_listener"] += 1
            absent = [peer for peer in listeners if peer != self.peer_id and peer not in self.connected()]
            self._dial_some(absent, LISTENERS_DIALLED)
            await trio.sleep(LISTENER_RETRY_S)
        return False

    def _on_gossip(self, forwarder: str, topic: str, data: bytes) -> None:
        self.counters["gossip_received"] += 1
        self.counters["gossip_bytes_in"] += len(data)
        self.heard[topic.removeprefix(f"{self._topic}/") if topic != self._topic else EVERYBODY] += 1
        _put_newest(self._gossip_in, self.gossip, (PeerId(forwarder), data), self.counters, "gossip_dropped")

    def _is_passed_by_gate(self, data: bytes) -> bool:
        if self._gate is None:
            return True
        try:
            self._gate(data)
        except Reject:
            return False
        return True

    # --- requests: client ---

    async def request(self, peer: PeerId, data: bytes, timeout_s: float = 10.0) -> bytes:
        """One request, one reply.

        Raises:
            PeerUnreachable: no connection, no byte of an answer for `timeout_s`, an answer that takes longer than
                `FRAME_S`, or the peer broke off.
        """
        return await self._ask(REQUEST_PROTOCOL, peer, data, timeout_s)

    async def _ask(self, protocol: str, peer: PeerId, data: bytes, timeout_s: float) -> bytes:
        if len(data) > self.limits.request_bytes_max:
            raise ValueError(f"a request has at most {self.limits.request_bytes_max} bytes, got {len(data)}")
        reply: bytes | None = None
        # A slow link is no dead one; nor a broken rule, as `read_frame` would say after FRAME_S: this ends before it.
        start = trio.current_time()
        end = start + max(timeout_s, FRAME_S)
        with trio.move_on_after(timeout_s) as scope:

            def live_on(size: int) -> None:
                scope.deadline = min(end, trio.current_time() + timeout_s)

            idle = self._idle[peer] if protocol == REQUEST_PROTOCOL else None
            while idle:
                # A kept stream may have died with its peer: then ask once more, on a fresh one.
                reply = await self._ask_on(idle.popleft(), idle, data, live_on)
                if reply is not None:
                    return reply
            stream = await self._open(protocol, peer)
            reply = await self._ask_on(stream, idle, data, live_on)
            if reply is None:
                raise PeerUnreachable(f"{short(peer)} broke off before it answered")
            return reply
        if trio.current_time() >= end > start + timeout_s:
            raise PeerUnreachable(f"{short(peer)} did not end its answer within {FRAME_S:g} s")
        raise PeerUnreachable(f"{short(peer)} said nothing for {timeout_s:g} s")

    async def _ask_on(
        self, stream: Any, idle: deque[Any] | None, data: bytes, live_on: Callable[[int], None]
    ) -> bytes | None:
        """The reply, or None when the stream broke. The stream goes back to `idle`, if that is any, or ends."""
        is_whole = False
        try:
            await write_frame(stream, data)
            reply = await read_frame(stream, self.limits.reply_bytes_max, grow=live_on)
            is_whole = reply is not None
            self.counters["request_bytes_in"] += len(reply or b"")
            self.counters["requests_sent"] += 1
            return reply
        except RuleBroken as error:
            self._blame(str(stream.muxed_conn.peer_id), str(error))
            return None
        except Exception as error:  # noqa: BLE001 - the library's streams raise a dozen unrelated classes when they end
            log.debug("request to %s failed: %r", stream.muxed_conn.peer_id, error)
            return None
        finally:
            if is_whole and idle is not None and len(idle) < IDLE_STREAMS_MAX:
                idle.append(stream)
            else:
                await end_stream(stream, is_clean=is_whole)

    async def _open(self, protocol: str, peer: PeerId) -> Any:
        """A fresh stream; tried once more, since a connection may end or be replaced while one is opened."""
        failure: Exception | None = None
        for _ in range(2):
            if peer not in self.connected():
                await self._dialer.dial(peer, is_needed=True)
            try:
                return await self._host.new_stream(ID.from_base58(peer), [TProtocol(protocol)])
            except Exception as error:  # noqa: BLE001 - the library raises a dozen unrelated classes here
                failure = error
        raise PeerUnreachable(f"no stream to {short(peer)}: {failure!r}") from failure

    @asynccontextmanager
    async def open_stream_request(self, peer: PeerId, data: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Frames of a streamed reply, as they come; leaving the block early cancels the peer's handler.

        Use: `async with transport.open_stream_request(peer, data) as frames: async for frame in frames: ...`

        Raises:
            PeerUnreachable: no connection, or the peer broke off before the end (at entry or while iterating).
        """
        with trio.move_on_after(self.limits.negotiate_s * 2) as scope:
            stream = await self._open(STREAM_PROTOCOL, peer)
            try:
                await write_frame(stream, data)
            except BaseException:
                await end_stream(stream, is_clean=False)
                raise
        if scope.cancelled_caught:
            raise PeerUnreachable(f"{short(peer)} did not accept the stream in time")
        is_over = False

        async def frames() -> AsyncIterator[bytes]:
            nonlocal is_over
            while not is_over:
                try:
                    frame = await read_frame(stream, self.limits.frame_bytes_max, wait_s=None)
                except Exception as error:  # the library's streams raise a dozen unrelated classes
                    raise PeerUnreachable(f"{short(peer)} broke off its stream: {error!r}") from error
                if frame is None:
                    raise PeerUnreachable(f"{short(peer)} broke off its stream")
                if not frame:  # the empty frame is the end
                    is_over = True
                    return
                yield frame

        try:
            yield frames()
        finally:
            await end_stream(stream, is_clean=is_over)

    # --- requests: server ---

    def set_handler(self, handler: Handler) -> None:
        """`handler(peer, data)` answers requests; when it raises `Reject`, the asker is blamed and gets no answer."""
        self._server.handler = handler

    def set_stream_handler(self, handler: StreamHandler) -> None:
        """`handler(peer, data, send)` answers stream requests; it is cancelled when the asker closes the stream."""
        self._server.stream_handler = handler

    # --- connections ---

    async def _sweep_loop(self) -> None:
        """Gossip streams that timed out are never retried by the library: open what is missing."""
        while True:
            await trio.sleep(SWEEP_S)
            for peer in self.connected():
                peer_id = ID.from_base58(peer)
                self._pubsub.forget_ended(peer_id)
                if peer_id in self._pubsub.peers:
                    continue
                with trio.move_on_after(self.limits.negotiate_s):
                    try:
                        await self._pubsub.ensure_peer_stream(peer_id, self.limits.negotiate_s)
                    except Exception as error:  # noqa: BLE001 - the library raises anything when the peer goes
                        log.debug("no gossip stream to %s: %r", peer, error)

    def _on_connections_changed(self) -> None:
        now = self.connected()
        came, went = set(now) - set(self._last_peers), set(self._last_peers) - set(now)
        self._dialer.on_changed(came, went)
        for peer in went:
            self._idle.pop(peer, None)
        if came or went:
            self._last_peers = now
            _put_newest(self._changes_in, self.peers_changed, now, self.counters, "peers_changed_replaced")

    def _on_local_peer(self, address: str) -> None:
        if self.book.add(address, trio.current_time(), mdns.TELLER):
            self._dialer.wake()

    def reach(self) -> dict[str, dict[str, Any]]:
        """The state of each way by which peers find this one and are found; JSON-able.

        `state` of each is "ok", "off", "none" (it has found nobody yet) or "missing" (not built); `found` says it in
        words.
        """
        connected = set(self.connected())
        bootstrap = {parsed.peer for parsed in map(parse_address, self._bootstrap) if parsed} - {self.peer_id}
        num_known, num_proven = len(self.book), self.book.count_proven()
        inbound = self.counters["inbound"]
        scopes = [get_scope(parsed.host) for parsed in map(parse_address, self._addresses) if parsed]
        lan, table = self._local_peers, self._table
        return {
            "bootstrap": _state(
                bool(bootstrap & connected) or not bootstrap,
                f"{len(bootstrap & connected)} of {len(bootstrap)} connected",
            ),
            "peer_exchange": _state(num_known > 0, f"{num_known} peers known, {num_proven} proven by a dial"),
            "mdns": _state(lan.num_found > 0, f"{lan.num_found} addresses heard on {self._discovery.mdns}")
            if lan
            else {"state": "off", "found": "discovery.mdns names no interface"},
            "dht": _state(
                table.num_stored > 0,
                f"stored {table.num_stored} times, holds {table.num_records} records, {table.num_found} answers",
            )
            if table
            else {"state": "off", "found": "discovery.dht is not set"},
            "inbound": _state(
                inbound > 0,
                f"{inbound} connections from others, from {SCOPE_NAMES[self._dialer.inbound_scope]}; "
                f"listens on {SCOPE_NAMES[max(scopes, default=NOWHERE)] if NOWHERE not in scopes else 'all'} addresses",
            ),
            "relay": {"state": "missing", "found": RELAY_MISSING},
            "hole_punching": {"state": "missing", "found": HOLE_PUNCHING_MISSING},
            "bans": {"state": "ok", "found": f"{self._bans.count(trio.current_time())} peers banned now"},
        }

    # --- blame ---

    def blame(self, peer: PeerId, reason: str) -> None:
        """The node's word that a peer broke a rule: after a few offences it is answered slowly, then disconnected for a
        growing time."""
        self._blame(peer, reason)

    def blamed(self) -> dict[str, int]:
        """How many rules each peer has broken in this run."""
        return dict(self._bans.seen)

    def _is_throttled(self, peer: PeerId) -> bool:
        return self._bans.is_throttled(peer, trio.current_time())

    def _blame(self, peer: str, reason: str) -> None:
        self.counters["blames"] += 1
        log.info("peer %s broke a rule: %s", peer, reason)
        if self._bans.add_offence(peer, trio.current_time()):
            self.counters["bans"] += 1
            self.has_banned.set()
            self.has_banned = trio.Event()
            if self._nursery is not None:
                self._nursery.start_soon(self._dialer.disconnect, peer)

    # --- over restarts ---

    def get_memory(self) -> NetworkMemory:
        """What a next start must know: addresses with their good and bad times, and bans."""
        now, wall = trio.current_time(), time.time()
        return NetworkMemory(self.book.get_records(now, wall), self._bans.get_records(now, wall))


class _Notices:
    """Tells the transport when connections come and go (the library's notifee interface)."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    async def connected(self, network: Any, conn: Any) -> None:
        self._on_change()

    async def disconnected(self, network: Any, conn: Any) -> None:
        self._on_change()

    async def opened_stream(self, network: Any, stream: Any) -> None: ...

    async def closed_stream(self, network: Any, stream: Any) -> None: ...

    async def listen(self, network: Any, multiaddr: Any) -> None: ...

    async def listen_close(self, network: Any, multiaddr: Any) -> None: ...


def _state(is_ok: bool, found: str) -> dict[str, Any]:
    return {"state": "ok" if is_ok else "none", "found": found}


def _put_newest(send: Any, receive: Any, item: Any, counters: Counter[str], dropped: str) -> None:
    """Put into a bounded channel, dropping its oldest item when it is full."""
    try:
        send.send_nowait(item)
    except trio.WouldBlock:
        try:
            receive.receive_nowait()
            counters[dropped] += 1
        except trio.WouldBlock:
            counters[dropped] += 1
            return
        send.send_nowait(item)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        counters[dropped] += 1


@asynccontextmanager
async def _cancelled_nursery() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


def _refuse_port_in_use(listen: str) -> None:
    """The library listens with SO_REUSEPORT, so that two nodes on one port would share it without a word."""
    parsed = parse_address(listen)
    if parsed is None:
        raise OperatorError(f"listen: expected e.g. /ip4/127.0.0.1/tcp/4001, got {listen!r}")
    family = socket.AF_INET6 if ":" in parsed.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parsed.host, parsed.port))
        except OSError as error:
            raise OperatorError(
                f"listen: cannot use {listen}: {error.strerror}. Choose another port, or stop the program that has it"
            ) from error
