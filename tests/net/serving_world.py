"""Real gateways on one engine in one process, with links that break where a test says, and a real HTTP side."""

import base64
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np
import openai
import trio
from prometheus_client import CollectorRegistry
from safetensors.numpy import save

from p2pfm.config import AdapterConfig, HttpConfig, ServingConfig
from p2pfm.errors import PeerUnreachable
from p2pfm.lora.checkpoint import read_lora
from p2pfm.lora.kinds import compute_initial
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.runtime.adapter_api import OPERATIONS, AdapterApi
from p2pfm.runtime.adapter_folder import AdapterFolder
from p2pfm.runtime.api_keys import ApiKeys
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.gateway import Gateway, Patience
from p2pfm.runtime.http_api import NO_KEYS, HttpApi
from p2pfm.runtime.http_server import serve_http
from p2pfm.runtime.stream_keeper import StreamKeeper
from p2pfm.runtime.text import TextCodec
from p2pfm.runtime.user_adapters import UserAdapters
from p2pfm.types import Digest, Millis, PeerId, Tensors

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
V1, V2 = Digest(b"\x11" * 32), Digest(b"\x22" * 32)
QUICK = Patience(
    first_floor_ms=300, first_ceiling_ms=2_000, next_floor_ms=300, next_ceiling_ms=2_000, retry_ms=20, replica_ms=1_500
)
QUESTION = [{"role": "user", "content": "What is the state of the Union?"}]


class Memory:
    """`ReplicaTransport` in one process: real gateways, and links that break where a test says."""

    def __init__(self) -> None:
        self.gateways: dict[PeerId, Gateway] = {}
        self.faults: dict[PeerId, tuple[int, str]] = {}
        """Peer: after how many tokens of a stream what happens."""
        self.asked: list[PeerId] = []

    async def generate(self, peer: PeerId, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        self.asked.append(peer)
        after, fault = self.faults.get(peer, (0, ""))
        num_tokens = 0
        if peer not in self.gateways:
            raise PeerUnreachable("no such peer")
        async with aclosing(self.gateways[peer].serve(request)) as chunks:
            async for chunk in chunks:
                if fault and num_tokens >= after:
                    if fault == "cut":
                        raise PeerUnreachable("the connection broke")
                    if fault == "freeze":
                        await trio.sleep_forever()
                    if fault == "end":
                        return
                    if fault == "empty":
                        while True:
                            yield TokenChunk(chunk.position, (), "")
                    yield {
                        "gap": TokenChunk(chunk.position + 1, chunk.tokens, ""),
                        "restart": TokenChunk(0, chunk.tokens, ""),
                        "huge": TokenChunk(chunk.position, (10**9,), ""),
                        "stop": TokenChunk(chunk.position, (), "stop"),
                        "error": TokenChunk(chunk.position, (), "error"),
                    }[fault]
                yield chunk
                num_tokens += len(chunk.tokens)


def make_adapter(shapes, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: (tensor + rng.normal(0, 0.05, tensor.shape)).astype(np.float32)
        for name, tensor in compute_initial(shapes, seed).items()
    }


def make_engine() -> Engine:
    """The tiny model with two versions, V1 the newer."""
    made = Engine(str(TINY), AdapterConfig(), versions_max=3)
    made.add_version(V2, make_adapter(made.shapes, 2))
    made.add_version(V1, make_adapter(made.shapes, 1))
    return made


def make_files(engine: Engine, seed: int, targets: tuple[str, ...] = ("q_proj", "down_proj"), rank: int = 2):
    """(adapter_config.json, adapter_model.safetensors) of a LoRA of some of the tiny model's layers."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (fan_out, fan_in) in engine.lora_sizes().items():
        if name.endswith(targets):
            tensors[f"base_model.model.{name}.lora_A.weight"] = rng.normal(0, 0.2, (rank, fan_in)).astype(np.float32)
            tensors[f"base_model.model.{name}.lora_B.weight"] = rng.normal(0, 0.2, (fan_out, rank)).astype(np.float32)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "bias": "none"}
    return config, tensors


def make_body(engine: Engine, seed: int, name: str = "", **options) -> dict:
    config, tensors = make_files(engine, seed, **options)
    return {"name": name, "config": config, "weights": base64.b64encode(save(tensors)).decode()}


class World:
    """Three peers on one engine (their backbones are equal anyway); `home` has the HTTP side."""

    def __init__(self, engine: Engine, memory: Memory, port: int, home: Gateway, registry: CollectorRegistry) -> None:
        self.engine, self.memory, self.home, self.registry = engine, memory, home, registry
        self.url = f"http://127.0.0.1:{port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def text(self, prompt_tokens: tuple[int, ...], num_tokens: int, version: Digest = V1, temperature: int = 0) -> str:
        request = GenerateRequest(version, prompt_tokens, (), num_tokens, temperature, 1000, 5, 0)
        tokens = [token for chunk in self.engine.generate(request) for token in chunk.tokens]
        return self.engine.tokenizer.decode(tokens, skip_special_tokens=True)


FindBlob = Callable[[Digest], Awaitable[bytes | None]]


async def no_blobs(digest: Digest) -> bytes | None:
    """This node serves none."""


async def ask_nobody(peer: PeerId, data: bytes, seconds: float) -> bytes:
    raise PeerUnreachable("no such peer")


async def fetch_from_nobody(digest: Digest, asker: PeerId | None, bytes_max: int) -> bytes:
    raise PeerUnreachable("no peer has it")


@asynccontextmanager
async def running(
    engine: Engine,
    *,
    is_home_serving: bool = False,
    sessions_max: int = 4,
    bounds: HttpConfig | None = None,
    keys: ApiKeys = NO_KEYS,
    find_blob: FindBlob = no_blobs,
    folder: Path | None = None,
) -> AsyncIterator[World]:
    """`folder`: the home node has all that a real one has: it keeps streams, and users' adapters there."""
    bounds = bounds or HttpConfig()
    memory = Memory()
    clock = lambda: Millis(int(trio.current_time() * 1000))  # noqa: E731
    home_engine = engine if is_home_serving else None
    config = ServingConfig(sessions_max=sessions_max)
    registry = CollectorRegistry()

    def gateway(name: str, engine: Engine | None, registry: CollectorRegistry) -> Gateway:
        backend = None if engine is None else Batcher(engine)
        return Gateway(PeerId(name), config, backend, vocabulary, memory, registry, clock, QUICK)

    vocabulary = engine.vocabulary
    home = gateway("home", home_engine, registry)
    for name in ("one", "two"):
        memory.gateways[PeerId(name)] = gateway(name, engine, CollectorRegistry())
    for peer, other in memory.gateways.items():
        home.on_presence(peer, other.presence())
    await home.adopt(V1, make_adapter(engine.shapes, 1))
    adapters, keeper = None, None
    if folder is not None:
        adapters = UserAdapters(
            "tiny", config, AdapterFolder(folder, 1 << 30), Batcher(engine), fetch_from_nobody, read_lora
        )
        home.adapters = adapters
        keeper = StreamKeeper(home.local, config, ask_nobody, home.live_gateways, clock)
    api = HttpApi(
        home,
        TextCodec(engine.tokenizer, vocabulary),
        "tiny",
        registry,
        lambda: {"round": 3},
        clock,
        find_blob,
        bounds,
        keys,
        AdapterApi(adapters, "tiny", config, bounds).routes() if adapters else (),
        OPERATIONS if adapters else (),
        keeper,
    )
    async with trio.open_nursery() as nursery:
        if keeper is not None:
            nursery.start_soon(keeper.run)
        port = await nursery.start(serve_http, api.app(), "127.0.0.1", 0, bounds)
        yield World(engine, memory, port, home, registry)
        nursery.cancel_scope.cancel()


def with_world(engine: Engine, check: Callable[[World], None], **options) -> None:
    """Run the blocking `check` in a thread beside the real server."""

    async def main() -> None:
        async with running(engine, **options) as world:
            await trio.to_thread.run_sync(check, world)

    trio.run(main)


def prompt_of(engine: Engine) -> tuple[int, ...]:
    return TextCodec(engine.tokenizer, engine.vocabulary).encode_chat(QUESTION)


def read_stream(stream) -> tuple[str, list[dict], list]:
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text, [chunk.model_extra["p2pfm"] for chunk in chunks], chunks
