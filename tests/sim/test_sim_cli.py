"""The simulator as people use it: scenario files, runs, sweeps, comparisons, and what is said of mistakes."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import psutil
import pytest
from typer.testing import CliRunner, Result

from p2pfm.errors import ConfigError, OperatorError
from p2pfm.protocol.events import AnyAction, AnyEvent, Trained
from p2pfm.protocol.peer import Peer
from p2pfm.types import Millis, Round
from sim.checks import Violation, replay_command
from sim.churn import Diurnal
from sim.cli import app
from sim.estimate import compute_estimate, validate_memory
from sim.library import (
    FOLDER,
    change_scenario,
    dump_toml,
    get_changes,
    list_names,
    load_scenario,
    parse_json,
    parse_toml,
)
from sim.network import Gossip
from sim.report import SimReport, run_scenario
from sim.results import load_report, save_report
from sim.scenarios import LearnerModel, Scenario, validate_scenario
from sim.tables import TableFormat
from sim.world import World

PROMISED = {
    *("small", "honest_1000", "churn_2000", "attackers_40", "partition_heal", "free_riders", "sybils"),
    *("digests_10000", "lora_50", "sybils_whole"),
}


TINY = ("--set", "num_peers=3", "--set", "num_rounds=1")


def sim(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- scenario files --------------------------------------------------------------------------------------------------


def test_the_promised_scenarios_are_shipped() -> None:
    assert set(list_names()) >= PROMISED


@pytest.mark.parametrize("name", list_names())
def test_every_shipped_scenario_can_run_and_says_what_it_asks(name: str) -> None:
    scenario = load_scenario(name)
    validate_scenario(scenario)
    assert scenario.title.endswith("?")
    assert (FOLDER / f"{name}.toml").read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", list_names())
def test_a_scenario_comes_back_from_its_file(name: str) -> None:
    scenario = load_scenario(name)
    assert parse_toml(dump_toml(scenario)) == scenario
    assert parse_json(msgspec.json.encode(get_changes(scenario)).decode()) == scenario


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_peer = 3", "unknown key 'num_peer': did you mean num_peers?"),
        ("num_peers = 'x'", "num_peers: expected int, got 'x'"),
        ("num_peers = 3.5", "num_peers: expected int, got 3.5"),
        ("[learner]\nkind = 'mlpp'", "learner.kind: expected one of digests, convex, mlp, lora; got 'mlpp'; did you"),
        ("[churn]\ncrsh = 0.1", "[churn] unknown key 'crsh': did you mean crash?"),
        ("[churn]\ndown_ms = [1, 'a']", "churn.down_ms[1]: expected int, got 'a'"),
        ("[[outages]]\nstart_ms = 1\nend_ms = 2\nsize = 3", "[outages[0]] unknown key 'size': expected one of end_ms"),
        ("[adversary_shares]\nzeroo = 0.1", "got 'zeroo'; did you mean zero?"),
        ("adversaries = ['zero', 'hero']", "adversaries[1]: expected one of zero"),
        (
            "[network]\nregions = 'wrld'",
            "network.regions: expected one of none, world; got 'wrld'; did you mean world?",
        ),
        ("[network.regions]\nshare = [1.0]", "[network.regions] unknown key 'share': did you mean shares?"),
        ("[churn.diurnal]\nshare = 'x'", "churn.diurnal.share: expected float, got 'x'"),
        ("learner = 3", "learner: expected object, got 3"),
        ("num_peers =", "expected TOML, got a fault"),
    ],
)
def test_a_wrong_key_is_named_with_what_was_expected(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_toml(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"committee_size": 9},
        {"churn.crash": 1.5},
        {"network.loss": -0.1},
        {"adversary_shares.zero": 1.5},
        {"adversaries": ["zero"] * 9},
        {"num_peers": 200, "committee_size": 129},
        {"num_peers": 10, "shard_size": 3},
        {"adversaries": ["zero"] * 3, "adversary_shares.liar": 0.7},
        {"work.train_ms": [9, 3]},
        {"work.sign_ms": [-2, 3]},
        {"outages": [{"start_ms": 9, "end_ms": 3}]},
        {"outages": [{"start_ms": -9, "end_ms": 3}]},
        {"keep_logs": [8]},
        {"keep_logs": [-1]},
    ],
)
def test_impossible_parameters_are_refused_before_a_run(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"expected .*, got|got .*expected"):
        change_scenario(Scenario(), changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"committee_size": 20}, "expected 0 to 8, got 20: add peers or take a smaller committee"),
        ({"num_peers": 200, "committee_size": 129}, "expected 0 to 128, got 129: take a smaller committee"),
        ({"num_peers": 10, "shard_size": 3}, "expected 1 to 9 (two levels of shards of 3: raise shard_size), got 10"),
        (
            {"adversaries": ["zero"] * 3, "adversary_shares.liar": 0.75},
            "no more than the 8 peers, got 3 by name and 6 by adversary_shares: add peers or take fewer",
        ),
        ({"keep_logs": [8]}, "expected numbers of peers, 0 to 7, got 8"),
        (
            {"work.train_ms": [9, 3]},
            "work.train_ms: expected the least time, 0 or more, and then the greatest, got [9, 3]",
        ),
        (
            {"outages": [{"start_ms": 9, "end_ms": 3}]},
            "outages[0]: expected a start_ms of 0 or more and a later end_ms",
        ),
    ],
)
def test_what_is_impossible_is_told_with_what_to_do(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        change_scenario(Scenario(), changes)


def test_a_key_of_a_table_that_is_absent_can_be_set() -> None:
    changed = change_scenario(Scenario(), {"churn.diurnal.share": 0.5, "network.gossip.degree": 4})
    assert changed.churn.diurnal == Diurnal(0.5)
    assert changed.network.gossip == Gossip(4)
    with pytest.raises(ConfigError, match="title holds no keys"):
        change_scenario(Scenario(), {"title.share": 1})


def test_results_that_cannot_be_written_are_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for command in (("run", "small"), ("sweep", "small"), ("hunt", "--minutes", 0)):
        told = sim(*command, "--out", tmp_path / "taken" / "here")
        assert told.exit_code == 2
        assert "expected a folder to write to" in told.output
        assert "seed 1" not in told.output or command[0] == "hunt"
    told = sim("run", "small", "--logs", tmp_path / "taken")
    assert (told.exit_code, "expected a folder to write to" in told.output) == (2, True)


@pytest.mark.parametrize("name", ["a" * 300, "new/" + "a" * 300, "/proc/p2pfm", "/".join(["a" * 200] * 30)])
def test_a_folder_that_cannot_be_made_is_told_before_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (("run", "small", "--out"), ("run", "small", "--logs"), ("sweep", "small", "--out")):
        told = sim(*command, name)
        assert (told.exit_code, told.output.count("expected a folder to write to")) == (2, 1), told.output
        assert "CPU time" not in told.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("title", ["'" + "x" * 260 + "'", r'"a\u0000b"'])
def test_a_run_of_a_sweep_whose_folder_cannot_be_made_is_told_before_all_runs(title: str, tmp_path: Path) -> None:
    told = sim("sweep", "small", *TINY, "--set", f"title={title},'b'", "--seeds", 1, "--out", tmp_path / "out")
    assert (told.exit_code, told.output.count("expected a folder to write to")) == (2, 1), told.output
    assert "CPU time" not in told.output
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_saved_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(report: SimReport, folder: Path, format: TableFormat) -> Path:
        if folder.name == "seed-1":
            raise OperatorError("a planted fault")
        return save_report(report, folder, format)

    monkeypatch.setattr("sim.sweeps.save_report", save)
    told = sim("sweep", "small", *TINY, "--seeds", "1-3", "--out", tmp_path)
    assert (told.exit_code, told.output.splitlines()[-1]) == (2, "a planted fault")
    assert {path.parent.name for path in tmp_path.glob("*/*/report.json")} == {"seed-2", "seed-3"}
    with (tmp_path / "sweep.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3


def test_a_mistaken_name_is_answered_with_the_nearest() -> None:
    told = sim("run", "attacker_40")
    assert told.exit_code == 2
    assert "did you mean attackers_40?" in told.output


# --- the estimate ----------------------------------------------------------------------------------------------------


def test_a_run_that_does_not_fit_is_refused_with_what_would() -> None:
    scenario = Scenario(num_peers=128, learner=LearnerModel(kind="lora"))
    needed = compute_estimate(scenario).memory_bytes
    validate_memory(scenario, 2 * needed)
    with pytest.raises(ConfigError, match=r"128 peers with learner lora need about .* GB.*at most [\d,]+ peers fit"):
        validate_memory(scenario, 0.9 * needed)


@pytest.mark.parametrize(("num_peers", "shard_size"), [(96, 128), (200, 20)])
def test_the_estimate_is_near_to_what_a_run_takes(num_peers: int, shard_size: int) -> None:
    learner = LearnerModel(kind="digests")
    scenario = Scenario(num_peers=num_peers, shard_size=shard_size, num_rounds=3, learner=learner)
    assert 1 / 4 < run_scenario(scenario).cpu_s / compute_estimate(scenario).cpu_s < 4


@pytest.mark.parametrize(("num_spammers", "shard_size"), [(8, 128), (8, 16)])
def test_the_estimate_counts_floods(num_spammers: int, shard_size: int) -> None:
    scenario = Scenario(
        num_peers=48,
        shard_size=shard_size,
        num_rounds=2,
        learner=LearnerModel(kind="digests"),
        adversaries=("spammer",) * num_spammers,
    )
    taken_s, told_s = run_scenario(scenario).cpu_s, compute_estimate(scenario).cpu_s
    assert 1 / 3 < taken_s / told_s < 3
    quiet = msgspec.structs.replace(scenario, are_attackers_honest=True)
    assert compute_estimate(quiet).cpu_s < told_s / 3


@pytest.mark.parametrize(("num_spammers", "shard_size"), [(0, 128), (2, 128), (2, 8)])
def test_the_estimate_counts_the_event_logs_that_are_kept(num_spammers: int, shard_size: int) -> None:
    scenario = Scenario(
        num_peers=24,
        shard_size=shard_size,
        num_rounds=2,
        learner=LearnerModel(kind="digests"),
        keep_logs=tuple(range(12)),
        adversaries=("spammer",) * num_spammers,
    )
    world = World(scenario)
    world.run()
    kept_bytes = sum(len(log) for host in world.hosts for log in host.logs)
    without = msgspec.structs.replace(scenario, keep_logs=())
    told_bytes = compute_estimate(scenario).memory_bytes - compute_estimate(without).memory_bytes
    assert 1 / 2 < kept_bytes / told_bytes < 2
    with pytest.raises(ConfigError, match=r"at most [\d,]+ peers fit"):
        validate_memory(scenario, compute_estimate(without).memory_bytes)


def test_the_estimate_counts_the_seats_of_a_committee_that_was_not_named() -> None:
    scenario = Scenario(num_peers=256, shard_size=64)
    assert compute_estimate(scenario) == compute_estimate(msgspec.structs.replace(scenario, committee_size=9))


@pytest.mark.parametrize("kind", ["digests", "convex", "mlp", "lora"])
def test_the_estimate_grows_with_peers_and_rounds(kind: str) -> None:
    learner = msgspec.convert({"kind": kind}, LearnerModel)
    few, many = (compute_estimate(Scenario(num_peers=num, num_rounds=num, learner=learner)) for num in (10, 1_000))
    assert many.memory_bytes > few.memory_bytes > 0
    assert many.cpu_s > few.cpu_s > 0


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("results") / "small"
    return folder, sim("run", "small", "--seed", 7, "--out", folder)


def test_the_seed_is_told_first_and_every_round_certifies(small: tuple[Path, Result]) -> None:
    _, told = small
    assert told.exit_code == 0, told.output
    assert told.output.startswith("seed 7\n")
    assert "6 of 6 rounds certified, 0 void" in told.output


def test_results_are_a_folder_that_reads_back(small: tuple[Path, Result]) -> None:
    folder, _ = small
    report = load_report(folder)
    assert report.is_complete
    assert report.scenario == parse_toml((folder / "scenario.toml").read_text())
    with (folder / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss_nats"]) for row in rows] == [item.loss_nats for item in report.rounds]
    assert [float(row["reward_honest_pfm"]) for row in rows] == [item.rewards_pfm["honest"] for item in report.rounds]
    with (folder / "peers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8


def test_the_page_is_made_again_from_the_results(small: tuple[Path, Result]) -> None:
    folder, _ = small
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    told = sim("report", folder)
    assert told.exit_code == 0, told.output
    assert (folder / "report.html").read_text() == before


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"rounds": 3}')
    told = sim("report", tmp_path)
    assert (told.exit_code, "not a report of this version" in told.output) == (2, True)
    assert sim("report", tmp_path / "nowhere").exit_code == 2


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("peers", [], "expected its scenario's 8 peers, at least one, got 0"),
        ("scenario.num_peers", 0, "expected its scenario's 0 peers"),
        ("rounds.1.round", -5, "expected rounds 0, 1, 2 and so on, got [0, -5, 2"),
        ("rounds.2.rewards_pfm", {"honest": 1.0, "zero": 1.0}, "round 2: expected rewards of honest, got honest, zero"),
        ("rounds.0.rewards_pfm", {}, "round 0: expected rewards of honest, got none"),
        ("rounds.0.sent.mean_bytes", 1e308, "expected numbers up to 1e+30, got 1e+308"),
        (
            "beside",
            {"losses_nats": [0.1], "num_certified": 1, "rewards_pfm": [1.0] * 8},
            "beside: expected 6 losses and 8 rewards, got 1 and 8",
        ),
    ],
)
def test_a_damaged_report_that_decodes_is_refused(
    path: str, value: object, said: str, small: tuple[Path, Result], tmp_path: Path
) -> None:
    report = json.loads((small[0] / "report.json").read_text())
    *outer, last = path.split(".")
    inner = report
    for key in outer:
        inner = inner[int(key) if key.isdecimal() else key]
    inner[last] = value
    (tmp_path / "report.json").write_text(json.dumps(report))
    for command in (["report", tmp_path], ["compare", tmp_path, small[0]]):
        told = sim(*command)
        assert told.exit_code == 2, told.output
        assert f"report.json: the report is damaged: {said}" in told.output.splitlines()[-1]


def test_a_report_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(b'{"trace": "\x9a"}')
    told = sim("report", tmp_path)
    assert (told.exit_code, "not a report of this version" in told.output) == (2, True)


def test_options_change_the_scenario(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("num_peers = 5\nnum_rounds = 3\n[churn]\ncrash = 0.1\n")
    told = sim(
        *("run", file, "--peers", 4, "--rounds", 1, "--loss", 0.01, "--adversary", "zero", "--json"),
        *("--set", "clocks.skew_ms=7"),
    )
    assert told.exit_code == 0, told.output
    report = msgspec.json.decode(told.stdout, type=SimReport)
    found = report.scenario
    assert (found.num_peers, found.num_rounds, found.churn.crash, found.network.loss) == (4, 1, 0.1, 0.01)
    assert (found.adversaries, found.clocks.skew_ms) == (("zero",), 7)
    assert len(report.rounds) == 1


def test_a_trace_lies_beside_its_scenario_or_is_set_for_one_run(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("peer,up_from_ms,up_to_ms\n0,0,70000\n")
    file = tmp_path / "mine.toml"
    file.write_text('num_peers = 4\nnum_rounds = 2\n[churn]\ntrace_file = "mine.csv"\n')
    told = sim("run", file, "--out", tmp_path / "out")
    assert told.exit_code == 0, told.output
    report = load_report(tmp_path / "out")
    assert report.scenario.churn.trace == ((0, 0, 70_000),)
    assert report.num_departures == 1
    shares = ("--set", "churn.trace_file=residential", "--set", "churn.trace_share=0.5")
    told = sim("run", "--peers", 6, "--rounds", 1, *shares, "--json")
    assert told.exit_code == 0, told.output
    assert len(msgspec.json.decode(told.stdout, type=SimReport).scenario.churn.trace) > 64
    told = sim("run", "small", "--set", "churn.trace_file=nowhere.csv")
    assert (told.exit_code, "nowhere.csv: expected a CSV file" in told.output) == (2, True)


def test_the_command_of_a_violation_runs() -> None:
    command = shlex.split(replay_command(Scenario(seed=5, num_peers=3, num_rounds=1)))
    assert command[:2] == ["p2pfm", "sim"]
    told = sim(*command[2:])
    assert told.exit_code == 0, told.output
    assert told.output.startswith("seed 5\n")


def test_code_that_breaks_down_is_told_with_seed_step_peer_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Peer.handle

    def stumble(self: Peer, event: AnyEvent, now_ms: Millis) -> list[AnyAction]:
        if isinstance(event, Trained) and self.me == "peer-00002":
            raise KeyError("a planted bug")
        return handle(self, event, now_ms)

    monkeypatch.setattr(Peer, "handle", stumble)
    told = sim("run", "small", "--seed", 7)
    assert told.exit_code == 3
    text = told.output.splitlines()[-1]
    assert re.match(r"seed 7, step \d+, \d+ ms, peers peer-00002: KeyError in stumble of test_sim_cli.py, line", text)
    assert "Traceback" in told.output
    again = sim(*shlex.split(text.partition("Replay: p2pfm sim ")[2]))
    assert again.output.splitlines()[-1] == text
    assert sim("sweep", "small", "--seeds", "7").output.splitlines()[-1] == text


def test_a_world_that_cannot_be_made_is_told_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise IndexError("a planted bug")

    monkeypatch.setattr("sim.world.make_workshop", fail)
    told = sim("run", "small", "--seed", 7)
    assert told.exit_code == 3
    assert "seed 7, outside of all steps, peers none: IndexError in fail" in told.output


CODE = "import sys; from sim.cli import app; app(sys.argv[1:])"
"""The command line as a process."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_reports_on_its_rounds_so_far(number: signal.Signals, tmp_path: Path) -> None:
    arguments = ["run", "small", "--peers", "3", "--rounds", "100000", "--out", str(tmp_path)]
    # A shell without job control lets its background jobs ignore an interrupt, and what they start, too.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", CODE, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "seed 1\n"
        assert process.stdout.readline().startswith("about ")
        time.sleep(2)  # into the run, as far as it comes: how far does not matter
        process.send_signal(number)
        said = process.stdout.read()
    assert process.returncode == 130, said
    assert "interrupted" in said
    report = load_report(tmp_path)
    assert not report.is_complete
    assert len(report.rounds) < 100_000
    assert "Interrupted after" in (tmp_path / "report.html").read_text()


def test_logs_that_cannot_be_written_lose_no_report(tmp_path: Path) -> None:
    (tmp_path / "peer-00001").write_text("a file")
    told = sim("run", "small", "--rounds", 1, "--logs", tmp_path, "--out", tmp_path / "out")
    assert told.exit_code == 2, told.output
    assert "1 of 1 rounds certified" in told.output
    assert "the event logs cannot be written" in told.output.splitlines()[-1]
    assert load_report(tmp_path / "out").is_complete


def test_logs_of_an_earlier_run_are_no_further_life(tmp_path: Path) -> None:
    home = tmp_path / "peer-00000" / "events"
    home.mkdir(parents=True)
    for name in ("000001.events", "mine.events"):
        (home / name).write_bytes(b"earlier")
    assert sim("run", "small", *TINY, "--logs", tmp_path).exit_code == 0
    assert {path.name for path in home.iterdir()} == {"000000.events", "mine.events"}


def test_the_logs_of_a_run_replay_as_a_folder_or_one_by_one(tmp_path: Path) -> None:
    assert sim("run", "small", *TINY, "--logs", tmp_path).exit_code == 0
    told = sim("replay", tmp_path)
    assert told.exit_code == 0, told.output
    assert " ".join(told.output.split()).count("every action as in the log") == 3
    for one in ("peer-00001", "peer-00001/events", "peer-00001/events/000000.events"):
        assert sim("replay", tmp_path / one).output.startswith("peer-00001: ")
    (tmp_path / "none").mkdir()
    assert "no event log" in sim("replay", tmp_path / "none").output


@pytest.mark.parametrize(
    ("word", "to", "said"),
    [
        (b"linear", b"\x9ainear", "not an event log of this version"),
        (b"peer-00002", b"\x9aeer-00002", "is damaged"),
        (b"0xfefe", b"0yfefe", "header is damaged"),
    ],
)
def test_a_log_with_a_flipped_byte_is_refused(word: bytes, to: bytes, said: str, tmp_path: Path) -> None:
    assert sim("run", "small", *TINY, "--logs", tmp_path).exit_code == 0
    log = tmp_path / "peer-00001" / "events" / "000000.events"
    before, _, after = log.read_bytes().rpartition(word)
    log.write_bytes(before + to + after)
    told = sim("replay", log)
    assert told.exit_code == 2, told.output
    assert said in told.output


def test_tables_of_an_earlier_run_do_not_lie_beside_a_new_one(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'p2pfm[sim]'")
    (tmp_path / "rounds.parquet").write_text("perhaps not ours: there are no results yet")
    for format, names in (("csv", {"rounds.csv", "peers.csv", "rounds.parquet"}), ("parquet", None)):
        assert sim("run", "small", *TINY, "--out", tmp_path, "--format", format).exit_code == 0
        found = {path.name for path in tmp_path.iterdir()} - {"report.json", "report.html", "scenario.toml"}
        assert found == (names or {"rounds.parquet", "peers.parquet"})


def test_a_sweep_again_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    label = tmp_path / "small num_peers=3 num_rounds=1"
    (label / "seed-mine").mkdir(parents=True)
    (tmp_path / "sweep.parquet").write_text("perhaps not ours: there are no results yet")
    assert sim("sweep", "small", *TINY, "--seeds", "1-3", "--out", tmp_path).exit_code == 0
    (label / "seed-3" / "mine").write_text("kept")
    assert (tmp_path / "sweep.parquet").exists()
    assert sim("sweep", "small", *TINY, "--seeds", "2", "--out", tmp_path).exit_code == 0
    assert {path.name for path in label.iterdir()} == {"seed-2", "seed-3", "seed-mine"}
    assert {path.name for path in (label / "seed-3").iterdir()} == {"mine"}
    assert {path.name for path in tmp_path.iterdir()} == {label.name, "sweep.csv"}


@pytest.mark.parametrize(
    ("name", "settings", "note"),
    [
        ("free_riders", ["num_peers=15"], "adversary_shares: of 15 peers none is zero, thief"),
        (
            "small",
            ["adversaries=['copycat']", "adversary_shares.liar=0.9"],
            "copycat: nobody is honest, so there is nobody to copy, and it does its own work",
        ),
        (
            "small",
            ["adversaries=['alie','alie']"],
            "alie: with 2 of 8 peers z is 0: they announce the mean of their honest updates",
        ),
        (
            "small",
            ["adversaries=['minmax']"],
            "minmax: one alone knows of no spread to hide in: it announces its honest update",
        ),
        (
            "small",
            ["adversaries=['alie']"],
            "alie: one alone knows of no spread to hide in: it announces its honest update",
        ),
        (
            "partition_heal",
            ["num_rounds=3"],
            "network.partitions[0]: begins at 180000 ms, and the last round ends at 180000 ms",
        ),
        (
            "small",
            ["outages=[{start_ms=60000, end_ms=60001}]"],
            "outages[0]: begins at 60000 ms, and the last round ends at 60000 ms",
        ),
        (
            "small",
            ["num_rounds=3", "churn.trace_file=residential", "churn.trace_speedup=1000"],
            "churn.trace: ends at 86400 ms, in round 1, and whoever follows it is gone from then on: "
            "trace_repeats = true begins it again",
        ),
    ],
)
def test_what_comes_to_nothing_is_told_before_the_run(name: str, settings: list[str], note: str) -> None:
    changes = [word for setting in ("num_rounds=1", *settings) for word in ("--set", setting)]
    for command in (["run", name], ["sweep", name, "--seeds", "1"]):
        told = sim(*command, *changes)
        assert told.exit_code == 0, told.output
        assert told.output.splitlines()[2] == f"note: {note}"


@pytest.mark.parametrize(
    "setting",
    [
        "adversaries=['alie','alie','alie']",
        "adversaries=['minmax','minmax']",
        "adversaries=['ipm']",
        "adversaries=['copycat']",
        "adversary_shares={alie=0.1,copycat=0.9}\nare_attackers_honest=true",
    ],
)
def test_who_can_do_what_it_is_there_for_is_no_note(setting: str) -> None:
    changes = [word for line in ("num_rounds=1", *setting.splitlines()) for word in ("--set", line)]
    told = sim("run", "small", *changes)
    assert told.exit_code == 0, told.output
    assert "note:" not in told.output


@pytest.mark.parametrize("kind", ["alie", "ipm", "minmax", "copycat", "sybil", "colluder"])
def test_a_network_of_one_kind_of_attackers_alone_runs(kind: str) -> None:
    told = sim("run", "small", "--set", "num_rounds=1", "--set", f"adversary_shares.{kind}=1.0")
    assert told.exit_code == 0, told.output


# --- many runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("sweep")
    told = sim(
        *("sweep", "small", "--seeds", "1-2", "--set", "num_peers=3,6", "--set", "num_rounds=2"),
        *("--out", folder, "--json"),
    )
    assert told.exit_code == 0, told.output
    return folder, json.loads(told.stdout)


def test_a_sweep_runs_every_seed_with_every_setting(swept: tuple[Path, list[dict[str, float]]]) -> None:
    folder, rows = swept
    assert [(row["scenario"], row["seed"]) for row in rows] == [
        (f"small num_peers={num} num_rounds=2", seed) for num in (3, 6) for seed in (1, 2)
    ]
    assert load_report(folder / "small num_peers=6 num_rounds=2" / "seed-2").scenario.num_peers == 6
    with (folder / "sweep.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4


@pytest.mark.parametrize(
    ("error", "num_done", "code", "said"),
    [
        (KeyboardInterrupt(), 0, 130, "interrupted after 0 of 3 runs"),
        (KeyboardInterrupt(), 1, 130, "interrupted after 1 of 3 runs"),
        (Violation("a planted violation"), 2, 3, "a planted violation"),
        (OperatorError("a planted refusal"), 1, 2, "a planted refusal"),
    ],
)
def test_whatever_ends_a_sweep_keeps_the_runs_before_it(
    error: BaseException, num_done: int, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(scenario: Scenario) -> SimReport:
        if scenario.seed > num_done:
            raise error
        return run_scenario(scenario)

    monkeypatch.setattr("sim.engine.compute_num_workers", lambda scenarios: 1)
    monkeypatch.setattr("sim.engine.run_scenario", stop)
    told = sim("sweep", "small", "--set", "num_peers=3", "--set", "num_rounds=1", "--out", tmp_path / "out")
    assert (told.exit_code, told.output.splitlines()[-1]) == (code, said)
    assert f"interrupted after {num_done} of 3 runs" in told.output
    assert len(list((tmp_path / "out").glob("*/seed-*/report.json"))) == num_done
    assert (tmp_path / "out" / "sweep.csv").exists() == (num_done > 0)


def wait_for(what: Callable[[], bool], limit_s: float = 60) -> None:
    ends_s = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < ends_s
        time.sleep(0.1)


TWO_WORKERS = f"""
import sim.cli, sim.engine
def run_sweep(scenarios, engine, on_done):
    run(scenarios, engine, lambda *done: (on_done(*done), print("one is done", flush=True)))
run, sim.cli.run_sweep = sim.cli.run_sweep, run_sweep
sim.engine.compute_num_workers = lambda scenarios: 2
{CODE}
"""
"""A process that says when the first of its runs has ended."""


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_ended_keeps_what_was_run_and_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    settings = ("--set", "num_peers=3", "--set", "num_rounds=1,100000", "--seeds", "1", "--out", str(tmp_path))
    command = [sys.executable, "-c", TWO_WORKERS, "sweep", "small", *settings]
    workers: list[psutil.Process] = []
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(command, stdout=said, start_new_session=True) as process,
    ):
        try:
            wait_for(lambda: "one is done" in (tmp_path / "said").read_text())
            workers = psutil.Process(process.pid).children()
            if number == signal.SIGTERM:  # a batch queue asks all of them
                os.killpg(process.pid, number)
            else:
                process.kill()
            process.wait(20)
            wait_for(lambda: not any(is_alive(worker) for worker in workers), 10)
        finally:
            for left in [process, *filter(is_alive, workers)]:
                left.kill()
    if number == signal.SIGTERM:
        text = (tmp_path / "said").read_text()
        assert process.returncode == 130, text
        assert "interrupted after 1 of 2 runs" in text
        assert [path.parent.name for path in tmp_path.glob("*/*/report.json")] == ["seed-1"]


def test_runs_are_compared_with_means_errors_and_ratios(swept: tuple[Path, list[dict[str, float]]]) -> None:
    folder, rows = swept
    name = "sent a peer and round, kB"
    told = sim("compare", *(folder / f"small num_peers={num} num_rounds=2" for num in (3, 6)), "--json")
    assert told.exit_code == 0, told.output
    line = next(line for line in json.loads(told.stdout) if line["figure"] == name)
    few, many = [row[name] for row in rows[:2]], [row[name] for row in rows[2:]]
    assert line["left"]["mean"] == pytest.approx(sum(few) / 2)
    assert line["left"]["error"] == pytest.approx(abs(few[0] - few[1]) / 2)
    assert line["ratio"] == pytest.approx(sum(many) / sum(few))


def test_what_is_compared_is_told_and_a_report_is_read_not_run(
    swept: tuple[Path, list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = swept
    label = "small num_peers=3 num_rounds=2"
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sim.cli.run_sweep", lambda *_: pytest.fail("it was run"))
    told = sim("compare", label, f"{label}/seed-1/report.json")
    assert told.exit_code == 0, told.output
    assert told.output.splitlines()[:2] == [
        f"{label}: 2 run(s) saved in the folder {label}",
        f"{label}/seed-1/report.json: 1 run(s) saved in the folder {label}/seed-1",
    ]
    refused = sim("compare", label, label, "--seeds", "1")
    assert refused.exit_code == 2
    assert "--seeds: expected a scenario to run" in refused.output


def test_a_scenario_is_run_to_be_compared(swept: tuple[Path, list[dict[str, float]]]) -> None:
    tiny = '{"num_peers": 3, "num_rounds": 1}'
    told = sim("compare", tiny, swept[0] / "small num_peers=3 num_rounds=2", "--seeds", "4")
    assert told.exit_code == 0, told.output
    assert told.output.startswith(f"{tiny}: a scenario, to be run\n")
    assert "seeds 4\n" in told.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep", "small", "--seeds", "3-1"],
        ["sweep", "small", "--seeds", "x"],
        ["sweep", "small", "--seeds", "9" * 5_000],
        ["sweep", "small", "--set", "num_peers"],
        ["sweep", "small", "--set", "num_peer=3"],
        ["run", "small", "--set", "num_peers=3,4"],
        ["run", "small", "--set", "work.train_ms=[3, 1]"],
        ["run", "small", "--adversary", "zero", "--set", "adversary_shares.zero=1"],
        ["compare", "small", "nothing"],
        ["run", "small", "--scenario", '{"num_peers": 3, "num_rounds": 1}'],
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments: list[str]) -> None:
    told = sim(*arguments)
    assert told.exit_code == 2
    assert "rounds certified" not in told.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "1-99999999"], "--seeds: expected 10,000 at most, got 99,999,999"),
        (["--seeds", "1-9999,20000-20002"], "--seeds: expected 10,000 at most, got 10,002"),
        (["--seeds", "1-5001", "--set", "num_peers=3,4"], "expected 10,000 runs at most, got 10,002"),
    ],
)
def test_a_number_of_runs_beyond_reason_is_refused_at_once(arguments: list[str], said: str) -> None:
    started_s = time.monotonic()
    told = sim("sweep", "small", *arguments)
    assert (told.exit_code, said in told.output) == (2, True), told.output
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["small", "small"], "small and small are both 'small'"),
        (["small", "b/small.toml"], "small and b/small.toml are both 'small'"),
        (["a/x.toml", "b/x.toml"], "a/x.toml and b/x.toml are both 'x'"),
        (['{"num_peers": 3}', '{"num_peers": 4}'], "both 'scenario': leave out what stands twice, or give scenarios"),
        (["small", "--set", "network.loss=0.1,0.10"], "both 'small network.loss=0.1'"),
        (["small", "--set", "title=a/b,a_b"], "both 'small title=a_b'"),
        (["small", "--set", "seed=5"], "expected a sweep's seeds in --seeds"),
        (["small", "--seeds", "7,7"], "expected each seed once, got '7,7'"),
        (["small", "--seeds", "1-3,2"], "expected each seed once"),
    ],
)
def test_runs_that_could_not_be_told_apart_are_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.toml", "b/x.toml", "b/small.toml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("num_peers = 3\nnum_rounds = 1\n")
    told = sim("sweep", *arguments, "--out", "swept")
    assert (told.exit_code, said in told.output) == (2, True), told.output
    assert not Path("swept").exists()


def test_brackets_in_names_are_no_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = "a[/b] [red]c :smile:"
    told = sim("run", "small", *TINY, "--out", out, "--logs", "logs[/]")
    assert (told.exit_code, told.output.splitlines()[-1]) == (
        0,
        f"results in {out}, to be looked at: {out}/report.html",
    )
    told = sim("report", out)
    assert (told.exit_code, told.output) == (0, f"{out}/report.html\n")
    label = "small title=[/x] :smile: num_peers=3 num_rounds=1"
    told = sim("sweep", "small", "--set", "title='[/x] :smile:'", *TINY, "--seeds", 1, "--out", "swept[/]")
    assert (told.exit_code, told.output.splitlines()[-1]) == (0, "results in swept[/]")
    assert "title=[/x] :smile:" in told.output  # the rest of the label stands on the next line
    saved = f"swept[/]/{label.replace('/', '_')}"
    told = sim("compare", saved, out)
    assert told.exit_code == 0, told.output
    assert told.output.startswith(f"{saved}: 1 run(s) saved in the folder {saved}\n")
    assert ":smile:" in told.output.partition("Compared")[2]
    assert sim("replay", "logs[/]").exit_code == 0
    told = sim("replay", "nothing[/]")
    assert (told.exit_code, "nothing[/]" in told.output) == (2, True)


def test_the_list_names_every_scenario_with_its_question() -> None:
    told = sim("list", "--json")
    assert {name: item["title"] for name, item in json.loads(told.stdout).items()} == {
        name: load_scenario(name).title for name in list_names()
    }


def test_a_hunt_tells_its_seed_first_and_what_it_found(tmp_path: Path) -> None:
    told = sim("hunt", "--minutes", 0.0001, "--seed", 4, "--out", tmp_path)  # one run
    assert told.output.startswith("seed 4\n")
    assert told.exit_code == (0 if "nothing found" in told.output else 3)


def test_a_run_beside_honest_attackers_tells_the_harm(tmp_path: Path) -> None:
    result = sim("run", "small", "--rounds", 2, "--adversary", "sign_flip", "--beside-honest", "--out", tmp_path)
    assert result.exit_code == 0
    assert "harm done" in result.output
    beside, honest = load_report(tmp_path).beside, sim("run", "small", "--rounds", 2, "--json")
    assert beside is not None
    assert list(beside.losses_nats) == [item["loss_nats"] for item in json.loads(honest.stdout)["rounds"]]
    refused = sim("run", "small", "--beside-honest")
    assert refused.exit_code == 2
    assert "no adversaries" in refused.output


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the report is complete, without the run of honest attackers"),
        (Violation("a planted violation"), 3, "a planted violation"),
    ],
)
def test_a_report_is_kept_whatever_becomes_of_the_honest_run_beside_it(
    error: BaseException, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = World.run

    def stop(self: World, on_round: Callable[[Round], None] | None = None) -> None:
        if self.scenario.are_attackers_honest:
            raise error
        run(self, on_round)

    monkeypatch.setattr(World, "run", stop)
    result = sim("run", "small", "--rounds", 1, "--adversary", "zero", "--beside-honest", "--out", tmp_path)
    assert (result.exit_code, result.output.splitlines()[-1]) == (code, said)
    assert "of the rounds so far" not in result.output
    report = load_report(tmp_path)
    assert (report.is_complete, report.beside) == (True, None)
