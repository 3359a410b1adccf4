"""Is this machine's clock right? What the peers' clocks say, compared with it.

Rounds follow the clock, so a node whose clock is off is alone in its round; nobody else notices, and only its operator
can mend it. Nothing here moves a clock, and no rule depends on it. Knows no socket; times are arguments.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from p2pfm.config import PhaseConfig
from p2pfm.types import Millis, PeerId

TELLERS_MIN, TELLERS_MAX = 3, 256
"""Peers whose word is waited for (all, where fewer are connected), and peers whose word is kept."""


def now_ms() -> Millis:
    """The wall clock."""
    return Millis(time.time_ns() // 1_000_000)


def compute_offset_max(phases: PhaseConfig) -> Millis:
    """Half the shortest phase: who is further off misses it, or speaks before others listen."""
    return Millis(
        min(
            phases.train_ms,
            phases.exchange_ms,
            phases.score_ms,
            phases.reveal_ms,
            phases.attest_ms,
            phases.merge_ms,
        )
        // 2
    )


@dataclass(frozen=True, slots=True)
class _Word:
    ahead_of_monotonic_ms: float
    doubt_ms: float
    """Half the round trip: the answer was given somewhere within it."""


class PeerClocks:
    """What connected peers told of their clocks; `monotonic_ms` is of one clock that nobody sets.

    The median counts: fewer than half of the peers cannot move it beyond what honest ones say.
    """

    def __init__(self) -> None:
        self._words: dict[PeerId, _Word] = {}

    def hear(self, peer: PeerId, clock_ms: int, asked_ms: float, answered_ms: float) -> None:
        """`peer` said `clock_ms` between these two moments of the monotonic clock."""
        self._words.pop(peer, None)
        self._words[peer] = _Word(clock_ms - (asked_ms + answered_ms) / 2, (answered_ms - asked_ms) / 2)
        if len(self._words) > TELLERS_MAX:
            del self._words[next(iter(self._words))]

    def compute_offset(
        self, connected: Collection[PeerId], wall_ms: Millis, monotonic_ms: float
    ) -> tuple[int | None, int]:
        """How far this clock is ahead of the median peer's beyond doubt [ms] (None: too few told), and of how many.

        Own wall time is read now, not when they told: a clock that was set meanwhile is right at once.
        """
        told = [word for peer, word in self._words.items() if peer in connected]
        if not told or len(told) < min(TELLERS_MIN, len(connected)):
            return None, 0  # or the first to tell could say anything
        offsets = []
        for word in told:
            offset = wall_ms - monotonic_ms - word.ahead_of_monotonic_ms
            beyond_doubt = max(0.0, abs(offset) - word.doubt_ms)
            offsets.append(round(beyond_doubt if offset > 0 else -beyond_doubt))
        offsets.sort()
        middle = offsets[(len(offsets) - 1) // 2], offsets[len(offsets) // 2]
        return min(middle, key=abs), len(told)  # half of the peers accuse nobody


@dataclass(slots=True)
class ClockReport:
    """What the operator is told."""

    offset_max_ms: Millis
    offset_ms: int | None = None
    """Ahead of the median peer."""
    num_peers: int = 0
    _was_off: bool = False

    def update(self, offset_ms: int | None, num_peers: int) -> str:
        """Take a new measurement; returns a warning when the clock has just been found off, else ""."""
        self.offset_ms, self.num_peers = offset_ms, num_peers
        was_off, self._was_off = self._was_off, self.is_off()
        if not self._was_off or was_off or offset_ms is None:
            return ""
        return (
            f"this machine's clock is {describe_offset(offset_ms)} the median of {num_peers} peers; rounds follow the "
            f"clock, so this node is not heard beyond {self.offset_max_ms / 1000:g} s: set it (NTP)"
        )

    def is_off(self) -> bool:
        """Further than rounds forgive."""
        return self.offset_ms is not None and abs(self.offset_ms) > self.offset_max_ms

    def to_status(self) -> dict[str, Any]:
        """For /status."""
        return {
            "offset_ms": self.offset_ms,
            "num_peers": self.num_peers,
            "offset_max_ms": self.offset_max_ms,
            "is_off": self.is_off(),
        }


def describe_offset(offset_ms: int) -> str:
    """For people: "300.0 s ahead of"."""
    return f"{abs(offset_ms) / 1000:.1f} s {'ahead of' if offset_ms > 0 else 'behind'}"
