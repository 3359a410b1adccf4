"""The rounds that a peer holds certified, beside the newest one that the chain took: the chain is the arbiter.

Knows roots and nothing of what they pay, who signed them, or how a certificate travels.
"""

import itertools

from p2pfm.messages import NO_DIGEST, Proposal
from p2pfm.settlement.ledger import SettledRound
from p2pfm.types import Digest, Round

ROOTS_MAX = 64
"""Certified roots remembered, to compare with the chain's."""


class History:
    """One line of certified rounds, each following the one before it without a gap."""

    def __init__(self, head: Proposal | None) -> None:
        """`head`: the newest round held certified, as it lies on disk."""
        self.settled: SettledRound | None = None
        """The newest round on chain."""
        self.roots: dict[Round, Digest] = {}
        """By round, in order."""
        self._is_whole = False
        """Nothing lies between the first of the roots and the network's beginning."""
        self._judged: tuple[SettledRound | None, dict[Round, Digest], bool] = (None, self.roots, False)
        """What `is_orphaned` was last asked about, and its answer: it is asked at every sync, and seldom changes."""
        if head is not None:
            self.extend(head)

    @property
    def head_round(self) -> int:
        """The newest certified round; -1: none."""
        return next(reversed(self.roots), -1)

    def extend(self, proposal: Proposal) -> None:
        """Remember a certified root with those that it follows; others are of another history."""
        older = {round: root for round, root in self.roots.items() if round < proposal.round}
        while older and older[next(reversed(older))] != proposal.prev_root:
            older.popitem()
        self._is_whole = proposal.prev_root == NO_DIGEST or (self._is_whole and bool(older))
        self.roots = {**older, proposal.round: proposal.root}
        if len(self.roots) > ROOTS_MAX:
            del self.roots[next(iter(self.roots))]
            self._is_whole = False

    def rewind(self) -> None:
        """Forget the rounds that the chain no longer holds, and its newest one: that is yet to be adopted again."""
        first_void = self.settled.round if self.settled else Round(-1)
        self.roots = {round: root for round, root in self.roots.items() if round < first_void}

    def is_behind(self) -> bool:
        """The chain holds a newer round: its certificate, and the base to work from, are yet to come."""
        return self.settled is not None and self.settled.round > self.head_round

    def is_orphaned(self) -> bool:
        """The chain took another root than we did, for a round that we hold or after a root that we hold."""
        settled, roots, is_orphaned = self._judged
        if settled is not self.settled or roots is not self.roots:
            is_orphaned = self._contradicts_chain()
            self._judged = (self.settled, self.roots, is_orphaned)
        return is_orphaned

    def _contradicts_chain(self) -> bool:
        settled, lineage = self.settled, list(self.roots.items())
        if settled is None:
            return False
        pairs = itertools.pairwise([(Round(-1), NO_DIGEST), *lineage] if self._is_whole else lineage)
        is_passed = any(_contradicts(settled, round, previous, root) for (_, previous), (round, root) in pairs)
        return is_passed or self.roots.get(settled.round, settled.root) != settled.root

    def is_progress(self, proposal: Proposal) -> bool:
        """Newer than the head, or of the chain's history where the chain contradicts ours."""
        settled = self.settled
        if settled and _contradicts(settled, proposal.round, proposal.prev_root, proposal.root):
            return False
        if proposal.round > self.head_round:
            return True
        is_ours = self.roots.get(proposal.round) == proposal.root
        return bool(settled and self.is_orphaned() and proposal.round >= settled.round and not is_ours)


def _contradicts(settled: SettledRound, round: Round, prev_root: Digest, root: Digest) -> bool:
    """Whether a round cannot be in the same history as the one that the chain took.

    It is the same round with another root, or another round that follows the same root (a round that changed nothing
    has the root that it follows, and tells nothing).
    """
    if round == settled.round:
        return root != settled.root
    return prev_root == settled.prev_root and settled.prev_root not in (settled.root, root)
