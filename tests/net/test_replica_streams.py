"""Token streams over real libp2p connections on loopback: the gateway's remote replicas as the node wires them."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from prometheus_client import CollectorRegistry
from serving_world import V1, make_engine, prompt_of

from p2pfm.config import ServingConfig
from p2pfm.errors import PeerUnreachable
from p2pfm.messages import GenerateRequest
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.checker import Checker
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.runtime.replica_streams import ReplicaStreams, answer_stream
from p2pfm.types import Digest, Millis, PeerId

NO_CHECKER = Checker(None, lambda vouch: b"", lambda: True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@asynccontextmanager
async def node(
    engine: Engine, bootstrap: list[str], *, is_serving: bool = True
) -> AsyncIterator[tuple[Libp2pTransport, Gateway]]:
    transport = Libp2pTransport(create_new_key_pair(), "/ip4/127.0.0.1/tcp/0", bootstrap, Digest(b"n" * 32))

    async def on_stream(peer, data, send) -> None:
        await answer_stream(gateway, NO_CHECKER, data, send)

    async with transport:
        clock = lambda: Millis(int(trio.current_time() * 1000))  # noqa: E731
        gateway = Gateway(
            transport.peer_id,
            ServingConfig(),
            Batcher(engine) if is_serving else None,
            engine.vocabulary,
            ReplicaStreams(transport),
            CollectorRegistry(),
            clock,
        )
        transport.set_stream_handler(on_stream)
        yield transport, gateway


def test_a_stream_crosses_the_network_survives_its_replicas_death_and_stops_when_it_is_left(engine: Engine) -> None:
    request = GenerateRequest(V1, prompt_of(engine), (), 40, 0, 1000, 0, 0)
    truth = tuple(token for chunk in engine.generate(request) for token in chunk.tokens)

    async def replica(task_status=trio.TASK_STATUS_IGNORED) -> None:
        async with node(engine, []) as (transport, gateway):
            with trio.CancelScope() as scope:
                task_status.started((transport, gateway, scope))
                await trio.sleep_forever()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            replicas = [await nursery.start(replica) for _ in range(2)]
            by_peer = {transport.peer_id: (gateway, scope) for transport, gateway, scope in replicas}
            async with node(engine, [transport.addresses()[0] for transport, _, _ in replicas], is_serving=False) as (
                _,
                home,
            ):
                for peer, (gateway, _) in by_peer.items():
                    home.on_presence(peer, gateway.presence())
                tokens, seen = [], []
                async with aclosing(home.complete(request)) as stream:
                    async for new in stream:
                        tokens.extend(new.tokens)
                        seen.append(new.replica)
                        if len(tokens) == 10:
                            by_peer[new.replica][1].cancel()  # its process ends
                assert tuple(tokens) == truth
                first, last = seen[0], seen[-1]
                assert first != last
                long = GenerateRequest(V1, prompt_of(engine), (), 900, 0, 1000, 0, 0)
                async with aclosing(home.complete(long)) as stream:
                    assert (await anext(stream)).replica == last
                    assert by_peer[last][0].num_sessions == 1
                with trio.fail_after(5):
                    while by_peer[last][0].num_sessions:
                        await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_peer_that_nobody_knows_is_unreachable(engine: Engine) -> None:
    async def main() -> None:
        async with node(engine, []) as (transport, _):
            stranger = PeerId(str(ID.from_pubkey(create_new_key_pair().public_key)))
            request = GenerateRequest(V1, (1,), (), 4, 0, 1000, 0, 0)
            async with aclosing(ReplicaStreams(transport).generate(stranger, request)) as chunks:
                with pytest.raises(PeerUnreachable):
                    await anext(chunks)

    trio.run(main)
