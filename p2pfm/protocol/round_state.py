"""What a peer knows of the current round at one level: forgotten when it ends, rebuilt from gossip when it was away."""

from dataclasses import dataclass, field

from p2pfm.messages import Attestation, Certificate, Envelope, Message, Proposal, ScoreReveal, ShardMessage
from p2pfm.protocol.gossip import RoundLog
from p2pfm.protocol.phases import Phase
from p2pfm.protocol.updates import Updates
from p2pfm.settlement.ledger import Roster
from p2pfm.types import Digest, MemberIndex, PeerId, Round

EARLY_MAX = 1024
"""Messages of the next round kept for senders whose clocks are ahead: one of each kind a registered peer is at most
five a peer, and honest ones are ahead by little more than an announcement."""


@dataclass(slots=True)
class RoundState:
    """One round, from its first moment to the next round's."""

    round: Round
    phase: Phase
    saw_train: bool
    """This peer was here when payloads were still secret, so it can tell who announced in time."""
    roster: Roster | None
    log: RoundLog = field(default_factory=RoundLog)
    updates: Updates = field(default_factory=Updates)
    is_training: bool = False
    scored: tuple[Digest, ...] = ()
    """Payloads whose contributions were asked for, in that order."""
    my_reveal: ScoreReveal | None = None
    commitments: dict[MemberIndex, tuple[Digest, ...]] = field(default_factory=dict)
    late_commitments: dict[MemberIndex, tuple[Digest, ...]] = field(default_factory=dict)
    """Heard here after SCORE: good enough only beside a majority of punctual ones in another's proposal."""
    reveals: dict[MemberIndex, ScoreReveal] = field(default_factory=dict)
    draft: Proposal | None = None
    """This peer's own proposal, while its new base is being computed."""
    proposal: Proposal | None = None
    """The first-ranked member's proposal, as received."""
    rival: Proposal | None = None
    """Another proposal of the same member: whoever signs both lies."""
    is_proposal_valid: bool = False
    merging: set[Digest] = field(default_factory=set)
    merged: dict[Digest, Digest] = field(default_factory=dict)
    """New bases computed here, by merge request."""
    attestations: dict[MemberIndex, Attestation] = field(default_factory=dict)
    second_attestations: dict[MemberIndex, Attestation] = field(default_factory=dict)
    """Another one of a member that had spoken."""
    accused: set[MemberIndex] = field(default_factory=set)
    is_aggregating: bool = False
    is_certified: bool = False
    certificate: Certificate | None = None
    """A shard's own: its members' way to the certificate above."""
    failure: str = ""
    """Why this round may become void, for people."""


@dataclass(slots=True)
class EarlyMessages:
    """Messages of the round to come, delivered when it begins."""

    waiting: dict[tuple[str, PeerId], tuple[Envelope, Message]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, envelope: Envelope, message: Message) -> None:
        """Keep the first of its kind and author, if there is room."""
        if len(self.waiting) < EARLY_MAX:
            inner = message.message if isinstance(message, ShardMessage) else message
            self.waiting.setdefault((type(inner).__name__, envelope.author), (envelope, message))

    def take(self) -> list[tuple[Envelope, Message]]:
        """All that waited; leaves nothing."""
        waiting, self.waiting = self.waiting, {}
        return list(waiting.values())
