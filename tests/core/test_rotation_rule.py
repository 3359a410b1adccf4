"""When the next committee is drawn: once an epoch, in TRAIN, for newcomers, and when the old one certifies nothing."""

import msgspec
import pytest
from peer_bench import make_roster, settled_as

from p2pfm.settlement.ledger import Roster
from p2pfm.settlement.rotation import Rotation, is_turn
from p2pfm.types import Digest, MemberIndex, Round

SEATS = 3
SEATED = (MemberIndex(0), MemberIndex(1), MemberIndex(2))
ROSTER = make_roster(committee=SEATED)
EPOCH = 2
ZERO = Digest(bytes(32))


def look(
    rotation: Rotation, head: int | None, now: int, roster: Roster = ROSTER, *, has_unsettled: bool = False
) -> bool:
    """Whether a committee is drawn now, in a round's first half."""
    rotation.on_chain(roster, None if head is None else settled_as(head, ZERO), Round(now))
    may_draw = rotation.may_draw(roster, Round(now), is_early=True, has_unsettled=has_unsettled)
    return may_draw and rotation.is_due(roster, Round(now))


def test_a_committee_is_drawn_once_an_epoch() -> None:
    assert len(ROSTER.members) > SEATS
    rotation = Rotation(SEATS, EPOCH)
    assert not look(rotation, None, 0)
    assert not look(rotation, 1, 2), "its epoch is not over before the next one has a round on chain"
    assert look(rotation, 2, 3)
    drawn = msgspec.structs.replace(ROSTER, epoch=ROSTER.epoch + 1)
    assert not look(rotation, 2, 3, roster=drawn), "whoever drew, one draw is enough"
    assert not look(rotation, 3, 4, roster=drawn)
    assert look(rotation, 4, 5, roster=drawn)


def test_no_two_draws_fall_into_one_round_however_late_a_round_reaches_the_chain() -> None:
    rotation = Rotation(SEATS, 1)
    look(rotation, 1, 1)
    rotation.on_tried(Round(2))
    assert look(rotation, 2, 4), "the moment in round 3 was missed"
    drawn = msgspec.structs.replace(ROSTER, epoch=ROSTER.epoch + 1)
    assert not look(rotation, 3, 4, roster=drawn), "round 4 began with the committee before: it would be outdated"
    assert not look(rotation, 3, 5, roster=drawn, has_unsettled=True), "round 4 waits, and would be outdated"
    assert look(rotation, 4, 5, roster=drawn)


def test_who_has_tried_waits_for_the_next_epoch() -> None:
    rotation = Rotation(SEATS, EPOCH)
    look(rotation, None, 0)
    assert look(rotation, 2, 3)
    rotation.on_tried(Round(3))
    assert not look(rotation, 2, 3)
    assert look(rotation, 4, 5)


def test_a_committee_that_certifies_nothing_for_longer_than_an_epoch_is_replaced() -> None:
    rotation = Rotation(SEATS, EPOCH)
    assert not look(rotation, 0, 1)
    assert not look(rotation, 0, 1 + EPOCH)
    assert look(rotation, 0, 2 + EPOCH)
    assert not look(rotation, 0, 2 + EPOCH, has_unsettled=True), "it works, and the chain is to blame"
    rotation.on_tried(Round(2 + EPOCH))
    assert not look(rotation, 0, 3 + EPOCH)


def test_only_newcomers_and_gaps_do_not_wait_for_a_round() -> None:
    for committee in ((), SEATED[:2], (*SEATED[:2], MemberIndex(99))):
        rotation, roster = Rotation(SEATS, EPOCH), make_roster(committee=committee)
        assert look(rotation, None, 0, roster)
        assert rotation.may_draw(roster, Round(0), is_early=False, has_unsettled=True)
    assert not rotation.may_draw(ROSTER, Round(1), is_early=False, has_unsettled=False)
    assert rotation.may_draw(ROSTER, Round(1), is_early=True, has_unsettled=False)


def test_a_committee_of_all_members_is_never_drawn_anew() -> None:
    everybody = tuple(member.index for member in ROSTER.members)
    rotation = Rotation(len(everybody), 1)
    assert not any(look(rotation, round, round + 1, make_roster(committee=everybody)) for round in range(5))
    assert not look(rotation, 4, 99, make_roster(committee=everybody))


@pytest.mark.parametrize("first", [0, 17])
def test_everybody_has_a_turn_of_its_own_the_committee_first(first: int) -> None:
    members = [member.index for member in ROSTER.members]
    turns = [[index for index in members if is_turn(ROSTER, index, first + turn)] for turn in range(len(members))]
    assert all(len(turn) == 1 for turn in turns)
    assert sorted(index for [index] in turns) == members
    if first == 0:
        assert [index for [index] in turns[:SEATS]] == list(SEATED)
