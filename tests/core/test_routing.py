import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfm.errors import Reject
from p2pfm.messages import Presence
from p2pfm.serving.routing import BACKOFF_MS, BACKOFF_MS_MAX, TTL_MS_MAX, AdaptiveDeadline, ReplicaTable, choose
from p2pfm.types import Digest, Millis, PeerId

V1, V2 = Digest(b"1" * 32), Digest(b"2" * 32)
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
NOW = Millis(1_000_000)


def record(peer: PeerId, sequence: int = 1, versions=(V1,), sessions: int = 0, ttl_ms: int = 15_000) -> Presence:
    return Presence(peer, versions, sessions, 4, ttl_ms, sequence)


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
