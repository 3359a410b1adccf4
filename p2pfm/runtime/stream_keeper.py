"""Copies clients' streams to other gateways while they run, and finds one whose client comes from another gateway.

Knows no HTTP, model or text. What is held and who should hold it is in `serving.keeping`; nobody is asked to agree:
each gateway works out the keepers from the peers that it sees, and asks some more when it looks for a stream.
"""

import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import trio

from p2pfm.config import ServingConfig
from p2pfm.errors import PeerUnreachable, Reject
from p2pfm.messages import (
    ExtendStream,
    FindStream,
    FoundReply,
    GenerateRequest,
    KeepStream,
    KeptReply,
    Reply,
    decode_reply,
    encode,
)
from p2pfm.serving.keeping import NOT_KEPT, StreamStore, compute_stream_id, rank_keepers
from p2pfm.types import DIGEST_BYTES, Digest, Millis, PeerId, short

COPY_S = 1.0
"""How often new tokens are copied: what is lost with a gateway is generated again, and is the same."""

ASK_S = 1.0
"""A keeper that gives no answer for so long is passed over."""

PASSED_OVER_S = 10.0
"""So long another keeper is taken in its place: until its presence is forgotten, if it is dead."""

TRIES_MAX = 4
"""Keepers asked in turn until one holds the stream; then those missing are asked a second later."""

COPIED_WAIT_S = 0.3
"""How long a stream's first token may wait for the first copy, without which its gateway's death would lose it."""

ASKED_BESIDE = 4
"""Peers asked for a stream beyond those that should keep it: its gateway may have seen other peers."""

FINDS_MAX = 8
"""Searches at once: each asks several peers."""

COPIES_MAX = 64
"""Copies on their way at once."""

log = logging.getLogger(__name__)

Ask = Callable[[PeerId, bytes, float], Awaitable[bytes]]
"""`transport.request`: peer, request, seconds; the reply."""


@dataclass(slots=True)
class _Copied:
    """A stream whose client is here, and how much of it each keeper holds."""

    held: dict[PeerId, int] = field(default_factory=dict)
    first: trio.Event = field(default_factory=trio.Event)
    """Somebody holds it, or nobody will."""
    num_readers: int = 0
    """0: its client has all, or is gone."""
    is_copying: bool = False


class StreamKeeper:
    """One gateway's streams, own and others'."""

    def __init__(
        self,
        local: PeerId,
        config: ServingConfig,
        ask: Ask,
        live_peers: Callable[[], Iterable[PeerId]],
        now_ms: Callable[[], Millis],
    ) -> None:
        """`live_peers`: gateways that seem to live now, with or without this one; `now_ms`: the wall clock."""
        self._local, self._num_backups = local, config.backups
        self._ask, self._live_peers, self._now_ms = ask, live_peers, now_ms
        life_ms = Millis(round(config.kept_s * 1000))
        self._store, self._private = StreamStore(life_ms), StreamStore(life_ms)
        self._running: dict[Digest, _Copied] = {}
        self._passed_over: dict[PeerId, float] = {}
        self._woken = trio.Event()
        self._copies, self._finds = trio.CapacityLimiter(COPIES_MAX), trio.CapacityLimiter(FINDS_MAX)

    # --- this node's own streams --------------------------------------------------------------------------------------

    def begin(self, request: GenerateRequest, state: bytes, *, is_private: bool) -> Digest:
        """Hold a client's new stream; returns its name. With `is_private` no other node ever hears of it."""
        kept = KeepStream(Digest(secrets.token_bytes(DIGEST_BYTES)), request, state)
        return self._private.put(self._local, kept, self._now_ms()) if is_private else self.hold(kept)

    def hold(self, kept: KeepStream) -> Digest:
        """Hold a stream whose client came here with it; returns its name."""
        stream = compute_stream_id(kept)
        if self._private.find(stream, self._now_ms()) is None:
            self._store.put(self._local, kept, self._now_ms())
        return stream

    def start(self, stream: Digest) -> None:
        """From now on others get a copy of what is held of it, until `end`; not if it is private."""
        if self._num_backups and self._store.find(stream, self._now_ms()) is not None:
            self._running.setdefault(stream, _Copied()).num_readers += 1
            self._woken.set()

    def extend(self, stream: Digest, position: int, tokens: tuple[int, ...]) -> None:
        """Tokens of it were generated, from `position` of the text on."""
        new = ExtendStream(stream, position, tokens)
        if self._store.extend(self._local, new, self._now_ms()) == NOT_KEPT:
            self._private.extend(self._local, new, self._now_ms())

    def end(self, stream: Digest) -> None:
        """Its client has all, or is gone: the last tokens are copied once more."""
        if stream in self._running:
            self._running[stream].num_readers -= 1
            self._woken.set()

    async def wait_copied(self, stream: Digest) -> None:
        """Until somebody else holds it; COPIED_WAIT_S at most."""
        if (copied := self._running.get(stream)) is not None:
            with trio.move_on_after(COPIED_WAIT_S):
                await copied.first.wait()

    async def run(self) -> None:
        """Copy what is new, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for stream, copied in list(self._running.items()):
                    if not copied.is_copying:
                        copied.is_copying = True
                        nursery.start_soon(self._copy, stream, copied)
                with trio.move_on_after(COPY_S):
                    await self._woken.wait()
                self._woken = trio.Event()

    async def _copy(self, stream: Digest, copied: _Copied) -> None:
        is_last = not copied.num_readers
        async with self._copies:
            for _ in range(TRIES_MAX):
                keepers = self._choose_keepers(stream)
                async with trio.open_nursery() as nursery:
                    for keeper in keepers:
                        nursery.start_soon(self._copy_to, keeper, stream, copied)
                if not self._passed_over.keys() & set(keepers):
                    break
        copied.is_copying = False
        copied.first.set()
        if is_last and not copied.num_readers:
            del self._running[stream]

    def _choose_keepers(self, stream: Digest) -> tuple[PeerId, ...]:
        now_s = trio.current_time()
        self._passed_over = {peer: until_s for peer, until_s in self._passed_over.items() if until_s > now_s}
        others = {*self._live_peers()} - {self._local, *self._passed_over}
        return rank_keepers(stream, others)[: self._num_backups]

    async def _copy_to(self, keeper: PeerId, stream: Digest, copied: _Copied) -> None:
        """What it lacks; all of it, if it has nothing."""
        kept = self._store.find(stream, self._now_ms())
        if kept is None or copied.held.get(keeper, NOT_KEPT) >= len(kept.request.emitted):
            return
        num_held = copied.held.get(keeper)
        try:
            if num_held is not None:
                reply = await self._send(keeper, ExtendStream(stream, num_held, kept.request.emitted[num_held:]))
                copied.held[keeper] = _get_num_tokens(reply)
            if copied.held.get(keeper, NOT_KEPT) == NOT_KEPT:
                copied.held[keeper] = _get_num_tokens(await self._send(keeper, kept))
            if copied.held[keeper] == NOT_KEPT:
                raise Reject("expected it to keep a stream, it does not")
            copied.first.set()
        except (PeerUnreachable, Reject) as error:
            log.info("stream kept by %s: %s; another keeps it", short(keeper), error)
            copied.held.pop(keeper, None)
            self._passed_over[keeper] = trio.current_time() + PASSED_OVER_S

    # --- whoever asks -------------------------------------------------------------------------------------------------

    async def find(self, stream: Digest) -> KeepStream | None:
        """The stream as it is held here, else by those who should, and some more."""
        kept = self._store.find(stream, self._now_ms()) or self._private.find(stream, self._now_ms())
        if kept is not None:
            return kept
        asked = rank_keepers(stream, {*self._live_peers()} - {self._local})[: self._num_backups + ASKED_BESIDE]
        found: list[KeepStream] = []
        async with self._finds, trio.open_nursery() as nursery:

            async def ask(peer: PeerId) -> None:
                try:
                    reply = await self._send(peer, FindStream(stream))
                except (PeerUnreachable, Reject) as error:
                    log.info("looking for a stream at %s: %s", short(peer), error)
                    return
                if isinstance(reply, FoundReply) and reply.kept is not None and compute_stream_id(reply.kept) == stream:
                    found.append(reply.kept)
                    nursery.cancel_scope.cancel()

            for peer in asked:
                nursery.start_soon(ask, peer)
        return found[0] if found else None

    def answer(self, peer: PeerId, request: KeepStream | ExtendStream | FindStream) -> Reply:
        """Another gateway's request.

        Raises:
            Reject: more tokens than the stream asks for.
        """
        match request:
            case FindStream(stream=stream):
                return FoundReply(self._store.find(stream, self._now_ms()))
            case ExtendStream():
                return KeptReply(self._store.extend(peer, request, self._now_ms()))
            case KeepStream():
                stream = self._store.put(peer, request, self._now_ms())
                held = self._store.find(stream, self._now_ms())
                return KeptReply(NOT_KEPT if held is None else len(held.request.emitted))

    async def _send(self, peer: PeerId, request: KeepStream | ExtendStream | FindStream) -> Reply:
        return decode_reply(await self._ask(peer, encode(request), ASK_S))


def _get_num_tokens(reply: Reply) -> int:
    if not isinstance(reply, KeptReply):
        raise Reject(f"expected word of a kept stream, got {type(reply).__name__}")
    return reply.num_tokens
