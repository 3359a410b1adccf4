"""Four real nodes and what happens to machines: a full disk, a wrong clock, a bootstrap node that never returns."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nodes.localnet import PRESETS, Localnet, LocalNode, localnet
from p2pfm.protocol.events import Durable
from p2pfm.runtime.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ROUND_S = 10
FIRST, FULL, BEHIND, AHEAD = range(4)
LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
AHEAD_MS = 300_000


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Localnet]:
    with localnet(tmp_path_factory.mktemp("net"), ("honest",) * 4, PRESETS["toy"], print) as running:
        for node in running.nodes:
            running.wait_until_running(node)
        yield running


def certified(net: Localnet, node: LocalNode) -> int:
    round = net.get_status(node).get("protocol", {}).get("certified_round")
    return -1 if round is None else int(round)


def wait_for_rounds(net: Localnet, count: int, *indices: int) -> None:
    """So many more rounds are certified, by the word of all these nodes."""
    nodes = [net.nodes[index] for index in indices]
    goal = max(certified(net, node) for node in nodes) + count
    first_s = max(0.0, net.network.genesis_ms / 1000 - time.time())
    net.wait_until(
        f"round {goal} is certified",
        lambda: all(certified(net, n) >= goal for n in nodes),
        first_s + (count + 3) * ROUND_S,
    )


def wait_for_part(net: Localnet, index: int, witness: int) -> None:
    """A round certified from now on holds an update of this node, and the witness holds the same base."""
    before = certified(net, net.nodes[witness])

    def is_there() -> bool:
        if certified(net, net.nodes[witness]) <= before:
            return False
        seen, own = (net.get_status(net.nodes[i]).get("protocol", {}) for i in (witness, index))
        is_in = any(update["peer"] == net.nodes[index].peer for update in seen.get("updates", ()))
        return is_in and own.get("base") == seen["base"]

    net.wait_until(f"node {index} takes part", is_there, 5 * ROUND_S)


# --- a full disk ------------------------------------------------------------------------------------------------------


def fill(path: Path) -> None:
    """Until the disk takes no byte more."""
    with path.open("wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(bytes(4096)) == 4096:
            pass


@contextmanager
def small_disk(node: LocalNode, free_bytes: int, log: Path) -> Iterator[Path]:
    """The stopped node's home, on a disk of its own with so much space left; its log lies elsewhere."""
    home, kept = node.home, node.home.with_name("kept")
    used = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    shutil.copytree(home, kept)
    options = f"size={used + free_bytes},mode=700"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(home)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a disk of a few megabytes cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        shutil.copytree(kept, home, dirs_exist_ok=True)
        (home / "node.log").unlink()
        (home / "node.log").symlink_to(log)
        yield home
    finally:
        if node.is_running and node.process is not None:
            node.process.kill()
            node.process.wait()
        subprocess.run(["umount", str(home)], check=True)


def end_kindly(node: LocalNode) -> None:
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    node.process.wait(20)


def read_durable(node: LocalNode) -> Durable:
    """What lies on disk; every blob that it names is there and is what its digest says."""
    with Store(node.home) as store:
        durable = store.load_durable()
        assert durable is not None
        for digest in (durable.base, durable.residual, durable.pending_residual, durable.announced_payload):
            assert digest is None or store.find(digest) is not None
    return durable


def test_a_full_disk_ends_the_node_with_a_clear_word_and_spoils_nothing(net: Localnet, tmp_path: Path) -> None:
    node, log = net.nodes[FULL], tmp_path / "node.log"
    wait_for_rounds(net, 1, FIRST, FULL)
    end_kindly(node)
    keys = {path.name: path.read_bytes() for path in (node.home / "keys").iterdir()}
    before = read_durable(node)
    with small_disk(node, 4 << 20, log) as home:
        net.start(node)
        net.wait_until_running(node)
        fill(home / "ballast")
        assert node.process is not None
        code = node.process.wait(4 * ROUND_S)
        last = log.read_text().strip().splitlines()[-1]
        print(f"ended with {code}: {last}")
        assert code > 0
        assert "is there space in the home?" in log.read_text()

        (home / "ballast").unlink()
        after = read_durable(node)
        assert after.signed_round >= before.signed_round
        assert after.announced_round >= before.announced_round
        assert before.head is not None
        assert after.head is not None
        assert after.head.proposal.round >= before.head.proposal.round
        assert {path.name: path.read_bytes() for path in (home / "keys").iterdir()} == keys
        net.start(node)
        net.wait_until_running(node)
        wait_for_part(net, FULL, FIRST)
        end_kindly(node)


# --- a first peer that never returns ----------------------------------------------------------------------------------


def test_without_its_bootstrap_node_the_network_goes_on_and_finds_who_was_away_by_the_peer_book(net: Localnet) -> None:
    first, away = net.nodes[FIRST], net.nodes[BEHIND]
    for node in net.nodes:
        if not node.is_running:
            net.start(node)
    for node in net.nodes:
        net.wait_until_running(node)
    net.kill(first)
    try:
        net.kill(away)
        net.start(away)
        net.wait_until_running(away)
        net.wait_until("it finds the others", lambda: len(net.get_status(away).get("peers", ())) == 2, 20)
        wait_for_part(net, BEHIND, FULL)  # three of four sign, so all that are left are needed
    finally:
        net.start(first)
        net.wait_until_running(first)


# --- a clock that is off by five minutes ------------------------------------------------------------------------------


@pytest.mark.skipif(LIBFAKETIME is None, reason="no libfaketime on this machine (Debian: faketime)")
def test_a_clock_five_minutes_ahead_is_told_to_its_operator_and_harms_nobody(
    net: Localnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, others = net.nodes[AHEAD], [net.nodes[index] for index in (FIRST, FULL, BEHIND)]
    for other in others:
        if not other.is_running:
            net.start(other)
        net.wait_until_running(other)
    net.kill(node)
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(LIBFAKETIME))
        patch.setenv("FAKETIME", f"+{AHEAD_MS // 1000}s")
        patch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        net.start(node)
    net.wait_until_running(node)

    def get_clock(one: LocalNode) -> dict[str, Any]:
        clock: dict[str, Any] = net.get_status(one).get("clock", {})
        return clock

    net.wait_until("it is told", lambda: bool(get_clock(node).get("is_off")), 30)
    clock = get_clock(node)
    print(f"told: {clock}")
    assert abs(clock["offset_ms"] - AHEAD_MS) < 5000
    assert (node.home / "node.log").read_text().count("s ahead of the median of") == 1
    wait_for_rounds(net, 2, FIRST, FULL, BEHIND)
    assert net.get_status(node)["round"] > net.get_status(others[0])["round"] + 20
    for other in others:
        status = net.get_status(other)
        assert status["stage"] == "running"
        assert not status["clock"]["is_off"], status["clock"]
        assert len(status["protocol"]["updates"]) == 3
        assert not status["protocol"]["blamed"]
