"""The official, unmodified `openai` client on a node: what its users rely on, beyond a plain answer."""

import math
from functools import partial

import httpx
import openai
import pytest
from serving_world import QUESTION, V1, World, make_engine, prompt_of, with_world

from p2pfm.config import HttpConfig
from p2pfm.messages import GenerateRequest
from p2pfm.runtime.api_keys import ApiKeys
from p2pfm.runtime.engine import Engine

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def seeded(world: World, seed: int, num_tokens: int) -> str:
    request = GenerateRequest(V1, prompt_of(world.engine), (), num_tokens, 1000, 1000, seed, 0)
    tokens = [token for chunk in world.engine.generate(request) for token in chunk.tokens]
    return world.engine.tokenizer.decode(tokens, skip_special_tokens=True)


def test_n_gives_as_many_choices_each_with_the_next_seed(engine: Engine) -> None:
    def check(world: World) -> None:
        ask = partial(
            world.client().chat.completions.create,
            model="tiny+base", messages=QUESTION, max_tokens=12, temperature=1, seed=7, n=3,
        )  # fmt: skip
        expected = [seeded(world, 7 + index, 12) for index in range(3)]
        whole = ask()
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        assert [choice.message.content for choice in whole.choices] == expected
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt_of(engine)), 36)
        texts, ends, usage, order = ["", "", ""], {}, None, []
        for chunk in ask(stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage
            for choice in chunk.choices:
                if choice.index not in order:
                    assert choice.delta.role == "assistant"
                order.append(choice.index)
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    ends[choice.index] = choice.finish_reason
        assert texts == expected
        assert ends == {0: "length", 1: "length", 2: "length"}
        assert usage.completion_tokens == 36
        first_end = max(order.index(index) for index in range(3))
        assert first_end < len(order) - 3  # they came side by side, not one after the other

    with_world(engine, check)


def test_more_choices_than_free_sessions_take_turns(engine: Engine) -> None:
    def check(world: World) -> None:
        whole = world.client().completions.create(
            model="tiny+base", prompt="We", max_tokens=4, temperature=0, n=6, extra_body={"logit_bias": {}}
        )
        assert len({choice.text for choice in whole.choices}) == 1
        assert whole.usage.completion_tokens == 24

    with_world(engine, check, sessions_max=1)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_models_and_their_bytes_are_the_text(engine: Engine, stream: bool) -> None:
    def check(world: World) -> None:
        answer = world.client().chat.completions.create(
            model="tiny+base", messages=QUESTION, max_tokens=16, temperature=0, logprobs=True, top_logprobs=3,
            stream=stream,
        )  # fmt: skip
        if stream:
            choices = [chunk.choices[0] for chunk in answer]
            text = "".join(choice.delta.content or "" for choice in choices)
            content = [told for choice in choices for told in choice.logprobs.content]
        else:
            text, content = answer.choices[0].message.content, answer.choices[0].logprobs.content
        assert len(content) == 16
        assert b"".join(bytes(told.bytes) for told in content).decode() == text
        assert "".join(told.token for told in content) == text
        for told in content:
            assert told.logprob <= 0
            assert told.top_logprobs[0].token == told.token  # greedy
            nats = [top.logprob for top in told.top_logprobs]
            assert nats == sorted(nats, reverse=True)
        assert math.isclose(content[0].logprob, first_logprob(world), abs_tol=1e-3)

    with_world(engine, check)


def first_logprob(world: World) -> float:
    """As the engine tells it."""
    prompt = prompt_of(world.engine)
    request = GenerateRequest(V1, prompt, (), 1, 0, 1000, 0, 2)
    told = [told for chunk in world.engine.generate(request) for told in chunk.logprobs]
    return -told[0].micro_nats / 1e6


def test_log_probabilities_of_texts_have_their_older_form_and_end_before_a_stop_string(engine: Engine) -> None:
    def check(world: World) -> None:
        ask = partial(
            world.client().completions.create, model="tiny+base", prompt="My fellow", max_tokens=24, temperature=0
        )
        plain = ask().choices[0]
        assert plain.logprobs is None
        told = ask(logprobs=2).choices[0]
        assert told.text == plain.text == "".join(told.logprobs.tokens)
        assert len(told.logprobs.token_logprobs) == len(told.logprobs.top_logprobs) == 24
        assert all(1 <= len(row) <= 2 for row in told.logprobs.top_logprobs)
        for token, offset in zip(told.logprobs.tokens, told.logprobs.text_offset, strict=True):
            assert told.text[offset:].startswith(token)
        assert all(row == {} for row in ask(logprobs=0).choices[0].logprobs.top_logprobs)
        stop = plain.text[10:14]
        cut = ask(logprobs=0, stop=stop).choices[0]
        assert cut.finish_reason == "stop"
        assert "".join(cut.logprobs.tokens).startswith(cut.text)
        assert len("".join(cut.logprobs.tokens[:-1])) < len(cut.text)

    with_world(engine, check)


def test_models_are_listed_and_retrieved_and_raw_responses_stream(engine: Engine) -> None:
    def check(world: World) -> None:
        client = world.client()
        names = [model.id for model in client.models.list()]
        assert client.models.retrieve(names[1]).id == names[1]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("none")
        raw = client.chat.completions.with_raw_response.create(
            model="tiny+base", messages=QUESTION, max_tokens=3, temperature=0
        )
        assert raw.headers["content-type"] == "application/json"
        assert raw.parse().choices[0].message.content == world.text(prompt_of(engine), 3)
        with client.chat.completions.with_streaming_response.create(
            model="tiny+base", messages=QUESTION, max_tokens=3, temperature=0, stream=True
        ) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert all(line.startswith("data: {") for line in lines[:-1])

    with_world(engine, check)


def test_a_client_that_waits_no_longer_sees_its_own_timeout(engine: Engine) -> None:
    def check(world: World) -> None:
        world.memory.faults = dict.fromkeys(world.memory.gateways, (0, "freeze"))
        with pytest.raises(openai.APITimeoutError):
            world.client().with_options(timeout=0.2).chat.completions.create(
                model="tiny+base", messages=QUESTION, max_tokens=5
            )

    with_world(engine, check)


def test_an_answer_that_takes_too_long_is_an_error_that_is_not_sent_again(engine: Engine) -> None:
    def check(world: World) -> None:
        world.memory.faults = dict.fromkeys(world.memory.gateways, (3, "freeze"))
        client = world.client().with_options(max_retries=2)
        ask = partial(client.chat.completions.create, model="tiny+base", messages=QUESTION, max_tokens=40)
        with pytest.raises(openai.APIStatusError, match="longer than") as late:
            ask()
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        with pytest.raises(openai.APIError, match="longer than"):
            list(ask(stream=True))
        late_ones = world.registry.get_sample_value("p2pfm_http_completions_total", {"outcome": "late"})
        assert late_ones <= 2  # the last may not be counted yet

    with_world(engine, check, bounds=HttpConfig(request_s_max=0.25))


def test_with_keys_only_their_holders_ask_and_the_nodes_own_pages_stay_open(engine: Engine, caplog) -> None:
    caplog.set_level("DEBUG")

    def check(world: World) -> None:
        def client(key: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{world.url}/v1", api_key=key, max_retries=0)

        for key in ("none", ALICE[:-1], ALICE + "x", BOB.upper()):
            with pytest.raises(openai.AuthenticationError, match="operator") as wrong:
                client(key).models.list()
            assert wrong.value.code == "invalid_api_key"
            assert key not in str(wrong.value)
        for header in ({}, {"authorization": f"Basic {ALICE}"}, {"authorization": "Bearer \xff".encode("latin1")}):
            answer = httpx.post(f"{world.url}/v1/completions", headers=header, json={})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("health", "ready", "metrics", "status", "openapi.json"):
            assert httpx.get(f"{world.url}/{path}").status_code == 200
        assert client(ALICE).models.list().data
        ask = partial(client(BOB).chat.completions.create, model="tiny+base", messages=QUESTION)
        stream = ask(max_tokens=900, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="a client may have 1"):
            ask(max_tokens=2)
        client(ALICE).chat.completions.create(
            model="tiny+base", messages=QUESTION, max_tokens=2
        )  # her share is her own
        stream.close()

    with_world(engine, check, keys=ApiKeys({"alice": ALICE, "bob": BOB}), bounds=HttpConfig(client_requests_max=1))
    assert ALICE not in caplog.text
    assert BOB not in caplog.text


def test_over_its_bound_a_request_waits_its_turn_and_is_told_when_that_is_too_long(engine: Engine) -> None:
    def check(world: World) -> None:
        client = world.client()
        ask = partial(client.chat.completions.create, model="tiny+base", messages=QUESTION, temperature=0)
        stream = ask(max_tokens=900, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="no completion ended here") as waited:
            ask(max_tokens=2)
        assert int(waited.value.response.headers["retry-after"]) >= 1
        stream.close()
        assert ask(max_tokens=2).usage.completion_tokens == 2
        with pytest.raises(openai.BadRequestError, match="at most 1 here"):
            ask(max_tokens=2, n=2)

    with_world(engine, check, bounds=HttpConfig(requests_max=1, queue_s_max=0.3))
