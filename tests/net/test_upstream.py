"""A llama.cpp server behind a node: the real one, with the tiny model in float32 beside our engine."""

import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import numpy as np
import openai
import pytest
import trio
import trio.testing
from llama_server import running_llama, write_gguf
from node_toml import NODE
from prometheus_client import CollectorRegistry
from serving_world import QUICK, TINY, V1, Memory, make_adapter, no_blobs

from nodes.transformer import make_models
from p2pfm.config import AdapterConfig, HttpConfig, ServingConfig, parse_node_config
from p2pfm.errors import OperatorError, PeerUnreachable
from p2pfm.lora.user_adapter import BACKBONE_VERSION, encode_adapter
from p2pfm.messages import GenerateRequest
from p2pfm.runtime.adapter_folder import AdapterFolder
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.gateway import Gateway, Tokens
from p2pfm.runtime.http_api import NO_KEYS, HttpApi
from p2pfm.runtime.http_server import serve_http
from p2pfm.runtime.model_names import ModelNames
from p2pfm.runtime.openai_wire import ApiError
from p2pfm.runtime.text import TextCodec
from p2pfm.runtime.upstream import Upstream
from p2pfm.runtime.upstream_adapters import VllmAdapters
from p2pfm.runtime.upstream_check import connect_upstream
from p2pfm.runtime.user_adapters import UserAdapters
from p2pfm.serving.recheck import compute_gap
from p2pfm.serving.session import UnknownVersion
from p2pfm.types import Digest, Millis, PeerId, compute_digest

SLOTS = 4


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(str(TINY), AdapterConfig(), versions_max=1, dtype="fp32")


@pytest.fixture(scope="module")
def codec(engine: Engine) -> TextCodec:
    return TextCodec(engine.tokenizer, engine.vocabulary)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("llama")
    with running_llama(write_gguf(TINY, folder / "tiny.gguf"), folder / "log", slots=SLOTS) as found:
        yield found


def make_config(url: str, sessions_max: int = SLOTS) -> ServingConfig:
    return ServingConfig(backend="llama.cpp", backend_url=url, backend_s=20.0, sessions_max=sessions_max)


async def connect(url: str, codec: TextCodec, engine: Engine, folder: Path, sessions_max: int = SLOTS) -> Upstream:
    adapters = VllmAdapters(folder / "adapters", 2, lambda *_: None)
    return await connect_upstream(make_config(url, sessions_max), codec, lambda: engine.compute_logits, adapters)


def ask(codec: TextCodec, text: str = "My fellow citizens", num_tokens: int = 60, **more: int) -> GenerateRequest:
    request = GenerateRequest(BACKBONE_VERSION, codec.encode(text), (), num_tokens, 0, 1000, 7, 0)
    return msgspec.structs.replace(request, **more)


async def collect(upstream: Upstream, request: GenerateRequest) -> tuple[tuple[int, ...], str, list]:
    tokens, finish, logprobs = [], "", []
    async with aclosing(upstream.generate(request, is_local=False)) as chunks:
        async for chunk in chunks:
            assert chunk.position == len(request.emitted) + len(tokens)
            assert finish == ""
            tokens, finish = [*tokens, *chunk.tokens], chunk.finish
            logprobs += chunk.logprobs
    return tuple(tokens), finish, logprobs


def run(engine: Engine, request: GenerateRequest) -> tuple[int, ...]:
    return tuple(token for chunk in engine.generate(request) for token in chunk.tokens)


@pytest.mark.parametrize("text", ["My fellow citizens", "The state of the Union is strong, " * 20])
@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1000), (700, 950), (1500, 1000)])
def test_the_text_is_our_own_engines(url, codec, engine, tmp_path, text: str, temperature: int, top_p: int) -> None:
    request = ask(codec, text, temperature_milli=temperature, top_p_milli=top_p)

    async def main() -> tuple:
        return await collect(await connect(url, codec, engine, tmp_path), request)

    tokens, finish, _ = trio.run(main)
    assert (tokens, finish) == (run(engine, request), "length")


@pytest.mark.parametrize("temperature", [0, 900])
def test_a_resume_continues_at_the_position_even_inside_a_character(url, codec, engine, tmp_path, temperature) -> None:
    request = ask(codec, temperature_milli=temperature)
    half = next(token for token in range(1024) if codec.get_bytes(token) == b"\xe2")

    async def main() -> None:
        upstream = await connect(url, codec, engine, tmp_path)
        whole, *_ = await collect(upstream, request)
        for cut in (1, 7, 30, 59):
            rest, finish, _ = await collect(upstream, msgspec.structs.replace(request, emitted=whole[:cut]))
            assert (whole[:cut] + rest, finish) == (whole, "length")
        assert await collect(upstream, msgspec.structs.replace(request, emitted=whole)) == ((), "", [])
        odd = msgspec.structs.replace(request, emitted=(*whole[:5], half))
        assert (await collect(upstream, odd))[0] == run(engine, odd)

    trio.run(main)


def test_every_split_character_arrives(url, codec, engine, tmp_path) -> None:
    """llama.cpp's event streams leave out ids of characters that are not whole yet: hot draws are full of them."""
    request = ask(codec, num_tokens=200, temperature_milli=3000)

    async def main() -> tuple[int, ...]:
        return (await collect(await connect(url, codec, engine, tmp_path), request))[0]

    tokens = trio.run(main)
    claimed = msgspec.structs.replace(request, emitted=tokens)
    gaps = [
        compute_gap(row, request, token, position)
        for position, (row, token) in enumerate(zip(engine.compute_logits(claimed), tokens, strict=True))
    ]
    assert len(tokens) == 200
    assert max(gaps) < 1000, "each is the sampler's draw from this model's logits, to a thousandth of a nat"
    assert sum(codec.get_bytes(token)[:1] >= b"\xc0" for token in tokens) >= 3


def test_log_probabilities_are_the_models(url, codec, engine, tmp_path) -> None:
    request = ask(codec, num_tokens=20, num_logprobs=6)

    async def main() -> tuple:
        return await collect(await connect(url, codec, engine, tmp_path), request)

    tokens, _, told = trio.run(main)
    own = [chunk.logprobs[0] for chunk in engine.generate(request) if chunk.tokens]
    assert tokens == run(engine, request)
    assert len(told) == len(own) == 20
    for theirs, ours in zip(told, own, strict=True):
        assert abs(theirs.micro_nats - ours.micro_nats) < 1000
        assert [token for token, _ in theirs.likeliest] == [token for token, _ in ours.likeliest]


def test_a_text_ends_where_the_network_says(url, codec, engine, tmp_path) -> None:
    request = ask(codec)
    whole = run(engine, request)
    end = whole[20]
    vocabulary = replace(codec.vocabulary, ends=frozenset({end}))

    async def main() -> tuple:
        found = await connect(url, codec, engine, tmp_path)
        return await collect(Upstream(found.server, found.dialect, vocabulary, 1024, SLOTS), request)

    tokens, finish, _ = trio.run(main)
    assert (tokens, finish) == (whole[: whole.index(end) + 1], "stop")


def test_many_streams_at_once_are_each_as_alone_and_more_are_refused(url, codec, engine, tmp_path) -> None:
    requests = [ask(codec, text, num_tokens=24) for text in ("We", "Peace", "The Union", "Our nation")]
    found: dict[int, tuple] = {}

    async def main() -> None:
        upstream = await connect(url, codec, engine, tmp_path)

        async def one(index: int) -> None:
            found[index] = await collect(upstream, requests[index])

        async with trio.open_nursery() as nursery:
            for index in range(SLOTS):
                nursery.start_soon(one, index)
            await trio.testing.wait_all_tasks_blocked()
            assert upstream.is_busy()
            assert (await collect(upstream, requests[0]))[1] == "busy"
        assert not upstream.is_busy()

    trio.run(main)
    assert [found[index][0] for index in range(SLOTS)] == [run(engine, request) for request in requests]


def test_a_cancelled_stream_stops_the_server(url, codec, engine, tmp_path) -> None:
    async def main() -> None:
        upstream = await connect(url, codec, engine, tmp_path)
        async with aclosing(upstream.generate(ask(codec, num_tokens=900), is_local=False)) as chunks:
            async for chunk in chunks:
                if chunk.position > 4:
                    break
        assert not upstream.is_busy()

    trio.run(main)
    give_up = time.monotonic() + 5
    while any(slot["is_processing"] for slot in httpx.get(f"{url}/slots", trust_env=False).json()):
        assert time.monotonic() < give_up


def test_only_the_bare_backbone_is_offered(url, codec, engine, tmp_path) -> None:
    async def main() -> None:
        upstream = await connect(url, codec, engine, tmp_path)
        await upstream.add_version(V1, make_adapter(engine.shapes, 1))
        assert upstream.versions() == (BACKBONE_VERSION,)
        with pytest.raises(UnknownVersion, match="does not hold 1111"):
            await collect(upstream, ask(codec, version=V1))
        short = Upstream(upstream.server, upstream.dialect, codec.vocabulary, 100, 1)
        with pytest.raises(UnknownVersion, match="100 tokens of a stream at most"):
            await collect(short, ask(codec, num_tokens=99))

    trio.run(main)


# --- what is found when the node starts -------------------------------------------------------------------------------


def refuse(url: str, codec: TextCodec, engine: Engine, folder: Path, sessions_max: int = SLOTS) -> str:
    async def main() -> None:
        await connect(url, codec, engine, folder, sessions_max)

    with pytest.raises(OperatorError) as caught:
        trio.run(main)
    return str(caught.value)


def test_nobody_there_says_how_to_start_it(codec, engine, tmp_path) -> None:
    message = refuse("http://127.0.0.1:9", codec, engine, tmp_path)
    assert "expected a llama.cpp server there" in message
    assert "Start it: llama-server -m MODEL.gguf" in message


def test_fewer_streams_than_promised_says_both_ways_out(url, codec, engine, tmp_path) -> None:
    message = refuse(url, codec, engine, tmp_path, sessions_max=16)
    assert "set it to 4, or start the server with --parallel 16" in message


def test_other_weights_of_the_same_name_are_found(codec, engine, tmp_path) -> None:
    gguf = write_gguf(TINY, tmp_path / "noisy.gguf", noise=0.02)
    with running_llama(gguf, tmp_path / "log", slots=SLOTS) as url:
        message = refuse(url, codec, engine, tmp_path)
    assert "serves another model than this network's backbone, or its weights in fewer bits" in message
    assert "F16, BF16 or F32" in message


def test_other_tokens_are_found(url, codec, engine, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(TextCodec, "encode_plain", lambda self, text: (1, 2, 3))
    assert "makes other tokens of a text" in refuse(url, codec, engine, tmp_path)


def test_a_node_with_it_in_its_toml_starts_with_it(url, codec, engine, tmp_path) -> None:
    text = NODE.replace('home = "h"', f'home = "{tmp_path}"')
    config = parse_node_config(f'{text}[serving]\nbackend = "llama.cpp"\nbackend_url = "{url}"\nsessions_max = 2')

    async def main() -> None:
        models = make_models(config, (), lambda learner: learner)
        made = await trio.to_thread.run_sync(models.engine)
        assert isinstance(made, Upstream)
        assert (await collect(made, ask(codec)))[0] == run(engine, ask(codec))

    trio.run(main)


# --- in a network -----------------------------------------------------------------------------------------------------


def make_gateway(name: str, backend, codec: TextCodec, memory: Memory) -> Gateway:
    clock = lambda: Millis(int(trio.current_time() * 1000))  # noqa: E731
    config = ServingConfig(sessions_max=SLOTS)
    made = Gateway(PeerId(name), config, backend, codec.vocabulary, memory, CollectorRegistry(), clock, QUICK)
    memory.gateways[PeerId(name)] = made
    return made


def test_another_replica_goes_on_where_a_killed_server_stopped(codec, engine, tmp_path) -> None:
    request = ask(codec, num_tokens=80)
    gguf = write_gguf(TINY, tmp_path / "tiny.gguf")
    got: list[Tokens] = []

    async def main() -> None:
        memory = Memory()
        with running_llama(gguf, tmp_path / "log", slots=SLOTS) as url:
            home = make_gateway("home", await connect(url, codec, engine, tmp_path), codec, memory)
            other = make_gateway("other", Batcher(engine), codec, memory)
            home.on_presence(other.local, other.presence())
            stream = home.complete(request)
            while sum(len(new.tokens) for new in got) < 20:
                got.append(await anext(stream))
        got.extend([new async for new in stream])

    trio.run(main)
    assert tuple(token for new in got for token in new.tokens) == run(engine, request)
    assert {new.replica for new in got[:4]} == {"home"}
    assert (got[-1].replica, got[-1].num_replaced, got[-1].finish) == ("other", 1, "length")


def test_its_node_sends_a_base_elsewhere_and_says_what_it_has(url, codec, engine, tmp_path) -> None:
    engine.add_version(V1, make_adapter(engine.shapes, 1))

    async def main() -> None:
        memory = Memory()
        home = make_gateway("home", await connect(url, codec, engine, tmp_path), codec, memory)
        await home.adopt(V1, make_adapter(engine.shapes, 1))
        assert home.presence().versions == (BACKBONE_VERSION,)
        names = ModelNames("tiny", home)
        assert list(names.names()) == ["tiny"]
        with pytest.raises(ApiError, match=r"'tiny\+base' does not exist. Models served now: tiny"):
            await names.resolve("tiny+base")
        assert [chunk.finish async for chunk in home.serve(ask(codec, version=V1))] == ["unknown_version"]
        other = make_gateway("other", Batcher(engine), codec, memory)
        home.on_presence(other.local, other.presence())
        makers = [new.replica async for new in home.complete(ask(codec, num_tokens=5, version=V1))]
        assert set(makers) == {"other"}

    trio.run(main)


def test_openais_client_gets_our_own_engines_answers(url, codec, engine, tmp_path) -> None:
    prompt = codec.encode("My fellow citizens")
    whole = codec.decode(run(engine, ask(codec, num_tokens=30)))
    stop = whole[20:24]

    def check(port: int) -> None:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30)
        answer = client.completions.create(model="tiny", prompt=list(prompt), max_tokens=30, temperature=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole, "length")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 30)
        short = client.completions.create(model="tiny", prompt=list(prompt), max_tokens=30, temperature=0, stop=stop)
        assert (short.choices[0].text, short.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")
        told = {"model": "tiny", "prompt": list(prompt), "max_tokens": 30, "temperature": 0.8, "seed": 5}
        pieces = list(client.completions.create(**told, stream=True, stream_options={"include_usage": True}))
        seeded = run(engine, ask(codec, num_tokens=30, temperature_milli=800, seed=5))
        assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == codec.decode(seeded)
        assert pieces[-1].usage.completion_tokens == 30

    async def main() -> None:
        home = make_gateway("home", await connect(url, codec, engine, tmp_path), codec, Memory())
        clock = lambda: Millis(int(trio.current_time() * 1000))  # noqa: E731
        api = HttpApi(home, codec, "tiny", CollectorRegistry(), dict, clock, no_blobs, HttpConfig(), NO_KEYS)
        await home.adopt(V1, make_adapter(engine.shapes, 1))
        async with trio.open_nursery() as nursery:
            port = await nursery.start(serve_http, api.app(), "127.0.0.1", 0, HttpConfig())
            await trio.to_thread.run_sync(check, port)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_users_adapter_is_served_elsewhere(url, codec, engine, tmp_path) -> None:
    rng = np.random.default_rng(5)
    sizes = {name: size for name, size in engine.lora_sizes().items() if name.endswith("v_proj")}
    factors = {
        name: (rng.normal(0, 0.2, (3, fan_in)).astype(np.float32), rng.normal(0, 0.2, (fan_out, 3)).astype(np.float32))
        for name, (fan_out, fan_in) in sizes.items()
    }
    blob = encode_adapter("tiny", factors)
    request = ask(codec, num_tokens=12, version=compute_digest(blob))

    async def fetch(digest: Digest, asker: PeerId | None, bytes_max: int) -> bytes:
        raise PeerUnreachable("both have it")

    async def main() -> list[Tokens]:
        memory, batcher = Memory(), Batcher(engine)
        home = make_gateway("home", await connect(url, codec, engine, tmp_path), codec, memory)
        other = make_gateway("other", batcher, codec, memory)
        for gateway, own in ((home, None), (other, batcher)):
            folder = AdapterFolder(tmp_path / gateway.local, 1 << 30)
            folder.put(blob)
            gateway.adapters = UserAdapters("tiny", ServingConfig(), folder, own, fetch)
        home.on_presence(other.local, other.presence())
        assert [chunk.finish async for chunk in home.serve(request)] == ["unknown_version"]
        return [new async for new in home.complete(request)]

    got = trio.run(main)
    assert {new.replica for new in got} == {"other"}
    assert {new.num_replaced for new in got} == {0}, "who declines has not failed"
    assert len(tuple(token for new in got for token in new.tokens)) == 12
