"""The hunt finds what is broken on purpose and makes it small; what it found once stays mended."""

import shlex
from collections.abc import Callable
from hashlib import sha256
from itertools import count
from pathlib import Path
from random import Random
from secrets import token_bytes
from typing import get_args

import msgspec
import pytest
from typer.testing import CliRunner, Result

from p2pfm.config import NetworkConfig
from p2pfm.errors import ConfigError
from p2pfm.messages import Announcement, Certificate, Proposal, Word
from p2pfm.protocol.ballot import Ballot
from p2pfm.protocol.events import (
    Adopt,
    Aggregated,
    AnyAction,
    AnyEvent,
    Blame,
    Durable,
    Note,
    Persist,
    Publish,
    Received,
    Serve,
    SyncAnswered,
    Trained,
)
from p2pfm.protocol.peer import Peer
from p2pfm.protocol.phases import Phase
from p2pfm.types import Digest, Millis, PeerId, Round, compute_digest
from sim.churn import ChurnModel
from sim.cli import app
from sim.hunt import Failure, Finding, draw_scenario, find_failure, hunt, load, save, shrink
from sim.scenarios import AdversaryKind, Scenario

SEEDS = sorted((Path(__file__).parent / "seeds").glob("*.json"))


def hunt_first(draw: object = None, runs_max: int = 20) -> Finding:
    found = hunt(5, 3, folder=None, runs_max=runs_max, findings_max=1, draw=draw)  # type: ignore[arg-type]
    assert len(found) == 1
    return found[0]


def test_a_core_that_serves_in_train_is_found_with_one_peer_and_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Peer.handle

    def serve_at_once(self: Peer, event: AnyEvent, now_ms: Millis) -> list[AnyAction]:
        actions = handle(self, event, now_ms)
        has_announced = any(isinstance(action, Publish) for action in actions)
        return [*actions, Serve(event.payload)] if isinstance(event, Trained) and has_announced else actions

    monkeypatch.setattr(Peer, "handle", serve_at_once)
    found = hunt_first()
    assert found.failure.kind == "a payload is served only after TRAIN"
    assert (found.scenario.num_peers, found.scenario.num_rounds) == (1, 1)
    assert found.drawn.num_peers > 1
    assert found.command.startswith("p2pfm sim hunt --again ")
    assert f"seed {found.scenario.seed}, step " in found.failure.text


def test_a_core_that_signs_every_proposal_is_found_with_one_adversary(monkeypatch: pytest.MonkeyPatch) -> None:
    def sign_all(self: Ballot, author: PeerId, message: Word, *, is_second: bool) -> list[AnyAction]:
        if not isinstance(message, Proposal):
            return []
        self.standing.save(signed_round=-1)
        self.state.proposal, self.state.is_proposal_valid = message, False
        return self.consider_proposal()

    def draw(rng: Random) -> Scenario:
        return Scenario(seed=rng.randrange(1000), num_peers=5, num_rounds=4, adversaries=("lazy", "split_votes"))

    monkeypatch.setattr(Ballot, "on_second_word", sign_all)
    found = hunt_first(draw)
    assert found.failure.kind == "a member signs one proposal of round #"
    assert "split_votes" in found.scenario.adversaries
    assert set(found.scenario.adversaries) <= {"split_votes", "zero"}
    assert found.scenario.num_rounds < found.drawn.num_rounds


def test_a_core_that_blames_whoever_is_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    on_announcement = Ballot._on_announcement

    def blame_late(self: Ballot, author: PeerId, message: Announcement) -> tuple[bool, list[AnyAction]]:
        is_late = self.state.phase > 0 and self.state.saw_train
        return (True, [Blame(author, "late")]) if is_late else on_announcement(self, author, message)

    def draw(rng: Random) -> Scenario:
        return Scenario(seed=rng.randrange(1000), num_peers=10, num_rounds=4, adversaries=("latecomer", "silent"))

    monkeypatch.setattr(Ballot, "_on_announcement", blame_late)
    found = hunt_first(draw)
    assert found.failure.kind == "no honest peer is blamed (late)"
    assert found.scenario.adversaries == ("latecomer",)
    assert (found.scenario.num_peers, found.scenario.num_rounds) < (4, 2)


def test_a_queue_that_is_too_long_only_at_the_end_of_a_round_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Peer.handle

    def hoard(self: Peer, event: AnyEvent, now_ms: Millis) -> list[AnyAction]:
        actions = handle(self, event, now_ms)
        if self.phase == Phase.MERGE and self.me == "peer-00001":
            self.leaf.state.updates.tries |= {compute_digest(b"%d" % number): 1 for number in range(9)}
        return actions

    monkeypatch.setattr(Peer, "handle", hoard)
    failure = find_failure(Scenario(num_peers=4, num_rounds=2))
    assert failure is not None
    assert failure.kind == "payloads asked for: # of at most #"
    assert "peer-00001" in failure.text


def change_adoptions(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[AnyAction]], list[AnyAction]]) -> None:
    handle = Peer.handle

    def handle_changed(self: Peer, event: AnyEvent, now_ms: Millis) -> list[AnyAction]:
        actions = handle(self, event, now_ms)
        return change(actions) if any(isinstance(action, Adopt) for action in actions) else actions

    monkeypatch.setattr(Peer, "handle", handle_changed)


def test_a_core_that_adopts_before_it_saves_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    change_adoptions(monkeypatch, lambda actions: sorted(actions, key=lambda action: isinstance(action, Persist)))
    found = hunt_first()
    assert found.failure.kind == "a base that is adopted is on disk before"
    assert (found.scenario.num_peers, found.scenario.num_rounds) == (1, 1)


def test_a_core_that_saves_and_does_not_adopt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    change_adoptions(monkeypatch, lambda actions: [action for action in actions if not isinstance(action, Adopt)])
    failure = find_failure(Scenario(num_peers=1, num_rounds=1))
    assert failure is not None
    assert failure.kind == "a base that is on disk is adopted"


@pytest.mark.parametrize("what", ["base", "residual"])
def test_a_core_that_restarts_with_something_else_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Peer.__init__

    def forget(self: Peer, me: PeerId, config: NetworkConfig, durable: Durable) -> None:
        if durable.head is not None:
            durable = msgspec.structs.replace(durable, **{what: compute_digest(b"another")})
        begin(self, me, config, durable)

    def draw(rng: Random) -> Scenario:
        return Scenario(seed=rng.randrange(1000), num_peers=8, num_rounds=4, churn=ChurnModel(crash=0.3))

    monkeypatch.setattr(Peer, "__init__", forget)
    found = hunt_first(draw)
    rules = {
        "base": "a restarted peer holds the base that it adopted last",
        "residual": "a restarted peer's base and residual are on its disk",
    }
    assert found.failure.kind == rules[what]


def test_an_exception_in_the_core_is_a_finding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: Ballot, digest: Digest, is_malformed: bool) -> list[AnyAction]:
        raise KeyError(digest.hex())

    monkeypatch.setattr(Ballot, "on_fetch_failed", forget)
    scenario = Scenario(seed=2, num_peers=6, num_rounds=2, adversaries=("zero", "withholder"))
    failure = find_failure(scenario)
    assert failure is not None
    assert failure.kind == "KeyError in forget of test_hunt.py"
    small = shrink(scenario, failure).scenario
    assert small.adversaries == ("withholder",)
    assert (small.num_peers, small.num_rounds) == (2, 1)


def test_a_network_that_stands_still_without_a_reason_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ballot, "_aggregate", lambda self: [])
    scenario = Scenario(num_peers=4, num_rounds=2, rounds_per_epoch=2, committee_size=3)
    failure = find_failure(scenario)
    assert failure is not None
    assert failure.kind == "a quiet network certifies every round"
    assert find_failure(msgspec.structs.replace(scenario, adversaries=("silent",))) is None


def test_a_peer_that_never_catches_up_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Peer.handle

    def stay_deaf(self: Peer, event: AnyEvent, now_ms: Millis) -> list[AnyAction]:
        is_news = isinstance(event, Aggregated | SyncAnswered) or (
            isinstance(event, Received) and isinstance(event.message, Certificate)
        )
        return [] if is_news and self.me == "peer-00003" else handle(self, event, now_ms)

    monkeypatch.setattr(Peer, "handle", stay_deaf)
    failure = find_failure(Scenario(num_peers=4, num_rounds=2))
    assert failure is not None
    assert failure.kind == "on a good network nobody is left behind"
    assert "peer-00003" in failure.text


def test_one_seed_draws_the_same_scenarios() -> None:
    drawn = [[draw_scenario(rng) for _ in range(50)] for rng in (Random("7 hunt"), Random("7 hunt"))]
    assert drawn[0] == drawn[1]
    assert len({scenario.num_peers for scenario in drawn[0]}) > 10


def test_a_hunt_draws_all_that_a_scenario_can_say() -> None:
    """But for what is slow: transformers and a real EVM; and titles, batches, honest attackers."""
    rng = Random("8 hunt")
    drawn = [draw_scenario(rng) for _ in range(1_500)]
    plain = Scenario()
    for name in set(plain.__struct_fields__) - {"title", "ledger", "are_attackers_honest"}:
        assert any(getattr(scenario, name) != getattr(plain, name) for scenario in drawn), name
    assert {scenario.learner.kind for scenario in drawn} >= {"digests", "convex"}
    assert {kind for scenario in drawn for kind in scenario.adversaries} == set(get_args(AdversaryKind))
    for name in set(ChurnModel.__struct_fields__) - {"trace_file"}:
        assert len({str(getattr(scenario.churn, name)) for scenario in drawn}) > 1, name
    cuts = [cut for scenario in drawn for cut in scenario.network.partitions]
    for name in ("num_hosts", "share", "hosts", "regions", "bridges"):
        assert any(getattr(cut, name) for cut in cuts), name


def test_a_hunt_runs_what_it_draws_until_it_is_told_to_stop() -> None:
    told: list[int] = []

    def on_run(number: int, scenario: Scenario, failure: Failure | None) -> None:
        told.append(number)

    def draw(rng: Random) -> Scenario:
        return Scenario(seed=rng.randrange(9), num_peers=2, num_rounds=1)

    assert hunt(5, 1, on_run, folder=None, runs_max=3, draw=draw) == []
    assert told == [1, 2, 3]


def test_a_finding_is_kept_in_a_file_that_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Peer, event: AnyEvent, now_ms: Millis) -> list[AnyAction]:
        raise ValueError("broken")

    monkeypatch.setattr(Peer, "handle", fail)
    found = hunt(5, 3, folder=tmp_path, runs_max=1, findings_max=1)[0]
    kept = load(Path(found.path))
    assert kept.scenario == found.scenario
    assert find_failure(kept.scenario) == found.failure


def test_a_file_holds_what_is_unusual_and_nothing_else(tmp_path: Path) -> None:
    for number, rng in enumerate(Random(f"{seed}") for seed in range(20)):
        drawn = draw_scenario(rng)
        finding = Finding(Failure(f"rule {number}", ""), drawn, drawn, "", 0)
        assert load(Path(save(finding, tmp_path).path)).scenario == drawn
    plain = Finding(Failure("plain", ""), Scenario(), Scenario(), "", 0)
    assert b"scenario" in Path(save(plain, tmp_path).path).read_bytes()
    assert len(Path(save(plain, tmp_path).path).read_bytes()) < 100


def test_a_file_that_is_no_seed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"kind": 1}')
    with pytest.raises(ConfigError, match=r"broken\.json"):
        load(path)


def sim(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def break_quiet(monkeypatch: pytest.MonkeyPatch) -> Scenario:
    monkeypatch.setattr(Ballot, "_aggregate", lambda self: [])
    return Scenario(num_peers=4, num_rounds=2, committee_size=3)


def break_replay(monkeypatch: pytest.MonkeyPatch) -> Scenario:
    counts = count()  # a core that is not a function of its events
    handle = Peer.handle

    def forget(self: Peer, event: AnyEvent, now_ms: Millis) -> list[AnyAction]:
        actions = handle(self, event, now_ms)
        return [*actions, Note(Round(0), "odd")] if next(counts) % 7 == 0 and isinstance(event, Received) else actions

    monkeypatch.setattr(Peer, "handle", forget)
    return Scenario(num_peers=4, num_rounds=1, keep_logs=(0, 1, 2, 3), adversaries=("silent",))


def break_trace(monkeypatch: pytest.MonkeyPatch) -> Scenario:
    monkeypatch.setattr("sim.world.sha256", lambda: sha256(token_bytes(8)))
    return Scenario(num_peers=3, num_rounds=1, adversaries=("silent",))


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (break_quiet, "a quiet network certifies every round"),
        (break_replay, "a log replays to the same actions"),
        (break_trace, "one seed gives one trace"),
    ],
)
def test_the_command_of_a_finding_shows_it_again(
    plant: Callable[[pytest.MonkeyPatch], Scenario], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = plant(monkeypatch)
    failure = find_failure(scenario, is_repeated=True)
    assert failure is not None
    assert failure.kind == kind
    command = failure.text.partition("Replay: ")[2]
    path = save(Finding(failure, scenario, scenario, command, 0), tmp_path).path
    for again in (sim(*shlex.split(command)[2:]), sim("hunt", "--again", path)):
        assert again.exit_code == 3, again.output
        assert f"violated: {kind}" in again.output
    monkeypatch.undo()
    assert sim("hunt", "--again", path).exit_code == 0
    assert sim("run", path).exit_code == 0


def test_a_run_that_does_not_end_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.hunt.STEPS_MAX", 5)
    failure = find_failure(Scenario(num_peers=4, num_rounds=1))
    assert failure is not None
    assert failure.kind == "a run ends within # steps"


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: path.stem)
def test_what_failed_once_fails_no_more(path: Path) -> None:
    assert find_failure(load(path).scenario) is None
