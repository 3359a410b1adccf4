"""The network between real processes: found from one address, killed, frozen, restarted."""

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from net_hosts import PeerProcess, make_transport, until
from net_peer_process import make_blob

from p2pfm.messages import BlobReply, decode_reply
from p2pfm.runtime.network.exchange import fetch
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.types import PeerId, compute_digest

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@asynccontextmanager
async def processes(count: int) -> AsyncIterator[tuple[Libp2pTransport, list[PeerProcess]]]:
    """A transport here and `count` peers in processes; all know its address only."""
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(make_transport(100))
        peers = [await stack.enter_async_context(PeerProcess(n, here.addresses())) for n in range(1, count + 1)]
        with trio.fail_after(20):
            for peer in peers:
                await peer.listen_until(lambda peer=peer: len(peer.state.get("gossiping", ())) == count)
        await until(lambda: all(here.is_gossiping_with(peer.peer_id) for peer in peers), 10)
        yield here, peers


def test_four_processes_find_each_other_and_hear_every_message() -> None:
    async def main() -> None:
        async with processes(4) as (_, peers):
            for peer in peers:
                await peer.tell(publish=25)
            with trio.fail_after(15):
                for peer in peers:
                    await peer.listen_until(lambda peer=peer: peer.state["heard"] == 75)

    trio.run(main)


def test_a_killed_process_is_noticed_within_a_second_and_a_frozen_one_within_15() -> None:
    async def main() -> None:
        async with processes(3) as (here, (killed, frozen, _)):
            killed.signal(signal.SIGKILL)
            assert await until(lambda: killed.peer_id not in here.connected(), 5) < 1
            frozen.signal(signal.SIGSTOP)
            assert await until(lambda: frozen.peer_id not in here.connected(), 20) < 15
            frozen.signal(signal.SIGCONT)
            assert await until(lambda: here.is_gossiping_with(frozen.peer_id), 20) < 15

    trio.run(main)


class KillsInTheMiddle:
    """The transport, but a provider is killed after it has given some chunks."""

    def __init__(self, transport: Libp2pTransport, victim: PeerProcess, chunks: int) -> None:
        self._transport = transport
        self._victim = victim
        self._chunks = chunks
        self.chunks_by: dict[PeerId, int] = {}

    async def request(self, peer: PeerId, data: bytes, timeout_s: float) -> bytes:
        if self.chunks_by.get(peer, 0) == self._chunks and peer == self._victim.peer_id:
            self._victim.signal(signal.SIGKILL)
        reply = await self._transport.request(peer, data, timeout_s)
        answer = decode_reply(reply)
        assert isinstance(answer, BlobReply)
        if answer.chunk:
            self.chunks_by[peer] = self.chunks_by.get(peer, 0) + 1
        return reply

    def blame(self, peer: PeerId, reason: str) -> None:
        raise AssertionError(reason)


def test_a_provider_killed_in_the_middle_costs_at_most_the_chunk_in_flight() -> None:
    async def main() -> None:
        async with processes(2) as (here, (first, second)):
            data = make_blob(5_000_000)  # 20 chunks
            transport = KillsInTheMiddle(here, first, chunks=8)
            with trio.fail_after(20):
                got = await fetch(transport, compute_digest(data), (first.peer_id, second.peer_id), len(data))
            assert got == data
            # The reply in flight may still have left the dying process.
            assert transport.chunks_by[first.peer_id] in (8, 9)
            assert transport.chunks_by[first.peer_id] + transport.chunks_by[second.peer_id] == 20

    trio.run(main)


def test_a_killed_process_that_restarts_on_another_port_is_found_again_within_10_s() -> None:
    async def main() -> None:
        async with processes(2) as (here, (first, second)):
            first.signal(signal.SIGKILL)
            await until(lambda: first.peer_id not in here.connected(), 5)
            async with PeerProcess(1, second.addresses) as again:
                assert again.peer_id == first.peer_id
                assert again.addresses != first.addresses
                assert await until(lambda: here.is_gossiping_with(again.peer_id), 10) < 10

    trio.run(main)
