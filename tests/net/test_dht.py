"""The table of peer records: a peer that moved is found in it, and nothing but its own newest word is kept."""

from contextlib import AsyncExitStack

import msgspec
import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from net_hosts import NETWORK, is_whole, make_transport, until

from p2pfm.config import DiscoveryConfig
from p2pfm.errors import PeerUnreachable
from p2pfm.runtime.network.dht import (
    ADDRESSES_MAX,
    KAD_PROTOCOL,
    RECORD_BYTES_MAX,
    PeerRecord,
    RecordValidator,
    SignedRecord,
    make_key,
    open_record,
    sign_record,
)
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.types import PeerId, compute_digest

WITH_TABLE = DiscoveryConfig(dht=True)
KEYS, OTHER_KEYS = create_new_key_pair(b"\x01" * 32), create_new_key_pair(b"\x02" * 32)
PEER, OTHER = make_transport(1).peer_id, make_transport(2).peer_id
ADDRESS = f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"
RECORD = PeerRecord(NETWORK, PEER, 5, (ADDRESS,))


def change(**fields: object) -> PeerRecord:
    return msgspec.structs.replace(RECORD, **fields)


def test_a_record_is_its_peers_own_word() -> None:
    assert open_record(NETWORK, make_key(PEER), sign_record(KEYS, RECORD)) == RECORD


@pytest.mark.parametrize(
    "value",
    [
        sign_record(OTHER_KEYS, RECORD),
        sign_record(KEYS, change(network_id=compute_digest(b"another"))),
        sign_record(KEYS, change(peer=OTHER)),
        sign_record(KEYS, change(addresses=(ADDRESS, f"/ip4/127.0.0.1/tcp/1/p2p/{OTHER}"))),
        sign_record(KEYS, change(addresses=())),
        sign_record(KEYS, change(addresses=(ADDRESS,) * (ADDRESSES_MAX + 1))),
        sign_record(KEYS, change(addresses=("x" * 300,))),
        sign_record(KEYS, change(sequence=-1)),
        sign_record(KEYS, RECORD) + b"\x00",
        sign_record(KEYS, RECORD)[:-1] + b"\x00",
        msgspec.msgpack.encode(SignedRecord(bytes(RECORD_BYTES_MAX), bytes(64))),
        b"",
        b"\xff" * 100,
    ],
    ids=[
        "signed by another",
        "other network",
        "other peer",
        "address of another",
        "no address",
        "many addresses",
        "long address",
        "negative",
        "more after it",
        "changed",
        "oversized",
        "empty",
        "garbage",
    ],
)
def test_a_forged_oversized_or_foreign_record_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each has words of its own, also msgspec's
        RecordValidator(NETWORK).validate(make_key(PEER), value)


def test_an_older_record_does_not_replace_a_newer_one() -> None:
    old, new = sign_record(KEYS, RECORD), sign_record(KEYS, change(sequence=6))
    validator = RecordValidator(NETWORK)
    assert validator.select(make_key(PEER), [new, old]) == 0
    assert validator.select(make_key(PEER), [old, new]) == 1
    assert validator.select(make_key(PEER), [old, old]) == 0


async def put(rogue: Libp2pTransport, victim: Libp2pTransport, key: str, value: bytes) -> None:
    """What a stranger may send: one PUT_VALUE as it likes."""
    message = Message(type=Message.MessageType.PUT_VALUE, key=key.encode())
    message.record.key, message.record.value = key.encode(), value
    data = message.SerializeToString()
    stream = await rogue._host.new_stream(
        next(i for i in rogue._host.get_connected_peers() if str(i) == victim.peer_id), [KAD_PROTOCOL]
    )
    length = bytearray()
    size = len(data)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    await stream.write(bytes(length) + bytes([size]) + data)
    with trio.move_on_after(2):
        try:
            await stream.read(1)
        except Exception:  # noqa: BLE001 - it is reset, in any of the library's ways
            return


def test_the_table_keeps_of_each_sender_its_own_newest_record_only() -> None:
    async def main() -> None:
        async with (
            make_transport(9, discovery=WITH_TABLE) as victim,
            make_transport(1, victim.addresses()) as rogue,
        ):
            await until(lambda: is_whole(victim, [rogue]) and is_whole(rogue, [victim]), 10)
            table = victim._table
            assert table is not None
            records = table._table.value_store.store
            key, foreign = make_key(PEER).encode(), make_key(OTHER)
            await put(rogue, victim, make_key(PEER), sign_record(KEYS, change(sequence=7)))
            assert key in records
            held = records[key][0].value
            replayed = sign_record(KEYS, RECORD)
            forged = sign_record(OTHER_KEYS, change(sequence=9))
            for value in (replayed, forged, bytes(RECORD_BYTES_MAX + 1)):
                await put(rogue, victim, make_key(PEER), value)
                assert records[key][0].value == held
            not_its_own = PeerRecord(NETWORK, OTHER, 1, (f"/ip4/127.0.0.1/tcp/1/p2p/{OTHER}",))
            await put(rogue, victim, foreign, sign_record(OTHER_KEYS, not_its_own))
            await put(rogue, victim, "/pk/" + PEER, b"x")
            await put(rogue, victim, "plain", b"x")
            others = [name for name in records if name not in (key, make_key(victim.peer_id).encode())]
            assert others == []
            assert is_whole(victim, [rogue]), "the victim lives"

    trio.run(main)


def test_a_peer_that_moved_is_found_by_the_table() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            peers: list[Libp2pTransport] = []
            for number in range(2, 8):
                bootstrap = peers[0].addresses() if peers else ()
                peers.append(await stack.enter_async_context(make_transport(number, bootstrap, discovery=WITH_TABLE)))
            asker, friend = peers[-1], peers[1]
            async with make_transport(1, peers[0].addresses(), discovery=WITH_TABLE) as moving:
                await until(lambda: is_whole(moving, peers) and is_whole(asker, [moving]), 20)
                assert moving._table is not None
                await moving._table.publish()
                before = moving.addresses()
            await until(lambda: moving.peer_id not in asker.connected(), 10)
            async with make_transport(1, friend.addresses(), discovery=WITH_TABLE) as again:
                assert again._table is not None
                assert asker._table is not None
                await until(lambda: len(again.connected()) >= 3, 10)
                await again._table.publish()
                found = await asker._table.look_up(again.peer_id)
                assert found is not None
                assert found.addresses == again.addresses() != before
                assert again.addresses()[0] in asker.book.get_addresses(again.peer_id)
                assert asker._table.num_found >= 1, "its dialer may have searched before us"
                await until(lambda: is_whole(asker, [again]), 10)

    trio.run(main)


def test_a_peer_that_is_needed_is_searched_for_even_if_no_dial_ever_reached_it() -> None:
    """In a network of shards payloads and certificates are asked of members whom this peer has never met."""

    async def main() -> None:
        async with make_transport(3) as asker:
            searched: list[PeerId] = []

            async def look_up(peer: PeerId) -> None:
                searched.append(peer)

            asker._dialer.lookup = look_up
            for _ in range(3):
                with pytest.raises(PeerUnreachable):
                    await asker.request(PEER, b"payload")
            await asker._dialer.dial_quietly(OTHER)
            await until(lambda: searched, 5)
            assert searched == [PEER], "once in a while; and what strangers tell of is not searched for"

    trio.run(main)
