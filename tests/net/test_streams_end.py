"""A stream that has done its work is gone on both sides: connections live for weeks and hold a bounded number."""

import trio
from libp2p.crypto.ed25519 import create_new_key_pair

from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.types import PeerId, compute_digest

NETWORK = compute_digest(b"network of test_streams_end")
TIMES = 8


def make_transport(number: int, bootstrap: tuple[str, ...] = ()) -> Libp2pTransport:
    return Libp2pTransport(create_new_key_pair(bytes([number]) * 32), "/ip4/127.0.0.1/tcp/0", bootstrap, NETWORK)


def count_streams(transport: Libp2pTransport) -> int:
    """On all of its connections, by the muxer's own books."""
    connections = transport._host.get_network().get_connections()
    return sum(len(connection.muxed_conn.streams) for connection in connections)


def test_questions_to_a_peer_leave_no_stream_behind() -> None:
    async def echo(peer: PeerId, data: bytes) -> bytes:
        return data

    async def main() -> None:
        async with make_transport(1) as first, make_transport(2, tuple(first.addresses())) as second:
            first.set_handler(echo)
            with trio.fail_after(20):
                while not second.connected():
                    await trio.sleep(0.05)
                (peer,) = second.connected()
                await second.request(peer, b"once, for the stream that is kept", timeout_s=5)
                await trio.sleep(2)  # gossip and identify open theirs
                before = count_streams(first), count_streams(second)
                for _ in range(TIMES):
                    await second._peer_exchange.exchange(peer)
                    await second.request(peer, b"again", timeout_s=5)
                await trio.sleep(0.5)
            grown = (count_streams(first) - before[0], count_streams(second) - before[1])
            assert max(grown) < TIMES / 2, "one may be open at this very moment"

    trio.run(main)
