"""Pull a blob by digest in chunks, from several providers at once; and the half that serves chunks.

A provider that fails costs the chunks in flight: the others go on with what is missing. Knows the transport's
`request` and the store's parts; not what a blob means.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from p2pfm.errors import PeerUnreachable, Reject
from p2pfm.messages import BlobReply, BlobRequest, decode_reply, encode
from p2pfm.types import Digest, PeerId, compute_digest, short

CHUNK_BYTES = 262_144
CHUNK_TIMEOUT_S = 10.0
PROVIDERS_AT_ONCE = 3
DEPTH = 2
"""Chunks asked for at once from one provider: while one is on its way the next is being read."""
PROVIDER_S_MIN, RATE_MIN = 10.0, 1 << 17
"""A provider has these seconds, and one more for so many bytes: who trickles would hold a download for hours."""


class Requester(Protocol):
    """What of a transport this needs."""

    async def request(self, peer: PeerId, data: bytes, timeout_s: float) -> bytes:
        """One request, one reply. Raises: PeerUnreachable."""
        ...

    def blame(self, peer: PeerId, reason: str) -> None:
        """A peer broke a rule."""
        ...


class Parts(Protocol):
    """What of a store this needs."""

    def get_part(self, digest: Digest, start: int, length: int) -> tuple[int, bytes]:
        """The blob's size and some of its bytes; (0, b"") when not held."""
        ...


async def fetch(transport: Requester, digest: Digest, providers: Sequence[PeerId], bytes_max: int) -> bytes:
    """The bytes of `digest`, at most `bytes_max`, from several of the providers at once; liars are blamed.

    Which of several gave a wrong chunk nobody can say: then they are asked again, one by one.

    Raises:
        PeerUnreachable: no provider gave all of it; says what each answered.
        Reject: nobody gave the right bytes, and some gave wrong ones; names them.
    """
    failures: list[str] = []
    liars: list[PeerId] = []
    waiting = deque(dict.fromkeys(providers))
    lanes = PROVIDERS_AT_ONCE
    while waiting:
        download = _Download(transport, digest, bytes_max)
        asked = deque(waiting) if lanes > 1 else deque([waiting.popleft()])
        await download.run(asked, lanes)
        failures += download.failures
        liars += download.liars
        if not download.is_whole():
            if lanes > 1 and not download.is_disputed:
                break
            lanes = 1
            continue
        data = bytes(download.data)
        if compute_digest(data) == digest:
            return data
        if len(download.givers) > 1:
            lanes = 1
            continue
        (liar,) = download.givers
        failures.append(f"{short(liar)} gave bytes of another digest")
        liars.append(liar)
        transport.blame(liar, failures[-1])
        waiting = deque(peer for peer in waiting if peer not in liars)
    reasons = f"blob {short(digest)} could not be fetched: {'; '.join(failures) or 'no providers'}"
    raise Reject(reasons) if liars else PeerUnreachable(reasons)


class _Download:
    """One blob, chunk by chunk, from whoever gives it."""

    def __init__(self, transport: Requester, digest: Digest, bytes_max: int) -> None:
        self.data = bytearray()
        self.givers: set[PeerId] = set()
        self.failures: list[str] = []
        self.liars: list[PeerId] = []
        self.is_disputed = False
        """Two peers said two sizes: one lies."""
        self._transport = transport
        self._digest = digest
        self._bytes_max = bytes_max
        self._missing: deque[int] | None = None
        """Where chunks begin that nobody is asked for; None: the size is not known yet."""
        self._num_open = 0
        """Chunks that have not come."""
        self._changed = trio.Event()

    def is_whole(self) -> bool:
        """All chunks have come."""
        return self._missing is not None and self._num_open == 0

    async def run(self, providers: "deque[PeerId]", num_lanes: int) -> None:
        """Until all has come, or no provider is left. The first chunk comes from one alone: it tells the size."""
        while providers and self._missing is None:
            await self._take_from(providers[0], 1)
            if self._missing is None:
                providers.popleft()
        async with trio.open_nursery() as nursery:
            for _ in range(num_lanes if not self.is_whole() else 0):
                nursery.start_soon(self._run_lane, providers)

    async def _run_lane(self, providers: "deque[PeerId]") -> None:
        while providers and not self.is_whole():
            await self._take_from(providers.popleft(), DEPTH)

    async def _take_from(self, provider: PeerId, depth: int) -> None:
        """Chunks from one provider, `depth` asked for at once, until it fails or nothing is left to ask for."""
        try:
            with trio.fail_after(PROVIDER_S_MIN + self._bytes_max / RATE_MIN):
                async with trio.open_nursery() as nursery:
                    for _ in range(depth):
                        nursery.start_soon(self._take, provider)
        except* (PeerUnreachable, trio.TooSlowError) as group:
            self.failures.append(str(group.exceptions[0]))
        except* Reject as group:
            self.failures.append(str(group.exceptions[0]))
            self.liars.append(provider)
            self._transport.blame(provider, self.failures[-1])

    async def _take(self, provider: PeerId) -> None:
        if self._missing is None:
            await self._take_chunk(provider, 0)
            return
        while not self.is_whole():
            if not self._missing:
                await self._changed.wait()  # another's chunk may fail, and be ours then
                continue
            start, has_come = self._missing.popleft(), False
            try:
                await self._take_chunk(provider, start)
                has_come = True
            finally:
                if not has_come:  # failed or cancelled: another's now
                    self._missing.append(start)
                    self._tell()

    async def _take_chunk(self, provider: PeerId, start: int) -> None:
        request = encode(BlobRequest(self._digest, start, CHUNK_BYTES))
        reply = decode_reply(await self._transport.request(provider, request, CHUNK_TIMEOUT_S))
        if not isinstance(reply, BlobReply):
            raise Reject(f"{short(provider)} answered a blob request with {type(reply).__name__}")
        if not reply.total:
            raise PeerUnreachable(f"{short(provider)} does not serve it")
        if reply.total > self._bytes_max:
            raise Reject(f"{short(provider)} says it has {reply.total} bytes, at most {self._bytes_max} are allowed")
        if self._missing is None:
            self.data = bytearray(reply.total)
            self._missing = deque(range(CHUNK_BYTES, reply.total, CHUNK_BYTES))
            self._num_open = len(self._missing) + 1
        if reply.total != len(self.data):
            self.is_disputed = True
            raise PeerUnreachable(f"{short(provider)} says it has {reply.total} bytes, another {len(self.data)}")
        if len(reply.chunk) != min(CHUNK_BYTES, reply.total - start):
            raise Reject(f"{short(provider)} gave a chunk of {len(reply.chunk)} bytes")
        self.data[start : start + len(reply.chunk)] = reply.chunk
        self.givers.add(provider)
        self._num_open -= 1
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def answer_blob(store: Parts, is_served: Callable[[Digest], bool], request: BlobRequest) -> BlobReply:
    """What to answer: a chunk, or `total` 0 for what is not held or may not be served yet."""
    if not is_served(request.digest):
        return BlobReply(0, b"")
    return BlobReply(*store.get_part(request.digest, request.start, request.length))
