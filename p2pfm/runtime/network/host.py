"""py-libp2p 0.8.1's swarm and host with their doors closed: no stranger's bytes end, stall or fill them up.

Each subclass overrides the one place where the measured fault lies (NETWORK, "What kills or stalls a stock host").
Knows nothing of rounds, requests or discovery: it tells a `Blame` callback who broke which rule.
"""

import ipaddress
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import ParseError
from libp2p.host.basic_host import BasicHost
from libp2p.identity.identify_push.identify_push import ID_PUSH as PUSH_PROTOCOL
from libp2p.io.exceptions import MessageTooLarge
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer import multiselect_communicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from p2pfm.config import TransportLimits
from p2pfm.runtime.network.limits import Blame
from p2pfm.runtime.network.yamux import GuardedMuxers

log = logging.getLogger(__name__)
# The library logs every failed dial as an error, and Python prints errors of loggers that have no handler.
logging.getLogger("libp2p").addHandler(logging.NullHandler())


NAME_BYTES_MAX = 1024
"""What multistream-select takes as a protocol's name in other implementations, too."""


async def _read_name(reader: Any) -> bytes:
    """One delimited message, its announced length checked before anything is kept."""
    try:
        data: bytes = await read_varint_prefixed_bytes_limited(reader, NAME_BYTES_MAX)
        data.decode()
    except (MessageTooLarge, UnicodeDecodeError) as error:
        raise ParseError("a protocol's name that is too long, or no text") from error
    if data[-1:] != b"\n":
        raise ParseError("a protocol's name that is not ended")
    return data[:-1]


# The library (0.8.1) reads names of any announced length, before a stranger has said who it is, and passes on what is
# no text. Every negotiation reads through this one name.
multiselect_communicator.read_delim = _read_name


def get_address_group(host: str) -> str:
    """What is bounded as one sender: an IPv4 address; of IPv6 the first 64 bits, since one line has all below them."""
    address = ipaddress.ip_address(host.split("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


class GuardedTasks:
    """A service's manager whose tasks cannot end the service: the stock one dies with its first failing task."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def run_task(self, function: Callable[..., Awaitable[None]], *args: Any, **options: Any) -> None:
        """Run once; its failure is logged."""
        if not self._manager.is_running:
            return  # the stock manager raises when a stream ends during shutdown

        async def guarded() -> None:
            try:
                await function(*args)
            except Exception:
                log.debug("a task of the network ended with an error", exc_info=True)

        self._manager.run_task(guarded, **options)

    def run_daemon_task(self, function: Callable[..., Awaitable[None]], *args: Any, **options: Any) -> None:
        """Run for ever; begun anew when it fails."""

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
        upgrader.muxer_multistream = GuardedMuxers(limits, blame)
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
        return GuardedTasks(self._manager)

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
        address = get_address_group(remote[0])
        if (
            self._by_address[address] >= self._limits.connections_per_address_max
            or self._by_address.total() >= self._limits.inbound_max
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
        elif sum(map(len, self._handshakes.values())) >= self._limits.handshakes_max:
            max(self._handshakes.values(), key=len).popleft().cancel()
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
        # Nobody here reads what is pushed: addresses come from peer exchange.
        self.multiselect.remove_handler(TProtocol(PUSH_PROTOCOL))

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
