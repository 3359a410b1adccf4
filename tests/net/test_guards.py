"""What a stranger can do to a host: after each attack the host still answers and hears an honest peer.

The rogue is a stock py-libp2p host (or a bare socket) on loopback that sends what no honest peer sends. Most of these
bytes end, stall or fill a stock host.
"""

import os
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.mplex.mplex import MPLEX_PROTOCOL_ID, Mplex
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.utils import encode_varint_prefixed
from multiaddr import Multiaddr
from net_hosts import make_transport, network, until

from p2pfm.config import TransportLimits
from p2pfm.messages import PeersRequest, encode
from p2pfm.runtime.network.transport import PEERS_PROTOCOL, REQUEST_PROTOCOL, STREAM_PROTOCOL, Libp2pTransport
from p2pfm.types import PeerId

MESHSUB = "/meshsub/1.1.0"
DATA, WINDOW, PING = 0, 1, 2
SYN, RST = 1, 8
CUT = suppress(IOException, RawConnError)
"""The victim ended the connection while the rogue was writing."""


def make_rogue(number: int = 66, security: Any = None, muxers: Any = None) -> Any:
    key_pair = create_new_key_pair(bytes([number]) * 32)
    noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair, sec_opt=security or {NOISE: noise}, muxer_opt=muxers or {YAMUX: Yamux})


@asynccontextmanager
async def running(rogue: Any) -> AsyncIterator[Any]:
    async with rogue.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        try:
            yield rogue
        finally:
            with trio.move_on_after(3, shield=True):
                await rogue.close()


async def connect(rogue: Any, victim: Libp2pTransport) -> Any:
    """The muxed connection of the rogue to the victim."""
    await rogue.connect(info_from_p2p_addr(Multiaddr(victim.addresses()[0])))
    return rogue.get_network().get_connections(ID.from_base58(victim.peer_id))[0].muxed_conn


async def open_stream(rogue: Any, victim: Libp2pTransport, protocol: str) -> Any:
    return await rogue.new_stream(ID.from_base58(victim.peer_id), [protocol])


async def check_alive(victim: Libp2pTransport, honest: Libp2pTransport) -> None:
    """The victim answers an honest peer, hears it, and is heard."""
    assert await honest.request(victim.peer_id, b"alive?", timeout_s=5) == b"alive?"
    with trio.fail_after(5):
        await honest.publish(b"can you hear me")
        while (await victim.gossip.receive())[1] != b"can you hear me":
            pass
        await victim.publish(b"yes")
        while (await honest.gossip.receive())[1] != b"yes":
            pass


async def serve(peer: PeerId, data: bytes) -> bytes:
    if data == b"boom":
        raise RuntimeError("a bug in a handler")
    return data


Attack = Callable[[Any, Libp2pTransport], Awaitable[None]]


def run_attack(attack: Attack, *, is_blamed: bool = False, limits: TransportLimits | None = None) -> None:
    async def main() -> None:
        async with network(2, limits) as (victim, honest), running(make_rogue()) as rogue:
            victim.set_handler(serve)
            await connect(rogue, victim)
            with trio.fail_after(30):
                await attack(rogue, victim)
            await check_alive(victim, honest)
            if is_blamed:
                assert victim.counters["blames"] > 0

    trio.run(main)


# --- gossip ---


def make_message(rogue: Any, victim: Libp2pTransport, **changes: Any) -> rpc_pb2.Message:
    """A well-signed message of the rogue, then changed."""
    message = rpc_pb2.Message(data=b"x", topicIDs=[victim._topic], from_id=rogue.get_id().to_bytes(), seqno=b"1")
    signed = PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString()
    message.signature = rogue.get_private_key().sign(signed)
    message.key = rogue.get_public_key().serialize()
    for name, value in changes.items():
        setattr(message, name, value)
    return message


async def gossip(rogue: Any, victim: Libp2pTransport, data: bytes) -> None:
    stream = await open_stream(rogue, victim, MESHSUB)
    await stream.write(encode_varint_prefixed(data))
    await until(lambda: victim.counters["blames"], 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": b"no key", "from_id": b"\x12\x20" + bytes(32)},
        {"from_id": b""},
        {"from_id": b"\xff" * 40},
        {"seqno": b""},
        {"signature": b""},
        {"signature": bytes(64)},
        {"data": b"changed"},
        {"data": bytes(600_000)},
    ],
    ids=str,
)
def test_a_malformed_gossip_message_blames_its_sender_only(changes: dict[str, Any]) -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        rpc = rpc_pb2.RPC(publish=[make_message(rogue, victim, **changes)])
        await gossip(rogue, victim, rpc.SerializeToString())

    run_attack(attack, is_blamed=True)


def test_a_well_signed_gossip_message_of_the_rogue_is_heard() -> None:
    """So that the attacks above fail for what they change, and for nothing else."""

    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        stream = await open_stream(rogue, victim, MESHSUB)
        rpc = rpc_pb2.RPC(publish=[make_message(rogue, victim)])
        await stream.write(encode_varint_prefixed(rpc.SerializeToString()))
        with trio.fail_after(5):
            assert await victim.gossip.receive() == (str(rogue.get_id()), b"x")

    run_attack(attack)


@pytest.mark.parametrize("data", [b"\xff" * 100, b"\x12\xff", os.urandom(1000)], ids=["ff", "cut", "random"])
def test_garbage_instead_of_protobuf_blames_its_sender_only(data: bytes) -> None:
    run_attack(lambda rogue, victim: gossip(rogue, victim, data), is_blamed=True)


def test_an_oversize_gossip_frame_blames_its_sender_only() -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        stream = await open_stream(rogue, victim, MESHSUB)
        await stream.write(b"\xff\xff\xff\xff\x7f")
        await until(lambda: victim.counters["blames"], 5)

    run_attack(attack, is_blamed=True)


def test_control_entries_and_subscriptions_about_strange_topics_leave_nothing_behind() -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        stream = await open_stream(rogue, victim, MESHSUB)
        for number in range(200):
            topic = f"strange {number}"
            control = rpc_pb2.ControlMessage(
                ihave=[rpc_pb2.ControlIHave(topicID=topic, messageIDs=[b"zz", b"\xff"])],
                iwant=[rpc_pb2.ControlIWant(messageIDs=[b"odd", b"\x00" * 100])],
                graft=[rpc_pb2.ControlGraft(topicID=topic)],
                prune=[rpc_pb2.ControlPrune(topicID=topic, backoff=2**62)],
            )
            subscription = rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic)
            rpc = rpc_pb2.RPC(control=control, subscriptions=[subscription])
            rpc.senderRecord = b"not an envelope"
            await stream.write(encode_varint_prefixed(rpc.SerializeToString()))
        rpc = rpc_pb2.RPC(publish=[make_message(rogue, victim)])
        await stream.write(encode_varint_prefixed(rpc.SerializeToString()))
        with trio.fail_after(10):
            await victim.gossip.receive()
        router = victim._pubsub.router
        assert set(victim._pubsub.peer_topics) == {victim._topic}
        assert set(router.back_off) <= {victim._topic}
        assert set(router.ihave_message_limits.get(rogue.get_id(), ())) <= {victim._topic}

    run_attack(attack)


def test_a_flood_of_one_author_is_cut_to_its_rate() -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        stream = await open_stream(rogue, victim, MESHSUB)
        flood = b""  # made before: signing takes as long as the rate allows again
        for number in range(1000):
            message = rpc_pb2.Message(
                data=b"spam", topicIDs=[victim._topic], from_id=rogue.get_id().to_bytes(), seqno=b"%d" % number
            )
            signed = PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString()
            message.signature = rogue.get_private_key().sign(signed)
            flood += encode_varint_prefixed(rpc_pb2.RPC(publish=[message]).SerializeToString())
        await stream.write(flood)
        await until(lambda: victim.counters["gossip_received"] + victim._pubsub.dropped["rate"] >= 1000, 20)
        assert victim.counters["gossip_received"] < 900

    run_attack(attack)


def test_a_peer_that_goes_on_breaking_rules_is_banned() -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        for _ in range(3):
            stream = await open_stream(rogue, victim, MESHSUB)
            await stream.write(encode_varint_prefixed(b"\xff" * 10))
        await until(lambda: str(rogue.get_id()) not in victim.connected(), 5)
        with pytest.raises((SwarmException, trio.TooSlowError)):
            await open_stream(rogue, victim, MESHSUB)

    run_attack(attack, is_blamed=True)


# --- requests ---


@pytest.mark.parametrize("protocol", [REQUEST_PROTOCOL, STREAM_PROTOCOL, PEERS_PROTOCOL])
@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", b"\x00\x00\x10\x00cut", b"\x00\x00\x00\x04boom", b"\x00"],
    ids=["big", "cut", "boom", "one"],
)
def test_a_bad_frame_ends_its_stream_only(protocol: str, data: bytes) -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        stream = await open_stream(rogue, victim, protocol)
        await stream.write(data)
        await stream.close()

    run_attack(attack)


def test_addresses_that_a_peer_tells_about_others_are_ignored() -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        other = make_transport(50).peer_id
        false = (f"/ip4/127.0.0.1/tcp/1/p2p/{other}", "nonsense", f"/ip4/999.0.0.1/tcp/1/p2p/{rogue.get_id()}")
        data = encode(PeersRequest(false))
        stream = await open_stream(rogue, victim, PEERS_PROTOCOL)
        await stream.write(len(data).to_bytes(4, "big") + data)
        assert await stream.read(4)
        assert victim.book.get_addresses(other) == []

    run_attack(attack)


# --- streams and connections ---


def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"") -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, stream, length) + body


async def is_cut(rogue: Any, victim: Libp2pTransport) -> float:
    """Wait until the victim has dropped the rogue."""
    return await until(lambda: str(rogue.get_id()) not in victim.connected(), 10)


def test_ignoring_the_window_ends_the_connection_before_5_mb_are_held() -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        stream = await open_stream(rogue, victim, STREAM_PROTOCOL)
        conn = stream.muxed_conn
        held = 0
        connection = victim._host.get_network().get_connections(rogue.get_id())[0].muxed_conn
        with CUT:
            for _ in range(400):
                await conn._write_frame(frame(DATA, 0, stream.muxed_stream.stream_id, 65_000, bytes(65_000)))
                held = max(held, sum(map(len, connection.stream_buffers.values())))
        await is_cut(rogue, victim)
        assert held < 5_000_000

    run_attack(attack, is_blamed=True)


def test_a_flood_of_streams_ends_the_connection() -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        conn = rogue.get_network().get_connections(ID.from_base58(victim.peer_id))[0].muxed_conn
        with CUT:
            for number in range(20_000):
                await conn._write_frame(frame(WINDOW, SYN, 1001 + 2 * number, 0))
        await is_cut(rogue, victim)

    run_attack(attack, is_blamed=True)


def test_streams_opened_and_reset_at_once_are_cut_too() -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        conn = rogue.get_network().get_connections(ID.from_base58(victim.peer_id))[0].muxed_conn
        with CUT:
            for number in range(20_000):
                await conn._write_frame(frame(WINDOW, SYN | RST, 1001 + 2 * number, 0))
        await is_cut(rogue, victim)

    run_attack(attack, is_blamed=True)


@pytest.mark.parametrize("seed", range(5))
def test_random_frames_end_their_connection_at_most(seed: int) -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        draw = random.Random(seed)
        conn = rogue.get_network().get_connections(ID.from_base58(victim.peer_id))[0].muxed_conn
        with CUT:
            for _ in range(300):
                kind = draw.choice([DATA, WINDOW, PING, DATA, WINDOW, 77])
                length = draw.choice([0, 1, 100, 2**31, 2**32 - 1]) if kind != DATA else draw.choice([0, 1, 100])
                body = draw.randbytes(length) if kind == DATA else b""
                await conn._write_frame(frame(kind, draw.randrange(16), draw.randrange(40), length, body))
            await conn._write_frame(draw.randbytes(200))

    run_attack(attack)


@pytest.mark.parametrize(
    "data", [b"\x05\xff\xfe\xfd\n", b"\xff" * 20, b"\x13/multistream/1.0.0\n\x03\xff\xff\n", b"\x00"]
)
def test_a_stream_name_that_is_no_text_ends_its_stream_only(data: bytes) -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        conn = rogue.get_network().get_connections(ID.from_base58(victim.peer_id))[0].muxed_conn
        stream = await conn.open_stream()
        await stream.write(data)
        await stream.close()

    run_attack(attack)


@pytest.mark.parametrize("protocol", ["/ipfs/id/1.0.0", "/ipfs/ping/1.0.0"])
def test_garbage_on_the_librarys_own_protocols_ends_its_stream_only(protocol: str) -> None:
    async def attack(rogue: Any, victim: Libp2pTransport) -> None:
        stream = await open_stream(rogue, victim, protocol)
        await stream.write(b"\xff" * 500)
        await stream.close()

    run_attack(attack)


def test_garbage_on_the_socket_and_400_silent_sockets_keep_no_newcomer_out() -> None:
    async def main() -> None:
        async with network(2) as (victim, honest):
            victim.set_handler(serve)
            port = int(victim.addresses()[0].split("/")[4])
            sockets = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(400)]
            for number, socket in enumerate(sockets[:50]):
                await socket.send_all(random.Random(number).randbytes(100))
            async with make_transport(9, victim.addresses()) as newcomer:
                assert await until(lambda: victim.peer_id in newcomer.connected(), 10) < 3
                await check_alive(victim, honest)
            for socket in sockets:
                await trio.aclose_forcefully(socket)

    trio.run(main)


def test_connections_that_end_give_their_slot_back() -> None:
    limits = TransportLimits(connections_per_address_max=4)

    async def main() -> None:
        async with make_transport(1, limits=limits) as victim:
            for number in range(20, 30):
                async with make_transport(number, victim.addresses()) as guest:
                    await until(lambda guest=guest: guest.peer_id in victim.connected(), 5)
                await until(lambda guest=guest: guest.peer_id not in victim.connected(), 5)

    trio.run(main)


@pytest.mark.parametrize("weak", ["plaintext", "mplex"])
def test_only_noise_and_yamux_are_spoken(weak: str) -> None:
    async def main() -> None:
        key_pair = create_new_key_pair(bytes([67]) * 32)
        plain = {PLAINTEXT_PROTOCOL_ID: InsecureTransport(key_pair)}
        rogue = (
            make_rogue(67, security=plain) if weak == "plaintext" else make_rogue(67, muxers={MPLEX_PROTOCOL_ID: Mplex})
        )
        async with network(2) as (victim, honest), running(rogue):
            victim.set_handler(serve)
            with pytest.raises(SwarmException), trio.fail_after(10):
                await connect(rogue, victim)
            assert str(rogue.get_id()) not in victim.connected()
            await check_alive(victim, honest)

    trio.run(main)


def test_a_bug_in_a_handler_ends_its_stream_only() -> None:
    async def main() -> None:
        async with network(2) as (victim, honest):
            victim.set_handler(serve)
            for _ in range(3):
                with pytest.raises(Exception, match="broke off"):
                    await honest.request(victim.peer_id, b"boom", timeout_s=3)
            await check_alive(victim, honest)

    trio.run(main)
