"""What is held for slow peers: requests half read, replies half written. Bounded over all of them together.

By age, not by peer: an identity costs nothing, and an honest transfer is short, so the oldest goes first. Knows trio's
scopes; no stream.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Holding:
    """One exchange's bytes. Ages from its first byte on."""

    def __init__(self, held: "HeldBytes") -> None:
        self._held = held
        self.scope = trio.CancelScope()
        self.size = 0

    def grow(self, size: int) -> None:
        """So many bytes more are held."""
        self._held.add(self, size)

    @property
    def was_dropped(self) -> bool:
        """Whether it had to make room."""
        return self.scope.cancelled_caught


class HeldBytes:
    """The bytes of all exchanges under way."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._holdings: dict[Holding, None] = {}
        """The oldest first."""
        self.total = 0
        self.num_dropped = 0

    @contextmanager
    def hold(self) -> Iterator[Holding]:
        """An exchange: the block is cancelled, and left, when others need the room."""
        holding = Holding(self)
        with holding.scope:
            try:
                yield holding
            finally:
                self._remove(holding)

    def add(self, holding: Holding, size: int) -> None:
        """Count bytes; cancels the oldest exchanges while there are too many."""
        if holding.scope.cancel_called:
            return
        self._holdings.setdefault(holding)
        holding.size += size
        self.total += size
        while self.total > self._bytes_max:
            oldest = next(iter(self._holdings))
            oldest.scope.cancel()
            self.num_dropped += 1
            self._remove(oldest)

    def _remove(self, holding: Holding) -> None:
        if holding in self._holdings:
            del self._holdings[holding]
            self.total -= holding.size
