"""Worlds of several shards: one base, everybody paid by what it contributed, and the same faults survived."""

import pytest

from p2pfm.messages import SyncRequest
from p2pfm.protocol.phases import Phase
from p2pfm.types import PeerId, Round
from sim.churn import ChurnModel
from sim.host import Host
from sim.network import NetworkModel
from sim.scenarios import AdversaryKind, LearnerModel, Scenario
from sim.transit import Transit
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
    assert world.num_crashes > 0
    assert len(world.checks.certificates) >= 3


def test_nobody_hears_another_shards_round() -> None:
    world = run(num_rounds=1)
    for host in world.hosts:
        assert host.peer is not None
        roster = host.peer.leaf.state.roster
        assert roster is not None
        assert len(roster.members) <= 4
        assert set(host.peer.state.updates.announcements) <= roster.by_peer.keys()


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
