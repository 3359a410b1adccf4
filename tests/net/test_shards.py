"""A network of two shards as eight real processes: rounds of two levels, one base, everybody paid, and two deaths."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nodes.localnet import PRESETS, Localnet, LocalNode, Role, localnet
from p2pfm.config import LimitConfig, PhaseConfig
from p2pfm.messages import Announcement, ShardMessage
from p2pfm.protocol.events import Received
from p2pfm.protocol.membership import compute_ranks
from p2pfm.protocol.phases import compute_position, compute_round_start
from p2pfm.protocol.shards import Deal, deal, get_shard_topic
from p2pfm.runtime.event_log import read_log
from p2pfm.settlement.ledger import Roster
from p2pfm.types import Millis, PeerId, Round, Wei
from sim.replay import replay_path

pytestmark = [pytest.mark.slow, pytest.mark.alone]

NUM_PEERS, SHARD_PEERS = 8, 4
PRESET = replace(
    PRESETS["toy"],
    limits=LimitConfig(peers_max=16, shard_peers_max=SHARD_PEERS),
    phases=PhaseConfig(
        train_ms=Millis(2_000),
        exchange_ms=Millis(1_500),
        score_ms=Millis(1_500),
        reveal_ms=Millis(1_000),
        attest_ms=Millis(1_200),
        merge_ms=Millis(800),
    ),
    startup_s=22,
)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Localnet]:
    roles: tuple[Role, ...] = ("honest",) * NUM_PEERS
    with localnet(tmp_path_factory.mktemp("net"), roles, PRESET, print) as running:
        for node in running.nodes:
            running.wait_until_running(node)
        yield running


def get_certified(net: Localnet, node: LocalNode) -> int:
    round = net.get_status(node).get("protocol", {}).get("certified_round")
    return -1 if round is None else int(round)


def wait_for_rounds(net: Localnet, nodes: list[LocalNode], round: int, num_tries: int) -> None:
    """Until all nodes hold a certificate of this round or a later one; `num_tries`: rounds that it may take."""
    ends_s = compute_round_start(net.network, Round(round + num_tries)) / 1000
    net.wait_until(
        f"round {round} is certified",
        lambda: all(get_certified(net, node) >= round for node in nodes),
        max(10.0, ends_s - time.time()),
    )


def get_now(net: Localnet) -> Round:
    return compute_position(net.network, Millis(int(time.time() * 1000))).round


def get_deal(net: Localnet, roster: Roster, round: int) -> Deal:
    dealt = deal(net.network, roster, Round(round))
    assert dealt is not None
    return dealt


def get_samples(node: LocalNode, name: str, label: str) -> dict[str, float]:
    """A metric's values by the value of one label (those of other labels added up)."""
    found: dict[str, float] = defaultdict(float)
    text = httpx.get(f"{node.url}/metrics", timeout=10).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels.get("direction", "in") == "in":
                found[sample.labels[label]] += sample.value
    return found


def choose_victims(net: Localnet, roster: Roster, round: int) -> list[LocalNode]:
    """One of each shard of a round, and none that must propose in it or in the next: a dead proposer costs a round."""
    proposers: set[PeerId] = set()
    for number in (round, round + 1):
        rosters = (roster, *get_deal(net, roster, number).shards)
        proposers |= {one.by_index[compute_ranks(one, Round(number))[0]].peer for one in rosters}
    names = [next(peer for peer in shard if peer not in proposers) for shard in get_deal(net, roster, round).names]
    return [node for node in net.nodes if node.peer in names]


def test_two_shards_certify_rounds_pay_everybody_and_outlive_a_death_in_each(net: Localnet) -> None:
    wait_for_rounds(net, net.nodes, 1, num_tries=3)
    roster = net.ledger.get_roster()
    assert len(roster.by_peer) == NUM_PEERS
    last = get_now(net)

    bases: dict[int, set[str]] = defaultdict(set)
    for node in net.nodes:
        protocol = net.get_status(node)["protocol"]
        bases[protocol["certified_round"]].add(protocol["base"])
        assert {update["peer"] for update in protocol["updates"]} <= {"shard-0", "shard-1"}
        assert protocol["shard"] in (0, 1)
        assert protocol["waits_for"]
    assert all(len(same) == 1 for same in bases.values()), bases

    # Nobody heard the announcements of a shard that it was not in: neither by number nor by topic.
    for node in net.nodes:
        own = {get_shard_topic(get_deal(net, roster, number).shard_of[PeerId(node.peer)]) for number in range(last + 1)}
        heard = get_samples(node, "p2pfm_messages_total", "kind")
        assert 0 < heard["shard announcement"] <= (SHARD_PEERS - 1) * (last + 1), (node.index, heard)
        topics = set(get_samples(node, "p2pfm_topic_messages_total", "topic"))
        assert topics - {"all", "top"} <= own, (node.index, topics, own)

    victims = choose_victims(net, roster, get_now(net) + 1)
    assert len(victims) == 2
    for victim in victims:
        net.kill(victim)
    rest = [node for node in net.nodes if node not in victims]
    wait_for_rounds(net, rest, get_now(net) + 1, num_tries=4)
    assert len({net.get_status(node)["protocol"]["base"] for node in rest}) <= 2, "one, or a round is being adopted"

    net.wait_until("a later round is on chain", lambda: len(net.ledger.get_rounds(Round(0))) >= 2, 20)
    told = net.get_status(rest[0])["protocol"]
    paid = {member.peer: Wei(int(told["cumulative_wei"][member.index])) for member in roster.members}
    dealt = get_deal(net, roster, 1)
    assert all(any(paid[peer] > 0 for peer in names) for names in dealt.names), paid

    for node in net.nodes:
        check_log(net, node)


def check_log(net: Localnet, node: LocalNode) -> None:
    """In every round a node has heard announcements of one shard only; and its log replays to what it did."""
    shards: dict[int, set[int]] = defaultdict(set)
    for path in sorted(Path(node.home).rglob("*.events")):
        for record in read_log(path)[1]:
            match record.event:
                case Received(message=ShardMessage(shard=shard, message=Announcement(round=round))):
                    shards[round].add(shard)
                case _:
                    pass
    assert shards
    assert all(len(heard) == 1 for heard in shards.values()), (node.index, shards)
    assert [report.difference for report in replay_path(node.home)] == [None]
