"""Rounds of a federation in memory, settled by the peers' own rules or by liars, and the blobs that peers serve."""

from collections.abc import Callable, Mapping, Sequence

import msgspec
from ledger_worlds import PARAMS, PEERS, World, memory_world

from nodes.rewards import verify_rewards
from nodes.rewards.reading import Book, read_book
from p2pfm.config import NetworkConfig, ScoringConfig, SettlementConfig
from p2pfm.messages import Announcement, Proposal, Score, ScoreReveal, encode, proposal_digest, wei_to_wire
from p2pfm.protocol.committee import draft_proposal
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue, Submission
from p2pfm.settlement.rewards import compute_sums, from_wire, to_wire
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, Round, Wei, compute_digest

POOL_WEI = 10**18
Measured = Mapping[int, Sequence[int | None]]
MEASURED: Measured = {0: (50, 40, 60), 1: (-20, 10, -30), 2: (90, 95, 5)}
"""What each of three members measured, by the index of the update's author [nano-nats]; medians 50, -20, 90. None: it
did not score it."""

Tamper = Callable[[Proposal], Proposal]


class Settled:
    """A federation of four members and three judges."""

    def __init__(
        self,
        num_members: int = 4,
        pool: int = POOL_WEI,
        scoring: ScoringConfig | None = None,
        world: World | None = None,
    ) -> None:
        """`world`: a founded one whose epochs have two rounds; without it: in memory, with two pools paid in."""
        params = msgspec.structs.replace(PARAMS, pool_per_epoch=Wei(pool))
        self.world = world or memory_world(params, tokens=Wei(3 * POOL_WEI)).found(num_members, pool=2 * POOL_WEI)
        self.network = NetworkConfig(
            name="test",
            genesis_ms=Millis(0),
            backbone="toy",
            probe="0" * 64,
            chain=self.world.chain,
            scoring=scoring or ScoringConfig(),
            settlement=SettlementConfig(rounds_per_epoch=2, pool_per_epoch_pfm=pool // 10**18),
        )
        self.blobs: dict[Digest, bytes] = {}
        self.previous: Proposal | None = None

    def settle(self, round: int, tamper: Tamper = lambda proposal: proposal, measured: Measured = MEASURED) -> Proposal:
        """The round's right proposal, changed by `tamper`, signed by all and accepted by the contract."""
        return self.accept(tamper(self.draft(round, measured)))

    def draft(self, round: int, measured: Measured = MEASURED) -> Proposal:
        """The round's right proposal, under the registry of now and after the newest one that was accepted."""
        roster = self.world.any.get_roster()
        payloads = {author: get_payload(round, author) for author in measured}
        base = self.previous.new_base if self.previous else Digest(b"b" * 32)
        announcements = {
            payload: Announcement(Round(round), PEERS[author + 1], base, payload, 10, 10)
            for author, payload in payloads.items()
        }
        num_judges = max(len(readings) for readings in measured.values())
        reveals = [
            ScoreReveal(
                round=Round(round),
                member=MemberIndex(judge),
                salt=bytes(32),
                scores=tuple(
                    sorted(
                        (
                            Score(payloads[author], Contribution(value))
                            for author in measured
                            if (value := measured[author][judge]) is not None
                        ),
                        key=lambda score: score.payload,
                    )
                ),
            )
            for judge in range(num_judges)
        ]
        draft = draft_proposal(self.network, roster, self.previous, Round(round), base, reveals, announcements)
        return msgspec.structs.replace(draft, new_base=compute_digest(b"base %d" % round))

    def accept(self, proposal: Proposal) -> Proposal:
        """Sign a proposal by all, bring it on chain, and serve it."""
        leaves = from_wire(proposal.leaves)
        submission = Submission(
            round=proposal.round,
            epoch=proposal.epoch,
            nonce=proposal.nonce,
            prev_root=proposal.prev_root,
            root=proposal.root,
            num_leaves=len(leaves),
            sums=compute_sums(leaves),
            data_digest=proposal_digest(proposal),
            base=proposal.new_base,
            absent=(),
            signature=bytes(96),
        )
        self.world.any.submit_round(self.world.sign(submission))
        self.blobs[submission.data_digest] = encode(proposal)
        self.previous = proposal
        return proposal

    def finish(self) -> None:
        """Let the newest round become final."""
        self.world.advance(PARAMS.challenge_window_s)

    def lose(self, round: int) -> bytes:
        """From now on nobody serves a round's data; returns them."""
        settled = self.world.any.get_rounds(Round(round))[0]
        return self.blobs.pop(settled.data_digest)

    def book(self) -> Book:
        """All that there is to know now."""
        return read_book(self.world.any, self.blobs.get)

    def findings(self) -> dict[Round, list[str]]:
        """Of all rounds."""
        return verify_rewards(self.world.any, self.blobs.get, self.network)


def get_payload(round: int, author: int) -> Digest:
    """The digest of an update's payload (its bytes are in `get_payload_bytes`)."""
    return compute_digest(get_payload_bytes(round, author))


def get_payload_bytes(round: int, author: int) -> bytes:
    """A payload that names its maker and holds no update."""
    name = PEERS[author + 1].encode()
    return bytes([len(name)]) + name + b"round %d" % round


def with_root(proposal: Proposal) -> Proposal:
    """The proposal with the root of its own leaves: a lie that is consistent in itself."""
    return msgspec.structs.replace(proposal, root=merkle.compute_root(from_wire(proposal.leaves)).digest)


def move_reward(proposal: Proposal, amount: int, source: int, target: int) -> Proposal:
    """The colluders' round: part of one member's reward in another's leaf, with the right sums and root."""
    leaves = list(from_wire(proposal.leaves))
    for index, sign in ((source, -1), (target, 1)):
        leaf = leaves[index]
        leaves[index] = LeafValue(
            Wei(leaf.cumulative_wei + sign * amount), Wei(leaf.reward_wei + sign * amount), leaf.contribution
        )
    return with_root(msgspec.structs.replace(proposal, leaves=to_wire(leaves)))


def move_cumulative(proposal: Proposal, amount: int, source: int, target: int) -> Proposal:
    """Part of what one member was allotted before, in another's sum."""
    leaves = list(proposal.leaves)
    for index, sign in ((source, -1), (target, 1)):
        value = from_wire([leaves[index]])[0].cumulative_wei + sign * amount
        leaves[index] = msgspec.structs.replace(leaves[index], cumulative_wei=wei_to_wire(Wei(value)))
    return with_root(msgspec.structs.replace(proposal, leaves=tuple(leaves)))


def add_served(proposal: Proposal, amount: int, target: int) -> Proposal:
    """A member was given something for serving that nobody revealed."""
    leaves = list(proposal.leaves)
    value = from_wire([leaves[target]])[0].served_wei + amount
    leaves[target] = msgspec.structs.replace(leaves[target], served_wei=wei_to_wire(Wei(value)))
    return with_root(msgspec.structs.replace(proposal, leaves=tuple(leaves)))
