"""Topics beside everybody's: who hears what, while peers come to them and leave; and that strangers leave no trace."""

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from net_hosts import make_transport, network, until

from p2pfm.protocol.shards import EVERYBODY, TOP
from p2pfm.runtime.network import mesh, transport
from p2pfm.runtime.network.dialer import Dialer
from p2pfm.runtime.network.gossip import TOPICS_MAX
from p2pfm.runtime.network.transport import Libp2pTransport

SETTLED_S = 2 * mesh.LAZY_BEATS
"""In this time whoever was to hear a message has heard it."""


async def hear(peer: Libp2pTransport, count: int, seconds: float = SETTLED_S) -> set[bytes]:
    with trio.fail_after(seconds):
        return {(await peer.gossip.receive())[1] for _ in range(count)}


async def know_one_another(topic: str, *peers: Libp2pTransport) -> None:
    await until(lambda: all(a.is_gossiping_with(b.peer_id, topic) for a in peers for b in peers if a is not b), 5)


def get_state(peer: Libp2pTransport) -> set[str]:
    """All topics of which anything is remembered."""
    pubsub = peer._pubsub
    router = pubsub.router
    kept = (pubsub.peer_topics, router.mesh, router._topics, router.back_off, router.fanout)
    return {name for state in kept for name in state}


def test_the_shards_of_a_network_do_not_hear_one_another_but_all_hear_what_is_for_all() -> None:
    async def main() -> None:
        async with network(6) as peers:
            shards = peers[:3], peers[3:]
            for number, shard in enumerate(shards):
                for peer in shard:
                    await peer.listen([f"shard-{number}"])
            for number, shard in enumerate(shards):
                await know_one_another(f"shard-{number}", *shard)
                await shard[0].publish(b"of %d" % number, f"shard-{number}")
            for number, shard in enumerate(shards):
                for peer in shard[1:]:
                    assert await hear(peer, 1) == {b"of %d" % number}
            await trio.sleep(SETTLED_S)
            for number, shard in enumerate(shards):
                assert all(set(peer.heard) <= {f"shard-{number}"} for peer in shard)
                assert all(not shards[1 - number][0].is_gossiping_with(p.peer_id, f"shard-{number}") for p in shard)
            await peers[0].publish(b"to all")
            for peer in peers[1:]:
                assert await hear(peer, 1) == {b"to all"}
                assert peer.heard[EVERYBODY] == 1
            assert not any(peer.counters["blames"] for peer in peers)

    trio.run(main)


def test_peers_that_change_shards_hear_the_new_one_and_forget_the_old_one() -> None:
    async def main() -> None:
        async with network(4) as (a, b, c, d):
            for peer in (a, b):
                await peer.listen(["shard-0"])
            for peer in (c, d):
                await peer.listen(["shard-1"])
            await know_one_another("shard-0", a, b)
            await a.listen(["shard-1", TOP])  # b stays alone
            await know_one_another("shard-1", a, c, d)
            assert not b.is_gossiping_with(a.peer_id, "shard-0")
            assert get_state(a) <= {a._topic, a._name("shard-1"), a._name(TOP)}
            await c.publish(b"welcome", "shard-1")
            for peer in (a, d):
                assert await hear(peer, 1) == {b"welcome"}
            await b.publish(b"to nobody", "shard-0")
            await trio.sleep(SETTLED_S)
            assert not any(peer.heard["shard-0"] for peer in (a, c, d))
            for _ in range(5):  # over and over: nothing piles up
                await a.listen([])
                await a.listen(["shard-0"])
            await know_one_another("shard-0", a, b)
            assert not any(peer.counters["blames"] for peer in (a, b, c, d))

    trio.run(main)


def test_who_comes_to_a_topic_hears_what_was_said_there_just_before() -> None:
    async def main() -> None:
        async with network(2) as (early, late):
            await early.listen(["shard-0"])
            await early.publish(b"just before", "shard-0")
            await late.listen(["shard-0"])
            assert await hear(late, 1) == {b"just before"}

    trio.run(main)


def test_who_does_not_hear_a_topic_can_speak_in_it_where_it_is_watched() -> None:
    async def main() -> None:
        async with (
            make_transport(1, watched=(TOP,)) as listener,
            make_transport(2, listener.addresses(), watched=(TOP,)) as speaker,
            make_transport(3, listener.addresses(), watched=(TOP,)) as other,
        ):
            await until(lambda: len(listener.connected()) == len(speaker.connected()) == 2, 10)
            await listener.listen([TOP])
            await until(lambda: speaker.is_gossiping_with(listener.peer_id, TOP), 5)
            await speaker.publish(b"certificate", TOP)
            assert await hear(listener, 1) == {b"certificate"}
            assert speaker._topic + "/" + TOP not in speaker._pubsub.topic_ids, "it still does not hear it"
            await trio.sleep(SETTLED_S)
            assert not other.heard

    trio.run(main)


def test_a_speaker_that_knows_no_listener_dials_those_it_is_told_of() -> None:
    async def main() -> None:
        async with make_transport(1, watched=(TOP,)) as listener, make_transport(2, watched=(TOP,)) as speaker:
            await listener.listen([TOP])
            assert not speaker.connected()
            for address in listener.addresses():
                speaker.book.add(address, trio.current_time(), listener.peer_id)
            await speaker.publish(b"certificate", TOP, [listener.peer_id])
            assert speaker.counters["gossip_no_listener"] >= 1
            assert await hear(listener, 1) == {b"certificate"}

    trio.run(main)


def test_who_comes_to_a_topic_is_connected_to_some_of_those_who_speak_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dialer, "_choose", lambda self, now: [])  # else it would dial all whom it knows

    async def main() -> None:
        async with (
            make_transport(1) as first,
            make_transport(2) as second,
            make_transport(3) as stranger,
            make_transport(4) as newcomer,
        ):
            for other in (first, second, stranger):
                for address in other.addresses():
                    newcomer.book.add(address, trio.current_time(), other.peer_id)
            nobody = make_transport(5).peer_id
            speakers = (first.peer_id, newcomer.peer_id, second.peer_id, nobody)
            await newcomer.listen(["shard-0", "committee-0"], [speakers, speakers])
            await until(lambda: set(newcomer.connected()) == {first.peer_id, second.peer_id}, 5)

    trio.run(main)


def test_a_speaker_that_nobody_can_hear_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transport, "LISTENER_RETRY_S", 0.01)

    async def main() -> None:
        async with make_transport(1, watched=(TOP,)) as speaker:
            await speaker.publish(b"certificate", TOP)
            assert speaker.counters["gossip_no_listener"] == transport.LISTENER_TRIES

    trio.run(main)
    assert "nobody was found who hears 'top'" in caplog.text


def test_topics_that_a_stranger_names_leave_nothing_behind() -> None:
    async def main() -> None:
        async with network(2) as (victim, rogue):
            await victim.listen(["shard-0"])
            rogue_id = ID.from_base58(rogue.peer_id)
            ours = {victim._topic, victim._name("shard-0")}
            names = [victim._name(f"shard-{number}") for number in range(40)] + ["x" * 1000, victim._topic + "/"]
            message = rpc_pb2.Message(data=b"x", topicIDs=names[5:6], from_id=rogue_id.to_bytes(), seqno=b"1")
            control = rpc_pb2.ControlMessage(
                graft=[rpc_pb2.ControlGraft(topicID=name) for name in names],
                prune=[rpc_pb2.ControlPrune(topicID=name, backoff=60) for name in names[1:]],
                ihave=[rpc_pb2.ControlIHave(topicID=name, messageIDs=[b"id"]) for name in names[1:]],
            )
            for start in range(0, len(names), 16):
                entries = [rpc_pb2.RPC.SubOpts(subscribe=True, topicid=name) for name in names[start : start + 16]]
                rpc = rpc_pb2.RPC(subscriptions=entries, publish=[message], control=control)
                await victim._pubsub._read_rpc(rogue_id, rpc.SerializeToString())
            assert get_state(victim) <= ours
            assert victim._pubsub._peer_subscription_count[rogue_id] <= TOPICS_MAX
            assert victim._pubsub.dropped["topic"] > 0
            assert victim._pubsub.dropped["asked for"] == 0
            assert not victim.heard
            await victim.listen([])
            assert get_state(victim) <= {victim._topic}
            victim._pubsub._handle_dead_peer(rogue_id)
            await rogue._dialer.disconnect(victim.peer_id)
            with pytest.raises(ValueError, match="at most 3 topics"):
                await victim.listen(["a", "b", "c", "d"])

    trio.run(main)
