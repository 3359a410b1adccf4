"""The updates of one round, as one peer knows them: who announced what in time, and which payloads are here.

Knows no committee, clock or store. A payload names its maker in its first bytes (the driver reads it), so that nobody
is paid for announcing another's digest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from p2pfm.errors import Reject
from p2pfm.messages import Announcement
from p2pfm.protocol.events import Blame, Fetch
from p2pfm.protocol.shards import is_shard_name
from p2pfm.types import Digest, PeerId

GetOthers = Callable[[PeerId], tuple[PeerId, ...]]

FETCH_TRIES_MAX = 6
"""How often a payload is asked for before its update counts as absent (a proposed one is asked for to the end)."""


@dataclass(slots=True)
class Updates:
    """One round's announcements and payloads."""

    announcements: dict[PeerId, Announcement] = field(default_factory=dict)
    """Heard here while payloads were secret, in the order in which they came: these are scored."""
    late: dict[tuple[Digest, PeerId], Announcement] = field(default_factory=dict)
    """Heard after TRAIN, or as an author's second update. Not scored here, but needed where most of the committee heard
    it in time, or heard it first."""
    equivocators: set[PeerId] = field(default_factory=set)
    """Announced two updates: neither is scored here."""
    makers: dict[Digest, PeerId] = field(default_factory=dict)
    """Payloads in the blob store, well-formed, with the maker that their bytes name."""
    bad: set[Digest] = field(default_factory=set)
    """Payloads that match their digest and are malformed all the same."""
    tries: dict[Digest, int] = field(default_factory=dict)
    """Payloads asked for, and how often."""
    resting: set[Digest] = field(default_factory=set)
    """Payloads that nobody gave just now: to be asked for again in a while."""
    under_way: set[Digest] = field(default_factory=set)
    """Payloads whose answer is awaited."""
    _first: dict[Digest, Announcement] = field(default_factory=dict)
    """By payload: what was heard of it first."""
    _authors: dict[Digest, set[PeerId]] = field(default_factory=dict)
    """Of payloads that more than one announced: all who did."""

    def add(self, announcement: Announcement, *, is_late: bool) -> None:
        """Remember what an author announced; `is_late`: when payloads were public already."""
        author = announcement.peer
        if is_late or author in self.announcements:
            self.late[(announcement.payload, author)] = announcement
        else:
            self.announcements[author] = announcement
        first = self._first.setdefault(announcement.payload, announcement)
        if first.peer != author:
            self._authors.setdefault(announcement.payload, {first.peer}).add(author)

    def hold(self, digest: Digest, maker: PeerId) -> None:
        """A payload is in the store."""
        self.under_way.discard(digest)
        self.makers[digest] = maker

    def by_payload(self) -> Mapping[Digest, Announcement]:
        """Announcements by payload. Of two with one payload the maker's stands; before it is here, the lower id's."""
        if not self._authors:
            return self._first
        known = sorted([*self.late.values(), *self.announcements.values()], key=lambda a: a.peer, reverse=True)
        found = {announcement.payload: announcement for announcement in known}
        found.update({a.payload: a for a in known if self.makers.get(a.payload) == a.peer})
        return found

    def scorable(self, base: Digest) -> dict[Digest, PeerId]:
        """Payloads to score, with their makers: announced in time, once, by who made them, from this base, and here.

        In the order in which they were announced: of duplicates the first is paid.
        """
        return {
            announcement.payload: peer
            for peer, announcement in self.announcements.items()
            if announcement.base == base
            and peer not in self.equivocators
            and self.makers.get(announcement.payload) == peer
        }

    def fetch_missing(self, proposed: frozenset[Digest], get_others: GetOthers) -> list[Fetch]:
        """Ask for every payload that may be scored or is proposed, and is not here: announcer first, then anyone.

        Args:
            get_others: from an announcement's author to the peers that may hold its payload, too.
        """
        wanted = {
            a.payload
            for peer, a in self.announcements.items()
            if peer not in self.equivocators and self.tries.get(a.payload, 0) < FETCH_TRIES_MAX
        }
        missing = (wanted | proposed) - self.makers.keys() - self.bad - self.under_way - self.resting
        if not missing:
            return []
        announced = self.by_payload()
        fetches = []
        for digest in sorted(missing & announced.keys()):
            self.tries[digest] = self.tries.get(digest, 0) + 1
            self.under_way.add(digest)
            fetches.append(_fetch(announced[digest], get_others))
        return fetches

    def on_fetched(self, digest: Digest, maker: PeerId | None) -> list[Blame]:
        """A payload that was asked for is here; whoever announced it without having made it is blamed.

        Raises:
            Reject: nobody who announced it made it (a copy of a copy).
        """
        self.under_way.discard(digest)
        if maker is None:
            self.bad.add(digest)
            raise Reject("announced what is no payload")
        self.makers[digest] = maker  # its maker's own announcement may be yet to come
        first = self._first[digest].peer
        if maker == first and not self._authors:
            return []
        authors = self._authors.get(digest, {first})
        if maker not in authors:
            raise Reject("announced a payload that another peer made")
        return [Blame(peer, "announced a payload that another peer made") for peer in sorted(authors - {maker})]

    def on_failed(self, digest: Digest, *, is_malformed: bool) -> PeerId:
        """Nobody gave the payload now, or it is malformed; returns who announced it."""
        self.under_way.discard(digest)
        (self.bad if is_malformed else self.resting).add(digest)
        return self.by_payload()[digest].peer


def _fetch(announcement: Announcement, get_others: GetOthers) -> Fetch:
    author, others = announcement.peer, get_others(announcement.peer)
    if is_shard_name(author):
        return Fetch(announcement.payload, "payload", announcement.payload_bytes, others)
    # Start at another holder for each payload, so that no single node serves all of them.
    shift = announcement.payload[0] % len(others) if others else 0
    providers = others[shift:] + others[:shift]
    if author in others:
        providers = tuple(peer for peer in providers if peer != author)
    return Fetch(announcement.payload, "payload", announcement.payload_bytes, (author, *providers))
