"""Worlds of several shards: one base, everybody paid by what it contributed, and the same faults survived."""

from collections import Counter, defaultdict

import pytest

from p2pfm.messages import Proposal, SyncRequest
from p2pfm.protocol.phases import Phase
from p2pfm.protocol.shards import deal
from p2pfm.types import PeerId, Round
from sim.churn import ChurnModel
from sim.clocks import ClockModel
from sim.host import Host
from sim.network import NetworkModel
from sim.scenarios import AdversaryKind, LearnerModel, Scenario
from sim.transit import Pull, Transit
from sim.world import World


def run(**fields: object) -> World:
    world = World(Scenario(**{"seed": 6, "num_peers": 15, "shard_size": 4, "num_rounds": 4, **fields}))  # type: ignore[arg-type]
    world.run()
    return world


def rewards(world: World) -> list[float]:
    claimed = world.chain.get_claimed()
    return [len(claimed) * amount / sum(claimed) for amount in claimed]


def test_four_shards_hold_one_base_and_learn() -> None:
    world = run()
    assert sorted(world.checks.certificates) == [0, 1, 2, 3]
    assert len({host.durable.base for host in world.hosts}) == 1
    assert world.losses[Round(3)] < world.losses[Round(0)]
    updates = world.checks.certificates[Round(0)].proposal.updates
    assert [update.peer for update in updates if update.weight] != []
    assert all(update.peer.startswith("shard-") for update in updates)


def test_nine_are_the_usual_committee_though_a_shard_has_fewer() -> None:
    usual, said = run(num_rounds=2), run(num_rounds=2, committee_size=9)
    assert usual.trace_digest() == said.trace_digest()
    roster = said.chain.ledger.get_roster()
    assert len(roster.committee) == 9
    dealt = deal(said.config, roster, Round(1))
    assert dealt is not None
    assert all(len(shard.committee) == len(shard.members) <= 4 for shard in dealt.shards)


def test_shards_that_learn_the_same_are_neither_copies_of_each_other_nor_of_the_last_round() -> None:
    """Means over 32 peers have cosines of over .9, and lie largely along the last aggregate."""
    world = run(num_peers=96, shard_size=32, committee_size=3)
    losses = [world.losses[Round(number)] for number in range(4)]
    for number in range(1, 4):
        updates = world.checks.certificates[Round(number)].proposal.updates
        assert len(updates) == 3
        assert all(update.contribution > 0 and update.weight > 0 for update in updates)
        gained = sum(update.contribution for update in updates)
        assert gained == pytest.approx(losses[number - 1] - losses[number], rel=0.5)


def test_all_members_of_all_shards_are_paid() -> None:
    assert min(rewards(run())) > 0.1


@pytest.mark.parametrize("kind", ["zero", "replay", "sign_flip"])
def test_who_contributes_nothing_is_paid_next_to_nothing(kind: AdversaryKind) -> None:
    world = run(adversaries=(kind, kind))
    assert max(rewards(world)[:2]) < 0.3


def test_a_shard_without_a_quorum_costs_its_own_update_only() -> None:
    world = run(num_peers=16, adversaries=("silent",) * 3, num_rounds=5)
    assert len(world.checks.certificates) >= 3
    assert len({host.durable.base for host in world.hosts}) == 1


def test_crashes_lost_disks_and_lost_messages_are_survived() -> None:
    churn = ChurnModel(crash=0.1, lost_disk=0.5, down_ms=(2_000, 30_000))
    world = run(num_peers=24, shard_size=8, num_rounds=5, churn=churn, network=NetworkModel(loss=0.02))
    assert world.num_departures > 0
    assert len(world.checks.certificates) >= 3


def test_nobody_hears_another_shards_round() -> None:
    world = run(num_rounds=1)
    for host in world.hosts:
        assert host.peer is not None
        roster = host.peer.leaf.state.roster
        assert roster is not None
        assert len(roster.members) <= 4
        assert set(host.peer.state.updates.announcements) <= roster.by_peer.keys()


LISTENING = {
    "num_peers": 48,
    "shard_size": 12,
    "committee_size": 5,
    "learner": LearnerModel(kind="digests"),
    "clocks": ClockModel(skew_ms=0, drift_ppm=0),
}
"""Four shards of twelve, five of which sit on the committee."""


def test_who_has_no_seat_hears_the_result_only_and_passes_on_what_its_shard_made() -> None:
    world = World(Scenario(seed=6, num_rounds=1, **LISTENING))  # type: ignore[arg-type]
    world.run(lambda round: check_who_heard_what(world) if round == 0 else None)
    assert {len(holders) for holders in world.checks.holders.values()} == {48}


def check_who_heard_what(world: World) -> None:
    num_seated = 0
    for host in world.hosts:
        assert host.peer is not None
        leaf = host.peer.leaf
        certificate = leaf.state.certificate
        assert certificate is not None, "its shard's, by which it knows that its own update was merged"
        assert certificate.proposal.new_base in host.served
        payloads = {update.payload for update in certificate.proposal.updates}
        if leaf.is_outside():
            assert set(leaf.state.updates.announcements) == {host.me}
            assert host.disk.held & payloads == {host.durable.announced_payload}, "nothing of its shard's members"
            assert len(leaf.state.log.get(Proposal, leaf.dealt.seats[leaf.shard][0])) == 0  # type: ignore[union-attr,index]
        else:
            num_seated += 1
            assert len(leaf.state.updates.announcements) == 12
            assert payloads <= host.disk.held
    assert num_seated == 20


def test_what_a_peer_downloads_is_a_fraction_of_what_its_committee_does() -> None:
    received: dict[bool, list[int]] = {True: [], False: []}

    def read(round: Round) -> None:
        for host in world.hosts:
            assert host.peer is not None
            received[host.peer.leaf.is_outside()].append(host.num_bytes_received)

    world = World(Scenario(seed=6, num_rounds=1, **LISTENING))  # type: ignore[arg-type]
    world.run(read)
    assert len(received[False]) == 20
    assert max(received[True]) < 0.75 * min(received[False]), "four shards' payloads, and not twelve peers' beside them"


MANY = {**LISTENING, "num_peers": 320, "shard_size": 18, "committee_size": 3}
"""Eighteen shards: their payloads are longer than the base."""


def count_payloads(world: World) -> Counter[bool]:
    """Of whoever has no seat at all: whether it holds more shards' payloads than its own's."""
    (certificate,) = world.checks.certificates.values()
    found: Counter[bool] = Counter()
    for host in world.hosts:
        assert host.peer is not None
        if host.peer.leaf.is_outside() and host.peer.top.is_outside():
            found[len(host.disk.held & certificate.proposal.payloads) > 1] += 1
    return found


def test_of_many_shards_who_has_no_seat_takes_the_base_from_its_committee() -> None:
    world = World(Scenario(seed=6, num_rounds=1, **MANY))  # type: ignore[arg-type]
    found: list[Counter[bool]] = []
    world.run(lambda round: found.append(count_payloads(world)))
    assert found[0][True] == 0
    assert found[0][False] > 200
    assert {len(holders) for holders in world.checks.holders.values()} == {320}


def test_a_base_that_nobody_gives_is_made_of_the_shards_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Transit._serve

    def refuse_bases(self: Transit, host: Host, life: int, pulls: list[Pull]) -> None:
        for pull in pulls:
            if pull[0].kind == "base":
                pull[2].served.discard(pull[0].digest)
        serve(self, host, life, pulls)

    monkeypatch.setattr(Transit, "_serve", refuse_bases)
    world = run(num_rounds=2, **MANY)
    assert sorted(world.checks.certificates) == [0, 1]
    assert {len(holders) for holders in world.checks.holders.values()} == {320}


def test_an_own_update_that_was_merged_is_not_sent_again() -> None:
    """Error feedback without a seat: the residual moves on, which only the shard's certificate tells."""
    world = run(num_rounds=2, num_peers=24, shard_size=8, committee_size=3)
    assert sorted(world.checks.certificates) == [0, 1]
    outside = [host for host in world.hosts if host.peer is not None and host.peer.leaf.is_outside()]
    assert outside
    assert all(host.durable.residual is not None for host in outside)
    assert all(host.durable.residual == host.durable.pending_residual for host in outside)


def test_a_lost_certificate_of_a_shard_is_asked_for() -> None:
    """Two speakers tell it; at 20 % loss one in 25 hears neither."""
    told: Counter[bool] = Counter()

    def read(round: Round) -> None:
        shards: defaultdict[int, list[bool]] = defaultdict(list)
        for host in world.hosts:
            assert host.peer is not None
            leaf = host.peer.leaf
            if leaf.is_outside() and leaf.shard is not None:
                shards[leaf.shard].append(leaf.state.certificate is not None)
        told.update(is_told for shard in shards.values() if any(shard) for is_told in shard)

    world = World(Scenario(seed=6, num_rounds=6, network=NetworkModel(loss=0.2), **LISTENING))  # type: ignore[arg-type]
    world.run(read)
    assert told[True] > 40
    assert told[False] == 0


def test_a_peers_messages_do_not_grow_with_the_network() -> None:
    """Four times the peers in shards of one size: a peer hears as much of its shard, and of the level above."""

    def hear(num_peers: int) -> float:
        model = LearnerModel(kind="digests")
        world = run(num_peers=num_peers, shard_size=16, num_rounds=1, learner=model, committee_size=5)
        assert sorted(world.checks.certificates) == [0]
        return world.num_steps / num_peers

    assert hear(192) < 1.5 * hear(48)


def test_who_only_awaits_the_committee_above_asks_nobody_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, Phase]] = []
    ask = Transit.ask_sync

    def watch(self: Transit, host: Host, peer: PeerId, request: SyncRequest) -> None:
        assert host.peer is not None
        top, is_done = host.peer.top, host.peer.leaf.state.certificate is not None
        asked.append((is_done and top.get_my_index() is None, top.state.phase))
        ask(self, host, peer, request)

    monkeypatch.setattr(Transit, "ask_sync", watch)
    network = NetworkModel(loss=0.1)
    world = run(num_peers=48, shard_size=8, network=network, learner=LearnerModel(kind="digests"))
    assert {phase for is_waiting, phase in asked if is_waiting} <= {Phase.MERGE}
    assert Phase.SCORE in {phase for _, phase in asked}
    assert {len(holders) for holders in world.checks.holders.values()} == {48}, "all hear of it for all that"
