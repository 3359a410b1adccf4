"""Streams that are kept for clients who come back: what is held, what must go, and who keeps a copy.

Knows no clock, socket, model or text. Every gateway holds its own clients' streams and copies of others'. A stream's
name is random: who knows it may have it. And it is bound to what it begins with: nobody can put another under it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec

from p2pfm.errors import Reject
from p2pfm.messages import ExtendStream, GenerateRequest, KeepStream, encode
from p2pfm.types import Digest, Millis, PeerId, compute_digest

STREAM_DOMAIN = b"p2pfm/1 stream"

STREAMS_MAX = 4096
BYTES_MAX = 64 << 20
"""All streams kept, own and others'. What is most goes first: see `StreamStore`."""

TOKEN_BYTES = 8
ENTRY_BYTES = 512
"""What a token and a stream cost to hold, about."""

NOT_KEPT = -1
"""`KeptReply.num_tokens` of a stream that is not kept."""


def compute_stream_id(kept: KeepStream) -> Digest:
    """The stream's name: the same however much of it is emitted."""
    begin = msgspec.structs.replace(kept, request=msgspec.structs.replace(kept.request, emitted=()))
    return compute_digest(STREAM_DOMAIN + encode(begin))


def rank_keepers(stream: Digest, peers: Iterable[PeerId]) -> tuple[PeerId, ...]:
    """Who should keep it, first choice first, by rendezvous hashing: all who see the same peers agree, and a peer that
    comes or goes moves no stream but its own.
    """
    return tuple(sorted(peers, key=lambda peer: (sha256(stream + peer.encode()).digest(), peer), reverse=True))


@dataclass(slots=True)
class _Entry:
    begin: KeepStream
    emitted: list[int]
    author: PeerId
    expires_ms: Millis

    def num_bytes(self) -> int:
        request = self.begin.request
        return ENTRY_BYTES + len(self.begin.state) + TOKEN_BYTES * (len(request.prompt) + len(self.emitted))


@dataclass(slots=True)
class StreamStore:
    """Bounded in streams, bytes and time. When it is full, whoever takes most of it loses his oldest."""

    life_ms: Millis
    """From the last word on."""
    streams_max: int = STREAMS_MAX
    bytes_max: int = BYTES_MAX
    _entries: dict[Digest, _Entry] = field(default_factory=dict)  # the one touched last stands last
    _num_bytes: dict[PeerId, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Streams held, also expired ones that nobody missed."""
        return len(self._entries)

    def put(self, author: PeerId, kept: KeepStream, now_ms: Millis) -> Digest:
        """Hold `kept` for `author`, or what it adds to what is held of it; returns its name.

        Raises:
            Reject: more tokens than it asks for.
        """
        stream = compute_stream_id(kept)
        if stream in self._entries:
            self.extend(author, ExtendStream(stream, 0, kept.request.emitted), now_ms)
            return stream
        _validate_length(kept.request, len(kept.request.emitted))
        begin = msgspec.structs.replace(kept, request=msgspec.structs.replace(kept.request, emitted=()))
        entry = _Entry(begin, list(kept.request.emitted), author, Millis(now_ms + self.life_ms))
        self._add(stream, entry)
        self._make_room(now_ms)
        return stream

    def extend(self, author: PeerId, new: ExtendStream, now_ms: Millis) -> int:
        """Take in new tokens; returns how many are held then, NOT_KEPT if nothing is.

        Tokens after a gap, or after others than those held, are passed over: the answer tells from where to send.

        Raises:
            Reject: more tokens than the stream asks for.
        """
        entry = self._remove(new.stream)
        if entry is None:
            return NOT_KEPT
        try:
            overlap = len(entry.emitted) - new.position
            _validate_length(entry.begin.request, new.position + len(new.tokens))
            held = entry.emitted[new.position : new.position + len(new.tokens)]
            if overlap >= 0 and list(new.tokens[:overlap]) == held:
                entry.emitted.extend(new.tokens[overlap:])
                entry.author = author
            entry.expires_ms = Millis(now_ms + self.life_ms)
        finally:
            self._add(new.stream, entry)
        self._make_room(now_ms)
        return len(entry.emitted)

    def find(self, stream: Digest, now_ms: Millis) -> KeepStream | None:
        """The stream with all tokens held, unless its time is over."""
        entry = self._entries.get(stream)
        if entry is None or entry.expires_ms <= now_ms:
            return None
        request = msgspec.structs.replace(entry.begin.request, emitted=tuple(entry.emitted))
        return msgspec.structs.replace(entry.begin, request=request)

    def _make_room(self, now_ms: Millis) -> None:
        while self._entries:
            oldest = next(iter(self._entries))
            is_full = len(self._entries) > self.streams_max or sum(self._num_bytes.values()) > self.bytes_max
            if self._entries[oldest].expires_ms > now_ms:
                if not is_full:
                    return
                greediest = max(self._num_bytes, key=lambda peer: (self._num_bytes[peer], peer))
                oldest = next(stream for stream, entry in self._entries.items() if entry.author == greediest)
            self._remove(oldest)

    def _add(self, stream: Digest, entry: _Entry) -> None:
        self._entries[stream] = entry
        self._num_bytes[entry.author] = self._num_bytes.get(entry.author, 0) + entry.num_bytes()

    def _remove(self, stream: Digest) -> _Entry | None:
        entry = self._entries.pop(stream, None)
        if entry is not None:
            self._num_bytes[entry.author] -= entry.num_bytes()
            if not self._num_bytes[entry.author]:
                del self._num_bytes[entry.author]
        return entry


def _validate_length(request: GenerateRequest, num_tokens: int) -> None:
    if num_tokens > request.tokens_max:
        raise Reject(f"expected at most the {request.tokens_max} tokens that the stream asks for, got {num_tokens}")
