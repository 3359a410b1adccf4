"""Who is what in a scenario: shares are counts, and the seed says who they are."""

from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfm.errors import ConfigError
from sim.churn import ChurnModel, UpTime
from sim.idle import find_idle
from sim.library import list_names, load_scenario
from sim.network import LinkClass, NetworkModel
from sim.scenarios import (
    STAKE,
    LearnerModel,
    Scenario,
    compute_counts,
    compute_kinds,
    compute_stakes,
    validate_scenario,
)

MIXED = Scenario(num_peers=20, adversaries=("silent",), adversary_shares={"zero": 0.25, "liar": 0.1, "late": 0.02})


def test_shares_come_to_so_many_peers_each_beside_those_that_are_named() -> None:
    kinds = compute_kinds(MIXED)
    assert kinds[0] == "silent"
    assert Counter(kinds) == {"silent": 1, "zero": 5, "liar": 2, None: 12}  # 0.4 of a peer is none


def test_the_seed_draws_who_they_are() -> None:
    assert compute_kinds(MIXED) == compute_kinds(MIXED)
    assert len({compute_kinds(msgspec.structs.replace(MIXED, seed=seed)) for seed in range(5)}) == 5


@given(st.integers(1, 60), st.floats(0, 0.5), st.floats(0, 0.5), st.integers(0, 3))
def test_every_peer_is_one_kind_or_the_scenario_is_refused(
    num_peers: int, zeros: float, liars: float, num_named: int
) -> None:
    shares = {"zero": zeros, "liar": liars}
    scenario = Scenario(num_peers=num_peers, adversaries=("late",) * num_named, adversary_shares=shares)
    try:
        validate_scenario(scenario)
    except ConfigError:
        # Rounding makes at most half a peer too many.
        assert num_named + (zeros + liars) * num_peers > num_peers - 1
        return
    kinds = Counter(compute_kinds(scenario))
    assert kinds.total() == num_peers
    assert kinds["late"] == num_named
    for kind, share in shares.items():
        assert abs(kinds[kind] - share * num_peers) < 1
    assert abs(kinds["zero"] + kinds["liar"] - (zeros + liars) * num_peers) <= 0.5 + 1e-9


def test_a_kind_stakes_what_is_said_of_it() -> None:
    stakes = compute_stakes(msgspec.structs.replace(MIXED, stakes={"silent": 2.5, "honest": 3}))
    kinds = compute_kinds(MIXED)
    expected = {"silent": 5 * STAKE // 2, None: 3 * STAKE}
    assert list(stakes) == [expected.get(kind, STAKE) for kind in kinds]


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"zero": 0.6, "liar": 0.5}, "adversary_shares: expected 1 at most for all together, got 1.1"),
        ({"zero": 0.9, "liar": -0.1}, "adversary_shares.liar: expected a share of 0 to 1, got -0.1"),
        ({"zero": float("nan")}, "adversary_shares.zero: expected a share of 0 to 1, got nan"),
    ],
)
def test_shares_over_all_or_below_none_are_refused(shares: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate_scenario(Scenario(adversary_shares=shares))  # type: ignore[arg-type]


def test_a_kind_that_the_learner_cannot_be_is_refused() -> None:
    for fields in ({"adversaries": ("backdoor",)}, {"adversary_shares": {"backdoor": 0.2}}):
        with pytest.raises(ConfigError, match=r"backdoor.*take learner.kind mlp"):
            validate_scenario(Scenario(**fields))  # type: ignore[arg-type]
        validate_scenario(Scenario(**fields, learner=LearnerModel("mlp")))  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_peers", "num_adversaries"), [(8, 3), (10, 4), (13, 5), (40, 16), (100, 40)])
def test_many_small_shares_come_to_as_many_peers_as_their_sum(num_peers: int, num_adversaries: int) -> None:
    scenario = msgspec.structs.replace(load_scenario("attackers_40"), num_peers=num_peers)
    assert compute_counts(scenario).total() == num_adversaries


def test_of_equal_remainders_the_first_name_is_rounded_up() -> None:
    shares = {"zero": 0.15, "liar": 0.35, "late": 0.25}  # 1.5, 3.5 and 2.5 of 10: 8 in all
    assert compute_counts(Scenario(num_peers=10, adversary_shares=shares)) == {"late": 3, "liar": 4, "zero": 1}  # type: ignore[arg-type]


def test_a_skipper_needs_a_proof_to_skip() -> None:
    for fields in ({"adversaries": ("skipper",)}, {"adversary_shares": {"skipper": 0.2}}):
        with pytest.raises(ConfigError, match="--set work_steps=1"):
            validate_scenario(Scenario(**fields))  # type: ignore[arg-type]
        validate_scenario(Scenario(**fields, work_steps=1))  # type: ignore[arg-type]
        validate_scenario(Scenario(**fields, learner=LearnerModel("digests")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"churn": ChurnModel(late=0.3)}, "churn.late: late_ms is 0, so those who are late are there at genesis"),
        ({"churn": ChurnModel(lost_disk=0.5)}, "churn.lost_disk: nobody crashes"),
        ({"churn": ChurnModel(down_ms=(5, 9))}, "churn.down_ms: nobody crashes"),
        ({"churn": ChurnModel(away_ms=(5, 9))}, "churn.away_ms: nobody leaves"),
        ({"churn": ChurnModel(late_ms=(5, 9))}, "churn.late_ms: nobody is late"),
        ({"churn": ChurnModel(trace_share=0.5)}, "churn.trace_share: there is no trace"),
        ({"churn": ChurnModel(trace_speedup=2)}, "churn.trace_speedup: there is no trace"),
        ({"churn": ChurnModel(trace_repeats=True)}, "churn.trace_repeats: there is no trace"),
        ({"network": NetworkModel(behind_nat=0.05)}, "network.behind_nat: of 8 peers none is behind one"),
        ({"network": NetworkModel(symmetric_nat=0.05)}, "network.symmetric_nat: of 8 peers none is behind one"),
        ({"network": NetworkModel(punched=0.5)}, "network.punched: no two peers are behind NATs that could be punched"),
        (
            {"network": NetworkModel(symmetric_nat=0.5, punched=0.5)},
            "network.punched: no two peers are behind NATs that could be punched",
        ),
        (
            {"network": NetworkModel(latency_ms=(5, 9), regions="world")},
            "network.latency_ms: regions say how far peers are apart",
        ),
        (
            {"network": NetworkModel(bytes_per_ms=9, links=(LinkClass(1.0, 5, 5),))},
            "network.bytes_per_ms: links say how fast they are",
        ),
    ],
)
def test_a_key_without_what_it_goes_with_is_told(fields: dict[str, Any], said: str) -> None:
    assert find_idle(Scenario(**fields)) == [said]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"churn": ChurnModel(late=0.3, late_ms=(0, 9), crash=0.1, lost_disk=0.5, down_ms=(5, 9))},
        {"churn": ChurnModel(leave=0.1, away_ms=(5, 9))},
        {"churn": ChurnModel(trace=(UpTime(0, 0, 10**9),), trace_share=0.5, trace_speedup=2, trace_repeats=True)},
        {"network": NetworkModel(behind_nat=0.125, symmetric_nat=0.125, punched=0.5)},
        {"network": NetworkModel(latency_ms=(5, 9), bytes_per_ms=9)},
    ],
)
def test_a_key_with_what_it_goes_with_is_no_news(fields: dict[str, Any]) -> None:
    assert find_idle(Scenario(**fields)) == []


@pytest.mark.parametrize("name", list_names())
def test_no_shipped_scenario_says_what_comes_to_nothing(name: str) -> None:
    assert find_idle(load_scenario(name)) == []
