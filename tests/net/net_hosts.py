"""Transports for tests: several in one process, or each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import trio
from libp2p.crypto.ed25519 import create_new_key_pair

from p2pfm.config import TransportLimits
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.types import PeerId, compute_digest

NETWORK = compute_digest(b"network of the tests")
ANY_PORT = "/ip4/127.0.0.1/tcp/0"


def make_transport(number: int, bootstrap: tuple[str, ...] = (), **options: Any) -> Libp2pTransport:
    """A peer whose identity is `number`."""
    seed = bytes([number]) * 32
    options = {"network_id": NETWORK, "listen": ANY_PORT} | options
    return Libp2pTransport(create_new_key_pair(seed), bootstrap=bootstrap, **options)


@asynccontextmanager
async def network(count: int, limits: TransportLimits | None = None) -> AsyncIterator[list[Libp2pTransport]]:
    """Peers in one process that know one bootstrap address, gossiping with one another."""
    async with AsyncExitStack() as stack:
        peers: list[Libp2pTransport] = []
        for number in range(1, count + 1):
            bootstrap = peers[0].addresses() if peers else ()
            peers.append(await stack.enter_async_context(make_transport(number, bootstrap, limits=limits)))
        await until(lambda: all(is_whole(peer, peers) for peer in peers), 20)
        yield peers


def is_whole(peer: Libp2pTransport, peers: list[Libp2pTransport]) -> bool:
    """Whether a peer gossips with all others."""
    return all(peer.is_gossiping_with(other.peer_id) for other in peers if other is not peer)


async def until(condition: Callable[[], object], seconds: float) -> float:
    """Wait for a condition; returns the seconds that it took. Raises: trio.TooSlowError."""
    start = trio.current_time()
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.02)
    return trio.current_time() - start


class PeerProcess:
    """A peer in a process of its own (see net_peer_process.py), spoken to in lines of JSON."""

    def __init__(
        self,
        number: int,
        bootstrap: tuple[str, ...],
        listen: str = ANY_PORT,
        launcher: Sequence[str] = (),
        limits: Mapping[str, float] | None = None,
    ) -> None:
        """`launcher`: what stands before the command, e.g. of a namespace (see namespaces.py)."""
        self._launcher = launcher
        self._arguments = [str(number), listen, json.dumps(limits or {}), *bootstrap]
        self._process: trio.Process | None = None
        self._buffer = b""
        self.peer_id = PeerId("")
        self.addresses: tuple[str, ...] = ()
        self.state: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        script = Path(__file__).with_name("net_peer_process.py")
        self._process = await trio.lowlevel.open_process(
            [*self._launcher, sys.executable, str(script), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )
        with trio.fail_after(20):
            await self.listen_until(lambda: self.addresses)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        with trio.CancelScope(shield=True):
            self._process.kill()
            await self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                await pipe.aclose()

    def get_memory(self) -> int:
        """Resident bytes of the process."""
        assert self._process is not None
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        assert self._process is not None
        self._process.send_signal(number)

    async def tell(self, **command: Any) -> None:
        """Give a command."""
        assert self._process is not None
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps(command).encode() + b"\n")

    async def listen_until(self, condition: Callable[[], object]) -> None:
        """Read what the process says until a condition on `state` (or addresses) holds."""
        assert self._process is not None
        assert self._process.stdout is not None
        while not condition():
            data = await self._process.stdout.receive_some()
            assert data, "the peer's process ended"
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                self.state |= json.loads(line)
            self.peer_id = PeerId(self.state.get("peer", ""))
            self.addresses = tuple(self.state.get("addresses", ()))
