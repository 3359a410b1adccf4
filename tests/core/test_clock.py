"""What a node is told of its own clock: by the median peer, and never more than a bounded table."""

from hypothesis import given
from hypothesis import strategies as st

from p2pfm.config import PhaseConfig
from p2pfm.runtime.clock import TELLERS_MAX, ClockReport, PeerClocks, compute_offset_max
from p2pfm.types import Millis, PeerId

WALL = Millis(1_800_000_000_000)
MONOTONIC = 50_000.0


def name(number: int) -> PeerId:
    return PeerId(f"peer {number}")


def clocks_of(*errors_ms: int, round_trip_ms: float = 0.0) -> PeerClocks:
    """Peers whose clocks are wrong by so much, asked now."""
    clocks = PeerClocks()
    for number, error_ms in enumerate(errors_ms):
        asked_ms = MONOTONIC - round_trip_ms / 2
        clocks.hear(name(number), WALL + error_ms, asked_ms, asked_ms + round_trip_ms)
    return clocks


def everybody(count: int) -> list[PeerId]:
    return [name(number) for number in range(count)]


@given(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=9),
    st.lists(st.integers(0, 2**63 - 1), max_size=8),
    st.integers(-(10**6), 10**6),
)
def test_liars_below_half_cannot_move_it_beyond_what_honest_peers_say(
    honest: list[int], lies: list[int], ahead_ms: int
) -> None:
    lies = lies[: len(honest) - 1]
    clocks = clocks_of(*honest, *(lie - WALL for lie in lies))
    peers = everybody(len(honest) + len(lies))
    offset, count = clocks.compute_offset(peers, Millis(WALL + ahead_ms), MONOTONIC)
    assert count == len(peers)
    assert offset is not None
    assert ahead_ms - max(honest) - 1 <= offset <= ahead_ms - min(honest) + 1


def test_only_connected_peers_count_and_nobody_is_nothing() -> None:
    clocks = clocks_of(0, -300_000)
    assert clocks.compute_offset([], WALL, MONOTONIC) == (None, 0)
    assert clocks.compute_offset([name(1)], WALL, MONOTONIC) == (300_000, 1)


def test_one_liar_of_two_or_the_first_of_three_to_tell_accuses_nobody() -> None:
    for lie_ms in (-300_000, 300_000):
        clocks = clocks_of(lie_ms, 0)
        assert clocks.compute_offset(everybody(2), WALL, MONOTONIC) == (0, 2)
        assert clocks.compute_offset(everybody(3), WALL, MONOTONIC) == (None, 0)


def test_a_clock_that_is_set_is_right_at_once() -> None:
    clocks = clocks_of(0, 0, 0)
    later = MONOTONIC + 60_000
    assert clocks.compute_offset(everybody(3), Millis(WALL + 360_000), later) == (300_000, 3)
    assert clocks.compute_offset(everybody(3), Millis(WALL + 60_000), later) == (0, 3)


def test_a_slow_answer_is_no_offset() -> None:
    clocks = clocks_of(-900, round_trip_ms=2000)
    assert clocks.compute_offset([name(0)], WALL, MONOTONIC) == (0, 1)
    assert clocks_of(-1500, round_trip_ms=2000).compute_offset([name(0)], WALL, MONOTONIC) == (500, 1)


def test_the_table_is_bounded() -> None:
    clocks = clocks_of(*[0] * (TELLERS_MAX + 10))
    assert clocks.compute_offset(everybody(TELLERS_MAX + 10), WALL, MONOTONIC) == (0, TELLERS_MAX)


def test_the_operator_is_warned_once_until_it_was_right_again() -> None:
    report = ClockReport(compute_offset_max(PhaseConfig()))
    assert report.offset_max_ms == 5000
    warnings = [report.update(offset_ms, 3) for offset_ms in (0, 5000, 300_000, 300_001, -5, -300_000)]
    assert [bool(warning) for warning in warnings] == [False, False, True, False, False, True]
    assert "300.0 s ahead of the median of 3 peers" in warnings[2]
    assert "300.0 s behind the median of 3 peers" in warnings[5]
