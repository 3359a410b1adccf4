"""The unmodified `openai` client against the real app on a real port, with real replicas that fail on purpose."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial

import httpx
import openai
import pytest
import trio
from prometheus_client import CollectorRegistry
from serving_world import (
    QUESTION,
    TINY,
    V1,
    V2,
    Memory,
    World,
    make_engine,
    no_blobs,
    prompt_of,
    read_stream,
    running,
    with_world,
)

from p2pfm.config import AdapterConfig, HttpConfig, ServingConfig
from p2pfm.errors import OperatorError
from p2pfm.messages import GenerateRequest, Presence
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.http_api import HttpApi
from p2pfm.runtime.http_server import serve_http
from p2pfm.runtime.text import TextCodec
from p2pfm.types import Digest, Millis, PeerId


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def test_chat_and_text_answer_whole_and_streamed_alike(engine: Engine) -> None:
    def check(world: World) -> None:
        client = world.client()
        expected = world.text(prompt_of(engine), 30)
        whole = client.chat.completions.create(model="tiny+base", messages=QUESTION, max_tokens=30, temperature=0)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason == "length"
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt_of(engine)), 30)
        assert whole.model_extra["p2pfm"]["version"] == V1.hex()
        assert whole.model_extra["p2pfm"]["replica"] in ("one", "two")
        streamed, extras, chunks = read_stream(
            client.chat.completions.create(
                model="tiny+base", messages=QUESTION, max_completion_tokens=30, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
        assert streamed == expected
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
        assert chunks[-1].usage.completion_tokens == 30
        assert chunks[0].usage is None
        assert all(extra["replaced"] == 0 for extra in extras)
        prompt = "My fellow citizens"
        text = client.completions.create(model="tiny+base", prompt=prompt, max_tokens=12, temperature=0)
        assert text.choices[0].text == world.text(tuple(engine.tokenizer.encode(prompt)), 12)
        pieces = client.completions.create(
            model="tiny+base", prompt=engine.tokenizer.encode(prompt), max_tokens=12, temperature=0, stream=True
        )
        assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text

    with_world(engine, check)


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("fault", ["cut", "freeze", "end", "gap", "restart", "huge", "stop", "error", "empty"])
def test_a_replica_that_fails_in_mid_stream_is_replaced_and_the_text_is_the_undisturbed_one(
    engine: Engine, fault: str, temperature: float
) -> None:
    def check(world: World) -> None:
        world.memory.faults = dict.fromkeys(world.memory.gateways, (7, fault))  # whichever comes first...
        asked = world.memory.asked
        stream = world.client().chat.completions.create(
            model="tiny+base", messages=QUESTION, max_tokens=24, temperature=temperature, seed=5, stream=True
        )
        pieces, replicas = "", []
        for chunk in stream:
            pieces += chunk.choices[0].delta.content or ""
            replicas.append((chunk.model_extra["p2pfm"]["replica"], chunk.model_extra["p2pfm"]["replaced"]))
            for peer in world.memory.gateways:
                if peer not in asked[:1]:
                    world.memory.faults.pop(peer, None)  # ...the other one is healthy
        assert pieces == world.text(prompt_of(engine), 24, temperature=round(temperature * 1000))
        assert replicas[0] == (asked[0], 0)
        assert replicas[-1] == (asked[-1], 1)
        assert asked[0] != asked[-1]
        assert world.registry.get_sample_value("p2pfm_replaced_replicas_total") == 1

    with_world(engine, check)


def test_a_stream_survives_as_many_failures_as_it_takes(engine: Engine) -> None:
    def check(world: World) -> None:
        world.memory.faults = dict.fromkeys(world.memory.gateways, (3, "cut"))  # every stream breaks after 3 tokens
        answer = world.client().chat.completions.create(
            model="tiny+base", messages=QUESTION, max_tokens=20, temperature=0
        )
        assert answer.choices[0].message.content == world.text(prompt_of(engine), 20)
        assert answer.model_extra["p2pfm"]["replaced"] >= 6

    with_world(engine, check)


def test_the_local_replica_answers_first_and_others_when_it_is_full(engine: Engine) -> None:
    def check(world: World) -> None:
        client = world.client()
        ask = partial(client.chat.completions.create, model="tiny+base", messages=QUESTION, temperature=0)
        stream = ask(max_tokens=900, stream=True)
        first = next(iter(stream))
        second = ask(max_tokens=4)
        assert first.model_extra["p2pfm"]["replica"] == "home"
        assert second.model_extra["p2pfm"]["replica"] in ("one", "two")
        stream.close()

    with_world(engine, check, is_home_serving=True, sessions_max=1)


def test_a_pinned_version_is_served_and_a_swap_does_not_touch_a_running_stream(engine: Engine) -> None:
    def check(world: World) -> None:
        client = world.client()
        names = [model.id for model in client.models.list()]
        assert names[:2] == ["tiny+base", f"tiny+base@{V1.hex()[:16]}"]
        assert set(names[2:]) == {f"tiny+base@{V2.hex()[:16]}", "tiny"}
        ask = partial(client.chat.completions.create, messages=QUESTION, max_tokens=24, temperature=0)
        pinned = ask(model=f"tiny+base@{V2.hex()[:8]}")
        assert pinned.choices[0].message.content == world.text(prompt_of(engine), 24, V2)
        stream = ask(model="tiny+base", stream=True)
        text = next(iter(stream)).choices[0].delta.content or ""
        trio.from_thread.run(world.home.adopt, V2, {})  # home has no engine: only the name moves
        text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == world.text(prompt_of(engine), 24, V1)
        assert ask(model="tiny+base").model_extra["p2pfm"]["version"] == V2.hex()
        assert client.models.retrieve("tiny+base").model_extra["p2pfm"]["version"] == V2.hex()

    with_world(engine, check)


def test_a_stop_string_ends_the_answer_before_itself(engine: Engine) -> None:
    def check(world: World) -> None:
        expected = world.text(prompt_of(engine), 40)
        stop = expected[12:17]
        cut = expected[: expected.index(stop)]
        ask = partial(
            world.client().chat.completions.create,
            model="tiny+base", messages=QUESTION, max_tokens=40, temperature=0, stop=[stop, "never said"],
        )  # fmt: skip
        whole = ask()
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (cut, "stop")
        text, _, chunks = read_stream(ask(stream=True))
        assert (text, chunks[-1].choices[0].finish_reason) == (cut, "stop")
        assert whole.usage.completion_tokens < 40

    with_world(engine, check)


def test_one_seed_gives_one_text_and_another_another(engine: Engine) -> None:
    def check(world: World) -> None:
        def ask(seed: int | None) -> str:
            answer = world.client().completions.create(
                model="tiny+base", prompt="We", max_tokens=20, temperature=1.2, seed=seed
            )
            return answer.choices[0].text

        assert ask(1) == ask(1) != ask(2)
        assert ask(None) != ask(None)

    with_world(engine, check)


def test_errors_have_openais_form_and_say_what_to_do(engine: Engine) -> None:
    def check(world: World) -> None:
        client = world.client()
        ask = partial(client.chat.completions.create, messages=QUESTION, max_tokens=4)
        with pytest.raises(openai.NotFoundError, match=r"tiny\+base") as missing:
            ask(model="gpt-9")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            ask(model=f"tiny+base@{'f' * 16}")
        with pytest.raises(openai.BadRequestError, match="1024 tokens") as long:
            client.completions.create(model="tiny+base", prompt="word " * 3_000, max_tokens=4)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
        for wrong in (
            {"n": 9}, {"n": 0}, {"top_logprobs": 2}, {"response_format": {"type": "json_object"}},
            {"temperature": 3}, {"top_p": 0}, {"max_tokens": 0}, {"seed": -1}, {"top_logprobs": 21},
            {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"stop": ["x" * 300]}, {"temperature": "hot"},
        ):  # fmt: skip
            with pytest.raises(openai.BadRequestError) as bad:
                ask(model="tiny+base", **wrong)
            assert bad.value.param.partition("[")[0] == next(iter(wrong))
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny+base", messages=[])
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny+base", prompt=[5_000], max_tokens=1)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny+base", prompt=["a", "b"], max_tokens=1)
        for body in (b"{", b"\xff\xfe", b"[]", b"null", b"[" * 30_000):
            answer = httpx.post(f"{world.url}/v1/completions", content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
        assert httpx.post(f"{world.url}/v1/completions", content=b"x" * 70_000).status_code == 413
        assert httpx.get(f"{world.url}/v1/nowhere").json()["error"]["code"] == "unknown_url"
        assert httpx.get(f"{world.url}/v1/completions").status_code == 405
        assert httpx.get(f"{world.url}/health").status_code == 200

    with_world(engine, check, bounds=HttpConfig(body_bytes_max=65_536))


def test_over_its_bounds_a_node_answers_429_with_retry_after(engine: Engine) -> None:
    def check(world: World) -> None:
        client = world.client()
        ask = partial(client.chat.completions.create, model="tiny+base", messages=QUESTION, temperature=0)
        streams = [ask(max_tokens=900, stream=True) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError) as full:  # both replicas have one session each
            ask(max_tokens=2)
        assert int(full.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()

    with_world(engine, check, sessions_max=1, bounds=HttpConfig(queue_s_max=0.1))
    with_world(engine, check, bounds=HttpConfig(requests_max=2, queue_max=0))


def test_who_finds_all_replicas_busy_waits_for_one(engine: Engine) -> None:
    """Just after a round one replica may be alone with the new base: whoever asks then is not sent away."""

    def check(world: World) -> None:
        client = world.client()  # which tries nothing again
        ask = partial(client.chat.completions.create, model="tiny+base", messages=QUESTION, temperature=0)
        streams = [ask(max_tokens=900, stream=True) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, max_tokens=2)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            streams[0].close()
            assert waiting.result(timeout=8).usage.completion_tokens == 2
        streams[1].close()

    with_world(engine, check, sessions_max=1)


def test_without_any_replica_the_answer_is_503_or_an_event_in_the_stream(engine: Engine) -> None:
    def check(world: World) -> None:
        world.memory.faults = dict.fromkeys(world.memory.gateways, (0, "cut"))
        ask = partial(world.client().chat.completions.create, model="tiny+base", messages=QUESTION, max_tokens=20)
        with pytest.raises(openai.InternalServerError) as none:
            ask()
        assert (none.value.status_code, none.value.code) == (503, "no_replica")
        world.memory.faults = dict.fromkeys(world.memory.gateways, (5, "cut"))
        stream = iter(ask(stream=True))
        assert next(stream).choices[0].delta.content is not None
        world.memory.gateways.clear()
        with pytest.raises(openai.APIError) as broken:
            list(stream)
        assert broken.value.code == "no_replica"

    with_world(engine, check)


def test_a_client_that_leaves_stops_the_work(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as world:
            body = {"model": "tiny+base", "prompt": "We", "max_tokens": 900, "temperature": 0, "stream": True}
            async with (
                httpx.AsyncClient() as client,
                client.stream("POST", f"{world.url}/v1/completions", json=body) as response,
            ):
                await anext(response.aiter_lines())
                assert sum(gateway.num_sessions for gateway in world.memory.gateways.values()) == 1
            with trio.fail_after(5):
                while any(gateway.num_sessions for gateway in world.memory.gateways.values()):
                    await trio.lowlevel.checkpoint()
                while world.registry.get_sample_value("p2pfm_http_completions_total", {"outcome": "cancelled"}) != 1:
                    await trio.lowlevel.checkpoint()

    trio.run(main)


def test_a_node_tells_its_health_readiness_metrics_and_status(engine: Engine) -> None:
    def check(world: World) -> None:
        get = lambda path: httpx.get(f"{world.url}{path}")  # noqa: E731
        assert get("/health").json() == {"status": "ok"}
        assert get("/ready").status_code == 200
        assert get("/status").json() == {"round": 3}
        assert "p2pfm_sessions" in get("/metrics").text

    with_world(engine, check)


def test_a_node_is_not_ready_before_somebody_serves_a_certified_base(engine: Engine) -> None:
    async def main() -> None:
        bare = Engine(str(TINY), AdapterConfig(), versions_max=1)  # it can serve the backbone: that is not enough
        clock = lambda: Millis(int(trio.current_time() * 1000))  # noqa: E731
        registry = CollectorRegistry()
        gateway = Gateway(PeerId("home"), ServingConfig(), Batcher(bare), engine.vocabulary, Memory(), registry, clock)
        codec = TextCodec(engine.tokenizer, engine.vocabulary)
        api = HttpApi(gateway, codec, "tiny", registry, dict, clock, no_blobs)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api.app()), base_url="http://127.0.0.1") as client:
            answer = await client.get("/ready")
            assert (answer.status_code, answer.json()) == (503, {"ready": False, "versions": 0})
            assert (await client.get("/health")).status_code == 200
            gateway.on_presence(PeerId("one"), Presence(PeerId("one"), (V1,), 0, 4, 15_000, 1))
            answer = await client.get("/ready")
            assert (answer.status_code, answer.json()) == (200, {"ready": True, "versions": 1})

    trio.run(main)


def test_top_p_cuts_the_draw_to_the_likeliest(engine: Engine) -> None:
    def check(world: World) -> None:
        ask = partial(world.client().completions.create, model="tiny+base", prompt="We", max_tokens=20, seed=3)
        greedy = ask(temperature=0).choices[0].text
        assert ask(temperature=1.5, top_p=0.001).choices[0].text == greedy
        assert ask(temperature=1.5, top_p=1).choices[0].text != greedy
        assert ask(temperature=1.5).choices[0].text == ask(temperature=1.5, top_p=1).choices[0].text

    with_world(engine, check)


def test_a_port_in_use_is_the_operators_to_mend(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as world:
            port = int(world.url.rpartition(":")[2])
            with pytest.raises(OperatorError, match=f"{port}.*another process"):
                await serve_http(HttpApi, "127.0.0.1", port)  # type: ignore[arg-type]

    trio.run(main)


def test_presence_tells_sessions_and_versions_and_never_goes_back(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine, is_home_serving=True) as world:
            first, second = world.home.presence(), world.home.presence()
            assert first.versions[0] == V1
            assert first.sessions_max == 4
            assert second.sequence > first.sequence
            assert not world.home.on_presence(PeerId("home"), first)
            request = GenerateRequest(V1, prompt_of(engine), (), 5, 0, 1000, 0, 0)
            async with aclosing(world.home.serve(request)) as chunks:
                await anext(chunks)
                assert world.home.presence().sessions == 1
            assert world.home.presence().sessions == 0
            unknown = GenerateRequest(Digest(b"?" * 32), prompt_of(engine), (), 5, 0, 1000, 0, 0)
            for request, finish in (
                (unknown, "unknown_version"),
                (GenerateRequest(V1, (), (), 5, 0, 1000, 0, 0), "invalid"),
            ):
                async with aclosing(world.home.serve(request)) as chunks:
                    assert [chunk.finish async for chunk in chunks] == [finish]

    trio.run(main)
