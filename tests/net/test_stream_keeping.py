"""A client's stream goes on at another gateway when its own dies: real libp2p hosts and HTTP sides in one process."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import httpx
import pytest
import trio
import trio.testing
from libp2p.crypto.ed25519 import create_new_key_pair
from prometheus_client import CollectorRegistry
from serving_world import QUESTION, V1, make_adapter, make_engine

from nodes.gateways import Gateways, Moved, Piece, Question
from p2pfm.config import ServingConfig
from p2pfm.messages import decode_request, encode
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.checker import Checker
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.http_api import HttpApi
from p2pfm.runtime.http_server import serve_http
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.runtime.replica_streams import ReplicaStreams, answer_stream
from p2pfm.runtime.stream_keeper import StreamKeeper
from p2pfm.runtime.text import TextCodec
from p2pfm.types import Digest, Millis

NO_CHECKER = Checker(None, lambda vouch: b"", lambda: True)
CHAT = {"model": "tiny+base", "messages": QUESTION, "max_tokens": 40, "stream": True, "seed": 7}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@dataclass
class Node:
    transport: Libp2pTransport
    gateway: Gateway
    scope: trio.CancelScope
    url: str


@asynccontextmanager
async def nodes(engine: Engine, num: int, serving: ServingConfig) -> AsyncIterator[list[Node]]:
    """So many full nodes that know each other; a `scope` ends one."""

    async def run(bootstrap: list[str], task_status=trio.TASK_STATUS_IGNORED) -> None:
        transport = Libp2pTransport(create_new_key_pair(), "/ip4/127.0.0.1/tcp/0", bootstrap, Digest(b"n" * 32))

        async def on_stream(peer, data, send) -> None:
            await answer_stream(gateway, NO_CHECKER, data, send)

        async def on_request(peer, data) -> bytes:
            return encode(keeper.answer(peer, decode_request(data)))

        with trio.CancelScope() as scope:
            async with transport, trio.open_nursery() as nursery:
                clock = lambda: Millis(int(trio.current_time() * 1000))  # noqa: E731
                registry = CollectorRegistry()
                gateway = Gateway(
                    transport.peer_id,
                    serving,
                    Batcher(engine),
                    engine.vocabulary,
                    ReplicaStreams(transport),
                    registry,
                    clock,
                )
                await gateway.adopt(V1, make_adapter(engine.shapes, 1))
                keeper = StreamKeeper(transport.peer_id, serving, transport.request, gateway.live_gateways, clock)
                transport.set_stream_handler(on_stream)
                transport.set_handler(on_request)
                nursery.start_soon(keeper.run)

                async def no_blob(digest) -> None: ...

                codec = TextCodec(engine.tokenizer, engine.vocabulary)
                api = HttpApi(gateway, codec, "tiny", registry, dict, clock, no_blob, keeper=keeper)
                port = await nursery.start(serve_http, api.app(), "127.0.0.1", 0)
                task_status.started(Node(transport, gateway, scope, f"http://127.0.0.1:{port}"))
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        made: list[Node] = []
        for _ in range(num):
            made.append(await nursery.start(run, [node.transport.addresses()[0] for node in made]))
        for node in made:
            for other in made:
                node.gateway.on_presence(other.transport.peer_id, other.gateway.presence())
        yield made
        nursery.cancel_scope.cancel()


async def read_events(lines: AsyncIterator[str], num_max: int = 10**6) -> list[tuple[int | None, dict]]:
    """(id, event) each; stops after `num_max` or at the end."""
    events, mark = [], None
    async for line in lines:
        if line.startswith("id: "):
            mark = int(line[4:])
        if line.startswith("data: {"):
            events.append((mark, json.loads(line[6:])))
            mark = None
        if len(events) >= num_max or line == "data: [DONE]":
            return events
    raise AssertionError("the stream broke off")


def strip(events: list[tuple[int | None, dict]]) -> list[tuple[int | None, list, dict | None]]:
    """What a client is told, without who told it."""
    return [(mark, event["choices"], event.get("usage")) for mark, event in events]


def with_nodes(engine: Engine, num: int, check: Callable[[list[Node]], Awaitable[None]], backups: int = 2) -> None:
    async def main() -> None:
        async with nodes(engine, num, ServingConfig(backups=backups)) as made:
            await check(made)

    trio.run(main)


@pytest.mark.parametrize("options", [{}, {"logprobs": True, "top_logprobs": 2, "temperature": 0}])
def test_a_client_goes_on_at_another_gateway_when_its_own_dies(engine: Engine, options: dict) -> None:
    asked = {**CHAT, **options, "stream_options": {"include_usage": True}}

    async def check(made: list[Node]) -> None:
        home, *others = made
        async with httpx.AsyncClient(timeout=30) as client:
            async with client.stream("POST", f"{others[0].url}/v1/chat/completions", json=asked) as answer:
                truth = await read_events(answer.aiter_lines())
            async with client.stream("POST", f"{home.url}/v1/chat/completions", json=asked) as answer:
                begun = await read_events(answer.aiter_lines(), 5)
                home.scope.cancel()
            last, name, created = begun[-1][0], begun[0][1]["id"], begun[0][1]["created"]
            for other in others:
                url = f"{other.url}/v1/streams/{name}"
                async with client.stream("GET", url, headers={"Last-Event-ID": str(last)}) as answer:
                    assert answer.status_code == 200
                    assert answer.headers["content-type"].startswith("text/event-stream")
                    rest = await read_events(answer.aiter_lines())
                assert strip(begun + rest) == strip(truth)
                assert {(event["id"], event["created"]) for _, event in rest} == {(name, created)}
            final = max(mark for mark, _ in truth if mark is not None)
            async with client.stream("GET", f"{others[0].url}/v1/streams/{name}?after={final}") as answer:
                assert strip(await read_events(answer.aiter_lines())) == strip(truth[-1:])
            async with client.stream("GET", f"{others[1].url}/v1/streams/{name}") as answer:
                assert strip(await read_events(answer.aiter_lines())) == strip(truth)

    with_nodes(engine, 3, check)


def test_a_stream_of_plain_text_goes_on_at_another_gateway_too(engine: Engine) -> None:
    asked = {"model": "tiny+base", "prompt": "My fellow citizens", "max_tokens": 30, "stream": True, "seed": 7}

    async def check(made: list[Node]) -> None:
        home, other = made
        async with httpx.AsyncClient(timeout=30) as client:
            async with client.stream("POST", f"{other.url}/v1/completions", json=asked) as answer:
                truth = await read_events(answer.aiter_lines())
            async with client.stream("POST", f"{home.url}/v1/completions", json=asked) as answer:
                begun = await read_events(answer.aiter_lines(), 5)
                home.scope.cancel()
            name = begun[0][1]["id"]
            assert name.startswith("cmpl-")
            async with client.stream("GET", f"{other.url}/v1/streams/{name}?after={begun[-1][0]}") as answer:
                rest = await read_events(answer.aiter_lines())
            assert strip(begun + rest) == strip(truth)
            assert {event["object"] for _, event in begun + rest} == {"text_completion"}

    with_nodes(engine, 2, check)


def test_a_stream_with_stop_strings_is_cut_at_the_same_place_after_a_resume(engine: Engine) -> None:
    async def check(made: list[Node]) -> None:
        home, other = made
        async with httpx.AsyncClient(timeout=30) as client:
            whole = await client.post(f"{home.url}/v1/chat/completions", json={**CHAT, "stream": False})
            text = whole.json()["choices"][0]["message"]["content"]
            asked = {**CHAT, "stop": [text[len(text) // 2 :][:6]]}
            async with client.stream("POST", f"{other.url}/v1/chat/completions", json=asked) as answer:
                truth = await read_events(answer.aiter_lines())
            assert truth[-1][1]["choices"][0]["finish_reason"] == "stop"
            for num in (1, len(truth) - 1):
                async with client.stream("POST", f"{home.url}/v1/chat/completions", json=asked) as answer:
                    begun = await read_events(answer.aiter_lines(), num)
                url = f"{other.url}/v1/streams/{begun[0][1]['id']}?after={begun[-1][0]}"
                async with client.stream("GET", url) as answer:
                    assert strip(begun + await read_events(answer.aiter_lines())) == strip(truth)

    with_nodes(engine, 2, check)


def test_a_stream_that_nobody_keeps_is_not_found(engine: Engine) -> None:
    async def check(made: list[Node]) -> None:
        home, other = made
        async with httpx.AsyncClient(timeout=30) as client:

            async def begin() -> str:
                async with client.stream("POST", f"{home.url}/v1/chat/completions", json=CHAT) as answer:
                    (_, first), *_ = await read_events(answer.aiter_lines(), 1)
                return f"{other.url}/v1/streams/{first['id']}"

            for name in ("chatcmpl-" + "0" * 64, "chatcmpl-0", "x", "%00"):
                answer = await client.get(f"{other.url}/v1/streams/{name}")
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "stream_not_found")
            first, second = await begin(), await begin()
            assert (await client.get(first)).status_code == 200, "without copies its own gateway is asked"
            answer = await client.get(f"{first}?after=-1")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")
            home.scope.cancel()
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert (await client.get(second)).status_code == 404, "its operator wants no copies"

    with_nodes(engine, 2, check, backups=0)


def test_the_chats_gateways_go_on_by_the_streams_name(engine: Engine) -> None:
    """Nothing is asked for again, and none of the text is lost."""
    question = Question("tiny+base", QUESTION, tokens_max=60, temperature=0.9, seed=7)
    seen: list[str] = []

    def chat(urls: list[str], leave: Callable[[], None] | None) -> str:
        with Gateways(urls) as gateways:
            gateways._client.event_hooks["request"].append(lambda request: seen.append(request.method))
            pieces = []
            for piece in gateways.ask(question):
                pieces.append(piece)
                if leave is not None and len(pieces) == 6:
                    leave()
            if leave is not None:
                assert [type(piece) for piece in pieces].count(Moved) == 1
            return "".join(piece.text for piece in pieces if isinstance(piece, Piece))

    async def main() -> None:
        async with nodes(engine, 3, ServingConfig(local="avoid")) as (first, second, _):
            whole = await trio.to_thread.run_sync(chat, [second.url], None)
            assert seen == ["POST"]
            leave = partial(trio.from_thread.run_sync, first.scope.cancel)
            told = await trio.to_thread.run_sync(chat, [first.url, second.url], leave)
        assert told == whole
        assert seen == ["POST", "POST", "GET"]

    trio.run(main)
