"""Virtual time: what happens next. Knows no peer, message or network.

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
        self._due: dict[int, list[Callable[[], None]]] = {}
        """By moment: what happens then, in the order in which it was scheduled."""
        self._moments: list[int] = []
        """A heap of the keys of `_due`: thousands of hosts share most milliseconds."""

    def at(self, when_ms: int, happen: Callable[[], None]) -> None:
        """Let something happen at a moment; never in the past."""
        assert when_ms >= self.now_ms, "what is scheduled lies ahead"
        due = self._due.get(when_ms)
        if due is not None:
            due.append(happen)
            return
        self._due[when_ms] = [happen]
        heapq.heappush(self._moments, when_ms)

    def after(self, delay_ms: int, happen: Callable[[], None]) -> None:
        """Let something happen in `delay_ms` [ms]."""
        self.at(self.now_ms + delay_ms, happen)

    def run(self, until_ms: Millis) -> None:
        """Let happen all that is due up to and including `until_ms`; then that is the time."""
        while self._moments and self._moments[0] <= until_ms:
            when_ms = heapq.heappop(self._moments)
            self.now_ms = Millis(when_ms)
            for happen in self._due[when_ms]:  # what happens now may schedule more for now
                happen()
            del self._due[when_ms]
        self.now_ms = until_ms

    def __len__(self) -> int:
        return sum(map(len, self._due.values()))
