"""One real peer: gossips, serves blobs and endless streams, and tells its state in lines of JSON.

Arguments: number, listen, limits (JSON), bootstrap.
"""

import itertools
import json
import random
import sys
from typing import Any

import trio
from net_hosts import make_transport

from p2pfm.config import TransportLimits
from p2pfm.errors import PeerUnreachable
from p2pfm.messages import BlobRequest, decode_request, encode
from p2pfm.runtime.network.exchange import Downloads, answer_blob
from p2pfm.runtime.network.server import Send
from p2pfm.types import Digest, PeerId, compute_digest


def make_blob(size: int) -> bytes:
    """The same bytes in every process."""
    return random.Random(size).randbytes(size)


class Blobs:
    """Blobs in memory."""

    def __init__(self, *sizes: int) -> None:
        self._blobs = {compute_digest(make_blob(size)): make_blob(size) for size in sizes}

    def get_part(self, digest: Digest, start: int, length: int) -> tuple[int, bytes]:
        """As Store.get_part."""
        data = self._blobs.get(digest, b"")
        return len(data), data[start : start + length]


def say(**state: Any) -> None:
    print(json.dumps(state), flush=True)


async def main(number: str, listen: str, limits: str, *bootstrap: str) -> None:
    blobs = Blobs(1_000_000, 5_000_000)
    heard: set[bytes] = set()
    positions = itertools.count()

    async def answer(peer: PeerId, data: bytes) -> bytes:
        request = decode_request(data)
        assert isinstance(request, BlobRequest)
        return encode(answer_blob(blobs, lambda digest: True, request))

    async with (
        make_transport(
            int(number), tuple(bootstrap), listen=listen, limits=TransportLimits(**json.loads(limits))
        ) as transport,
        trio.open_nursery() as nursery,
    ):
        num_streams = 0

        async def stream(peer: PeerId, data: bytes, send: Send) -> None:
            nonlocal num_streams
            num_streams += 1
            try:
                while True:
                    await send(bytes(int(data)))
                    await trio.sleep(0.02)
            finally:
                num_streams -= 1

        transport.set_handler(answer)
        transport.set_stream_handler(stream)

        async def tell_peers() -> None:
            said: dict[str, Any] = {}
            while True:
                peers = transport.connected()
                gossiping = [peer for peer in peers if transport.is_gossiping_with(peer)]
                now = {"peers": peers, "gossiping": gossiping, "heard": len(heard), "streams": num_streams}
                if now != said:  # a test reads one peer at a time: a pipe that is full stops this process
                    say(**now)
                said = now
                await trio.sleep(0.1)

        async def hear() -> None:
            async for _, data in transport.gossip:
                heard.add(data)

        async def take(size: int, providers: list[PeerId]) -> None:
            start = trio.current_time()
            downloads = Downloads(transport)
            while True:
                try:
                    data = await downloads.fetch(compute_digest(make_blob(size)), providers, size)
                except PeerUnreachable as error:
                    print(f"{trio.current_time() - start:.1f} s: {error}", file=sys.stderr, flush=True)
                    await trio.sleep(0.5)  # as a node does: the connection may have been lost in between
                    continue
                assert data == make_blob(size)
                return say(fetched_s=trio.current_time() - start)

        nursery.start_soon(tell_peers)
        nursery.start_soon(hear)
        say(peer=transport.peer_id, addresses=transport.addresses())
        buffer = b""
        stdin = trio.lowlevel.FdStream(0)
        while data := await stdin.receive_some():
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                command = json.loads(line)
                for _ in range(command.get("publish", 0)):
                    await transport.publish(
                        b"%s %d" % (number.encode(), next(positions)) + bytes(command.get("size", 1000))
                    )
                if "fetch" in command:
                    nursery.start_soon(take, command["fetch"], command["providers"])
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
