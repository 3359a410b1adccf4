"""A rogue: a client of its own that sends at every layer what no honest peer sends.

From the bare socket up: multistream-select, Noise, Yamux, protocol negotiation, gossip, our own frames, signed
envelopes. It comes from another loopback address than honest peers, and keeps no rule unless an attack wants it to.
"""

import logging
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import trio
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.utils.varint import encode_uvarint, encode_varint_prefixed
from nacl.signing import SigningKey
from net_victim_process import make_keys

from p2pfm.messages import Envelope, Message, Wire, encode, signed_bytes
from p2pfm.runtime.network.transport import PEERS_PROTOCOL, REQUEST_PROTOCOL, STREAM_PROTOCOL
from p2pfm.types import Digest, PeerId

log = logging.getLogger(__name__)

MULTISTREAM, NOISE, YAMUX = "/multistream/1.0.0", "/noise", "/yamux/1.0.0"
MESHSUB, IDENTIFY, PUSH, PING_PROTOCOL = "/meshsub/1.1.0", "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"
REQUEST, STREAM, PEERS = REQUEST_PROTOCOL, STREAM_PROTOCOL, PEERS_PROTOCOL
DATA, WINDOW, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8
SOURCE = "127.0.0.66"
HEADER = struct.Struct("!BBHII")


class Cut(Exception):
    """The victim ended the stream or the connection."""


GONE = (Cut, OSError, trio.BrokenResourceError, trio.ClosedResourceError, BaseLibp2pError)
"""What the end of a connection looks like from here."""


def delimited(text: str | bytes) -> bytes:
    """One message of multistream-select."""
    data = text.encode() if isinstance(text, str) else text
    return encode_varint_prefixed(data + b"\n")


def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"") -> bytes:
    """A Yamux frame with any header."""
    return HEADER.pack(0, kind, flags, stream, length) + body


def ours(body: bytes | Wire) -> bytes:
    """One of our own frames."""
    data = body if isinstance(body, bytes) else encode(body)
    return len(data).to_bytes(4, "big") + data


class Channel:
    """One Yamux stream of the rogue. Writes as much as it likes, whatever window it was given."""

    def __init__(self, mux: "Mux", number: int) -> None:
        self.mux = mux
        self.number = number
        self.inbox = bytearray()
        self.is_over = False
        self.changed = trio.Event()

    async def write(self, data: bytes) -> None:
        """Send bytes, in as many frames as it takes."""
        for start in range(0, len(data), 65_000):
            part = data[start : start + 65_000]
            await self.mux.send(DATA, 0, self.number, len(part), part)

    async def read(self, size: int) -> bytes:
        """Exactly so many bytes, and gives credit for them. Raises: Cut."""
        while len(self.inbox) < size:
            if self.is_over or self.mux.is_cut.is_set():
                raise Cut("the stream was ended")
            await self.changed.wait()
        data = bytes(self.inbox[:size])
        del self.inbox[:size]
        await self.mux.send(WINDOW, 0, self.number, size)
        return data

    async def read_delimited(self) -> bytes:
        """A message of multistream-select (shorter than 128 bytes)."""
        return await self.read((await self.read(1))[0])

    async def ask(self, body: bytes | Wire) -> bytes:
        """One of our frames there, one back."""
        await self.write(ours(body))
        return await self.read(int.from_bytes(await self.read(4), "big"))

    async def wait_for_end(self) -> None:
        """Until the victim has closed or reset this stream."""
        while not self.is_over and not self.mux.is_cut.is_set():
            await self.changed.wait()

    def tell(self) -> None:
        """Something came."""
        self.changed.set()
        self.changed = trio.Event()


class Mux:
    """Yamux over a secured connection. Answers pings and keeps what comes; knows no limit."""

    def __init__(self, conn: Any) -> None:
        self._conn = conn
        self._buffer = bytearray()
        self._next = 1
        self.channels: dict[int, Channel] = {}
        self.is_reading = True
        """False: leaves all that comes in the socket."""
        self.is_cut = trio.Event()
        self.num_frames: defaultdict[int, int] = defaultdict(int)
        """Frames that came, by kind."""
        self.num_bytes = 0
        self.answer: Callable[[bytes], Awaitable[bytes]] | None = None
        """Answers the victim's requests; None: they are reset."""
        self.serve: Callable[[Channel], Awaitable[None]] = self._serve_requests
        """What happens on streams that the victim opens."""

    async def run(self) -> None:
        """Read until the connection ends."""
        async with trio.open_nursery() as nursery:
            await self._read_all(nursery)
            nursery.cancel_scope.cancel()
        self.is_cut.set()
        for channel in self.channels.values():
            channel.is_over = True
            channel.tell()

    async def _read_all(self, nursery: trio.Nursery) -> None:
        with suppress(*GONE):
            while True:
                header = await self._take(HEADER.size)
                _, kind, flags, number, length = HEADER.unpack(header)
                self.num_frames[kind] += 1
                body = await self._take(length) if kind == DATA else b""
                self.num_bytes += HEADER.size + len(body)
                if kind == PING and flags & SYN:
                    await self.send(PING, ACK, 0, length)
                if kind == GO_AWAY:
                    return
                if flags & SYN and number % 2 == 0 and kind in (DATA, WINDOW):
                    channel = self.channels[number] = Channel(self, number)
                    nursery.start_soon(self.serve, channel)
                channel = self.channels.get(number)
                if channel is not None:
                    channel.inbox += body
                    channel.is_over |= bool(flags & (FIN | RST))
                    channel.tell()

    async def _serve_requests(self, channel: Channel) -> None:
        with suppress(*GONE):
            if self.answer is None:
                await self.send(WINDOW, RST, channel.number, 0)
                return
            await channel.write(delimited(MULTISTREAM))
            await channel.read_delimited()
            protocol = await channel.read_delimited()
            if protocol != REQUEST.encode() + b"\n":
                await self.send(WINDOW, RST, channel.number, 0)
                return
            await channel.write(encode_varint_prefixed(protocol))
            while True:
                asked = await channel.read(int.from_bytes(await channel.read(4), "big"))
                await channel.write(ours(await self.answer(asked)))

    async def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            while not self.is_reading:
                await trio.sleep(0.05)
            self._buffer += await self._conn.read(None)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def send_bytes(self, data: bytes) -> None:
        """Bytes that need not be frames."""
        await self._conn.write(data)
        await trio.lowlevel.checkpoint()

    async def send(self, kind: int, flags: int, number: int, length: int, body: bytes = b"") -> None:
        """A frame with any header."""
        await self.send_bytes(frame(kind, flags, number, length, body))

    async def open_bare(self) -> Channel:
        """A stream on which nothing was negotiated."""
        channel = self.channels[self._next] = Channel(self, self._next)
        self._next += 2
        await self.send(WINDOW, SYN, channel.number, 0)
        return channel

    async def open(self, protocol: str) -> Channel:
        """A stream that speaks a protocol. Raises: Cut."""
        channel = await self.open_bare()
        await channel.write(delimited(MULTISTREAM) + delimited(protocol))
        await channel.read_delimited()
        if await channel.read_delimited() != protocol.encode() + b"\n":
            raise Cut(f"{protocol} is not spoken")
        return channel


class Rogue:
    """One identity: the member of this number, if the victim's registry has it; else a stranger."""

    def __init__(self, number: int, port: int, victim: PeerId, network_id: Digest) -> None:
        self.number = number
        self.keys = make_keys(number)
        self.peer = self.keys.peer
        self.victim = victim
        self._port = port
        self._network_id = network_id
        self.topic = f"/p2pfm/{network_id.hex()[:32]}"
        self._seqno = 0

    # --- layers ---

    async def dial(self) -> trio.SocketStream:
        """A bare socket to the victim."""
        return await trio.open_tcp_stream("127.0.0.1", self._port, local_address=SOURCE)

    async def select(self, raw: trio.SocketStream, protocol: str) -> None:
        """Multistream-select on a bare socket. Raises: Cut."""
        await raw.send_all(delimited(MULTISTREAM) + delimited(protocol))
        expected = delimited(MULTISTREAM) + delimited(protocol)
        got = b""
        while len(got) < len(expected):
            data = await raw.receive_some(len(expected) - len(got))
            if not data:
                raise Cut("no such protocol")
            got += data
        assert got == expected

    async def secure(self, raw: trio.SocketStream) -> Any:
        """Noise as it should be, on a bare socket."""
        await self.select(raw, NOISE)
        noise = NoiseTransport(self.keys.keypair, noise_privkey=create_noise_key_pair().private_key)
        connection = RawConnection(TrioTCPStream(raw), True)
        return await noise.secure_outbound(connection, ID.from_base58(self.victim))

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Mux]:
        """A whole connection, up to Yamux. When the victim ends it, the block ends, too."""
        raw = await self.dial()
        try:
            conn = await self.secure(raw)
            await conn.write(delimited(MULTISTREAM) + delimited(YAMUX))
            expected = delimited(MULTISTREAM) + delimited(YAMUX)
            got = b""
            while len(got) < len(expected):
                got += await conn.read(len(expected) - len(got))
            assert got == expected
            mux = Mux(conn)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(mux.run)
                    yield mux
                    nursery.cancel_scope.cancel()
            except* GONE as group:
                log.debug("cut: %r", group.exceptions)
        finally:
            await trio.aclose_forcefully(raw)

    # --- gossip ---

    def sign(self, data: bytes, **changes: Any) -> rpc_pb2.Message:
        """A gossip message of this rogue, well signed, then changed."""
        self._seqno += 1
        message = rpc_pb2.Message(
            data=data,
            topicIDs=[self.topic],
            from_id=ID.from_base58(self.peer).to_bytes(),
            seqno=self._seqno.to_bytes(8, "big"),
        )
        signed = PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString()
        message.signature = self.keys.keypair.private_key.sign(signed)
        for name, value in changes.items():
            setattr(message, name, value)
        return message

    async def gossip(self, mux: Mux) -> Channel:
        """A gossip stream that has subscribed."""
        channel = await mux.open(MESHSUB)
        await channel.write(rpc(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=self.topic)]))
        return channel

    # --- envelopes ---

    def seal(self, message: Message | bytes, author: PeerId | None = None, network: bytes | None = None) -> Envelope:
        """A message signed by this rogue: for this network or another, in its own name or another's."""
        body = message if isinstance(message, bytes) else encode(message)
        name = author or self.peer
        data = signed_bytes(Digest(network or self._network_id), name, body)
        return Envelope(name, body, SigningKey(self.keys.peer_seed).sign(data).signature)


def rpc(**fields: Any) -> bytes:
    """A gossip frame."""
    return encode_varint_prefixed(rpc_pb2.RPC(**fields).SerializeToString())


def announce_length(length: int) -> bytes:
    """The length prefix of a gossip frame that need not follow."""
    return encode_uvarint(length)


def loosen(value: Wire) -> bytes:
    """The same value in other bytes: its outer list with a longer header than it needs."""
    data = encode(value)
    assert data[0] & 0xF0 == 0x90
    return b"\xdc" + struct.pack("!H", data[0] & 0x0F) + data[1:]


def replace(value: Any, **changes: Any) -> Any:
    """A struct with other values."""
    return msgspec.structs.replace(value, **changes)
