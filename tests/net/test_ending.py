"""Ctrl-C of a node whose chain hangs: it ends soon, and at once when it comes again."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nodes.ending import END_S
from nodes.homes import CONFIG_NAME, create_home
from nodes.models import LINEAR
from nodes.ports import get_free_port
from p2pfm.config import ChainConfig, HttpConfig, NetworkConfig, NodeConfig, ServingConfig
from p2pfm.types import Millis

NOWHERE = "0x" + "11" * 20


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A chain that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        yield server


@contextmanager
def waiting_node(folder: Path, silent: socket.socket) -> "Iterator[subprocess.Popen[str]]":
    """A node in the midst of its first request to the chain."""
    (folder / "data.jsonl").write_text(json.dumps({"topic": "a", "prompt": "b", "completion": "c"}) + "\n")
    network = NetworkConfig("n", Millis(0), LINEAR, "00" * 32, ChainConfig(1, NOWHERE, NOWHERE))
    rpc = f"http://127.0.0.1:{silent.getsockname()[1]}"
    config = NodeConfig(
        ".", "../data.jsonl", rpc, network, http=HttpConfig(port=get_free_port()), serving=ServingConfig(enabled=False)
    )
    create_home(config, folder / "home", None, is_light=True)
    node = subprocess.Popen(
        [sys.executable, "-m", "nodes.cli", "node", "run", "--config", str(folder / "home" / CONFIG_NAME)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with silent.accept()[0]:
            yield node
    finally:
        node.kill()
        node.wait()


def test_one_interrupt_ends_a_node_whose_chain_hangs(tmp_path: Path, silent: socket.socket) -> None:
    with waiting_node(tmp_path, silent) as node:
        begun = time.monotonic()
        node.send_signal(signal.SIGINT)
        _, told = node.communicate(timeout=60)
        assert time.monotonic() - begun < END_S + 3
    assert node.returncode == 0
    assert "ending without it" in told
    assert "Traceback" not in told


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path, silent: socket.socket) -> None:
    with waiting_node(tmp_path, silent) as node:
        node.send_signal(signal.SIGINT)
        assert node.stderr is not None
        assert any("ending on SIGINT" in line for line in node.stderr)
        begun = time.monotonic()
        node.send_signal(signal.SIGINT)
        _, told = node.communicate(timeout=60)
        assert time.monotonic() - begun < END_S / 2
    assert node.returncode == 130
    assert "Traceback" not in told
