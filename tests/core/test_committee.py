"""What a committee certifies, from certified state and revealed vectors."""

import msgspec
import pytest
from peer_bench import BASE, CONFIG, NAMES, ROSTER, announcement_of, payload_of, reveal_of

from p2pfm.config import SettlementConfig
from p2pfm.errors import Reject
from p2pfm.messages import Proposal, Service
from p2pfm.protocol.committee import MERGE_CAP, draft_proposal, validate_reveals, validate_vector
from p2pfm.settlement.rewards import from_wire
from p2pfm.types import WEIGHT_ONE, MemberIndex, PeerId, Round

EPOCHS_OF_THREE = msgspec.structs.replace(CONFIG, settlement=SettlementConfig(rounds_per_epoch=3))
SHARE = WEIGHT_ONE // len(NAMES)


def draft(round: int, values: tuple[int, ...], previous: Proposal | None = None) -> Proposal:
    reveals = [reveal_of(member, Round(round), values) for member in range(4)]
    announcements = {payload_of(name, Round(round)): announcement_of(name, Round(round)) for name in NAMES}
    return draft_proposal(EPOCHS_OF_THREE, ROSTER, previous, Round(round), BASE, reveals, announcements)


def weights_of(proposal: Proposal) -> dict[PeerId, int]:
    return {update.peer: update.weight for update in proposal.updates}


def test_merge_weights_follow_what_peers_contributed_in_the_epoch_so_far() -> None:
    second = draft(1, (20, 30, 40, 10), draft(0, (10, 20, 30, 40)))
    assert [weights_of(second)[name] for name in NAMES] == [150_000_000, 250_000_000, 350_000_000, 250_000_000]
    assert [update.contribution for update in sorted(second.updates, key=lambda u: u.peer)] == [20, 30, 40, 10]


def test_a_new_epoch_starts_from_nothing() -> None:
    previous = None
    for round in range(3):
        previous = draft(round, (100, 0, 0, 0), previous)
    assert weights_of(draft(3, (10, 20, 30, 40), previous)) == weights_of(draft(0, (10, 20, 30, 40)))


def test_one_bad_measurement_does_not_silence_a_peer_but_harm_does() -> None:
    first = draft(0, (25, 25, 25, 25))
    noise = weights_of(draft(1, (-5, 25, 25, 25), first))
    assert 0 < noise[NAMES[0]] < noise[NAMES[1]]
    harm = weights_of(draft(1, (-50, 25, 25, 25), first))
    assert harm[NAMES[0]] == 0


def test_an_update_never_weighs_more_than_twice_its_share() -> None:
    second = draft(1, (40, 0, 0, 0), draft(0, (40, 10, 0, 0)))
    assert weights_of(second)[NAMES[0]] == MERGE_CAP * SHARE


# --- serving

SERVED = msgspec.structs.replace(CONFIG, settlement=SettlementConfig(rounds_per_epoch=2, serving_per_epoch_pfm=10))


def draft_served(round: int, shares: list[dict[int, int]], previous: Proposal | None = None) -> Proposal:
    """A round in which member i says that replicas are due `shares[i]` [parts of a billion]."""
    reveals = [
        msgspec.structs.replace(
            reveal_of(member, Round(round)),
            served=tuple(Service(MemberIndex(replica), share) for replica, share in sorted(said.items())),
        )
        for member, said in enumerate(shares)
    ]
    announcements = {payload_of(name, Round(round)): announcement_of(name, Round(round)) for name in NAMES}
    return draft_proposal(SERVED, ROSTER, previous, Round(round), BASE, reveals, announcements)


def served_by(proposal: Proposal) -> list[float]:
    return [leaf.served_wei / 10**18 for leaf in from_wire(proposal.leaves)]


def test_replicas_are_paid_the_median_of_what_the_committee_saw_and_only_when_an_epoch_ends() -> None:
    said = [{1: 500_000_000, 2: 300_000_000}, {1: 400_000_000}, {1: 400_000_000, 3: 10**9}, {1: 10**9}]
    first = draft_served(0, said)
    assert served_by(first) == [0, 0, 0, 0]
    second = draft_served(1, said, first)
    assert served_by(second) == [0, 4, 0, 0]
    learned = [leaf.cumulative_wei for leaf in from_wire(second.leaves)]
    assert sum(learned) <= SERVED.pool_per_epoch() < sum(learned) + 4, "serving is paid beside learning"
    third = draft_served(2, said, second)
    assert served_by(third) == [0, 4, 0, 0]
    assert served_by(draft_served(3, said, third)) == [0, 8, 0, 0]


def test_medians_that_add_up_to_more_than_a_whole_are_cut() -> None:
    said = [{0: 500_000_000, 1: 500_000_000}, {0: 500_000_000, 2: 500_000_000}, {1: 500_000_000, 2: 500_000_000}]
    assert served_by(draft_served(1, said)) == pytest.approx([10 / 3, 10 / 3, 10 / 3, 0])


def test_a_replica_that_is_no_member_makes_a_proposal_void() -> None:
    with pytest.raises(Reject, match="no member"):
        validate_reveals(
            ROSTER,
            [reveal := msgspec.structs.replace(reveal_of(0), served=(Service(MemberIndex(77), 5),))],
            Round(0),
            {MemberIndex(0): (reveal.commitment,)},
            {},
        )


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (((2, 5), (1, 5)), "sorted"),
        (((1, 5), (1, 5)), "twice"),
        (((0, 10**9), (1, 1)), "add up"),
    ],
)
def test_a_reveal_of_impossible_services_is_refused(said: tuple[tuple[int, int], ...], reason: str) -> None:
    served = tuple(Service(MemberIndex(member), share) for member, share in said)
    with pytest.raises(Reject, match=reason):
        validate_vector(msgspec.structs.replace(reveal_of(0), served=served), 4)
