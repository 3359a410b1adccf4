"""Virtual time: a heap of what happens next. Knows no peer, message or network.

Two things due in one millisecond happen in the order in which they were scheduled, so a run depends on nothing but its
seed.
"""

import heapq
from collections.abc import Callable

from p2pfm.types import Millis


class Schedule:
    """The clock of a simulated world; it moves only from one due moment to the next."""

    def __init__(self, start_ms: Millis) -> None:
        self.now_ms = start_ms
        self._num_scheduled = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []

    def at(self, when_ms: int, happen: Callable[[], None]) -> None:
        """Let something happen at a moment; never in the past."""
        assert when_ms >= self.now_ms, "what is scheduled lies ahead"
        self._num_scheduled += 1
        heapq.heappush(self._heap, (when_ms, self._num_scheduled, happen))

    def after(self, delay_ms: int, happen: Callable[[], None]) -> None:
        """Let something happen in `delay_ms` [ms]."""
        self.at(self.now_ms + delay_ms, happen)

    def run(self, until_ms: Millis) -> None:
        """Let happen all that is due up to and including `until_ms`; then that is the time."""
        while self._heap and self._heap[0][0] <= until_ms:
            when_ms, _, happen = heapq.heappop(self._heap)
            self.now_ms = Millis(when_ms)
            happen()
        self.now_ms = until_ms

    def __len__(self) -> int:
        return len(self._heap)
