"""A scenario on the contract itself, in a real EVM with real BLS signatures, comes to what it does in memory."""

import csv
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from nodes.cli import app
from nodes.evm_world import open_evm_world
from p2pfm.errors import ConfigError
from p2pfm.types import Round
from sim.page import render_page
from sim.recorder import Recorder
from sim.report import compute_kinds_report, make_report
from sim.results import load_report
from sim.scenarios import Scenario
from sim.world import World

SCENARIO = Scenario(
    num_peers=8, num_rounds=3, committee_size=8, seed=21, adversaries=("two_faced", "zero"), stakes={"two_faced": 2.5}
)
ON_CHAIN = msgspec.structs.replace(SCENARIO, ledger="evm")


def test_the_contract_and_its_specification_in_memory_settle_and_pay_the_same() -> None:
    memory = World(SCENARIO)
    memory.run()
    with open_evm_world(ON_CHAIN) as (world, ledger):
        recorder = Recorder(world)
        world.run(recorder.on_round)
        report = make_report(world, recorder, 1.0)
        settled = world.chain.ledger.get_rounds(Round(0))
        claimed = world.chain.get_claimed()
        gas = ledger.get_gas()
    expected = memory.chain.ledger.get_rounds(Round(0))
    assert len(expected) == SCENARIO.num_rounds
    assert [(one.round, one.root, one.base, one.sums) for one in settled] == [
        (one.round, one.root, one.base, one.sums) for one in expected
    ]
    assert claimed == memory.chain.get_claimed()
    assert sum(claimed) > 0
    assert gas.keys() == {"transfer", "approve", "fund", "register", "rotate", "submitRound", "claim"}
    assert all(gas.values())
    assert report.gas == gas
    kinds = compute_kinds_report(report)
    assert [(kind.kind, kind.stake_pfm) for kind in kinds] == [("honest", 100), ("two_faced", 250), ("zero", 100)]
    joining = gas["approve"] / 9 + gas["register"] / 8  # the sponsor approves, too
    assert sum(amount > 0 for amount in claimed) == 7
    assert [kind.gas for kind in kinds] == pytest.approx([joining + gas["claim"] / 7] * 2 + [joining])
    assert sum(item.gas or 0 for item in report.rounds) == gas["submitRound"], "neither set-up nor claims"
    page = render_page(report)
    assert 'id="gas"' in page
    assert f"<dd>{sum(gas.values()):,}</dd>" in page


def test_the_command_line_tells_of_slashes_and_gas_on_the_contract(tmp_path: Path) -> None:
    options = ("--peers", "4", "--rounds", "2", "--seed", "2", "--adversary", "split_votes", "--set", "ledger=evm")
    told = CliRunner().invoke(app, ["sim", "run", "small", *options, "--out", str(tmp_path)])
    assert told.exit_code == 0, told.output
    report = load_report(tmp_path)
    assert [item.num_slashed for item in report.rounds] == [0, 1]
    assert [peer.slashed_pfm for peer in report.peers] == [100, 0, 0, 0]
    gas = [item.gas for item in report.rounds]
    assert min(gas) > 100_000
    assert f"{sum(report.gas.values()):,} gas" in " ".join(told.output.split())
    with (tmp_path / "rounds.csv").open() as file:
        assert [int(row["gas"]) for row in csv.DictReader(file)] == gas
    page = (tmp_path / "report.html").read_text()
    assert 'id="gas"' in page
    assert f"{sum(report.gas.values()):,}" in page


def test_no_world_takes_the_ledger_in_memory_for_the_contract() -> None:
    with pytest.raises(ConfigError, match="ledger evm"):
        World(ON_CHAIN)
