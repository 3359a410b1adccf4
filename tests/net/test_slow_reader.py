"""A peer that reads next to nothing, while it answers every ping: it costs bounded memory, and in the end its streams.

Requests that nobody reads the replies of are in test_hostile.py.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11
from net_hosts import PeerProcess, make_transport, until

from p2pfm.runtime.network.transport import Libp2pTransport

pytestmark = pytest.mark.slow

STALL_S = 5
MESSAGE_BYTES = 500_000
NUM_MESSAGES, BATCH = 80, 20
MEMORY_MAX = 40 << 20
"""The queue of 16 MiB for each peer, and what the allocator keeps."""


@asynccontextmanager
async def world() -> AsyncIterator[tuple[PeerProcess, PeerProcess, Libp2pTransport]]:
    """A victim that waits 5 s for credit, an honest peer, and a peer here, all gossiping."""
    async with AsyncExitStack() as stack:
        victim = await stack.enter_async_context(PeerProcess(1, (), limits={"write_stall_s": STALL_S}))
        honest = await stack.enter_async_context(PeerProcess(2, victim.addresses))
        here = await stack.enter_async_context(make_transport(3, victim.addresses))
        with trio.fail_after(20):
            await victim.listen_until(lambda: len(victim.state.get("gossiping", ())) == 2)
        await until(lambda: here.is_gossiping_with(victim.peer_id), 10)
        yield victim, honest, here


def test_gossip_that_a_peer_does_not_read_is_dropped_and_others_hear_all() -> None:
    async def main() -> None:
        began: list[float] = []

        async def read_slowly(stream: Any) -> None:
            began.append(trio.current_time())
            while True:
                await stream.read(1)
                await trio.sleep(1)

        async with world() as (victim, honest, here):
            peak = 0

            async def publish(counts: range) -> None:
                nonlocal peak
                for count in counts:
                    await victim.tell(publish=BATCH, size=MESSAGE_BYTES)
                    with trio.fail_after(15):
                        await honest.listen_until(lambda count=count: honest.state.get("heard", 0) >= count)
                    await trio.sleep(0.5)
                    peak = max(peak, victim.get_memory())

            await publish(range(BATCH, NUM_MESSAGES + 1, BATCH))  # what is kept of any gossip is there now
            before = peak
            # From now on what the victim says on a gossip stream to us is read at a byte a second.
            here._host.set_stream_handler(PROTOCOL_ID_V11, read_slowly)
            await here._host.get_network().close_peer(ID.from_base58(victim.peer_id))
            await until(lambda: began, 20)
            await publish(range(NUM_MESSAGES + BATCH, 3 * NUM_MESSAGES + 1, BATCH))
            await until(lambda: len(began) > 1, 3 * STALL_S)  # it gave the first one up, and tries again
            print(f"{2 * NUM_MESSAGES * MESSAGE_BYTES >> 20} MiB not read: {peak - before >> 20} MiB more at the peak,")
            print(f"stream given up after {began[1] - began[0]:.1f} s")
            assert peak - before < MEMORY_MAX

    trio.run(main)


def test_a_stream_that_its_asker_does_not_read_waits_in_bounded_memory_and_is_ended() -> None:
    async def main() -> None:
        async with world() as (victim, honest, here), here.open_stream_request(victim.peer_id, b"100000"):
            with trio.fail_after(10):
                await victim.listen_until(lambda: victim.state["streams"] == 1)
            before = victim.get_memory()
            with trio.fail_after(4 * STALL_S):
                await victim.listen_until(lambda: victim.state["streams"] == 0)
            assert victim.get_memory() - before < MEMORY_MAX
            assert here.peer_id in victim.state["peers"], "who answers pings may stay; only the stream ended"
            await honest.tell(publish=1)
            with trio.fail_after(5):
                await victim.listen_until(lambda: victim.state["heard"] == 1)

    trio.run(main)
