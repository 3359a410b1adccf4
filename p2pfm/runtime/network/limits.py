"""What one node takes from any sender: bounds, rates, and the word for who breaks a rule.

Plain data; knows no socket.
"""

from collections.abc import Callable
from typing import TypeAlias

from libp2p.io.exceptions import IOException

Blame: TypeAlias = Callable[[str, str], None]
"""Called with a peer id (base58) and the rule that it broke."""


class RuleBroken(IOException):  # type: ignore[misc]
    """A peer broke a rule of the wire; its connection ends."""


class TokenBucket:
    """`burst` events at once, `per_s` in the long run; the caller brings the time [s]."""

    def __init__(self, burst: float, per_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._tokens = burst
        self._at = 0.0

    def take(self, now: float, amount: int = 1) -> float:
        """Take tokens; returns 0.0 when there were so many, else the seconds until there are (nothing is taken)."""
        if self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens >= amount:
            self._tokens -= amount
            return 0.0
        return (amount - self._tokens) / self._per_s
