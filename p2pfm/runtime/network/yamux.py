"""py-libp2p 0.8.1's Yamux with its doors closed: streams, windows and memory are bounded, frozen peers are found.

Subclasses of the library's muxer, each overriding the one place where the measured fault lies (NETWORK, "What kills or
stalls a stock host"). Knows connections and their streams only.
"""

import logging
from collections.abc import Callable
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream

from p2pfm.config import TransportLimits
from p2pfm.runtime.network.limits import Blame, RuleBroken, TokenBucket

log = logging.getLogger(__name__)

YAMUX_HEADER_BYTES = 12
YAMUX_DATA, YAMUX_WINDOW_UPDATE, YAMUX_PING = 0, 1, 2
YAMUX_SYN = 1
WINDOW_INITIAL_BYTES = 256 * 1024  # fixed by the Yamux specification
WINDOW_BYTES_MAX = 1024 * 1024  # a stream buffers at most this much for a reader that does not read
CLOSED_TICK_S = 0.25  # a waiting writer looks this often whether its stream was closed
FRAME_BODY_BYTES_MAX = 65_507  # with its header it fits one Noise message; a full Yamux frame needs two (NETWORK)


class _FrameReader:
    """The reading side of a secured connection, cut into Yamux frames and checked before the muxer sees them.

    The muxer asks for exactly a header, then for exactly its body; this reads whole Noise messages instead, which also
    takes away the library's limit of 100 reads a frame.
    """

    def __init__(self, conn: Any, check: Callable[[int, int, int, int], None]) -> None:
        self._conn = conn
        self._check = check
        self._buffer = bytearray()
        self._body_left = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)

    async def read(self, n: int | None = None) -> bytes:
        if self._body_left:
            size = self._body_left if n is None else min(n, self._body_left)
            self._body_left -= size
            return await self._take(size)
        header = await self._take(YAMUX_HEADER_BYTES)
        kind, flags = header[1], int.from_bytes(header[2:4], "big")
        stream, length = int.from_bytes(header[4:8], "big"), int.from_bytes(header[8:12], "big")
        self._check(kind, flags, stream, length)
        self._body_left = length if kind == YAMUX_DATA else 0
        return header

    async def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._buffer += await self._conn.read(None)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


class _BatchedStream(YamuxStream):  # type: ignore[misc]
    """A Yamux stream that gives credit back at half a window, and treats a slow reader as back-pressure."""

    _pending_recv_release: int
    _credit: trio.Event | None = None

    @property
    def send_window(self) -> int:
        """Bytes that the peer still takes."""
        return int(self.__dict__["send_window"])

    @send_window.setter
    def send_window(self, size: int) -> None:
        # The library adds credit to this attribute; a waiting writer must hear of it. Looking again every 10 ms, as the
        # stock writer does, lets a thousand slow readers keep a core busy.
        self.__dict__["send_window"] = size
        if self._credit is not None:
            self._credit.set()
            self._credit = None

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        # The stock rule answers nearly every read with a frame; CPU a delivery falls 2 to 4 times without it (NETWORK).
        self._pending_recv_release += bytes_read
        if self._pending_recv_release * 2 < self.target_recv_window or self.recv_closed:
            return
        growth = min(self.target_recv_window, WINDOW_BYTES_MAX - self.target_recv_window)
        credit = self._pending_recv_release + growth
        self.target_recv_window += growth
        self._pending_recv_release = 0
        self.recv_window += credit
        await self.send_window_update(credit)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        sent = 0
        ends_at = (
            trio.current_time() + self.conn.limits.write_stall_s + len(view) / self.conn.limits.write_bytes_per_s_min
        )
        while sent < len(view):
            size = await self._take_credit(min(FRAME_BODY_BYTES_MAX, len(view) - sent), ends_at)
            header = bytes((0, YAMUX_DATA, 0, 0)) + self.stream_id.to_bytes(4, "big") + size.to_bytes(4, "big")
            await self.conn._write_frame(header + view[sent : sent + size])
            sent += size

    async def _take_credit(self, wanted: int, ends_at: float) -> int:
        """Bytes that may be sent now, waiting for the peer to read (the stock muxer gives up after 5 s)."""
        deadline = min(trio.current_time() + self.conn.limits.write_stall_s, ends_at)
        while True:
            if self.send_closed or self.closed:
                raise MuxedStreamError("the stream is closed for sending")
            if self.send_window > 0:
                size = min(self.send_window, wanted)
                self.send_window -= size
                return int(size)
            if trio.current_time() > deadline:
                raise MuxedStreamError("the peer has read nothing for too long")
            if self._credit is None:
                self._credit = trio.Event()
            with trio.move_on_after(CLOSED_TICK_S):
                await self._credit.wait()


class _Streams(dict[int, Any]):
    """The muxer's table of streams; the muxer creates stock streams inline, so they become ours as they enter."""

    def __setitem__(self, key: int, stream: Any) -> None:
        stream.__class__ = _BatchedStream
        super().__setitem__(key, stream)


class GuardedYamux(Yamux):  # type: ignore[misc]
    """Yamux with bounds on streams, windows and memory, and a heartbeat that finds frozen peers."""

    def __init__(self, conn: Any, peer_id: ID, limits: TransportLimits, blame: Blame, all: "set[GuardedYamux]") -> None:
        """`all`: the connections that live; this one adds itself while it runs."""

        async def on_close() -> None: ...

        super().__init__(_FrameReader(conn, self._check), peer_id, is_initiator=conn.is_initiator, on_close=on_close)
        self.limits = limits
        self._blame = blame
        self.streams = _Streams()
        self._syn = TokenBucket(limits.syn_burst_max, limits.syn_per_s)
        self._heard_at = trio.current_time()
        self._all = all
        self._unmeasured = 0
        self.buffered = 0
        """Bytes that lay unread when they were last counted."""

    def _check(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Refuse a frame that breaks a rule before a byte of its body is read."""
        self._heard_at = trio.current_time()
        stream = self.streams.get(stream_id)
        if kind in (YAMUX_DATA, YAMUX_WINDOW_UPDATE) and flags & YAMUX_SYN:
            if len(self.streams) >= self.limits.streams_per_connection_max:
                self._refuse(f"more than {self.limits.streams_per_connection_max} open streams")
            if self._syn.take(self._heard_at):
                self._refuse("opens streams too fast")
        if kind == YAMUX_DATA:
            # By what is held, not by the library's window: it sets that to zero at an overrun, and begins anew.
            window = stream.target_recv_window if stream is not None else WINDOW_INITIAL_BYTES
            held = len(self.stream_buffers.get(stream_id, b""))
            if held + length > window + self.limits.window_slack_bytes:
                self._refuse(f"ignores the window: {held} + {length} bytes into {window}")
            self._unmeasured += length
            if self._unmeasured > WINDOW_BYTES_MAX:
                self._unmeasured = 0
                self._bound_buffers()

    def _bound_buffers(self) -> None:
        self.buffered = self._count_buffered()
        if self.buffered > self.limits.buffered_per_connection_max:
            self._refuse("fills streams that nobody reads")
        if sum(conn.buffered for conn in self._all) <= self.limits.buffered_max:
            return
        for conn in self._all:
            conn.buffered = conn._count_buffered()
        if sum(conn.buffered for conn in self._all) > self.limits.buffered_max:
            greatest = max(self._all, key=lambda conn: conn.buffered)
            log.info("peer %s has %d bytes unread here, most of all: closing", greatest.peer_id, greatest.buffered)
            greatest.buffered = 0
            if greatest._nursery is not None:
                greatest._nursery.start_soon(greatest._cleanup_on_error)

    def _count_buffered(self) -> int:
        return sum(map(len, self.stream_buffers.values()))

    def _refuse(self, rule: str) -> None:
        self._blame(str(self.peer_id), rule)
        raise RuleBroken(rule)

    async def _measure_rtt_loop(self) -> None:
        """Ping at the muxer's level, and end the connection when nothing at all comes back.

        The stock loop pings every 30 s and ignores the answer, so that a stopped process went unnoticed for 45 s.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while not self.event_shutting_down.is_set():
                quiet_s = trio.current_time() - self._heard_at
                if quiet_s < self.limits.ping_s:  # it lives: its own ping told so, or its data
                    await trio.sleep(self.limits.ping_s - quiet_s)
                    continue
                self._ping_id += 1
                self._ping_sent_time = trio.current_time()
                ping = bytes((0, YAMUX_PING, 0, YAMUX_SYN, 0, 0, 0, 0)) + (self._ping_id % 2**32).to_bytes(4, "big")
                try:
                    await self._write_frame(ping)
                except (IOException, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                    return
                await trio.sleep(self.limits.ping_s)

    async def _watch(self) -> None:
        # A task of its own: the pinging one blocks in a full socket buffer when the peer is frozen.
        while not self.event_shutting_down.is_set():
            asleep_at = trio.current_time()
            await trio.sleep(1.0)
            now = trio.current_time()
            if now - asleep_at > 3.0:
                self._heard_at = now  # it was us who stood still: judge nobody by that time
            if now - self._heard_at > self.limits.silent_s:
                log.info("peer %s is silent for %.0f s: closing", self.peer_id, now - self._heard_at)
                with trio.CancelScope(shield=True):
                    await self._cleanup_on_error()
                return

    async def start(self) -> None:
        """Run until the connection ends."""
        self._all.add(self)
        try:
            await super().start()
        except Exception:
            log.debug("connection of %s ended with an error", self.peer_id, exc_info=True)
            await self._cleanup_on_error()
        finally:
            self._all.discard(self)


class GuardedMuxers(MuxerMultistream):  # type: ignore[misc]
    """Negotiates Yamux only. The stock class builds its own Yamux whatever class it was given."""

    def __init__(self, limits: TransportLimits, blame: Blame) -> None:
        super().__init__({TProtocol(YAMUX_PROTOCOL): Yamux}, int(limits.negotiate_s))
        self._limits = limits
        self._blame = blame
        self._all: set[GuardedYamux] = set()

    async def new_conn(self, conn: Any, peer_id: ID) -> Any:
        """A muxed connection over a secured one."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return self._annotate_connection(
            GuardedYamux(conn, peer_id, self._limits, self._blame, self._all), conn, protocol
        )
