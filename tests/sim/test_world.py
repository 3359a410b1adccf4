"""Scenarios of the simulator: what the network must survive, each run from one seed with all invariants checked."""

import subprocess
import sys
from functools import cache

import msgspec
import pytest

from p2pfm.errors import ConfigError
from p2pfm.settlement.ledger import Slashed
from p2pfm.types import NANO, Millis, Round, compute_digest
from sim.checks import Violation
from sim.churn import ChurnModel, Diurnal, UpTime
from sim.host import Host
from sim.learners.convex import Problem
from sim.network import Gossip, LinkClass, NetworkModel, Partition
from sim.replay import replay
from sim.scenarios import AdversaryKind, ClockModel, LearnerModel, Outage, PhaseConfig, Scenario
from sim.world import World


def run(scenario: Scenario) -> World:
    world = World(scenario)
    world.run()
    return world


def bases(world: World) -> set[bytes]:
    return {host.durable.base for host in world.hosts}


def certified(world: World) -> list[Round]:
    return sorted(world.checks.certificates)


def rewards(world: World) -> list[float]:
    """Share of an even split that each peer drew."""
    claimed = world.chain.get_claimed()
    return [len(claimed) * amount / sum(claimed) for amount in claimed]


@cache
def fifty_with_crashes() -> World:
    return run(Scenario(seed=3, num_peers=50, num_rounds=5, churn=ChurnModel(crash=0.1)))


EVERYTHING = Scenario(
    seed=3,  # one in eight certifies no round
    num_peers=24,
    num_rounds=3,
    shard_size=8,
    churn=ChurnModel(
        crash=0.1,
        lost_disk=0.5,
        late=0.1,
        late_ms=(10_000, 70_000),
        diurnal=Diurnal(share=0.2, day_ms=200_000),
        trace=(UpTime(0, 0, 70_000), UpTime(0, 90_000, 180_000)),
        trace_repeats=True,
        trace_share=0.1,
    ),
    network=NetworkModel(
        loss=0.01,
        partitions=(Partition(5_000, 50_000, share=0.2, bridges=(1,)), Partition(0, 9_000, regions=("europe",))),
        regions="world",
        links=(LinkClass(0.5, 100, 500, loss=0.02), LinkClass(0.5, 5_000, 5_000)),
        behind_nat=0.3,
        symmetric_nat=0.2,
        gossip=Gossip(),
    ),
    clocks=ClockModel(skew_ms=300, drift_ppm=100),
    adversaries=("equivocator",),
    adversary_shares={"zero": 0.1, "alie": 0.1},
    stakes={"alie": 2.0},
)
"""Whatever draws and whatever is kept in sets, in one world."""


def test_one_seed_gives_one_trace() -> None:
    scenario = Scenario(seed=3, num_peers=16, num_rounds=3, churn=ChurnModel(crash=0.2))
    assert run(scenario).trace_digest() == run(scenario).trace_digest()


def test_another_seed_gives_another_trace() -> None:
    traces = {run(Scenario(seed=seed, num_peers=5, num_rounds=1)).trace_digest() for seed in (1, 2)}
    assert len(traces) == 2


def test_the_trace_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import sys; from sim.library import load_scenario; from sim.world import World;"
        "world = World(load_scenario(sys.argv[1]));"
        "world.run(); print(world.trace_digest(), world.num_departures, sorted(world.checks.certificates))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code, msgspec.json.encode(EVERYTHING).decode()],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    trace, num_departures, certificates = told.pop().split(maxsplit=2)
    assert len(trace) == 64
    assert int(num_departures) > 5
    assert certificates != "[]\n"


def test_crashes_do_not_stop_the_network() -> None:
    world = fifty_with_crashes()
    assert world.num_departures >= 20
    assert len(certified(world)) >= 4
    assert world.chain.get_head() is not None


def test_who_follows_a_trace_is_down_between_its_sessions() -> None:
    round_ms = 60_000
    trace = (UpTime(0, 0, 70_000), UpTime(0, 130_000, 400_000), UpTime(1, 90_000, 400_000))
    world = World(Scenario(seed=8, num_peers=8, num_rounds=4, churn=ChurnModel(trace=trace)))
    up: dict[int, list[bool]] = {}
    for moment in (1_000, 80_000, 100_000, 140_000):
        world.schedule.at(
            Millis(world.config.genesis_ms + moment),
            lambda at=moment: up.setdefault(at // round_ms, []).extend(
                host.peer is not None for host in world.hosts[:3]
            ),
        )
    world.run()
    assert up == {0: [True, False, True], 1: [False, False, True, False, True, True], 2: [True, True, True]}
    assert [host.life for host in world.hosts[:3]] == [2, 1, 1]
    assert len(certified(world)) >= 3
    assert len(bases(world)) == 1


@pytest.mark.parametrize("shard_size", [128, 8])
def test_a_crashed_peer_is_away_as_long_as_asked_from_the_moment_of_the_kill(shard_size: int) -> None:
    """In shards a peer may wait for a minute until the action at which it is killed."""
    asked_ms, every_ms = 5_000, 100
    scenario = Scenario(
        seed=2,
        num_peers=24,
        num_rounds=6,
        shard_size=shard_size,
        churn=ChurnModel(crash=0.25, down_ms=(asked_ms, asked_ms)),
        learner=LearnerModel("digests"),
    )
    world = World(scenario)
    down_since: dict[int, int] = {}
    away_ms = []

    def look(now_ms: int) -> None:
        for host in world.hosts:
            if host.peer is None:
                down_since.setdefault(host.index, now_ms)
            elif host.index in down_since:
                away_ms.append(now_ms - down_since.pop(host.index))
        world.schedule.after(every_ms, lambda: look(now_ms + every_ms))

    world.schedule.at(world.config.genesis_ms, lambda: look(0))
    world.run()
    assert len(away_ms) >= 20
    assert all(abs(away - asked_ms) <= every_ms for away in away_ms)


def test_a_crash_that_still_waits_for_an_action_keeps_nobody_up_beyond_its_session() -> None:
    sessions = [(0, 45_000), (60_000, 105_000), (130_000, 170_000), (200_000, 235_000)]
    trace = tuple(UpTime(peer, *session) for peer in range(24) for session in sessions)
    churn = ChurnModel(crash=1.0, down_ms=(20_000, 20_000), trace=trace)
    world = World(Scenario(num_peers=24, num_rounds=4, shard_size=8, churn=churn, learner=LearnerModel("digests")))
    num_up: list[int] = []
    for moment in range(1, 240_000, 500):
        if not any(begin <= moment < end for begin, end in sessions):
            world.schedule.at(
                world.config.genesis_ms + moment,
                lambda: num_up.append(sum(host.peer is not None for host in world.hosts)),
            )
    world.run()
    assert set(num_up) == {0}


def test_restarted_peers_end_on_the_same_base() -> None:
    world = fifty_with_crashes()
    assert any(host.life > 1 for host in world.hosts)
    assert len(bases(world)) == 1


def test_loss_falls_towards_the_known_optimum() -> None:
    scenario = Scenario(seed=4, num_peers=10, num_rounds=8)
    world, problem = run(scenario), Problem(4)
    losses = [world.losses[Round(number)] / NANO for number in range(8)]
    assert losses == sorted(losses, reverse=True)
    start = problem.loss(problem.parameters[0] * 0)
    assert losses[-1] - problem.optimum_loss < 0.05 * (start - problem.optimum_loss)


def test_every_round_of_quiet_peers_is_certified_by_all() -> None:
    world = run(Scenario(num_peers=7, num_rounds=3))
    assert certified(world) == [0, 1, 2]
    assert all(len(world.checks.holders[Round(number)]) == 7 for number in range(3))
    assert world.checks.blamed == set()


def test_one_peer_alone_is_its_own_network() -> None:
    assert certified(run(Scenario(num_peers=1, num_rounds=2))) == [0, 1]


def test_anti_entropy_makes_up_for_a_fifth_of_all_messages() -> None:
    world = run(Scenario(seed=2, num_peers=20, num_rounds=5, network=NetworkModel(loss=0.2)))
    assert len(certified(world)) >= 3  # a proposer that still lacks three vectors costs its round
    assert len(bases(world)) == 1


def test_clocks_half_a_second_apart_do_not_matter() -> None:
    world = run(Scenario(num_peers=12, num_rounds=3, clocks=ClockModel(skew_ms=500)))
    assert len(certified(world)) == 3


def test_a_partition_of_less_than_a_third_heals() -> None:
    # Two rounds of a minute; the cut lasts from the middle of the first to the middle of the third.
    cut = Partition(start_ms=30_000, end_ms=150_000, num_hosts=3)
    world = run(Scenario(seed=6, num_peers=12, num_rounds=4, network=NetworkModel(partitions=(cut,))))
    assert len(certified(world)) >= 3
    assert len(world.checks.holders[certified(world)[-1]]) == 12
    assert len(bases(world)) == 1


def test_hosts_behind_nats_get_on_by_hole_punching_and_by_others() -> None:
    def run_behind(**nats: float) -> World:
        return run(Scenario(seed=6, num_peers=12, num_rounds=3, network=NetworkModel(**nats)))  # type: ignore[arg-type]

    traces = {run_behind().trace_digest()}
    for nats in ({"behind_nat": 0.6}, {"behind_nat": 0.6, "symmetric_nat": 0.2}, {"behind_nat": 1.0, "punched": 1.0}):
        world = run_behind(**nats)
        traces.add(world.trace_digest())
        assert [len(world.checks.certificates[Round(number)].proposal.updates) for number in range(3)] == [12] * 3
        assert len(bases(world)) == 1
    assert len(traces) == 4
    # Gossip goes on where no hole can be punched, so rounds are certified; but nobody has anybody's payload.
    barred = run_behind(behind_nat=1.0, punched=0.0)
    assert [len(held.proposal.updates) for held in barred.checks.certificates.values()] == [0] * 3


def test_without_a_quorum_rounds_are_void_and_training_goes_on_afterwards() -> None:
    cut = Partition(start_ms=0, end_ms=90_000, num_hosts=6)
    world = run(Scenario(seed=6, num_peers=12, num_rounds=4, network=NetworkModel(partitions=(cut,))))
    assert Round(0) not in certified(world)
    assert {2, 3} <= set(certified(world))
    assert len(bases(world)) == 1


def test_settlement_waits_for_the_chain_and_training_does_not() -> None:
    world = run(Scenario(num_peers=7, num_rounds=3, outages=(Outage(start_ms=0, end_ms=130_000),)))
    assert certified(world) == [0, 1, 2]
    head = world.chain.get_head()
    assert head is not None
    assert head.round == 2


def test_evidence_waits_for_the_chain() -> None:
    def run_with(*outages: Outage) -> list[int]:
        """When stakes were slashed, by the ledger's clock [s after genesis]."""
        phases = PhaseConfig(20_000, 10_000, 10_000, 5_000, 3_000, 900)
        kinds: tuple[AdversaryKind, ...] = ("split_votes", "split_votes", "split_votes", "equivocator")
        world = run(
            Scenario(num_peers=12, num_rounds=6, rounds_per_epoch=6, adversaries=kinds, phases=phases, outages=outages)
        )
        entries = world.chain.ledger.get_entries()
        return [e.time_s - world.config.genesis_ms // 1000 for e in entries if isinstance(e.what, Slashed)]

    at_once = run_with()
    assert at_once
    end_s = at_once[0] + 10
    waited = run_with(Outage(start_ms=0, end_ms=end_s * 1000))
    assert waited
    assert all(end_s <= when for when in waited)


def test_an_epoch_of_several_rounds_is_paid_once() -> None:
    world = run(Scenario(num_peers=7, num_rounds=4, rounds_per_epoch=2))
    rounds = world.chain.ledger.get_rounds(Round(0))
    assert [settled.sums.reward_wei > 0 for settled in rounds] == [False, True, False, True]


@pytest.mark.parametrize(("kind", "rounds_per_epoch"), [("zero", 1), ("noise", 5), ("replay", 5), ("noisy_replay", 5)])
def test_free_riders_earn_next_to_nothing(kind: AdversaryKind, rounds_per_epoch: int) -> None:
    # Noise (what the codec leaves of a replay is noise, too) helps as often as it harms: an epoch of rounds is what
    # tells it from work (ALGORITHMS, part 4).
    scenario = Scenario(seed=5, num_peers=12, num_rounds=5, rounds_per_epoch=rounds_per_epoch, adversaries=(kind, kind))
    world = run(scenario)
    shares = rewards(world)
    assert max(shares[:2]) < 0.1
    assert min(shares[2:]) > 0.5
    assert len(certified(world)) == 5


def test_of_two_peers_with_one_work_the_first_is_paid() -> None:
    scenario = Scenario(seed=7, num_peers=8, num_rounds=3, adversaries=("copycat",))
    world = run(scenario)
    copycat, victim = world.hosts[0].me, world.hosts[-1].me
    assert certified(world) == [0, 1, 2]
    first = world.checks.certificates[Round(0)].proposal
    contributions = {update.peer: update.contribution for update in first.updates}
    assert sorted((contributions[copycat], contributions[victim]))[0] == 0
    assert min(value for peer, value in contributions.items() if peer not in (copycat, victim)) > 0
    # What was not paid stays in its maker's residual, so later on the two differ: still they draw less than two peers.
    shares = rewards(world)
    assert shares[0] + shares[-1] < 1.5 * rewards(run(Scenario(seed=7, num_peers=8, num_rounds=3)))[-1]
    assert world.checks.blamed == set()


def test_who_skips_the_proof_of_computation_is_known_to_every_evaluator() -> None:
    scenario = Scenario(seed=3, num_peers=6, num_rounds=20, work_steps=8, adversaries=("skipper",))
    world = run(scenario)
    skipper, *honest = (host.me for host in world.hosts)
    for host in world.hosts[1:]:
        assert host.peer is not None
        averages = [host.peer.proofs.get_average(peer) for peer in (skipper, *honest)]
        assert averages[0] < min(averages[1:])
    assert run(scenario).trace_digest() == world.trace_digest()


@pytest.mark.parametrize(("kind", "reward_max"), [("sign_flip", 0), ("gaussian", 0.1)])
def test_a_saboteur_earns_no_more_than_noise_and_does_no_harm(kind: AdversaryKind, reward_max: float) -> None:
    honest = run(Scenario(seed=5, num_peers=12, num_rounds=4))
    attacked = run(Scenario(seed=5, num_peers=12, num_rounds=4, rounds_per_epoch=4, adversaries=(kind,) * 3))
    assert max(rewards(attacked)[:3]) <= reward_max
    assert attacked.losses[Round(3)] < 1.15 * honest.losses[Round(3)]


def test_a_boosted_update_moves_the_base_no_further_than_an_honest_one() -> None:
    honest = run(Scenario(seed=5, num_peers=12, num_rounds=4))
    attacked = run(Scenario(seed=5, num_peers=12, num_rounds=4, adversaries=("boosted",) * 3))
    assert attacked.losses[Round(3)] < 1.05 * honest.losses[Round(3)]
    shares = rewards(attacked)
    assert max(shares[:3]) < 1.5 * max(shares[3:])


def test_lying_evaluators_below_a_third_change_little() -> None:
    world = run(Scenario(seed=5, num_peers=12, num_rounds=4, adversaries=("liar", "liar")))
    honest = run(Scenario(seed=5, num_peers=12, num_rounds=4))
    assert certified(world) == [0, 1, 2, 3]
    assert world.losses[Round(3)] < 1.1 * honest.losses[Round(3)]


def test_an_equivocator_is_blamed_and_cannot_void_a_round() -> None:
    world = run(Scenario(seed=7, num_peers=12, num_rounds=3, adversaries=("equivocator",)))
    assert world.checks.blamed == {world.hosts[0].me}
    assert certified(world) == [0, 1, 2]
    assert rewards(world)[0] == 0


@pytest.mark.parametrize("seed", range(3))
def test_an_evaluator_of_two_faces_is_blamed_and_cannot_void_a_round(seed: int) -> None:
    world = run(Scenario(seed=seed, num_peers=9, num_rounds=3, adversaries=("two_faced",)))
    assert world.checks.blamed == {world.hosts[0].me}
    assert certified(world) == [0, 1, 2]


def test_a_late_evaluator_is_left_out() -> None:
    # With equal clocks: before a proposer whose clock is behind, it can be in time.
    world = run(Scenario(seed=7, num_peers=9, num_rounds=3, clocks=ClockModel(skew_ms=0), adversaries=("late",)))
    assert certified(world) == [0, 1, 2]
    member = next(m.index for m in world.chain.roster.members if m.peer == world.hosts[0].me)
    for certificate in world.checks.certificates.values():
        if certificate.proposal.proposer != member:
            assert member not in [reveal.member for reveal in certificate.proposal.reveals]


def test_a_silent_member_costs_only_the_rounds_that_it_should_propose() -> None:
    world = run(Scenario(seed=7, num_peers=9, num_rounds=9, adversaries=("silent",)))
    assert len(certified(world)) == 8


def test_what_is_never_served_is_never_paid() -> None:
    world = run(Scenario(seed=7, num_peers=9, num_rounds=2, adversaries=("withholder",)))
    assert rewards(world)[0] == 0
    assert certified(world) == [0, 1]


def test_all_adversaries_at_once_are_survived() -> None:
    kinds: tuple[AdversaryKind, ...] = (
        "equivocator", "two_faced", "zero", "liar", "late", "silent", "sign_flip", "withholder", "replay", "noise",
    )  # fmt: skip
    world = run(Scenario(seed=1, num_peers=40, num_rounds=4, churn=ChurnModel(crash=0.05), adversaries=kinds))
    assert len(certified(world)) >= 3
    assert len(bases(world)) == 1
    assert world.checks.blamed <= {host.me for host in world.hosts[:2]}


def test_an_event_log_of_every_life_replays_to_the_same_actions() -> None:
    world = run(Scenario(seed=3, num_peers=9, num_rounds=3, churn=ChurnModel(crash=0.3), keep_logs=tuple(range(9))))
    logs = [log for host in world.hosts for log in host.logs]
    assert len(logs) > 9
    for log in logs:
        report = replay(bytes(log))
        assert report.difference is None
        assert report.num_events > 0


def test_a_replay_names_the_first_step_that_differs() -> None:
    world = run(Scenario(num_peers=4, num_rounds=1, keep_logs=(0,)))
    log = bytes(world.hosts[0].logs[0])
    position = log.rindex(b'"trained"')
    changed = log[:position] + log[position:].replace(b'"trained",0,', b'"trained",7,', 1)
    difference = replay(changed).difference
    assert difference is not None
    assert difference.event == "Trained"


def test_a_violation_names_seed_step_peers_and_the_command_that_replays_it() -> None:
    scenario = Scenario(seed=11, num_peers=4, num_rounds=1)
    world = World(scenario)
    victim: Host = world.hosts[2]
    # A peer that forgets its signatures on restart would sign twice: let the checks see such a one.
    world.checks._signed[(victim.me, Round(0), "top")] = compute_digest(b"another proposal")
    with pytest.raises(Violation) as caught:
        world.run()
    text = str(caught.value)
    assert "seed 11, step " in text
    assert victim.me in text
    assert 'p2pfm sim run --scenario \'{"seed":11,"num_peers":4,"num_rounds":1}\'' in text


@pytest.mark.parametrize("field", [{"num_peers": 0}, {"num_peers": 16_001}, {"committee_size": 9}, {"num_rounds": 0}])
def test_an_impossible_scenario_is_refused(field: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        run(Scenario(**field))  # type: ignore[arg-type]


def test_a_committee_that_cannot_certify_is_replaced() -> None:
    """Four of twelve say nothing as evaluators, three of four seats must sign: two of the first draw are theirs."""
    for seed in range(20):
        scenario = Scenario(seed=seed, num_peers=12, committee_size=4, num_rounds=8, adversaries=("silent",) * 4)
        world = World(scenario)
        if sum(index < 4 for index in world.chain.roster.committee) == 2:
            break
    world.run()
    certificates = world.checks.certificates
    assert Round(0) not in certificates
    assert len(certificates) >= 2
    assert world.chain.roster.epoch >= 3, "and every committee has its epoch"
