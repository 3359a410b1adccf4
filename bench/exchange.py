"""Payloads between processes: our exchange beside a raw libp2p stream and a raw TCP socket, on loopback.

MB/s and CPU seconds a MB (asker and provider together), for payloads of 60 KB, 1 MB, 5 MB and 64 MB; from one provider
and from three at once; and what a provider costs that is killed at half way. The exchange serves from a store on disk
in a thread, as a node does, and checks digests; the others send from memory and check nothing. All ways take turns, so
that a busy moment hits each of them; the median of several turns counts. The best one, beside it, tells of moments at
which both processes happened to have a core to themselves.
"""

import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import trio
from harness import Target, finish, parse_options, print_table
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from p2pfm.messages import BlobRequest, decode_request, encode
from p2pfm.runtime.network.blobs import CHUNK_BYTES
from p2pfm.runtime.network.exchange import DEPTH, answer_blob, fetch
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.runtime.store import Store
from p2pfm.types import PeerId, compute_digest

NETWORK = compute_digest(b"network of bench/exchange.py")
RAW = TProtocol("/bench/raw/1")
SLICE = 65_507
"""What fills a Noise message: larger writes are cut there anyway (design page NETWORK)."""
READ = 256 * 1024
MB = 1_000_000
SIZES = (60_000, MB, 5 * MB, 64 * MB)
REPEATS = {60_000: 30, MB: 20, 5 * MB: 15, 64 * MB: 3}
LIBRARY_SHARE_MIN = 0.8
DEATH_BYTES_MAX = DEPTH * CHUNK_BYTES
"""What may come twice when a provider dies: the chunks in flight (of one that came in part, nothing is counted)."""


def make_blob(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def make_transport(number: int, bootstrap: tuple[str, ...] = ()) -> Libp2pTransport:
    return Libp2pTransport(create_new_key_pair(bytes([number]) * 32), "/ip4/127.0.0.1/tcp/0", bootstrap, NETWORK)


# --- the provider's process ------------------------------------------------------------------------------------------


def serve_tcp(server: socket.socket, blobs: dict[int, bytes]) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while head := connection.recv(8):
                connection.sendall(blobs[int.from_bytes(head, "big")])


async def provide(number: str, sizes: str, folder: str) -> None:
    """Serve until standard input closes."""
    by_size = {size: make_blob(size) for size in json.loads(sizes)}
    store = Store(Path(folder))
    for blob in by_size.values():
        store.put(blob)

    async def answer(peer: PeerId, data: bytes) -> bytes:
        request = decode_request(data)
        assert isinstance(request, BlobRequest)
        return encode(await trio.to_thread.run_sync(answer_blob, store, lambda digest: True, request))

    async def answer_raw(stream: Any) -> None:
        while head := await stream.read(8):
            data = memoryview(by_size[int.from_bytes(head, "big")])
            for start in range(0, len(data), SLICE):
                await stream.write(bytes(data[start : start + SLICE]))

    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_tcp, args=(server, by_size), daemon=True).start()
    async with make_transport(int(number)) as transport:
        transport.set_handler(answer)
        transport._host.set_stream_handler(RAW, answer_raw)
        told = {"peer": transport.peer_id, "addresses": transport.addresses(), "tcp": server.getsockname()[1]}
        print(json.dumps(told), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)


class Provider:
    """A provider's process, as the asker knows it."""

    def __init__(self, number: int, sizes: tuple[int, ...]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, __file__, "--provide", str(number), json.dumps(sizes), self._folder.name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        told = json.loads(self.process.stdout.readline())
        self.peer, self.addresses, self.tcp = PeerId(told["peer"]), tuple(told["addresses"]), told["tcp"]

    def cpu_s(self) -> float:
        """What the process has used so far [s]."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def __enter__(self) -> "Provider":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._folder.cleanup()


# --- the asker -------------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """Of one way and one size."""

    mb_per_s: float
    """The median."""
    best_mb_per_s: float
    cpu_s_per_mb: float


async def measure(
    providers: list[Provider], size: int, repeats: int, ways: dict[str, Callable[[int], Awaitable[int]]]
) -> dict[str, Figure]:
    """Rates of several turns of each way, and the CPU of all processes."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    cpu_s = dict.fromkeys(ways, 0.0)
    for number in range(repeats + 1):
        for way, get in ways.items():
            cpu_before = time.process_time() + sum(provider.cpu_s() for provider in providers)
            start = time.perf_counter()
            assert await get(size) == size
            if number:  # the first opens streams
                rates[way].append(size / MB / (time.perf_counter() - start))
                cpu_s[way] += time.process_time() + sum(provider.cpu_s() for provider in providers) - cpu_before
    num_mb = repeats * size / MB
    return {way: Figure(median(rates[way]), max(rates[way]), cpu_s[way] / num_mb) for way in ways}


def read_tcp(connection: socket.socket, size: int) -> int:
    connection.sendall(size.to_bytes(8, "big"))
    num_bytes, buffer = 0, bytearray(READ)
    while num_bytes < size:
        num_bytes += connection.recv_into(buffer)
    return num_bytes


async def compare(sizes: tuple[int, ...], repeats: dict[int, int]) -> dict[int, dict[str, Figure]]:
    """Every way, for every size."""
    figures: dict[int, dict[str, Figure]] = {}
    with ExitStack() as processes:
        providers = [processes.enter_context(Provider(number, sizes)) for number in (2, 3, 4)]
        addresses = tuple(address for provider in providers for address in provider.addresses)
        async with AsyncExitStack() as stack:
            asker = await stack.enter_async_context(make_transport(1, addresses))
            with trio.fail_after(20):
                while len(asker.connected()) < len(providers):
                    await trio.sleep(0.05)
            first = providers[0]
            digests = {size: compute_digest(make_blob(size)) for size in sizes}
            raw = await asker._host.new_stream(ID.from_base58(first.peer), [RAW])
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", first.tcp)))

            async def get_tcp(size: int) -> int:
                return read_tcp(connection, size)

            async def get_raw(size: int) -> int:
                await raw.write(size.to_bytes(8, "big"))
                num_bytes = 0
                while num_bytes < size:
                    num_bytes += len(await raw.read(READ))
                return num_bytes

            def get_from(peers: list[PeerId]) -> Callable[[int], Awaitable[int]]:
                async def get(size: int) -> int:
                    return len(await fetch(asker, digests[size], peers, size))

                return get

            ways: dict[str, Callable[[int], Awaitable[int]]] = {
                "TCP": get_tcp,
                "libp2p stream": get_raw,
                "exchange": get_from([first.peer]),
                "exchange, 3 providers": get_from([provider.peer for provider in providers]),
            }
            for size in sizes:
                figures[size] = await measure(providers, size, repeats[size], ways)
    return figures


async def count_bytes_of_a_death(size: int) -> int:
    """Bytes that came beyond the payload's own when its first provider is killed at half way."""
    with Provider(2, (size,)) as dying, Provider(3, (size,)) as other:
        async with make_transport(1, (*dying.addresses, *other.addresses)) as asker:
            with trio.fail_after(20):
                while len(asker.connected()) < 2:
                    await trio.sleep(0.05)

            async def kill_at_half_way() -> None:
                while asker.counters["request_bytes_in"] < size / 2:
                    await trio.sleep(0.001)
                dying.process.kill()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill_at_half_way)
                data = await fetch(asker, compute_digest(make_blob(size)), [dying.peer, other.peer], size)
            assert data == make_blob(size)
            return asker.counters["request_bytes_in"] - size


def main() -> None:
    options = parse_options(__doc__ or "")
    sizes = SIZES[:2] if options.quick else SIZES
    repeats = dict.fromkeys(SIZES, 1) if options.quick else REPEATS
    figures = trio.run(compare, sizes, repeats)
    rows = [
        [
            f"{size / MB:g} MB",
            way,
            figure.mb_per_s,
            figure.best_mb_per_s,
            1000 * figure.cpu_s_per_mb,
            figure.mb_per_s / raw.mb_per_s,
        ]
        for size, ways in figures.items()
        for raw in [ways["libp2p stream"]]
        for way, figure in ways.items()
    ]
    columns = ["payload", "way", "MB/s", "best", "CPU ms/MB, all processes", "of the raw stream"]
    print_table("Payload exchange between processes on loopback", columns, rows)
    excess = trio.run(count_bytes_of_a_death, sizes[-1] if options.quick else 5 * MB)
    print(f"\na provider killed at half way cost {excess:,} bytes beyond the payload")
    judged = figures[MB if options.quick else 5 * MB]
    share = judged["exchange"].mb_per_s / judged["libp2p stream"].mb_per_s
    targets = [
        Target("share of the raw libp2p stream's rate at 5 MB", share, LIBRARY_SHARE_MIN, "more"),
        Target("bytes that a death costs", excess, DEATH_BYTES_MAX, "less"),
        Target("largest payload that went through [MB]", max(figures) / MB, 64, "more"),
    ]
    plain = {str(size): {way: figure._asdict() for way, figure in ways.items()} for size, ways in figures.items()}
    finish(options, {"by_size": plain, "death_bytes": excess}, targets)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--provide"]:
        trio.run(provide, *sys.argv[2:])
    else:
        main()
