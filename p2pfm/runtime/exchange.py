"""Pull a blob by digest in chunks, from one provider after the other; and the half that serves chunks.

A provider that fails costs the chunk in flight: the next goes on where it stopped. Knows the transport's `request` and
the store's parts; not what a blob means.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from p2pfm.errors import PeerUnreachable, Reject
from p2pfm.messages import BlobReply, BlobRequest, decode_reply, encode
from p2pfm.types import Digest, PeerId, compute_digest, short

CHUNK_BYTES = 262_144
CHUNK_TIMEOUT_S = 10.0
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
    """The bytes of `digest`, at most `bytes_max`, from the first providers that give them; liars are blamed.

    Raises:
        PeerUnreachable: no provider gave all of it; says what each answered.
        Reject: nobody gave the right bytes, and some gave wrong ones; names them.
    """
    failures: list[str] = []
    liars: list[PeerId] = []
    partial = _Partial(digest, bytes_max)
    for provider in providers:
        try:
            with trio.fail_after(PROVIDER_S_MIN + bytes_max / RATE_MIN):
                await _complete(transport, partial, provider)
            if not partial.is_right() and partial.givers != {provider}:
                # One of several gave wrong bytes, and nobody can say which: ask the last one for all of it.
                partial = _Partial(digest, bytes_max)
                await _complete(transport, partial, provider)
            if partial.is_right():
                return bytes(partial.data)
            raise Reject(f"{short(provider)} gave bytes of another digest")
        except (PeerUnreachable, trio.TooSlowError) as error:
            failures.append(str(error))
        except Reject as error:
            failures.append(str(error))
            liars.append(provider)
            transport.blame(provider, str(error))
            partial = _Partial(digest, bytes_max)
    reasons = f"blob {short(digest)} could not be fetched: {'; '.join(failures) or 'no providers'}"
    raise Reject(reasons) if liars else PeerUnreachable(reasons)


class _Partial:
    """What has come of a blob so far, and from whom."""

    def __init__(self, digest: Digest, bytes_max: int) -> None:
        self.digest = digest
        self.bytes_max = bytes_max
        self.data = bytearray()
        self.total = 0
        """0: not known yet."""
        self.givers: set[PeerId] = set()

    def is_right(self) -> bool:
        """Whether the digest is that of the bytes."""
        return compute_digest(bytes(self.data)) == self.digest


async def _complete(transport: Requester, partial: _Partial, provider: PeerId) -> None:
    """Get the missing chunks from one provider."""
    while not partial.total or len(partial.data) < partial.total:
        request = encode(BlobRequest(partial.digest, len(partial.data), CHUNK_BYTES))
        reply = decode_reply(await transport.request(provider, request, CHUNK_TIMEOUT_S))
        if not isinstance(reply, BlobReply):
            raise Reject(f"{short(provider)} answered a blob request with {type(reply).__name__}")
        if not reply.total:
            raise PeerUnreachable(f"{short(provider)} does not serve it")
        if reply.total > partial.bytes_max:
            raise Reject(f"{short(provider)} says it has {reply.total} bytes, at most {partial.bytes_max} are allowed")
        if partial.total and reply.total != partial.total:
            if provider in partial.givers:
                raise Reject(f"{short(provider)} says it has {reply.total} bytes, {partial.total} before")
            # Two peers say two sizes: one lies, perhaps the one before. Begin again with this one alone.
            partial.data.clear()
            partial.givers.clear()
            partial.total = 0
            continue
        if len(reply.chunk) != min(CHUNK_BYTES, reply.total - len(partial.data)):
            raise Reject(f"{short(provider)} gave a chunk of {len(reply.chunk)} bytes")
        partial.total = reply.total
        partial.data += reply.chunk
        partial.givers.add(provider)


def answer_blob(store: Parts, is_served: Callable[[Digest], bool], request: BlobRequest) -> BlobReply:
    """What to answer: a chunk, or `total` 0 for what is not held or may not be served yet."""
    if not is_served(request.digest):
        return BlobReply(0, b"")
    return BlobReply(*store.get_part(request.digest, request.start, request.length))
