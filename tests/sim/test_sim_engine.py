"""Many runs at once come to what each comes to alone."""

import msgspec
import pytest

from p2pfm.errors import ConfigError
from sim.engine import compute_num_workers, run_sweep
from sim.report import SimReport, run_scenario
from sim.scenarios import Scenario

SCENARIOS = [Scenario(num_peers=4, num_rounds=2, seed=seed) for seed in (5, 6, 7)]


def get_findings(report: SimReport) -> SimReport:
    """A report without what it cost this machine."""
    rounds = tuple(msgspec.structs.replace(round, cpu_s=0.0) for round in report.rounds)
    return msgspec.structs.replace(report, cpu_s=0.0, rounds=rounds)


def test_a_sweep_gives_the_reports_of_single_runs_in_order() -> None:
    told: dict[int, SimReport] = {}
    reports = run_sweep(SCENARIOS, on_done=lambda index, report: told.update({index: report}))
    assert [told[index] for index in range(len(SCENARIOS))] == reports
    alone = [run_scenario(scenario) for scenario in SCENARIOS]
    assert [get_findings(report) for report in reports] == [get_findings(report) for report in alone]
    assert len({report.trace for report in reports}) == len(SCENARIOS)


def test_a_scenario_that_cannot_run_is_named_before_any_runs() -> None:
    told: list[int] = []
    bad = msgspec.structs.replace(SCENARIOS[0], committee_size=9)
    with pytest.raises(ConfigError, match=r"run 3 of the sweep \(seed 5\): scenario committee_size"):
        run_sweep([*SCENARIOS, bad], on_done=lambda index, _: told.append(index))
    assert not told


def test_what_fails_in_a_process_of_its_own_says_which_run_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.engine.validate_scenario", lambda scenario: None)
    broken = msgspec.structs.replace(SCENARIOS[1], committee_size=9)
    with pytest.raises(ConfigError, match="committee_size") as caught:
        run_sweep([SCENARIOS[0], broken])
    assert caught.value.__notes__ == ["run 1 of the sweep (seed 6)"]


def test_runs_that_fill_the_memory_run_one_at_a_time() -> None:
    assert compute_num_workers([]) == 0
    assert compute_num_workers(SCENARIOS[:1]) == 1
    vast = Scenario(num_peers=14_000, num_rounds=100_000)
    assert compute_num_workers([vast, vast]) == 1
