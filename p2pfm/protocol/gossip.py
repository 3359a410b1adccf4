"""The messages of the current round that a peer holds, and what it tells another that lacks some.

Knows nothing of what messages mean: two places a kind and author, so its size is bounded by the roster.
"""

from p2pfm.messages import Envelope, Message
from p2pfm.types import Digest, PeerId

REPLY_MAX = 512
"""Envelopes in one anti-entropy answer: the rest follows at the next asking."""

SLOTS_MAX = 2
"""Different messages kept of one kind and author: an honest author has one; a second one proves that it is not, and
those who heard the second first need not remain alone with it."""


class RoundLog:
    """A slot for each (kind, author): a second, different message in a slot is equivocation."""

    def __init__(self) -> None:
        self._first: dict[type[Message], dict[PeerId, Digest]] = {}
        self._second: dict[tuple[type[Message], PeerId], Digest] = {}
        self._envelopes: dict[Digest, Envelope] = {}
        self._sorted: tuple[Digest, ...] | None = ()

    def __len__(self) -> int:
        return len(self._envelopes)

    def get(self, kind: type[Message], author: PeerId) -> tuple[Digest, ...]:
        """Digests of what an author said of this kind, the first first."""
        said = self._first.get(kind)
        first = said.get(author) if said else None
        if first is None:
            return ()
        second = self._second.get((kind, author)) if self._second else None
        return (first,) if second is None else (first, second)

    def add(self, kind: type[Message], envelope: Envelope) -> bool:
        """Keep a message; False: the author's slot for this kind is full."""
        author, digest = envelope.author, envelope.digest
        said = self._first.get(kind)
        if said is None:
            said = self._first[kind] = {}
        if author not in said:
            said[author] = digest
        elif (kind, author) not in self._second:
            self._second[(kind, author)] = digest
        else:
            return False
        self._envelopes[digest] = envelope
        self._sorted = None
        return True

    def digests(self) -> tuple[Digest, ...]:
        """What is held, sorted."""
        if self._sorted is None:
            self._sorted = tuple(sorted(self._envelopes))
        return self._sorted

    def missing(self, have: tuple[Digest, ...], kind: type[Message] | None = None) -> tuple[Envelope, ...]:
        """What another peer lacks (of one kind), in a fixed order, at most REPLY_MAX."""
        if have == self.digests():
            return ()
        held = self._envelopes.keys() if kind is None else frozenset(self._first.get(kind, {}).values())
        lacking = sorted(held - frozenset(have))
        return tuple(self._envelopes[digest] for digest in lacking[:REPLY_MAX])
