"""Four peers in four network namespaces, on a network that loses, delays, parts, and falls silent without a word."""

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from namespaces import Switch, find_why_not, get_host
from net_hosts import PeerProcess

WHY_NOT = find_why_not()
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

COUNT = 4


@asynccontextmanager
async def islanders(switch: Switch) -> AsyncIterator[list[PeerProcess]]:
    """Peers 1 to 4, each in its namespace; all know the first one's address only."""
    async with AsyncExitStack() as stack:
        peers: list[PeerProcess] = []
        for number in range(1, COUNT + 1):
            bootstrap = peers[0].addresses if peers else ()
            listen = f"/ip4/{get_host(number)}/tcp/4001"
            peer = PeerProcess(number, bootstrap, listen, switch.launch(number))
            peers.append(await stack.enter_async_context(peer))
        await all_gossip(peers, 30)
        yield peers


async def all_reach(peers: list[PeerProcess], key: str, count: int, seconds: float) -> float:
    """Until each of `peers` says so many of `key` (a count or a list); returns the seconds that the last one took."""
    start = trio.current_time()

    async def follow(peer: PeerProcess) -> None:
        def is_there() -> bool:
            said = peer.state.get(key, 0)
            return (said if isinstance(said, int) else len(said)) == count

        await peer.listen_until(is_there)

    with trio.fail_after(seconds):
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(follow, peer)
    return trio.current_time() - start


async def all_gossip(peers: list[PeerProcess], seconds: float) -> float:
    """Until each gossips with all others; returns the seconds that it took."""
    return await all_reach(peers, "gossiping", COUNT - 1, seconds)


def test_every_message_and_a_blob_arrive_with_30_percent_loss_and_300_ms_delay() -> None:
    async def main() -> None:
        with Switch() as switch:
            async with islanders(switch) as peers:
                switch.loss, switch.delay_s = 0.3, 0.3  # each way
                for peer in peers:
                    await peer.tell(publish=10)
                took_s = await all_reach(peers, "heard", (COUNT - 1) * 10, 90)
                # 30% of round trips are lost, and they take 300 ms. As before, TCP alone needs minutes for a megabyte.
                switch.loss, switch.delay_s = 0.163, 0.15
                await peers[3].tell(fetch=1_000_000, providers=[peer.peer_id for peer in peers[:3]])
                # Some 10 s; but TCP may stall for longer than a silent peer is believed alive: then all are dialled.
                with trio.fail_after(240):
                    await peers[3].listen_until(lambda: "fetched_s" in peers[3].state)
                print(f"120 deliveries in {took_s:.1f} s, 1 MB in {peers[3].state['fetched_s']:.1f} s,", end=" ")
                print(f"{switch.num_lost} of {switch.num_lost + switch.num_carried} packets lost")
                assert switch.num_lost > 50

    trio.run(main)


async def say_to_all(peers: list[PeerProcess], listeners: list[PeerProcess], seconds: float) -> float:
    """The first of `peers` says something, all `listeners` hear it."""
    before = [peer.state["heard"] for peer in listeners]
    await peers[0].tell(publish=1)
    start = trio.current_time()
    with trio.fail_after(seconds):
        for peer, heard in zip(listeners, before, strict=True):
            await peer.listen_until(lambda peer=peer, heard=heard: peer.state["heard"] > heard)
    return trio.current_time() - start


def test_two_halves_go_on_alone_and_are_one_again_when_the_link_is_back() -> None:
    async def main() -> None:
        with Switch() as switch:
            async with islanders(switch) as peers:
                halves = peers[:2], peers[2:]
                switch.part((1, 2), (3, 4))
                noticed_s = await all_reach(peers, "peers", 1, 15)
                for one, other in halves:
                    await say_to_all([one], [other], 5)
                await trio.sleep(5)  # long enough for failures to add up, and with them the delays between dials
                switch.part()
                merged_s = await all_gossip(peers, 30)
                for peer in peers:
                    await say_to_all([peer], [other for other in peers if other is not peer], 10)
                print(f"noticed in {noticed_s:.1f} s, one again in {merged_s:.1f} s")
                assert switch.num_cut > 0

    trio.run(main)


def test_a_peer_behind_a_dead_link_is_noticed_within_15_s_and_found_again() -> None:
    async def main() -> None:
        with Switch() as switch:
            async with islanders(switch) as peers:
                *others, cut = peers
                switch.part((1, 2, 3), (4,))  # half-open: no FIN, no RST, and nobody asks
                noticed_s = await all_reach(others, "peers", COUNT - 2, 15)
                await all_reach([cut], "peers", 0, 15)
                await say_to_all(others[:1], others[1:], 5)
                switch.part()
                back_s = await all_gossip(peers, 20)
                print(f"noticed in {noticed_s:.1f} s, back in {back_s:.1f} s")

    trio.run(main)


def test_a_machine_that_lost_its_power_is_let_in_anew_although_others_still_hold_its_connections() -> None:
    async def main() -> None:
        with Switch() as switch:
            async with islanders(switch) as peers:
                *others, lost = peers
                switch.part((1, 2, 3), (4,))
                lost.signal(signal.SIGKILL)
                switch.part()
                listen = f"/ip4/{get_host(4)}/tcp/4001"
                async with PeerProcess(4, others[0].addresses, listen, switch.launch(4)) as again:
                    back_s = await all_gossip([*others, again], 15)
                    await say_to_all([again], others, 5)
                    print(f"back in {back_s:.1f} s")

    trio.run(main)
