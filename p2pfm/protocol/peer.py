"""A peer's whole protocol: one pure state machine. It knows no socket, clock, file, model or tensor.

    Peer.handle(event, now_ms) -> list[AnyAction]

Each handler validates, changes state, returns actions, in that order. The same class runs in the node and in the
simulator; a node's event log replays here to the same actions.
"""

import msgspec

from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject
from p2pfm.messages import (
    Announcement,
    Attestation,
    Certificate,
    DeclaredPrivacy,
    Envelope,
    Message,
    Presence,
    Proposal,
    Score,
    ScoreCommit,
    ScoreReveal,
    SyncReply,
    SyncRequest,
    compute_commitment,
)
from p2pfm.protocol.committee import (
    NO_DIGEST,
    draft_digest,
    draft_proposal,
    merge_request,
    validate_proposal,
    validate_reveals,
    validate_scores,
)
from p2pfm.protocol.events import (
    Accuse,
    Adopt,
    Aggregate,
    Aggregated,
    AnswerSync,
    AnyAction,
    AnyEvent,
    AskSync,
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
    ScoreUpdates,
    Serve,
    SetTimer,
    Settle,
    SettledChanged,
    Sign,
    Signed,
    SyncAnswered,
    SyncAsked,
    Tick,
    Train,
    Trained,
    Weighted,
)
from p2pfm.protocol.history import History
from p2pfm.protocol.membership import compute_ranks, compute_shares, get_member, get_peer, is_outdated_for
from p2pfm.protocol.phases import Phase, compute_position
from p2pfm.protocol.proofs import Proofs
from p2pfm.protocol.round_state import EarlyMessages, RoundState
from p2pfm.protocol.updates import FETCH_TRIES_MAX
from p2pfm.settlement.ledger import Roster, SettledRound
from p2pfm.settlement.rewards import proposal_message
from p2pfm.settlement.sampling import compute_quorum
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, compute_digest

SYNC_MS = 3_000
"""How often a peer asks another for what it lacks: three chances in the shortest usual phase."""

FETCH_RETRY_MS = 1_000
"""How long a payload that nobody gave rests: its announcer's clock may be a little behind."""

BASE_BYTES_MAX = 1 << 30
"""No adapter's base is larger."""

EARLIER_MAX = 256
"""Updates of earlier rounds remembered, the newest first: what they say is public and is paid no second time. Two
rounds of the largest network (of 10 peers: 25), and 3 seconds of an evaluator's time (bench/gaming.py)."""

LOSSES_MAX = 64
"""Held-out losses remembered, for people."""


class Peer:
    """One participant. `handle` is its only door."""

    def __init__(self, me: PeerId, config: NetworkConfig, durable: Durable) -> None:
        self.me = me
        self.config = config
        self.durable = durable
        self.roster: Roster | None = None
        self.peers: tuple[PeerId, ...] = ()
        self.state = RoundState(Round(-1), Phase.MERGE, saw_train=False, roster=None)
        self.wanted: Certificate | None = None
        """A certificate whose base is being fetched."""
        self.history = History(durable.head.proposal if durable.head else None)
        self.losses: dict[Round, int] = {}
        """Held-out loss after each round [nano-nats/token], as evaluated here."""
        self.privacy: dict[PeerId, DeclaredPrivacy | None] = {}
        """What each member's newest announcement declared, for people."""
        self.earlier: tuple[Remembered, ...] = self._get_certified()
        """The newest first. After a restart those of the head alone: others remember more."""
        self.proofs = Proofs()
        self.early = EarlyMessages()
        self._rewinds_to: tuple[int, SettledRound | None] | None = None
        """The restart nonce and the round that this peer goes back to, while it does; no work is done meanwhile."""
        self._next_sync_ms = Millis(0)
        self._next_retry_ms = Millis(0)
        # Everybody begins with another neighbour, so that no single one is asked by all at once.
        self._num_syncs = int.from_bytes(compute_digest(me.encode())[:4], "big")

    @property
    def round(self) -> Round:
        """The round this peer is in; -1 before genesis."""
        return self.state.round

    @property
    def phase(self) -> Phase:
        """The phase this peer is in."""
        return self.state.phase

    def handle(self, event: AnyEvent, now_ms: Millis) -> list[AnyAction]:
        """What to do about `event`: first whatever the clock made due, then the event itself."""
        actions = self._advance(now_ms)
        match event:
            case Tick():
                pass
            case RosterChanged(roster=roster):
                actions += self._on_roster(roster)
            case SettledChanged(settled=settled):
                actions += self._on_settled(settled)
            case Received(envelope=envelope, message=message):
                actions += self._on_received(envelope, message)
            case Trained():
                actions += self._on_trained(event)
            case Fetched():
                actions += self._on_fetched(event)
            case FetchFailed(digest=digest, is_malformed=is_malformed):
                actions += self._on_fetch_failed(digest, is_malformed)
            case Scored():
                actions += self._on_scored(event)
            case Merged(request=request, new_base=new_base):
                actions += self._on_merged(request, new_base)
            case Signed():
                actions += self._on_signed(event)
            case Aggregated():
                actions += self._on_aggregated(event)
            case Evaluated(round=round, loss_nano=loss_nano):
                self.losses[round] = loss_nano
                for old in sorted(self.losses)[:-LOSSES_MAX]:
                    del self.losses[old]
            case SyncAsked(request=request, token=token):
                actions += self._on_sync_asked(request, token)
            case SyncAnswered(head=head):
                actions += self._on_certificate(head) if head else []
            case Rewound(head=head, base=base):
                actions += self._on_rewound(head, base)
            case PeersChanged(peers=peers):
                self.peers = peers
        return [*actions, *self._on_housekeeping(now_ms)]

    # --- the clock

    def _advance(self, now_ms: Millis) -> list[AnyAction]:
        """Enter every phase that is due. A clock that jumped back changes nothing: no phase goes backwards."""
        position = compute_position(self.config, now_ms)
        actions: list[AnyAction] = []
        if position.round > self.state.round:
            actions += self._start_round(position.round, position.phase)
        while position.round == self.state.round and position.phase > self.state.phase:
            self.state.phase = Phase(self.state.phase + 1)
            actions += self._enter_phase()
        return actions

    def _start_round(self, round: Round, phase: Phase) -> list[AnyAction]:
        actions = self._close_round()
        self.state = RoundState(round, Phase.TRAIN, saw_train=phase == Phase.TRAIN, roster=self.roster)
        members = {member.peer for member in self.roster.members} if self.roster else set()
        self.privacy = {peer: told for peer, told in self.privacy.items() if peer in members}
        self.proofs.keep(members)
        actions.append(Note(round, "round begins" if phase == Phase.TRAIN else f"joins the round in {phase.name}"))
        if phase == Phase.TRAIN:
            actions += self._start_training()
        for envelope, message in self.early.take():
            actions += self._on_received(envelope, message)
        return actions

    def _close_round(self) -> list[AnyAction]:
        state = self.state
        # All payloads of a round are public now, also of one that was void and paid nobody.
        paid = self._get_certified() if state.is_certified else ()
        unpaid = sorted(state.updates.makers.keys() - {item.payload for item in paid})
        new = (*paid, *(Remembered(payload, is_paid=False) for payload in unpaid))
        known = {item.payload for item in new}
        self.earlier = (*new, *(item for item in self.earlier if item.payload not in known))[:EARLIER_MAX]
        if state.round < 0 or state.is_certified:
            return []
        return [Note(state.round, f"round is void here: {state.failure or 'no certificate in time'}")]

    def _get_certified(self) -> tuple[Remembered, ...]:
        """The updates of the newest certified round; first those that are most worth copying."""
        head = self.durable.head
        updates = sorted(head.proposal.updates, key=lambda update: -update.contribution) if head else ()
        return tuple(Remembered(update.payload, is_paid=True) for update in updates)

    def _enter_phase(self) -> list[AnyAction]:
        match self.state.phase:
            case Phase.TRAIN:
                return []
            case Phase.EXCHANGE:
                return self._enter_exchange()
            case Phase.SCORE:
                return self._enter_score()
            case Phase.REVEAL:
                return [Publish(self.state.my_reveal)] if self.state.my_reveal else []
            case Phase.ATTEST:
                # A proposer whose clock is ahead of ours may have spoken already.
                return self._propose() + self._consider_proposal()
            case Phase.MERGE:
                return self._aggregate()

    def _on_housekeeping(self, now_ms: Millis) -> list[AnyAction]:
        """Ask a neighbour for what is missing, when it is time; set the next timer."""
        actions: list[AnyAction] = []
        if now_ms >= self._next_sync_ms:
            self._next_sync_ms = Millis(now_ms + SYNC_MS)
            actions += self._ask_sync()
        resting = self.state.updates.resting
        if resting and now_ms >= self._next_retry_ms:
            self._next_retry_ms = Millis(now_ms + FETCH_RETRY_MS)
            resting.clear()
            actions += self._fetch_missing()
        due_ms = [compute_position(self.config, now_ms).ends_ms, self._next_sync_ms]
        if resting:
            due_ms.append(self._next_retry_ms)
        return [*actions, SetTimer(min(due_ms))]

    # --- TRAIN

    def _start_training(self) -> list[AnyAction]:
        """Train once a round from the base held now; a peer that is not registered, or lacks the base, waits."""
        state, durable = self.state, self.durable
        if state.phase != Phase.TRAIN or state.is_training or state.roster is None or self.wanted is not None:
            return []
        if get_member(state.roster, self.me) is None or durable.announced_round >= state.round:
            return []
        if self.history.is_behind() or self._rewinds_to is not None:
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
        self.durable = msgspec.structs.replace(
            self.durable,
            announced_round=state.round,
            announced_payload=event.payload,
            pending_residual=event.residual,
        )
        return [Persist(self.durable), Publish(announcement)]

    # --- EXCHANGE

    def _enter_exchange(self) -> list[AnyAction]:
        mine = self.durable.announced_payload
        own: list[AnyAction] = []
        if mine is not None and self.durable.announced_round == self.state.round:
            self.state.updates.hold(mine, self.me)
            own = [Serve(mine)]
        return own + self._fetch_missing()

    def _fetch_missing(self) -> list[AnyAction]:
        """Ask for every payload that is wanted here, once TRAIN is over: before, nobody gives one."""
        state = self.state
        if state.phase == Phase.TRAIN or state.round < 0 or state.is_certified:
            return []
        proposed = self._proposed() if state.is_proposal_valid else frozenset()
        return [*state.updates.fetch_missing(proposed, self.peers)]

    def _proposed(self) -> frozenset[Digest]:
        """Payloads that the received proposal includes, be it right or wrong."""
        proposal = self.state.proposal
        return frozenset(update.payload for update in proposal.updates) if proposal else frozenset()

    def _on_fetched(self, event: Fetched) -> list[AnyAction]:
        if self.wanted and event.digest == self.wanted.proposal.new_base:
            certificate, self.wanted = self.wanted, None
            return self._adopt(certificate)
        updates = self.state.updates
        if event.digest not in updates.under_way:
            return []
        author = updates.by_payload()[event.digest].peer
        try:
            blames = updates.on_fetched(event.digest, event.maker)
        except Reject as error:
            return [Blame(author, str(error))]
        return [*blames, Serve(event.digest), *self._consider_proposal()]

    def _on_fetch_failed(self, digest: Digest, is_malformed: bool) -> list[AnyAction]:
        state = self.state
        if self.wanted and digest == self.wanted.proposal.new_base:
            wanted, self.wanted = self.wanted, None
            return [Note(state.round, f"base of round {wanted.proposal.round} could not be fetched: asking again")]
        if digest not in state.updates.under_way:
            return []
        author = state.updates.on_failed(digest, is_malformed=is_malformed)
        if is_malformed:
            return [Blame(author, "announced a payload that does not decode")]
        if state.updates.tries[digest] != FETCH_TRIES_MAX:
            return []
        return [Note(state.round, f"payload of {author[-6:]} is not to be had: it counts as absent")]

    # --- SCORE and REVEAL

    def _my_index(self) -> MemberIndex | None:
        """This peer's registry index, if it sits on the round's committee."""
        roster = self.state.roster
        member = get_member(roster, self.me) if roster else None
        return member.index if roster and member and member.index in roster.committee else None

    def _enter_score(self) -> list[AnyAction]:
        state = self.state
        if self._my_index() is None or state.roster is None or self.wanted is not None:
            return []
        shares = compute_shares(state.roster, self.config.stake_cap())
        makers = state.updates.scorable(self.durable.base)
        if not makers:
            state.failure = "no update to score"
            return [Note(state.round, "no update to score")]
        state.scored = tuple(makers)
        updates = tuple(Weighted(digest, shares[makers[digest]]) for digest in state.scored)
        previous = self.durable.head.proposal.base if self.durable.head else None
        return [ScoreUpdates(state.round, self.durable.base, previous, updates, self.earlier)]

    def _on_scored(self, event: Scored) -> list[AnyAction]:
        state, index = self.state, self._my_index()
        if event.round != state.round or index is None or state.my_reveal is not None:
            return []
        if state.phase != Phase.SCORE:
            state.failure = "scoring took longer than SCORE"
            return [Note(state.round, "scoring took longer than SCORE: no vector from here")]
        assert len(event.contributions) == len(state.scored), "a driver answers what was asked"
        makers = [state.updates.makers[payload] for payload in state.scored]
        if event.proofs:
            for maker, is_passed in zip(makers, event.proofs, strict=True):
                self.proofs.add(maker, is_passed)
        scores = [
            Score(payload, contribution if self.proofs.is_trusted(maker) else Contribution(min(0, contribution)))
            for payload, maker, contribution in zip(state.scored, makers, event.contributions, strict=True)
        ]
        state.my_reveal = ScoreReveal(
            state.round, index, event.salt, tuple(sorted(scores, key=lambda score: score.payload))
        )
        return [Publish(ScoreCommit(state.round, index, compute_commitment(state.my_reveal)))]

    # --- ATTEST

    def _draft(self, reveals: tuple[ScoreReveal, ...]) -> Proposal:
        state, head = self.state, self.durable.head
        assert state.roster is not None, "only a peer with a roster drafts"
        if self.history.is_orphaned() or self.history.is_behind():
            raise Reject("the chain holds a round whose certificate is not here yet")
        if self.roster is None or self.roster.nonce != state.roster.nonce or self._rewinds_to is not None:
            raise Reject("the chain has restarted since this round began: what is signed in it is worth nothing")
        validate_reveals(state.roster, reveals, state.round, state.commitments, state.late_commitments)
        previous = head.proposal if head else None
        announced = state.updates.by_payload()
        return draft_proposal(self.config, state.roster, previous, state.round, self.durable.base, reveals, announced)

    def _propose(self) -> list[AnyAction]:
        state, index = self.state, self._my_index()
        if index is None or state.roster is None or compute_ranks(state.roster, state.round)[0] != index:
            return []
        try:
            state.draft = self._draft(tuple(state.reveals[member] for member in sorted(state.reveals)))
        except Reject as error:
            state.failure = f"nothing to propose: {error}"
            return [Note(state.round, state.failure)]
        return self._merge(state.draft)

    def _merge(self, proposal: Proposal) -> list[AnyAction]:
        """Compute a proposal's base, unless that is under way, done, or not possible yet."""
        state = self.state
        request = draft_digest(proposal)
        if request in state.merged:
            return self._on_merged(request, state.merged[request])
        merge = merge_request(proposal)
        if merge is None:
            return self._on_merged(request, proposal.base)
        if request in state.merging or any(update.payload not in state.updates.makers for update in merge.updates):
            return []
        state.merging.add(request)
        return [msgspec.structs.replace(merge, request=request)]

    def _on_merged(self, request: Digest, new_base: Digest) -> list[AnyAction]:
        state = self.state
        state.merged[request] = new_base
        actions: list[AnyAction] = []
        if state.draft is not None and draft_digest(state.draft) == request and state.proposal is None:
            proposal = msgspec.structs.replace(state.draft, new_base=new_base)
            state.draft = None
            actions.append(Publish(proposal))
        if state.proposal is not None and draft_digest(state.proposal) == request:
            actions += self._attest(new_base)
        return actions

    def _consider_proposal(self) -> list[AnyAction]:
        """Recompute the received proposal; once it is proven right, merge; once merged, sign."""
        state = self.state
        if state.proposal is None or state.roster is None or state.is_certified:
            return []
        if not state.is_proposal_valid:
            try:
                validate_proposal(state.proposal, self._draft(state.proposal.reveals))
            except Reject as error:
                # Perhaps a commitment or an announcement has not come yet: the next message or sync tries again.
                state.failure = f"the proposal does not hold here: {error}"
                return []
            state.is_proposal_valid = True
        actions = self._fetch_missing() + self._merge(state.proposal)
        return actions + (self._aggregate() if state.phase == Phase.MERGE else [])

    def _attest(self, new_base: Digest) -> list[AnyAction]:
        state, index = self.state, self._my_index()
        assert state.proposal is not None, "called for a received proposal"
        if new_base != state.proposal.new_base:
            state.failure = "the proposed base is not the merge of the proposed updates"
            proposer = get_peer(state.roster, state.proposal.proposer) if state.roster else None
            return [Blame(proposer, state.failure)] if proposer else []
        if index is None or state.phase != Phase.ATTEST or self.durable.signed_round >= state.round:
            return []
        self.durable = msgspec.structs.replace(self.durable, signed_round=state.round)
        message = proposal_message(self.config.chain, state.proposal)
        return [Persist(self.durable), Sign(state.round, message)]

    def _on_signed(self, event: Signed) -> list[AnyAction]:
        index = self._my_index()
        if event.round != self.state.round or index is None:
            return []
        return [Publish(Attestation(event.round, index, event.message, event.signature))]

    # --- MERGE

    def _aggregate(self) -> list[AnyAction]:
        """When ATTEST is over, make the certificate from what more than two thirds signed."""
        state = self.state
        if state.proposal is None:
            state.failure = state.failure or "the first-ranked member proposed nothing that was heard here"
            return []
        if not state.is_proposal_valid or state.roster is None:
            return []
        if state.is_aggregating or state.is_certified:
            return []
        message = proposal_message(self.config.chain, state.proposal)
        signed = {i: a for i, a in state.attestations.items() if a.message == message}
        needed = compute_quorum(len(state.roster.committee))
        if len(signed) < needed:
            state.failure = f"{len(signed)} of {len(state.roster.committee)} signed, {needed} needed"
            return []
        state.is_aggregating = True
        absent = tuple(sorted(index for index in state.roster.committee if index not in signed))
        return [Aggregate(state.round, message, tuple(signed[index] for index in sorted(signed)), absent)]

    def _on_aggregated(self, event: Aggregated) -> list[AnyAction]:
        state = self.state
        if event.round != state.round or state.proposal is None or state.roster is None or state.is_certified:
            return []
        certificate = Certificate(state.proposal, event.absent, event.signature)
        # All who hold the signatures make the same certificate; one voice is enough for those who do not.
        is_first = self._my_index() == compute_ranks(state.roster, state.round)[0]
        return ([Publish(certificate)] if is_first else []) + self._on_certificate(certificate)

    def _on_certificate(self, certificate: Certificate) -> list[AnyAction]:
        """A certificate whose signature the driver has checked: adopt it if it moves this peer forward."""
        proposal = certificate.proposal
        if self._is_dead(proposal) or not self.history.is_progress(proposal):
            return []
        if self.wanted and self.wanted.proposal.round >= proposal.round:
            return []
        merged = self.state.merged.get(draft_digest(proposal))
        if merged == proposal.new_base or proposal.new_base == self.durable.base:
            return self._adopt(certificate)
        self.wanted = certificate
        return [Fetch(proposal.new_base, "base", BASE_BYTES_MAX, self._shifted_peers())]

    def _adopt(self, certificate: Certificate) -> list[AnyAction]:
        proposal, durable, state = certificate.proposal, self.durable, self.state
        is_mine_merged = durable.announced_round == proposal.round and any(
            update.payload == durable.announced_payload and update.weight > 0 for update in proposal.updates
        )
        self.durable = msgspec.structs.replace(
            durable,
            base=proposal.new_base,
            head=certificate,
            # What was announced has arrived only if it was merged: else the old residual still holds all of it.
            residual=durable.pending_residual if is_mine_merged else durable.residual,
        )
        self.history.extend(proposal)
        self._rewinds_to = None
        if proposal.round == state.round:
            state.is_certified = True
        state.is_training = False
        return [
            Persist(self.durable),
            Serve(proposal.new_base),
            Adopt(proposal.round, proposal.new_base),
            Note(proposal.round, f"certified: {len(proposal.updates)} updates, base {proposal.new_base.hex()[:10]}"),
            Settle(certificate, self._settle_rank(proposal.round)),
            Evaluate(proposal.round, proposal.new_base),
            *self._start_training(),
        ]

    def _settle_rank(self, round: Round) -> int:
        """Who brings the root on chain first: the committee in its ranks, then the others."""
        if self.roster is None:
            return 0
        ranks = compute_ranks(self.roster, round)
        member = get_member(self.roster, self.me)
        if member is None:
            return len(self.roster.members)
        return ranks.index(member.index) if member.index in ranks else len(ranks) + member.index

    # --- what others say

    def _on_received(self, envelope: Envelope, message: Message) -> list[AnyAction]:
        """Sort a message to its handler; what is old, early or of a stranger is dropped without blame."""
        if isinstance(message, Presence):
            return []
        if isinstance(message, Certificate):
            return self._on_certificate(message)
        state = self.state
        if message.round == state.round + 1:
            if self.roster is not None and get_member(self.roster, envelope.author) is not None:
                self.early.add(envelope, message)
            return []
        if message.round != state.round or state.roster is None or get_member(state.roster, envelope.author) is None:
            return []
        held = state.log.get(type(message), envelope.author)
        if compute_digest(envelope.body) in held:
            return []
        if held:
            return self._on_equivocation(envelope, message)
        try:
            is_kept, actions = self._on_message(envelope.author, message)
        except Reject as error:
            return [Blame(envelope.author, str(error))]
        if is_kept:
            state.log.add(type(message), envelope)
        return actions + (self._consider_proposal() if is_kept else [])

    def _on_equivocation(self, envelope: Envelope, message: Message) -> list[AnyAction]:
        """Another word of an author who has spoken: the first stands, and the author is blamed.

        But others may have heard the second first. An update or a commitment is kept beside the first (else whoever
        splits the committee so could void every round), a third one only if the proposal is about it.
        """
        state, author = self.state, envelope.author
        is_second = state.log.add(type(message), envelope)
        kind = type(message).__name__
        actions: list[AnyAction] = [Blame(author, f"said two different things: {kind} of round {state.round}")]
        if isinstance(message, Announcement):
            state.updates.equivocators.add(author)
            is_needed = message.payload in self._proposed()
        elif isinstance(message, ScoreCommit):
            reveals = state.proposal.reveals if state.proposal else ()
            is_needed = any(compute_commitment(reveal) == message.commitment for reveal in reveals)
        else:
            return [*actions, *self._on_second_word(author, message)] if is_second else []
        if not is_second and not is_needed:
            return []
        try:
            _, more = self._on_message(author, message)
        except Reject as error:
            return [Blame(author, str(error))]
        return (actions if is_second else []) + more + self._consider_proposal()

    def _on_second_word(self, author: PeerId, message: Message) -> list[AnyAction]:
        """A second proposal or attestation changes nothing here, but it is half of what the chain slashes for."""
        state = self.state
        if isinstance(message, Proposal) and state.proposal and state.proposal.proposer == message.proposer:
            state.rival = message
        elif isinstance(message, Attestation) and state.roster and get_peer(state.roster, message.member) == author:
            state.second_attestations[message.member] = message
        return self._accuse()

    def _accuse(self) -> list[AnyAction]:
        """Everybody of whom two signatures are held here, of two proposals that are held here too."""
        state = self.state
        if state.proposal is None or state.rival is None:
            return []
        proposals = {proposal_message(self.config.chain, told): told for told in (state.proposal, state.rival)}
        accusations = []
        for member, second in sorted(state.second_attestations.items()):
            first = state.attestations.get(member)
            if first is None or member in state.accused or first.message == second.message:
                continue
            if {first.message, second.message} <= proposals.keys():
                state.accused.add(member)
                signed = [(proposals[word.message], word.signature) for word in (first, second)]
                accusations.append(Accuse(member, *signed[0], *signed[1]))
        return [*accusations]

    def _on_message(self, author: PeerId, message: Message) -> tuple[bool, list[AnyAction]]:
        """Whether to keep (and pass on) the message, and what to do. Raises Reject for a broken rule."""
        match message:
            case Announcement():
                return self._on_announcement(author, message)
            case ScoreCommit():
                return self._is_of_member(author, message.member) and self._on_commit(message), []
            case ScoreReveal():
                return self._is_of_member(author, message.member) and self._on_reveal(message), []
            case Proposal():
                return self._on_proposal(author, message), []
            case Attestation():
                if not self._is_of_member(author, message.member):
                    return False, []
                self.state.attestations[message.member] = message
                return True, self._accuse()
            case Certificate() | Presence():
                raise AssertionError("sorted out before")

    def _is_of_member(self, author: PeerId, member: MemberIndex) -> bool:
        """Whether it is a committee member's word; not, without blame, where another committee may be known.

        Raises:
            Reject: somebody speaks for another.
        """
        roster = self.state.roster
        assert roster is not None, "checked where messages come in"
        if get_peer(roster, member) != author:
            raise Reject(f"speaks for member {member}, which is not its own registry index")
        return member in roster.committee

    def _on_commit(self, message: ScoreCommit) -> bool:
        """Once vectors are public a commitment proves nothing: kept apart."""
        state = self.state
        is_late = state.phase > Phase.SCORE and state.saw_train
        commitments = state.late_commitments if is_late else state.commitments
        held = commitments.get(message.member, ())
        if message.commitment not in held:
            commitments[message.member] = (*held, message.commitment)
        return True

    def _on_reveal(self, message: ScoreReveal) -> bool:
        assert self.state.roster is not None, "checked where messages come in"
        validate_scores(message.scores, len(self.state.roster.members))
        if compute_commitment(message) not in self.state.commitments.get(message.member, ()):
            return False
        self.state.reveals[message.member] = message
        return True

    def _on_announcement(self, author: PeerId, message: Announcement) -> tuple[bool, list[AnyAction]]:
        if message.peer != author:
            raise Reject(f"announces for {message.peer}")
        if message.payload_bytes > self.config.limits.payload_bytes_max:
            raise Reject(f"announces {message.payload_bytes} bytes, over {self.config.limits.payload_bytes_max}")
        state = self.state
        if message.base != self.durable.base:
            return False, []
        self.privacy[author] = message.privacy
        # Payloads are public once TRAIN is over: whoever announces then may have copied, so it is not scored here.
        # It is kept all the same, for the case that most of the committee heard it in time. A peer that was away
        # cannot tell and relies on them. The same holds for the second update of an equivocator.
        is_late = state.phase > Phase.TRAIN and state.saw_train
        state.updates.add(message, is_late=is_late)
        return True, self._fetch_missing()

    def _on_proposal(self, author: PeerId, message: Proposal) -> bool:
        state = self.state
        if not self._is_of_member(author, message.proposer):
            return False
        assert state.roster is not None, "checked where messages come in"
        if compute_ranks(state.roster, state.round)[0] != message.proposer:
            return False
        state.proposal = message
        return True

    def _on_sync_asked(self, request: SyncRequest, token: int) -> list[AnyAction]:
        envelopes = self.state.log.missing(request.have) if request.round == self.state.round else ()
        head = None if self._rewinds_to else self.durable.head
        is_newer = head is not None and head.proposal.round > request.head_round
        return [AnswerSync(token, SyncReply(envelopes, head if is_newer else None))]

    def _ask_sync(self) -> list[AnyAction]:
        others = [peer for peer in self.peers if peer != self.me]
        if not others:
            return []
        self._num_syncs += 1
        peer = others[self._num_syncs % len(others)]
        head = self.durable.head
        head_round = head.proposal.round if head else -1
        settled = self.history.settled
        if settled and (self.history.is_orphaned() or self._rewinds_to):
            head_round = settled.round - 1
        return [AskSync(peer, SyncRequest(Round(max(self.state.round, 0)), self.state.log.digests(), head_round))]

    def _shifted_peers(self) -> tuple[PeerId, ...]:
        """Connected peers, beginning with another one on each peer."""
        shift = self._num_syncs % len(self.peers) if self.peers else 0
        return self.peers[shift:] + self.peers[:shift]

    # --- what the chain says

    def _on_roster(self, roster: Roster) -> list[AnyAction]:
        """A round keeps the roster it began with; only the first one is taken at once."""
        self.roster = roster
        actions = self._rewind_if_void()
        if self.state.roster is not None:
            return actions
        self.state.roster = roster
        return actions + self._start_training()

    def _on_settled(self, settled: SettledRound | None) -> list[AnyAction]:
        self.history.settled = settled
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
        if self._rewinds_to == (roster.nonce, settled):
            return []
        self._rewinds_to = (roster.nonce, settled)
        self.wanted = None
        self.history.rewind()
        note = Note(head.proposal.round, "the chain voided this round: going back to the newest that stands")
        return [note, Rewind(settled.round, settled.root) if settled else Rewind(Round(-1), NO_DIGEST)]

    def _on_rewound(self, head: Certificate | None, base: Digest) -> list[AnyAction]:
        if head is not None:
            return self._on_certificate(head)
        if self._rewinds_to is None or self.history.settled is not None:
            return []
        self._rewinds_to = None
        self.durable = msgspec.structs.replace(self.durable, base=base, head=None)
        return [Persist(self.durable), Serve(base), Adopt(Round(-1), base), *self._start_training()]


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
