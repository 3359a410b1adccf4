"""Who has lately passed the proof of computation, as one evaluator measured it: a moving average a peer.

Knows pass and fail; no measurement, round or message. Integers, so that a log replays everywhere. An average begins
with trust, also after a restart: one of a committee's evaluators decides nothing alone.
"""

from collections.abc import Collection

from p2pfm.types import PeerId

ONE = 1000
"""An average of 1."""

MEMORY = 700
"""What is left of an average after a round [thousandths]: two failures in a row close the gate, and one pass after
them opens it."""

GATE = 500
"""Below this average an update counts as worth nothing [thousandths]."""


class Proofs:
    """Averages of the peers that were asked, in thousandths."""

    def __init__(self) -> None:
        self._averages: dict[PeerId, int] = {}

    def __len__(self) -> int:
        return len(self._averages)

    def add(self, peer: PeerId, is_passed: bool) -> None:
        """A proof was checked."""
        average = self._averages.get(peer, ONE)
        self._averages[peer] = (MEMORY * average + (ONE - MEMORY) * (ONE if is_passed else 0)) // ONE

    def is_trusted(self, peer: PeerId) -> bool:
        """Whether a peer's updates count here."""
        return self._averages.get(peer, ONE) >= GATE

    def keep(self, peers: Collection[PeerId]) -> None:
        """Forget everybody else."""
        self._averages = {peer: average for peer, average in self._averages.items() if peer in peers}
