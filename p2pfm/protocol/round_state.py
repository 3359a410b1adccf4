"""What a peer knows of the current round: forgotten when the round ends, rebuilt from gossip when it was away."""

from dataclasses import dataclass, field

from p2pfm.messages import Announcement, Attestation, Envelope, Message, Proposal, ScoreReveal
from p2pfm.protocol.gossip import RoundLog
from p2pfm.protocol.phases import Phase
from p2pfm.settlement.ledger import Roster
from p2pfm.types import Digest, MemberIndex, PeerId, Round

EARLY_MAX = 256
"""Messages of the next round kept for a sender whose clock is ahead."""


@dataclass(slots=True)
class RoundState:
    """One round, from its first moment to the next round's."""

    round: Round
    phase: Phase
    saw_train: bool
    """This peer was here when payloads were still secret, so it can tell who announced in time."""
    roster: Roster | None
    log: RoundLog = field(default_factory=RoundLog)
    announcements: dict[PeerId, Announcement] = field(default_factory=dict)
    late: dict[PeerId, Announcement] = field(default_factory=dict)
    """Announced here after TRAIN: not scored, but needed where most of the committee heard it in time."""
    is_training: bool = False
    held: set[Digest] = field(default_factory=set)
    """Payloads in the blob store, well-formed."""
    bad: set[Digest] = field(default_factory=set)
    """Payloads that match their digest and are malformed all the same."""
    fetching: dict[Digest, int] = field(default_factory=dict)
    """Payloads asked for, and how often."""
    scored: tuple[Digest, ...] = ()
    my_reveal: ScoreReveal | None = None
    commitments: dict[MemberIndex, Digest] = field(default_factory=dict)
    reveals: dict[MemberIndex, ScoreReveal] = field(default_factory=dict)
    draft: Proposal | None = None
    """This peer's own proposal, while its new base is being computed."""
    proposal: Proposal | None = None
    """The first-ranked member's proposal, as received."""
    is_proposal_valid: bool = False
    merging: set[Digest] = field(default_factory=set)
    merged: dict[Digest, Digest] = field(default_factory=dict)
    """New bases computed here, by merge request."""
    attestations: dict[MemberIndex, Attestation] = field(default_factory=dict)
    is_aggregating: bool = False
    is_certified: bool = False
    failure: str = ""
    """Why this round may become void, for people."""


@dataclass(slots=True)
class EarlyMessages:
    """Messages of the round to come, delivered when it begins."""

    waiting: list[tuple[Envelope, Message]] = field(default_factory=list)

    def add(self, envelope: Envelope, message: Message) -> None:
        """Keep one, if there is room."""
        if len(self.waiting) < EARLY_MAX:
            self.waiting.append((envelope, message))

    def take(self) -> list[tuple[Envelope, Message]]:
        """All that waited; leaves nothing."""
        waiting, self.waiting = self.waiting, []
        return waiting
