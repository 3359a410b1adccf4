"""Bytes on the simulated links: what is sent is received by somebody who is up, or lost."""

import pytest

from p2pfm.messages import Announcement
from p2pfm.protocol.events import Publish
from p2pfm.protocol.peer import Peer
from p2pfm.types import Round, compute_digest
from sim.adversaries.filters import Deed
from sim.churn import ChurnModel
from sim.network import Gossip, NetworkModel
from sim.scenarios import LearnerModel, Scenario
from sim.world import World

AT_ONCE = NetworkModel(latency_ms=(0, 0), bytes_per_ms=1 << 40)
"""Nothing is ever under way, so nothing is when the run ends."""


def run(scenario: Scenario) -> World:
    world = World(scenario)
    world.run()
    return world


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(seed=1, num_peers=8, num_rounds=3, network=AT_ONCE),
        Scenario(
            seed=1,
            num_peers=48,
            num_rounds=2,
            shard_size=16,
            committee_size=3,
            learner=LearnerModel(kind="digests"),
            network=AT_ONCE,
        ),
    ],
    ids=["flat", "sharded"],
)
def test_without_loss_and_churn_all_that_is_sent_is_received(scenario: Scenario) -> None:
    hosts = run(scenario).hosts
    assert sum(host.num_bytes_sent for host in hosts) == sum(host.num_bytes_received for host in hosts) > 0


def test_what_is_lost_is_sent_and_not_received() -> None:
    hosts = run(Scenario(seed=1, num_peers=8, num_rounds=2, network=NetworkModel(loss=1.0))).hosts
    assert sum(host.num_bytes_sent for host in hosts) > 0
    assert sum(host.num_bytes_received for host in hosts) == 0


def test_who_is_never_up_receives_nothing() -> None:
    late = ChurnModel(late=0.25, late_ms=(10_000_000, 10_000_000))
    hosts = run(Scenario(seed=1, num_peers=8, num_rounds=2, churn=late)).hosts
    assert sorted(host.num_bytes_received > 0 for host in hosts) == [False] * 2 + [True] * 6
    assert all((host.num_bytes_received > 0) == (host.life > 0) for host in hosts)


@pytest.mark.parametrize("gossip", [None, Gossip()], ids=["direct", "mesh"])
def test_a_broadcast_is_sent_in_equal_parts_by_its_author_and_all_who_are_up_to_hear_it(gossip: Gossip | None) -> None:
    world = World(Scenario(seed=1, num_peers=20, num_rounds=1, network=NetworkModel(gossip=gossip)))
    author, down, *others = world.hosts
    for host in (author, *others):
        host.peer = Peer(host.me, world.config, host.durable)
    word = Announcement(Round(0), author.me, compute_digest(b"base"), compute_digest(b"payload"), 10, 1)
    world.transit.publish(author, Deed(Publish(word)))
    sent = [host.num_bytes_sent for host in others]
    assert len(set(sent)) == 1
    assert sent[0] > 0
    assert down.num_bytes_sent == 0
    assert sent[0] <= author.num_bytes_sent < sent[0] + 19
    total = author.num_bytes_sent + sum(sent)
    assert total % 19 == 0, "every one of the others is sent the whole message, be it up or not"
