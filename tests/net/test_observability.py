"""What a node tells: /metrics, its log as JSON, an event log that replays. Real processes, one killed on the way."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nodes.homes import CONFIG_NAME, read_config, write_config
from nodes.localnet import PRESETS, Localnet, LocalNode, localnet
from nodes.logs import JsonLines
from p2pfm.config import PhaseConfig
from p2pfm.messages import BlobReply, BlobRequest, SyncReply, SyncRequest, encode, peek_tag
from p2pfm.runtime.store import Store
from p2pfm.types import Digest, Millis, Round
from sim.replay import ReplayReport, digest_state

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guides" / "watching-a-node.md"
QUICK = replace(
    PRESETS["toy"],
    phases=PhaseConfig(
        train_ms=Millis(1_500),
        exchange_ms=Millis(800),
        score_ms=Millis(800),
        reveal_ms=Millis(600),
        attest_ms=Millis(1_000),
        merge_ms=Millis(800),
    ),
    startup_s=5,
)


@dataclass(frozen=True)
class Watched:
    """What two nodes told, of which the second was killed and started again with its log as JSON."""

    metrics: dict[str, dict[tuple[tuple[str, str], ...], float]]
    """By sample name and labels, of the node that lived."""
    names: dict[str, str]
    """Type by name, as a reader of /metrics sees them."""
    log: list[str]
    """Lines of the second node's log since its restart."""
    secrets: list[str]
    reports: list[ReplayReport]
    state: str
    """Of what the second node saved last."""
    head_at_kill: int
    status_round: int


def certified(net: Localnet, node: LocalNode) -> int:
    round = net.get_status(node).get("protocol", {}).get("certified_round")
    return -1 if round is None else int(round)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    with localnet(folder / "net", ("honest", "honest"), QUICK, print) as net:
        lives, dies = net.nodes
        net.wait_until("a round is certified", lambda: min(certified(net, node) for node in net.nodes) >= 0, 90)
        net.kill(dies)
        with Store(dies.home) as store:
            durable = store.load_durable()
        assert durable is not None
        assert durable.head is not None
        head_at_kill = durable.head.proposal.round
        config = read_config(dies.home / CONFIG_NAME)
        write_config(dies.home / CONFIG_NAME, msgspec.structs.replace(config, log_json=True))
        log_starts = (dies.home / "node.log").stat().st_size
        net.start(dies)
        net.wait_until("it certifies again", lambda: min(certified(net, node) for node in net.nodes) > head_at_kill, 90)
        status = net.get_status(lives)
        text = httpx.get(f"{lives.url}/metrics", timeout=10).text
        net.stop()
        replayed = subprocess.run(
            [sys.executable, "-m", "nodes.cli", "sim", "replay", str(dies.home), "--json"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert replayed.returncode == 0, replayed.stderr
        with Store(dies.home) as store:
            last = store.load_durable()
        assert last is not None
        families = list(text_string_to_metric_families(text))
        yield Watched(
            metrics={
                name: {tuple(sorted(s.labels.items())): s.value for s in family.samples if s.name == name}
                for family in families
                for name in {sample.name for sample in family.samples}
            },
            names=dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)),
            log=(dies.home / "node.log").read_bytes()[log_starts:].decode().splitlines(),
            secrets=find_secrets(dies.home),
            reports=msgspec.json.decode(replayed.stdout, type=list[ReplayReport]),
            state=digest_state(last),
            head_at_kill=head_at_kill,
            status_round=status["protocol"]["certified_round"],
        )


def find_secrets(home: Path) -> list[str]:
    """Passwords of a node's home."""
    return [path.read_text().strip() for path in home.rglob("*") if path.is_file() and "password" in path.name]


@pytest.mark.slow
def test_metrics_count_messages_and_bytes_by_kind(watched: Watched) -> None:
    counts, num_bytes = watched.metrics["p2pfm_messages_total"], watched.metrics["p2pfm_message_bytes_total"]
    assert set(counts) == set(num_bytes)
    for direction in ("in", "out"):
        for kind in ("announcement", "attestation", "presence", "sync", "sync_reply", "blob", "blob_reply"):
            labels = (("direction", direction), ("kind", kind))
            assert counts[labels] >= 1, labels
            assert num_bytes[labels] >= 4 * counts[labels] > 0, labels
    assert not any(dict(labels)["kind"] == "other" for labels in counts)


@pytest.mark.slow
def test_metrics_tell_round_lag_queues_fetches_chain_and_process(watched: Watched) -> None:
    metrics = watched.metrics

    def get(name: str) -> float:
        return metrics[name][()]

    assert get("p2pfm_certified_round") >= watched.status_round > watched.head_at_kill
    assert get("p2pfm_round") >= get("p2pfm_certified_round")
    assert 0 <= get("p2pfm_round_lag") <= 2
    assert get("p2pfm_peers") == 1
    assert get("p2pfm_chain_up") == 1
    assert get("p2pfm_chain_lag_rounds") == max(0, get("p2pfm_certified_round") - get("p2pfm_settled_round"))
    assert 0 <= get("p2pfm_timer_overdue_seconds") < 60
    queues = {dict(labels)["queue"] for labels in metrics["p2pfm_queue_length"]}
    assert queues == {"core", "gossip", "gossip_out", "dials", "requests"}
    assert metrics["p2pfm_fetch_seconds_count"][("priority", "round"),] >= 1
    assert get("p2pfm_core_failures_total") == 0
    assert get("process_open_fds") > 5
    assert get("process_resident_memory_bytes") > 50e6


@pytest.mark.slow
def test_the_guide_lists_exactly_the_metrics_that_a_node_exports(watched: Watched) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == watched.names
    assert len(rows) == len(watched.names), "no row twice"


@pytest.mark.slow
def test_a_log_as_json_is_one_object_a_line_and_holds_no_secret(watched: Watched) -> None:
    told = [json.loads(line) for line in watched.log]
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in told)
    times = [datetime.fromisoformat(entry["time"]) for entry in told]
    assert all(time.tzinfo is not None for time in times)
    assert any(entry["message"].startswith(f"round {entry['round']}: ") for entry in told if "round" in entry)
    assert watched.secrets
    assert not any(secret in line for secret in watched.secrets for line in watched.log)


@pytest.mark.slow
def test_the_event_log_of_a_killed_node_replays_to_the_state_that_it_saved(watched: Watched) -> None:
    killed, ended = watched.reports
    assert killed.difference is None
    assert ended.difference is None
    assert killed.head_round >= watched.head_at_kill >= 0
    assert ended.head_round > watched.head_at_kill
    assert ended.state == watched.state


def test_what_was_raised_is_a_field_of_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("p2pfm.x", logging.ERROR, "x.py", 1, "failed: %d", (3,), sys.exc_info())
    record.round = 7
    line = JsonLines().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["message"], told["level"], told["logger"], told["round"]) == ("failed: 3", "ERROR", "p2pfm.x", 7)
    assert "two\nlines" in told["error"]
    assert datetime.fromisoformat(told["time"]).timestamp() == pytest.approx(record.created, abs=0.002)


def test_a_wrong_configuration_is_told_as_json_too(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "nodes.cli", "node", "run", "--config", str(tmp_path / "none"), "--log-format", "json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert json.loads(line)["level"] == "CRITICAL"
    assert "p2pfm init" in json.loads(line)["message"]


def test_a_tag_is_read_without_decoding_and_of_nothing_else() -> None:
    digest = Digest(bytes(32))
    for value, tag in (
        (BlobRequest(digest, 0, 1), "blob"),
        (BlobReply(1, b"x"), "blob_reply"),
        (SyncRequest(Round(0), (), -1), "sync"),
        (SyncReply((), None), "sync_reply"),
    ):
        assert peek_tag(encode(value)) == tag
    for garbage in (b"", b"\x93", b"\x93\xa3abc", b"\x81\xa4blob", b"blob", encode(BlobReply(1, b""))[:3]):
        assert peek_tag(garbage) == "other"
