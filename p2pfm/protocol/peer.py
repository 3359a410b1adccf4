"""A peer's whole protocol: one pure state machine. It knows no socket, clock, file, model or tensor.

    Peer.handle(event, now_ms) -> list[AnyAction]

Each handler validates, changes state, returns actions, in that order. The same class runs in the node and in the
simulator; a node's event log replays here to the same actions. The work of a round's committee is in `ballot`; what a
peer hears, whom it asks, and when it wakes, in `place`.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject
from p2pfm.messages import (
    NO_DIGEST,
    Announcement,
    Aside,
    Certificate,
    DeclaredPrivacy,
    Envelope,
    Proposal,
    ShardMessage,
    Word,
)
from p2pfm.protocol.ballot import Ballot
from p2pfm.protocol.events import (
    Adopt,
    Aggregated,
    AnyAction,
    AnyEvent,
    Blame,
    Durable,
    Evaluate,
    Evaluated,
    Fetch,
    Fetched,
    FetchFailed,
    Merged,
    Note,
    PeersChanged,
    Persist,
    Publish,
    Received,
    Remembered,
    Rewind,
    Rewound,
    RosterChanged,
    Scored,
    Serve,
    SetTimer,
    Settle,
    SettledChanged,
    Signed,
    SyncAnswered,
    SyncAsked,
    Tick,
    Train,
    Trained,
)
from p2pfm.protocol.membership import compute_ranks, get_member, is_outdated_for
from p2pfm.protocol.phases import PHASES, Phase
from p2pfm.protocol.place import Place
from p2pfm.protocol.round_state import EarlyMessages
from p2pfm.protocol.shards import FOLLOWED_MAX, TOP, get_shard_name, get_shard_topic, list_seats
from p2pfm.types import Digest, MemberIndex, Millis, PeerId, Round

SYNC_MS = 3_000
"""How often a peer asks another for what it lacks: three chances in the shortest usual phase."""

FETCH_RETRY_MS = 1_000
"""How long a payload that nobody gave rests: its announcer's clock may be a little behind."""

LONG_AGO = Millis(-(2**63))
"""Before any moment: what is due since then is looked at with the next event."""

BASE_BYTES_MAX = 1 << 30
"""No adapter's base is larger."""

EARLIER_MAX = 256
"""Updates of earlier rounds remembered, the newest first: what they say is public and is paid no second time. Two
rounds of the largest network (of 10 peers: 25), and 3 seconds of an evaluator's time (bench/gaming.py)."""

SPEAKERS = 2
"""Members of a shard's committee that tell its certificate to the shard and to the committee above: the first ranked
of those that have signed. One may be down by now."""

LOSSES_MAX = 64
"""Held-out losses remembered, for people."""


class Peer(Place):
    """One participant. `handle` is its only door."""

    def __init__(self, me: PeerId, config: NetworkConfig, durable: Durable) -> None:
        super().__init__(me, config, durable)
        self.earlier = _get_certified(durable)
        """After a restart the updates of the head alone: others remember more."""
        self._base_asked: Digest | None = None
        self.losses: dict[Round, int] = {}
        """Held-out loss after each round [nano-nats/token], as evaluated here."""
        self.privacy: dict[PeerId, DeclaredPrivacy | None] = {}
        """What each member's newest announcement declared, for people."""
        self.early = EarlyMessages()
        self._phase_ends_ms = LONG_AGO
        """When a phase ends at some level: what comes then is heard in the next one."""
        self._wakes_ms = LONG_AGO
        """When this peer has something to do in a phase."""
        self._next_sync_ms = Millis(0)
        self._next_retry_ms = Millis(0)
        self._due_ms = LONG_AGO
        """Before this the clock has nothing to ask."""

    def handle(self, event: AnyEvent, now_ms: Millis) -> list[AnyAction]:
        """What to do about `event`: first whatever the clock made due, then the event itself."""
        is_due = now_ms >= self._due_ms
        actions = self._advance(now_ms) if now_ms >= self._phase_ends_ms else []
        actions += HANDLERS[type(event)](self, event)
        if is_due or now_ms >= self._due_ms or type(event) is FetchFailed or type(event) is Tick:
            actions += self._on_housekeeping(now_ms, is_tick=type(event) is Tick)
        return actions

    # --- the clock

    def _advance(self, now_ms: Millis) -> list[AnyAction]:
        """Enter every phase that is due. A clock that jumped back changes nothing: no phase goes backwards."""
        position = self.timetable.locate(now_ms)
        actions: list[AnyAction] = []
        if position.round > self.round:
            actions += self._start_round(position.round, position.phase)
        ends_ms, wakes_ms = [], []
        for ballot in self.ballots:
            if ballot is not self.leaf:
                position = self.timetable.locate(now_ms, ballot.level)
            if position.round == ballot.state.round and position.phase > ballot.state.phase:
                actions += self._enter_phases(ballot, position.phase)
            ends_ms.append(position.ends_ms)
            wakes_ms.append(self.skip_idle(ballot, position))
        self._phase_ends_ms, self._wakes_ms = min(ends_ms), min(wakes_ms)
        return actions

    def _on_housekeeping(self, now_ms: Millis, *, is_tick: bool) -> list[AnyAction]:
        """Ask a neighbour for what is missing, when it is time; set the next timer."""
        actions: list[AnyAction] = []
        self._next_sync_ms = max(self._next_sync_ms, self.awaits_until() or self._next_sync_ms)
        if now_ms >= self._next_sync_ms:
            self._next_sync_ms = Millis(now_ms + SYNC_MS)
            actions += self.ask_sync()
        due_ms = min(self._wakes_ms, self._next_sync_ms)
        if self.leaf.state.updates.resting or self.top.state.updates.resting:
            if now_ms >= self._next_retry_ms:
                actions += self._retry(now_ms)
            due_ms = min(due_ms, self._next_retry_ms)
        if due_ms != self._due_ms or is_tick:
            self._due_ms = due_ms
            actions.append(SetTimer(due_ms))
        return actions

    def _start_round(self, round: Round, phase: Phase) -> list[AnyAction]:
        actions = self._close_round()
        if self.wanted is not None and self.wanted.proposal is self.top.state.proposal:
            actions += self._fetch_base(self.wanted)  # what was to be computed in the round that ends
        actions += self.open_ballots(round, saw_train=phase == Phase.TRAIN)
        members = self.leaf.state.roster.by_peer if self.leaf.state.roster else {}
        self.privacy = {peer: told for peer, told in self.privacy.items() if peer in members}
        self.proofs.keep(members)
        actions.append(Note(round, "round begins" if phase == Phase.TRAIN else f"joins the round in {phase.name}"))
        if phase == Phase.TRAIN:
            actions += self._start_training()
        for envelope, message in self.early.take():
            actions += self._on_received(Received(envelope, message))
        return actions

    def _close_round(self) -> list[AnyAction]:
        state = self.leaf.state
        new = self.leaf.remember()
        known = {item.payload for item in new}
        self.earlier = (*new, *(item for item in self.earlier if item.payload not in known))[:EARLIER_MAX]
        if state.round < 0 or self.top.state.is_certified:
            return []
        failure = self.top.state.failure or state.failure
        return [Note(state.round, f"round is void here: {failure or 'no certificate in time'}")]

    def _enter_phases(self, ballot: Ballot, last: Phase) -> list[AnyAction]:
        """All phases that have begun by now, in their order."""
        state, actions = ballot.state, []
        is_leaf = ballot is self.leaf
        while state.phase < last:
            if ballot.is_outside() and state.proposal is None and (state.phase > Phase.TRAIN or not is_leaf):
                state.phase = last  # in these it does nothing
                break
            phase = PHASES[state.phase + 1]
            if phase == Phase.EXCHANGE and is_leaf:
                actions += self._serve_own()
            if phase == Phase.SCORE and self.wanted is not None:
                state.phase = phase
            else:
                actions += ballot.enter(phase)
        return actions

    def _serve_own(self) -> list[AnyAction]:
        """What was announced is public from now on."""
        mine = self.durable.announced_payload
        if mine is None or self.durable.announced_round != self.round:
            return []
        self.state.updates.hold(mine, self.me)
        return [Serve(mine)]

    def _retry(self, now_ms: Millis) -> list[AnyAction]:
        """Ask again for payloads that nobody gave a while ago."""
        self._next_retry_ms = Millis(now_ms + FETCH_RETRY_MS)
        actions: list[AnyAction] = []
        for ballot in self.ballots:
            ballot.state.updates.resting.clear()
            actions += ballot.fetch_missing()
        return actions

    # --- TRAIN

    def _start_training(self) -> list[AnyAction]:
        """Train once a round from the base held now; a peer that is not registered, or lacks the base, waits."""
        state, durable = self.state, self.durable
        if state.phase != Phase.TRAIN or state.is_training or state.roster is None or self.wanted is not None:
            return []
        if get_member(state.roster, self.me) is None or durable.announced_round >= state.round:
            return []
        if self.history.is_behind() or self.rewinds_to is not None:
            return []
        state.is_training = True
        return [Train(state.round, self.me, durable.base, durable.residual)]

    def _on_trained(self, event: Trained) -> list[AnyAction]:
        state = self.state
        if event.round != state.round or event.base != self.durable.base:
            return [Note(state.round, f"work for round {event.round} came too late or from an old base: dropped")]
        if state.phase != Phase.TRAIN:
            state.failure = "training took longer than TRAIN"
            return [Note(state.round, "training took longer than TRAIN: no announcement; give it fewer steps")]
        if self.durable.announced_round >= state.round:
            return []
        announcement = Announcement(
            state.round, self.me, event.base, event.payload, event.payload_bytes, event.num_tokens, event.privacy
        )
        state.updates.hold(event.payload, self.me)
        durable = self.save(
            announced_round=state.round, announced_payload=event.payload, pending_residual=event.residual
        )
        return [Persist(durable), self.leaf.say(announcement)]

    # --- what the driver has done

    def _on_fetched(self, event: Fetched) -> list[AnyAction]:
        if self.wanted and event.digest == self.wanted.proposal.new_base:
            certificate, self.wanted = self.wanted, None
            return self._adopt(certificate)
        for ballot in self.ballots:
            if event.digest in ballot.state.updates.under_way:
                return ballot.on_fetched(event)
        return []

    def _on_fetch_failed(self, event: FetchFailed) -> list[AnyAction]:
        digest, state = event.digest, self.top.state
        if digest == self._base_asked:
            self._base_asked = None
        if self.wanted and digest == self.wanted.proposal.new_base:
            proposal = self.wanted.proposal
            if self.top.can_follow(proposal) and state.proposal is not proposal:
                return self.top.follow(self.wanted)  # it takes longer, but more have what it takes
            wanted, self.wanted = self.wanted, None
            return [Note(state.round, f"base of round {wanted.proposal.round} could not be fetched: asking again")]
        for ballot in self.ballots:
            if digest in ballot.state.updates.under_way:
                actions = ballot.on_fetch_failed(digest, event.is_malformed)
                if self.wanted and ballot is self.top is not self.leaf:
                    actions += self._fetch_base(self.wanted)  # its payloads are not to be had: the base itself may
                return actions
        return []

    def _on_scored(self, event: Scored) -> list[AnyAction]:
        for ballot in self.ballots:
            if ballot.shard == event.shard and ballot.state.round == event.round:
                return ballot.on_scored(event)
        return []

    def _on_merged(self, event: Merged) -> list[AnyAction]:
        for ballot in self.ballots:
            if event.request in ballot.state.merging:
                actions = ballot.on_merged(event.request, event.new_base)
                if self.wanted and ballot is self.top and event.new_base == self.wanted.proposal.new_base:
                    certificate, self.wanted = self.wanted, None
                    actions += self._adopt(certificate)
                return actions
        return []

    def _on_signed(self, event: Signed) -> list[AnyAction]:
        for ballot in self.ballots:
            if event.round == ballot.state.round and ballot.is_of(event.message):
                return ballot.on_signed(event)
        return []

    def _on_aggregated(self, event: Aggregated) -> list[AnyAction]:
        for ballot in self.ballots:
            certificate = ballot.on_aggregated(event) if ballot.is_of(event.message) else None
            if certificate is None or event.round != ballot.state.round:
                continue
            rank = ballot.get_rank()
            if ballot.shard is not None:
                return self._on_own_shard(ballot.shard, certificate, rank)
            # All who hold the signatures make the same certificate; one voice is enough for those who do not.
            return ([Publish(certificate)] if rank == 0 else []) + self._on_certificate(certificate)
        return []

    def _on_own_shard(self, shard: MemberIndex, certificate: Certificate, rank: int | None) -> list[AnyAction]:
        """This peer's shard is done: tell the committee above."""
        state = self.leaf.state
        state.is_certified, state.certificate = True, certificate
        note = Note(state.round, f"shard {shard} certified {len(certificate.proposal.updates)} updates")
        served = (
            [] if certificate.proposal.new_base == certificate.proposal.base else [Serve(certificate.proposal.new_base)]
        )
        told = self._tell_shard(shard, certificate) if rank is not None else []
        if certificate.proposal.new_base in state.merged.values():
            self.top.state.updates.hold(certificate.proposal.new_base, get_shard_name(shard))
        return [note, *served, *told]

    def _tell_shard(self, shard: MemberIndex, certificate: Certificate) -> list[AnyAction]:
        """A shard's certificate, if this peer is one of those that speak for it."""
        roster, whole = self.leaf.state.roster, self.top.state.roster
        assert roster is not None, "whoever has a shard has its roster"
        assert whole is not None, "and the whole one"
        signers = [index for index in compute_ranks(roster, self.round) if index not in certificate.absent]
        if self.leaf.get_my_index() not in signers[:SPEAKERS]:
            return []
        message = ShardMessage(shard, certificate)
        return [Publish(message, get_shard_topic(shard)), Publish(message, TOP, list_seats(whole))]

    def _on_evaluated(self, event: Evaluated) -> list[AnyAction]:
        self.losses[event.round] = event.loss_nano
        for old in sorted(self.losses)[:-LOSSES_MAX]:
            del self.losses[old]
        return []

    def _on_peers(self, event: PeersChanged) -> list[AnyAction]:
        self.peers = event.peers
        return []

    # --- a certificate of the whole network

    def _on_certificate(self, certificate: Certificate) -> list[AnyAction]:
        """A certificate whose signature the driver has checked: adopt it if it moves this peer forward."""
        proposal, top = certificate.proposal, self.top
        if self._is_dead(proposal) or not self.history.is_progress(proposal):
            return []
        if self.wanted and self.wanted.proposal.round >= proposal.round:
            return []
        if proposal.new_base in (top.state.merged.get(proposal.draft_digest), self.durable.base):
            return self._adopt(certificate)
        self.wanted = certificate
        is_short = len(proposal.updates) <= FOLLOWED_MAX or not self.leaf.is_outside()
        return top.follow(certificate) if is_short and top.can_follow(proposal) else self._fetch_base(certificate)

    def _fetch_base(self, certificate: Certificate) -> list[AnyAction]:
        """Ask for a certified base, once until an answer comes."""
        new_base = certificate.proposal.new_base
        if self._base_asked == new_base:
            return []
        self._base_asked = new_base
        return [Fetch(new_base, "base", BASE_BYTES_MAX, self.list_base_holders())]

    def _adopt(self, certificate: Certificate) -> list[AnyAction]:
        proposal, durable, top = certificate.proposal, self.durable, self.top.state
        self.durable = msgspec.structs.replace(
            durable,
            base=proposal.new_base,
            head=certificate,
            # What was announced has arrived only if it was merged: else the old residual still holds all of it.
            residual=durable.pending_residual if self._is_mine_in(proposal) else durable.residual,
        )
        self.history.extend(proposal)
        self.rewinds_to = self._base_asked = None
        if proposal.round == top.round:
            top.is_certified, top.certificate = True, certificate
            if self.top is not self.leaf:
                self._due_ms = LONG_AGO  # it waits for none now
        self.state.is_training = False
        rank = self._settle_rank(proposal.round)
        return [
            Persist(self.durable),
            Serve(proposal.new_base),
            Adopt(proposal.round, proposal.new_base),
            Note(proposal.round, f"certified: {len(proposal.updates)} updates, base {proposal.new_base.hex()[:10]}"),
            *([Settle(certificate, rank, self.top.list_shards(proposal))] if rank is not None else []),
            Evaluate(proposal.round, proposal.new_base),
            *self._start_training(),
        ]

    def _is_mine_in(self, proposal: Proposal) -> bool:
        """Whether the update that this peer announced is part of what was certified."""
        durable, shard = self.durable, self.leaf.shard
        if durable.announced_round != proposal.round:
            return False
        mine = durable.announced_payload or NO_DIGEST
        if shard is None:
            return proposal.weights.get(mine, 0) > 0
        inner = self.state.certificate
        if inner is None or inner.proposal.round != proposal.round or not proposal.weights.get(inner.proposal.new_base):
            return False
        return inner.proposal.weights.get(mine, 0) > 0

    def _settle_rank(self, round: Round) -> int | None:
        """Who brings the root on chain first: the committee in its ranks, then (in a small network) the others."""
        roster = self.top.state.roster if round == self.top.state.round else self.roster
        if roster is None:
            return 0
        ranks = compute_ranks(roster, round)  # by then the next committee may have been drawn, which knows no shard
        member = get_member(roster, self.me)
        if member is not None and member.index in ranks:
            return ranks.index(member.index)
        if self.top is not self.leaf:
            return None
        return len(roster.members) if member is None else len(ranks) + member.index

    # --- what others say

    def _on_received(self, event: Received) -> list[AnyAction]:
        """Sort a message to its handler; what is old, early or of a stranger is dropped without blame."""
        envelope, message = event.envelope, event.message
        if isinstance(message, Aside):
            return []
        if isinstance(message, Certificate):
            return self._on_certificate(message)
        if not isinstance(message, ShardMessage):
            return self._on_word(self.top, None, envelope, message)
        if isinstance(message.message, Certificate):
            return self._on_shard_certificate(envelope, message.shard, message.message)
        return self._on_word(self.leaf, message.shard, envelope, message.message)

    def _on_word(self, ballot: Ballot, shard: int | None, envelope: Envelope, word: Word) -> list[AnyAction]:
        state, author, kind = ballot.state, envelope.author, type(word)
        if word.round != state.round:
            if word.round == state.round + 1 and self.roster is not None and author in self.roster.by_peer:
                self.early.add(envelope, word if shard is None else ShardMessage(MemberIndex(shard), word))
            return []
        if shard != ballot.shard:
            return []  # another deal is known there
        if ballot.is_outside() and author != self.me:
            return []  # it is not for this peer
        if state.roster is None or author not in state.roster.by_peer:
            return []
        held = state.log.get(kind, author)
        if held:
            if envelope.digest in held:
                return []
            return ballot.on_second_word(author, word, is_second=state.log.add(kind, envelope))
        try:
            is_kept, actions = ballot.on_message(author, word)
        except Reject as error:
            return [Blame(author, str(error))]
        if not is_kept:
            return actions
        state.log.add(kind, envelope)
        if isinstance(word, Announcement):
            self.privacy[author] = word.privacy
        return actions if state.proposal is None else actions + ballot.consider_proposal()

    def _on_shard_certificate(self, envelope: Envelope, shard: int, certificate: Certificate) -> list[AnyAction]:
        """A shard's result: for the committee above, and for its own members that could not make it themselves."""
        top, round = self.top, certificate.proposal.round
        roster = top.state.roster
        if top is self.leaf or round != top.state.round or roster is None or envelope.author not in roster.by_peer:
            return []
        actions = self._on_my_certificate(envelope, certificate) if shard == self.leaf.shard else []
        if envelope.digest in top.state.log.get(Certificate, envelope.author):
            return actions
        if top.is_outside():
            if envelope.author == self.me:
                top.state.log.add(Certificate, envelope)  # for members of the committee that did not hear it
            return actions
        actions += top.on_shard_certificate(shard, certificate)
        top.state.log.add(Certificate, envelope)
        return actions

    def _on_my_certificate(self, envelope: Envelope, certificate: Certificate) -> list[AnyAction]:
        """What this peer's shard certified: kept for members that did not hear it, and a help to those above."""
        leaf, shard, proposal = self.leaf, self.leaf.shard, certificate.proposal
        assert shard is not None, "only a shard has such certificates"
        assert leaf.dealt is not None, "only dealt peers have a shard"
        if envelope.author in leaf.dealt.seats[shard]:
            leaf.state.log.add(Certificate, envelope)
        if leaf.state.certificate is not None:
            return []
        leaf.state.certificate = certificate
        self._due_ms = LONG_AGO  # it waits for another one now
        if not leaf.is_outside():
            return []
        leaf.state.is_certified = True
        note = Note(self.round, f"shard {shard} certified {len(proposal.updates)} updates")
        is_fetched = self.top.is_outside() and proposal.new_base != proposal.base
        return [note, *(self.top.fetch_own_shard(shard, proposal) if is_fetched else [])]

    # --- what the chain says

    def _on_roster(self, event: RosterChanged) -> list[AnyAction]:
        """A round keeps the roster it began with; only the first one is taken at once."""
        self.roster = event.roster
        actions = self._rewind_if_void()
        state = self.state
        if state.roster is not None:
            return actions
        phase = state.phase
        actions += self.open_ballots(state.round, saw_train=state.saw_train)
        for ballot in self.ballots:
            ballot.state.phase = phase if ballot is self.leaf else Phase.TRAIN
        self._phase_ends_ms = self._due_ms = LONG_AGO  # the level above may be further than its beginning
        return actions + self._start_training()

    def _on_settled(self, event: SettledChanged) -> list[AnyAction]:
        settled = self.history.settled = event.settled
        actions = self._rewind_if_void()
        if settled and self.history.is_behind() and self.wanted is None and not actions:
            actions.append(Rewind(settled.round, settled.root))  # perhaps it was held here before a void that was none
        if settled and self.history.is_orphaned():
            text = "the chain took another root of a round held here: asking for its certificate"
            actions.append(Note(settled.round, text))
        return actions

    def _is_dead(self, proposal: Proposal) -> bool:
        """The chain can take it no more, and has not taken it by now."""
        settled = self.history.settled
        is_outdated = self.roster is not None and is_outdated_for(self.roster, proposal)
        return is_outdated and (settled is None or settled.round < proposal.round)

    def _rewind_if_void(self) -> list[AnyAction]:
        """Go back to the chain's newest round when the one held here is void."""
        head, settled, roster = self.durable.head, self.history.settled, self.roster
        if head is None or roster is None or not self._is_dead(head.proposal):
            return []
        if self.rewinds_to == (roster.nonce, settled):
            return []
        self.rewinds_to = (roster.nonce, settled)
        self.wanted = None
        self.history.rewind()
        note = Note(head.proposal.round, "the chain voided this round: going back to the newest that stands")
        return [note, Rewind(settled.round, settled.root) if settled else Rewind(Round(-1), NO_DIGEST)]

    def _on_rewound(self, event: Rewound) -> list[AnyAction]:
        if event.head is not None:
            return self._on_certificate(event.head)
        if self.rewinds_to is None or self.history.settled is not None:
            return []
        self.rewinds_to = None
        self.save(base=event.base, head=None)
        return [Persist(self.durable), Serve(event.base), Adopt(Round(-1), event.base), *self._start_training()]


HANDLERS: dict[type[AnyEvent], Callable[[Peer, Any], list[AnyAction]]] = {
    Tick: lambda peer, event: [],
    RosterChanged: Peer._on_roster,
    SettledChanged: Peer._on_settled,
    Received: Peer._on_received,
    Trained: Peer._on_trained,
    Fetched: Peer._on_fetched,
    FetchFailed: Peer._on_fetch_failed,
    Scored: Peer._on_scored,
    Merged: Peer._on_merged,
    Signed: Peer._on_signed,
    Aggregated: Peer._on_aggregated,
    Evaluated: Peer._on_evaluated,
    SyncAsked: Peer.on_sync_asked,
    SyncAnswered: lambda peer, event: peer._on_certificate(event.head) if event.head else [],
    Rewound: Peer._on_rewound,
    PeersChanged: Peer._on_peers,
}


def _get_certified(durable: Durable) -> tuple[Remembered, ...]:
    """The updates of the newest certified round; first those that are most worth copying."""
    updates = durable.head.proposal.updates if durable.head else ()
    by_worth = sorted(updates, key=lambda update: -update.contribution)
    return tuple(Remembered(update.payload, is_paid=True) for update in by_worth)


def initial_durable(base: Digest) -> Durable:
    """The state of a peer that has never taken part."""
    return Durable(
        base=base,
        residual=None,
        head=None,
        signed_round=-1,
        announced_round=-1,
        pending_residual=None,
        announced_payload=None,
    )
