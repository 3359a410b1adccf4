"""Rewards are read from the chain and recomputed: whatever a committee certified wrongly is found."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from ledger_worlds import PARAMS, PEERS, World, memory_world

from nodes.rewards import (
    claim_newest,
    make_rewards_table,
    plot_rewards,
    read_rewards,
    rows_to_json,
    verify_rewards,
)
from p2pfm.config import NetworkConfig, SettlementConfig
from p2pfm.errors import Reject, WorldError
from p2pfm.messages import (
    Announcement,
    Proposal,
    Score,
    ScoreReveal,
    encode,
    proposal_digest,
    wei_to_wire,
)
from p2pfm.protocol.committee import draft_proposal
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import Submission
from p2pfm.settlement.rewards import compute_sums, from_wire
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, Round, Wei, compute_digest

POOL_WEI = 10**18
MEASURED = {0: (50, 40, 60), 1: (-20, 10, -30), 2: (90, 95, 5)}
"""What each of three members measured, by the index of the update's author [nano-nats]; medians 50, -20, 90."""


class Settled:
    """Rounds of a federation in memory, and the blobs that peers would serve."""

    def __init__(self) -> None:
        params = msgspec.structs.replace(PARAMS, pool_per_epoch=Wei(POOL_WEI))
        self.world: World = memory_world(params, tokens=Wei(3 * POOL_WEI)).found(4, pool=2 * POOL_WEI)
        self.network = NetworkConfig(
            name="test",
            genesis_ms=Millis(0),
            backbone="toy",
            probe="0" * 64,
            chain=self.world.chain,
            settlement=SettlementConfig(rounds_per_epoch=2, pool_per_epoch_pfm=1),
        )
        self.blobs: dict[Digest, bytes] = {}
        self.previous: Proposal | None = None

    def settle(self, round: int, tamper: Callable[[Proposal], Proposal] = lambda proposal: proposal) -> None:
        """The round's right proposal, changed by `tamper`, signed by all and accepted by the contract."""
        roster = self.world.any.get_roster()
        payloads = {author: compute_digest(b"%d %d" % (round, author)) for author in MEASURED}
        announcements = {
            payload: Announcement(Round(round), PEERS[author + 1], Digest(b"b" * 32), payload, 10, 10)
            for author, payload in payloads.items()
        }
        reveals = [
            ScoreReveal(
                round=Round(round),
                member=MemberIndex(judge),
                salt=bytes(32),
                scores=tuple(
                    sorted(
                        (Score(payloads[author], Contribution(MEASURED[author][judge])) for author in MEASURED),
                        key=lambda score: score.payload,
                    )
                ),
            )
            for judge in range(3)
        ]
        base = Digest(b"b" * 32)
        draft = draft_proposal(self.network, roster, self.previous, Round(round), base, reveals, announcements)
        proposal = tamper(msgspec.structs.replace(draft, new_base=Digest(b"n" * 32)))
        leaves = from_wire(proposal.leaves)
        submission = Submission(
            round=proposal.round,
            epoch=proposal.epoch,
            nonce=proposal.nonce,
            prev_root=proposal.prev_root,
            root=proposal.root,
            sums=compute_sums(leaves),
            data_digest=proposal_digest(proposal),
            base=proposal.new_base,
            absent=(),
            signature=bytes(96),
        )
        submission = self.world.sign(submission)
        self.world.any.submit_round(submission)
        self.blobs[submission.data_digest] = encode(proposal)
        self.previous = proposal

    def findings(self) -> dict[Round, list[str]]:
        """Of all rounds."""
        return verify_rewards(self.world.any, self.blobs.get, self.network)


def with_root(proposal: Proposal) -> Proposal:
    """The proposal with the root of its own leaves: a lie that is consistent in itself."""
    return msgspec.structs.replace(proposal, root=merkle.compute_root(from_wire(proposal.leaves)).digest)


@pytest.fixture
def settled() -> Settled:
    return Settled()


def test_rows_hold_what_the_chain_allotted(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    settled.world.advance(PARAMS.challenge_window_s)
    assert claim_newest(settled.world.any, PEERS[1], settled.blobs.get) == POOL_WEI * 100 // 280
    rows = read_rewards(settled.world.any, settled.blobs.get)
    assert [(row.round, row.member, row.peer) for row in rows] == [
        (round, member, PEERS[member + 1]) for round in (0, 1) for member in range(4)
    ]
    assert [row.contribution for row in rows] == [50, -20, 90, None] * 2
    assert [row.total for row in rows] == [50, -20, 90, 0, 100, -40, 180, 0]
    assert [row.reward_wei for row in rows[:4]] == [0, 0, 0, 0]
    assert [row.reward_wei for row in rows[4:]] == [POOL_WEI * 100 // 280, 0, POOL_WEI * 180 // 280, 0]
    assert [row.claimed_wei for row in rows[4:]] == [POOL_WEI * 100 // 280, 0, 0, 0]
    assert all(row.is_final for row in rows)
    assert rows_to_json(rows)[4]["reward_wei"] == str(POOL_WEI * 100 // 280)


def test_an_honest_history_has_no_findings(settled: Settled) -> None:
    for round in (0, 1, 3):  # round 2 was void
        settled.settle(round)
    assert settled.findings() == {0: [], 1: [], 3: []}


def test_verify_finds_a_raised_median(settled: Settled) -> None:
    def tamper(proposal: Proposal) -> Proposal:
        first = msgspec.structs.replace(proposal.updates[0], contribution=Contribution(10_000))
        return msgspec.structs.replace(proposal, updates=(first, *proposal.updates[1:]))

    settled.settle(0, tamper)
    assert any("median" in finding for finding in settled.findings()[Round(0)])


def test_verify_finds_a_leaf_that_pays_too_much(settled: Settled) -> None:
    def tamper(proposal: Proposal) -> Proposal:
        greedy = msgspec.structs.replace(
            proposal.leaves[3], cumulative_wei=wei_to_wire(Wei(5)), reward_wei=wei_to_wire(Wei(5))
        )
        return with_root(msgspec.structs.replace(proposal, leaves=(*proposal.leaves[:3], greedy)))

    settled.settle(0, tamper)
    (finding,) = settled.findings()[Round(0)]
    assert finding.startswith("leaf of member 3")


def test_verify_finds_a_wrong_merge_weight(settled: Settled) -> None:
    def tamper(proposal: Proposal) -> Proposal:
        swapped = [proposal.updates[1].weight, proposal.updates[0].weight]
        changed = [
            msgspec.structs.replace(update, weight=weight)
            for update, weight in zip(proposal.updates, swapped, strict=False)
        ]
        return msgspec.structs.replace(proposal, updates=(*changed, *proposal.updates[2:]))

    settled.settle(0, tamper)
    assert all("merge weight" in finding for finding in settled.findings()[Round(0)])
    assert len(settled.findings()[Round(0)]) == 2


def test_verify_finds_leaves_that_are_not_of_the_root(settled: Settled) -> None:
    settled.settle(0, lambda proposal: msgspec.structs.replace(proposal, root=Digest(b"r" * 32)))
    assert any("root" in finding for finding in settled.findings()[Round(0)])
    with pytest.raises(Reject, match="root"):
        read_rewards(settled.world.any, settled.blobs.get)


def test_verify_finds_data_that_is_not_of_the_hash(settled: Settled) -> None:
    settled.settle(0)
    (digest,) = settled.blobs
    settled.blobs[digest] += b"\0"
    (finding,) = settled.findings()[Round(0)]
    assert finding.startswith("data: expected SHA-256")
    with pytest.raises(WorldError, match="nobody serves"):
        read_rewards(settled.world.any, settled.blobs.get)


def test_a_round_whose_data_nobody_serves_is_named(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    first = settled.world.any.get_rounds(Round(0))[0]
    del settled.blobs[first.data_digest]
    with pytest.raises(WorldError, match="round 0: nobody serves"):
        read_rewards(settled.world.any, settled.blobs.get)
    assert {row.round for row in read_rewards(settled.world.any, settled.blobs.get, is_partial=True)} == {1}
    findings = settled.findings()
    assert "cannot be checked" in findings[Round(0)][0]
    assert "not at hand" in findings[Round(1)][0]


def test_rewards_become_a_table_and_a_picture(settled: Settled, tmp_path: Path) -> None:
    settled.settle(0)
    settled.settle(1)
    rows = read_rewards(settled.world.any, settled.blobs.get)
    table = make_rewards_table(rows)
    assert table.row_count == 4
    assert len(table.columns) == 5
    picture = tmp_path / "rewards.png"
    plot_rewards(rows, picture, {PEERS[1]: "ada"})
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one"):
        plot_rewards((), picture)


def test_a_peer_with_nothing_to_claim_is_told_why(settled: Settled) -> None:
    with pytest.raises(WorldError, match="no round is final"):
        claim_newest(settled.world.any, PEERS[1], settled.blobs.get)
    settled.settle(0)
    settled.world.advance(PARAMS.challenge_window_s)
    assert claim_newest(settled.world.any, PEERS[1], settled.blobs.get) == 0
    with pytest.raises(WorldError, match="not registered"):
        claim_newest(settled.world.any, PEERS[6], settled.blobs.get)
