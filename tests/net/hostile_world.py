"""A victim, an honest peer and rogues: one whole node in a process of its own, which many attacks share.

Runs trio in a thread beside the tests, so that the victim and the honest peer's connection outlive each test.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import trio
from net_hosts import ANY_PORT, until
from net_victim_process import HONEST, PHASES_MS, PROBE, ROUND_MS, make_keys, make_network
from rogue import Rogue

from p2pfm.errors import PeerUnreachable
from p2pfm.messages import BlobReply, BlobRequest, Presence, decode_envelope, decode_message, decode_reply, encode
from p2pfm.runtime.envelopes import seal
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.types import Millis, PeerId, compute_digest

MEMBERS = 24
"""Rogues in the registry: each is used once."""
ALIVE_S = 10.0
"""An honest question is answered, and an honest message heard, within this, on a machine that has other work too."""
KEPT_BYTES_MAX = 64 << 20
"""What an attack may leave behind in the victim's memory."""
PEAK_BYTES_MAX = 192 << 20
"""What an attack may take while it lasts: a few of the node's own bounds together."""
LOG_BYTES_MAX = 64 << 10
"""What one attack may write into the victim's log."""


class World:
    """What an attack sees: the victim's own word about itself, an honest peer, and the round's clock."""

    def __init__(self, process: trio.Process, log: Path, genesis_ms: int) -> None:
        self._process = process
        self._log = log
        self._genesis_ms = genesis_ms
        self._network = make_network(genesis_ms)
        self.network_id = self._network.network_id()
        self.state: dict[str, Any] = {}
        self.honest: Libp2pTransport
        self.worst_s = 0.0
        """The longest that an honest question waited during the last attack."""
        self.peak_bytes = 0
        self._memory = psutil.Process(process.pid).memory_info
        self._sequence = int(time.time() * 1000)
        self._num_strangers = 0

    @property
    def victim(self) -> PeerId:
        """Its peer id."""
        return PeerId(self.state["peer"])

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.state["addresses"][0].split("/")[4])

    def make_rogue(self, number: int) -> Rogue:
        """An identity: `net_victim_process.FIRST_ROGUE` and `MEMBERS` on are members, all others strangers."""
        return Rogue(number, self.port, self.victim, self.network_id)

    def make_stranger(self) -> Rogue:
        """An identity that no test has used before."""
        self._num_strangers += 1
        number = 2 + self._num_strangers if self._num_strangers < 90 else 60 + self._num_strangers
        return self.make_rogue(number)

    async def wait_for_state(self, condition: Callable[[dict[str, Any]], object], seconds: float = 5.0) -> None:
        """Until the victim's own word fulfils a condition. Raises: trio.TooSlowError."""
        await until(lambda: condition(self.state), seconds)

    async def wait_for_blame(self, rogue: Rogue, times: int = 1) -> None:
        """Until the victim has blamed it."""
        await self.wait_for_state(lambda state: state["blamed"].get(rogue.peer, 0) >= times)

    async def wait_for_train(self, margin_ms: int = 700) -> int:
        """Until TRAIN runs and for so long; returns the round."""
        while True:
            round, passed = divmod(time.time_ns() // 1_000_000 - self._genesis_ms, ROUND_MS)
            if passed < PHASES_MS[0] - margin_ms:
                return round
            await trio.sleep((ROUND_MS - passed + 50) / 1000)

    async def check_alive(self) -> None:
        """The victim answers an honest peer, hears it, is heard, and blames it for nothing."""
        begun = Millis(time.time_ns() // 1_000_000)
        with trio.fail_after(ALIVE_S):
            reply = await self._ask(65_536)
            assert reply == BlobReply(len(PROBE), PROBE[:65_536])
            self._sequence += 1
            record = Presence(self.honest.peer_id, (), 0, 4, 15_000, self._sequence)
            while self.state["heard"].get(self.honest.peer_id, 0) < self._sequence:
                await self.honest.publish(encode(seal(make_keys(HONEST), self.network_id, record)))
                with trio.move_on_after(1):  # said again, as nodes say it: what counts is how long it takes in all
                    await self.wait_for_state(
                        lambda state: state["heard"].get(self.honest.peer_id, 0) >= self._sequence, ALIVE_S
                    )
            while True:
                _, data = await self.honest.gossip.receive()
                envelope = decode_envelope(data)
                if envelope.author == self.victim:
                    told = decode_message(envelope.body)
                    if isinstance(told, Presence) and told.sequence >= begun:
                        break
        assert self.honest.peer_id not in self.state["blamed"]
        assert not self.state["core_failures"]

    async def run_attack(self, attack: "Callable[[Rogue, World], Awaitable[None]]", rogue: Rogue) -> None:
        """Attack, and see that the victim is what it was before."""
        before, logged = self._memory().rss, self._log.stat().st_size
        self.worst_s, self.peak_bytes = 0.0, 0
        with trio.fail_after(25):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, before)
                nursery.start_soon(self._ask_honestly)
                await attack(rogue, self)
                nursery.cancel_scope.cancel()
        await self.check_alive()
        with trio.move_on_after(6):
            while self._memory().rss > before + KEPT_BYTES_MAX:
                await trio.sleep(0.1)
        kept = self._memory().rss - before
        written = self._log.stat().st_size - logged
        print(
            f"honest question {self.worst_s:.2f} s at worst; memory +{self.peak_bytes >> 20} MB at most, "
            f"+{kept >> 20} MB kept; log +{written} bytes; blamed {self.state['blamed'].get(rogue.peer, 0)} times"
        )
        assert kept <= KEPT_BYTES_MAX
        assert self.peak_bytes <= PEAK_BYTES_MAX
        assert written <= LOG_BYTES_MAX
        assert self.worst_s < ALIVE_S

    async def _watch(self, before: int) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self._memory().rss - before)
            await trio.sleep(0.02)

    async def _ask_honestly(self) -> None:
        while True:
            begun = trio.current_time()
            with trio.move_on_after(ALIVE_S):
                await self._ask(1000)
            self.worst_s = max(self.worst_s, trio.current_time() - begun)
            await trio.sleep(0.1)

    async def _ask(self, length: int) -> object:
        """An honest question, asked again until there is an answer, as nodes do: a busy machine ends connections."""
        request = encode(BlobRequest(compute_digest(PROBE), 0, length))
        while True:
            with suppress(PeerUnreachable):
                return decode_reply(await self.honest.request(self.victim, request, ALIVE_S))
            await trio.sleep(0.1)

    async def listen(self) -> None:
        """Read what the victim says."""
        assert self._process.stdout is not None
        buffer = b""
        while data := await self._process.stdout.receive_some():
            *lines, buffer = (buffer + data).split(b"\n")
            if lines:
                self.state = json.loads(lines[-1])
        raise AssertionError(f"the victim ended: {self._log.read_text()[-2000:]}")


@asynccontextmanager
async def hostile_world(home: Path) -> AsyncIterator[World]:
    """A running victim, and an honest peer that gossips with it."""
    genesis_ms = (int(time.time()) + 4) * 1000
    log = home / "victim.log"
    script = Path(__file__).with_name("net_victim_process.py")
    with log.open("wb") as stderr:
        process = await trio.lowlevel.open_process(
            [sys.executable, str(script), str(home), str(genesis_ms), str(MEMBERS)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    try:
        world = World(process, log, genesis_ms)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.listen)
            await world.wait_for_state(lambda state: state.get("running"), 60)
            honest = Libp2pTransport(
                make_keys(HONEST).keypair, ANY_PORT, world.state["addresses"], network_id=world.network_id
            )
            async with honest:
                world.honest = honest
                await until(lambda: honest.is_gossiping_with(world.victim), 20)
                await world.wait_for_state(lambda state: honest.peer_id in state["gossiping"], 20)
                yield world
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


Run = Callable[[Callable[[World], Awaitable[None]]], None]


@contextmanager
def world_in_a_thread(home: Path) -> Iterator[Run]:
    """Gives a function that runs an async one in the world's own loop, and waits for it."""
    is_ready, is_over = threading.Event(), trio.Event()
    found: list[tuple[World, trio.lowlevel.TrioToken]] = []
    errors: list[BaseException] = []

    async def main() -> None:
        async with hostile_world(home) as world:
            found.append((world, trio.lowlevel.current_trio_token()))
            is_ready.set()
            await is_over.wait()

    def body() -> None:
        try:
            trio.run(main)
        except BaseException as error:  # noqa: BLE001 - told to the thread that waits
            errors.append(error)
        finally:
            is_ready.set()

    thread = threading.Thread(target=body)
    thread.start()
    is_ready.wait()
    if not found:
        raise errors[0]
    world, token = found[0]

    def run(function: Callable[[World], Awaitable[None]]) -> None:
        if errors:
            raise errors[0]
        trio.from_thread.run(function, world, trio_token=token)

    try:
        yield run
    finally:
        with suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(is_over.set, trio_token=token)
        thread.join()
    if errors:
        raise errors[0]
