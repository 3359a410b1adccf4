"""Clients that open too many connections, do not read, dribble, or send garbage: the node serves on."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import psutil
import pytest
import trio
import trio.testing
from serving_world import TINY, V1, World, make_adapter, make_engine, running, with_world

from p2pfm.config import AdapterConfig, HttpConfig
from p2pfm.runtime.engine import Engine
from p2pfm.types import Digest

HALF = b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: "


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@contextmanager
def connected(world: World, *, receive_bytes: int = 0) -> Iterator[socket.socket]:
    """A plain socket to the node; `receive_bytes`: its receive buffer."""
    with socket.socket() as made:
        if receive_bytes:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        made.settimeout(10)
        made.connect(("127.0.0.1", int(world.url.rpartition(":")[2])))
        yield made


def is_closed(made: socket.socket) -> bool:
    """Waits for the node's end, whatever else comes before it."""
    try:
        while made.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def is_healthy(world: World) -> bool:
    return httpx.get(f"{world.url}/health", timeout=10).status_code == 200


def test_of_too_many_idle_connections_the_oldest_are_closed(engine: Engine) -> None:
    def check(world: World) -> None:
        with ExitStack() as stack:
            opened = [stack.enter_context(connected(world)) for _ in range(300)]
            assert is_healthy(world)
            assert all(is_closed(made) for made in opened[:250])
            young = opened[-1]
            young.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert young.recv(100).startswith(b"HTTP/1.1 200")

    with_world(engine, check, bounds=HttpConfig(connections_max=50))


def test_when_all_connections_work_a_new_one_is_told_so(engine: Engine) -> None:
    def check(world: World) -> None:
        body = {"model": "tiny+base", "prompt": "We", "max_tokens": 900, "stream": True}
        with (
            httpx.stream("POST", f"{world.url}/v1/completions", json=body) as one,
            httpx.stream("POST", f"{world.url}/v1/completions", json=body) as two,
        ):
            assert (one.status_code, two.status_code) == (200, 200)
            refused = httpx.get(f"{world.url}/health")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
        while httpx.get(f"{world.url}/health").status_code != 200:  # until the node saw them leave
            pass

    with_world(engine, check, bounds=HttpConfig(connections_max=2))


def test_headers_and_bodies_that_dribble_are_cut(engine: Engine) -> None:
    def check(world: World) -> None:
        with connected(world) as silent, connected(world) as slow, connected(world) as body:
            slow.sendall(HALF)
            body.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
            slow.sendall(b"a")
            assert is_closed(silent)
            assert is_closed(slow)
            answer = b""
            while b"request_timeout" not in answer:
                answer += body.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408")
        assert is_healthy(world)

    with_world(engine, check, bounds=HttpConfig(idle_s_max=0.3, read_s_max=0.3))


def test_a_client_that_stops_reading_is_cut(engine: Engine) -> None:
    async def find_blob(digest: Digest) -> bytes | None:
        return bytes(30_000_000)

    def check(world: World) -> None:
        with connected(world, receive_bytes=4096) as deaf:
            deaf.sendall(b"GET /blobs/%s HTTP/1.1\r\nhost: x\r\n\r\n" % (b"00" * 32))
            assert is_healthy(world)
            peer = deaf.getsockname()
            wait_until_gone(peer)

    with_world(engine, check, bounds=HttpConfig(write_s_max=0.3), find_blob=find_blob)


def test_the_work_for_a_client_that_stops_reading_ends(engine: Engine) -> None:
    def check(world: World) -> None:
        question = [{"role": "user", "content": "We"}]
        body = json.dumps(
            {"model": "tiny+base", "messages": question, "max_tokens": 900, "logprobs": True, "top_logprobs": 20,
             "stream": True, "n": 4}
        ).encode()  # fmt: skip
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        with connected(world, receive_bytes=4096) as deaf:
            deaf.sendall(head + body)
            wait_until_gone(deaf.getsockname())
            while world.registry.get_sample_value("p2pfm_http_completions_total", {"outcome": "cancelled"}) != 1:
                pass
        assert not any(gateway.num_sessions for gateway in world.memory.gateways.values())

    with_world(engine, check, bounds=HttpConfig(write_s_max=0.2))


def wait_until_gone(address: tuple[str, int]) -> None:
    """Until the node has no socket to `address`."""
    while any(each.raddr == address and each.status == "ESTABLISHED" for each in psutil.Process().net_connections()):
        pass


GARBAGE = (
    b"\x00" * 100 + b"\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000,
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 500,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 4, 1, 0, 0, 0, 0, 1, 255, 255, 255, 255]),
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: ????\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    b"GET /v1/models/%ff%00%c3%28 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/models/\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /blobs/%f0%9f%92%a9 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"HEAD /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n",
)


def test_garbage_ends_its_own_connection_only(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def check(world: World) -> None:
        for data in GARBAGE:
            with connected(world) as rude:
                try:
                    rude.sendall(data)
                    rude.shutdown(socket.SHUT_WR)
                except OSError:  # already cut
                    pass
                assert is_closed(rude)
            assert is_healthy(world), data

    with_world(engine, check, bounds=HttpConfig(idle_s_max=0.5, read_s_max=0.5))
    assert "Traceback" not in caplog.text


def test_bad_text_is_the_askers_fault(engine: Engine) -> None:
    def check(world: World) -> None:
        for body in (
            b'{"model": "tiny+base", "prompt": "\xff"}',
            b'{"model": "tiny+base", "prompt": "\\ud800"}',
            b'{"model": "tiny+base", "prompt": 1e999}',
            b'{"model": "tiny+base", "prompt": [1.5]}',
            b'{"model": "tiny+base", "prompt": [-1]}',
            b'{"model": "tiny+base", "prompt": []}',
            b'{"model": "tiny+base", "prompt": ""}',
            b'{"model": "\\u0000", "prompt": "a"}',
            b'{"model": "tiny+base", "prompt": "a", "seed": 99999999999999999999}',
        ):
            answer = httpx.post(f"{world.url}/v1/completions", content=body)
            assert answer.status_code in (400, 404), body
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        answer = httpx.put(f"{world.url}/v1/completions")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert answer.json()["error"]["code"] == "method_not_allowed"

    with_world(engine, check)


class HeldEngine(Engine):
    """Counts its steps and tokens; a step that was begun does not end while it is held."""

    def __init__(self) -> None:
        super().__init__(str(TINY), AdapterConfig(), versions_max=3)
        self.add_version(V1, make_adapter(self.shapes, 1))
        self.num_steps = self.num_tokens = self.num_running = 0
        self.counting, self.free = threading.Lock(), threading.Event()
        self.free.set()

    def step(self, streams):
        with self.counting:
            self.num_running += 1
        self.free.wait(20)
        results = super().step(streams)
        with self.counting:
            self.num_running -= 1
            self.num_steps += 1
            self.num_tokens += sum(len(getattr(chunk, "tokens", ())) for _, chunk in results)
        return results


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("is_home_serving", [False, True], ids=["by other peers", "by this node"])
@pytest.mark.parametrize("num_choices", [1, 4])
def test_a_cancelled_request_stops_within_a_token(is_stream: bool, is_home_serving: bool, num_choices: int) -> None:
    """When its client leaves, the step under way is the last: a token more of each choice, of each engine."""
    engine = HeldEngine()
    body = {"model": "tiny+base", "prompt": "We", "max_tokens": 900, "n": num_choices, "temperature": 0.5}

    async def main() -> None:
        async with running(engine, is_home_serving=is_home_serving) as world:
            gateways = [world.home, *world.memory.gateways.values()]
            async with httpx.AsyncClient() as client, trio.open_nursery() as nursery:

                async def ask() -> None:
                    url = f"{world.url}/v1/completions"
                    async with client.stream("POST", url, json={**body, "stream": is_stream}, timeout=60) as answer:
                        async for _ in answer.aiter_lines():
                            pass

                nursery.start_soon(ask)
                while sum(gateway.num_sessions for gateway in gateways) < num_choices or engine.num_tokens < 20:
                    await trio.sleep(0.001)
                engine.free.clear()
                while not engine.num_running:
                    await trio.sleep(0.001)
                await trio.testing.wait_all_tasks_blocked(0.05)
                num_tokens, num_steps, num_running = engine.num_tokens, engine.num_steps, engine.num_running
                nursery.cancel_scope.cancel()
            await trio.testing.wait_all_tasks_blocked(0.05)  # the node sees it while the step lasts
            engine.free.set()
            with trio.fail_after(5):
                while any(gateway.num_sessions for gateway in gateways) or engine.num_running:
                    await trio.sleep(0.001)
            assert engine.num_steps == num_steps + num_running
            assert engine.num_tokens <= num_tokens + num_choices
            assert V1 in world.home.versions()

    trio.run(main)


def test_another_sites_page_cannot_make_a_browser_ask_this_node(engine: Engine) -> None:
    body = {"model": "tiny+base", "prompt": "We", "max_tokens": 1}

    def ask(world: World, origin: str, host: str = "") -> httpx.Response:
        headers = {"origin": origin} | ({"host": host} if host else {})
        return httpx.post(f"{world.url}/v1/completions", json=body, headers=headers)

    def check(world: World) -> None:
        refused = ask(world, "https://evil.example")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "unknown_origin")
        assert ask(world, "null").status_code == 403
        assert ask(world, "http://[").status_code == 403
        assert ask(world, "http://evil.example", "evil.example").status_code == 403  # a name that leads to 127.0.0.1
        assert ask(world, world.url).status_code == 200

    def check_named(world: World) -> None:
        answer = ask(world, "https://app.example")
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://app.example")
        assert ask(world, "https://evil.example").status_code == 403

    with_world(engine, check)
    with_world(engine, check_named, bounds=HttpConfig(origins=("https://app.example",)))


def test_a_bug_is_an_error_in_openais_form_and_the_next_request_is_served(engine: Engine) -> None:
    async def find_blob(digest: Digest) -> bytes | None:
        raise ZeroDivisionError("a bug")

    def check(world: World) -> None:
        answer = httpx.get(f"{world.url}/blobs/{'0' * 64}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert is_healthy(world)

    with_world(engine, check, find_blob=find_blob)


def test_a_prompt_over_the_nodes_bound_is_told_the_bound(engine: Engine) -> None:
    def check(world: World) -> None:
        body = {"model": "tiny+base", "prompt": [5] * 9, "max_tokens": 1}
        error = httpx.post(f"{world.url}/v1/completions", json=body).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert "at most 8 tokens" in error["message"]

    with_world(engine, check, bounds=HttpConfig(prompt_tokens_max=8))
