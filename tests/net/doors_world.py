"""Several gateways' HTTP sides on one engine in one process: each can be closed, and links can be slow."""

import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import trio
from prometheus_client import CollectorRegistry
from serving_world import QUICK, V1, Memory, make_adapter, no_blobs

from p2pfm.config import HttpConfig, ServingConfig
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.runtime.api_keys import ApiKeys
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.gateway import PRESENCE_INTERVAL_MS, Gateway
from p2pfm.runtime.http_api import NO_KEYS, HttpApi
from p2pfm.runtime.http_server import serve_http
from p2pfm.runtime.page import make_page_routes
from p2pfm.runtime.text import TextCodec
from p2pfm.types import Millis, PeerId

TIMEOUT_S = 20.0
HTTP = HttpConfig()


class Links(Memory):
    """Real replicas behind links that take their time, and that may tell a test how far a stream is."""

    def __init__(self) -> None:
        super().__init__()
        self.pause_s = 0.0
        """Before each chunk."""
        self.on_token: Callable[[int], None] = lambda num_tokens: None
        """Called in the world's thread with the tokens that have come over a link in one stream."""

    async def generate(self, peer: PeerId, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        num_tokens = 0
        async with aclosing(super().generate(peer, request)) as chunks:
            async for chunk in chunks:
                await trio.sleep(self.pause_s)
                num_tokens += len(chunk.tokens)
                self.on_token(num_tokens)
                yield chunk


class Doors:
    """Gateways "door0", "door1", ... whose replicas are "one" and "two". Methods may be called from any thread."""

    def __init__(self, engine: Engine, num: int, status: Callable[[], Mapping[str, Any]], keys: ApiKeys) -> None:
        self.links = Links()
        self.urls = [""] * num
        self.gateways: list[Gateway] = []
        self._engine, self._status, self._keys = engine, status, keys
        self._scopes = [trio.CancelScope() for _ in range(num)]
        self._end = trio.Event()
        self._started = threading.Event()
        self._token: trio.lowlevel.TrioToken

    def close(self, index: int) -> None:
        """From now on nobody is behind this gateway's URL."""
        self._token.run_sync_soon(self._scopes[index].cancel)

    def run(self, do: Callable[..., Any], *arguments: Any) -> Any:
        """What an async function returns in the world's thread."""
        return trio.from_thread.run(do, *arguments, trio_token=self._token)

    async def main(self) -> None:
        """Until `end`."""
        self._token = trio.lowlevel.current_trio_token()
        clock = lambda: Millis(int(trio.current_time() * 1000))  # noqa: E731
        codec = TextCodec(self._engine.tokenizer, self._engine.vocabulary)

        def gateway(name: str, backend: Batcher | None, registry: CollectorRegistry) -> Gateway:
            config = ServingConfig(sessions_max=4)
            return Gateway(PeerId(name), config, backend, codec.vocabulary, self.links, registry, clock, QUICK)

        for name in ("one", "two"):
            self.links.gateways[PeerId(name)] = gateway(name, Batcher(self._engine), CollectorRegistry())
        async with trio.open_nursery() as nursery:
            for index in range(len(self.urls)):
                registry = CollectorRegistry()
                door = gateway(f"door{index}", None, registry)
                for peer, other in self.links.gateways.items():
                    door.on_presence(peer, other.presence())
                self.gateways.append(door)
                await door.adopt(V1, make_adapter(self._engine.shapes, 1))
                api = HttpApi(
                    door, codec, "tiny", registry, self._status, clock, no_blobs, HTTP, self._keys, make_page_routes()
                )
                self.urls[index] = f"http://127.0.0.1:{await nursery.start(self._serve, api, index)}"
            nursery.start_soon(self._announce)
            self._started.set()
            await self._end.wait()
            nursery.cancel_scope.cancel()

    async def _announce(self) -> None:
        """Replicas' records have a short life."""
        while True:
            await trio.sleep(PRESENCE_INTERVAL_MS / 1000)
            for peer, replica in self.links.gateways.items():
                record = replica.presence()
                for door in self.gateways:
                    door.on_presence(peer, record)

    async def _serve(self, api: HttpApi, index: int, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        with self._scopes[index]:
            await serve_http(api.app(), "127.0.0.1", 0, HTTP, task_status)

    def start(self) -> threading.Thread:
        """In a thread of its own; returns when all gateways listen."""
        thread = threading.Thread(target=lambda: trio.run(self.main), daemon=True)
        thread.start()
        assert self._started.wait(TIMEOUT_S)
        return thread

    def end(self) -> None:
        """All of it."""
        self._token.run_sync_soon(self._end.set)


@contextmanager
def open_doors(
    engine: Engine,
    num: int = 1,
    status: Callable[[], Mapping[str, Any]] = lambda: {"round": 3},
    keys: ApiKeys = NO_KEYS,
) -> Iterator[Doors]:
    """That many gateways, until the block ends."""
    doors = Doors(engine, num, status, keys)
    thread = doors.start()
    try:
        yield doors
    finally:
        doors.end()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
