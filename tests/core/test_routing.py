import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfm.errors import Reject
from p2pfm.messages import Presence
from p2pfm.serving.routing import (
    BACKOFF_MS,
    BACKOFF_MS_MAX,
    BAN_MS,
    FIRST_TOKENS_MAX,
    FIRST_TOKENS_MIN,
    HEDGES_SAVED_MAX,
    LOCAL_MARGIN,
    STREAMS_PER_HEDGE,
    TTL_MS_MAX,
    AdaptiveDeadline,
    FirstTokens,
    HedgeBudget,
    Pace,
    ReplicaTable,
    Typical,
    choose,
)
from p2pfm.types import Digest, Millis, PeerId

V1, V2 = Digest(b"1" * 32), Digest(b"2" * 32)
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
NOW = Millis(1_000_000)


def record(
    peer: PeerId, sequence: int = 1, versions=(V1,), sessions: int = 0, ttl_ms: int = 15_000, **more
) -> Presence:
    return Presence(peer, versions, sessions, 4, ttl_ms, sequence, **more)


def table_of(*records: Presence) -> ReplicaTable:
    table = ReplicaTable()
    for each in records:
        assert table.on_presence(each.peer, each, NOW)
    return table


def order(
    table: ReplicaTable, version=V1, local=A, policy="prefer", now=NOW, exclude=frozenset()
) -> tuple[PeerId, ...]:
    return choose(table.live(now), version, local, policy, now, exclude)


def test_only_replicas_of_the_version_are_candidates() -> None:
    table = table_of(record(A), record(B, versions=(V2,)), record(C, versions=(V2, V1)))
    assert set(order(table)) == {A, C}
    assert set(order(table, V2)) == {B, C}
    assert order(table, exclude={A, C}) == ()


def test_policy_places_the_local_replica_first_last_or_alone() -> None:
    table = table_of(record(A, sessions=2), record(B), record(C))
    assert order(table, policy="prefer")[0] == A
    assert order(table, policy="avoid")[-1] == A
    assert order(table, policy="only") == (A,)


def test_a_full_replica_stands_last_even_if_it_is_local() -> None:
    table = table_of(record(A, sessions=4), record(B, sessions=3))
    assert order(table) == (B, A)


def test_the_faster_and_the_less_loaded_replica_comes_first() -> None:
    table = table_of(record(B), record(C))
    table.on_first_token(B, 300.0)
    table.on_first_token(C, 100.0)
    assert order(table) == (C, B)
    for _ in range(3):
        table.on_started(C)
    for _ in range(5):
        table.on_first_token(B, 100.0)
    assert order(table) == (B, C)


def test_a_queue_and_a_slow_machine_put_a_replica_behind() -> None:
    assert order(table_of(record(B, waiting=1), record(C))) == (C, B)
    assert order(table_of(record(B, speed_milli=50_000), record(C, speed_milli=20_000))) == (B, C)
    assert order(table_of(record(B, speed_milli=20_000), record(C, speed_milli=50_000))) == (C, B)


def test_what_was_measured_counts_more_than_what_a_replica_says() -> None:
    table = table_of(record(B, speed_milli=10**12), record(C, speed_milli=20_000))
    assert order(table) == (B, C)
    table.on_speed(B, 1.0)
    assert order(table) == (C, B)


def test_of_two_that_were_never_asked_the_nearer_comes_first() -> None:
    table = table_of(record(B), record(C))
    for peer, round_trip_ms in ((B, 80.0), (C, 5.0), (B, 90.0), (C, 500.0)):
        table.on_round_trip(peer, round_trip_ms)
    table.on_round_trip(C, 6.0)
    assert order(table) == (C, B), "one slow answer waited there: the fast one is the way"
    table.on_round_trip(B, 1.0)
    assert order(table) == (B, C)


def test_the_local_replica_is_first_while_it_is_not_slower_by_more_than_the_scatter() -> None:
    speeds = {20_000: 20_000, 17_000: 20_000, 16_000: 20_000, 40_000: 20_000}
    for own, other in speeds.items():
        table = table_of(record(A, speed_milli=own), record(B, speed_milli=other))
        for peer in (A, B):
            table.on_first_token(peer, 100.0)
        times = {s.record.peer: s.expected_ms(Typical(0.0, 0.0, 1.0)) for s in table.live(NOW)}
        is_slower = times[A] > LOCAL_MARGIN * times[B]
        assert is_slower == (own == 16_000)
        assert order(table)[0] == (B if is_slower else A)


def test_a_cold_local_replica_has_no_first_place_and_comes_where_its_time_puts_it() -> None:
    table = table_of(record(A), record(B), record(C, waiting=3))
    for peer, wait_ms in ((A, 300.0), (B, 290.0), (C, 300.0)):
        table.on_first_token(peer, wait_ms)
    assert order(table) == (A, B, C)
    assert choose(table.live(NOW), V1, A, "prefer", NOW, is_local_warm=False) == (B, A, C)
    assert choose(table.live(NOW), V1, A, "only", NOW, is_local_warm=False) == (A,)


def test_the_local_replica_is_first_until_another_is_much_faster() -> None:
    table = table_of(record(A), record(B), record(C))
    table.on_first_token(A, 900.0)
    table.on_first_token(B, 500.0)
    assert order(table)[0] == A  # of the answer's tokens both are expected to make the same, 3.2 s
    table.on_speed(B, 200.0)
    for _ in range(20):
        table.on_first_token(A, 9_000.0)
    assert order(table)[0] == B
    assert order(table, policy="only") == (A,)
    for _ in range(4):
        table.on_started(B)
        table.on_started(C)
    assert order(table)[0] == A, "the others are full"


def test_a_first_token_is_late_beyond_the_percentile_of_the_newest() -> None:
    waits = FirstTokens()
    for index in range(FIRST_TOKENS_MIN - 1):
        waits.on_first_token(float(index))
        assert waits.late_ms() == float("inf"), "too few are known"
    for index in range(FIRST_TOKENS_MIN - 1, 19):
        waits.on_first_token(float(index))
    waits.on_first_token(100.0)
    assert waits.late_ms() == 18, "one of twenty is above"
    for _ in range(FIRST_TOKENS_MAX):
        waits.on_first_token(7.0)
    assert waits.late_ms() == 7.0, "the old ones are forgotten"


@given(st.lists(st.booleans(), max_size=300))
def test_no_more_than_one_of_ten_streams_is_hedged(wishes: list[bool]) -> None:
    budget, num_hedged = HedgeBudget(), 0
    for num_streams, is_late in enumerate(wishes, 1):
        budget.on_stream()
        num_hedged += is_late and budget.take()
        assert num_hedged <= num_streams / STREAMS_PER_HEDGE


def test_after_a_quiet_time_only_a_few_streams_are_hedged_at_once() -> None:
    budget = HedgeBudget()
    for _ in range(1000):
        budget.on_stream()
    assert sum(budget.take() for _ in range(100)) == HEDGES_SAVED_MAX


def test_a_pace_leaves_the_first_token_and_slow_readers_out() -> None:
    pace = Pace()
    pace.on_tokens(0, 3.0)
    pace.on_tokens(1, 5.0)
    assert pace.compute_speed(1.0) is None, "nothing came after the first"
    for _ in range(4):
        pace.on_tokens(1, 0.1)
    assert pace.compute_speed(0.5) == pytest.approx(10.0)
    assert pace.compute_speed(5.0) is None, "its reader took the time"


def test_gateways_order_equal_replicas_differently() -> None:
    peers = [PeerId(f"replica-{index}") for index in range(8)]
    table = table_of(*(record(peer) for peer in peers))
    assert len({order(table, local=PeerId(f"gateway-{index}"))[0] for index in range(16)}) > 2


def test_a_record_is_forgotten_after_its_life_and_no_life_exceeds_the_bound() -> None:
    table = table_of(record(A, ttl_ms=1_000), record(B, ttl_ms=10**12))
    assert set(order(table, now=Millis(NOW + 999))) == {A, B}
    assert order(table, now=Millis(NOW + 1_000)) == (B,)
    assert order(table, now=Millis(NOW + TTL_MS_MAX)) == ()


def test_an_old_record_cannot_be_replayed_even_after_it_expired() -> None:
    table = table_of(record(A, sequence=7, ttl_ms=100))
    later = Millis(NOW + 10_000)
    assert not table.on_presence(A, record(A, sequence=7), later)
    assert not table.on_presence(A, record(A, sequence=6), later)
    assert order(table, now=later) == ()
    assert table.on_presence(A, record(A, sequence=8), later)
    assert order(table, now=later) == (A,)


def test_a_record_for_another_peer_rejects() -> None:
    with pytest.raises(Reject):
        ReplicaTable().on_presence(B, record(A), NOW)


def test_the_table_is_bounded_and_newcomers_never_push_out_live_replicas() -> None:
    table = ReplicaTable(replicas_max=3)
    for index in range(3):
        assert table.on_presence(PeerId(f"p{index}"), record(PeerId(f"p{index}"), ttl_ms=1_000 * (index + 1)), NOW)
    assert not table.on_presence(A, record(A), NOW)
    assert table.on_presence(A, record(A), Millis(NOW + 1_000))
    assert [state.record.peer for state in table.live(Millis(NOW + 1_000))] == [A, "p1", "p2"]


def test_failures_pause_a_replica_twice_as_long_each_time_and_never_ban_it() -> None:
    table = table_of(record(A), record(B))
    now = NOW
    for pause_ms in (BACKOFF_MS, 2 * BACKOFF_MS, 4 * BACKOFF_MS):
        table.on_failure(A, now)
        assert order(table, now=Millis(now + pause_ms - 1)) == (B, A)
        now = Millis(now + pause_ms)
        assert order(table, now=now) == (A, B)
    for _ in range(100):
        table.on_failure(A, now)
    table.on_presence(A, record(A, sequence=2), Millis(now + BACKOFF_MS_MAX))
    assert order(table, now=Millis(now + BACKOFF_MS_MAX)) == (A,)


def test_a_replica_that_is_gone_or_missed_a_record_stands_behind_until_it_speaks() -> None:
    table = table_of(record(A), record(B, sessions=3))
    assert order(table) == (A, B)
    table.on_gone(A)
    assert order(table) == (B, A)
    table.on_presence(A, record(A, sequence=2), NOW)
    assert order(table) == (A, B)
    later = Millis(NOW + 8_000)
    table.on_presence(B, record(B, sequence=2, sessions=4), later)
    assert order(table, now=later) == (B, A), "a full one answers at once that it is"
    table.on_failure(B, later)
    assert order(table, now=later) == (A, B)


def test_a_token_forgives_failures() -> None:
    table = table_of(record(A), record(B))
    table.on_failure(A, NOW)
    table.on_failure(A, NOW)
    table.on_first_token(A, None)
    assert order(table) == (A, B)


def test_unknown_replicas_change_nothing() -> None:
    table = table_of(record(A))
    table.on_failure(B, NOW)
    table.on_started(B)
    table.on_ended(A)
    table.on_ended(A)
    assert order(table) == (A,)


def test_deadline_is_patient_before_it_knows_anything_and_stays_in_its_bounds() -> None:
    deadline = AdaptiveDeadline(2_000, 15_000)
    assert deadline.deadline_ms() == 15_000
    for _ in range(10):
        deadline.on_wait(30)
    assert deadline.deadline_ms() == 2_000
    for _ in range(100):
        deadline.on_wait(10**9)
    assert deadline.deadline_ms() == 15_000


@given(st.lists(st.floats(min_value=900, max_value=1_100), min_size=3, max_size=200))
def test_a_network_that_is_slow_throughout_gets_time(waits: list[float]) -> None:
    deadline = AdaptiveDeadline(10, 100_000)
    for wait in waits:
        deadline.on_wait(wait)
    assert 900 <= deadline.deadline_ms() <= 1_100 + 8 * 200


def test_a_cheat_is_live_no_more_and_each_ban_is_twice_as_long() -> None:
    table = table_of(record(A), record(B))
    table.on_cheat(A, NOW)
    assert [state.record.peer for state in table.live(NOW)] == [B]
    table.on_presence(A, record(A, sequence=2), NOW)  # whatever it says
    assert table.is_banned(A, NOW)
    after = Millis(NOW + BAN_MS)
    assert not table.is_banned(A, after)
    table.on_cheat(A, after)
    assert table.bans()[0].until_ms == after + 2 * BAN_MS

    restarted = ReplicaTable()
    restarted.restore_bans(table.bans())
    assert restarted.is_banned(A, after)
    assert not restarted.is_banned(B, after)
