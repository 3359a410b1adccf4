"""The messages of the current round that a peer holds, and what it tells another that lacks some.

Knows nothing of what messages mean: one slot a kind and author, so its size is bounded by the roster.
"""

from p2pfm.messages import Envelope, Message
from p2pfm.types import Digest, PeerId, compute_digest

REPLY_MAX = 512
"""Envelopes in one anti-entropy answer: the rest follows at the next asking."""


class RoundLog:
    """One slot for each (kind, author): a second, different message in a slot is equivocation."""

    def __init__(self) -> None:
        self._slots: dict[tuple[str, PeerId], tuple[Digest, Envelope]] = {}

    def get(self, kind: type[Message], author: PeerId) -> Digest | None:
        """The digest of what an author said of this kind."""
        slot = self._slots.get((kind.__name__, author))
        return slot[0] if slot else None

    def add(self, kind: type[Message], envelope: Envelope) -> None:
        """Keep a message that the protocol accepted."""
        self._slots.setdefault((kind.__name__, envelope.author), (compute_digest(envelope.body), envelope))

    def digests(self) -> tuple[Digest, ...]:
        """What is held, sorted."""
        return tuple(sorted(digest for digest, _ in self._slots.values()))

    def missing(self, have: tuple[Digest, ...]) -> tuple[Envelope, ...]:
        """What another peer lacks, in a fixed order, at most REPLY_MAX."""
        known = set(have)
        lacking = sorted(
            ((digest, envelope) for digest, envelope in self._slots.values() if digest not in known),
            key=lambda pair: pair[0],
        )
        return tuple(envelope for _, envelope in lacking[:REPLY_MAX])
