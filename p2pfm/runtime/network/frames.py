"""Frames on a stream: a length, then so many bytes; bounded in size and in time."""

import logging
from collections.abc import Callable
from typing import Any

import trio
from libp2p.network.stream.exceptions import StreamEOF

from p2pfm.runtime.network.limits import RuleBroken

log = logging.getLogger(__name__)

LENGTH_BYTES = 4  # every frame: its length, big endian, then its bytes
READ_BYTES = 256 * 1024
COPIED_BYTES = 65_507 - LENGTH_BYTES  # with its length it fills one frame of the muxer
FRAME_S = 30.0  # a frame that has begun must end within this


async def write_frame(stream: Any, data: bytes) -> None:
    """One frame; raises what the library's stream raises."""
    # Only its beginning is copied: a frame may wait long for a slow reader.
    await stream.write(len(data).to_bytes(LENGTH_BYTES, "big") + data[:COPIED_BYTES])
    if len(data) > COPIED_BYTES:
        await stream.write(memoryview(data)[COPIED_BYTES:])


def _count_nothing(size: int) -> None: ...


async def read_frame(
    stream: Any, bytes_max: int, wait_s: float | None = FRAME_S, grow: Callable[[int], None] = _count_nothing
) -> bytes | None:
    """The next frame; None at a clean end or when none begins within `wait_s` (None: waits for ever).

    `grow` is told how many bytes came, as they come.

    Raises:
        RuleBroken: the frame is announced longer than `bytes_max`, or it stalls. Nothing is allocated before.
    """
    head = bytearray()
    with trio.move_on_after(wait_s if wait_s is not None else float("inf")) as scope:
        head += await _read_some(stream, LENGTH_BYTES)
    if scope.cancelled_caught or not head:
        return None
    with trio.move_on_after(FRAME_S) as scope:
        await _read_until(stream, head, LENGTH_BYTES)
        size = int.from_bytes(head, "big")
        if size > bytes_max:
            raise RuleBroken(f"a frame of {size} bytes, at most {bytes_max} are allowed")
        body = bytearray()
        try:
            await _read_until(stream, body, size, grow)
            return bytes(body)
        finally:
            body.clear()  # the error that ends a stream keeps this frame alive until the next garbage collection
    raise RuleBroken("a frame that stalls")


async def _read_until(stream: Any, buffer: bytearray, size: int, grow: Callable[[int], None] = _count_nothing) -> None:
    while len(buffer) < size:
        chunk = await _read_some(stream, min(READ_BYTES, size - len(buffer)))
        if not chunk:
            raise RuleBroken("a frame that ends early")
        buffer += chunk
        grow(len(chunk))


async def _read_some(stream: Any, size: int) -> bytes:
    try:
        return bytes(await stream.read(size))
    except StreamEOF:
        return b""


async def cancel_at_end(stream: Any, scope: trio.CancelScope) -> None:
    """Cancel `scope` as soon as the asker closes, resets or says anything more on its stream."""
    try:
        await stream.read(1)
    except Exception:  # noqa: BLE001 - the library's streams raise a dozen unrelated classes when they end
        log.debug("the asker closed its stream")
    scope.cancel()


async def end_stream(stream: Any, *, is_clean: bool) -> None:
    """Close or reset a stream, in bounded time, also while being cancelled."""
    with trio.CancelScope(shield=True), trio.move_on_after(1.0):
        try:
            await (stream.close() if is_clean else stream.reset())
        except Exception:  # noqa: BLE001 - the connection may be gone, in any of the library's ways
            log.debug("a stream was gone before it was closed")
