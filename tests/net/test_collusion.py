"""Real nodes: three of four committee members overpay one of them, the fourth contests it on chain, and goes on."""

import time
from pathlib import Path

import httpx
import pytest

from nodes.localnet import PRESETS, Localnet, localnet
from nodes.rewards import verify_rewards
from p2pfm.settlement.ledger import Contested, SettledRound, Slashed, Voided
from p2pfm.types import Digest, MemberIndex, Round, Wei

pytestmark = [pytest.mark.slow, pytest.mark.alone]

WINDOW_S = 25
HONEST = 0
ROUND_S = 10


def fetch(net: Localnet, digest: Digest) -> bytes | None:
    response = httpx.get(f"{net.nodes[HONEST].url}/blobs/{digest.hex()}", timeout=10)
    return response.content if response.status_code == 200 else None


def test_a_colluding_majority_is_contested_slashed_and_survived(tmp_path: Path) -> None:
    roles = ("honest", "overpayer", "overpayer", "overpayer")
    with localnet(tmp_path / "net", roles, PRESETS["toy"], print, challenge_window_s=WINDOW_S) as net:
        for node in net.nodes:
            net.wait_until_running(node)
        deadline = time.monotonic() + 150
        net.wait_until("a round is contested", lambda: len(told(net, Contested)) > 0, deadline - time.monotonic())
        (contest,) = told(net, Contested)
        honest = next(m for m in net.ledger.get_roster().members if m.peer == net.nodes[HONEST].peer)
        assert (contest.fault, contest.account) == ("reward", honest.account)
        assert contest.bounty == 3 * 100 * 10**18 // 4
        slashed = {what.index for what in told(net, Slashed)}
        assert slashed == {MemberIndex(i) for i in range(4)} - {honest.index}
        assert [what.round for what in told(net, Voided)] == [contest.round]

        net.wait_until("the next round settles", lambda: bool(good_rounds(net, contest.round)), 5 * ROUND_S)
        settled = good_rounds(net, contest.round)[0]
        assert settled.nonce == 1
        assert net.ledger.get_committee(settled.epoch) == (honest.index,)
        findings = verify_rewards(net.ledger, lambda digest: fetch(net, digest), net.network)
        assert not any(findings.values()), findings
        status = net.get_status(net.nodes[HONEST])
        assert any("is void" in line for line in status["chain"]["findings"])
        paid = Wei(0)

        def is_paid() -> bool:
            nonlocal paid
            paid = net.ledger.get_claimed(honest.index)
            return paid > 0

        net.wait_until("the honest peer is paid", is_paid, 2 * WINDOW_S)
        assert paid <= net.network.pool_per_epoch() * len(net.ledger.get_rounds(Round(0)))


def told(net: Localnet, kind: type) -> list:  # type: ignore[type-arg]
    return [entry.what for entry in net.ledger.get_entries() if isinstance(entry.what, kind)]


def good_rounds(net: Localnet, void: Round) -> list[SettledRound]:
    return [settled for settled in net.ledger.get_rounds(Round(0)) if settled.round > void and settled.nonce > 0]
