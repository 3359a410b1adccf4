"""Several real nodes on one machine: a chain, the contracts, shards of text, and one process a peer.

Knows how to start, watch, kill and end processes; no protocol. Nothing is left behind however this process ends.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec

from nodes.homes import CONFIG_NAME, create_home, read_config
from nodes.models import LINEAR, resolve
from nodes.ports import get_free_port
from nodes.testnet import Testnet, run_testnet
from nodes.tied import describe_end, start_tied, stop
from p2pfm.config import (
    WEI_PER_PFM,
    AdapterConfig,
    CompressionConfig,
    HttpConfig,
    LimitConfig,
    NetworkConfig,
    NodeConfig,
    PhaseConfig,
    PrivacyConfig,
    ScoringConfig,
    ServingConfig,
    SettlementConfig,
    TrainingConfig,
    make_transport_limits,
)
from p2pfm.errors import OperatorError, WorldError
from p2pfm.lora.corpus import build_shards
from p2pfm.runtime.web3_ledger import Web3Ledger, deploy
from p2pfm.settlement.ledger import FederationParams
from p2pfm.types import Millis, Wei

STAKE_PFM = 100
POOL_PFM = 100
SERVING_PFM = 10
"""A round, for answers that gateways agree on."""
EPOCHS_FUNDED = 1000
GAS_WEI = 10 * 10**18
"""Ether a new account gets: more than a day of rounds costs."""
ROTATION_S = 4
"""Least time between two draws of a committee [s]: of nodes that draw at once one succeeds."""
RESPONSE_S = 60
"""To show a leaf that was demanded [s]."""
CHALLENGE_WINDOW_S = 2
"""On a local testnet rounds become final at once; a real network gives auditors hours."""
PRIVACY = PrivacyConfig(enabled=True, noise_multiplier=1.0, epsilon_max=1000.0)
"""Of the role "private": a little noise, since a topic has few samples, and no end of rounds."""
ADVERSARIES: Mapping[str, Literal["zero", "overpay"]] = {"free rider": "zero", "overpayer": "overpay"}
"""What a role makes of its node; the others are honest, whatever their data."""
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Preset:
    """What fits two cores: the backbone and how long everything takes."""

    backbone: str
    training: TrainingConfig
    scoring: ScoringConfig
    compression: CompressionConfig
    phases: PhaseConfig
    startup_s: float
    """From writing the configurations to the first round: a fifth process needs this long on two cores."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)


PRESETS = {
    "demo": Preset(
        backbone="smollm2-135m",
        training=TrainingConfig(steps=12, batch=4, tokens_max=64, learning_rate=2e-3),
        scoring=ScoringConfig(committee_size=7, samples_per_stratum=2),
        # Measured beta 0.95 to overshoot in the fourth round on shards this small, at every learning rate tried.
        compression=CompressionConfig(beta=0.5),
        phases=PhaseConfig(
            train_ms=Millis(26_000),
            exchange_ms=Millis(2_500),
            score_ms=Millis(18_000),
            reveal_ms=Millis(2_000),
            attest_ms=Millis(4_000),
            merge_ms=Millis(2_000),
        ),
        startup_s=40,
    ),
    "tiny": Preset(
        backbone="tiny",
        training=TrainingConfig(steps=6, batch=4, tokens_max=64, learning_rate=5e-3),
        scoring=ScoringConfig(committee_size=7, samples_per_stratum=2),
        compression=CompressionConfig(),
        phases=PhaseConfig(
            train_ms=Millis(6_000),
            exchange_ms=Millis(2_000),
            score_ms=Millis(4_000),
            reveal_ms=Millis(1_500),
            attest_ms=Millis(2_500),
            merge_ms=Millis(2_000),
        ),
        startup_s=30,
    ),
    # No language model (nodes/linear.py): six to eight nodes on two cores, for experiments with the network itself.
    "toy": Preset(
        backbone=LINEAR,
        training=TrainingConfig(steps=20, learning_rate=0.03),
        # Half of 64 positions are kept: which ones tells little of who copied.
        scoring=ScoringConfig(committee_size=7, samples_per_stratum=60, duplicate_overlap=1.0),
        compression=CompressionConfig(chunk=16, keep=8),
        phases=PhaseConfig(
            train_ms=Millis(2_500),
            exchange_ms=Millis(2_000),
            score_ms=Millis(2_000),
            reveal_ms=Millis(1_000),
            attest_ms=Millis(1_500),
            merge_ms=Millis(1_000),
        ),
        startup_s=20,
    ),
}


ADAPTERS = {
    "lora": (AdapterConfig(), 1.0),
    "ffa": (AdapterConfig(kind="ffa"), 4.0),
    "fed_sb": (AdapterConfig(kind="fed_sb", rank=32, alpha=64), 1.0),
    "ia3": (AdapterConfig(kind="ia3", targets=("down_proj", "k_proj", "v_proj")), 10.0),
    "prompt": (AdapterConfig(kind="prompt"), 10.0),
}
"""Adapter kinds for local networks, each with how many times LoRA's learning rate suits it (docs/LOG.md)."""


def get_preset(name: str, adapter: str = "lora") -> Preset:
    """The preset of this name, with this kind of adapter. Raises: OperatorError."""
    if name not in PRESETS:
        raise OperatorError(f"model: expected one of {', '.join(PRESETS)}, got {name!r}")
    if adapter not in ADAPTERS:
        raise OperatorError(f"adapter: expected one of {', '.join(ADAPTERS)}, got {adapter!r}")
    preset = PRESETS[name]
    config, factor = ADAPTERS[adapter]
    training = msgspec.structs.replace(preset.training, learning_rate=preset.training.learning_rate * factor)
    return replace(preset, adapter=config, training=training)


Role = Literal["honest", "private", "free rider", "corrupted", "overpayer"]


@dataclass(slots=True)
class LocalNode:
    """One peer's folder and, while it runs, its process."""

    index: int
    home: Path
    role: Role
    http_port: int
    peer: str
    account: str
    process: "subprocess.Popen[bytes] | None" = None
    is_killed: bool = False
    """By `Localnet.kill`: one that ended by itself, if only for want of memory, is an error."""
    last_status: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where its HTTP side listens."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def is_running(self) -> bool:
        """Its process lives."""
        return self.process is not None and self.process.poll() is None


@dataclass(slots=True)
class Localnet:
    """A running network. Made by `localnet()`."""

    folder: Path
    network: NetworkConfig
    testnet: Testnet
    ledger: Web3Ledger
    nodes: list[LocalNode]

    def start(self, node: LocalNode) -> None:
        """Run `p2pfm node run` for this peer; its output goes to node.log in its folder."""
        assert not node.is_running
        node.is_killed = False
        with (node.home / "node.log").open("ab") as log:
            node.process = start_tied(
                [sys.executable, "-m", "nodes.cli", "node", "run", "--config", str(node.home / CONFIG_NAME), "--tied"],
                log,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )

    def kill(self, node: LocalNode) -> None:
        """SIGKILL: the process has no chance to say goodbye."""
        assert node.process is not None
        node.is_killed = True
        node.process.kill()
        node.process.wait()

    def get_status(self, node: LocalNode) -> dict[str, Any]:
        """The node's /status; empty while it cannot be reached. Raises WorldError if its process ended by itself."""
        if node.process is not None and not node.is_killed and node.process.poll() is not None:
            raise WorldError(
                f"node {node.index} {describe_end(node.process.returncode)}: {_read_last_line(node.home / 'node.log')}"
            )
        try:
            node.last_status = httpx.get(f"{node.url}/status", timeout=5).json()
        except (httpx.HTTPError, json.JSONDecodeError):
            return {}
        return node.last_status

    def check_chain(self) -> None:
        """Raises WorldError if the chain's process has ended."""
        code = self.testnet.process.poll()
        if code is not None:
            raise WorldError(f"the chain {describe_end(code)}: {_read_last_line(self.folder / 'chain.log')}")

    def wait_until(self, what: str, is_done: Callable[[], bool], timeout_s: float, poll_s: float = 0.5) -> None:
        """Wait for a condition. Raises WorldError when it takes too long, naming it, or when the chain is gone."""
        deadline = time.monotonic() + timeout_s
        while not is_done():
            self.check_chain()
            if time.monotonic() > deadline:
                raise WorldError(
                    f"{what}: not within {timeout_s:.0f} s; the nodes' logs are in {self.folder}/peer-*/node.log"
                )
            time.sleep(poll_s)

    def wait_until_running(self, node: LocalNode, timeout_s: float = 120) -> None:
        """Until the node takes part."""
        self.wait_until(f"node {node.index} starts", lambda: self.get_status(node).get("stage") == "running", timeout_s)

    def stop(self) -> None:
        """End every process, kindly first."""
        running = [node.process for node in self.nodes if node.is_running and node.process is not None]
        for process in running:
            process.terminate()
        for process in running:
            stop(process)


@contextlib.contextmanager
def localnet(
    folder: Path,
    roles: tuple[Role, ...],
    preset: Preset,
    tell: Tell,
    *,
    seed: int = 0,
    gateways: frozenset[int] = frozenset(),
    chain: Literal["embedded", "anvil"] = "embedded",
    challenge_window_s: int = CHALLENGE_WINDOW_S,
) -> Iterator[Localnet]:
    """Chain, contracts, shards and one started process a peer; everything ends with the block.

    Args:
        folder: made new; holds every node's home and log.
        roles: one a peer.
        gateways: indices of nodes that answer their clients from other peers' replicas.

    Raises:
        OperatorError: a model that is not here, a folder in use.
    """
    if (folder / "peer-0").exists():
        raise OperatorError(f"{folder} holds a local network already; choose another folder or remove it")
    if preset.backbone != LINEAR:
        resolve(preset.backbone)
    folder.mkdir(parents=True, exist_ok=True)
    tell("dealing the text to the peers")
    corrupted = frozenset(index for index, role in enumerate(roles) if role == "corrupted")
    shards = build_shards(len(roles), folder / "data", seed, corrupted)
    tell(f"starting the chain ({chain})")
    with run_testnet(get_free_port(), chain == "anvil", folder / "chain.log") as testnet:
        tell("deploying the contracts")
        network, ledger = create_network(testnet, preset, shards.probe, challenge_window_s)
        nodes = _create_nodes(folder, roles, network, testnet, shards.peers, shards.probe, gateways)
        for node in nodes:
            endow(ledger, node.account)
        net = Localnet(folder, network, testnet, ledger, nodes)
        try:
            tell(f"starting {len(nodes)} peers")
            for node in nodes:
                net.start(node)
            yield net
        finally:
            net.stop()


def create_network(
    testnet: Testnet, preset: Preset, probe: Path, challenge_window_s: int = CHALLENGE_WINDOW_S
) -> tuple[NetworkConfig, Web3Ledger]:
    """Deploy the contracts, fund their pools, and write down what peers agree on; the first round is `startup_s` away.

    Returns the rules, and the ledger as the first prefunded account sees it: it holds all tokens.
    """
    params = FederationParams(
        committee_size=preset.scoring.committee_size,
        min_stake=Wei(STAKE_PFM * WEI_PER_PFM),
        challenge_window_s=challenge_window_s,
        pool_per_epoch=Wei(POOL_PFM * WEI_PER_PFM),
        rounds_per_epoch=1,
        rotation_s=ROTATION_S,
        response_s=RESPONSE_S,
        members_max=preset.limits.peers_max,
        serving_per_epoch=Wei(SERVING_PFM * WEI_PER_PFM),
    )
    contracts = deploy(testnet.rpc_url, testnet.keys[0], params)
    ledger = Web3Ledger(testnet.rpc_url, contracts, testnet.keys[0])
    ledger.fund(Wei(EPOCHS_FUNDED * POOL_PFM * WEI_PER_PFM))
    ledger.fund_serving(Wei(EPOCHS_FUNDED * SERVING_PFM * WEI_PER_PFM))
    network = NetworkConfig(
        name="localnet",
        genesis_ms=Millis(int((time.time() + preset.startup_s) * 1000)),
        backbone=preset.backbone,
        probe=sha256(probe.read_bytes()).hexdigest(),
        chain=contracts,
        adapter=preset.adapter,
        training=preset.training,
        scoring=preset.scoring,
        compression=preset.compression,
        phases=preset.phases,
        limits=preset.limits,
        settlement=SettlementConfig(rounds_per_epoch=1, pool_per_epoch_pfm=POOL_PFM, serving_per_epoch_pfm=SERVING_PFM),
    )
    return network, ledger


def endow(ledger: Web3Ledger, account: str) -> None:
    """Give a newcomer its stake and ether for gas."""
    ledger.send_ether(account, GAS_WEI)
    ledger.transfer(account, Wei(STAKE_PFM * WEI_PER_PFM))


def _read_last_line(path: Path) -> str:
    """What a process said last."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _create_nodes(
    folder: Path,
    roles: tuple[Role, ...],
    network: NetworkConfig,
    testnet: Testnet,
    shards: tuple[Path, ...],
    probe: Path,
    gateways: frozenset[int],
) -> list[LocalNode]:
    """Homes with keys and TOML. Peer 0 is the bootstrap node and the only one that is told where the probe lies."""
    nodes: list[LocalNode] = []
    listen = f"/ip4/127.0.0.1/tcp/{get_free_port()}"
    bootstrap: tuple[str, ...] = ()
    for index, role in enumerate(roles):
        home = folder / f"peer-{index}"
        config = NodeConfig(
            home=".",
            data=os.path.relpath(shards[index], home),
            rpc=testnet.rpc_url,
            network=network,
            probe=os.path.relpath(probe, home) if index == 0 else "",
            listen=listen if index == 0 else "/ip4/127.0.0.1/tcp/0",
            bootstrap=bootstrap,
            http=HttpConfig(port=get_free_port()),
            serving=ServingConfig(enabled=network.backbone != LINEAR, local="avoid" if index in gateways else "prefer"),
            stake_pfm=STAKE_PFM,
            adversary=ADVERSARIES.get(role, ""),
            auto_challenge=role != "overpayer",  # or it would take the bounty on itself
            privacy=PRIVACY if role == "private" else PrivacyConfig(),
            limits=make_transport_limits(network),
        )
        keys = create_home(config, home, None, is_light=True)
        if index == 0:
            bootstrap = (f"{listen}/p2p/{keys.peer}",)
        nodes.append(LocalNode(index, home, role, config.http.port, keys.peer, keys.account_address))
        assert read_config(home / CONFIG_NAME).network == network
    return nodes
