"""Real nodes: four processes, libp2p on loopback, a real EVM, a small real transformer; through rounds and deaths."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import trio
from browser import chromium, find_chromium
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from page_status import find_missing, make_status

from nodes.homes import CONFIG_NAME
from nodes.localnet import PRESETS, Localnet, LocalNode, localnet
from nodes.rewards import read_rewards, verify_rewards
from p2pfm.lora.checkpoint import import_checkpoint
from p2pfm.lora.delta import encode_tensors
from p2pfm.messages import Attestation, Envelope, Presence, encode, signed_bytes
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.settlement.ledger import Claimed, SettledRound
from p2pfm.types import Digest, MemberIndex, PeerId, Round
from sim.replay import replay_path

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ROUND_S = 18
OUTAGE_S = 60
GATEWAY, PRIVATE, RIDER = 0, 2, 3
PROMPT = "The state of the union is"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Localnet]:
    folder = tmp_path_factory.mktemp("net")
    roles = ("honest", "honest", "private", "free rider")
    with localnet(folder, roles, PRESETS["tiny"], print, gateways=frozenset(range(len(roles)))) as running:
        for node in running.nodes:
            running.wait_until_running(node)
        yield running


def certified(net: Localnet, node: LocalNode) -> int:
    round = net.get_status(node).get("protocol", {}).get("certified_round")
    return -1 if round is None else int(round)


def wait_for_round(net: Localnet, round: int, nodes: list[LocalNode]) -> None:
    ends_s = net.network.genesis_ms / 1000 + (round + 3) * ROUND_S
    net.wait_until(
        f"round {round} is certified",
        lambda: all(certified(net, node) >= round for node in nodes),
        max(10.0, ends_s - time.time()),
    )


def settled(net: Localnet, round: int) -> SettledRound:
    found: list[SettledRound] = []

    def is_there() -> bool:
        found[:] = [entry for entry in net.ledger.get_rounds(Round(0)) if entry.round >= round]
        return bool(found)

    net.wait_until(f"round {round} on chain", is_there, 40)
    return found[0]


def fetch(net: Localnet) -> Any:
    def get(digest: Digest) -> bytes | None:
        response = httpx.get(f"{net.nodes[GATEWAY].url}/blobs/{digest.hex()}", timeout=10)
        return response.content if response.status_code == 200 else None

    return get


def run_cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "nodes.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_two_rounds_certify_settle_and_pay_by_contribution(net: Localnet) -> None:
    wait_for_round(net, 1, net.nodes)
    entry = settled(net, 1)
    rows = read_rewards(net.ledger, fetch(net))
    assert {row.round for row in rows} >= {0, 1}
    for round in (0, 1):
        held = sorted((row for row in rows if row.round == round), key=lambda row: row.contribution or 0)
        assert [row.reward_wei for row in held] == sorted(row.reward_wei for row in held)
        assert 0 < sum(row.reward_wei for row in held) <= net.network.pool_per_epoch()
        rider = next(row for row in held if row.peer == net.nodes[RIDER].peer)
        assert (rider.contribution, rider.reward_wei) == (0, 0)
    assert not any(verify_rewards(net.ledger, fetch(net), net.network).values())
    served = fetch(net)(entry.base)
    assert served is not None, "the base that the chain names can be had from a node"


def test_the_page_of_a_real_node_shows_what_it_says_of_itself(net: Localnet, tmp_path: Path) -> None:
    """And the pages' other tests show what a real node says: nobody notices else when a field is renamed."""
    wait_for_round(net, 1, net.nodes)
    node = net.nodes[1]
    status = net.get_status(node)
    assert find_missing(make_status(), status) == []
    if find_chromium() is None:
        return
    with chromium(tmp_path) as browser:
        browser.open(node.url)
        browser.until("return document.querySelector('#peer-rows')")
        browser.until("return !document.getElementById('send').disabled")
        assert browser.text("h1") == net.network.name
        assert re.fullmatch(r"Round \d+", browser.text("#round-title"))
        assert re.search(r"[\d.]+ PFM", browser.text("#reward-facts"))
        assert f"of {status['serving']['sessions_max']}" in browser.text("#serving-facts")
        assert "4" in browser.text("#network-facts")
        rows = browser.text("#peer-rows")
        assert rows
        told = browser.text("body")
        assert not [word for word in ("undefined", "NaN", "[object", "Infinity") if word in told], told
        assert browser.complaints() == []
        assert all(address.startswith(f"{node.url}/") for address in browser.asked())
        browser.shoot("node-page-real")


def test_replicas_are_paid_for_what_other_peers_gateways_attest(net: Localnet) -> None:
    """Out of the serving pool, by the median of what the committee's members saw; drawn without anybody's doing."""

    def ask(node: LocalNode) -> None:
        body = {"model": "tiny+base", "prompt": PROMPT, "max_tokens": 8, "temperature": 1}
        httpx.post(f"{node.url}/v1/completions", json=body, timeout=30).raise_for_status()

    def is_paid() -> bool:
        with ThreadPoolExecutor(24) as pool:  # at once, or every gateway would ask the quickest replica alone
            for answer in [pool.submit(ask, node) for node in net.nodes for _ in range(6)]:
                answer.result()
        return any(net.ledger.get_claimed_served(MemberIndex(index)) for index in range(len(net.nodes)))

    before = net.ledger.get_serving_pool()
    net.wait_until("a replica has drawn its pay", is_paid, 8 * ROUND_S)
    left = net.ledger.get_serving_pool()  # before the claims: others draw meanwhile
    drawn = sum(net.ledger.get_claimed_served(MemberIndex(index)) for index in range(len(net.nodes)))
    assert left >= before - drawn
    settled_rounds = net.ledger.get_rounds(Round(0))
    assert 0 < drawn <= net.network.serving_per_epoch() * len(settled_rounds)
    assert not any(verify_rewards(net.ledger, fetch(net), net.network).values())


def test_all_nodes_hold_the_same_certified_bases(net: Localnet) -> None:
    wait_for_round(net, 1, net.nodes)
    told = [net.get_status(node)["protocol"] for node in net.nodes]
    by_round: dict[int, set[str]] = {}
    for protocol in told:
        by_round.setdefault(protocol["certified_round"], set()).add(protocol["base"])
    assert all(len(bases) == 1 for bases in by_round.values())


def test_updates_are_far_smaller_than_dense(net: Localnet) -> None:
    wait_for_round(net, 0, net.nodes)
    protocol = net.get_status(net.nodes[1])["protocol"]
    assert protocol["rounds"]["0"]["payload_bytes"] * 40 < protocol["dense_bytes"]


def test_a_private_node_tells_its_epsilon_and_others_hear_it(net: Localnet) -> None:
    wait_for_round(net, 1, net.nodes)
    private, other = net.get_status(net.nodes[PRIVATE]), net.get_status(net.nodes[1])
    assert 0 < private["privacy"]["epsilon"] <= private["privacy"]["epsilon_max"]
    assert not any("train_loss_nano" in figures for figures in private["protocol"]["rounds"].values())
    assert "privacy" not in other
    declared = {update["peer"]: update.get("epsilon") for update in other["protocol"]["updates"]}
    assert declared[net.nodes[PRIVATE].peer] > 0
    assert declared[net.nodes[1].peer] is None
    shown = run_cli("node", "status", "--config", str(net.nodes[PRIVATE].home / CONFIG_NAME))
    assert "epsilon" in shown.stdout, shown.stdout + shown.stderr


def test_metrics_and_status_are_for_machines_too(net: Localnet) -> None:
    text = httpx.get(f"{net.nodes[1].url}/metrics", timeout=10).text
    assert "p2pfm_certified_round" in text
    assert 'p2pfm_events_total{kind="Received"}' in text
    shown = run_cli("node", "status", "--config", str(net.nodes[1].home / CONFIG_NAME), "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["peer"] == net.nodes[1].peer


def test_rewards_commands_read_the_chain(net: Localnet) -> None:
    wait_for_round(net, 0, net.nodes)
    settled(net, 0)
    config = str(net.nodes[1].home / CONFIG_NAME)
    shown = run_cli("rewards", "show", "--config", config, "--json")
    assert {row["peer"] for row in json.loads(shown.stdout)["rows"]} == {node.peer for node in net.nodes}
    told = run_cli("rewards", "explain", net.nodes[1].peer, "--round", "0", "--config", config)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "root on chain" in told.stdout
    deep = run_cli("rewards", "verify", "--deep", "--config", config)
    assert (deep.returncode, "wrong" in deep.stdout) == (0, False), deep.stdout + deep.stderr
    checked = run_cli("rewards", "verify", "--config", config)
    assert (checked.returncode, "wrong" in checked.stdout) == (0, False), checked.stdout + checked.stderr
    picture = net.folder / "rewards.png"
    assert run_cli("rewards", "plot", "--config", config, "--out", str(picture)).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run_cli("rewards", "claim", "--config", config).returncode == 0


def test_a_running_nodes_base_is_exported_for_plain_peft(net: Localnet, tmp_path: Path) -> None:
    wait_for_round(net, 0, net.nodes)
    config = str(net.nodes[2].home / CONFIG_NAME)
    done = run_cli("adapter", "export", "--config", config, str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    data = fetch(net)(Digest(bytes.fromhex(told["base"])))
    assert data is not None, "it is the base that another node holds too"
    assert encode_tensors(import_checkpoint(tmp_path / "out").tensors) == data
    assert told["round"] >= 0


def test_chat_answers_through_any_node(net: Localnet) -> None:
    answered = run_cli("chat", "--url", net.nodes[2].url, "--prompt", "hello", "--max-tokens", "8")
    assert answered.returncode == 0, answered.stderr


def test_stream_goes_on_when_its_replica_is_killed_and_the_node_comes_back(net: Localnet) -> None:
    """The whole life of a node: it serves, is killed in mid-stream, misses nothing it had, and takes part again."""
    gateway = net.nodes[GATEWAY]
    wait_for_round(net, 0, net.nodes)
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=60, max_retries=0)
    model = f"tiny+base@{net.get_status(gateway)['protocol']['base'][:16]}"
    ask = {"model": model, "prompt": PROMPT, "max_tokens": 200, "temperature": 0}

    def is_answered_elsewhere() -> bool:
        """A base that was adopted just now is announced by the other replicas within seconds."""
        answer = list(client.completions.create(**{**ask, "max_tokens": 1}, stream=True))
        return bool(answer[0].model_extra["p2pfm"]["replica"] != gateway.peer)

    net.wait_until("another replica answers", is_answered_elsewhere, 30)
    calm = client.completions.create(**ask)
    text, victim = "", None
    usage = None
    for event in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = event.usage or usage
        text += "".join(choice.text for choice in event.choices)
        if victim is None and text:
            victim = next(node for node in net.nodes if node.peer == event.model_extra["p2pfm"]["replica"])
            assert victim is not gateway
            net.kill(victim)
    assert victim is not None
    assert text == calm.choices[0].text
    assert usage is not None
    assert usage.completion_tokens == calm.usage.completion_tokens

    before = victim.last_status["protocol"]["certified_round"] or 0
    net.start(victim)
    net.wait_until_running(victim)
    status = net.get_status(victim)
    assert status["peer"] == victim.peer
    assert (status["protocol"]["certified_round"] or 0) >= before

    def is_back() -> bool:
        protocol = net.get_status(gateway)["protocol"]
        told = net.get_status(victim)["protocol"]
        is_in = any(update["peer"] == victim.peer for update in protocol["updates"])
        return is_in and protocol["certified_round"] > before and told["base"] == protocol["base"]

    net.wait_until("the killed node takes part again", is_back, 6 * ROUND_S)


def test_settlement_catches_up_after_a_minute_without_a_chain(net: Localnet) -> None:
    """Rounds go on meanwhile; what was certified is settled in order, and nothing is paid twice."""
    wait_for_round(net, 0, net.nodes)
    assert net.testnet.process is not None
    before = certified(net, net.nodes[1])
    os.kill(net.testnet.process.pid, signal.SIGSTOP)
    try:
        time.sleep(OUTAGE_S)
        during = certified(net, net.nodes[1])
        assert during > before, "rounds go on without a chain"
    finally:
        os.kill(net.testnet.process.pid, signal.SIGCONT)
    settled(net, during)
    rounds = net.ledger.get_rounds(Round(0))
    # Each signed by more than two thirds of four: at most one of a round, each on the root before.
    assert [entry.prev_root for entry in rounds[1:]] == [entry.root for entry in rounds[:-1]]
    assert len({entry.round for entry in rounds}) == len(rounds)
    members = net.ledger.get_roster().members

    def is_paid() -> bool:
        newest = [entry for entry in net.ledger.get_rounds(Round(0)) if entry.is_final][-1]
        drawn = sum(net.ledger.get_claimed(member.index) for member in members)
        return newest.round >= during and drawn >= newest.sums.cumulative_wei

    net.wait_until("all is claimed", is_paid, 90)
    drawn = sum(net.ledger.get_claimed(member.index) for member in members)
    time.sleep(1)  # the ledger's answers may be half a second old
    entries = [entry.what for entry in net.ledger.get_entries()]
    paid = sum(what.amount for what in entries if isinstance(what, Claimed))
    assert drawn <= paid <= sum(net.ledger.get_claimed(member.index) for member in members)
    head = net.ledger.get_head()
    assert head is not None
    assert paid <= head.sums.cumulative_wei


def test_a_strangers_junk_ends_no_node_and_gets_no_honest_peer_blamed(net: Localnet) -> None:
    """A free identity, no stake: what its gossip says is its own fault, never that of who passes it on."""
    network_id = net.network.network_id()
    keypair = create_new_key_pair(bytes(31) + b"r")
    bootstrap = net.get_status(net.nodes[GATEWAY])["addresses"]

    def sign(body: bytes) -> bytes:
        me = PeerId(str(ID.from_pubkey(keypair.public_key)))
        return encode(Envelope(me, body, keypair.private_key.sign(signed_bytes(network_id, me, body))))

    async def attack() -> None:
        async with Libp2pTransport(keypair, "/ip4/127.0.0.1/tcp/0", bootstrap, network_id) as rogue:
            with trio.fail_after(20):
                while not rogue.is_gossiping_with(PeerId(net.nodes[GATEWAY].peer)):
                    await trio.sleep(0.1)
            for message in (
                Presence(PeerId(net.nodes[1].peer), (), 0, 4, 15_000, 2**60),
                Attestation(Round(0), MemberIndex(1), Digest(bytes(32)), bytes(96)),
            ):
                await rogue.publish(sign(encode(message)))
            for number in range(12):
                await rogue.publish(sign(b"junk %d" % number))
            await trio.sleep(2)  # gossip has no receipt

    trio.run(attack)
    statuses = [net.get_status(node) for node in net.nodes if node.is_running]
    assert [status["stage"] for status in statuses] == ["running"] * len(net.nodes)
    honest = {node.peer for node in net.nodes}
    assert not [peer for status in statuses for peer in status["protocol"]["blamed"] if peer in honest]
    assert all(len(status["peers"]) >= len(net.nodes) - 1 for status in statuses)


def test_event_logs_replay_to_the_same_actions(net: Localnet) -> None:
    wait_for_round(net, 0, net.nodes)
    for node in net.nodes[:2]:
        reports = replay_path(node.home)
        assert sum(report.num_events for report in reports) > 50
        assert [report.difference for report in reports] == [None] * len(reports)


def test_logs_tell_no_secret(net: Localnet) -> None:
    for node in net.nodes:
        secrets = [(node.home / "password").read_text().strip()]
        logged = (node.home / "node.log").read_text(errors="replace")
        assert not any(secret in logged for secret in secrets)
        for path in [node.home / "password", *(node.home / "keys").iterdir()]:
            assert path.stat().st_mode & 0o077 == 0, f"{path} can be read by others"
        # A running node may be writing one right now; what a process that is gone left behind stays.
        left = [path for path in Path(node.home).rglob("*.tmp") if not psutil.pid_exists(int(path.name.split(".")[-3]))]
        assert not left
