"""The private adapter between real gateways, over libp2p, through the HTTP side and on disk: it stays at home."""

import stat
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import msgspec
import numpy as np
import openai
import pytest
import torch
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from prometheus_client import CollectorRegistry
from serving_world import QUESTION, TINY, V1, V2, Memory, World, make_adapter, make_engine, prompt_of, with_world
from serving_world import QUICK as PATIENCE
from test_node_crash import QUICK

from nodes.homes import CONFIG_NAME, write_config
from nodes.localnet import localnet
from p2pfm import work
from p2pfm.config import (
    ChainConfig,
    NetworkConfig,
    PersonalConfig,
    ServingConfig,
    TrainingConfig,
    parse_node_config,
)
from p2pfm.lora.batches import encode_all
from p2pfm.lora.corpus import read_topics
from p2pfm.lora.delta import encode_tensors, zeros
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.personal import decode_private, encode_private, mix, split_samples
from p2pfm.lora.samples import Probe
from p2pfm.lora.torch_learner import Data, TorchLearner
from p2pfm.messages import BlobRequest, GenerateRequest, Presence
from p2pfm.protocol.events import Train
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.checker import Checker
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.gateway import Busy, Gateway, NoReplica
from p2pfm.runtime.network import exchange
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.runtime.personal import FILE_NAME, Personal
from p2pfm.runtime.replica_streams import ReplicaStreams, answer_stream
from p2pfm.runtime.store import Store
from p2pfm.types import Digest, Millis, PeerId, Round, compute_digest

NO_CHECKER = Checker(None, lambda vouch: b"", lambda: True)

HOME, OTHER = PeerId("home"), PeerId("other")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def private(engine: Engine):
    return make_adapter(engine.shapes, 7)


@pytest.fixture(scope="module")
def learners() -> tuple[TorchLearner, TorchLearner, NetworkConfig]:
    """The network's learner and the own one on the same model, as `nodes.run` makes them."""
    torch.set_num_threads(1)
    model, tokenizer = load_backbone(TINY, torch.float32)
    training = TrainingConfig(steps=4, batch=4, tokens_max=48, learning_rate=1e-2)
    config = NetworkConfig("t", Millis(0), "tiny", "0" * 64, ChainConfig(1, "", ""), training=training)
    topics = read_topics()
    inside, outside = split_samples(topics["trivia"][:40], 0.2)
    probe = Probe(*({"emotion": tuple(topics["emotion"][:3])} for _ in range(2)), Digest(b""))
    shared = TorchLearner(model, tokenizer, config, inside, probe)
    judge = {"own": encode_all(tokenizer, outside, 48)}
    own = shared.beside(Data(encode_all(tokenizer, inside, 48), judge, judge, Digest(b"")), training)
    return shared, own, config


def clock() -> Millis:
    return Millis(int(trio.current_time() * 1000))


def make_gateway(name: PeerId, engine: Engine | None, memory: Memory, vocabulary, sessions_max: int = 4) -> Gateway:
    config = ServingConfig(sessions_max=sessions_max)
    made = Gateway(name, config, engine and Batcher(engine), vocabulary, memory, CollectorRegistry(), clock, PATIENCE)
    memory.gateways[name] = made
    return made


def ask(engine: Engine, version: Digest, num_tokens: int = 16, temperature: int = 0) -> GenerateRequest:
    return GenerateRequest(version, prompt_of(engine), (), num_tokens, temperature, 1000, 3, 0)


async def read(gateway: Gateway, request: GenerateRequest) -> tuple[int, ...]:
    async with aclosing(gateway.complete(request)) as stream:
        return tuple([token async for new in stream for token in new.tokens])


def alone(engine: Engine, request: GenerateRequest) -> tuple[int, ...]:
    """What the engine gives when nothing else runs."""
    stream = engine.open(request, is_local=True)
    return tuple(token for chunk in iter(stream.step, None) for token in chunk.tokens)


def test_only_the_node_itself_serves_its_private_adapter(engine: Engine, private) -> None:
    async def main() -> None:
        memory = Memory()
        home = make_gateway(HOME, engine, memory, engine.vocabulary)
        other = make_gateway(OTHER, None, memory, engine.vocabulary)
        assert home.private is None
        await home.adopt(V1, make_adapter(engine.shapes, 1))
        await home.adopt_private(private, 0.5)
        name = home.private
        assert name is not None
        assert await read(home, ask(engine, name)) == alone(engine, ask(engine, name))
        assert await read(home, ask(engine, name)) != await read(home, ask(engine, V1))
        assert memory.asked == []
        # Not announced, not listed, and refused to a peer that learnt its name, like one that does not exist.
        assert name not in home.presence().versions
        assert name not in home.versions()
        for unknown in (name, Digest(b"?" * 32)):
            async with aclosing(home.serve(ask(engine, unknown))) as chunks:
                assert [(chunk.tokens, chunk.finish) async for chunk in chunks] == [((), "unknown_version")]
        other.on_presence(HOME, home.presence())
        with pytest.raises(NoReplica):
            await read(other, ask(engine, name))

    trio.run(main)


def test_a_private_prompt_goes_to_nobody_else_whatever_they_announce(engine: Engine, private) -> None:
    async def main() -> None:
        memory = Memory()
        home = make_gateway(HOME, engine, memory, engine.vocabulary, sessions_max=1)
        make_gateway(OTHER, engine, memory, engine.vocabulary)
        await home.adopt(V1, make_adapter(engine.shapes, 1))
        await home.adopt_private(private, 0.5)
        name = home.private
        assert name is not None
        home.on_presence(OTHER, Presence(OTHER, (V1, name), 0, 4, 60_000, 1))
        async with aclosing(home.complete(ask(engine, V1, 900))) as busy:
            assert (await anext(busy)).replica == HOME
            with pytest.raises(Busy):  # rather than ask the other, who says it holds it
                await read(home, ask(engine, name))
        assert await read(home, ask(engine, name))
        for seed in range(3):  # pushed out of the engine before the stream began
            await home.adopt_private(make_adapter(engine.shapes, seed), 0.5)
        with pytest.raises(NoReplica, match="ask again"):
            await read(home, ask(engine, name))
        assert memory.asked == []

    trio.run(main)


@pytest.mark.parametrize("temperature", [0, 800])
def test_sessions_of_both_kinds_keep_their_version_while_both_are_swapped(
    engine: Engine, private, temperature: int
) -> None:
    async def main() -> None:
        memory = Memory()
        home = make_gateway(HOME, engine, memory, engine.vocabulary, sessions_max=8)
        await home.adopt(V1, make_adapter(engine.shapes, 1))
        await home.adopt_private(private, 0.5)
        assert home.private is not None
        requests = [ask(engine, version, 40, temperature) for version in (V1, home.private) * 3]
        expected = [alone(engine, request) for request in requests]
        assert expected[0] != expected[1]
        texts: dict[int, tuple[int, ...]] = {}
        started = [trio.Event() for _ in requests]

        async def session(index: int) -> None:
            tokens: list[int] = []
            async with aclosing(home.complete(requests[index])) as stream:
                async for new in stream:
                    tokens.extend(new.tokens)
                    started[index].set()
            texts[index] = tuple(tokens)

        async with trio.open_nursery() as nursery:
            for index in range(len(requests)):
                nursery.start_soon(session, index)
            for event in started:
                await event.wait()
            for seed in range(3):
                nursery.start_soon(home.adopt_private, make_adapter(engine.shapes, 20 + seed), 0.5)
                await home.adopt((V1, V2)[seed % 2], make_adapter(engine.shapes, (1, 2)[seed % 2]))
        assert [texts[index] for index in range(len(requests))] == expected
        assert await read(home, ask(engine, home.private, 40)) != expected[1]

    trio.run(main)


def test_a_new_base_and_a_new_private_adapter_are_mixed_as_the_newest_two(engine: Engine, private) -> None:
    async def main() -> None:
        home = make_gateway(HOME, engine, Memory(), engine.vocabulary)
        await home.adopt_private(private, 0.25)  # before any base: nothing to add it to yet
        assert home.private is None
        names = []
        for version, seed in ((V1, 1), (V2, 2)):
            base = make_adapter(engine.shapes, seed)
            await home.adopt(version, base)
            assert home.private is not None
            names.append(home.private)
            engine.add_version(Digest(b"m" * 32), mix(base, private, 0.25))
            assert alone(engine, ask(engine, home.private)) == alone(engine, ask(engine, Digest(b"m" * 32)))
        assert len({*names, V1, V2}) == 4

    trio.run(main)


def test_over_libp2p_a_peer_that_asks_for_it_is_refused(engine: Engine, private) -> None:
    @asynccontextmanager
    async def node(bootstrap: list[str], made: Engine | None):
        transport = Libp2pTransport(create_new_key_pair(), "/ip4/127.0.0.1/tcp/0", bootstrap, Digest(b"n" * 32))
        streams = ReplicaStreams(transport)
        gateway = Gateway(
            transport.peer_id,
            ServingConfig(),
            made and Batcher(made),
            engine.vocabulary,
            streams,
            CollectorRegistry(),
            clock,
        )
        async with transport:
            transport.set_stream_handler(lambda peer, data, send: answer_stream(gateway, NO_CHECKER, data, send))
            yield transport, gateway

    async def main() -> None:
        async with node([], engine) as (transport, home):
            await home.adopt(V1, make_adapter(engine.shapes, 1))
            await home.adopt_private(private, 0.5)
            async with node([transport.addresses()[0]], None) as (stranger, _):
                ask_home = partial(ReplicaStreams(stranger).generate, transport.peer_id)
                for version, finish in ((home.private, "unknown_version"), (V1, "length")):
                    async with aclosing(ask_home(ask(engine, version, 3))) as chunks:
                        *_, last = [chunk async for chunk in chunks]
                    assert last.finish == finish

    trio.run(main)


def test_clients_of_this_node_find_it_among_its_models_and_others_do_not(engine: Engine, private) -> None:
    def check(world: World) -> None:
        client = world.client()
        question = partial(client.chat.completions.create, messages=QUESTION, max_tokens=20, temperature=0)
        with pytest.raises(openai.NotFoundError, match=r"Models served now: tiny\+base"):
            question(model="tiny+private")
        base = question(model="tiny+base")
        trio.from_thread.run(world.home.adopt_private, private, 0.5)
        assert [model.id for model in client.models.list()][:2] == ["tiny+base", "tiny+private"]
        answer = question(model="tiny+private")
        assert answer.choices[0].message.content != base.choices[0].message.content
        told = answer.model_extra["p2pfm"]
        assert told["replica"] == "home"
        assert client.models.retrieve("tiny+private").model_extra["p2pfm"]["version"] == told["version"]
        assert question(model="tiny+base").choices[0].message.content == base.choices[0].message.content
        with pytest.raises(openai.NotFoundError):  # its name leads nowhere: it is no version
            question(model=f"tiny+base@{told['version'][:16]}")

    with_world(engine, check, is_home_serving=True)


def test_it_lives_in_one_file_of_its_owner_and_in_no_blob(engine: Engine, learners, tmp_path: Path) -> None:
    """The node's parts as `Node` wires them: rounds are trained and stored, the private adapter refined in between."""
    shared, own, config = learners

    async def main(store: Store) -> None:
        home = make_gateway(HOME, engine, Memory(), engine.vocabulary)
        base = shared.initial()
        digest = store.put(encode_tensors(base))
        await home.adopt(digest, base)
        personal = Personal(PersonalConfig(enabled=True), tmp_path, own, shared, home, trio.CapacityLimiter(1))
        await personal.restore()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(personal.run)
            for round in (Round(0), Round(1)):
                work.train_update(shared, store, config, Train(round, HOME, digest, None))
                personal.on_trained(round)
                with trio.fail_after(60):
                    while personal.round != round:
                        await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert personal.losses["own_mixed"] < personal.losses["own_base"]
        file = tmp_path / FILE_NAME
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        kept = decode_private(file.read_bytes(), shared.shapes())
        assert encode_tensors(kept) != encode_tensors(zeros(shared.shapes()))
        mixed = mix(base, kept, PersonalConfig().weight)
        secrets = [file.read_bytes(), *(encode_tensors(part) for part in (kept, mixed))]
        blobs = [path.read_bytes() for path in (tmp_path / "blobs").glob("*/*")]
        assert len(blobs) >= 3
        for secret in secrets:
            assert store.find(compute_digest(secret)) is None
            assert all(secret not in blob and blob not in secret for blob in blobs)
            reply = exchange.answer_blob(store, lambda _: True, BlobRequest(compute_digest(secret), 0, 1024))
            assert reply.total == 0
        assert home.private is not None
        assert store.find(home.private) is None
        # A restart serves what was kept, from its first moment.
        again = make_gateway(HOME, engine, Memory(), engine.vocabulary)
        await again.adopt(digest, base)
        before = await read(home, ask(engine, home.private))
        await Personal(PersonalConfig(enabled=True), tmp_path, own, shared, again, trio.CapacityLimiter(1)).restore()
        assert again.private not in (None, home.private)
        assert await read(again, ask(engine, again.private)) == before

    with Store(tmp_path) as store:
        trio.run(main, store)


@pytest.mark.parametrize("data", [b"garbage", b"", encode_private({"x": np.zeros(3, np.float32)})])
def test_a_file_that_cannot_be_read_is_told_and_made_anew(
    engine: Engine, learners, tmp_path: Path, data: bytes, caplog
) -> None:
    (tmp_path / FILE_NAME).write_bytes(data)

    shared, own, _ = learners

    async def main() -> None:
        home = make_gateway(HOME, engine, Memory(), engine.vocabulary)
        await home.adopt(V1, make_adapter(engine.shapes, 1))
        personal = Personal(PersonalConfig(enabled=True), tmp_path, own, shared, home, trio.CapacityLimiter(1))
        await personal.restore()
        assert home.private is not None
        assert await read(home, ask(engine, home.private)) == await read(home, ask(engine, V1))
        assert FILE_NAME in caplog.text

    trio.run(main)


@pytest.mark.slow
@pytest.mark.alone
def test_a_node_process_refines_and_serves_it_round_after_round(tmp_path: Path) -> None:
    with localnet(tmp_path / "net", ("honest",), QUICK, print) as net:
        node = net.nodes[0]
        net.kill(node)
        path = node.home / CONFIG_NAME
        config = parse_node_config(path.read_text())  # as it stands in the file: paths relative to it
        write_config(path, msgspec.structs.replace(config, personal=PersonalConfig(enabled=True, steps=2)))
        net.start(node)
        net.wait_until_running(node)
        personal = lambda: net.get_status(node).get("personal", {})  # noqa: E731
        net.wait_until("the private adapter is refined", lambda: (personal().get("round") or 0) >= 2, 60)
        losses = personal()["losses_nats"]
        assert losses["own_mixed"] <= losses["own_base"]
        file = node.home / FILE_NAME
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        client = openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=30)
        answer = client.chat.completions.create(model="tiny+private", messages=QUESTION, max_tokens=8)
        assert answer.model_extra["p2pfm"]["replica"] == node.peer
        assert answer.model_extra["p2pfm"]["version"] not in net.get_status(node)["serving"]["versions"]
        secret = compute_digest(file.read_bytes())
        assert httpx.get(f"{node.url}/blobs/{secret.hex()}").status_code == 404
