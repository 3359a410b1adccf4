"""A gateway asks a second replica when a first token is late: real gateways on one engine."""

from contextlib import aclosing

import httpx
import pytest
import trio
from serving_world import QUESTION, V1, World, make_engine, prompt_of, running, with_world

from p2pfm.messages import GenerateRequest
from p2pfm.runtime.completions import ALIVE
from p2pfm.runtime.engine import Engine
from p2pfm.serving.routing import FIRST_TOKENS_MIN, ReplicaState, choose
from p2pfm.types import Millis, PeerId


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def ask(engine: Engine, num_tokens: int, num_logprobs: int = 0) -> GenerateRequest:
    return GenerateRequest(V1, prompt_of(engine), (), num_tokens, 700, 1000, 3, num_logprobs)


async def complete(world: World, request: GenerateRequest) -> tuple[list, list[PeerId]]:
    """(token, log-probabilities) each, and who made it."""
    made, replicas = [], []
    async with aclosing(world.home.complete(request)) as stream:
        async for new in stream:
            made += zip(new.tokens, new.logprobs or (None,) * len(new.tokens), strict=True)
            replicas += [new.replica] * len(new.tokens)
    return made, replicas


def hedged(world: World) -> float | None:
    return world.registry.get_sample_value("p2pfm_hedged_streams_total")


def live(world: World) -> tuple[ReplicaState, ...]:
    return world.home.table.live(Millis(int(trio.current_time() * 1000)))


def test_a_late_first_token_comes_from_a_second_replica_and_the_first_is_not_blamed(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as world:
            truth, _ = await complete(world, ask(engine, 12, num_logprobs=3))
            for _ in range(FIRST_TOKENS_MIN):
                await complete(world, ask(engine, 2))
            for peer, other in world.memory.gateways.items():  # however long that took
                world.home.on_presence(peer, other.presence())
            first = choose(live(world), V1, world.home.local, "prefer", Millis(0))[0]
            world.memory.faults[first] = (0, "freeze")
            before = hedged(world)
            made, replicas = await complete(world, ask(engine, 12, num_logprobs=3))
            assert made == truth
            assert set(replicas) == {PeerId("one"), PeerId("two")} - {first}
            assert hedged(world) == before + 1
            assert not any(state.num_failures for state in live(world))
            assert not world.memory.gateways[first].num_sessions, "its work was cancelled"

    trio.run(main)


@pytest.mark.parametrize("fault", ["cut", "freeze", "gap"])
def test_log_probabilities_of_a_stream_that_was_replaced_are_the_undisturbed_ones(engine: Engine, fault: str) -> None:
    async def main() -> None:
        async with running(engine) as world:
            truth, (first, *_) = await complete(world, ask(engine, 16, num_logprobs=4))
            world.memory.faults[first] = (5, fault)
            made, replicas = await complete(world, ask(engine, 16, num_logprobs=4))
            assert made == truth
            assert len({*replicas}) == 2

    trio.run(main)


def test_a_stream_that_waits_says_that_its_gateway_lives(engine: Engine) -> None:
    def check(world: World) -> None:
        world.memory.faults = dict.fromkeys(world.memory.gateways, (5, "freeze"))
        body = {"model": "tiny+base", "messages": QUESTION, "max_tokens": 20, "stream": True}
        lines = []
        with httpx.stream("POST", f"{world.url}/v1/chat/completions", json=body, timeout=30) as answer:
            for line in answer.iter_lines():
                world.memory.faults = dict.fromkeys(world.memory.gateways, (0, "freeze"))
                lines += [line] if line else []
        kinds = [line[:15] for line in lines]
        assert kinds[0].startswith('data: {"id"')
        assert kinds[-1].startswith('data: {"error"'), "nobody came"
        assert ALIVE.decode()[:15] in kinds[1:-1]

    with_world(engine, check)
