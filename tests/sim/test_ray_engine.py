"""The simulator on a Ray cluster of two nodes, real `ray start` processes on loopback, comes to what it does alone."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
from test_sim_engine import SCENARIOS, get_findings
from typer.testing import CliRunner

from nodes.ports import get_free_port
from p2pfm.errors import ConfigError, OperatorError
from sim.churn import ChurnModel
from sim.cli import app
from sim.engine import run_sweep
from sim.ray_engine import open_ray, spread
from sim.report import run_scenario
from sim.scenarios import AdversaryKind, LearnerModel, Scenario
from sim.world import World

START_S = 60
STOP_S = 5
STORE_BYTES = 80_000_000


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    """One node of one core; its processes end when it is told to."""
    command = [str(Path(sys.executable).parent / "ray"), "start", *options, "--block", "--num-cpus", "1"]
    command += ["--node-ip-address", "127.0.0.1", "--object-store-memory", str(STORE_BYTES)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with (folder / "ray.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True, env=environment)


def stop(node: "subprocess.Popen[str]") -> None:
    """End a node and, whatever it did about it, all that it started."""
    node.terminate()
    with suppress(subprocess.TimeoutExpired):
        node.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes."""
    if find_spec("ray") is None:
        pytest.skip("Ray is an extra: pip install 'p2pfm[ray]'")
    address = f"127.0.0.1:{get_free_port()}"
    nodes: list[subprocess.Popen[str]] = []
    # Not pytest's own folder: Ray's sockets allow for paths of 100 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_ADDRESS", address)
        # The cluster's own, whatever this machine's other clusters use: nobody else can run anything on it.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        try:
            port = address.rsplit(":")[-1]
            head = ("--head", "--port", port, "--include-dashboard", "false", "--temp-dir", folder)
            nodes.append(start(Path(folder), *head))
            wait_for(1)
            nodes.append(start(Path(folder), "--address", address))
            wait_for(2)
            yield address
        finally:
            for node in reversed(nodes):
                stop(node)


def wait_for(num_nodes: int) -> None:
    """Until so many nodes are there."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            with open_ray() as ray:
                while sum(node["Alive"] for node in ray.nodes()) < num_nodes:
                    assert time.monotonic() < deadline, "the cluster did not start"
                    time.sleep(0.2)
                return
        except OperatorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def test_a_sweep_on_two_machines_gives_the_reports_of_one_process(cluster: str) -> None:
    reports = run_sweep(SCENARIOS, "ray")
    alone = [run_scenario(scenario) for scenario in SCENARIOS]
    assert [get_findings(report) for report in reports] == [get_findings(report) for report in alone]


LIARS: tuple[AdversaryKind, ...] = ("replay", "copycat", "alie", "alie", "noise")


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(num_peers=9, num_rounds=3, adversaries=LIARS, seed=11),
        Scenario(
            num_peers=9,
            num_rounds=2,
            adversaries=(*LIARS, "backdoor"),
            churn=ChurnModel(crash=0.2),
            learner=LearnerModel("mlp"),
        ),
        Scenario(num_peers=9, num_rounds=2, learner=LearnerModel("mlp", codec="modelled")),
        Scenario(num_peers=6, num_rounds=2, adversaries=("alie", "alie"), learner=LearnerModel("lora")),
    ],
    ids=["convex", "mlp", "mlp, modelled", "lora"],
)
def test_one_runs_training_on_two_machines_leaves_the_same_trace(
    cluster: str, scenario: Scenario, capfd: pytest.CaptureFixture[str]
) -> None:
    """Adversaries that remember, a cabal, and a crowd that comes and goes, among them; Ray does not talk in between."""
    alone = World(scenario)
    alone.run()
    with spread(scenario) as workshop:
        world = World(scenario, workshop=workshop)
        world.run()
        assert len(set(workshop.get_machines())) == 2
    assert world.trace_digest() == alone.trace_digest()
    assert {host.durable.base for host in world.hosts} == {host.durable.base for host in alone.hosts}
    assert "".join(capfd.readouterr()) == ""


def test_what_fails_on_the_cluster_is_the_error_itself_and_says_which_run_it_was(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.engine.validate_scenario", lambda scenario: None)
    broken = msgspec.structs.replace(SCENARIOS[1], committee_size=9)
    with pytest.raises(ConfigError, match="committee_size") as caught:
        run_sweep([SCENARIOS[0], broken], "ray")
    assert "run 1 of the sweep (seed 6)" in caught.value.__notes__


def test_without_a_cluster_at_the_address_a_person_is_told(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(OperatorError, match="no Ray cluster at 'nonsense'"), open_ray():
        pass


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_real_evm_is_refused_before_ray_starts(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_ray() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("sim.ray_engine.open_ray", start_ray)
    told = CliRunner().invoke(app, [command, "small", "--set", "ledger=evm", "--engine", "ray"])
    assert told.exit_code == 2, told.output
    assert "a real EVM runs in this process only: take ledger memory, or --engine local" in " ".join(
        told.output.split()
    )


def test_where_nobody_trains_nothing_is_spread() -> None:
    with pytest.raises(ConfigError, match="nobody trains"), spread(Scenario(learner=LearnerModel("digests"))):
        pass
