"""Pull blobs by digest in chunks, from several providers at once; and the half that serves chunks.

Only the whole blob has a digest, and Noise already guards bytes under way, so a wrong chunk is always a provider's lie.
It is found when the whole is there and wrong: then the one who gave most gives the others' chunks too. Either its
blob is the right one, which proves everyone wrong whose chunks differ; or it is not, which proves that one wrong. So
each liar costs at most the blob's size once more, nobody is blamed without proof, and the wire needs no manifest, whose
truth nobody could check against the digest either.

What has come of a blob outlives a failed fetch: the next one goes on from there (in memory: after a restart a blob
comes anew). Knows the transport's `request` and the store's parts; not what a blob means.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from p2pfm.errors import PeerUnreachable, Reject
from p2pfm.messages import BlobReply, BlobRequest, decode_reply, encode
from p2pfm.runtime.network.blobs import CHUNK_BYTES, Blob, Gate, Memory, Priority, Todo
from p2pfm.types import Digest, PeerId, short

CHUNK_TIMEOUT_S = 10.0  # in which nothing of it comes
PROVIDERS_AT_ONCE = 3
DEPTH = 2
"""Chunks asked for at once from one provider: while one is on its way the next is being read."""
PROVIDER_S_MIN, RATE_MIN = 30.0, 1 << 17
"""A provider has these seconds, and one more for so many bytes: who trickles would hold a download for hours."""
MEMORY_BYTES_MAX = 256 * 1024 * 1024
"""Of all downloads together, those that wait to be taken up again included; history has half of it."""
PARTIALS_MAX = 8
"""Downloads that wait to be taken up again; also dropped, the oldest first, when another needs their memory."""


class TooLarge(Reject):
    """Peers say that the blob has more bytes than were allowed. Who lies is not told by that: it may be who allowed."""

    def __init__(self, text: str, peers: tuple[PeerId, ...]) -> None:
        super().__init__(text)
        self.peers = peers


class Requester(Protocol):
    """What of a transport this needs."""

    async def request(self, peer: PeerId, data: bytes, timeout_s: float) -> bytes:
        """One request, one reply. Raises: PeerUnreachable: among others, when nothing comes for `timeout_s`."""
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
    """`Downloads.fetch` of one blob alone."""
    return await Downloads(transport).fetch(digest, providers, bytes_max)


class Downloads:
    """All blobs that one node fetches: they share a bound of memory, and this round's go first."""

    def __init__(
        self,
        transport: Requester,
        memory_bytes_max: int = MEMORY_BYTES_MAX,
        on_whole: Callable[[Priority, float, int], None] = lambda priority, seconds, size: None,
    ) -> None:
        """`on_whole`: told of every blob that has come: how long it took [s], and its size [bytes]."""
        self._transport = transport
        self._on_whole = on_whole
        self._memory = Memory(memory_bytes_max, self._forget_oldest)
        self._partials: OrderedDict[Digest, Blob] = OrderedDict()
        self._disputes = trio.CapacityLimiter(1)  # each holds up to a second copy: one at a time bounds them
        self._gate = Gate()

    @property
    def held_bytes(self) -> int:
        """Memory taken by blobs that have not come whole."""
        return self._memory.taken

    async def fetch(
        self, digest: Digest, providers: Sequence[PeerId], bytes_max: int, priority: Priority = Priority.HISTORY
    ) -> bytes:
        """The bytes of `digest`, at most `bytes_max`, from several of the providers at once; proven liars are blamed.

        Waits while other downloads hold the memory that this one may need.

        Raises:
            PeerUnreachable: nobody gave all of it; says what each answered. What has come is kept for the next fetch.
            TooLarge: the same, and some say that it has more bytes than `bytes_max`.
            Reject: nobody gave the right bytes, and some gave wrong ones; names them.
        """
        begun = trio.current_time()
        blob = self._partials.pop(digest, None)
        if blob is None or blob.size_max > bytes_max:
            if blob is not None:
                self._memory.give_back(blob)
            blob = Blob(digest, bytes_max, priority)
            await self._memory.take(blob)
        download = _Download(self._transport, blob, self._gate, self._disputes, priority)
        data: bytes | None = None
        try:
            with self._gate.enter(priority):
                data = await download.run(tuple(dict.fromkeys(providers)))
        finally:
            if data is None and blob.givers:
                self._partials[digest] = blob
                if len(self._partials) > PARTIALS_MAX:
                    self._forget_oldest()
            else:
                self._memory.give_back(blob)
        self._on_whole(priority, trio.current_time() - begun, len(data))
        return data

    def _forget_oldest(self) -> bool:
        if self._partials:
            self._memory.give_back(self._partials.popitem(last=False)[1])
            return True
        return False


class _Download:
    """One fetch of one blob."""

    def __init__(
        self,
        transport: Requester,
        blob: Blob,
        gate: Gate,
        disputes: trio.CapacityLimiter,
        priority: Priority,
    ) -> None:
        self._transport = transport
        self._blob = blob
        self._gate = gate
        self._disputes = disputes
        self._priority = priority
        self._failures: list[str] = []
        self._liars: list[PeerId] = []
        self._too_large: list[PeerId] = []
        self._out: set[PeerId] = set()
        """Who failed or lied: not asked again."""
        self._sizes: dict[PeerId, int] = {}
        """What each said the size is."""
        self._has_begun = trio.Event()

    async def run(self, providers: Sequence[PeerId]) -> bytes:
        """The whole and right blob. Raises: as `Downloads.fetch`."""
        blob = self._blob
        while True:
            able, others = self._sort(providers)
            if not blob.is_whole():
                await self._fill(able)
                blob.forget(self._liars)
                able, others = self._sort(providers)
            if blob.is_whole():
                if blob.is_right() if blob.is_hashed() else await trio.to_thread.run_sync(blob.is_right):
                    self._blame_for_sizes()
                    return blob.take_data()
                async with self._disputes:
                    await self._find_a_liar()
            elif others and not able:
                blob.forget_all()  # nobody gives a blob of this size, but some say they have one of another
                self._sizes.clear()
            elif not able:
                break
        reasons = f"blob {short(blob.digest)} could not be fetched: {'; '.join(self._failures) or 'no providers'}"
        if self._too_large:
            raise TooLarge(reasons, tuple(self._too_large))
        raise Reject(reasons) if self._liars else PeerUnreachable(reasons)

    def _sort(self, providers: Sequence[PeerId]) -> tuple[list[PeerId], list[PeerId]]:
        """Who may still be asked; and of the rest who did not fail, but said another size."""
        left = [peer for peer in providers if peer not in self._out]
        others = [peer for peer in left if self._sizes.get(peer, self._blob.size) != self._blob.size]
        return [peer for peer in left if peer not in others], others

    async def _fill(self, providers: Sequence[PeerId]) -> None:
        """Ask for what is missing until it has come or no provider is left. The first tells the size."""
        waiting = deque(providers)
        todo = Todo(self._blob.missing())
        self._has_begun = trio.Event()
        if self._blob.size is not None:
            self._has_begun.set()

        async def run_lane(number: int) -> None:
            if number:
                await self._has_begun.wait()
            while waiting and not todo.is_done():
                await self._pull(waiting.popleft(), todo, self._blob.put)
            self._has_begun.set()

        async with trio.open_nursery() as nursery:
            for number in range(PROVIDERS_AT_ONCE):
                nursery.start_soon(run_lane, number)

    async def _pull(self, provider: PeerId, todo: Todo, put: Callable[[int, bytes, PeerId], None]) -> None:
        """Chunks from one provider, some asked for at once, until it fails or nothing is left to ask for."""
        try:
            with trio.fail_after(PROVIDER_S_MIN + self._blob.size_max / RATE_MIN):
                async with trio.open_nursery() as nursery:
                    for _ in range(DEPTH):
                        nursery.start_soon(self._pull_chunks, provider, todo, put)
        except* PeerUnreachable as group:
            self._failures.append(str(group.exceptions[0]))
            self._out.add(provider)
        except* trio.TooSlowError:
            self._failures.append(f"{short(provider)} took too long")
            self._out.add(provider)
        except* _OtherSize as group:
            self._failures.append(str(group.exceptions[0]))
        except* Reject as group:
            self._condemn(provider, str(group.exceptions[0]))

    async def _pull_chunks(self, provider: PeerId, todo: Todo, put: Callable[[int, bytes, PeerId], None]) -> None:
        while (start := await todo.take()) is not None:
            try:
                chunk = await self._ask(provider, start, todo)
                if chunk:  # else it lies beyond the end
                    put(start, chunk, provider)
                todo.finish(start)
            finally:
                todo.give_back(start)

    async def _ask(self, provider: PeerId, start: int, todo: Todo) -> bytes:
        request = encode(BlobRequest(self._blob.digest, start, CHUNK_BYTES))
        data = await self._gate.ask(self._priority, lambda: self._transport.request(provider, request, CHUNK_TIMEOUT_S))
        reply = decode_reply(data)
        if not isinstance(reply, BlobReply):
            raise Reject(f"{short(provider)} answered a blob request with {type(reply).__name__}")
        if not reply.total:
            raise PeerUnreachable(f"{short(provider)} does not serve it")
        if reply.total > self._blob.size_max:
            self._too_large.append(provider)
            raise PeerUnreachable(
                f"{short(provider)} says it has {reply.total} bytes, at most {self._blob.size_max} are allowed"
            )
        self._sizes[provider] = reply.total
        if self._blob.size is None:
            self._blob.begin(reply.total)
            todo.cut(reply.total)
            self._has_begun.set()
        if reply.total != self._blob.size:
            raise _OtherSize(f"{short(provider)} says it has {reply.total} bytes, another {self._blob.size}")
        if len(reply.chunk) != max(0, min(CHUNK_BYTES, reply.total - start)):
            raise Reject(f"{short(provider)} gave a chunk of {len(reply.chunk)} bytes")
        return reply.chunk

    async def _find_a_liar(self) -> None:
        """The whole is wrong: prove one who gave a part of it wrong, or all others (see the module)."""
        blob = self._blob
        (suspect, _), *others = Counter(blob.givers.values()).most_common()
        claims: dict[int, bytes] = {}
        if others:
            todo = Todo([start for start in blob.starts() if blob.givers[start] != suspect])

            def compare(start: int, chunk: bytes, giver: PeerId) -> None:
                if not blob.holds(start, chunk):
                    claims[start] = chunk

            await self._pull(suspect, todo, compare)
            if not todo.is_done():  # it cannot be judged: go on without it
                self._out.add(suspect)
                blob.forget([suspect])
                return
        if await trio.to_thread.run_sync(blob.is_right_with, claims):
            for liar in dict.fromkeys(blob.givers[start] for start in claims):
                self._condemn(liar, f"{short(liar)} gave bytes of another digest")
            for start, chunk in claims.items():
                blob.put(start, chunk, suspect)
            blob.forget([])  # what was hashed was not right
        else:
            self._condemn(suspect, f"{short(suspect)} gave bytes of another digest")
            blob.forget([suspect])

    def _blame_for_sizes(self) -> None:
        for peer, size in self._sizes.items():
            if size != self._blob.size and peer not in self._liars:
                self._condemn(peer, f"{short(peer)} said it has {size} bytes, it has {self._blob.size}")

    def _condemn(self, liar: PeerId, reason: str) -> None:
        self._failures.append(reason)
        self._liars.append(liar)
        self._out.add(liar)
        self._transport.blame(liar, reason)


class _OtherSize(Exception):
    """A provider says another size than the one before: one of them lies."""


def answer_blob(store: Parts, is_served: Callable[[Digest], bool], request: BlobRequest) -> BlobReply:
    """What to answer: a chunk, or `total` 0 for what is not held or may not be served yet."""
    if not is_served(request.digest):
        return BlobReply(0, b"")
    return BlobReply(*store.get_part(request.digest, request.start, request.length))
