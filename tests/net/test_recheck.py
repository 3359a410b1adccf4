"""Wrong answers are found by real re-checks, their makers lose routing, and liars get nobody banned."""

from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from recheck_world import (
    NETWORK_ID,
    Alter,
    World,
    make_engine,
    make_keys,
    make_lora,
    serve_altered,
    serve_bare,
    serve_hotter,
    serve_short,
)
from serving_world import V1, V2

from p2pfm.errors import Reject
from p2pfm.messages import LIST_MAX, CheatReport, CheckReply, CheckRequest, Vouch
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.envelopes import sign_vouch, verify_vouch
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.runtime.rechecker import DISSENTS_MAX, FALSE_REPORTS_MAX
from p2pfm.runtime.replica_streams import ReplicaStreams, answer_stream
from p2pfm.serving.recheck import GAP_MICRO_MAX
from p2pfm.types import Digest, PeerId

SAMPLINGS = ((0, 1000), (700, 950), (1000, 1000))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def everything_is_wrong(request: CheckRequest, reply: CheckReply) -> CheckReply:
    return msgspec.structs.replace(reply, gaps_micro=(GAP_MICRO_MAX,) * len(reply.gaps_micro))


async def ask_until_banned(
    world: World, home, cheat: PeerId, requests_max: int, temperature_milli: int | None, version: Digest = V1
) -> int:
    """How many of its answers it took."""
    num_answers = 0
    for number in range(1, 2 * requests_max + 1):  # one that comes late is hedged, and may be another's
        temperature, top_p = SAMPLINGS[number % 3] if temperature_milli is None else (temperature_milli, 1000)
        world.announce(home, cheat)
        pieces = await home.complete(world.make_request(32, temperature, top_p, version=version))
        num_answers += any(piece.replica == cheat for piece in pieces)
        if home.gateway.table.is_banned(cheat, world.now_ms()):
            assert 0 < num_answers <= requests_max
            return num_answers
    raise AssertionError(f"not found in {requests_max} answers")


@pytest.mark.parametrize("has_engine", [True, False], ids=["by the own engine", "by two other replicas"])
def test_who_serves_the_bare_backbone_loses_routing_and_is_reported(engine: Engine, has_engine: bool) -> None:
    async def main() -> None:
        world = World(engine)
        cheat = world.peers[0]
        world.network.replicas[cheat].alter = serve_bare
        async with world.home(has_engine=has_engine, first=cheat) as home:
            await ask_until_banned(world, home, cheat, 4, None)
            world.announce(home, cheat)  # it still says that it is idle
            for _ in range(3):
                assert (await home.complete(world.make_request()))[0].replica != cheat
            assert home.count("cheats") == 1
            assert home.rechecker.to_status()["banned_until_ms"].keys() == {cheat}
            assert not home.rechecker.suspects.suspects()
            (report,) = home.published
            assert report.replica == cheat
            verify_vouch(NETWORK_ID, cheat, report.vouch, report.signature)
            assert world.network.replicas[cheat].num_checks == 0  # nobody judges itself

    trio.run(main)


@pytest.mark.parametrize("has_engine", [True, False], ids=["by the own engine", "by two other replicas"])
def test_who_serves_the_bare_backbone_for_a_users_lora_loses_routing(
    engine: Engine, tmp_path: Path, has_engine: bool
) -> None:
    """Checkers fetch the LoRA from who asks them. It is not reported: whoever knows its digest could fetch it."""

    async def main() -> None:
        world = World(engine, tmp_path)
        cheat = world.peers[0]
        world.network.replicas[cheat].alter = serve_bare
        async with world.home(has_engine=has_engine, first=cheat) as home:
            version = home.adapters.folder.put(make_lora(engine))
            await ask_until_banned(world, home, cheat, 4, None, version)
            world.announce(home, cheat)
            pieces = await home.complete(world.make_request(version=version))
            assert pieces[0].replica != cheat
            assert home.count("cheats") == 1
            assert home.published == []
            checkers = [peer for peer in world.peers[1:] if world.network.replicas[peer].num_checks]
            assert not checkers if has_engine else len(checkers) >= 2
            for peer in checkers:
                assert world.network.replicas[peer].adapters.loaded() == (version,)
            assert world.network.replicas[cheat].num_checks == 0

    trio.run(main)


@pytest.mark.parametrize("has_engine", [True, False])
def test_honest_replicas_are_never_accused_for_a_users_lora(engine: Engine, tmp_path: Path, has_engine: bool) -> None:
    """Its answers are checked, and it does not matter that most checkers had never heard of it."""

    async def main() -> None:
        world = World(engine, tmp_path)
        num_tokens = 0
        async with world.home(has_engine=has_engine) as home:
            version = home.adapters.folder.put(make_lora(engine))
            for number in range(12):
                world.announce(home, world.peers[number % 5])
                temperature, top_p = SAMPLINGS[number % 3]
                pieces = await home.complete(world.make_request(12, temperature, top_p, version=version))
                num_tokens += sum(len(piece.tokens) for piece in pieces if piece.replica != "home")
            assert num_tokens
            assert home.count("rechecked_tokens") == num_tokens
            assert home.count("wrong_answers") == home.count("cheats") == 0

    trio.run(main)


def test_a_lora_that_cannot_be_had_is_not_checked_and_nobody_is_blamed(engine: Engine, tmp_path: Path) -> None:
    async def main() -> None:
        world = World(engine, tmp_path)
        unknown = Digest(b"\x77" * 32)
        claimed = msgspec.structs.replace(world.make_request(version=unknown), emitted=(5, 6))
        async with world.home() as home:
            junk = home.adapters.folder.put(b"no adapter" * 1000)
            checker = world.network.replicas[world.peers[0]].checker
            assert (await checker.check(CheckRequest(claimed), PeerId("home"))).refusal == "unknown_version"
            of_junk = msgspec.structs.replace(claimed, version=junk)
            assert (await checker.check(CheckRequest(of_junk), PeerId("home"))).refusal == "invalid"

    trio.run(main)


def test_a_small_share_finds_it_too(engine: Engine) -> None:
    async def main() -> None:
        world = World(engine)
        cheat = world.peers[0]
        world.network.replicas[cheat].alter = serve_bare
        async with world.home(share=0.2, has_engine=True, first=cheat) as home:
            await ask_until_banned(world, home, cheat, 150, 700)  # missed with probability .8^150
            assert home.count("rechecked_tokens") > 0

    trio.run(main)


@pytest.mark.parametrize(
    ("alter", "temperature_milli"), [(serve_altered, 0), (serve_altered, 700), (serve_hotter, 700), (serve_short, 700)]
)
def test_small_cheats_are_found(engine: Engine, alter: Alter, temperature_milli: int) -> None:
    """Every tenth token, another temperature, an early end."""

    async def main() -> None:
        world = World(engine)
        cheat = world.peers[0]
        world.network.replicas[cheat].alter = alter
        async with world.home(has_engine=True, first=cheat) as home:
            await ask_until_banned(world, home, cheat, 20, temperature_milli)

    trio.run(main)


@pytest.mark.parametrize("has_engine", [True, False])
def test_honest_replicas_are_never_accused(engine: Engine, has_engine: bool) -> None:
    """Greedy and sampled, resumed in mid-stream by another replica, with log-probabilities, given up half way."""

    async def main() -> None:
        world = World(engine)
        world.network.replicas[world.peers[0]].cut_after = 5
        num_tokens = num_replaced = 0
        async with world.home(has_engine=has_engine) as home:
            for number in range(24):
                if number % 4 == 0:
                    world.announce(home, world.peers[0])
                temperature, top_p = SAMPLINGS[number % 3]
                pieces = await home.complete(world.make_request(12, temperature, top_p, number % 2 * 3))
                num_tokens += sum(len(piece.tokens) for piece in pieces)
                num_replaced += pieces[-1].num_replaced
            assert num_replaced > 0
            assert home.count("rechecked_tokens") == num_tokens
            assert home.count("wrong_answers") == home.count("cheats") == 0
            assert home.rechecker.to_status() == {"suspects": [], "banned_until_ms": {}}

    trio.run(main)


def test_each_replica_answers_for_its_own_tokens_alone(engine: Engine) -> None:
    """The cheat breaks off and an honest one goes on from its tokens: only the cheat is suspect."""

    async def main() -> None:
        world = World(engine)
        cheat, honest = world.peers[:2]
        world.network.replicas[cheat].alter = serve_bare
        world.network.replicas[cheat].cut_after = 16
        async with world.home(has_engine=True, first=cheat) as home:
            for peer in world.peers[2:]:
                del world.network.replicas[peer]
            pieces = await home.complete(world.make_request(40, 1000))
            assert {piece.replica for piece in pieces} == {cheat, honest}
            assert home.rechecker.suspects.get_standing(honest) == "clear"
            assert home.count("wrong_answers") == 1

    trio.run(main)


def test_a_lying_checker_gets_nobody_banned_and_is_asked_no_more(engine: Engine) -> None:
    async def main() -> None:
        world = World(engine)
        liar = world.peers[4]
        world.network.replicas[liar].lie = everything_is_wrong
        async with world.home() as home:
            for number in range(30):
                world.announce(home, world.peers[number % 4])
                await home.complete(world.make_request(4))
            assert home.count("wrong_answers") == home.count("cheats") == 0
            assert 0 < world.network.replicas[liar].num_checks <= DISSENTS_MAX

    trio.run(main)


def test_false_reports_get_nobody_banned_and_their_authors_are_heard_no_more(engine: Engine) -> None:
    async def main() -> None:
        world = World(engine)
        honest, liar = make_keys(1), world.peers[4]
        reports = []
        for number in range(3):
            request = world.make_request(8, 700)
            tokens = tuple(token for chunk in engine.generate(request) for token in chunk.tokens)
            vouch = Vouch(msgspec.structs.replace(request, emitted=tokens), 0)
            true, forged = sign_vouch(honest, NETWORK_ID, vouch), sign_vouch(make_keys(5), NETWORK_ID, vouch)
            reports.append(CheatReport(honest.peer, vouch, (true, forged, true)[number]))
        for has_engine in (True, False):
            async with world.home(has_engine=has_engine) as home:
                for number, report in enumerate(reports):
                    home.rechecker.on_report(liar, report)
                    if not has_engine:
                        home.rechecker.on_report(world.peers[3], report)
                    if has_engine and number >= FALSE_REPORTS_MAX:
                        assert not home.rechecker.num_jobs
                    while home.rechecker.num_jobs:
                        await trio.sleep(0.002)
                assert home.gateway.table.bans() == ()
                assert home.published == []

    trio.run(main)


def test_a_true_report_is_believed_after_recomputing_it_or_from_three_members(engine: Engine) -> None:
    async def main() -> None:
        world = World(engine)
        cheat = world.peers[0]
        world.network.replicas[cheat].alter = serve_bare
        async with world.home(has_engine=True, first=cheat) as home:
            await ask_until_banned(world, home, cheat, 4, 700)
        (report,) = home.published
        async with world.home(has_engine=True) as second, world.home() as third:
            second.rechecker.on_report(world.peers[1], report)
            while second.rechecker.num_jobs:
                await trio.sleep(0.002)
            assert second.gateway.table.is_banned(cheat, world.now_ms())
            assert second.published == [report]  # it says so in its own name
            for number, author in enumerate((world.peers[1], world.peers[1], world.peers[2], world.peers[3])):
                assert not third.gateway.table.is_banned(cheat, world.now_ms()), number
                third.rechecker.on_report(author, report)
                while third.rechecker.num_jobs:
                    await trio.sleep(0.002)
            assert third.gateway.table.is_banned(cheat, world.now_ms())
            assert third.published == []

    trio.run(main)


def test_a_replica_answers_one_check_at_a_time_and_vouches_for_nothing_but_its_own(engine: Engine) -> None:
    async def main() -> None:
        world = World(engine)
        request = world.make_request(12, 700)
        tokens = tuple(token for chunk in engine.generate(request) for token in chunk.tokens)
        claimed = msgspec.structs.replace(request, emitted=tokens)
        checker = world.network.replicas[world.peers[0]].checker

        replies: list[CheckReply] = []

        async def ask() -> None:
            replies.append(await checker.check(CheckRequest(claimed)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
        assert sorted(reply.refusal for reply in replies) == ["", "busy"]
        assert {reply.gaps_micro for reply in replies} == {(), (0,) * 12}

        unknown = msgspec.structs.replace(claimed, version=V2)
        foreign = msgspec.structs.replace(claimed, emitted=(10**6,))
        endless = msgspec.structs.replace(claimed, emitted=(5,) * (LIST_MAX + 1))
        assert (await checker.check(CheckRequest(endless))).refusal == "invalid"
        assert (await checker.check(CheckRequest(unknown))).refusal == "unknown_version"
        assert (await checker.check(CheckRequest(foreign))).refusal == "invalid"

        assert checker.vouch(Vouch(claimed, 0)).signature == b""  # never given here
        checker.on_given(request, tokens)
        verify_vouch(NETWORK_ID, world.peers[0], Vouch(claimed, 0), checker.vouch(Vouch(claimed, 0)).signature)
        half = Vouch(msgspec.structs.replace(claimed, emitted=tokens[:6]), 0)
        assert checker.vouch(half).signature
        other = Vouch(msgspec.structs.replace(claimed, emitted=(*tokens[:6], 7)), 0)
        assert checker.vouch(other).signature == b""
        assert checker.vouch(Vouch(claimed, 3)).signature == b""  # asked with other tokens

    trio.run(main)


def test_checks_stand_back_while_others_are_served(engine: Engine) -> None:
    """The claim is checked in full all the same."""

    async def main() -> None:
        world = World(engine)
        request = world.make_request(6)
        tokens = tuple(token for chunk in engine.generate(request) for token in chunk.tokens)
        checker = world.network.replicas[world.peers[0]].checker
        checker._is_idle = lambda: False
        reply = await checker.check(CheckRequest(msgspec.structs.replace(request, emitted=tokens)))
        assert reply.gaps_micro == (0,) * 6

    trio.run(main)


def test_checks_and_vouches_cross_the_network(engine: Engine) -> None:
    async def main() -> None:
        world = World(engine)
        keys = make_keys(1)
        replica = world.network.replicas[keys.peer]
        request = world.make_request(8, 700)

        async def on_stream(peer, data, send) -> None:
            await answer_stream(replica.gateway, replica.checker, data, send)

        listen = "/ip4/127.0.0.1/tcp/0"
        async with Libp2pTransport(keys.keypair, listen, [], NETWORK_ID) as server:
            server.set_stream_handler(on_stream)
            async with Libp2pTransport(create_new_key_pair(), listen, server.addresses(), NETWORK_ID) as client:
                streams = ReplicaStreams(client)
                async with aclosing(streams.generate(keys.peer, request)) as chunks:
                    tokens = tuple([token async for chunk in chunks for token in chunk.tokens])
                claimed = msgspec.structs.replace(request, emitted=tokens)
                assert (await streams.check(keys.peer, CheckRequest(claimed))).gaps_micro == (0,) * 8
                altered = msgspec.structs.replace(claimed, emitted=(*tokens[:7], (tokens[7] + 1) % 900))
                gaps = (await streams.check(keys.peer, CheckRequest(altered))).gaps_micro
                assert gaps[:7] == (0,) * 7
                assert gaps[7] > 0
                vouch = Vouch(claimed, 0)
                verify_vouch(NETWORK_ID, keys.peer, vouch, (await streams.vouch(keys.peer, vouch)).signature)
                with pytest.raises(Reject):
                    verify_vouch(NETWORK_ID, keys.peer, Vouch(altered, 0), b"")

    trio.run(main)
