"""`p2pfm chat` against the real app: what a person sees when all goes well, and when a replica fails."""

import io
import re

import pytest
from rich.console import Console
from serving_world import QUESTION, V1, World, make_engine, prompt_of, with_world

from nodes.chat import ChatOptions, run_chat
from p2pfm.errors import OperatorError, WorldError
from p2pfm.runtime.engine import Engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def ask(world: World, prompt: str = QUESTION[0]["content"], **options) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=False)
    run_chat(ChatOptions(url=world.url, tokens_max=24, temperature=0, **options), console, prompt)
    return screen.getvalue()


def test_one_prompt_prints_the_answer_and_who_gave_it(engine: Engine) -> None:
    def check(world: World) -> None:
        shown = ask(world)
        assert shown.startswith(world.text(prompt_of(engine), 24))
        assert V1.hex()[:10] in shown
        assert "failed" not in shown

    with_world(engine, check)


def test_a_replaced_replica_is_shown_and_the_text_goes_on(engine: Engine) -> None:
    def check(world: World) -> None:
        world.memory.faults = dict.fromkeys(world.memory.gateways, (7, "cut"))
        shown = ask(world)
        assert "goes on from here]" in shown
        cleaned = re.sub(r"\[replica .*?goes on from here\]", "", shown)
        assert cleaned.startswith(world.text(prompt_of(engine), 24))
        assert "3 replaced" in shown

    with_world(engine, check)


def test_errors_name_the_next_step(engine: Engine) -> None:
    def check(world: World) -> None:
        with pytest.raises(OperatorError, match=r"tiny\+base"):
            ask(world, model="other")
        world.memory.gateways.clear()
        with pytest.raises(WorldError, match="no replica"):
            ask(world)

    with_world(engine, check)
    with pytest.raises(OperatorError, match="p2pfm node run"):
        run_chat(ChatOptions(url="http://127.0.0.1:9"), Console(file=io.StringIO()), "hello")
