"""Attacks at every layer on one whole node: after each it lives, serves honest peers, and is no bigger than before.

The victim is a real node in a process of its own (`net_victim_process.py`); each attack is a rogue of a new identity
(`rogue.py`). Whoever can be proven to have broken a rule is blamed; the honest peer never is (`hostile_world.py`).
"""

import random
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from hostile_world import MEMBERS, Run, World, world_in_a_thread
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr
from net_victim_process import FIRST_ROGUE, PROBE
from rogue import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    GONE,
    IDENTIFY,
    MESHSUB,
    MULTISTREAM,
    NOISE,
    PEERS,
    PING,
    PING_PROTOCOL,
    PUSH,
    REQUEST,
    RST,
    STREAM,
    SYN,
    WINDOW,
    Channel,
    Cut,
    Mux,
    Rogue,
    announce_length,
    delimited,
    frame,
    loosen,
    ours,
    rpc,
)

from p2pfm.messages import (
    Announcement,
    Attestation,
    BlobReply,
    BlobRequest,
    Certificate,
    GenerateRequest,
    PeersRequest,
    Presence,
    Proposal,
    ScoreCommit,
    SyncReply,
    SyncRequest,
    decode_message,
    decode_reply,
    decode_request,
    encode,
)
from p2pfm.settlement import bls
from p2pfm.types import Digest, MemberIndex, Round, compute_digest

pytestmark = pytest.mark.slow

CUT = suppress(*GONE)
ZERO = Digest(bytes(32))
Do = Callable[[Rogue, World], Awaitable[None]]


@dataclass(frozen=True)
class Attack:
    """What a rogue does, and what the victim can prove of it."""

    do: Do
    is_blamed: bool | None
    is_member: bool


ATTACKS: dict[str, Attack] = {}


def attack(*, blamed: bool | None = None, member: bool = False) -> Callable[[Do], Do]:
    """Into the table. `blamed`: the victim can prove who it was, and must; False: it may not, since an honest peer
    could have done the same. `member`: by a registered peer."""

    def put(do: Do) -> Do:
        ATTACKS[do.__name__] = Attack(do, blamed, member)
        return do

    return put


# --- the bare socket, multistream-select, Noise ---


async def burn(rogue: Rogue, *parts: bytes, is_read: bool = True) -> int:
    """Send bytes on a bare socket; returns how many came back until the victim closed it (or said no more)."""
    got = 0
    stream = await rogue.dial()
    with CUT:
        for part in parts:
            await stream.send_all(part)
        with trio.move_on_after(0.5):
            while is_read and (data := await stream.receive_some()):
                got += len(data)
    await trio.aclose_forcefully(stream)
    return got


@attack()
async def garbage_on_the_socket(rogue: Rogue, world: World) -> None:
    for seed in range(20):
        await burn(rogue, random.Random(seed).randbytes(3000), is_read=seed < 2)


@attack()
async def a_length_of_two_to_the_63_before_the_handshake(rogue: Rogue, world: World) -> None:
    await burn(rogue, b"\xff" * 9 + b"\x01", bytes(10_000))
    await burn(rogue, b"\xff\xff\xff\xff\x7f", bytes(200_000))


@attack()
async def a_handshake_that_sends_a_gigabyte_of_protocol_name(rogue: Rogue, world: World) -> None:
    async def pour(number: int) -> None:
        stream = await rogue.dial()
        with CUT, trio.move_on_after(3):
            await stream.send_all(delimited(MULTISTREAM) + announce_length(1 << 30))
            while True:
                await stream.send_all(bytes(1 << 20))
        await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(pour, number)


@attack()
async def protocols_asked_for_without_end(rogue: Rogue, world: World) -> None:
    with trio.move_on_after(3):
        await burn(rogue, delimited(MULTISTREAM), *[delimited("ls") * 100, delimited(f"/{'x' * 90}") * 100] * 100)


@attack()
async def the_first_noise_message_is_garbage(rogue: Rogue, world: World) -> None:
    for size in (0, 1, 31, 33, 200, 65_535):
        stream = await rogue.dial()
        with CUT:
            await rogue.select(stream, NOISE)
            await stream.send_all(struct.pack("!H", size) + random.Random(size).randbytes(size))
        await trio.aclose_forcefully(stream)


@attack()
async def the_third_noise_message_is_garbage(rogue: Rogue, world: World) -> None:
    for size in (0, 16, 64, 200, 65_535):
        stream = await rogue.dial()
        with CUT:
            await rogue.select(stream, NOISE)
            await stream.send_all(struct.pack("!H", 32) + random.Random(size).randbytes(32))
            length = struct.unpack("!H", await stream.receive_some(2))[0]
            while length > 0:
                length -= len(await stream.receive_some(length))
            await stream.send_all(struct.pack("!H", size) + bytes(size))
        await trio.aclose_forcefully(stream)


@attack(blamed=False)
async def handshakes_broken_off_at_every_step(rogue: Rogue, world: World) -> None:
    steps = (b"", b"\x13", delimited(MULTISTREAM), delimited(MULTISTREAM) + delimited(NOISE))
    for data in (*steps, steps[-1] + b"\x00", steps[-1] + b"\x00\x20" + bytes(10)):
        for _ in range(5):
            stream = await rogue.dial()
            await stream.send_all(data) if data else None
            await trio.aclose_forcefully(stream)


@attack()
async def plain_bytes_after_the_handshake(rogue: Rogue, world: World) -> None:
    stream = await rogue.dial()
    with CUT:
        await rogue.secure(stream)
        await stream.send_all(delimited(MULTISTREAM) + bytes(1000))
        await trio.sleep(0.2)
    await trio.aclose_forcefully(stream)


@attack()
async def garbage_instead_of_a_muxer(rogue: Rogue, world: World) -> None:
    for data in (b"\xff" * 300, delimited(MULTISTREAM) + delimited("/mplex/6.7.0"), delimited(b"\xff\xfe"), b""):
        stream = await rogue.dial()
        with CUT:
            conn = await rogue.secure(stream)
            await conn.write(data)
            await trio.sleep(0.1)
        await trio.aclose_forcefully(stream)


@attack()
async def four_hundred_silent_sockets(rogue: Rogue, world: World) -> None:
    sockets = [await rogue.dial() for _ in range(400)]
    await trio.sleep(0.5)
    for stream in sockets:
        await trio.aclose_forcefully(stream)


@attack()
async def handshakes_in_drips(rogue: Rogue, world: World) -> None:
    async def drip() -> None:
        with CUT:
            stream = await rogue.dial()
            for byte in delimited(MULTISTREAM) + delimited(NOISE) + b"\x00\x20" + bytes(32):
                await stream.send_all(bytes([byte]))
                await trio.sleep(0.05)

    with trio.move_on_after(2):
        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(drip)


@attack(blamed=False)
async def connections_that_come_and_go(rogue: Rogue, world: World) -> None:
    for _ in range(40):
        with CUT:
            async with rogue.session():
                pass


@attack()
async def one_identity_connects_thirty_times(rogue: Rogue, world: World) -> None:
    async def connect() -> None:
        with CUT:
            async with rogue.session() as mux:
                await mux.is_cut.wait()

    with trio.move_on_after(3):
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(connect)


@attack()
async def forty_identities_from_one_address(rogue: Rogue, world: World) -> None:
    async def connect(number: int) -> None:
        with CUT:
            one = world.make_rogue(number)
            async with one.session() as mux:
                await one.gossip(mux)
                await mux.is_cut.wait()

    with trio.move_on_after(4):
        async with trio.open_nursery() as nursery:
            for number in range(200, 240):
                nursery.start_soon(connect, number)
    await world.wait_for_state(lambda state: len(state["connected"]) < 5, 15)


# --- Yamux ---


@attack(blamed=True)
async def twenty_thousand_streams(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT:
            for number in range(20_000):
                await mux.send(WINDOW, SYN, 2 * number + 1, 0)
        await mux.is_cut.wait()


@attack(blamed=True)
async def twenty_thousand_streams_reset_at_once(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT:
            for number in range(20_000):
                await mux.send(WINDOW, SYN | RST, 2 * number + 1, 0)
        await mux.is_cut.wait()


@attack(blamed=True)
async def the_window_is_ignored(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT:
            channel = await mux.open(STREAM)
            while True:
                await channel.write(bytes(65_000))
        await mux.is_cut.wait()


@attack(blamed=True)
async def many_streams_are_filled_that_nobody_reads(rogue: Rogue, world: World) -> None:
    """Requests wait behind replies for which the rogue gives no credit."""
    async with rogue.session() as mux:
        request = ours(BlobRequest(compute_digest(PROBE), 0, 262_144))
        for _ in range(300):
            channel = await mux.open(REQUEST)
            await channel.write(request * 6 + b"\x00\x0f\x00\x00" + bytes(240_000))
        await mux.is_cut.wait()
    await world.wait_for_blame(rogue)


@attack(blamed=True)
async def a_frame_of_four_gigabytes(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT:
            await mux.send(DATA, 0, 1, 2**32 - 1, bytes(100_000))
        await mux.is_cut.wait()


@attack()
async def credit_beyond_all_bounds(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channel = await mux.open(REQUEST)
        for _ in range(2000):
            await mux.send(WINDOW, 0, channel.number, 2**32 - 1)
        await channel.ask(BlobRequest(compute_digest(PROBE), 0, 65_536))


@attack()
async def pings_whose_answers_nobody_reads(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        mux.is_reading = False
        with trio.move_on_after(2), CUT:
            while True:
                await mux.send_bytes(frame(PING, SYN, 0, 7) * 500)


@attack()
async def a_hundred_thousand_pings(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with trio.move_on_after(3), CUT:
            for _ in range(200):
                await mux.send_bytes(frame(PING, SYN, 0, 7) * 500)


@attack()
async def it_says_goodbye_and_goes_on(rogue: Rogue, world: World) -> None:
    for code in (0, 1, 2, 77, 2**32 - 1):
        with CUT:
            async with rogue.session() as mux:
                await mux.send(GO_AWAY, 0, 0, code)
                for _ in range(100):
                    await mux.send(WINDOW, SYN, 1, 0)


@attack()
async def resets_and_acks_for_streams_that_are_not_there(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT:
            for number in range(1000, 11_000):
                await mux.send(random.choice((DATA, WINDOW)), random.choice((RST, FIN, ACK, RST | ACK)), number, 0)


@attack()
async def data_on_streams_that_are_not_there(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT, trio.move_on_after(3):
            for number in range(1000):
                await mux.send(DATA, 0, 2 * number + 5001, 60_000, bytes(60_000))


@attack()
async def data_after_the_end_of_a_stream(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channel = await mux.open(PING_PROTOCOL)
        with CUT:
            for flags in (FIN, 0, FIN, RST, 0, SYN, SYN | FIN, SYN | RST):
                for _ in range(50):
                    await mux.send(DATA, flags, channel.number, 1000, bytes(1000))


@attack()
async def frames_of_no_kind(rogue: Rogue, world: World) -> None:
    for seed in range(8):
        draw = random.Random(seed)
        async with rogue.session() as mux:
            with CUT:
                for _ in range(300):
                    kind = draw.choice([DATA, WINDOW, PING, DATA, WINDOW, 77, 255])
                    length = draw.choice([0, 1, 100])
                    body = bytes(length) if kind == DATA else b""
                    header = struct.pack("!BBHII", draw.choice([0, 0, 0, 9]), kind, draw.randrange(65536), 3, length)
                    await mux.send_bytes(header + body)
                await mux.send_bytes(draw.randbytes(200))


@attack()
async def a_frame_in_drips(rogue: Rogue, world: World) -> None:
    """Such a connection is silent: it ends by the rule for frozen peers."""
    async with rogue.session() as mux:
        with CUT:
            await mux.send_bytes(frame(DATA, SYN, 1, 60_000))
            for _ in range(8):
                await mux.send_bytes(b"x")
                await trio.sleep(0.2)


# --- streams and the library's own protocols ---


@attack()
async def streams_that_never_say_what_they_speak(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT:
            for _ in range(400):
                await mux.open_bare()
            await trio.sleep(0.5)


@attack()
async def protocol_names_without_end(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT, trio.move_on_after(4):
            for number in range(100):
                channel = await mux.open_bare()
                await channel.write(delimited(MULTISTREAM) + announce_length(1 << (20 + number % 40)) + bytes(200_000))


@attack()
async def protocol_names_that_are_no_text(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT:
            for data in (b"\x05\xff\xfe\xfd\n", b"\xff" * 20, b"\x00", delimited(MULTISTREAM) + b"\x03\xff\xff\n"):
                for _ in range(20):
                    channel = await mux.open_bare()
                    await channel.write(data)


@attack()
async def a_stream_that_asks_for_protocols_without_end(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channel = await mux.open_bare()
        with CUT, trio.move_on_after(3):
            await channel.write(delimited(MULTISTREAM))
            for _ in range(500):
                await channel.write(delimited("ls") * 60)


@attack()
async def identify_is_asked_three_hundred_times(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT:
            for _ in range(300):
                await mux.open(IDENTIFY)


@attack()
async def identify_is_pushed(rogue: Rogue, world: World) -> None:
    """Nobody here asks who a peer says it is: what is pushed is not even read."""
    pushed = Identify(
        listen_addrs=[Multiaddr(f"/ip4/10.0.{i // 250}.{i % 250}/tcp/4001").to_bytes() for i in range(5000)],
        protocols=[f"/protocol/{number}" for number in range(20_000)],
    )
    async with rogue.session() as mux:
        with pytest.raises(Cut):
            await mux.open(PUSH)
        channel = await mux.open_bare()
        await channel.write(delimited(MULTISTREAM) + delimited(PUSH))
        await channel.write(encode_varint_prefixed(pushed.SerializeToString()))


@attack()
async def the_librarys_pings_without_end(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channels = [await mux.open(PING_PROTOCOL) for _ in range(50)]
        with trio.move_on_after(2):
            while True:
                for channel in channels:
                    await channel.write(bytes(6400))


@attack()
async def garbage_on_every_protocol(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        for protocol in (IDENTIFY, PING_PROTOCOL, REQUEST, STREAM, PEERS):
            for data in (b"\xff" * 500, b"\x00", bytes(300)):
                with CUT:
                    channel = await mux.open(protocol)
                    await channel.write(data)
                    await mux.send(WINDOW, FIN, channel.number, 0)


# --- gossip ---


async def gossip_once(rogue: Rogue, data: bytes) -> None:
    async with rogue.session() as mux:
        with CUT:
            channel = await rogue.gossip(mux)
            await channel.write(data)
            await trio.sleep(0.3)


def presence(rogue: Rogue, **changes: Any) -> Presence:
    values = {"peer": rogue.peer, "sequence": time.time_ns(), "ttl_ms": 15_000} | changes
    return Presence(versions=(), sessions=0, sessions_max=4, **values)


@attack(blamed=True)
async def a_forged_author(rogue: Rogue, world: World) -> None:
    honest = ID.from_base58(world.honest.peer_id).to_bytes()
    await gossip_once(rogue, rpc(publish=[rogue.sign(encode(rogue.seal(presence(rogue))), from_id=honest)]))


@attack(blamed=True)
async def bad_signatures(rogue: Rogue, world: World) -> None:
    data = encode(rogue.seal(presence(rogue)))
    changes: list[dict[str, Any]] = [
        {"signature": b""},
        {"signature": bytes(64)},
        {"key": b"no key"},
        {"from_id": b"\xff" * 40},
        {"seqno": b""},
    ]
    for change in changes:
        with CUT:
            await gossip_once(rogue, rpc(publish=[rogue.sign(data, **change)]))


@attack(blamed=True)
async def garbage_instead_of_gossip(rogue: Rogue, world: World) -> None:
    for data in (b"\x64" + b"\xff" * 100, announce_length(1 << 40), b"\xff" * 12, announce_length(1 << 20) + b"x"):
        with CUT:
            await gossip_once(rogue, data)


@attack(blamed=True)
async def an_envelope_that_its_author_did_not_sign(rogue: Rogue, world: World) -> None:
    forged = rogue.seal(presence(rogue, peer=world.honest.peer_id), author=world.honest.peer_id)
    await gossip_once(rogue, rpc(publish=[rogue.sign(encode(forged))]))
    assert world.honest.peer_id not in world.state["blamed"]


@attack(blamed=True)
async def an_envelope_of_another_network(rogue: Rogue, world: World) -> None:
    other = rogue.seal(presence(rogue), network=bytes(32))
    await gossip_once(rogue, rpc(publish=[rogue.sign(encode(other))]))


@attack(blamed=True)
async def an_envelope_in_other_bytes(rogue: Rogue, world: World) -> None:
    """One value has one encoding: who writes another is no peer of ours, and honest ones pass none on."""
    await gossip_once(rogue, rpc(publish=[rogue.sign(loosen(rogue.seal(presence(rogue))))]))


@attack(blamed=True, member=True)
async def a_body_in_other_bytes(rogue: Rogue, world: World) -> None:
    """Messages are known by the digest of their bytes: two encodings would be two messages."""
    await gossip_once(rogue, rpc(publish=[rogue.sign(encode(rogue.seal(loosen(presence(rogue)))))]))


@attack(blamed=True, member=True)
async def bodies_that_are_no_message(rogue: Rogue, world: World) -> None:
    bombs = (b"", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\x93\xa8presence\xdd\xff\xff\xff\xff", b"\xc1")
    await gossip_once(rogue, b"".join(rpc(publish=[rogue.sign(encode(rogue.seal(bomb)))]) for bomb in bombs))


@attack(blamed=True)
async def envelopes_that_are_bombs(rogue: Rogue, world: World) -> None:
    bombs = (b"", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\x93\xdb\xff\xff\xff\xff", bytes(500_000))
    for bomb in bombs:
        with CUT:
            await gossip_once(rogue, rpc(publish=[rogue.sign(bomb)]))


@attack(blamed=False)
async def an_honest_message_is_replayed(rogue: Rogue, world: World) -> None:
    """As it was, and again in gossip messages of the rogue's own: nobody is blamed for what an honest peer said."""
    data = await hear_honest(rogue, world)
    async with rogue.session() as mux:
        channel = await rogue.gossip(mux)
        for _ in range(50):
            await channel.write(rpc(publish=[data, rogue.sign(data.data)]))
        await trio.sleep(0.3)


async def hear_honest(rogue: Rogue, world: World) -> rpc_pb2.Message:
    """A message of the honest peer or the victim, as gossip brings it."""
    async with rogue.session() as mux:
        heard: trio.Event = trio.Event()
        found: list[rpc_pb2.Message] = []

        async def serve(incoming: Channel) -> None:
            with CUT:
                await incoming.write(delimited(MULTISTREAM))
                await incoming.read_delimited()
                if MESHSUB.encode() not in (asked := await incoming.read_delimited()):
                    return
                await incoming.write(encode_varint_prefixed(asked))
                while True:
                    size, shift = 0, 0
                    while True:
                        byte = (await incoming.read(1))[0]
                        size |= (byte & 0x7F) << shift
                        shift += 7
                        if not byte & 0x80:
                            break
                    got = rpc_pb2.RPC.FromString(await incoming.read(size))
                    found.extend(got.publish)
                    if found:
                        heard.set()

        mux.serve = serve
        channel = await rogue.gossip(mux)
        await channel.write(rpc(control=rpc_pb2.ControlMessage(graft=[rpc_pb2.ControlGraft(topicID=rogue.topic)])))
        with trio.fail_after(10):
            await heard.wait()
        return found[0]


@attack()
async def two_messages_of_one_number(rogue: Rogue, world: World) -> None:
    first = rogue.sign(encode(rogue.seal(presence(rogue))))
    rogue._seqno -= 1
    second = rogue.sign(encode(rogue.seal(presence(rogue))))
    await gossip_once(rogue, rpc(publish=[first, second]) * 50)


@attack()
async def a_thousand_messages_a_second(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channel = await rogue.gossip(mux)
        messages = [rpc(publish=[rogue.sign(encode(rogue.seal(presence(rogue))))]) for _ in range(3000)]
        begun = trio.current_time()
        with CUT:
            for number, message in enumerate(messages):
                await channel.write(message)
                await trio.sleep_until(begun + number / 1000)


@attack()
async def thousands_of_small_messages_in_one(rogue: Rogue, world: World) -> None:
    message = rogue.sign(b"x")
    async with rogue.session() as mux:
        channel = await rogue.gossip(mux)
        with CUT:
            for _ in range(5):
                await channel.write(rpc(publish=[message] * 6000))
        await trio.sleep(0.5)


@attack()
async def fields_that_nobody_knows(rogue: Rogue, world: World) -> None:
    deep = b"\xfb\x07" * 60 + b"\xfc\x07" * 60  # groups of field 127, nested
    unknown = b"".join(b"\xfa\x07\x03abc" for _ in range(50_000))
    await gossip_once(rogue, encode_varint_prefixed(deep) + encode_varint_prefixed(unknown))
    await gossip_once(rogue, encode_varint_prefixed(b"\xfb\x07" * 100_000))


@attack()
async def control_messages_about_everything(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channel = await rogue.gossip(mux)
        with CUT:
            for number in range(500):
                for topic in (rogue.topic, f"strange {number}"):
                    control = rpc_pb2.ControlMessage(
                        graft=[rpc_pb2.ControlGraft(topicID=topic)] * 20,
                        prune=[rpc_pb2.ControlPrune(topicID=topic, backoff=2**62)] * 20,
                    )
                    subscriptions = [rpc_pb2.RPC.SubOpts(subscribe=number % 2 == 0, topicid=topic)] * 50
                    await channel.write(rpc(control=control, subscriptions=subscriptions))


@attack()
async def a_hundred_thousand_messages_are_promised(rogue: Rogue, world: World) -> None:
    ids = [b"%076x" % number for number in range(10_000)]
    entry = rpc_pb2.ControlIHave(topicID=rogue.topic, messageIDs=ids)
    async with rogue.session() as mux:
        channel = await rogue.gossip(mux)
        with CUT:
            for _ in range(10):
                await channel.write(rpc(control=rpc_pb2.ControlMessage(ihave=[entry])))
        await trio.sleep(0.5)
        assert mux.num_bytes < 3_000_000


@attack()
async def one_message_is_wanted_ten_thousand_times(rogue: Rogue, world: World) -> None:
    """What comes back is not much more than what was sent: nobody is a lever against others' lines."""
    message = await hear_honest(rogue, world)
    wanted = (message.from_id + message.seqno).hex().encode()
    async with rogue.session() as mux:
        channel = await rogue.gossip(mux)
        control = rpc_pb2.ControlMessage(iwant=[rpc_pb2.ControlIWant(messageIDs=[wanted] * 10_000)])
        sent = rpc(control=control)
        with CUT:
            await channel.write(sent)
            await trio.sleep(1)
        assert mux.num_bytes < 2 * len(sent)


@attack()
async def three_hundred_gossip_streams_of_half_messages(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT:
            for _ in range(300):
                channel = await mux.open(MESHSUB)
                await channel.write(announce_length(1_000_000) + bytes(900_000))
            await trio.sleep(0.5)


@attack()
async def a_prune_that_names_peers_to_dial(rogue: Rogue, world: World) -> None:
    peers = [rpc_pb2.PeerInfo(peerID=b"\x12\x20" + bytes([number]) * 32) for number in range(200)]
    control = rpc_pb2.ControlMessage(prune=[rpc_pb2.ControlPrune(topicID=rogue.topic, peers=peers)] * 10)
    await gossip_once(rogue, rpc(control=control))


# --- requests ---


@attack()
async def replies_that_nobody_reads(rogue: Rogue, world: World) -> None:
    """Each reply is larger than the window: without a bound they would all wait in memory."""
    async with rogue.session() as mux:
        with CUT:
            for _ in range(400):
                channel = await mux.open(REQUEST)
                # As another's library would: what comes is never acknowledged.
                await channel.write(ours(BlobRequest(compute_digest(PROBE), 0, 262_144)) * 4)
            await trio.sleep(1)


@attack()
async def five_thousand_requests_at_once(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channel = await mux.open(REQUEST)
        request = ours(BlobRequest(compute_digest(PROBE), 0, 1000))
        with CUT, trio.move_on_after(3):
            for _ in range(100):
                await channel.write(request * 50)


@attack()
async def half_a_request_on_four_hundred_streams(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        with CUT:
            for _ in range(400):
                channel = await mux.open(REQUEST)
                await channel.write((1_000_000).to_bytes(4, "big") + bytes(200_000))
                await channel.write(bytes(200_000))
            await trio.sleep(1)


@attack(blamed=False)
async def parts_of_blobs_that_cannot_be(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        for digest in (compute_digest(PROBE), ZERO):
            for start in (0, len(PROBE), 2**31, 2**62, 2**63 - 1):
                for length in (1, 262_144):
                    channel = await mux.open(REQUEST)
                    reply = decode_reply(await channel.ask(BlobRequest(digest, start, length)))
                    assert isinstance(reply, BlobReply)
                    assert len(reply.chunk) == max(0, min(length, reply.total - start))


@attack(blamed=True)
async def a_part_longer_than_parts_may_be(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channel = await mux.open(REQUEST)
        request = encode(BlobRequest(compute_digest(PROBE), 0, 262_144))
        assert request.endswith(b"\xce\x00\x04\x00\x00")
        with CUT:
            await channel.ask(request[:-4] + b"\xff\xff\xff\xff")


@attack(blamed=False)
async def absurd_questions_about_rounds(rogue: Rogue, world: World) -> None:
    have = tuple(compute_digest(bytes([n % 256, n // 256])) for n in range(4096))
    async with rogue.session() as mux:
        for round in (0, 1, 2**53):
            for head in (-1, 0, 2**53):
                channel = await mux.open(REQUEST)
                reply = decode_reply(await channel.ask(SyncRequest(Round(round), have, head)))
                assert isinstance(reply, SyncReply)


@attack(blamed=True)
async def requests_that_are_bombs(rogue: Rogue, world: World) -> None:
    bombs = (
        b"\x91" * 900_000,
        b"\x94\xa4sync\x01\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"",
    )
    for bomb in bombs:
        with CUT:
            async with rogue.session() as mux:
                channel = await mux.open(REQUEST)
                await channel.ask(bomb)


@attack(blamed=True)
async def a_frame_longer_than_frames_may_be(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channel = await mux.open(REQUEST)
        with CUT:
            await channel.write(b"\xff\xff\xff\xff")
            await channel.wait_for_end()


@attack()
async def token_streams_opened_and_left(rogue: Rogue, world: World) -> None:
    request = ours(GenerateRequest(ZERO, (1,) * 1000, (), 1000, 0, 1000, 1, 0))
    async with rogue.session() as mux:
        with CUT:
            for number in range(200):
                channel = await mux.open(STREAM)
                await channel.write(request)
                if number % 2:
                    await mux.send(WINDOW, RST, channel.number, 0)


@attack()
async def a_book_full_of_inventions(rogue: Rogue, world: World) -> None:
    """What a peer says of others in its own place is not written down."""
    before = world.state["book"]
    async with rogue.session() as mux:
        for start in range(0, 1000, 8):
            others = tuple(
                f"/ip4/{host}/tcp/{port}/p2p/{world.make_rogue(240 + n % 8).peer}"
                for n, (host, port) in enumerate([("0.0.0.0", 1), ("127.0.0.1", 0), ("10.0.0.1", start + 1)] * 2)
            )
            channel = await mux.open(PEERS)
            await channel.ask(PeersRequest(others))
    await trio.sleep(0.5)
    assert world.state["book"] <= before + 1


@attack(blamed=True)
async def garbage_instead_of_addresses(rogue: Rogue, world: World) -> None:
    for data in (b"\xff" * 16_000, encode(SyncRequest(Round(0), (), -1)), b"\x92\xa5peers\xdd\xff\xff\xff\xff"):
        with CUT:
            async with rogue.session() as mux:
                channel = await mux.open(PEERS)
                await channel.ask(data)


# --- members of the network ---


async def join_gossip(rogue: Rogue, mux: Mux, world: World) -> Channel:
    channel = await rogue.gossip(mux)
    await world.wait_for_state(lambda state: rogue.peer in state["connected"])
    return channel


async def say(rogue: Rogue, channel: Channel, *messages: Any) -> None:
    for message in messages:
        envelope = message if hasattr(message, "body") else rogue.seal(message)
        await channel.write(rpc(publish=[rogue.sign(encode(envelope))]))


async def get_base(rogue: Rogue, world: World) -> Digest:
    """The base that an honest announcement names; heard from the victim itself."""
    async with rogue.session() as mux:
        while True:
            round = await world.wait_for_train(200)
            channel = await mux.open(REQUEST)
            reply = decode_reply(await channel.ask(SyncRequest(Round(round), (), -1)))
            assert isinstance(reply, SyncReply)
            for envelope in reply.envelopes:
                if envelope.author == world.victim:
                    message = decode_message(envelope.body)
                    if isinstance(message, Announcement):
                        return message.base
            await trio.sleep(0.1)


def announce(rogue: Rogue, round: int, base: Digest, payload: bytes, size: int | None = None) -> Announcement:
    return Announcement(Round(round), rogue.peer, base, compute_digest(payload), size or len(payload), 1000)


async def offer(rogue: Rogue, world: World, payload: bytes, size: int, answer: Callable[[BlobRequest], bytes]) -> None:
    """Announce a payload, and serve it as `answer` says until it was asked for."""
    base = await get_base(rogue, world)
    was_asked = trio.Event()

    async def serve(data: bytes) -> bytes:
        request = decode_request(data)
        if isinstance(request, BlobRequest) and request.digest == compute_digest(payload):
            was_asked.set()
            return answer(request)
        raise OSError("not served")

    async with rogue.session() as mux:
        mux.answer = serve
        channel = await join_gossip(rogue, mux, world)
        round = await world.wait_for_train()
        await say(rogue, channel, announce(rogue, round, base, payload, size))
        with trio.fail_after(8):
            await was_asked.wait()
        await trio.sleep(0.5)


def chunk_of(data: bytes) -> Callable[[BlobRequest], bytes]:
    return lambda request: encode(BlobReply(len(data), data[request.start : request.start + request.length]))


@attack(blamed=True, member=True)
async def a_payload_announced_small_and_sent_big(rogue: Rogue, world: World) -> None:
    await offer(rogue, world, bytes(5_000_000), 500, chunk_of(bytes(5_000_000)))


@attack(blamed=True, member=True)
async def the_right_digest_of_a_payload_that_is_none(rogue: Rogue, world: World) -> None:
    payload = random.Random(1).randbytes(400)
    await offer(rogue, world, payload, len(payload), chunk_of(payload))


@attack(blamed=True, member=True)
async def the_payload_of_another(rogue: Rogue, world: World) -> None:
    name = world.honest.peer_id.encode()
    payload = bytes([len(name)]) + name + b"P2U2"
    await offer(rogue, world, payload, len(payload), chunk_of(payload))


@attack(blamed=True, member=True)
async def bytes_of_another_digest(rogue: Rogue, world: World) -> None:
    await offer(rogue, world, bytes(300), 300, chunk_of(b"\x01" * 300))


@attack(blamed=True, member=True)
async def chunks_longer_than_asked_for(rogue: Rogue, world: World) -> None:
    await offer(rogue, world, bytes(301), 301, lambda request: encode(BlobReply(301, bytes(200_000))))


@attack(blamed=True, member=True)
async def a_reply_of_a_gigabyte(rogue: Rogue, world: World) -> None:
    await offer(rogue, world, bytes(302), 302, lambda request: bytes(9_000_000))


@attack(blamed=False, member=True)
async def a_provider_that_never_answers(rogue: Rogue, world: World) -> None:
    def refuse(request: BlobRequest) -> bytes:
        raise OSError("never")

    await offer(rogue, world, bytes(303), 303, refuse)


@attack(blamed=True, member=True)
async def two_announcements_of_one_round(rogue: Rogue, world: World) -> None:
    base = await get_base(rogue, world)
    async with rogue.session() as mux:
        channel = await join_gossip(rogue, mux, world)
        round = await world.wait_for_train()
        await say(rogue, channel, *(announce(rogue, round, base, b"%d" % number) for number in range(20)))
        await world.wait_for_blame(rogue)


@attack(blamed=False, member=True)
async def an_announcement_replayed(rogue: Rogue, world: World) -> None:
    """The same again is no lie: it costs nothing, and blames nobody."""
    base = await get_base(rogue, world)
    async with rogue.session() as mux:
        channel = await join_gossip(rogue, mux, world)
        round = await world.wait_for_train()
        envelope = rogue.seal(announce(rogue, round, base, b"x"))
        await say(rogue, channel, *[envelope] * 200)
        await trio.sleep(1)
        await say(rogue, channel, *[rogue.seal(announce(rogue, old, base, b"x")) for old in range(max(round, 1))])
        await trio.sleep(0.3)
    assert rogue.peer not in world.state["blamed"]


@attack(blamed=True, member=True)
async def an_announcement_in_anothers_name(rogue: Rogue, world: World) -> None:
    base = await get_base(rogue, world)
    async with rogue.session() as mux:
        channel = await join_gossip(rogue, mux, world)
        round = await world.wait_for_train()
        await say(rogue, channel, Announcement(Round(round), world.honest.peer_id, base, ZERO, 10, 10))
        await world.wait_for_blame(rogue)


@attack(member=True)
async def rounds_at_the_end_of_time(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channel = await join_gossip(rogue, mux, world)
        for round in (2**53, 2**52, 10**6):
            await say(rogue, channel, *[announce(rogue, round + n, ZERO, b"x") for n in range(20)])
            await say(rogue, channel, ScoreCommit(Round(round), MemberIndex(2), ZERO))
        await trio.sleep(0.3)


def get_index(rogue: Rogue) -> MemberIndex:
    return MemberIndex(rogue.number - FIRST_ROGUE + 2)


@attack(blamed=True, member=True)
async def attestations_with_anothers_signature(rogue: Rogue, world: World) -> None:
    async with rogue.session() as mux:
        channel = await join_gossip(rogue, mux, world)
        signature = bls.sign(world.make_rogue(7).keys.bls_secret, ZERO)
        with CUT:
            await say(rogue, channel, Attestation(Round(world.state["round"]), get_index(rogue), ZERO, signature))
            await world.wait_for_blame(rogue)


@attack(member=True)
async def five_hundred_signatures_to_be_verified(rogue: Rogue, world: World) -> None:
    """Each costs milliseconds: who sends more than an honest member ever would is not listened to."""
    messages = [compute_digest(b"%d" % number) for number in range(500)]
    attestations = [
        Attestation(Round(world.state["round"] + n), get_index(rogue), m, bls.sign(rogue.keys.bls_secret, m))
        for n, m in enumerate(messages)
    ]
    async with rogue.session() as mux:
        channel = await join_gossip(rogue, mux, world)
        with CUT:
            await say(rogue, channel, *attestations)
        await trio.sleep(1)


@attack(member=True)
async def certificates_that_nobody_signed(rogue: Rogue, world: World) -> None:
    signature = bls.sign(rogue.keys.bls_secret, ZERO)
    async with rogue.session() as mux:
        channel = await join_gossip(rogue, mux, world)
        with CUT:
            for number in range(100):
                proposal = Proposal(Round(number), get_index(rogue), 1, 0, ZERO, ZERO, ZERO, ZERO, (), (), ())
                await say(rogue, channel, Certificate(proposal, (), signature))
            await trio.sleep(0.5)


# --- the tests ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with world_in_a_thread(tmp_path_factory.mktemp("victim")) as runner:
        yield runner


@pytest.fixture(scope="module")
def members() -> Iterator[int]:
    return iter(range(FIRST_ROGUE, FIRST_ROGUE + MEMBERS))


@pytest.mark.parametrize("name", list(ATTACKS))
def test_after_an_attack_the_node_is_what_it_was(run: Run, members: Iterator[int], name: str) -> None:
    told = ATTACKS[name]

    async def check(world: World) -> None:
        rogue = world.make_rogue(next(members)) if told.is_member else world.make_stranger()
        await world.run_attack(told.do, rogue)
        if told.is_blamed:
            await world.wait_for_blame(rogue)
        if told.is_blamed is False:
            assert rogue.peer not in world.state["blamed"]

    run(check)


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) >= 40
    assert sum(told.is_member for told in ATTACKS.values()) <= MEMBERS
