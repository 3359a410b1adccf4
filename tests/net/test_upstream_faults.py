"""What a broken or hostile server behind a node may do: the stream goes on at the next replica, the node unharmed."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager

import msgspec
import pytest
import trio
from prometheus_client import CollectorRegistry
from serving_world import QUICK, TINY, Memory

from p2pfm.config import AdapterConfig, ServingConfig
from p2pfm.lora.user_adapter import BACKBONE_VERSION
from p2pfm.messages import GenerateRequest
from p2pfm.runtime import upstream as upstream_module
from p2pfm.runtime.backend import BackendFailed
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.upstream import Server, Upstream
from p2pfm.runtime.upstream_wire import LlamaCpp, Vllm
from p2pfm.types import Millis, PeerId

Talk = Callable[[socket.socket], None]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(str(TINY), AdapterConfig(), versions_max=1, dtype="fp32")


@contextmanager
def talking(talk: Talk) -> Iterator[str]:
    """A server that reads each request's head and some of its body, and then does `talk`."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while connection.recv(1 << 20):
                    talk(connection)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=answer, args=(connection,), daemon=True))
            threads[-1].start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def reply(body: bytes, status: str = "200 OK", more: str = "") -> Talk:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return lambda connection: connection.sendall(head.encode() + body)


def cut_off(connection: socket.socket) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"tokens": [')
    connection.shutdown(socket.SHUT_RDWR)


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        threading.Event().wait(0.05)


def pour(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b" " * 65536)


def say_nothing(connection: socket.socket) -> None:
    threading.Event().wait(30)


GREEDY: dict[str, Talk] = {
    "an error": reply(b'{"error": {"message": "out of memory"}}', "500 Internal Server Error"),
    "busy": reply(b"loading", "503 Service Unavailable"),
    "elsewhere": reply(b"", "302 Found", "location: http://169.254.169.254/\r\n"),
    "no JSON": reply(b"<html>"),
    "deep JSON": reply(b"[" * 100_000),
    "other JSON": reply(b'{"content": "hello"}'),
    "words for tokens": reply(b'{"tokens": ["hello"]}'),
    "no token": reply(b'{"tokens": []}'),
    "many tokens": reply(b'{"tokens": [5, 6, 7]}'),
    "a token of no vocabulary": reply(b'{"tokens": [99999]}'),
    "a negative token": reply(b'{"tokens": [-1]}'),
    "a huge token": reply(b'{"tokens": [123456789012345678901234567890]}'),
    "no HTTP": lambda connection: connection.sendall(b"hello\r\n\r\n"),
    "half an answer": cut_off,
    "nothing": say_nothing,
    "a drip": drip,
    "a flood": pour,
}


def place(*pairs: str) -> bytes:
    return b'{"tokens": [5], "completion_probabilities": [{"top_logprobs": [%s]}]}' % ", ".join(pairs).encode()


def one(token: int, logprob: str) -> str:
    return f'{{"id": {token}, "logprob": {logprob}}}'


SAMPLED: dict[str, Talk] = {
    "no place": reply(b'{"tokens": [5]}'),
    "few": reply(place(one(5, "-0.1"))),
    "twice the same": reply(place(*[one(5, "-6")] * 256)),
    "outside": reply(place(*[one(token + 900, "-6.9") for token in range(256)])),
    "more than all": reply(place(*[one(token, "-0.1") for token in range(256)])),
    "above 1": reply(place(one(0, "1e300"), *[one(token, "-50") for token in range(1, 256)])),
    "nobody likely": reply(place(*[one(token, "-500") for token in range(256)])),
    "no number": reply(place(*[one(token, "null") for token in range(256)])),
    "NaN": reply(place(*[one(token, "NaN") for token in range(256)])),
}


def ask(temperature: int, num_tokens: int = 12) -> GenerateRequest:
    return GenerateRequest(BACKBONE_VERSION, (47, 91, 763), (), num_tokens, temperature, 1000, 7, 0)


@pytest.mark.parametrize(
    ("temperature", "name"), [*((0, name) for name in GREEDY), *((1000, name) for name in SAMPLED)]
)
def test_a_server_that_breaks_off_or_talks_nonsense_is_replaced(engine, monkeypatch, temperature, name) -> None:
    monkeypatch.setattr(upstream_module, "BODY_BYTES_MAX", 1 << 20)
    request = ask(temperature)
    makers, tokens = [], []

    async def main(url: str) -> None:
        memory = Memory()
        clock = lambda: Millis(int(trio.current_time() * 1000))  # noqa: E731
        upstream = Upstream(Server(url, 0.4), LlamaCpp(5), engine.vocabulary, 1024, 2)
        gateways = [
            Gateway(PeerId(peer), ServingConfig(), back, engine.vocabulary, memory, CollectorRegistry(), clock, QUICK)
            for peer, back in (("home", upstream), ("other", Batcher(engine)))
        ]
        memory.gateways[PeerId("other")] = gateways[1]
        gateways[0].on_presence(PeerId("other"), gateways[1].presence())
        with trio.fail_after(5):
            async for new in gateways[0].complete(request):
                makers.append((new.replica, new.num_replaced))
                tokens.extend(new.tokens)
        assert not upstream.is_busy()
        assert [chunk.finish async for chunk in gateways[0].serve(request)][-1] == "error"

    with talking({**GREEDY, **SAMPLED}[name]) as url:
        trio.run(main, url)
    assert tokens == [token for chunk in engine.generate(request) for token in chunk.tokens]
    assert set(makers) == {("other", 1)}


def test_a_cancelled_stream_closes_its_connection_at_once(engine) -> None:
    closed = threading.Event()

    def wait_for_the_end(connection: socket.socket) -> None:
        if not connection.recv(1):
            closed.set()

    async def main(url: str) -> None:
        upstream = Upstream(Server(url, 30), LlamaCpp(5), engine.vocabulary, 1024, 1)
        with trio.move_on_after(0.2) as scope:
            async with aclosing(upstream.generate(ask(0), is_local=True)) as chunks:
                async for chunk in chunks:
                    assert not chunk.tokens
        assert scope.cancelled_caught
        assert not upstream.is_busy()

    with talking(wait_for_the_end) as url:
        trio.run(main, url)
        assert closed.wait(2)


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices": []}',
        b'{"choices": [{"text": "hello"}]}',
        b'{"choices": [{"token_ids": [5]}, {"token_ids": [5]}]}',
    ],
)
def test_a_vllm_without_token_ids_is_no_back_end(body: bytes) -> None:
    with pytest.raises(BackendFailed):
        Vllm("m", BACKBONE_VERSION).read_tokens(body)


@pytest.mark.parametrize("told", [None, {"top_logprobs": []}, {"top_logprobs": [{" hello": -0.1}]}])
def test_a_vllm_without_token_ids_in_its_log_probabilities_is_no_back_end(told) -> None:
    body = msgspec.json.encode({"choices": [{"token_ids": [5], "logprobs": told}]})
    with pytest.raises(BackendFailed):
        Vllm("m", BACKBONE_VERSION).read_likeliest(body)
