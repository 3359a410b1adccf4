"""What a coalition is worth: a function of a bit mask (bit i set: player i is in), and its memory.

Knows no model and no peer.
"""

from collections.abc import Callable

Utility = Callable[[int], float]
"""Utility of a coalition [nats/token in a round's game]."""


class Cached:
    """A utility that evaluates each coalition once. Holds at most one number a coalition asked for."""

    def __init__(self, utility: Utility) -> None:
        """Wrap `utility`, which must be deterministic."""
        self._utility = utility
        self._known: dict[int, float] = {}

    def __call__(self, coalition: int) -> float:
        """The coalition's utility."""
        if coalition not in self._known:
            self._known[coalition] = self._utility(coalition)
        return self._known[coalition]

    @property
    def num_evaluations(self) -> int:
        """How often the wrapped utility was asked."""
        return len(self._known)
