"""Gossip beside stock GossipSub: delivered share, latency and CPU a delivery, on loopback, in one run.

32 hosts in one process and eight processes of one host, each connected to each other; messages of 1 KB by random
authors at a steady rate. _Ours is the node's transport from one bootstrap address; stock is py-libp2p's `new_host`,
GossipSub 1.2 and Pubsub with their defaults (degree 6, 4 to 12: it has none), dialled pair by pair. Latency is of what
was delivered; CPU is of the process from the first publish to the last delivery, so keeping connections alive counts.
"""

import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import trio
from harness import Target, finish, parse_options, print_table
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V12, GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.types import compute_digest

NETWORK = compute_digest(b"network of bench/gossip.py")
TOPIC = "bench"
LISTEN = "/ip4/127.0.0.1/tcp/0"
MESSAGE_BYTES = 1000
SETTLE_S = 20.0
"""Waited for what is still missing after the last publish."""
CPU_RATIO_MAX = 0.5
SEED = 1
GC_THRESHOLDS = 100_000, 50, 1000


class _Ours:
    """The node's transport."""

    def __init__(self, transport: Libp2pTransport) -> None:
        self.transport = transport
        self.addresses = transport.addresses()

    @classmethod
    async def start(cls, stack: AsyncExitStack, number: int, bootstrap: list[str]) -> "_Ours":
        key_pair = create_new_key_pair(bytes([number]) * 32)
        return cls(await stack.enter_async_context(Libp2pTransport(key_pair, LISTEN, bootstrap[:1], NETWORK)))

    async def connect(self, others: list[str]) -> None:
        """It finds the others by itself."""

    def num_peers(self) -> int:
        return sum(self.transport.is_gossiping_with(peer) for peer in self.transport.connected())

    async def publish(self, data: bytes) -> None:
        await self.transport.publish(data)

    async def messages(self) -> AsyncIterator[bytes]:
        async for _, data in self.transport.gossip:
            yield data


class _Stock:
    """py-libp2p as it comes."""

    def __init__(self, host: Any, pubsub: Any, subscription: Any) -> None:
        self._host, self._pubsub, self._subscription = host, pubsub, subscription
        self.addresses = tuple(str(address) for address in host.get_addrs())

    @classmethod
    async def start(cls, stack: AsyncExitStack, number: int, bootstrap: list[str]) -> "_Stock":
        host = new_host(create_new_key_pair(bytes([number]) * 32))
        await stack.enter_async_context(host.run([Multiaddr(LISTEN)]))
        pubsub = Pubsub(host, GossipSub([PROTOCOL_ID_V12], 6, 4, 12))
        await stack.enter_async_context(background_trio_service(pubsub))
        await stack.enter_async_context(background_trio_service(pubsub.router))
        await pubsub.wait_until_ready()
        return cls(host, pubsub, await pubsub.subscribe(TOPIC))

    async def connect(self, others: list[str]) -> None:
        for address in others:
            with trio.move_on_after(20):
                await self._host.connect(info_from_p2p_addr(Multiaddr(address)))

    def num_peers(self) -> int:
        return len(self._pubsub.peers.keys() & self._pubsub.peer_topics.get(TOPIC, set()))

    async def publish(self, data: bytes) -> None:
        await self._pubsub.publish(TOPIC, data)

    async def messages(self) -> AsyncIterator[bytes]:
        own = self._host.get_id().to_bytes()
        while True:
            message = await self._subscription.get()
            if message.from_id != own:
                yield message.data


KINDS: dict[str, Any] = {"ours": _Ours, "stock": _Stock}


class Figure(NamedTuple):
    """Of one kind and one arrangement."""

    delivered: float
    p50_ms: float
    p95_ms: float
    cpu_ms: float


def make_message(number: int) -> bytes:
    """A number, the time [ns of the machine's monotonic clock], filling."""
    return number.to_bytes(8, "big") + time.monotonic_ns().to_bytes(8, "big") + bytes(MESSAGE_BYTES - 16)


async def listen(host: Any, latencies_ms: dict[int, float]) -> None:
    """Latency of every message by its number; one that comes twice counts once."""
    async for data in host.messages():
        number, sent = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:16], "big")
        latencies_ms.setdefault(number, (time.monotonic_ns() - sent) / 1e6)


def judge(latencies_ms: list[float], expected: int, cpu_s: float) -> Figure:
    ranked = sorted(latencies_ms) or [float("nan")]
    return Figure(
        len(latencies_ms) / expected,
        ranked[len(ranked) // 2],
        ranked[int(len(ranked) * 0.95)],
        1000 * cpu_s / max(1, len(latencies_ms)),
    )


async def wait_for_peers(hosts: list[Any], count: int, seconds: float) -> None:
    """Until all know each other, or the time is over: then it is measured as it is."""
    with trio.move_on_after(seconds):
        while any(host.num_peers() < count for host in hosts):
            await trio.sleep(0.2)


async def measure_one_process(kind: str, num_hosts: int, num_messages: int, rate: float) -> Figure:
    """All hosts in this process."""
    # The collector looks through 32 hosts at once and stops all of them for a second, of either kind.
    gc.set_threshold(*GC_THRESHOLDS)
    async with AsyncExitStack() as stack:
        hosts: list[Any] = []
        for number in range(1, num_hosts + 1):
            hosts.append(await KINDS[kind].start(stack, number, list(hosts[0].addresses) if hosts else []))
        limiter = trio.CapacityLimiter(8)  # more dials at once time out

        async def connect(index: int) -> None:
            async with limiter:
                await hosts[index].connect([other.addresses[0] for other in hosts[:index]])

        async with trio.open_nursery() as nursery:
            for index in range(num_hosts):
                nursery.start_soon(connect, index)
        await wait_for_peers(hosts, num_hosts - 1, 90)
        heard: list[dict[int, float]] = [{} for _ in hosts]
        async with trio.open_nursery() as nursery:
            for host, latencies_ms in zip(hosts, heard, strict=True):
                nursery.start_soon(listen, host, latencies_ms)
            draw = random.Random(SEED)
            cpu_s, start = time.process_time(), trio.current_time()
            for number in range(num_messages):
                await trio.sleep_until(start + number / rate)
                await draw.choice(hosts).publish(make_message(number))
            expected = num_messages * (num_hosts - 1)
            with trio.move_on_after(SETTLE_S):
                while sum(map(len, heard)) < expected:
                    await trio.sleep(0.1)
            cpu_s = time.process_time() - cpu_s
            nursery.cancel_scope.cancel()
        return judge([ms for latencies_ms in heard for ms in latencies_ms.values()], expected, cpu_s)


# --- a process a host ------------------------------------------------------------------------------------------------


def say(**state: Any) -> None:
    print(json.dumps(state), flush=True)


async def serve(kind: str, number: str, *bootstrap: str) -> None:
    """One host, told in lines of JSON on standard input: connect, publish, report; ends when it closes."""
    async with AsyncExitStack() as stack:
        host = await KINDS[kind].start(stack, int(number), list(bootstrap))
        latencies_ms: dict[int, float] = {}
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(listen, host, latencies_ms)
        say(addresses=host.addresses)
        buffer, stdin = b"", trio.lowlevel.FdStream(os.dup(0))
        while data := await stdin.receive_some():
            *lines, buffer = (buffer + data).split(b"\n")
            for command in map(json.loads, lines):
                if "connect" in command:
                    await host.connect(command["connect"])
                    say(done=True)
                elif "publish" in command:
                    await host.publish(make_message(command["publish"]))
                else:
                    say(peers=host.num_peers(), cpu_s=time.process_time(), heard=list(latencies_ms.values()))
        os._exit(0)  # the library takes seconds to end, which nobody measures


class _Process:
    """A host's process."""

    def __init__(self, kind: str, number: int, bootstrap: list[str]) -> None:
        command = [sys.executable, __file__, "--serve", kind, str(number), *bootstrap]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addresses: list[str] = self._listen()["addresses"]

    def _listen(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        told: dict[str, Any] = json.loads(self._process.stdout.readline())
        return told

    def tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def ask(self, **command: Any) -> dict[str, Any]:
        self.tell(**command)
        return self._listen()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def measure_processes(kind: str, num_hosts: int, num_messages: int, rate: float) -> Figure:
    """A process for each host."""
    processes: list[_Process] = []
    try:
        for number in range(1, num_hosts + 1):
            processes.append(_Process(kind, number, processes[0].addresses[:1] if processes else []))
        for index, process in enumerate(processes):
            process.ask(connect=[other.addresses[0] for other in processes[:index]])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and any(p.ask()["peers"] < num_hosts - 1 for p in processes):
            time.sleep(0.2)
        draw = random.Random(SEED)
        cpu_s = sum(process.ask()["cpu_s"] for process in processes)
        start = time.monotonic()
        for number in range(num_messages):
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            draw.choice(processes).tell(publish=number)
        expected = num_messages * (num_hosts - 1)
        deadline = time.monotonic() + SETTLE_S
        while True:
            states = [process.ask() for process in processes]
            if sum(len(state["heard"]) for state in states) >= expected or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        cpu_s = sum(state["cpu_s"] for state in states) - cpu_s
        return judge([ms for state in states for ms in state["heard"]], expected, cpu_s)
    finally:
        for process in processes:
            process.kill()


def main() -> None:
    options = parse_options(__doc__ or "")
    num_hosts, num_processes = (6, 3) if options.quick else (32, 8)
    compared, rate, thousand = (6, 5.0, 10) if options.quick else (100, 1.0, 1000)
    figures: dict[str, Figure] = {}
    rows: list[list[object]] = []

    def note(name: str, messages: int, per_s: float, figure: Figure) -> Figure:
        figures[name] = figure
        rows.append([name, messages, per_s, *figure])
        print(rows[-1], file=sys.stderr, flush=True)
        return figure

    one, eight = f"1 process x {num_hosts}", f"{num_processes} processes x 1"
    for kind in KINDS:
        note(f"{one}, {kind}", compared, rate, trio.run(measure_one_process, kind, num_hosts, compared, rate))
    for kind in KINDS:
        note(f"{eight}, {kind}", 2 * compared, 2 * rate, measure_processes(kind, num_processes, 2 * compared, 2 * rate))
    many = [
        note(f"{eight}, ours, {thousand}", thousand, 10.0, measure_processes("ours", num_processes, thousand, 10.0)),
        note(
            f"{one}, ours, {thousand}", thousand, 3.0, trio.run(measure_one_process, "ours", num_hosts, thousand, 3.0)
        ),
    ]
    columns = ["hosts", "messages", "a second", "delivered", "p50 ms", "p95 ms", "CPU ms a delivery"]
    load = f"seed {SEED}, load {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    print_table(f"Gossip of {MESSAGE_BYTES} bytes on loopback ({load})", columns, rows)
    delivered = min(figure.delivered for figure in (*many, figures[f"{one}, ours"], figures[f"{eight}, ours"]))
    targets = [Target("delivered share of every run of ours, the least", delivered, 1.0, "more")]
    for hosts in (one, eight):
        stock, ours = figures[f"{hosts}, stock"], figures[f"{hosts}, ours"]
        targets.append(Target(f"CPU a delivery, {hosts}, of stock", ours.cpu_ms / stock.cpu_ms, CPU_RATIO_MAX, "less"))
        targets.append(Target(f"p95 latency, {hosts}, of stock", ours.p95_ms / stock.p95_ms, 1.0, "less"))
    finish(options, {name: figure._asdict() for name, figure in figures.items()}, targets)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        trio.run(serve, *sys.argv[2:])
    else:
        main()
