"""Gateways, honest replicas, cheats and liars on the tiny model in one process, with real keys and real re-checks."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from prometheus_client import CollectorRegistry
from serving_world import TINY, V1

from p2pfm.config import AdapterConfig, ServingConfig
from p2pfm.errors import PeerUnreachable
from p2pfm.lora.kinds import compute_initial
from p2pfm.lora.user_adapter import encode_adapter
from p2pfm.messages import CheatReport, CheckReply, CheckRequest, GenerateRequest, TokenChunk, Vouch, VouchReply
from p2pfm.runtime.adapter_folder import AdapterFolder
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.canaries import make_question
from p2pfm.runtime.checker import Checker
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.envelopes import sign_vouch
from p2pfm.runtime.gateway import Gateway, Tokens
from p2pfm.runtime.keys import Keys
from p2pfm.runtime.rechecker import Rechecker
from p2pfm.runtime.text import TextCodec
from p2pfm.runtime.user_adapters import UserAdapters
from p2pfm.serving.routing import Policy
from p2pfm.types import Digest, Millis, PeerId

BARE = Digest(b"\x00" * 32)
"""The backbone without an adapter, as a cheat has it."""
NETWORK_ID = Digest(b"n" * 32)

Alter = Callable[[Gateway, GenerateRequest], AsyncGenerator[TokenChunk, None]]
Lie = Callable[[CheckRequest, CheckReply], CheckReply]


def make_engine() -> Engine:
    """The tiny model with an adapter that changes what it says."""
    engine = Engine(str(TINY), AdapterConfig(), versions_max=3)
    initial = compute_initial(engine.shapes, 1)
    rng = np.random.default_rng(1)
    trained = {name: (tensor + rng.normal(0, 0.2, tensor.shape)).astype(np.float32) for name, tensor in initial.items()}
    engine.add_version(BARE, initial)
    engine.add_version(V1, trained)
    return engine


def make_keys(number: int) -> Keys:
    seed = bytes([number]) * 32
    return Keys(PeerId(str(ID.from_pubkey(create_new_key_pair(seed).public_key))), "0x", seed, seed, 1)


def make_lora(engine: Engine, seed: int = 3) -> bytes:
    """A user's LoRA of some of the tiny model's layers; strong enough that it changes what the model says."""
    rng = np.random.default_rng(seed)
    factors = {
        name: (
            rng.normal(0, 0.3, (2, fan_in)).astype(np.float32),
            rng.normal(0, 0.3, (fan_out, 2)).astype(np.float32),
        )
        for name, (fan_out, fan_in) in engine.lora_sizes().items()
        if name.endswith(("q_proj", "down_proj"))
    }
    return encode_adapter("tiny", factors)


# --- cheats -----------------------------------------------------------------------------------------------------------


def serve_bare(gateway: Gateway, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
    return gateway.serve(msgspec.structs.replace(request, version=BARE))


def serve_hotter(gateway: Gateway, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
    return gateway.serve(msgspec.structs.replace(request, temperature_milli=request.temperature_milli + 600))


async def serve_altered(gateway: Gateway, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
    """Every tenth token is another one; those after it are the model's own."""
    emitted, end = request.emitted, len(request.emitted) + request.tokens_max
    while len(emitted) < min(request.tokens_max, end):
        part = msgspec.structs.replace(request, emitted=emitted)
        async with aclosing(gateway.serve(part)) as chunks:
            async for chunk in chunks:
                if not chunk.tokens:
                    continue
                position, token = chunk.position, chunk.tokens[0]
                is_altered = position % 10 == 9
                token = 100 + (token * 7) % 800 if is_altered else token
                emitted = (*emitted, token)
                finish = "length" if len(emitted) == request.tokens_max else "" if is_altered else chunk.finish
                yield TokenChunk(position, (token,), finish)
                if finish:
                    return
                if is_altered:
                    break


async def serve_short(gateway: Gateway, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
    """After eight tokens it says that the model had nothing to add."""
    async with aclosing(gateway.serve(request)) as chunks:
        async for chunk in chunks:
            if chunk.tokens and chunk.position >= 8:
                yield TokenChunk(chunk.position, (min(gateway.vocabulary.ends),), "stop")
                return
            yield chunk


# --- the world --------------------------------------------------------------------------------------------------------


@dataclass
class Replica:
    gateway: Gateway
    checker: Checker
    keys: Keys
    adapters: UserAdapters | None = None
    alter: Alter | None = None
    lie: Lie | None = None
    num_checks: int = 0
    cut_after: int = 0
    """Tokens after which its connection breaks; 0: it does not."""


@dataclass
class Network:
    """`ReplicaTransport` and `CheckTransport` in one process."""

    replicas: dict[PeerId, Replica] = field(default_factory=dict)

    async def generate(self, peer: PeerId, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        if peer not in self.replicas:
            raise PeerUnreachable("no such peer")
        replica = self.replicas[peer]
        given: list[int] = []
        asker = PeerId("home")
        serve = replica.alter(replica.gateway, request) if replica.alter else replica.gateway.serve(request, asker)
        async with aclosing(serve) as chunks:
            async for chunk in chunks:
                if replica.cut_after and len(given) >= replica.cut_after:
                    raise PeerUnreachable("the connection broke")
                given.extend(chunk.tokens)
                if chunk.finish:
                    replica.checker.on_given(request, tuple(given))
                yield chunk

    async def check(self, peer: PeerId, request: CheckRequest) -> CheckReply:
        replica = self.replicas[peer]
        replica.num_checks += 1
        reply = await replica.checker.check(request, PeerId("home"))
        return replica.lie(request, reply) if replica.lie else reply

    async def vouch(self, peer: PeerId, vouch: Vouch) -> VouchReply:
        return self.replicas[peer].checker.vouch(vouch)


@dataclass
class Home:
    """A gateway that re-checks."""

    gateway: Gateway
    rechecker: Rechecker
    registry: CollectorRegistry
    published: list[CheatReport]
    adapters: UserAdapters | None = None

    def count(self, name: str) -> float:
        return self.registry.get_sample_value(f"p2pfm_{name}_total") or 0

    async def complete(self, request: GenerateRequest) -> list[Tokens]:
        """One answer, and all that its re-check leads to."""
        async with aclosing(self.gateway.complete(request)) as pieces:
            answer = [piece async for piece in pieces]
        while self.rechecker.num_jobs:
            await trio.sleep(0.002)
        return answer


class World:
    def __init__(self, engine: Engine, folder: Path | None = None) -> None:
        """`folder`: where all keep users' LoRA, each its own; None: they serve none."""
        self.engine = engine
        self.folder = folder
        self.codec = TextCodec(engine.tokenizer, engine.vocabulary)
        self.network = Network()
        self.peers = [make_keys(number + 1).peer for number in range(5)]
        for number in range(5):
            self._add_replica(make_keys(number + 1))
        self._seed = 0

    def _gateway(
        self, peer: PeerId, batcher: Batcher | None, registry: CollectorRegistry, local: Policy = "prefer"
    ) -> tuple[Gateway, UserAdapters | None]:
        config = ServingConfig(local=local)
        gateway = Gateway(peer, config, batcher, self.engine.vocabulary, self.network, registry, self.now_ms)
        if self.folder is not None:
            folder = AdapterFolder(self.folder / str(peer), 1 << 30)
            gateway.adapters = adapters = UserAdapters("tiny", config, folder, batcher, self._fetch)
            return gateway, adapters
        return gateway, None

    async def _fetch(self, digest: Digest, asker: PeerId | None, bytes_max: int) -> bytes:
        """From the home gateway alone, and only for who was asked by it."""
        assert self.folder is not None
        data = AdapterFolder(self.folder / "home", 1 << 30).find(digest) if asker == "home" else None
        if data is None:
            raise PeerUnreachable("nobody has it")
        return data

    def now_ms(self) -> Millis:
        return Millis(1_000_000 + int(trio.current_time() * 1000))

    def _add_replica(self, keys: Keys) -> None:
        batcher = Batcher(self.engine)
        gateway, adapters = self._gateway(keys.peer, batcher, CollectorRegistry())
        checker = Checker(batcher, lambda vouch: sign_vouch(keys, NETWORK_ID, vouch), lambda: True, gateway.prepare)
        self.network.replicas[keys.peer] = Replica(gateway, checker, keys, adapters)

    def make_request(
        self,
        num_tokens: int = 32,
        temperature_milli: int = 0,
        top_p_milli: int = 1000,
        num_logprobs: int = 0,
        version: Digest = V1,
    ) -> GenerateRequest:
        """Another question each time."""
        self._seed += 1
        text = make_question(Random(self._seed))
        prompt = self.codec.encode_chat([{"role": "user", "content": text}])
        return GenerateRequest(
            version, prompt, (), num_tokens, temperature_milli, top_p_milli, self._seed, num_logprobs
        )

    @asynccontextmanager
    async def home(
        self, *, share: float = 1.0, has_engine: bool = False, first: PeerId | None = None
    ) -> AsyncIterator[Home]:
        """A gateway that knows all replicas; `first` has no load, the others are full."""
        registry, published = CollectorRegistry(), []
        batcher = Batcher(self.engine) if has_engine else None
        # checks need an engine; streams are to go to the others as long as they are free
        gateway, adapters = self._gateway(PeerId("home"), batcher if self.folder else None, registry, local="avoid")

        async def publish(report: CheatReport) -> None:
            published.append(report)

        words = Random(5)
        checker = Checker(batcher, lambda vouch: b"", lambda: True, gateway.prepare)
        rechecker = Rechecker(
            gateway,
            share,
            checker,
            self.network,
            NETWORK_ID,
            lambda: self.codec.encode_chat([{"role": "user", "content": make_question(words)}]),
            publish,
            registry,
            self.now_ms,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rechecker.run)
            home = Home(gateway, rechecker, registry, published, adapters)
            self.announce(home, first)
            yield home
            nursery.cancel_scope.cancel()

    def announce(self, home: Home, first: PeerId | None = None) -> None:
        for peer, replica in self.network.replicas.items():
            presence = replica.gateway.presence()
            sessions = 0 if first in (None, peer) else presence.sessions_max
            home.gateway.on_presence(peer, msgspec.structs.replace(presence, sessions=sessions))
