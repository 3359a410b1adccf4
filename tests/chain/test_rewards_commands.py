"""`p2pfm rewards` as people run it, against the real contract: each answer, its next step and its exit code."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import msgspec
import pytest
from ledger_worlds import ACCOUNTS, PARAMS, PEERS, World, chain_world, running_chain
from rewards_world import POOL_WEI, Settled, move_reward

from nodes.cli import main
from nodes.homes import CONFIG_NAME, create_home
from nodes.ports import get_free_port
from p2pfm.config import HttpConfig, NodeConfig
from p2pfm.runtime.web3_ledger import Web3Ledger
from p2pfm.types import Digest, Round, Wei

DONE, WORLD, OPERATOR, FINDING = 0, 1, 2, 3
GAS_WEI = 10**18


class Desk:
    """An auditor's folder, who is no member and runs no node, and the federation that it looks at."""

    def __init__(self, folder: Path, rpc_url: str) -> None:
        params = msgspec.structs.replace(PARAMS, pool_per_epoch=Wei(POOL_WEI), challenge_window_s=50_000)
        params = msgspec.structs.replace(params, restart_s=10**6, unbonding_s=10**6)
        world: World = chain_world(rpc_url, params)
        for member in range(1, 4):
            world.join(member)
        world.ledgers[0].fund(Wei(2 * POOL_WEI))
        world.any.rotate()
        self.settled = Settled(num_members=3, world=world)
        config = NodeConfig(
            home=".",
            data="",
            rpc=rpc_url,
            network=msgspec.structs.replace(self.settled.network, backbone="tiny"),
            http=HttpConfig(port=get_free_port()),
        )
        self.home = folder / "auditor"
        self.account = create_home(config, self.home, None, is_light=True).account_address
        world.ledgers[0].send_ether(self.account, GAS_WEI)
        world.ledgers[0].transfer(self.account, PARAMS.leaf_bond)

    @property
    def ledger(self) -> Web3Ledger:
        """Anybody's view."""
        ledger: Web3Ledger = self.settled.world.ledgers[7]
        return ledger

    def settle(self, round: int, **options) -> None:
        """A round, whose data lie in the auditor's folder."""
        self.settled.settle(round, **options)
        for digest, data in self.settled.blobs.items():
            path = self.get_path(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def get_path(self, digest: Digest) -> Path:
        """Where the store keeps a blob."""
        return self.home / "blobs" / digest.hex()[:2] / digest.hex()

    def run(self, *arguments: str, expect: int = DONE) -> str:
        """What the command printed; it must end with this code."""
        command = ["p2pfm", "rewards", *arguments, "--config", str(self.home / CONFIG_NAME)]
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
            patch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as end:
                main()
        assert (end.value.code or 0) == expect, printed.getvalue()
        return printed.getvalue() if "--json" in arguments else " ".join(printed.getvalue().split())


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with running_chain("embedded") as rpc_url:
        yield Desk(tmp_path_factory.mktemp("desk"), rpc_url)


def test_1_before_the_first_round_everything_says_so(desk: Desk) -> None:
    for by in ("peer", "round", "epoch"):
        assert "no round is on chain yet (3 peers are registered, 2.0000 PFM in the pool)" in desk.run(
            "show", "--by", by
        )
    assert "nothing to draw" in desk.run("plot", expect=OPERATOR)
    assert "no round is on chain yet" in desk.run("explain", "0", "--round", "0", expect=OPERATOR)
    assert "no round is on chain yet" in desk.run("verify")
    assert json.loads(desk.run("verify", "--json")) == {}
    assert "no round is final" in desk.run("claim", "--peer", "0", expect=WORLD)
    assert "nothing can be contested" in desk.run("challenge")


def test_2_settled_rounds_are_shown_explained_and_verified(desk: Desk, tmp_path: Path) -> None:
    desk.settle(0)
    desk.settle(1)
    told = json.loads(desk.run("show", "--json", "--csv", str(tmp_path / "peers.csv")))
    assert [row["peer"] for row in told["rows"]] == [PEERS[3], PEERS[1], PEERS[2]]
    assert told["totals"]["contestable_wei"] == str(POOL_WEI * 100 // 280 + POOL_WEI * 180 // 280)
    assert (tmp_path / "peers.csv").read_text().count("\n") == 4
    assert "open until" in desk.run("show", "--by", "round")
    explained = json.loads(desk.run("explain", "peer3", "--round", "1", "--json", "--no-measure"))
    assert explained["reward_wei"] == str(POOL_WEI * 180 // 280)
    assert explained["is_proven"] is True
    text = desk.run("explain", "2", "--round", "1", "--proof")
    assert "leads to the root on chain" in text
    assert "sibling 1" in text
    assert "without it no node answers" in text  # the probe is not here: said plainly, and all the rest is shown
    assert "2 settled rounds checked" in desk.run("verify")
    assert "nobody of that name is registered" in desk.run("explain", "nobody", "--round", "1", expect=OPERATOR)
    assert "round 9 is not on chain" in desk.run("explain", "0", "--round", "9", expect=OPERATOR)
    for kind in ("overview", "distribution", "lorenz", "history"):
        desk.run("plot", "--kind", kind, "--out", str(tmp_path / f"{kind}.svg"))
        assert (tmp_path / f"{kind}.svg").read_text().startswith("<?xml")
    assert "ends in .png or .svg" in desk.run("plot", "--out", "a.gif", expect=OPERATOR)


def test_3_lost_and_forged_data_are_told_with_the_way_to_force_them(desk: Desk) -> None:
    digest = desk.ledger.get_rounds(Round(1))[0].data_digest
    data = desk.get_path(digest).read_bytes()
    desk.get_path(digest).unlink()
    assert "no node answers" in desk.run("show", expect=OPERATOR)
    desk.get_path(digest).write_bytes(data + b"!")
    assert "no node answers" in desk.run("challenge", "--round", "1", expect=OPERATOR)
    desk.get_path(digest).write_bytes(data)


def test_4_a_demand_is_made_listed_and_answered(desk: Desk) -> None:
    told = desk.run("challenge", "--round", "1", "--demand", "2")
    assert "demand 0: the signers of round 1 must show the leaf of member 2 by" in told
    assert "7 wei" in told
    assert desk.ledger.get_balance(desk.account) == 0
    assert "open" in desk.run("demands")
    assert "signers still have time" in desk.run("close-demand", "0", expect=WORLD)
    assert "too few tokens for the bond" in desk.run("challenge", "--round", "1", "--demand", "1", expect=WORLD)
    assert "the leaf of member 2 is on chain" in desk.run("show-leaf", "0")
    assert desk.ledger.get_balance(desk.account) == PARAMS.leaf_bond
    assert json.loads(desk.run("demands", "--json"))[0]["is_open"] is False
    assert "answered or closed already" in desk.run("show-leaf", "0", expect=OPERATOR)


def test_5_a_stranger_claims_and_the_member_is_paid(desk: Desk) -> None:
    desk.settled.world.advance(60_000)
    before = desk.ledger.get_balance(ACCOUNTS[1])
    assert "this peer is not registered" in desk.run("claim", expect=WORLD)
    assert f"paid to {ACCOUNTS[1]}" in desk.run("claim", "--peer", PEERS[1])
    assert desk.ledger.get_balance(ACCOUNTS[1]) - before == POOL_WEI * 100 // 280
    assert "nothing is owed now" in desk.run("claim", "--peer", "0")
    assert "nothing is owed now" in desk.run("claim", "--peer", "1")  # never worth anything


def test_6_a_colluders_round_is_found_proven_and_void(desk: Desk) -> None:
    desk.settle(3, tamper=lambda proposal: move_reward(proposal, 9, source=2, target=1))
    assert "wrong" in desk.run("verify", "--round", "3", expect=FINDING)
    desk.run("challenge", "--round", "3", "--demand", "1")
    assert "nothing was sent" in desk.run("challenge", "--dry-run", expect=FINDING)
    assert "the rule says 0 wei" in desk.run("explain", "1", "--round", "3", "--no-measure", expect=FINDING)
    told = desk.run("challenge", "--round", "3", expect=FINDING)
    assert "round 3 and all after it are void; 3 signers lost 30 wei, and 7 wei of it is your bounty" in told
    assert [settled.round for settled in desk.ledger.get_rounds(Round(0))] == [0, 1]
    assert "its round was voided" in desk.run("show-leaf", "1", expect=OPERATOR)
    assert "nothing was voided by it" in desk.run("close-demand", "1")
    assert desk.ledger.get_balance(desk.account) == PARAMS.leaf_bond + 30 // 4
    assert "round 3 is not on chain" in desk.run("challenge", "--round", "3", expect=OPERATOR)
    desk.settled.world.check_books()
