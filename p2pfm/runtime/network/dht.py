"""Where a peer lives now, from a Kademlia table: for a peer of which no known address works any more.

A record is a peer's own addresses, numbered and signed for one network; only its author may store it at others. The
table is py-libp2p 0.8.1's, of which only finding nodes and values is used: on a protocol and a peer store of our own,
with bounds on time, streams and records, and without its providers and background loops. It dials through the dialer,
so that the peer book's bounds hold. Off by default: see docs/decisions/why-the-dht-is-opt-in.md.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Annotated, Any

import msgspec
import trio
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStore
from libp2p.records.validator import NamespacedValidator, Validator
from multiaddr import Multiaddr

from p2pfm.errors import PeerUnreachable
from p2pfm.runtime.network.dialer import Dialer
from p2pfm.runtime.network.peer_book import PeerBook, get_scope, parse_address
from p2pfm.types import DIGEST_BYTES, Digest, PeerId, short

log = logging.getLogger(__name__)

KAD_PROTOCOL = TProtocol("/p2pfm/kad/1")
NAMESPACE = "p2pfm"
TELLER = "dht"
"""Who told, in the peer book: what other nodes of the table say of where to go on counts as one teller."""
SIGNED_PREFIX = b"p2pfm/1 peer record"
RECORD_BYTES_MAX = 4096
RECORDS_MAX = 2048
STREAMS_PER_PEER_MAX = 4
STREAM_S = 20.0
LOOKUP_S = 20.0
PUBLISH_S = 600.0
PUBLISH_FIRST_S = 2.0
ADDRESSES_MAX = 8

_sender: ContextVar[str] = ContextVar("sender", default="")
"""Who speaks on the stream that is being served; "" in a lookup of our own."""


class PeerRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A peer's word on where it lives."""

    network_id: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    peer: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    sequence: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    """Grows; the wall clock in milliseconds will do."""
    addresses: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=256)], ...], msgspec.Meta(min_length=1, max_length=ADDRESSES_MAX)
    ]


class SignedRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A record's bytes, and its peer's signature over SIGNED_PREFIX and these bytes."""

    record: bytes
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


def make_key(peer: PeerId) -> str:
    """The table's key of a peer's record."""
    return f"/{NAMESPACE}/{peer}"


def sign_record(keypair: KeyPair, record: PeerRecord) -> bytes:
    """The record as it is stored."""
    data = msgspec.msgpack.encode(record)
    return msgspec.msgpack.encode(SignedRecord(data, keypair.private_key.sign(SIGNED_PREFIX + data)))


def open_record(network_id: Digest, key: str, value: bytes) -> PeerRecord:
    """The record under a key, proven.

    Raises:
        ValueError: too long, not a record, of another network or peer, an address of somebody else, or not signed by
            its peer.
    """
    if len(value) > RECORD_BYTES_MAX:
        raise ValueError(f"a record of {len(value)} bytes, at most {RECORD_BYTES_MAX} are allowed")
    signed = msgspec.msgpack.decode(value, type=SignedRecord)  # its errors are ValueErrors
    record = msgspec.msgpack.decode(signed.record, type=PeerRecord)
    if record.network_id != network_id or make_key(PeerId(record.peer)) != key:
        raise ValueError("a record of another network or peer")
    parsed = [parse_address(text) for text in record.addresses]
    if any(address is None or address.peer != record.peer for address in parsed):
        raise ValueError("a record with an address of somebody else")
    try:
        is_signed = (
            ID.from_base58(record.peer).extract_public_key().verify(SIGNED_PREFIX + signed.record, signed.signature)
        )
    except Exception as error:  # the library raises many classes on a malformed key
        raise ValueError(f"a record whose peer is no key: {error!r}") from error
    if not is_signed:
        raise ValueError("a record that its peer has not signed")
    return record


class RecordValidator(Validator):  # type: ignore[misc]
    """What the table asks before it keeps or believes a record."""

    def __init__(self, network_id: Digest) -> None:
        self._network_id = network_id

    def validate(self, key: str, value: bytes) -> None:
        """Raises ValueError for what `open_record` refuses, and for what anybody but its author wants stored."""
        record = open_record(self._network_id, key, value)
        if _sender.get() not in ("", record.peer):
            raise ValueError("a record that its author does not store itself")

    def select(self, key: str, values: Sequence[bytes]) -> int:
        """The newest; of equal ones the first, so that what is held stays."""
        sequences = [open_record(self._network_id, key, value).sequence for value in values]
        return sequences.index(max(sequences))


class _TableHost:
    """The host as the table sees it: own protocol, own peer store, and dials only through `reach`."""

    def __init__(self, host: Any, store: PeerStore, reach: Any, serve: Any) -> None:
        self._host = host
        self._store = store
        self._reach = reach
        self._serve = serve

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def get_peerstore(self) -> PeerStore:
        """The table's own, so that what strangers say never reaches the swarm's."""
        return self._store

    async def new_stream(self, peer_id: ID, protocols: Sequence[TProtocol]) -> Any:
        """A stream to a node of the table."""
        await self._reach(peer_id)
        return await self._host.new_stream(peer_id, [KAD_PROTOCOL])

    def set_stream_handler(self, protocol: TProtocol, handler: Any) -> None:
        """Serve the table on our protocol."""

        async def guarded(stream: Any) -> None:
            await self._serve(stream, handler)

        self._host.set_stream_handler(KAD_PROTOCOL, guarded)


class PeerTable:
    """One node's part of the table."""

    def __init__(
        self,
        keypair: KeyPair,
        network_id: Digest,
        host: Any,
        book: PeerBook,
        dialer: Dialer,
        addresses: Callable[[], Sequence[str]],
        now_ms: Callable[[], int],
    ) -> None:
        self.num_found = 0
        self.num_stored = 0
        """Peers that have taken our record."""
        self._keypair = keypair
        self._network_id = network_id
        self._peer = PeerId(str(ID.from_pubkey(keypair.public_key)))
        self._book = book
        self._dialer = dialer
        self._addresses = addresses
        self._now_ms = now_ms
        self._streams: Counter[str] = Counter()
        self._store = PeerStore()
        self._store.add_key_pair(ID.from_base58(self._peer), keypair)
        validator = NamespacedValidator({NAMESPACE: RecordValidator(network_id)}, strict_validation=True)
        self._table = KadDHT(
            _TableHost(host, self._store, self._reach, self._serve),
            DHTMode.SERVER,
            validator=validator,
            validator_changed=True,
            enable_providers=False,
            strict_validation=True,
        )
        self._table.provider_store.add_provider = _refuse_provider  # 0.8.1 keeps them although they are not enabled

    @property
    def num_records(self) -> int:
        """Records held for others and for this peer."""
        return len(self._table.value_store.store)

    async def run(self) -> None:
        """Keep this peer's record in the table, until cancelled."""
        await trio.sleep(PUBLISH_FIRST_S)
        while True:
            is_alone = not self._dialer.connected()
            if not is_alone:
                await self.publish()
            await trio.sleep(PUBLISH_FIRST_S if is_alone else PUBLISH_S * random.uniform(0.8, 1.2))
            self._table.value_store.cleanup_expired()
            self._trim()

    async def publish(self) -> None:
        """Tell where this peer lives now."""
        addresses = tuple(text for text in self._addresses() if "/0.0.0.0/" not in text)[:ADDRESSES_MAX]
        if not addresses:
            return  # a node that listens everywhere does not know which of its addresses others can dial
        record = PeerRecord(self._network_id, self._peer, self._now_ms(), addresses)
        await self._add_connected()
        with trio.move_on_after(LOOKUP_S):
            try:
                await self._table.put_value(make_key(self._peer), sign_record(self._keypair, record))
                self.num_stored += 1
            except Exception as error:  # noqa: BLE001 - the library raises anything that a stranger causes
                log.debug("the peer record could not be stored: %r", error)

    async def look_up(self, peer: PeerId) -> PeerRecord | None:
        """Put what the table knows of a peer into the book; returns it, None for nothing in time."""
        await self._add_connected()
        key = make_key(peer)
        with trio.move_on_after(LOOKUP_S):
            try:
                # What is held here is older than what others may hold.
                self._table.value_store.store.pop(key.encode(), None)
                value = await self._table.get_value(key)
                record = open_record(self._network_id, key, value) if value else None
            except Exception as error:  # noqa: BLE001 - the library raises anything that a stranger causes
                log.debug("looking up %s failed: %r", peer, error)
                return None
            if record is not None:
                self.num_found += 1
                for text in reversed(record.addresses):
                    self._book.add(text, trio.current_time(), peer)
                self._dialer.wake()
            return record
        return None

    async def _add_connected(self) -> None:
        for peer in self._dialer.connected():
            addresses = [Multiaddr(text.split("/p2p/")[0]) for text in self._book.get_addresses(peer)[:2]]
            if addresses:
                peer_id = ID.from_base58(peer)
                self._store.add_addrs(peer_id, addresses, int(2 * PUBLISH_S))
                with trio.move_on_after(2.0):
                    await self._table.routing_table.add_peer(PeerInfo(peer_id, addresses))

    async def _reach(self, peer_id: ID) -> None:
        peer = PeerId(str(peer_id))
        if peer in self._dialer.connected():
            return
        for address in self._store.addrs(peer_id)[:2]:
            parsed = parse_address(f"{address}/p2p/{peer}")
            if parsed is not None and get_scope(parsed.host) >= self._scope():
                self._book.add(f"{address}/p2p/{peer}", trio.current_time(), TELLER)
        if not self._book.get_addresses(peer):
            raise PeerUnreachable(f"no address of {short(peer)}")
        await self._dialer.dial(peer)

    def _scope(self) -> int:
        """Nobody from afar makes us dial what is near: as far as our own addresses reach."""
        parsed = [parse_address(text) for text in self._addresses()]
        return max((get_scope(address.host) for address in parsed if address), default=0)

    async def _serve(self, stream: Any, handler: Any) -> None:
        peer = str(stream.muxed_conn.peer_id)
        if self._streams[peer] >= STREAMS_PER_PEER_MAX:
            await stream.reset()
            return
        self._streams[peer] += 1
        _sender.set(peer)
        try:
            with trio.move_on_after(STREAM_S) as scope:
                await handler(stream)
            if scope.cancelled_caught:
                await stream.reset()
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
            self._trim()

    def _trim(self) -> None:
        records = self._table.value_store.store
        while len(records) > RECORDS_MAX:
            del records[next(iter(records))]
        if len(self._store.peer_ids()) > RECORDS_MAX:
            for peer_id in self._store.peer_ids():
                if str(peer_id) != self._peer:
                    self._store.clear_addrs(peer_id)
                    self._store.clear_peerdata(peer_id)


def _refuse_provider(key: bytes, provider: PeerInfo) -> None:
    """Peers of a network know one another from peer exchange; nobody stores providers here."""
