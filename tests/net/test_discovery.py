"""How peers find each other: islands that meet, full nodes, dead bootstrap nodes, liars."""

import socket
from contextlib import AsyncExitStack

import pytest
import trio
from net_hosts import is_whole, make_transport, until

from p2pfm.config import DiscoveryConfig, TransportLimits
from p2pfm.errors import OperatorError
from p2pfm.runtime.network.peer_book import OPERATOR, TOLD_MAX
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.types import PeerId, compute_digest

SMALL = TransportLimits(connections_max=6, explore_s=2.0, visit_s=1.0)


async def make_island(
    stack: AsyncExitStack, first: int, count: int, limits: TransportLimits | None = None
) -> list[Libp2pTransport]:
    """Peers whose bootstrap is the first of them."""
    island: list[Libp2pTransport] = []
    for number in range(first, first + count):
        bootstrap = island[0].addresses() if island else ()
        island.append(await stack.enter_async_context(make_transport(number, bootstrap, limits=limits)))
    return island


def test_two_islands_merge_when_one_member_learns_one_address_of_the_other() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            here, there = await make_island(stack, 1, 3), await make_island(stack, 11, 3)
            await until(lambda: all(is_whole(p, island) for island in (here, there) for p in island), 20)
            assert not set(here[0].connected()) & {peer.peer_id for peer in there}
            here[1].book.add(there[2].addresses()[0], trio.current_time(), OPERATOR)
            everybody = [*here, *there]
            await until(lambda: all(is_whole(peer, everybody) for peer in everybody), 30)

    trio.run(main)


@pytest.mark.slow
def test_islands_whose_nodes_have_connections_enough_still_become_one_network() -> None:
    """No node has room for all others, and each has enough at home: a message of each reaches each all the same."""

    async def main() -> None:
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            here, there = await make_island(stack, 1, 6, SMALL), await make_island(stack, 11, 6, SMALL)
            everybody = [*here, *there]
            heard: dict[PeerId, set[PeerId]] = {peer.peer_id: set() for peer in everybody}

            async def hear(peer: Libp2pTransport) -> None:
                async for _, data in peer.gossip:
                    heard[peer.peer_id].add(PeerId(data.decode().split()[0]))

            async def speak(peer: Libp2pTransport) -> None:
                number = 0
                while True:
                    number += 1
                    await peer.publish(f"{peer.peer_id} {number}".encode())
                    await trio.sleep(0.5)

            await until(lambda: all(len(peer.connected()) >= 3 for peer in everybody), 20)
            for peer in everybody:
                nursery.start_soon(hear, peer)
                nursery.start_soon(speak, peer)
            await trio.sleep(1)
            here[2].book.add(there[3].addresses()[0], trio.current_time(), OPERATOR)
            await until(lambda: all(len(known) == len(everybody) - 1 for known in heard.values()), 60)
            assert all(len(peer.connected()) <= SMALL.connections_max for peer in everybody)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_bootstrap_node_that_never_returns_is_not_missed() -> None:
    async def main() -> None:
        async with make_transport(1) as bootstrap:
            address = bootstrap.addresses()
        async with AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(make_transport(n, address)) for n in (2, 3, 4)]
            async with make_transport(1, listen=address[0].split("/p2p/")[0]) as bootstrap:
                await until(lambda: all(is_whole(peer, [*peers, bootstrap]) for peer in peers), 20)
            # One knows the dead one and another; one knows only the dead one.
            newcomer = await stack.enter_async_context(make_transport(5, (*address, *peers[1].addresses())))
            lost = await stack.enter_async_context(make_transport(6, address))
            await until(lambda: all(is_whole(peer, [*peers, newcomer]) for peer in (*peers, newcomer)), 20)
            assert lost.connected() == ()
            lost.book.add(newcomer.addresses()[0], trio.current_time(), OPERATOR)
            await until(lambda: is_whole(lost, [*peers, newcomer]), 20)

    trio.run(main)


def test_strangers_who_take_every_place_do_not_keep_a_node_from_dialling() -> None:
    async def main() -> None:
        limits = TransportLimits(connections_max=4, explore_s=1.0, visit_s=1.0)
        async with AsyncExitStack() as stack:
            victim = await stack.enter_async_context(make_transport(1, limits=limits))
            crowd = [await stack.enter_async_context(make_transport(n, victim.addresses())) for n in range(20, 25)]
            await until(lambda: len(victim.connected()) == limits.inbound_max, 20)
            honest = await stack.enter_async_context(make_transport(2))
            victim.book.add(honest.addresses()[0], trio.current_time(), OPERATOR)
            await until(lambda: honest.peer_id in victim.connected(), 20)
            assert len(crowd) > limits.inbound_max

    trio.run(main)


def test_a_liars_inventions_neither_fill_the_book_nor_delay_an_honest_peer() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            victim, liar = await make_island(stack, 1, 2)
            await until(lambda: is_whole(victim, [liar]), 10)
            for number in range(100, 200):
                invented = make_transport(number).peer_id
                victim.book.add(f"/ip4/127.0.0.1/tcp/{number}/p2p/{invented}", trio.current_time(), liar.peer_id)
            assert len(victim.book) <= TOLD_MAX + 2
            honest = await stack.enter_async_context(make_transport(3))
            victim.book.add(honest.addresses()[0], trio.current_time(), OPERATOR)
            assert await until(lambda: honest.peer_id in victim.connected(), 10) < 5

    trio.run(main)


def test_a_ban_and_the_peers_of_long_standing_are_known_after_a_restart() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            honest, liar = await make_island(stack, 1, 2)
            async with make_transport(3, honest.addresses()) as first:
                await until(lambda: all(is_whole(peer, [first]) for peer in (honest, liar)), 20)
                for _ in range(3):
                    first.blame(liar.peer_id, "a test")
                await until(lambda: liar.peer_id not in first.connected(), 5)
                memory, listen = first.get_memory(), first.addresses()[0].split("/p2p/")[0]
            async with make_transport(3, listen=listen, memory=memory) as again:
                await until(lambda: honest.peer_id in again.connected(), 10)
                # The liar knows where it is, dials it again and again, and is refused.
                before = liar.counters["dials"]
                await until(lambda: liar.counters["dials"] >= before + 2, 20)
                assert liar.peer_id not in again.connected()

    trio.run(main)


def can_multicast_on_loopback() -> bool:
    """Whether a packet to mDNS's group, on a port of our own, comes back."""
    group, loopback = socket.inet_aton("224.0.0.251"), socket.inet_aton("127.0.0.1")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        try:
            receiver.bind(("224.0.0.251", 0))
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + loopback)
            receiver.settimeout(1)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)
            sender.sendto(b"x", ("224.0.0.251", receiver.getsockname()[1]))
            return receiver.recv(1) == b"x"
        except OSError:
            return False


@pytest.mark.skipif(not can_multicast_on_loopback(), reason="this machine does not multicast on loopback")
def test_peers_of_one_network_find_each_other_by_mdns_without_any_address() -> None:
    here = DiscoveryConfig(mdns="127.0.0.1")

    async def main() -> None:
        other = compute_digest(b"another network")
        async with (
            make_transport(1, discovery=here) as first,
            make_transport(2, discovery=here) as second,
            make_transport(3, discovery=here, network_id=other) as stranger,
        ):
            await until(lambda: is_whole(first, [second]) and is_whole(second, [first]), 20)
            assert stranger.connected() == ()
            # Who found the other first has dialled it; the other may hear of it only by that.
            assert {peer.reach()["mdns"]["state"] for peer in (first, second)} & {"ok"}
            assert stranger.reach()["mdns"]["state"] == "none"
            assert not first.book.is_proven(stranger.peer_id)

    trio.run(main)


def test_an_interface_that_is_not_of_this_machine_is_told() -> None:
    async def main() -> None:
        with pytest.raises(OperatorError, match=r"discovery\.mdns"):
            async with make_transport(1, discovery=DiscoveryConfig(mdns="192.0.2.1")):
                pass

    trio.run(main)


def test_reach_tells_of_each_way() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(make_transport(1))
            assert first.reach()["inbound"]["state"] == "none"
            second = await stack.enter_async_context(make_transport(2, first.addresses()))
            await until(lambda: is_whole(first, [second]) and is_whole(second, [first]), 10)
            assert first.reach()["inbound"]["found"].startswith("1 connections from others, from this machine")
            assert second.reach()["bootstrap"] == {"state": "ok", "found": "1 of 1 connected"}
            assert second.reach()["inbound"]["state"] == "none"
            assert second.reach()["peer_exchange"]["found"] == "1 peers known, 1 proven by a dial"
            for _ in range(3):
                first.blame(second.peer_id, "a test")
            assert first.reach()["bans"]["found"] == "1 peers banned now"
            await until(lambda: second.reach()["bootstrap"]["state"] == "none", 10)

    trio.run(main)
