"""`p2pfm chat` against the real app: what a person sees when all goes well, and when a replica or a gateway fails."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from doors_world import Doors, open_doors
from rich.console import Console
from serving_world import QUESTION, V1, V2, World, make_engine, prompt_of, with_world

from nodes.chat import ChatOptions, read_api_key, run_chat
from nodes.printable import make_printable
from p2pfm.errors import OperatorError, WorldError
from p2pfm.runtime.api_keys import ApiKeys
from p2pfm.runtime.engine import Engine
from p2pfm.types import PeerId

WAIT_S = 30.0
ASKED = QUESTION[0]["content"]
SECRET = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def ask(*urls: str, prompt: str = ASKED, is_json: bool = False, temperature: float = 0, **options) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=False)
    asked = ChatOptions(urls=urls, tokens_max=24, temperature=temperature, **options)
    run_chat(asked, console, prompt, is_json=is_json)
    return screen.getvalue()


def test_one_prompt_prints_the_answer_and_who_gave_it(engine: Engine) -> None:
    def check(world: World) -> None:
        shown = ask(world.url)
        assert shown.startswith(world.text(prompt_of(engine), 24))
        assert V1.hex()[:10] in shown
        assert "failed" not in shown

    with_world(engine, check)


def test_a_replaced_replica_is_shown_and_the_text_goes_on(engine: Engine) -> None:
    def check(world: World) -> None:
        world.memory.faults = dict.fromkeys(world.memory.gateways, (7, "cut"))
        shown = ask(world.url)
        assert "goes on from here]" in shown
        cleaned = re.sub(r"\[replica .*?goes on from here\]", "", shown)
        assert cleaned.startswith(world.text(prompt_of(engine), 24))
        assert "3 replaced" in shown

    with_world(engine, check)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_gateway_that_dies_is_left_and_the_text_goes_on_through_another(engine: Engine, temperature: int) -> None:
    with open_doors(engine, 2) as doors:
        whole = json.loads(ask(doors.urls[1], is_json=True, temperature=temperature, seed=3))
        doors.links.pause_s = 0.02  # one event a token: some are on the screen when the gateway dies
        doors.links.on_token = lambda num: doors.close(0) if num == 9 else None
        shown = ask(*doors.urls, temperature=temperature, seed=3)
    note = re.search(r"\[gateway (\S+) failed: .*?; asking (\S+)\]", shown)
    assert note is not None
    assert list(note.groups()) == doors.urls
    assert note.start() > 0
    assert shown.replace(note.group(), "").startswith(make_printable(whole["text"]) + "\n(replica")
    assert f"through {doors.urls[1]}" in shown


def test_an_answer_that_nobody_can_finish_says_so(engine: Engine) -> None:
    with open_doors(engine) as doors:
        doors.links.pause_s = 0.02
        doors.links.on_token = lambda num: doors.close(0) if num == 5 else None
        with pytest.raises(OperatorError, match=r"no node answers at .*p2pfm node run"):
            ask(*doors.urls)


def test_a_gateway_that_does_not_know_the_model_or_has_no_replica_is_passed_over(engine: Engine) -> None:
    with open_doors(engine, 2) as doors:
        doors.gateways[0].table._states.clear()
        name = f"tiny+base@{V2.hex()[:16]}"
        told = json.loads(ask(*doors.urls, is_json=True, model=name))
        assert (told["gateway"], told["version"], told["num_gateways_failed"]) == (doors.urls[1], V2.hex(), 1)


def test_json_is_one_object_with_all_that_is_known(engine: Engine) -> None:
    with open_doors(engine) as doors:
        doors.links.faults = {PeerId("one"): (5, "cut"), PeerId("two"): (30, "")}
        told = json.loads(ask(*doors.urls, is_json=True))
        assert told["text"] == World(engine, None, 0, None, None).text(prompt_of(engine), 24)  # type: ignore[arg-type]
        assert (told["version"], told["finish"], told["model"]) == (V1.hex(), "length", "tiny+base")
        assert told["replica"] in ("one", "two")
    with pytest.raises(OperatorError, match="-m 'What"):
        run_chat(ChatOptions(), Console(file=io.StringIO()), is_json=True)


def test_errors_name_the_next_step(engine: Engine, tmp_path: Path) -> None:
    def check(world: World) -> None:
        with pytest.raises(OperatorError, match=r"tiny\+base"):
            ask(world.url, model="other")
        with pytest.raises(OperatorError, match="maximum context length is 1024"):
            ask(world.url, prompt="state " * 1200)
        world.memory.gateways.clear()
        with pytest.raises(WorldError, match="no replica"):
            ask(world.url)

    with_world(engine, check)
    with pytest.raises(OperatorError, match="p2pfm node run"):
        run_chat(ChatOptions(urls=["http://127.0.0.1:9"]), Console(file=io.StringIO()), "hello")
    with pytest.raises(OperatorError, match="--api-key-file"):
        read_api_key(tmp_path / "none")


def test_a_key_opens_a_door_that_asks_for_one(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# ours\n\nlaptop {SECRET}\n")
    with open_doors(engine, keys=ApiKeys({"laptop": SECRET})) as doors:
        with pytest.raises(OperatorError, match="--api-key-file") as told:
            ask(*doors.urls, api_key="wrong")
        assert "wrong" not in str(told.value)
        assert V1.hex()[:10] in ask(*doors.urls, api_key=read_api_key(tmp_path / "keys"))
    assert SECRET not in repr(ChatOptions(api_key=SECRET))


def test_what_a_replica_writes_cannot_steer_the_terminal() -> None:
    assert make_printable("a\x1b[2J\x07\r\x9b1m\u202eb\n\tc") == "a\ufffd[2J\ufffd\ufffd\ufffd1m\ufffdb\n\tc"
    assert make_printable("grüße 你好 👩‍💻") == "grüße 你好 👩‍💻"


class Terminal:
    """`p2pfm chat` as a person has it."""

    def __init__(self, *arguments: str) -> None:
        self._fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nodes.cli", "chat", *arguments],
            stdin=child, stdout=child, stderr=child, start_new_session=True, env={**os.environ, "TERM": "xterm"},
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, pattern: str) -> str:
        """What has come up to the end of the pattern; the next call looks behind it."""
        deadline = time.monotonic() + WAIT_S
        while (found := re.search(pattern, self.seen)) is None:
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen!r}"
            if select.select([self._fd], [], [], left)[0]:
                self.seen += os.read(self._fd, 4096).decode(errors="replace")
        told, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return told


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this process as a signal


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    running = Terminal(*arguments)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGKILL)
        running.process.wait(WAIT_S)
        os.close(running._fd)


def wait_until_closed(url: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/health", timeout=1)
        except httpx.HTTPError:
            return
        time.sleep(0.05)
    raise AssertionError(f"{url} still answers")


def test_a_conversation_in_a_terminal(engine: Engine) -> None:
    bodies: list[tuple[int, ...]] = []

    def remember(doors: Doors) -> None:
        real = doors.links.generate

        def generate(peer, request):
            bodies.append(request.prompt)
            return real(peer, request)

        doors.links.generate = generate  # type: ignore[method-assign]

    with open_doors(engine, 2) as doors:
        remember(doors)
        with terminal("--url", doors.urls[0], "--url", doors.urls[1], "--temperature", "0", "--max-tokens", "16") as it:
            it.until("tiny\\+base at .*/help")
            it.until("you>")
            it.type(f"{ASKED}\n")
            it.until(f"\\(replica …(one|two), version {V1.hex()[:10]}, cut at --max-tokens\\)")
            it.until("you>")
            it.type("And then?\n")
            it.until("\\(replica")
            assert len(bodies[1]) > len(bodies[0]) + 16, "the second question goes with the first and its answer"
            it.until("you>")
            it.type("/nonsense\n")
            it.until("/help lists them")
            it.type("/model\n")
            it.until("\\* tiny\\+base\r")
            it.type(f"/model tiny+base@{V2.hex()[:16]}\n")
            it.until("\\* tiny\\+base@2222")
            it.type("/new\n")
            it.until("a new conversation")
            doors.links.pause_s = 0.3
            it.type("Go on.\n")
            it.until("Go on\\.\r\n")
            time.sleep(0.8)
            it.type("\x03")
            it.until("stopped")
            it.until("you>")
            doors.links.pause_s = 0.0
            doors.close(0)
            wait_until_closed(doors.urls[0])
            it.type(f"{ASKED}\n")
            it.until(f"gateway {doors.urls[0]} failed: .*; asking {doors.urls[1]}")
            it.until("version 2222")
            it.until("you>")
            time.sleep(0.5)  # Python misses a signal that comes just before it begins to wait for a key
            it.type("\x03")
            it.until("Ctrl-C again")
            it.until("you>")
            it.type("\x04")
            assert it.process.wait(WAIT_S) == 0
