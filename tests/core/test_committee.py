"""What a committee certifies, from certified state and revealed vectors."""

import msgspec
from peer_bench import BASE, CONFIG, NAMES, ROSTER, announcement_of, payload_of, reveal_of

from p2pfm.config import SettlementConfig
from p2pfm.messages import Proposal
from p2pfm.protocol.committee import MERGE_CAP, draft_proposal
from p2pfm.types import WEIGHT_ONE, PeerId, Round

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
