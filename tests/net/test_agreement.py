"""The simulator tells what real nodes do: one network of eight, run as processes and simulated, round by round.

Same rules, peer ids, registry order, data and learners; the toy's whole probe is measured. Then every certificate says
the same: base and merged base, who is in with which payload, contribution and merge weight, every leaf and the root.

What differs, and is printed: timing (a simulated link and CPU are models); and who said it: the proposer and the
committee's number (drawn from the chain's blocks), which members' vectors the proposer had heard by then (their salts
are secret), and all signatures.
"""

import pytest
from agreement_world import (
    NUM_ROUNDS,
    Reality,
    describe_timing,
    get_content,
    run_for_real,
    run_simulated,
)

from p2pfm.types import Round

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def reality(tmp_path_factory: pytest.TempPathFactory) -> Reality:
    return run_for_real(tmp_path_factory.mktemp("agreement"))


def test_real_and_simulated_certificates_say_the_same(reality: Reality, capsys: pytest.CaptureFixture[str]) -> None:
    simulated = run_simulated(reality, reality.learners)
    for round in map(Round, range(NUM_ROUNDS)):
        (real,) = reality.told.proposals[round]
        (virtual,) = simulated.proposals[round]
        assert get_content(real) == get_content(virtual)
        assert {update.peer for update in real.updates} == set(reality.peers)
        assert sum(leaf.reward_wei != bytes(16) for leaf in real.leaves) > 1, "pay is compared where some is paid"
    with capsys.disabled():
        print("\n" + describe_timing(reality, simulated))


def test_with_other_data_of_one_peer_certificates_say_something_else(reality: Reality) -> None:
    """So the agreement is no accident of what is compared."""
    _, second, *rest = reality.learners
    other = run_simulated(reality, (second, second, *rest))
    for round in map(Round, range(NUM_ROUNDS)):
        real, virtual = (get_content(told.proposals[round][0]) for told in (reality.told, other))
        agreed = {name for name in real if real[name] == virtual[name]}
        assert agreed == ({"round"} if round else {"round", "base", "prev_root"})
