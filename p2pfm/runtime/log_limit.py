"""A bound on what strangers can make a node write into its log: each line of the source has a rate of its own.

Knows only the standard library's logging.
"""

import logging
import time
from collections import OrderedDict

BURST = 100
"""Records that one line of the source may write at once; then one every EVERY_S: ten megabytes a day at most."""
EVERY_S = 1.0
LINES_MAX = 4096
"""Lines of the source remembered: more than all libraries together have."""


class LogLimit(logging.Filter):
    """For a handler: drops what one source line says too often, and tells how much it was with the next record.

    By the place in the source, not by the text: what strangers do varies the text at will.
    """

    def __init__(self, burst: int = BURST, every_s: float = EVERY_S) -> None:
        super().__init__()
        self._burst = burst
        self._every_s = every_s
        self._lines: OrderedDict[tuple[str, int], list[float]] = OrderedDict()
        """Of each line: tokens, when they were counted [s], records dropped since the last one."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this record is written."""
        now = time.monotonic()
        key = (record.pathname, record.lineno)
        line = self._lines.setdefault(key, [float(self._burst), now, 0.0])
        self._lines.move_to_end(key)
        if len(self._lines) > LINES_MAX:
            self._lines.popitem(last=False)
        line[0] = min(self._burst, line[0] + (now - line[1]) / self._every_s)
        line[1] = now
        if line[0] < 1:
            line[2] += 1
            return False
        line[0] -= 1
        if line[2]:
            record.msg, record.args = f"{record.getMessage()} ({line[2]:.0f} more like it were not logged)", None
            line[2] = 0.0
        return True
