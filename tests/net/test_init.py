"""`p2pfm init`: a whole node or nothing, and only one that `p2pfm node run` takes."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nodes import homes
from nodes.homes import CONFIG_NAME, create_home, open_keys, read_config, write_network
from p2pfm.config import ChainConfig, NetworkConfig, NodeConfig
from p2pfm.errors import OperatorError
from p2pfm.types import Millis

NOWHERE = "0x" + "11" * 20
NETWORK = NetworkConfig("n", Millis(0), "linear", "00" * 32, ChainConfig(1, NOWHERE, NOWHERE))
CONFIG = NodeConfig(".", "../data.jsonl", "http://127.0.0.1:1", NETWORK)


def is_whole(home: Path) -> bool:
    return open_keys(read_config(home / CONFIG_NAME), None).peer.startswith("12D3")


def list_modes(home: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in home.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exists", [False, True])
def test_a_home_that_could_not_be_finished_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    home = tmp_path / "home"
    if exists:
        home.mkdir()
        (home / "notes").touch()

    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(homes, "write_config", fill)
        with pytest.raises(OSError, match="No space"):
            create_home(CONFIG, home, None, is_light=True)
    assert [path.name for path in tmp_path.rglob("*")] == (["home", "notes"] if exists else [])
    create_home(CONFIG, home, None, is_light=True)
    assert is_whole(home)
    assert list_modes(home) - ({stat.S_IMODE((home / "notes").stat().st_mode)} if exists else set()) == {0o600}


def test_keys_without_a_configuration_are_kept_and_the_next_step_is_told(tmp_path: Path) -> None:
    home = tmp_path / "home"
    create_home(CONFIG, home, None, is_light=True)
    (home / CONFIG_NAME).rename(tmp_path / "kept")
    with pytest.raises(OperatorError, match=r"keys and password.*backup"):
        create_home(CONFIG, home, None, is_light=True)
    (tmp_path / "kept").rename(home / CONFIG_NAME)
    assert is_whole(home)


def make_command(folder: Path, *more: str) -> list[str]:
    """`init` of folder/home with a good network and data, unless `more` says otherwise."""
    network, data = folder / "network.toml", folder / "data.jsonl"
    write_network(network, NETWORK)
    data.write_text(json.dumps({"topic": "a", "prompt": "b", "completion": "c"}) + "\n")
    options = ["--network", str(network), "--data", str(data), "--rpc", "http://127.0.0.1:1"]
    return [sys.executable, "-m", "nodes.cli", "init", str(folder / "home"), *options, *more]


def run(command: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_init_that_is_interrupted_at_its_keys_can_be_run_again(tmp_path: Path, number: signal.Signals) -> None:
    command = make_command(tmp_path)
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while not list(tmp_path.rglob(homes.KEYS_NAME)) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    assert process.wait(30) != 0
    assert not (tmp_path / "home").exists()
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert is_whole(tmp_path / "home")


@pytest.mark.parametrize(
    ("option", "content", "says"),
    [
        ("--network", b"\xff\xfe", "utf-8"),
        ("--password-file", b"\xff\xfe", "UTF-8"),
        ("--password-file", b" \n", "expected a password"),
        ("--data", b"", "no samples"),
        ("--probe", b"{}", "split"),
        ("--rpc", b"127.0.0.1:8545", "rpc: expected http://"),
        ("--rpc", b"", "rpc: expected http://"),
        ("--listen", b"garbage", "listen: expected"),
        ("--bootstrap", b"/ip4/127.0.0.1/tcp/1", "bootstrap: expected"),
        ("--http-port", b"70000", "http.port: expected 0 to 65535"),
    ],
)
def test_init_refuses_what_node_run_would_before_it_makes_keys(
    tmp_path: Path, option: str, content: bytes, says: str
) -> None:
    given = tmp_path / "given"
    given.write_bytes(content)
    given.chmod(0o600)
    is_file = option in ("--network", "--password-file", "--data", "--probe")
    done = run(make_command(tmp_path, option, str(given) if is_file else content.decode()))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert says in line
    assert not (tmp_path / "home").exists()


def test_init_refuses_a_network_whose_rules_cannot_work(tmp_path: Path) -> None:
    command = make_command(tmp_path)
    path = tmp_path / "network.toml"
    path.write_text(path.read_text().replace("committee_size = 9", "committee_size = 0"))
    done = run(command)
    assert (done.returncode, "committee_size: expected 1" in done.stderr) == (2, True)
    assert not (tmp_path / "home").exists()


def test_init_takes_the_password_from_where_node_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(make_command(tmp_path), P2PFM_PASSWORD=" secret\n").returncode == 0
    config = read_config(tmp_path / "home" / CONFIG_NAME)
    assert not (tmp_path / "home" / homes.PASSWORD_NAME).exists()
    monkeypatch.setenv(homes.PASSWORD_VARIABLE, "secret")
    assert open_keys(config, None).peer
    monkeypatch.setenv(homes.PASSWORD_VARIABLE, "")
    with pytest.raises(OperatorError, match=r"\$P2PFM_PASSWORD: expected a password"):
        open_keys(config, None)
