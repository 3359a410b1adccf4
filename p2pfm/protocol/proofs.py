"""Who has lately passed the proof of computation, as one evaluator measured it: a moving average a peer.

Knows pass and fail; no measurement, round or message. Integers, so that a log replays everywhere. An average begins
anew when its evaluator restarts: one of a committee decides nothing alone.
"""

from collections.abc import Collection

from p2pfm.types import PeerId

ONE = 1000
"""An average of 1."""

MEMORY = 900
"""What is left of an average after a round [thousandths]. A proof tells little alone: who works passes 19 of 20, who
does not 7 of 20 (bench/gaming.py), which ten rounds tell apart."""

START = 600
"""Where an average begins [thousandths]: two failures at once close the gate, one pass later opens it."""

GATE = 500
"""Below this average an update counts as worth nothing [thousandths]."""


class Proofs:
    """Averages of the peers that were asked, in thousandths."""

    def __init__(self) -> None:
        self._averages: dict[PeerId, int] = {}

    def __len__(self) -> int:
        return len(self._averages)

    def get_average(self, peer: PeerId) -> int:
        """Of passed proofs [thousandths]."""
        return self._averages.get(peer, START)

    def add(self, peer: PeerId, is_passed: bool) -> None:
        """A proof was checked."""
        average = self.get_average(peer)
        self._averages[peer] = (MEMORY * average + (ONE - MEMORY) * (ONE if is_passed else 0)) // ONE

    def is_trusted(self, peer: PeerId) -> bool:
        """Whether a peer's updates count here."""
        return self.get_average(peer) >= GATE

    def keep(self, peers: Collection[PeerId]) -> None:
        """Forget everybody else."""
        self._averages = {peer: average for peer, average in self._averages.items() if peer in peers}
