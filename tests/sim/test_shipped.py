"""Every shipped scenario runs: with few peers, and as long as what it is about takes."""

from importlib.util import find_spec
from typing import Any

import pytest

from sim.faults import Kinds
from sim.library import change_scenario, list_names, load_scenario
from sim.report import run_scenario
from sim.scenarios import compute_kinds

REDUCED: dict[str, dict[str, Any]] = {
    "attackers_40": {"num_peers": 40},
    "churn_2000": {"num_peers": 40, "num_rounds": 4},
    "honest_1000": {"num_peers": 12, "shard_size": 4, "num_rounds": 1},
    "lora_50": {"num_peers": 12, "num_rounds": 1},
    "partition_heal": {"num_peers": 40, "num_rounds": 7},
}
"""What shows the scenario's own trouble, where 24 peers and two rounds do not."""


@pytest.mark.parametrize("name", list_names())
def test_every_shipped_scenario_runs_reduced_and_certifies(name: str) -> None:
    shipped = load_scenario(name)
    if shipped.learner.kind == "lora" and find_spec("chatterbot_corpus") is None:
        pytest.skip("needs the text: pip install 'p2pfm[data]'")
    changes = {"num_peers": min(24, shipped.num_peers), "num_rounds": 2} | REDUCED.get(name, {})
    reduced = change_scenario(shipped, changes)
    report = run_scenario(reduced)
    assert report.is_complete
    assert len(report.rounds) == reduced.num_rounds
    assert any(item.is_certified for item in report.rounds)
    expected: Kinds = compute_kinds(reduced)
    assert [peer.kind for peer in report.peers] == [kind or "honest" for kind in expected]
    missing = shipped.adversary_shares.keys() - set(expected)
    assert not missing, f"with {reduced.num_peers} peers the scenario lacks what it is about: {missing}"
