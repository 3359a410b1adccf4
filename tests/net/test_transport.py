"""The network in one process: discovery, gossip, requests, streams."""

from typing import Any

import pytest
import trio
from net_hosts import ANY_PORT, is_whole, make_transport, network, until

from p2pfm.errors import OperatorError, PeerUnreachable, Reject
from p2pfm.runtime.network import transport
from p2pfm.runtime.network.frames import read_frame
from p2pfm.runtime.network.server import Send
from p2pfm.runtime.network.transport import REQUEST_PROTOCOL, Libp2pTransport
from p2pfm.types import PeerId, compute_digest


async def hear_all(peer: Libp2pTransport, heard: list[bytes]) -> None:
    async for _, data in peer.gossip:
        heard.append(data)


def test_peers_find_each_other_from_one_address_and_hear_every_message_once() -> None:
    async def main() -> None:
        async with network(6) as peers, trio.open_nursery() as nursery:
            heard: list[list[bytes]] = [[] for _ in peers]
            for peer, messages in zip(peers, heard, strict=True):
                nursery.start_soon(hear_all, peer, messages)
            sent = [b"%d" % number + bytes(1000) for number in range(100)]
            for number, data in enumerate(sent):
                await peers[number % len(peers)].publish(data)
            await until(lambda: sum(map(len, heard)) >= 500, 10)
            for number, messages in enumerate(heard):
                assert sorted(messages) == sorted(d for n, d in enumerate(sent) if n % len(peers) != number)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_burst_of_one_author_is_delivered_whole() -> None:
    async def main() -> None:
        async with network(3) as peers, trio.open_nursery() as nursery:
            heard: list[bytes] = []
            nursery.start_soon(hear_all, peers[2], heard)
            for number in range(100):
                await peers[0].publish(b"%d" % number)
            await until(lambda: len(heard) == 100, 10)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_large_message_is_delivered_and_a_larger_one_refused() -> None:
    async def main() -> None:
        async with network(3) as peers:
            bytes_max = peers[0].limits.gossip_bytes_max
            with pytest.raises(ValueError, match="at most"):
                await peers[0].publish(bytes(bytes_max + 1))
            await peers[0].publish(bytes(bytes_max))
            with trio.fail_after(5):
                for peer in peers[1:]:
                    assert len((await peer.gossip.receive())[1]) == bytes_max

    trio.run(main)


def test_a_reader_that_sleeps_loses_the_oldest_messages_only() -> None:
    async def main() -> None:
        async with network(2) as peers:
            sleeper = peers[1]
            for number in range(30):
                sleeper._on_gossip("x", sleeper._topic, b"%d" % number)
            queued = sleeper.gossip.statistics().current_buffer_used
            assert queued == 30
            for number in range(sleeper.limits.gossip_queue_max):
                sleeper._on_gossip("x", sleeper._topic, b"new %d" % number)
            assert (await sleeper.gossip.receive())[1] == b"new 0"
            assert sleeper.counters["gossip_dropped"] == 30

    trio.run(main)


def test_another_networks_gossip_is_not_heard() -> None:
    async def main() -> None:
        other = compute_digest(b"another network")
        async with network(2) as peers, make_transport(9, peers[0].addresses(), network_id=other) as stranger:
            await until(lambda: stranger.connected() == tuple(sorted(p.peer_id for p in peers)), 10)
            await stranger.publish(b"foreign")
            await peers[0].publish(b"ours")
            with trio.fail_after(5):
                assert (await peers[1].gossip.receive())[1] == b"ours"
            assert peers[1].gossip.statistics().current_buffer_used == 0
            assert stranger.gossip.statistics().current_buffer_used == 0

    trio.run(main)


def test_what_the_gate_rejects_is_neither_delivered_nor_forwarded_and_is_blamed() -> None:
    def gate(data: bytes) -> None:
        if data.startswith(b"bad"):
            raise Reject("bad")

    async def main() -> None:
        async with network(3) as peers:
            for peer in peers[1:]:
                peer.set_gate(gate)
            await peers[0].publish(b"bad")
            await peers[0].publish(b"good")
            with trio.fail_after(5):
                for peer in peers[1:]:
                    assert (await peer.gossip.receive())[1] == b"good"
                    assert peer.counters["blames"] == 1

    trio.run(main)


def test_requests_are_answered_small_large_and_many_at_once() -> None:
    async def echo(peer: PeerId, data: bytes) -> bytes:
        return data if len(data) > 10 else bytes(int(data))

    async def main() -> None:
        async with network(2) as (asker, server):
            server.set_handler(echo)
            assert await asker.request(server.peer_id, b"0") == b""
            assert len(await asker.request(server.peer_id, b"8000000")) == 8_000_000
            answers: list[bytes] = []

            async def ask(number: int) -> None:
                answers.append(await asker.request(server.peer_id, b"question %03d" % number))

            async with trio.open_nursery() as nursery:
                for number in range(100):
                    nursery.start_soon(ask, number)
            assert sorted(answers) == [b"question %03d" % number for number in range(100)]

    trio.run(main)


def test_a_request_that_nobody_answers_is_unreachable_in_time() -> None:
    async def sleep(peer: PeerId, data: bytes) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async def refuse(peer: PeerId, data: bytes) -> bytes:
        raise Reject("a bad request")

    async def main() -> None:
        async with network(2) as (asker, server):
            server.set_handler(sleep)
            with trio.fail_after(2), pytest.raises(PeerUnreachable, match=r"nothing for 0\.2 s"):
                await asker.request(server.peer_id, b"x", timeout_s=0.2)
            server.set_handler(refuse)
            with pytest.raises(PeerUnreachable):
                await asker.request(server.peer_id, b"x")
            assert server.counters["blames"] == 1
            stranger = make_transport(77).peer_id
            with trio.fail_after(2), pytest.raises(PeerUnreachable):
                await asker.request(stranger, b"x")

    trio.run(main)


def test_a_stream_brings_its_frames_in_order_and_an_early_close_cancels_the_server() -> None:
    async def main() -> None:
        cancelled = trio.Event()

        async def count(peer: PeerId, data: bytes, send: Send) -> None:
            try:
                for number in range(int(data)):
                    await send(b"%d" % number)
                    await trio.sleep(0)
            except BaseException:
                cancelled.set()
                raise

        async with network(2) as (asker, server):
            server.set_stream_handler(count)
            async with asker.open_stream_request(server.peer_id, b"50") as frames:
                assert [frame async for frame in frames] == [b"%d" % number for number in range(50)]
            assert not cancelled.is_set()
            async with asker.open_stream_request(server.peer_id, b"100000000") as frames:
                assert await anext(frames) == b"0"
            with trio.fail_after(3):
                await cancelled.wait()

    trio.run(main)


def test_a_stream_whose_server_fails_is_unreachable_not_finished() -> None:
    async def fail(peer: PeerId, data: bytes, send: Send) -> None:
        await send(b"first")
        raise PeerUnreachable("the model is gone")

    async def main() -> None:
        async with network(2) as (asker, server):
            server.set_stream_handler(fail)

            async def read() -> None:
                async with asker.open_stream_request(server.peer_id, b"x") as frames:
                    assert [frame async for frame in frames] == "the stream has no end"

            with pytest.raises(PeerUnreachable):
                await read()
            assert await is_alive(server, asker)

    trio.run(main)


async def is_alive(server: Libp2pTransport, asker: Libp2pTransport) -> bool:
    async def echo(peer: PeerId, data: bytes) -> bytes:
        return data

    server.set_handler(echo)
    return await asker.request(server.peer_id, b"alive?", timeout_s=5) == b"alive?"


def test_changes_of_peers_are_told() -> None:
    async def main() -> None:
        async with make_transport(1) as first:
            async with make_transport(2, first.addresses()) as second:
                with trio.fail_after(5):
                    assert await first.peers_changed.receive() == (second.peer_id,)
            with trio.fail_after(5):
                assert await first.peers_changed.receive() == ()

    trio.run(main)


def test_a_peer_that_restarts_on_another_port_is_found_again_within_10_s() -> None:
    async def main() -> None:
        async with network(2) as peers:
            async with make_transport(3, peers[0].addresses()) as old:
                await until(lambda: is_whole(old, peers), 10)
                before, memory = old.addresses(), old.get_memory()
            await until(lambda: all(old.peer_id not in peer.connected() for peer in peers), 5)
            async with make_transport(3, memory=memory) as again:  # no bootstrap: its peer book is enough
                assert again.addresses() != before
                everybody = [*peers, again]
                assert await until(lambda: all(is_whole(peer, everybody) for peer in everybody), 10) < 10

    trio.run(main)


def test_a_peer_that_restarts_on_its_port_and_knows_nobody_is_found_again_within_10_s() -> None:
    async def main() -> None:
        async with network(2) as peers:
            async with make_transport(3, peers[0].addresses()) as old:
                await until(lambda: is_whole(old, peers) and all(is_whole(peer, [old]) for peer in peers), 10)
                listen = old.addresses()[0].split("/p2p/")[0]
            await until(lambda: all(old.peer_id not in peer.connected() for peer in peers), 5)
            # Long enough for several dials in vain: a stock host would be locked out for 60 s by the first.
            await until(lambda: all(peer.counters["dials"] >= 3 for peer in peers), 10)
            async with make_transport(3, listen=listen) as again:
                everybody = [*peers, again]
                assert await until(lambda: all(is_whole(peer, everybody) for peer in everybody), 10) < 10

    trio.run(main)


def test_a_port_in_use_and_a_bad_address_are_told() -> None:
    async def main() -> None:
        async with make_transport(1) as first:
            listen = first.addresses()[0].split("/p2p/")[0]
            with pytest.raises(OperatorError, match="Choose another port"):
                await make_transport(2, listen=listen).__aenter__()
        with pytest.raises(OperatorError, match="bootstrap"):
            await make_transport(2, ("/ip4/127.0.0.1/tcp/1",), listen=ANY_PORT).__aenter__()
        with pytest.raises(OperatorError, match="listen"):
            await make_transport(2, listen="localhost:80").__aenter__()

    trio.run(main)


def test_requests_to_a_peer_that_is_being_dialled_wait_for_it() -> None:
    async def echo(peer: PeerId, data: bytes) -> bytes:
        return data

    async def main() -> None:
        async with network(2) as (asker, server), trio.open_nursery() as nursery:
            server.set_handler(echo)
            await asker._dialer.disconnect(server.peer_id)
            await until(lambda: server.peer_id not in asker.connected(), 5)
            replies: list[bytes] = []

            async def ask(number: int) -> None:
                replies.append(await asker.request(server.peer_id, b"%d" % number))

            for number in range(4):
                nursery.start_soon(ask, number)
            await until(lambda: len(replies) == 4, 10)
            assert sorted(replies) == [b"0", b"1", b"2", b"3"]

    trio.run(main)


@pytest.mark.parametrize(
    ("pause_s", "frame_s", "failure"),
    [(0.4, 30.0, None), (1.5, 30.0, "said nothing for 1 s"), (0.8, 2.0, "did not end its answer within 2 s")],
)
def test_a_reply_may_come_slowly_but_not_stop_nor_trickle_for_ever_and_nobody_is_blamed(
    pause_s: float, frame_s: float, failure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def trickle(stream: Any) -> None:
        await read_frame(stream, 100)
        await stream.write((5).to_bytes(4, "big"))
        for _ in range(5):
            await trio.sleep(pause_s)
            await stream.write(b"x")

    async def main() -> None:
        async with network(2) as (asker, server):
            server._host.set_stream_handler(REQUEST_PROTOCOL, trickle)
            start = trio.current_time()
            if failure is None:
                assert await asker.request(server.peer_id, b"?", timeout_s=1.0) == b"x" * 5
                assert trio.current_time() - start > 5 * pause_s
            else:
                with pytest.raises(PeerUnreachable, match=failure):
                    await asker.request(server.peer_id, b"?", timeout_s=1.0)
            assert asker.counters["blames"] == 0

    monkeypatch.setattr(transport, "FRAME_S", frame_s)
    trio.run(main)
