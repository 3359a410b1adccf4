"""Who goes when and comes back, and what clocks show."""

from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.errors import ConfigError
from p2pfm.types import Millis
from sim.churn import (
    RESIDENTIAL,
    Churn,
    ChurnModel,
    Departure,
    Diurnal,
    UpTime,
    draw_trace,
    load_trace,
    read_trace,
    validate_churn_model,
)
from sim.clocks import ClockModel, Clocks, validate_clock_model

GENESIS_MS = Millis(1_000_000)
ROUND_MS = 60_000


def plan_rounds(churn: Churn, num_rounds: int) -> list[Departure]:
    starts = range(GENESIS_MS, GENESIS_MS + num_rounds * ROUND_MS, ROUND_MS)
    return [gone for start in starts for gone in churn.plan(Millis(start), Millis(start + ROUND_MS))]


def follow_rounds(churn: Churn, num_hosts: int, num_rounds: int) -> list[tuple[Departure, Millis | None]]:
    """Who goes, and when it is back, where every crash strikes at once."""
    back = {index: churn.first_up_ms(index) for index in range(num_hosts)}
    gone = []
    for departure in plan_rounds(churn, num_rounds):
        since_ms = back[departure.index]
        if since_ms is not None and since_ms <= departure.when_ms:
            back[departure.index] = churn.get_back_ms(departure, departure.when_ms)
            gone.append((departure, back[departure.index]))
    return gone


def make_churn(model: ChurnModel, num_hosts: int, seed: object = 1, utc_hours: tuple[int, ...] = ()) -> Churn:
    validate_churn_model(model)
    return Churn(model, num_hosts, GENESIS_MS, Random(str(seed)), utc_hours)


times = st.tuples(st.integers(0, 100_000), st.integers(0, 100_000)).map(lambda pair: tuple(sorted(pair)))
shares = st.floats(0, 1)
sessions = st.lists(st.integers(0, 600_000), max_size=12, unique=True).map(sorted)


@st.composite
def traces(draw: st.DrawFn) -> tuple[UpTime, ...]:
    rows = []
    for peer in range(draw(st.integers(0, 4))):
        moments = draw(sessions)
        rows += [UpTime(peer, begin, end) for begin, end in zip(moments[::2], moments[1::2], strict=False)]
    return tuple(rows)


models = st.builds(
    ChurnModel,
    crash=shares,
    down_ms=times,
    lost_disk=shares,
    leave=st.floats(0, 0.2),
    away_ms=times,
    late=shares,
    late_ms=times,
    diurnal=st.none() | st.builds(Diurnal, share=shares, day_ms=st.integers(1_000, 1_000_000)),
    trace=traces(),
    trace_repeats=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(models, st.integers(1, 12), st.integers(0, 1 << 32))
def test_whoever_goes_by_its_schedule_was_up_and_all_come_back_later(
    model: ChurnModel, num_hosts: int, seed: int
) -> None:
    model = msgspec.structs.replace(model, crash=0.0, leave=0.0)
    churn = make_churn(model, num_hosts, seed)
    assert all(churn.is_up_at_start(index) == (churn.first_up_ms(index) == GENESIS_MS) for index in range(num_hosts))
    planned, followed = plan_rounds(churn, 6), follow_rounds(make_churn(model, num_hosts, seed), num_hosts, 6)
    assert [gone for gone, _ in followed] == planned
    moments = [gone.when_ms for gone in planned]
    assert moments == sorted(moments)
    assert all(back_ms is None or back_ms > gone.when_ms for gone, back_ms in followed)


@settings(max_examples=60, deadline=None)
@given(models, st.integers(0, 1 << 32), st.integers(0, 100_000))
def test_time_away_counts_from_when_a_host_has_gone(model: ChurnModel, seed: int, late_ms: int) -> None:
    churn = make_churn(model, 6, seed)
    for gone in plan_rounds(churn, 3):
        gone_ms = Millis(gone.when_ms + late_ms)
        back_ms = churn.get_back_ms(gone, gone_ms)
        if gone.down_ms is None:
            assert back_ms is None
        elif back_ms is not None:
            assert back_ms > gone_ms
            assert back_ms - gone_ms >= gone.down_ms
            if not (model.diurnal or model.trace):
                assert back_ms == max(gone_ms + max(1, gone.down_ms), churn.first_up_ms(gone.index) or 0)


@settings(max_examples=20, deadline=None)
@given(models, st.integers(0, 1 << 32))
def test_one_seed_plans_one_churn_and_survives_toml(model: ChurnModel, seed: int) -> None:
    again = msgspec.convert(msgspec.to_builtins(model), ChurnModel)
    assert plan_rounds(make_churn(model, 9, seed), 4) == plan_rounds(make_churn(again, 9, seed), 4)


def test_a_round_crashes_its_share_and_a_share_of_those_loses_the_disk() -> None:
    churn = make_churn(ChurnModel(crash=0.3, down_ms=(1_000, 2_000), lost_disk=0.25), 1_000)
    gone = churn.plan(GENESIS_MS, Millis(GENESIS_MS + ROUND_MS))
    assert len({departure.index for departure in gone}) == len(gone) == 300
    assert 50 <= sum(departure.loses_disk for departure in gone) <= 100
    assert {departure.num_actions for departure in gone} == {0, 1, 2, 3, 4, 5}
    assert all(1_000 <= departure.down_ms <= 2_000 for departure in gone if departure.down_ms is not None)


@pytest.mark.parametrize("share", [0.001, 0.004, 0.005, 0.012, 0.025])
def test_a_share_of_less_than_a_peer_comes_to_its_number_over_many_rounds(share: float) -> None:
    num_rounds, num_hosts = 2_000, 100
    churn = make_churn(ChurnModel(crash=share), num_hosts)
    expected = num_rounds * num_hosts * share
    assert len(plan_rounds(churn, num_rounds)) == pytest.approx(expected, abs=4 * num_rounds**0.5 / 2)


@given(st.integers(0, 1_000), st.integers(0, 100))
def test_a_share_that_is_a_whole_number_of_peers_is_that_number(num_hosts: int, percent: int) -> None:
    churn = make_churn(ChurnModel(crash=percent / 100), num_hosts)
    for number in range(3):
        start_ms = Millis(GENESIS_MS + number * ROUND_MS)
        low, rest = divmod(percent * num_hosts, 100)
        assert len(churn.plan(start_ms, Millis(start_ms + ROUND_MS))) in {low, low + bool(rest)}


def test_leavers_are_gone_for_good_unless_away_for_a_time() -> None:
    for away_ms, are_back in (((0, 0), False), ((5_000, 6_000), True)):
        gone = follow_rounds(make_churn(ChurnModel(leave=0.2, away_ms=away_ms), 100), 100, 3)
        assert {back_ms is not None for _, back_ms in gone} == {are_back}
        assert {(departure.num_actions, departure.loses_disk) for departure, _ in gone} == {(None, False)}


def test_only_an_away_ms_of_nothing_is_for_good() -> None:
    gone = plan_rounds(make_churn(ChurnModel(leave=0.5, away_ms=(0, 1)), 100), 3)
    assert len(gone) == 150
    assert all(departure.down_ms is not None for departure in gone)


def test_late_joiners_come_within_their_time() -> None:
    churn = make_churn(ChurnModel(late=0.4, late_ms=(10_000, 20_000)), 100)
    late = [index for index in range(100) if not churn.is_up_at_start(index)]
    assert len(late) == 40
    assert all(10_000 <= (churn.first_up_ms(index) or 0) - GENESIS_MS <= 20_000 for index in late)


def test_a_sleeper_is_up_in_its_local_hours_only() -> None:
    hour_ms = 10_000
    day = Diurnal(share=1.0, day_ms=24 * hour_ms, from_hour=8, num_hours=14, spread_hours=0)
    hours = (-6, 1, 9, 0)
    churn = make_churn(ChurnModel(diurnal=day), len(hours), utc_hours=hours)
    departures = follow_rounds(churn, len(hours), 3 * 24 * hour_ms // ROUND_MS)
    for index, hour in enumerate(hours):
        mine = [(gone.when_ms, back_ms or 0) for gone, back_ms in departures if gone.index == index]
        assert len(mine) == 3  # nights
        assert {(when_ms - GENESIS_MS) // hour_ms % 24 for when_ms, _ in mine} == {(22 - hour) % 24}
        assert {(back_ms - GENESIS_MS) // hour_ms % 24 for _, back_ms in mine} == {(8 - hour) % 24}
        is_day = 8 <= hour % 24 < 22
        assert churn.is_up_at_start(index) == is_day


def test_a_trace_is_followed_by_the_peers_that_it_names_until_it_is_over() -> None:
    rows = (UpTime(0, 0, 10_000), UpTime(0, 30_000, 50_000), UpTime(1, 5_000, 6_000))
    gone = follow_rounds(make_churn(ChurnModel(trace=rows), 4), 4, 3)
    assert [(departure.index, departure.when_ms - GENESIS_MS, back_ms) for departure, back_ms in gone] == [
        (1, 6_000, None),
        (0, 10_000, GENESIS_MS + 30_000),
        (0, 50_000, None),
    ]


def test_a_trace_that_repeats_begins_again_when_it_is_over_and_with_its_first_peer_for_further_peers() -> None:
    rows = (UpTime(0, 0, 10_000), UpTime(0, 30_000, 50_000), UpTime(1, 5_000, 6_000), UpTime(3, 7_000, 8_000))
    churn = make_churn(ChurnModel(trace=rows, trace_repeats=True), 7)
    sessions: dict[int, list[tuple[int, int | None]]] = {index: [] for index in range(7)}
    up_ms = {index: churn.first_up_ms(index) for index in sessions}
    for gone, back_ms in follow_rounds(churn, 7, 2):
        sessions[gone.index].append(((up_ms[gone.index] or 0) - GENESIS_MS, gone.when_ms - GENESIS_MS))
        up_ms[gone.index] = back_ms
    # The last one and the first one of the next turn are one.
    assert sessions[0] == sessions[4] == [(0, 10_000), (30_000, 60_000), (80_000, 110_000)]
    assert sessions[1] == sessions[5] == [(5_000, 6_000), (55_000, 56_000), (105_000, 106_000)]
    assert (up_ms[2], up_ms[6]) == (None, None)  # no session is theirs
    assert sessions[3] == [(7_000, 8_000), (57_000, 58_000), (107_000, 108_000)]


def test_the_trace_that_ships_holds_its_availability_over_days() -> None:
    model = load_trace(ChurnModel(trace_file="residential", trace_repeats=True, trace_speedup=24), RESIDENTIAL.parent)
    churn, num_hosts = make_churn(model, 64), 64
    up_ms = {index: churn.first_up_ms(index) for index in range(num_hosts)}
    num_days, day_ms = 3, 3_600_000
    up_by_day = [0] * num_days
    for gone, back_ms in follow_rounds(churn, num_hosts, num_days * day_ms // ROUND_MS):
        up_by_day[(gone.when_ms - GENESIS_MS - 1) // day_ms] += gone.when_ms - (up_ms[gone.index] or 0)
        up_ms[gone.index] = back_ms
    assert all(0.1 < up / num_hosts / day_ms < 0.35 for up in up_by_day)


def test_who_is_never_up_by_trace_and_day_together_is_gone_for_good() -> None:
    day = Diurnal(share=1.0, day_ms=24_000, from_hour=0, num_hours=6, spread_hours=0)
    rows = (UpTime(0, 12_000, 20_000), UpTime(1, 2_000, 24_000))
    churn = make_churn(ChurnModel(trace=rows, trace_repeats=True, diurnal=day), 2, utc_hours=(0, 0))
    assert [churn.first_up_ms(index) for index in range(2)] == [None, GENESIS_MS + 2_000]


def test_a_session_of_no_time_at_the_speed_of_the_run_is_none() -> None:
    rows = (UpTime(0, 50, 55), UpTime(0, 1_000, 2_000))
    churn = make_churn(ChurnModel(trace=rows, trace_speedup=10), 1)
    assert churn.first_up_ms(0) == GENESIS_MS + 100
    never = make_churn(ChurnModel(trace=rows, trace_speedup=10_000, trace_repeats=True), 1)
    assert never.first_up_ms(0) is None


def test_a_crash_in_the_evening_lasts_until_the_morning() -> None:
    churn = make_churn(
        ChurnModel(crash=1.0, down_ms=(9_999, 9_999), trace=(UpTime(0, 0, 100), UpTime(0, 50_000, 90_000))), 1
    )
    crash = next(gone for gone in plan_rounds(churn, 1) if gone.reason == "crash")
    assert churn.get_back_ms(crash, Millis(GENESIS_MS + 99)) == GENESIS_MS + 50_000
    assert churn.get_back_ms(crash, Millis(GENESIS_MS + 45_000)) == GENESIS_MS + 54_999
    assert churn.get_back_ms(crash, Millis(GENESIS_MS + 80_100)) is None  # the trace is over


def test_the_trace_that_ships_is_what_its_law_draws() -> None:
    rows = load_trace(ChurnModel(trace_file="residential"), RESIDENTIAL.parent).trace
    assert rows == draw_trace(64, 86_400_000, Random("residential 0"))
    validate_churn_model(ChurnModel(trace=rows))
    many = draw_trace(2_000, 86_400_000, Random(1))
    share = sum(row.up_to_ms - row.up_from_ms for row in many) / 2_000 / 86_400_000
    assert 0.18 < share < 0.26  # KAD's peers: 247 of 1,153 minutes


def test_a_share_of_the_peers_follows_the_trace() -> None:
    churn = make_churn(ChurnModel(trace=(UpTime(0, 5, 9),), trace_repeats=True, trace_share=0.3), 20)
    assert sum(churn.is_up_at_start(index) for index in range(20)) == 14


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (ChurnModel(crash=1.5), "churn.crash"),
        (ChurnModel(down_ms=(9, 3)), "churn.down_ms"),
        (ChurnModel(diurnal=Diurnal(share=0.5, num_hours=24)), "diurnal.num_hours"),
        (ChurnModel(trace=(UpTime(3, 5, 5),)), "peer 3"),
        (ChurnModel(trace=(UpTime(3, 0, 5), UpTime(3, 4, 6))), "peer 3"),
        (ChurnModel(trace_file="mine.csv"), "mine.csv"),
    ],
)
def test_churn_that_cannot_be_is_refused_by_name(model: ChurnModel, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        validate_churn_model(model)


def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path) -> None:
    for text in ("peer,up\n1,2\n", "peer,up_from_ms,up_to_ms\n1,2,x\n", "peer,up_from_ms,up_to_ms\n1,2\n"):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.csv"):
            read_trace(tmp_path / "bad.csv")
    with pytest.raises(ConfigError, match="none"):
        load_trace(ChurnModel(trace_file="none.csv"), tmp_path)


def test_a_trace_may_begin_with_a_byte_order_mark_and_has_a_session(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("peer,up_from_ms,up_to_ms\n0,5,9\n", encoding="utf-8-sig")
    assert read_trace(path) == (UpTime(0, 5, 9),)
    for text in ("", "peer,up_from_ms,up_to_ms\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="expected one session or more"):
            read_trace(path)


@given(
    st.builds(ClockModel, skew_ms=st.integers(0, 100_000), drift_ppm=st.floats(0, 100_000)),
    st.integers(0, 1 << 32),
    st.integers(-(10**6), 10**12),
)
@settings(deadline=None)
def test_a_clock_never_goes_back_and_is_inverted(model: ClockModel, seed: int, local_ms: int) -> None:
    validate_clock_model(model)
    clocks = Clocks(model, 3, Random(seed), GENESIS_MS)
    for index in range(3):
        true_ms = clocks.to_true(index, local_ms)
        shown = [clocks.tell(index, moment) for moment in range(true_ms - 3, true_ms + 3)]
        assert shown == sorted(shown)
        assert shown[2] < local_ms <= shown[3]  # the first moment that shows it
        assert abs(clocks.tell(index, GENESIS_MS) - GENESIS_MS) <= model.skew_ms


def test_clocks_without_skew_or_drift_tell_the_truth_and_drift_is_as_given() -> None:
    true = Clocks(ClockModel(skew_ms=0), 1, Random(1))
    assert [true.tell(0, moment) for moment in (0, 5, 10**9)] == [0, 5, 10**9]
    clocks = Clocks(ClockModel(skew_ms=0, drift_ppm=100), 1_000, Random(1))
    days = [clocks.tell(index, 86_400_000) - 86_400_000 for index in range(1_000)]
    assert max(map(abs, days)) <= 8_641
    assert min(days) < -8_000
    assert max(days) > 8_000
    with pytest.raises(ConfigError, match="drift_ppm"):
        validate_clock_model(ClockModel(drift_ppm=2e6))
