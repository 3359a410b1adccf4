"""How a process that serves ends when it is told to: in order, soon, and at once for who asks twice.

Work in a thread cannot be stopped: a chain that does not answer holds one for 20 s a request, a model for longer. What
must last is written in one step (`runtime.files`, SQLite), so ending without those threads loses nothing but time.
"""

import logging
import os
import signal
import threading
from types import FrameType

import trio

SIGNALS = (signal.SIGINT, signal.SIGTERM)
END_S = 4.0
"""So long may an end in order take; less than whoever started us waits (`tied.STOP_S`) before killing us [s]."""
BY_SIGNAL = 128
"""What shells add to a signal's number: 130 is Ctrl-C."""

log = logging.getLogger(__name__)


async def cancel_on_signal(scope: trio.CancelScope) -> None:
    """Cancel `scope` at the first SIGINT or SIGTERM; this process ends within `END_S` then, or at the next signal."""
    for known in SIGNALS:  # what the receiver puts back when it closes, and to which it hands what came meanwhile
        signal.signal(known, _end_at_once)
    with trio.open_signal_receiver(*SIGNALS) as signals:
        number = await anext(signals)
    log.info("ending on %s", signal.Signals(number).name)
    timer = threading.Timer(END_S, _end_without_waiting)
    timer.daemon = True
    timer.start()
    scope.cancel()


def _end_at_once(number: int, _: FrameType | None) -> None:
    os._exit(BY_SIGNAL + number)


def _end_without_waiting() -> None:
    log.warning("something does not end, such as a chain that does not answer: ending without it; nothing is lost")
    os._exit(0)
