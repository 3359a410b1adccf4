"""How much of a machine's time training may take while streams are served: the operator's `serving.train_share`.

Knows clocks and whether somebody waits for tokens; no model, round or stream. Training runs in bursts, each a pass over
a batch. After a burst it rests while streams are served, so that of the time in which both want the machine it gets its
share. While nobody waits for tokens it does not rest.
"""

import threading
import time
from collections.abc import Callable

REST_S_MAX = 30.0
"""No rest is longer, whatever a burst took."""

LOOK_S = 0.02
"""How often a rest looks whether streams are still served."""


class TrainShare:
    """Called by the thread that trains, before each burst."""

    def __init__(self, share: float, is_serving: Callable[[], bool]) -> None:
        """`is_serving`: whether streams wait for tokens now, asked from any thread. `share`: above 0, at most 1."""
        assert 0 < share <= 1
        self._rests_per_work = 1 / share - 1
        self._is_serving = is_serving
        self._thread = threading.local()

    def pause(self, *_: object) -> None:
        """Rest as this thread's work since the last call demands. Fits torch's forward pre-hooks, hence the arguments.

        Work is counted in the thread's CPU time: what it waited for, between rounds or for a core, is none.
        """
        worked_s = time.thread_time() - getattr(self._thread, "cpu_s", time.thread_time())
        rest_until = time.monotonic() + min(worked_s * self._rests_per_work, REST_S_MAX)
        while self._is_serving() and (left_s := rest_until - time.monotonic()) > 0:
            time.sleep(min(LOOK_S, left_s))
        self._thread.cpu_s = time.thread_time()
