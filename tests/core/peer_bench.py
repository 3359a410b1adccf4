"""A bench for one Peer: events in, actions out, with the other members' words made to order."""

from typing import TypeVar

from p2pfm.config import ChainConfig, NetworkConfig, PhaseConfig, SettlementConfig
from p2pfm.messages import (
    Announcement,
    Attestation,
    Certificate,
    Envelope,
    Message,
    Proposal,
    Score,
    ScoreCommit,
    ScoreReveal,
    encode,
)
from p2pfm.protocol.committee import NO_DIGEST, draft_proposal
from p2pfm.protocol.events import (
    AnyAction,
    AnyEvent,
    Durable,
    Fetch,
    Fetched,
    Merge,
    Merged,
    PeersChanged,
    Received,
    RosterChanged,
    Tick,
    Trained,
)
from p2pfm.protocol.peer import Peer, initial_durable
from p2pfm.protocol.phases import Phase, compute_round_start, get_durations
from p2pfm.settlement.ledger import Member, Roster, SettledRound, Sums
from p2pfm.settlement.rewards import proposal_message
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, Wei, compute_digest

NUM_PEERS = 4
NAMES = tuple(PeerId(f"peer-{index}") for index in range(NUM_PEERS))
BASE = compute_digest(b"initial base")
SALT = bytes(32)
ROUND = Round(0)
CONFIG = NetworkConfig(
    name="bench",
    genesis_ms=Millis(1_000_000),
    backbone="none",
    probe="00" * 32,
    chain=ChainConfig(chain_id=1, federation="0x" + "11" * 20, token="0x" + "22" * 20),
    phases=PhaseConfig(*[Millis(10_000)] * 6),
    settlement=SettlementConfig(rounds_per_epoch=1),
)

A = TypeVar("A")


def make_roster(committee: tuple[int, ...] = (0, 1, 2, 3), num_peers: int = NUM_PEERS, epoch: int = 1) -> Roster:
    """`num_peers` members of equal stake."""
    members = tuple(
        Member(MemberIndex(index), f"0x{index:040x}", PeerId(f"peer-{index}"), bytes(48), Wei(10**20), active=True)
        for index in range(num_peers)
    )
    return Roster(epoch, 0, members, tuple(MemberIndex(index) for index in committee))


ROSTER = make_roster()


def seal(author: PeerId, message: Message) -> Received:
    """A message as the driver delivers it: its signature has been checked."""
    return Received(Envelope(author, encode(message), b""), message)


def settled_as(round: int, root: Digest, prev_root: Digest = NO_DIGEST) -> SettledRound:
    """A round as the chain tells it; its base and data are named after its root."""
    return SettledRound(
        round=Round(round),
        epoch=1,
        nonce=0,
        prev_root=prev_root,
        root=root,
        num_leaves=NUM_PEERS,
        sums=Sums(Wei(0), Wei(0), 0),
        data_digest=root,
        base=root,
        absent=(),
        position=round,
        accepted_s=0,
        is_final=False,
    )


def payload_of(name: PeerId, round: Round = ROUND) -> Digest:
    return compute_digest(f"payload {name} {round}".encode())


def maker_of(payload: Digest) -> PeerId | None:
    """Whose update of any of the first rounds this is; None for anything else."""
    return next((name for name in NAMES for number in range(8) if payload_of(name, Round(number)) == payload), None)


def announcement_of(name: PeerId, round: Round = ROUND, base: Digest = BASE) -> Announcement:
    return Announcement(round, name, base, payload_of(name, round), 100, 10)


def reveal_of(member: int, round: Round = ROUND, values: tuple[int, ...] = (10, 20, 30, 40)) -> ScoreReveal:
    """Member's vector over everybody's update; `values` by peer."""
    scores = [Score(payload_of(name, round), Contribution(value)) for name, value in zip(NAMES, values, strict=True)]
    return ScoreReveal(round, MemberIndex(member), SALT, tuple(sorted(scores, key=lambda score: score.payload)))


def commit_of(reveal: ScoreReveal) -> ScoreCommit:
    return ScoreCommit(reveal.round, reveal.member, reveal.commitment)


def only(actions: list[AnyAction], kind: type[A]) -> A:
    """The one action of a kind."""
    found = every(actions, kind)
    assert len(found) == 1, f"expected one {kind.__name__} in {actions}"
    return found[0]


def every(actions: list[AnyAction], kind: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


class Bench:
    """Peer `index` of NUM_PEERS, its clock in the reader's hand."""

    def __init__(self, index: int = 0, durable: Durable | None = None, roster: Roster = ROSTER) -> None:
        self.me = NAMES[index]
        self.index = index
        self.roster = roster
        self.now_ms = compute_round_start(CONFIG, Round(0))
        self.peer = Peer(self.me, CONFIG, durable or initial_durable(BASE))

    def feed(self, event: AnyEvent) -> list[AnyAction]:
        return self.peer.handle(event, self.now_ms)

    def hear(self, author: int, message: Message) -> list[AnyAction]:
        return self.feed(seal(NAMES[author], message))

    def join(self) -> list[AnyAction]:
        """Learn the registry and the neighbours."""
        actions = self.feed(RosterChanged(self.roster))
        self.feed(PeersChanged(tuple(name for name in NAMES if name != self.me)))
        return actions

    def go(self, phase: Phase, round: Round = ROUND) -> list[AnyAction]:
        """Let the clock strike a phase's first moment."""
        before = sum(get_durations(CONFIG)[: int(phase)])
        self.now_ms = Millis(compute_round_start(CONFIG, round) + before)
        return self.feed(Tick())

    def train(self, round: Round = ROUND) -> list[AnyAction]:
        """Local work is done."""
        base = self.peer.durable.base
        residual = compute_digest(f"residual {round}".encode())
        return self.feed(Trained(round, base, payload_of(self.me, round), 100, 10, residual, 0))

    def exchange(self, round: Round = ROUND) -> list[AnyAction]:
        """All announce in TRAIN; EXCHANGE begins and every payload comes."""
        for index, name in enumerate(NAMES):
            self.hear(index, announcement_of(name, round, self.peer.durable.base))
        actions = self.go(Phase.EXCHANGE, round)
        for fetch in every(actions, Fetch):
            actions += self.feed(Fetched(fetch.digest, maker_of(fetch.digest)))
        return actions

    def reveal(self, round: Round = ROUND, members: tuple[int, ...] = (0, 1, 2, 3)) -> list[AnyAction]:
        """Commitments in SCORE, vectors in REVEAL."""
        actions = self.go(Phase.SCORE, round)
        for member in members:
            actions += self.hear(member, commit_of(reveal_of(member, round)))
        actions += self.go(Phase.REVEAL, round)
        for member in members:
            actions += self.hear(member, reveal_of(member, round))
        return actions

    def draft(self, round: Round = ROUND, members: tuple[int, ...] = (0, 1, 2, 3)) -> Proposal:
        """The right proposal of a round in which all take part, its new base left open."""
        durable = self.peer.durable
        announcements = {payload_of(name, round): announcement_of(name, round, durable.base) for name in NAMES}
        reveals = [reveal_of(member, round) for member in members]
        previous = durable.head.proposal if durable.head else None
        return draft_proposal(CONFIG, self.roster, previous, round, durable.base, reveals, announcements)

    def run_to_attest(self, round: Round = ROUND) -> list[AnyAction]:
        """Everything up to the first moment of ATTEST; `join` must have been called."""
        self.go(Phase.TRAIN, round)
        self.exchange(round)
        self.reveal(round)
        return self.go(Phase.ATTEST, round)

    def answer_merge(self, actions: list[AnyAction], new_base: Digest) -> list[AnyAction]:
        return self.feed(Merged(only(actions, Merge).request, new_base))


def attest(proposal: Proposal, member: int) -> Attestation:
    message = proposal_message(CONFIG.chain, proposal)
    return Attestation(proposal.round, MemberIndex(member), message, bytes(96))


def certify(proposal: Proposal) -> Certificate:
    """The driver checks signatures, so any will do here."""
    return Certificate(proposal, (), bytes(96))
