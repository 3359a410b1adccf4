"""Where a peer stands in a round: its shard, its seats, what it hears there, whom it asks, and when it must wake.

Knows who is who (the roster, the deal) and what is lacking; decides nothing about words, updates or certificates.
"""

from p2pfm.config import NetworkConfig
from p2pfm.messages import Certificate, Envelope, SyncReply, SyncRequest
from p2pfm.protocol.ballot import Ballot
from p2pfm.protocol.events import AnswerSync, AnyAction, AskSync, Durable, Listen, SyncAsked
from p2pfm.protocol.gossip import REPLY_MAX
from p2pfm.protocol.phases import Phase, Position, Timetable
from p2pfm.protocol.round_state import RoundState
from p2pfm.protocol.shards import TOP, deal, get_committee_topic, get_shard_topic, list_seats
from p2pfm.protocol.standing import Standing
from p2pfm.settlement.ledger import Roster
from p2pfm.types import MemberIndex, Millis, PeerId, Round

LATE_MS = 1_500
"""A certificate that is not here so long after its MERGE began is asked for."""

NO_SHARD = MemberIndex(-1)
"""Where a peer is that is not registered: it only listens."""


class Place(Standing):
    """One participant's rounds, at one level or two."""

    make_ballot: type[Ballot] = Ballot

    def __init__(self, me: PeerId, config: NetworkConfig, durable: Durable) -> None:
        super().__init__(me, config, durable)
        self.timetable = Timetable(config)
        self.leaf = Ballot(self, RoundState(Round(-1), Phase.MERGE, saw_train=False, roster=None))
        """The round among peers: this peer's shard's, or a small network's only one."""
        self.top = self.leaf
        """The round among shards; in a small network the same."""
        self.ballots: tuple[Ballot, ...] = (self.leaf,)
        """The rounds that this peer takes part in now: one, or a shard's and the one above it."""
        self._listens = Listen(())
        self.wanted: Certificate | None = None
        """A certificate whose base is being fetched, or computed from the shards' payloads."""
        self._num_syncs = self.number

    @property
    def state(self) -> RoundState:
        """What this peer has heard in the round among peers."""
        return self.leaf.state

    @property
    def round(self) -> Round:
        """The round this peer is in; -1 before genesis."""
        return self.leaf.state.round

    @property
    def phase(self) -> Phase:
        """The phase this peer is in."""
        return self.leaf.state.phase

    def open_ballots(self, round: Round, *, saw_train: bool) -> list[AnyAction]:
        """Begin a round under the roster known now: alone, or as a member of one of several shards."""
        roster = self.roster
        dealt = deal(self.config, roster, round) if roster else None
        if dealt is None or roster is None:
            self.leaf = self.top = self.make_ballot(self, RoundState(round, Phase.TRAIN, saw_train, roster))
            self.ballots = (self.leaf,)
            return self._listen()
        shard = dealt.shard_of.get(self.me, NO_SHARD)
        members = Roster(roster.epoch, roster.nonce, (), ()) if shard == NO_SHARD else dealt.shards[shard]
        self.leaf = self.make_ballot(self, RoundState(round, Phase.TRAIN, saw_train, members), dealt, shard)
        self.top = self.make_ballot(self, RoundState(round, Phase.TRAIN, saw_train, roster), dealt)
        self.ballots = (self.leaf, self.top)
        return self._listen()

    def _listen(self) -> list[AnyAction]:
        heard: dict[str, tuple[PeerId, ...]] = {}
        shard, dealt, whole = self.leaf.shard, self.top.dealt, self.top.state.roster
        if dealt is not None and shard is not None and shard != NO_SHARD:
            heard[get_shard_topic(shard)] = dealt.seats[shard]
            if not self.leaf.is_outside():
                heard[get_committee_topic(shard)] = dealt.seats[shard]
        if dealt is not None and whole is not None and not self.top.is_outside():
            heard[TOP] = list_seats(whole)
        listens = Listen(tuple(heard), tuple(heard.values()))
        if listens == self._listens:
            return []
        self._listens = listens
        return [listens]

    def skip_idle(self, ballot: Ballot, position: Position) -> Millis:
        """When a ballot's next phase wakes this peer: as it begins; without a part in it only if something comes."""
        is_idle = ballot.is_outside() and (position.phase > Phase.TRAIN or ballot is self.top)
        return self.timetable.get_start(Round(position.round + 1)) if is_idle else position.ends_ms

    def awaits_until(self) -> Millis | None:
        """Till when this peer lacks nothing where it has no seat: till a certificate is late, its shard's and then the
        one above; with both, for the rest of the round. None: it may lack something now.
        """
        leaf, top, head = self.leaf, self.top, self.durable.head
        if self.wanted is not None or self.history.is_behind():
            return None
        head_round = head.proposal.round if head else -1
        if top.is_outside() and head_round == self.round:
            return Millis(self.timetable.get_start(Round(self.round + 1)) + LATE_MS)
        at_work = leaf if leaf.state.certificate is None else top
        if not at_work.is_outside() or (leaf is at_work and head_round != self.round - 1):
            return None
        return Millis(self.timetable.get_start(self.round, Phase.MERGE, at_work.level) + LATE_MS)

    # --- anti-entropy

    def on_sync_asked(self, event: SyncAsked) -> list[AnyAction]:
        """What another peer lacks of this round, and the newest certificate if it is newer than its own."""
        request = event.request
        envelopes: tuple[Envelope, ...] = ()
        if request.round == self.round:
            for ballot in self.ballots:
                envelopes += ballot.tell(event.peer, request.have)
        head = None if self.rewinds_to else self.durable.head
        is_newer = head is not None and head.proposal.round > request.head_round
        return [AnswerSync(event.token, SyncReply(envelopes[:REPLY_MAX], head if is_newer else None))]

    def ask_sync(self) -> list[AnyAction]:
        """Ask one other peer for what is missing here; the next time another one."""
        others = self._get_mates()
        if not others:
            return []
        self._num_syncs += 1
        is_alternating = self.top is not self.leaf and not self.top.is_outside()  # between two lists
        peer = others[(self._num_syncs // 2 if is_alternating else self._num_syncs) % len(others)]
        if peer == self.me:
            return []
        head = self.durable.head
        head_round = head.proposal.round if head else -1
        settled = self.history.settled
        if settled and (self.history.is_orphaned() or self.rewinds_to):
            head_round = settled.round - 1
        if self.wanted:  # its base is under way: that certificate need not be told once more
            head_round = max(head_round, self.wanted.proposal.round)
        have = self.leaf.state.log.digests()
        if self.top is not self.leaf and len(self.top.state.log):
            have = tuple(sorted((*have, *self.top.state.log.digests())))
        return [AskSync(peer, SyncRequest(Round(max(self.round, 0)), have, head_round))]

    def _get_mates(self) -> tuple[PeerId, ...]:
        """Whom to ask for what is missing: neighbours; in a large network for words the committees, which hear them."""
        dealt, whole = self.top.dealt, self.top.state.roster
        if dealt is None or whole is None or self.leaf.shard in (None, NO_SHARD):
            return self.peers
        if not self.top.is_outside() and self._num_syncs % 2 == 0:
            return list_seats(whole)
        if self.history.is_behind() or self.top.state.phase == Phase.MERGE:
            return self.peers  # for a certificate of the whole network: the seated may lack it, too
        return dealt.seats[self.leaf.shard]

    def list_base_holders(self) -> tuple[PeerId, ...]:
        """Connected peers, beginning with another one on each peer; before them its shard's committee, which is many
        and computes the base, where there is one.
        """
        shard, dealt = self.leaf.shard, self.top.dealt
        mates = dealt.seats[shard] if dealt is not None and shard is not None and shard != NO_SHARD else ()
        return _shift(mates, self._num_syncs) + _shift(self.peers, self._num_syncs)


def _shift(peers: tuple[PeerId, ...], number: int) -> tuple[PeerId, ...]:
    start = number % len(peers) if peers else 0
    return peers[start:] + peers[:start]
