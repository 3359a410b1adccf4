"""A network of two shards as ten real processes: rounds of two levels, one base, everybody paid, and two deaths."""

import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nodes.homes import CONFIG_NAME
from nodes.localnet import PRESETS, Localnet, LocalNode, Role, localnet
from nodes.rewards import Fetch, read_rewards, verify_rewards
from p2pfm.config import LimitConfig, PhaseConfig
from p2pfm.messages import Announcement, ShardMessage
from p2pfm.protocol.events import Received
from p2pfm.protocol.membership import compute_ranks
from p2pfm.protocol.phases import compute_position, compute_round_start
from p2pfm.protocol.shards import deal, get_committee_topic, get_shard_topic
from p2pfm.runtime.event_log import read_log
from p2pfm.types import Digest, Millis, Round
from sim.replay import replay_path

pytestmark = [pytest.mark.slow, pytest.mark.alone]

NUM_PEERS, SHARD_PEERS, NUM_SEATS = 10, 5, 4
PRESET = replace(
    PRESETS["toy"],
    # One of each shard has no seat in it, and six have none above: three of four are a quorum.
    scoring=msgspec.structs.replace(PRESETS["toy"].scoring, committee_size=NUM_SEATS),
    limits=LimitConfig(peers_max=16, shard_peers_max=SHARD_PEERS),
    phases=PhaseConfig(
        train_ms=Millis(1_800),
        exchange_ms=Millis(1_300),
        score_ms=Millis(1_400),
        reveal_ms=Millis(800),
        attest_ms=Millis(1_200),
        merge_ms=Millis(800),
    ),
    startup_s=24,
)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Localnet]:
    roles: tuple[Role, ...] = tuple("honest" for _ in range(NUM_PEERS))
    with localnet(tmp_path_factory.mktemp("net"), roles, PRESET, print) as running:
        for node in running.nodes:
            running.wait_until_running(node)
        yield running


def get_certified(net: Localnet, node: LocalNode) -> int:
    round = net.get_status(node).get("protocol", {}).get("certified_round")
    return -1 if round is None else int(round)


def get_now(net: Localnet) -> Round:
    return compute_position(net.network, Millis(int(time.time() * 1000))).round


def get_samples(node: LocalNode, name: str, label: str) -> dict[str, float]:
    """A metric's values by the value of one label (those of other labels added up)."""
    found: dict[str, float] = defaultdict(float)
    text = httpx.get(f"{node.url}/metrics", timeout=10).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels.get("direction", "in") == "in":
                found[sample.labels[label]] += sample.value
    return found


def get_shards(net: Localnet) -> dict[int, list[LocalNode]]:
    """By number: the nodes of each shard of this round, as they say themselves."""
    shards: dict[int, list[LocalNode]] = defaultdict(list)
    for node in net.nodes:
        shards[net.get_status(node)["protocol"]["shard"]].append(node)
    return shards


def choose_victims(net: Localnet) -> list[LocalNode]:
    """One of each shard, and none that must propose in this round or (above the shards) in the next: a dead proposer
    costs a round. Rather without a seat above, where both together would."""
    roster, round = net.ledger.get_roster(), get_now(net)
    dealt = deal(net.network, roster, round)
    assert dealt is not None
    duties = [(roster, round), (roster, Round(round + 1)), *((shard, round) for shard in dealt.shards)]
    proposers = {ballot.by_index[compute_ranks(ballot, number)[0]].peer for ballot, number in duties}
    seated = {roster.by_index[index].peer for index in roster.committee}
    shards = [[node for node in nodes if node.peer not in proposers] for nodes in get_shards(net).values()]
    return [min(nodes, key=lambda node: node.peer in seated) for nodes in shards]


def fetch_from(node: LocalNode) -> Fetch:
    def fetch(digest: Digest) -> bytes | None:
        response = httpx.get(f"{node.url}/blobs/{digest.hex()}", timeout=10)
        return response.content if response.status_code == 200 else None

    return fetch


def test_two_shards_certify_rounds_pay_everybody_and_outlive_a_death_in_each(net: Localnet) -> None:
    check_topics(net, Round(1))
    net.wait_until("two rounds on chain", lambda: len(net.ledger.get_rounds(Round(0))) >= 2, 75)
    first = net.ledger.get_rounds(Round(0))[1].round
    net.wait_until("all hold them", lambda: all(get_certified(net, node) >= first for node in net.nodes), 10)
    assert len(net.ledger.get_roster().by_peer) == NUM_PEERS
    last = get_now(net)

    bases: dict[int, set[str]] = defaultdict(set)
    for node in net.nodes:
        protocol = net.get_status(node)["protocol"]
        bases[protocol["certified_round"]].add(protocol["base"])
        assert {update["peer"] for update in protocol["updates"]} <= {"shard-0", "shard-1"}
        assert protocol["shard"] in (0, 1)
        assert protocol["waits_for"]
    assert all(len(same) == 1 for same in bases.values()), bases

    check_audit(net)
    for node in net.nodes:  # nobody heard the announcements of a shard that it was not in
        heard = get_samples(node, "p2pfm_messages_total", "kind")
        last = get_now(net)
        assert heard["shard announcement"] <= (SHARD_PEERS - 1) * (last + 1), (node.index, heard)

    net.wait_until("a round begins", lambda: get_now(net) > last, 20, poll_s=0.05)
    time.sleep(0.5)  # until every node has noticed
    victims, shards = choose_victims(net), get_shards(net)
    assert len(victims) == 2
    for victim in victims:
        net.kill(victim)
    rest = [node for node in net.nodes if node not in victims]
    ends_s = compute_round_start(net.network, Round(last + 5)) / 1000
    net.wait_until(
        "the rest certifies a round",
        lambda: all(get_certified(net, node) > last for node in rest),
        ends_s - time.time(),
    )
    assert len({net.get_status(node)["protocol"]["base"] for node in rest}) <= 2, "one, or a round is being adopted"

    paid: dict[str, int] = defaultdict(int)
    for row in read_rewards(net.ledger, fetch_from(rest[0]), is_partial=True):
        paid[row.peer] += row.reward_wei
    assert all(any(paid[node.peer] > 0 for node in shard) for shard in shards.values()), paid

    for node in net.nodes:
        check_log(net, node)


def check_audit(net: Localnet) -> None:
    """Whichever node an auditor asks: both levels recompute, and each peer's contribution is known."""
    roster = net.ledger.get_roster()
    seated = {roster.by_index[index].peer for index in roster.committee}
    outside = next(node for node in net.nodes if node.peer not in seated)
    inside = next(node for node in net.nodes if node.peer in seated)
    for node in (outside, inside):
        judge = partial(verify_rewards, net.ledger, fetch_from(node), net.network)
        net.wait_until("the node has looked at the chain", lambda judge=judge: "nobody serves" not in str(judge()), 10)
        findings = judge()
        assert len(findings) >= 2
        assert not any(findings.values()), findings
        rows = read_rewards(net.ledger, fetch_from(node))
        assert sum(row.contribution is not None for row in rows) >= NUM_PEERS
        options = ["--round", str(rows[0].round), "--no-measure", "--config", str(node.home / CONFIG_NAME)]
        command = [sys.executable, "-m", "nodes.cli", "rewards", "explain", outside.peer, *options]
        told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "of 2 contributed" in told.stdout, told.stdout + told.stderr


def check_topics(net: Localnet, round: Round) -> None:
    """In a round messages come in everybody's topic, the one above, and the own shard's; words reach its committee."""
    start_s = compute_round_start(net.network, round) / 1000
    samples, shards, num_seated = [], {}, 0
    for moment_s in (start_s + 1.0, start_s + 9.0):
        time.sleep(max(0.0, moment_s - time.time()))
        samples.append([get_samples(node, "p2pfm_topic_messages_total", "topic") for node in net.nodes])
        shards = {node.index: number for number, nodes in get_shards(net).items() for node in nodes}
    for node, before, after in zip(net.nodes, *samples, strict=True):
        own, words = get_shard_topic(shards[node.index]), get_committee_topic(shards[node.index])
        grown = {topic for topic, count in after.items() if count > before[topic]}
        assert own in grown, (node.index, own, before, after)
        assert grown <= {"all", "top", own, words}, (node.index, grown, own)
        num_seated += words in grown
    assert num_seated == 2 * NUM_SEATS


def check_log(net: Localnet, node: LocalNode) -> None:
    """In every round a node has heard announcements of one shard only; and its log replays to what it did."""
    shards: dict[int, set[int]] = defaultdict(set)
    for path in sorted(node.home.rglob("*.events")):
        for record in read_log(path)[1]:
            match record.event:
                case Received(message=ShardMessage(shard=shard, message=Announcement(round=round))):
                    shards[round].add(shard)
                case _:
                    pass
    assert shards
    assert all(len(heard) == 1 for heard in shards.values()), (node.index, shards)
    assert [report.difference for report in replay_path(node.home)] == [None]
