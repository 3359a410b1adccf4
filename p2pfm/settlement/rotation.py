"""When the next committee is to be drawn, and whose turn that is: one rule for nodes and simulated worlds.

Anyone may draw, so what matters is that one does: once an epoch, in a round's first half (then all have read of it
before the next round begins, which keeps the roster that it began with), and when a committee certifies nothing any
more. Never twice in one round, nor while a certificate waits: the chain takes one of the committee before, but not of
the one before that. Knows no clock and no chain; who looks tells what it saw.
"""

from p2pfm.settlement.ledger import Roster, SettledRound
from p2pfm.types import MemberIndex, Round


class Rotation:
    """What one observer of the chain knows of its draws."""

    def __init__(self, committee_size: int, rounds_per_epoch: int) -> None:
        self._committee_size = committee_size
        self._rounds_per_epoch = rounds_per_epoch
        self._roster_epoch = -1
        self._head_round = -1
        self._drawn_for = 0
        """The settlement epoch in which the committee was drawn, as far as is known here."""
        self._drawn_in = -1
        """The round, by the clock, in which the last draw was seen or tried."""
        self._moved_in = 0
        """The round in which the chain told anything new last."""

    def on_chain(self, roster: Roster, head: SettledRound | None, now: Round) -> None:
        """What the chain says in round `now`."""
        head_round = head.round if head else -1
        if roster.epoch > self._roster_epoch:
            # Whoever drew: one draw an epoch is enough.
            self._drawn_for, self._drawn_in = self._get_epoch(head_round), now
        if (roster.epoch, head_round) != (self._roster_epoch, self._head_round):
            self._moved_in = now
        self._roster_epoch, self._head_round = roster.epoch, head_round

    def on_tried(self, now: Round) -> None:
        """It was this observer's turn, whatever came of it."""
        self._drawn_for, self._drawn_in, self._moved_in = self._get_epoch(self._head_round), now, now

    def is_due(self, roster: Roster, now: Round) -> bool:
        """Whether the next committee is to be drawn as soon as it may be (`may_draw`); `now`: by the clock."""
        if self.has_gap(roster):
            return True
        if len(roster.members) <= self._committee_size:
            return False
        is_stuck = now - self._moved_in > self._rounds_per_epoch
        return is_stuck or self._get_epoch(self._head_round) > self._drawn_for

    def may_draw(self, roster: Roster, now: Round, *, is_early: bool, has_unsettled: bool) -> bool:
        """Whether this is the moment for it; for an empty seat every moment is.

        Args:
            is_early: this is the round's first half.
            has_unsettled: certificates wait for the chain: the committee works, and a draw could outdate them.
        """
        return self.has_gap(roster) or (is_early and not has_unsettled and self._drawn_in != now)

    def has_gap(self, roster: Roster) -> bool:
        """Whether there is room for newcomers, or somebody on the committee was slashed, or leaves."""
        active = {member.index for member in roster.members if member.active}
        has_room = len(roster.committee) < min(self._committee_size, len(active))
        return has_room or not active.issuperset(roster.committee)

    def _get_epoch(self, head_round: int) -> int:
        return max(head_round, 0) // self._rounds_per_epoch


def is_turn(roster: Roster, member: MemberIndex, turn: int) -> bool:
    """Whether the `turn`-th chance to draw is this member's: the committee's in its order, then everybody's, and so on,
    so that no two draw at once and a dead one costs one turn.
    """
    active = tuple(one.index for one in roster.members if one.active)
    seated = tuple(index for index in roster.committee if index in active)
    order = (*seated, *(index for index in active if index not in seated))
    return order[turn % len(order)] == member
