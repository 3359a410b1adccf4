"""What downloads are made of: a blob as far as it has come, what to ask for, and what all of them share.

Knows no peer's address and asks nobody: `exchange` does.
"""

import hashlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from enum import IntEnum
from io import BytesIO

import trio

from p2pfm.types import Digest, PeerId

CHUNK_BYTES = 262_144
HISTORY_CHUNKS_MAX = 2
"""Chunks of history under way, of all downloads together, while one of this round is."""


class Priority(IntEnum):
    """What a blob is wanted for."""

    ROUND = 0
    """An update of the round that runs: it is scored in seconds, or not at all."""
    HISTORY = 1
    """Catching up, auditing, rewards, the probe set."""


class Blob:
    """One blob as far as it has come, each chunk in its place, and who gave it."""

    def __init__(self, digest: Digest, size_max: int, priority: Priority) -> None:
        self.digest = digest
        self.size_max = size_max
        self.priority = priority
        self.reserved = 0
        """Bytes of the bound of memory that it holds."""
        self.size: int | None = None
        self.givers: dict[int, PeerId] = {}
        """By where the chunk begins."""
        # BytesIO: written in place, and `getvalue` gives its buffer away without a copy.
        self._buffer = BytesIO()
        self._hash = hashlib.sha256()
        self._num_hashed = 0

    def begin(self, size: int) -> None:
        """The size is known now."""
        self.size = size
        self._buffer = BytesIO()
        self._buffer.seek(size - 1)
        self._buffer.write(b"\0")

    def forget_all(self) -> None:
        """Somebody lied about the size, perhaps."""
        self.forget(set(self.givers.values()))
        self.size = None

    def starts(self) -> range:
        """Where chunks begin, or may begin as long as the size is not known."""
        return range(0, self.size or self.size_max, CHUNK_BYTES)

    def missing(self) -> list[int]:
        """Where chunks begin that have not come."""
        return [start for start in self.starts() if start not in self.givers]

    def is_whole(self) -> bool:
        """All chunks have come."""
        return self.size is not None and len(self.givers) == len(self.starts())

    def put(self, start: int, chunk: bytes, giver: PeerId) -> None:
        """A chunk has come."""
        self._buffer.seek(start)
        self._buffer.write(chunk)
        self.givers[start] = giver
        for _ in range(4):  # hashed as it comes: at the end, all at once, it would hold up everything else
            self._hash_next()

    def holds(self, start: int, chunk: bytes) -> bool:
        """Whether the chunk there is this one."""
        with self._buffer.getbuffer() as view:
            return view[start : start + len(chunk)] == chunk

    def forget(self, givers: Iterable[PeerId]) -> None:
        """Drop what these gave."""
        gone = set(givers)
        self.givers = {start: giver for start, giver in self.givers.items() if giver not in gone}
        self._hash, self._num_hashed = hashlib.sha256(), 0

    def is_hashed(self) -> bool:
        """Nothing is left to do for `is_right`."""
        return self._num_hashed == self.size

    def is_right(self) -> bool:
        """Whether all of it together has the digest."""
        while self._hash_next():
            pass
        return self._hash.digest() == self.digest

    def is_right_with(self, claims: dict[int, bytes]) -> bool:
        """The same with other chunks in some places."""
        whole = hashlib.sha256()
        with self._buffer.getbuffer() as view:
            for start in self.starts():
                whole.update(claims.get(start) or view[start : start + CHUNK_BYTES])
        return whole.digest() == self.digest

    def take_data(self) -> bytes:
        """The bytes; the blob is empty afterwards."""
        data = self._buffer.getvalue()
        self._buffer = BytesIO()
        return data

    def _hash_next(self) -> bool:
        if self._num_hashed not in self.givers or self.size is None:
            return False
        end = min(self._num_hashed + CHUNK_BYTES, self.size)
        with self._buffer.getbuffer() as view:
            self._hash.update(view[self._num_hashed : end])
        self._num_hashed = end
        return True


class Memory:
    """The bound of bytes over all downloads: who finds no room waits, this round's before history."""

    def __init__(self, bytes_max: int, make_room: Callable[[], bool]) -> None:
        self.taken = 0
        self._bytes_max = bytes_max
        self._make_room = make_room
        self._of_history = 0
        self._waiting: list[tuple[Priority, int]] = []
        self._num_tickets = 0
        self._changed = trio.Event()

    async def take(self, blob: Blob) -> None:
        """Room for as much as the blob may have; one that is larger than the bound takes all of it."""
        share = self._bytes_max if blob.priority is Priority.ROUND else self._bytes_max // 2
        size = min(blob.size_max, share)
        self._num_tickets += 1
        ticket = blob.priority, self._num_tickets
        self._waiting.append(ticket)
        try:
            while not self._is_turn(ticket, size):
                if ticket == min(self._waiting) and self._make_room():
                    continue
                await self._changed.wait()
        finally:
            self._waiting.remove(ticket)
            self._tell()
        blob.reserved = size
        self._count(blob.priority, size)

    def give_back(self, blob: Blob) -> None:
        """The blob is gone, or its asker's."""
        self._count(blob.priority, -blob.reserved)
        blob.reserved = 0

    def _is_turn(self, ticket: tuple[Priority, int], size: int) -> bool:
        is_free = self.taken + size <= self._bytes_max
        if ticket[0] is Priority.HISTORY:
            return ticket == min(self._waiting) and is_free and self._of_history + size <= self._bytes_max // 2
        return ticket == min(self._waiting) and is_free

    def _count(self, priority: Priority, change: int) -> None:
        self.taken += change
        self._of_history += change if priority is Priority.HISTORY else 0
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Gate:
    """While a blob of this round is under way, history asks for a few chunks at a time only.

    Not for none: who announces blobs that never come must not keep others from catching up.
    """

    def __init__(self) -> None:
        self._num_urgent = 0
        self._num_under_way = 0
        self._changed = trio.Event()

    def enter(self, priority: Priority) -> "_Entered":
        """A download of this priority is under way within the block."""
        return _Entered(self, 1 if priority is Priority.ROUND else 0)

    async def ask(self, priority: Priority, ask: Callable[[], Awaitable[bytes]]) -> bytes:
        """The bytes of one request, made when its turn has come."""
        if priority is Priority.ROUND:
            return await ask()
        while self._num_urgent and self._num_under_way >= HISTORY_CHUNKS_MAX:
            await self._changed.wait()
        self._num_under_way += 1
        try:
            return await ask()
        finally:
            self._num_under_way -= 1
            self._tell()

    def count(self, change: int) -> None:
        """Downloads of this round begin or end."""
        self._num_urgent += change
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class _Entered:
    def __init__(self, gate: Gate, weight: int) -> None:
        self._gate, self._weight = gate, weight

    def __enter__(self) -> None:
        self._gate.count(self._weight)

    def __exit__(self, *_: object) -> None:
        self._gate.count(-self._weight)


class Todo:
    """Chunks to ask for. One that does not come is another provider's then."""

    def __init__(self, starts: Iterable[int]) -> None:
        self._free = deque(starts)
        self._open = set(self._free)
        self._changed = trio.Event()

    def is_done(self) -> bool:
        """All have come."""
        return not self._open

    async def take(self) -> int | None:
        """Where a chunk begins that nobody is asked for; waits for one that may yet fail; None when all have come."""
        while self._open and not self._free:
            await self._changed.wait()
        return self._free.popleft() if self._free else None

    def give_back(self, start: int) -> None:
        """It did not come."""
        if start in self._open:
            self._free.appendleft(start)
            self._tell()

    def finish(self, start: int) -> None:
        """It has come."""
        self._open.discard(start)
        if not self._open:
            self._tell()

    def cut(self, size: int) -> None:
        """The blob ends there."""
        self._free = deque(start for start in self._free if start < size)
        self._open = {start for start in self._open if start < size}
        if not self._open:
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
