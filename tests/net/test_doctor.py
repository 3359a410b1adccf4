"""`p2pfm node doctor`: every line on a real home, a real chain and no network yet, and what it says of each mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from eth_account import Account
from ledger_worlds import World, chain_world, free_port, running_chain

from nodes.doctor import Check, examine
from nodes.homes import CONFIG_NAME, create_home, read_config
from p2pfm.config import HttpConfig, NetworkConfig, NodeConfig, SettlementConfig
from p2pfm.types import Millis


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_chain("embedded") as rpc_url:
        yield rpc_url


@pytest.fixture
def world(url: str) -> World:
    return chain_world(url)


@pytest.fixture
def config(tmp_path: Path, url: str, world: World) -> NodeConfig:
    params = world.any.get_params()
    (tmp_path / "data.jsonl").write_text(json.dumps({"topic": "a", "prompt": "b", "completion": "c"}) + "\n")
    network = NetworkConfig("n", Millis(0), "tiny", "00" * 32, world.chain)
    scoring = msgspec.structs.replace(network.scoring, committee_size=params.committee_size)
    network = msgspec.structs.replace(
        network, scoring=scoring, settlement=SettlementConfig(rounds_per_epoch=params.rounds_per_epoch)
    )
    config = NodeConfig(".", "../data.jsonl", url, network, http=HttpConfig(port=free_port()))
    create_home(config, tmp_path / "home", None, is_light=True)
    return read_config(tmp_path / "home" / CONFIG_NAME)


def look(config: NodeConfig, account: str = "") -> dict[str, Check]:
    return {check.name: check for check in examine(config, account)}


def test_a_newcomer_is_told_what_is_missing(config: NodeConfig) -> None:
    account = Account.create().address
    told = look(config, account)
    assert {told[name].verdict for name in ("keys", "data", "probe", "bootstrap")} == {"ok"}, told
    assert told["membership"].verdict == "fail"
    assert f"p2pfm testnet endow {account}" in told["membership"].step
    assert (told["gas"].verdict, told["node"].verdict, told["reachability"].verdict) == ("fail", "warn", "warn")
    assert all(check.step for check in told.values() if check.verdict != "ok"), "a finding names the next step"


def test_the_contract_must_have_the_networks_rules(config: NodeConfig) -> None:
    assert "pool_per_epoch" in look(config)["chain"].found


def test_a_clock_that_is_off_is_told(config: NodeConfig, world: World) -> None:
    assert look(config)["clock"].verdict != "fail", "a block a transaction has led the test chain a little ahead"
    world.advance(300)
    told = look(config)["clock"]
    assert (told.verdict, "behind the newest block" in told.found) == ("fail", True)


def test_a_dead_or_wrong_chain_is_named(config: NodeConfig, world: World) -> None:
    dead = look(msgspec.structs.replace(config, rpc="http://127.0.0.1:9"))
    assert (dead["chain"].verdict, dead["clock"].verdict) == ("fail", "warn")
    assert "is it running" in dead["chain"].found
    network = msgspec.structs.replace(config.network, chain=msgspec.structs.replace(world.chain, chain_id=5))
    assert "expected chain id 5" in look(msgspec.structs.replace(config, network=network))["chain"].found


def test_mistakes_on_this_machine_are_named(config: NodeConfig) -> None:
    key = min((Path(config.home) / "keys").iterdir())
    key.chmod(0o644)
    nobody = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    told = look(msgspec.structs.replace(config, data=config.data + "x", probe=config.data, bootstrap=(nobody,)))
    assert {told[name].verdict for name in ("keys", "data", "probe", "bootstrap")} == {"fail"}, told
    assert told["keys"].step == f"chmod 600 {key}"


def consult(config: NodeConfig, *more: str, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The command's exit code and what it says, by check."""
    done = subprocess.run(
        [sys.executable, "-m", "nodes.cli", "node", "doctor", "--json", "--config",
         str(Path(config.home) / CONFIG_NAME), *more],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


@pytest.mark.parametrize(("name", "content"), [("bls.json", None), ("account.json", "{}")])
def test_keys_with_which_a_node_cannot_start_are_a_failure(config: NodeConfig, name: str, content: str | None) -> None:
    path = Path(config.home) / "keys" / name
    path.unlink() if content is None else path.write_text(content)
    code, told = consult(config)
    assert (code, told["keys"]["verdict"]) == (3, "fail")
    assert name in told["keys"]["found"]


def test_a_password_that_is_not_there_or_wrong_is_told(config: NodeConfig) -> None:
    assert consult(config, P2PFM_PASSWORD="other")[1]["keys"]["found"].endswith("from $P2PFM_PASSWORD")
    (Path(config.home) / "password").unlink()
    told = consult(config)[1]["keys"]
    assert (told["verdict"], "--password-file" in told["found"]) == ("warn", True)


@pytest.mark.parametrize(
    ("content", "mode", "found"),
    [(b"secret", 0o644, "chmod 600"), (b"\xff\xfe", 0o600, "UTF-8"), (b" \n", 0o600, "got nothing")],
)
def test_a_password_file_must_be_private_text(
    config: NodeConfig, tmp_path: Path, content: bytes, mode: int, found: str
) -> None:
    path = tmp_path / "given"
    path.write_bytes(content)
    path.chmod(mode)
    told = consult(config, "--password-file", str(path))[1]["keys"]
    assert (told["verdict"], found in told["found"], str(path) in told["found"]) == ("fail", True, True)
