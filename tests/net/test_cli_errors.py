"""What an operator can get wrong: one clear line with the next step, and an exit code that says whose fault it was."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from nodes.cli import app
from nodes.homes import CONFIG_NAME, create_home, read_config, write_network
from nodes.localnet import PRESETS, create_network
from nodes.models import LINEAR
from nodes.ports import get_free_port
from nodes.testnet import Testnet, run_testnet
from p2pfm.config import ChainConfig, HttpConfig, NetworkConfig, NodeConfig
from p2pfm.lora.corpus import build_shards

OPERATOR = 2


@pytest.fixture(scope="module")
def testnet(tmp_path_factory: pytest.TempPathFactory):
    with run_testnet(get_free_port(), log=tmp_path_factory.mktemp("chain") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory):
    return build_shards(2, tmp_path_factory.mktemp("data"), 0, set())


@pytest.fixture(scope="module")
def network(testnet: Testnet, shards) -> NetworkConfig:
    return create_network(testnet, PRESETS["tiny"], shards.probe)[0]


@pytest.fixture
def home(tmp_path: Path, testnet: Testnet, network: NetworkConfig, shards) -> Path:
    config = NodeConfig(
        home=".",
        data=str(shards.peers[0]),
        probe=str(shards.probe),
        rpc=testnet.rpc_url,
        network=network,
        http=HttpConfig(port=get_free_port()),
    )
    create_home(config, tmp_path / "node", None, is_light=True)
    return tmp_path / "node"


def edit(home: Path, pattern: str, replacement: str) -> None:
    path = home / CONFIG_NAME
    text, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1
    path.write_text(text)


def run_node(home: Path, *more: str) -> str:
    """The one line that a node which cannot start prints; it must end by itself."""
    done = subprocess.run(
        [sys.executable, "-m", "nodes.cli", "node", "run", "--config", str(home / CONFIG_NAME), *more],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == OPERATOR, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(told) == 1, done.stderr
    return told[0]


def test_a_wrong_key_in_the_toml_is_named(home: Path) -> None:
    edit(home, r"^rpc = ", "rcp = ")
    assert "`rcp`" in run_node(home)


def test_an_impossible_value_says_what_is_allowed(home: Path) -> None:
    edit(home, r"^committee_size = \d+", "committee_size = 0")
    assert "committee_size: expected 1 to 128, got 0" in run_node(home)


def test_a_file_that_is_no_toml_says_where(home: Path) -> None:
    (home / CONFIG_NAME).write_text("home = [")
    assert "expected TOML" in run_node(home)


def test_a_missing_config_names_init(tmp_path: Path) -> None:
    assert "p2pfm init" in run_node(tmp_path / "nowhere")


def test_a_port_in_use_is_named_before_models_are_loaded(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        edit(home, r"^port = \d+", f"port = {port}")
        assert f"cannot listen on 127.0.0.1:{port}" in run_node(home)


def test_an_unreachable_chain_names_the_url(home: Path) -> None:
    port = get_free_port()
    edit(home, r'^rpc = ".*"', f'rpc = "http://127.0.0.1:{port}"')
    told = run_node(home)
    assert f"127.0.0.1:{port}" in told
    assert "testnet up" in told


def test_a_contract_that_is_not_there_is_an_unknown_network(home: Path) -> None:
    edit(home, r'^federation = ".*"', 'federation = "0x000000000000000000000000000000000000dEaD"')
    assert "0x000000000000000000000000000000000000dEaD" in run_node(home)


def test_a_missing_model_names_the_command_that_fetches_it(home: Path) -> None:
    edit(home, r'^backbone = ".*"', 'backbone = "no-such-model"')
    assert "no-such-model" in run_node(home)


def test_no_stake_names_the_account_that_needs_it(home: Path) -> None:
    told = run_node(home)
    assert "0x" in told
    assert "100 PFM" in told


def test_a_wrong_password_is_told_without_showing_it(home: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("not-the-password")
    wrong.chmod(0o600)
    told = run_node(home, "--password-file", str(wrong))
    assert "wrong password" in told
    assert str(wrong) in told, "where it came from"
    assert "not-the-password" not in told


def test_keys_that_others_can_read_are_refused(home: Path) -> None:
    path = next((home / "keys").iterdir())
    path.chmod(0o644)
    assert "chmod 600" in run_node(home)


def test_missing_data_names_the_file(home: Path, shards) -> None:
    edit(home, r'^data = ".*"', 'data = "gone.jsonl"')
    assert "gone.jsonl" in run_node(home)


def test_init_refuses_a_file_that_holds_no_network(tmp_path: Path, network: NetworkConfig) -> None:
    path = tmp_path / "network.toml"
    write_network(path, network)
    path.write_text(path.read_text().replace("genesis_ms", "genesis"))
    done = subprocess.run(
        [sys.executable, "-m", "nodes.cli", "init", str(tmp_path / "new"), "--network", str(path),
         "--data", str(path), "--rpc", "http://127.0.0.1:1"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == OPERATOR
    assert "genesis" in done.stderr
    assert not (tmp_path / "new" / CONFIG_NAME).exists()


@pytest.mark.parametrize(("backbone", "serves"), [(LINEAR, False), ("tiny", True)])
def test_init_makes_a_node_that_can_start(
    backbone: str, serves: bool, tmp_path: Path, network: NetworkConfig, shards
) -> None:
    """A linear learner generates no text: a node that would serve it is refused."""
    rules = msgspec.structs.replace(network, backbone=backbone)
    write_network(tmp_path / "network.toml", rules)
    data = str(shards.peers[0])
    options = ["--network", str(tmp_path / "network.toml"), "--data", data, "--rpc", "http://127.0.0.1:1"]
    done = CliRunner().invoke(app, ["init", str(tmp_path / "new"), *options])
    assert done.exit_code == 0
    assert read_config(tmp_path / "new" / CONFIG_NAME).serving.enabled == serves


def test_a_chain_of_another_id_is_refused(home: Path, network: NetworkConfig) -> None:
    assert isinstance(network.chain, ChainConfig)
    edit(home, r"^chain_id = \d+", "chain_id = 5")
    assert "chain id 5" in run_node(home)
