"""Answers what other peers ask, whoever asks and however slowly they read: bounded in number, bytes and time.

Knows frames and bounds; not what is asked.
"""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import trio

from p2pfm.config import TransportLimits
from p2pfm.errors import Reject
from p2pfm.runtime.network.frames import cancel_at_end, end_stream, read_frame, write_frame
from p2pfm.runtime.network.held import HeldBytes
from p2pfm.runtime.network.limits import Blame, RuleBroken
from p2pfm.types import PeerId

IDLE_S = 120.0
"""A stream on which nothing is asked is closed after this."""
THROTTLE_S = 0.5
"""A peer that offended lately waits this long for each answer."""

Handler: TypeAlias = Callable[[PeerId, bytes], Awaitable[bytes]]
Send: TypeAlias = Callable[[bytes], Awaitable[None]]
StreamHandler: TypeAlias = Callable[[PeerId, bytes, Send], Awaitable[None]]


class Server:
    """The serving half of a transport."""

    def __init__(
        self, limits: TransportLimits, blame: Blame, is_throttled: Callable[[PeerId], bool], counters: Counter[str]
    ) -> None:
        self.handler: Handler | None = None
        self.stream_handler: StreamHandler | None = None
        self._limits = limits
        self._blame = blame
        self._is_throttled = is_throttled
        self._counters = counters
        self._held = HeldBytes(limits.held_bytes_max)
        self._requests = trio.CapacityLimiter(limits.requests_served_max)
        self._streams = trio.CapacityLimiter(limits.streams_served_max)
        self._by_peer: dict[tuple[str, PeerId], trio.CapacityLimiter] = {}

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._requests.statistics().tasks_waiting

    async def serve_requests(self, stream: Any) -> None:
        """One request after the other, until the asker closes the stream."""
        peer = PeerId(str(stream.muxed_conn.peer_id))
        is_clean = False
        try:
            while True:
                with self._held.hold() as holding:
                    data = await read_frame(stream, self._limits.request_bytes_max, IDLE_S, holding.grow)
                    if data is None or self.handler is None:
                        is_clean = True
                        return
                    reply = await self._answer(peer, data, self.handler)
                    holding.grow(len(reply))
                    await write_frame(stream, reply)
                if holding.was_dropped:
                    self._counters["slow_exchanges_dropped"] += 1
                    return
        except (RuleBroken, Reject) as error:
            self._blame(peer, str(error))
        finally:
            await end_stream(stream, is_clean=is_clean)

    async def _answer(self, peer: PeerId, data: bytes, handler: Handler) -> bytes:
        async with self._turn("request", peer, self._limits.requests_served_per_peer_max, self._requests):
            reply = await handler(peer, data)
        assert len(reply) <= self._limits.reply_bytes_max
        self._counters["requests_served"] += 1
        self._counters["request_bytes_out"] += len(reply)
        return reply

    async def serve_stream(self, stream: Any) -> None:
        """One question, many frames of answer; cancelled when the asker closes the stream."""
        peer = PeerId(str(stream.muxed_conn.peer_id))
        is_clean = False

        async def send(frame: bytes) -> None:
            assert 0 < len(frame) <= self._limits.frame_bytes_max
            await write_frame(stream, frame)

        try:
            with self._held.hold() as holding:
                data = await read_frame(stream, self._limits.request_bytes_max, grow=holding.grow)
            if holding.was_dropped or data is None or self.stream_handler is None:
                return
            per_peer_max = self._limits.streams_served_per_peer_max
            async with (
                self._turn("stream", peer, per_peer_max, self._streams),
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(cancel_at_end, stream, nursery.cancel_scope)
                await self.stream_handler(peer, data, send)
                await write_frame(stream, b"")
                is_clean = True
                nursery.cancel_scope.cancel()
        except* (RuleBroken, Reject) as group:
            self._blame(peer, "; ".join(str(error) for error in group.exceptions))
        finally:
            await end_stream(stream, is_clean=is_clean)

    @asynccontextmanager
    async def _turn(self, kind: str, peer: PeerId, per_peer_max: int, all: trio.CapacityLimiter) -> AsyncIterator[None]:
        """Wait for a place: first among this peer's own, so that no peer takes all there are."""
        key = (kind, peer)
        own = self._by_peer.setdefault(key, trio.CapacityLimiter(per_peer_max))
        try:
            if self._is_throttled(peer):
                await trio.sleep(THROTTLE_S)
            async with own, all:
                yield
        finally:
            if not own.borrowed_tokens and not own.statistics().tasks_waiting:
                self._by_peer.pop(key, None)
