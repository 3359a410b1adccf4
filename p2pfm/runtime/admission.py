"""How many completions run at once, how many wait for their turn, and how many of either one client may have.

Knows no HTTP and no model.
"""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from p2pfm.config import HttpConfig
from p2pfm.runtime.gateway import Busy


class Admission:
    """First come, first served; who would wait for too long is told at once."""

    def __init__(self, bounds: HttpConfig) -> None:
        self._bounds = bounds
        self._by_client: Counter[str] = Counter()
        """Running and waiting."""
        self._line: dict[trio.Event, int] = {}
        """Whose turn has not come, oldest first, and how many completions each is."""
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        """Completions in the line."""
        return sum(self._line.values())

    @asynccontextmanager
    async def admit(self, client: str, num: int) -> AsyncIterator[None]:
        """Wait for room for `num` completions of `client`; it is free again at the end.

        Raises:
            Busy: no room, and too many wait, or too long; or this client has its share.
        """
        bounds = self._bounds
        if self._by_client[client] + num > bounds.client_requests_max:
            raise Busy(
                f"{self._by_client[client]} of your completions run or wait here, and a client may have "
                f"{bounds.client_requests_max}; wait for one of them"
            )
        must_wait = self._line or self.num_running + num > bounds.requests_max
        if must_wait and self.num_waiting + num > bounds.queue_max:
            raise Busy(f"{self.num_running} completions run here and {self.num_waiting} wait; try again in a moment")
        turn = trio.Event()
        self._line[turn] = num
        self._by_client[client] += num
        try:
            self._let_in()
            if not turn.is_set():
                with trio.move_on_after(bounds.queue_s_max):
                    await turn.wait()
            if not turn.is_set():
                raise Busy(f"no completion ended here within {bounds.queue_s_max:g} s; try again in a moment")
            yield
        finally:
            if self._line.pop(turn, None) is None:  # its turn had come
                self.num_running -= num
            self._by_client[client] -= num
            if not self._by_client[client]:
                del self._by_client[client]
            self._let_in()

    def _let_in(self) -> None:
        while self._line:
            turn, num = next(iter(self._line.items()))
            if self.num_running + num > self._bounds.requests_max:
                return
            del self._line[turn]
            self.num_running += num
            turn.set()
