"""One committee's work on the updates of one round: fetch, score, commit, reveal, propose, attest, certify.

The same for a whole small network, for a shard, and for the shards of a large network one level up: what differs is who
the members are, what a proposal holds, and what a merge makes (a base, or a shard's payload). Knows no clock, training,
chain or neighbour beyond what its Standing tells.
"""

import msgspec

from p2pfm.errors import Reject
from p2pfm.messages import (
    Announcement,
    Attestation,
    Certificate,
    Envelope,
    Proposal,
    Score,
    ScoreCommit,
    ScoreReveal,
    ShardMessage,
    Word,
)
from p2pfm.protocol.committee import (
    announce_updates,
    are_members,
    draft_proposal,
    draft_shard_proposal,
    draft_top_proposal,
    merge_request,
    shard_message,
    validate_proposal,
    validate_reveals,
    validate_shard,
    validate_vector,
)
from p2pfm.protocol.events import (
    Accuse,
    Aggregate,
    Aggregated,
    AnyAction,
    Blame,
    Condense,
    Fetched,
    Note,
    Persist,
    Publish,
    Remembered,
    Scored,
    ScoreUpdates,
    Serve,
    Sign,
    Signed,
    Weighted,
)
from p2pfm.protocol.membership import compute_ranks, get_member, get_peer
from p2pfm.protocol.phases import Level, Phase
from p2pfm.protocol.round_state import RoundState
from p2pfm.protocol.shards import (
    EVERYBODY,
    TOP,
    Deal,
    compute_shard_shares,
    compute_shares_of,
    get_committee_topic,
    get_shard_name,
)
from p2pfm.protocol.standing import Standing
from p2pfm.protocol.updates import FETCH_TRIES_MAX
from p2pfm.settlement.rewards import compute_served_epoch, is_payout_round, proposal_message
from p2pfm.settlement.sampling import compute_quorum
from p2pfm.types import Contribution, Digest, MemberIndex, PeerId, Round

CERTIFIED_MAX = 4
"""Different things of one shard that are kept: an honest one certifies one."""


class Ballot:
    """A round's committee as one of its peers sees it: all that it heard, and what to do about it."""

    def __init__(
        self, standing: Standing, state: RoundState, dealt: Deal | None = None, shard: MemberIndex | None = None
    ):
        """`dealt`: the members are shards; `shard`: the members are of this shard; neither: a whole small network."""
        self.standing = standing
        self.state = state
        self.level = Level.TOP if dealt is not None and shard is None else Level.SHARD
        self.dealt = dealt
        self.shard = shard
        self._certified: dict[Digest, tuple[int, Proposal]] = {}
        """What shards certified, by its digest, and which one did."""
        self._lacking: list[Digest] = []
        """Payloads of the valid proposal of which the last one is not here; empty: to be looked at."""
        member = get_member(state.roster, standing.me) if state.roster else None
        is_seated = state.roster is not None and member is not None and member.index in state.roster.committee
        self._my_index = member.index if member is not None and is_seated else None

    def get_my_index(self) -> MemberIndex | None:
        """This peer's registry index, if it sits on the committee."""
        return self._my_index

    def is_outside(self) -> bool:
        """Whether this peer is told the result only: in a large network all before it is for the committee."""
        return self.dealt is not None and self._my_index is None

    def say(self, message: Word) -> Publish:
        """Gossip a word of this round to those whom it concerns."""
        if self.dealt is None:
            return Publish(message, EVERYBODY)
        if self.shard is None:
            return Publish(message, TOP)
        seats = self.dealt.seats[self.shard] if self.is_outside() else ()
        return Publish(ShardMessage(self.shard, message), get_committee_topic(self.shard), seats)

    def tell(self, peer: PeerId, have: tuple[Digest, ...]) -> tuple[Envelope, ...]:
        """What of this round another peer lacks and has a use for."""
        state = self.state
        if self.dealt is None:
            return state.log.missing(have)
        member = get_member(state.roster, peer) if state.roster else None
        if state.roster is None or member is None:
            return ()
        if member.index in state.roster.committee:
            return state.log.missing(have)
        return state.log.missing(have, Certificate) if self.shard is not None else ()

    def enter(self, phase: Phase) -> list[AnyAction]:
        """A phase begins."""
        self.state.phase = phase
        match phase:
            case Phase.TRAIN:
                return []
            case Phase.EXCHANGE:
                return self.fetch_missing()
            case Phase.SCORE:
                return self._enter_score()
            case Phase.REVEAL:
                return [self.say(self.state.my_reveal)] if self.state.my_reveal else []
            case Phase.ATTEST:
                # A proposer whose clock is ahead of ours may have spoken already.
                return self._propose() + self.consider_proposal()
            case Phase.MERGE:
                return self._aggregate()

    # --- payloads

    def fetch_missing(self) -> list[AnyAction]:
        """Ask for every payload that is wanted here, once TRAIN is over: before, nobody gives one."""
        state = self.state
        if state.phase == Phase.TRAIN or state.round < 0 or state.is_certified:
            return []
        if self.is_outside() and not state.is_proposal_valid:
            return []  # only who scores needs all of them
        return [
            *state.updates.fetch_missing(self._proposed() if state.is_proposal_valid else frozenset(), self._holders)
        ]

    def fetch_own_shard(self, shard: MemberIndex, proposal: Proposal) -> list[AnyAction]:
        """What this peer's shard made: it gives it to others once the committee above is done with it."""
        updates = self.state.updates
        updates.add(self._announce_shard(shard, proposal), is_late=True)
        return [*updates.fetch_missing(frozenset((proposal.new_base,)), self._holders)]

    def _holders(self, author: PeerId) -> tuple[PeerId, ...]:
        """Who may hold an author's payload beside itself: neighbours; in a large network, its shard's committee, and
        when the shard is done its other members, too.
        """
        if self.dealt is None:
            return self.standing.peers
        me = self.standing.me
        number = self.shard if self.shard is not None else int(author.removeprefix("shard-"))
        is_early = self.shard is not None or self._my_index is not None or self.dealt.shard_of.get(me) == number
        if not is_early:
            return self.dealt.list_holders(number, self.standing.number, me)
        return tuple(peer for peer in self.dealt.seats[number] if peer != me)

    def _proposed(self) -> frozenset[Digest]:
        """Payloads that the received proposal includes, be it right or wrong."""
        return self.state.proposal.payloads if self.state.proposal else frozenset()

    def on_fetched(self, event: Fetched) -> list[AnyAction]:
        """A payload has come."""
        updates = self.state.updates
        try:
            blames = updates.on_fetched(event.digest, event.maker)
        except Reject as error:
            return self._blame(updates.by_payload()[event.digest].peer, str(error))
        actions: list[AnyAction] = [*blames, Serve(event.digest)]
        if self.state.is_proposal_valid:
            lacking = self._lacking = self._lacking or list(self._proposed() - updates.makers.keys())
            while lacking and lacking[-1] in updates.makers:
                lacking.pop()
            if lacking:
                return actions  # the others are under way, or resting
        return actions + self.consider_proposal()

    def on_fetch_failed(self, digest: Digest, is_malformed: bool) -> list[AnyAction]:
        """A payload could not be had, or is none."""
        state = self.state
        author = state.updates.on_failed(digest, is_malformed=is_malformed)
        if is_malformed:
            return self._blame(author, "announced a payload that does not decode")
        if state.updates.tries[digest] != FETCH_TRIES_MAX:
            return []
        return [Note(state.round, f"payload of {author[-6:]} is not to be had: it counts as absent")]

    def _blame(self, author: PeerId, reason: str) -> list[AnyAction]:
        """A shard's payload is the work of many: its committee answers on chain, nobody is cut off for it."""
        return [Blame(author, reason)] if self.level == Level.SHARD else [Note(self.state.round, f"{author} {reason}")]

    # --- SCORE and REVEAL

    def _enter_score(self) -> list[AnyAction]:
        state, standing = self.state, self.standing
        if self.get_my_index() is None or state.roster is None:
            return []
        makers = state.updates.scorable(standing.durable.base)
        if not makers:
            state.failure = "no update to score"
            return [Note(state.round, "no update to score")]
        shares = compute_shares_of(state.roster, standing.config.stake_cap())
        if self.level == Level.TOP and self.dealt is not None:
            of_shards = compute_shard_shares(self.dealt, shares)
            shares = {get_shard_name(number): share for number, share in enumerate(of_shards)}
        state.scored = tuple(makers)
        updates = tuple(Weighted(digest, shares[makers[digest]]) for digest in state.scored)
        epoch, base = self._compute_served_epoch(), standing.durable.base
        if self.level == Level.TOP:  # what shards' means have in common is what many learn
            return [ScoreUpdates(state.round, base, None, updates, served_epoch=epoch, is_compared=False)]
        previous = standing.durable.head.proposal.base if standing.durable.head else None
        return [ScoreUpdates(state.round, base, previous, updates, standing.earlier, self.shard, epoch)]

    def _compute_served_epoch(self) -> int | None:
        """Whose receipts this round pays; a shard's own round pays nobody."""
        config, head = self.standing.config, self.standing.durable.head
        last, per_epoch = head.proposal.round if head else Round(-1), config.settlement.rounds_per_epoch
        if self.shard is not None or not config.serving_per_epoch():
            return None
        if not is_payout_round(self.state.round, last, per_epoch):
            return None
        return compute_served_epoch(self.state.round, per_epoch)

    def on_scored(self, event: Scored) -> list[AnyAction]:
        """The contributions are measured."""
        state, index = self.state, self.get_my_index()
        if index is None or state.my_reveal is not None:
            return []
        if state.phase != Phase.SCORE:
            state.failure = "scoring took longer than SCORE"
            return [Note(state.round, "scoring took longer than SCORE: no vector from here")]
        assert len(event.contributions) == len(state.scored), "a driver answers what was asked"
        makers = [state.updates.makers[payload] for payload in state.scored]
        proofs = self.standing.proofs
        if event.proofs and self.level == Level.SHARD:
            for maker, is_passed in zip(makers, event.proofs, strict=True):
                proofs.add(maker, is_passed)
        scores = [
            Score(payload, contribution if proofs.is_trusted(maker) else Contribution(min(0, contribution)))
            for payload, maker, contribution in zip(state.scored, makers, event.contributions, strict=True)
        ]
        state.my_reveal = ScoreReveal(
            state.round,
            index,
            event.salt,
            tuple(sorted(scores, key=lambda score: score.payload)),
            event.served,
        )
        return [self.say(ScoreCommit(state.round, index, state.my_reveal.commitment))]

    # --- ATTEST

    def draft(self, reveals: tuple[ScoreReveal, ...], named: tuple[Digest, ...] = ()) -> Proposal:
        """The one right proposal for these reveals. Raises Reject where there is none.

        Args:
            named: what shards certified by which a received proposal is to be judged, where one certified twice.
        """
        state, standing = self.state, self.standing
        assert state.roster is not None, "only a peer with a roster drafts"
        standing.validate_readiness(state.roster)
        validate_reveals(state.roster, reveals, state.round, state.commitments, state.late_commitments)
        config, roster, round, base = standing.config, state.roster, state.round, standing.durable.base
        previous = standing.durable.head.proposal if standing.durable.head else None
        if self.dealt is None:
            return draft_proposal(config, roster, previous, round, base, reveals, state.updates.by_payload())
        if self.shard is None:
            certified = self._by_payload(named)
            return draft_top_proposal(config, roster, self.dealt, previous, round, base, reveals, certified)
        announced, num_shards = state.updates.by_payload(), len(self.dealt.shards)
        return draft_shard_proposal(config, roster, num_shards, previous, round, base, reveals, announced)

    def _sign_as(self, proposal: Proposal) -> Digest:
        """What members sign of a proposal."""
        chain = self.standing.config.chain
        return proposal_message(chain, proposal) if self.shard is None else shard_message(chain, self.shard, proposal)

    def _propose(self) -> list[AnyAction]:
        state, index = self.state, self.get_my_index()
        if index is None or state.roster is None or compute_ranks(state.roster, state.round)[0] != index:
            return []
        try:
            state.draft = self.draft(tuple(state.reveals[member] for member in sorted(state.reveals)))
        except Reject as error:
            state.failure = f"nothing to propose: {error}"
            return [Note(state.round, state.failure)]
        return self._merge(state.draft)

    def _merge(self, proposal: Proposal) -> list[AnyAction]:
        """Compute a proposal's base (or payload), unless that is under way, done, or not possible yet."""
        state = self.state
        request = proposal.draft_digest
        if request in state.merged:
            return self.on_merged(request, state.merged[request])
        merge = merge_request(proposal)
        if merge is None:
            return self.on_merged(request, proposal.base)
        if request in state.merging or any(update.payload not in state.updates.makers for update in merge.updates):
            return []
        state.merging.add(request)
        if self.shard is not None:
            return [Condense(request, merge.base, merge.updates, get_shard_name(self.shard))]
        return [msgspec.structs.replace(merge, request=request)]

    def on_merged(self, request: Digest, new_base: Digest) -> list[AnyAction]:
        """What was merged is here."""
        state = self.state
        state.merged[request] = new_base
        actions: list[AnyAction] = []
        if state.draft is not None and state.draft.draft_digest == request and state.proposal is None:
            proposal = msgspec.structs.replace(state.draft, new_base=new_base)
            state.draft = None
            actions.append(self.say(proposal))
        if state.proposal is not None and state.proposal.draft_digest == request:
            actions += self._attest(new_base)
        return actions

    def consider_proposal(self) -> list[AnyAction]:
        """Recompute the received proposal; once it is proven right, merge; once merged, sign."""
        state = self.state
        if state.proposal is None or state.roster is None or state.is_certified:
            return []
        if not state.is_proposal_valid:
            try:
                validate_proposal(state.proposal, self.draft(state.proposal.reveals, state.proposal.shards))
            except Reject as error:
                # Perhaps a commitment or an announcement has not come yet: the next message or sync tries again.
                state.failure = f"the proposal does not hold here: {error}"
                return []
            state.is_proposal_valid = True
        elif state.proposal.draft_digest in state.merging and not self._is_to_attest():
            return self._aggregate() if state.phase == Phase.MERGE else []
        actions = self.fetch_missing() + self._merge(state.proposal)
        return actions + (self._aggregate() if state.phase == Phase.MERGE else [])

    def _is_to_attest(self) -> bool:
        """Whether this member can sign a proposal now, and has not in this round."""
        state, durable = self.state, self.standing.durable
        signed_round = durable.signed_round if self.shard is None else durable.signed_shard_round
        return state.phase == Phase.ATTEST and signed_round < state.round and self.get_my_index() is not None

    def _attest(self, new_base: Digest) -> list[AnyAction]:
        state, standing = self.state, self.standing
        assert state.proposal is not None, "called for a received proposal"
        if new_base != state.proposal.new_base:
            state.failure = "the proposed base is not the merge of the proposed updates"
            proposer = get_peer(state.roster, state.proposal.proposer) if state.roster else None
            return [Blame(proposer, state.failure)] if proposer else []
        if not self._is_to_attest():
            return []
        durable = standing.save(**{"signed_round" if self.shard is None else "signed_shard_round": state.round})
        return [Persist(durable), Sign(state.round, self._sign_as(state.proposal))]

    def is_of(self, message: Digest) -> bool:
        """Whether this is what members sign of the proposal held here."""
        return self.state.proposal is not None and self._sign_as(self.state.proposal) == message

    def on_signed(self, event: Signed) -> list[AnyAction]:
        """This member's signature is here."""
        index = self.get_my_index()
        if index is None:
            return []
        return [self.say(Attestation(event.round, index, event.message, event.signature))]

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
        message = self._sign_as(state.proposal)
        signed = {i: a for i, a in state.attestations.items() if a.message == message}
        needed = compute_quorum(len(state.roster.committee))
        if len(signed) < needed:
            state.failure = f"{len(signed)} of {len(state.roster.committee)} signed, {needed} needed"
            return []
        state.is_aggregating = True
        absent = tuple(sorted(index for index in state.roster.committee if index not in signed))
        return [Aggregate(state.round, message, tuple(signed[index] for index in sorted(signed)), absent)]

    def on_aggregated(self, event: Aggregated) -> Certificate | None:
        """The signatures are one: the certificate, unless it is here already."""
        state = self.state
        if state.proposal is None or state.roster is None or state.is_certified:
            return None
        return Certificate(state.proposal, event.absent, event.signature)

    def get_rank(self) -> int | None:
        """This peer's place in the committee's order of the round; None: not on it."""
        index, roster = self.get_my_index(), self.state.roster
        return None if index is None or roster is None else compute_ranks(roster, self.state.round).index(index)

    # --- what others say

    def on_message(self, author: PeerId, message: Word) -> tuple[bool, list[AnyAction]]:
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

    def on_second_word(self, author: PeerId, message: Word, *, is_second: bool) -> list[AnyAction]:
        """Another word of an author who has spoken: the first stands, and the author is blamed.

        But others may have heard the second first. An update or a commitment is kept beside the first (else whoever
        splits the committee so could void every round), a third one only if the proposal is about it. A second proposal
        or attestation changes nothing here, but it is half of what the chain slashes for.
        """
        state = self.state
        kind = type(message).__name__
        actions: list[AnyAction] = [Blame(author, f"said two different things: {kind} of round {state.round}")]
        if isinstance(message, Announcement):
            state.updates.equivocators.add(author)
            is_needed = message.payload in self._proposed()
        elif isinstance(message, ScoreCommit):
            reveals = state.proposal.reveals if state.proposal else ()
            is_needed = any(reveal.commitment == message.commitment for reveal in reveals)
        else:
            return [*actions, *self._keep_rival(author, message)] if is_second else []
        if not is_second and not is_needed:
            return []
        try:
            _, more = self.on_message(author, message)
        except Reject as error:
            return [Blame(author, str(error))]
        return (actions if is_second else []) + more + self.consider_proposal()

    def on_shard_certificate(self, number: int, certificate: Certificate) -> list[AnyAction]:
        """A shard's update, one level up. The driver has checked its signatures."""
        state, proposal, standing = self.state, certificate.proposal, self.standing
        if proposal.base != standing.durable.base or proposal.new_base == proposal.base or self.dealt is None:
            return []  # of another history, or nobody contributed anything there
        if proposal.digest in self._certified:
            return []
        if sum(other == number for other, _ in self._certified.values()) >= CERTIFIED_MAX:
            return [Note(state.round, f"shard {number} certified more than {CERTIFIED_MAX} things")]
        previous = standing.durable.head.proposal if standing.durable.head else None
        try:
            validate_shard(standing.config, self.dealt, number, previous, state.round, proposal)
        except Reject as error:  # or its registry is another one
            return [Note(state.round, str(error))]
        self._certified[proposal.digest] = (number, proposal)
        held = self._announce_shard(number, proposal)
        is_late = state.phase > Phase.TRAIN and state.saw_train
        first = state.updates.announcements.get(held.peer)
        if first is None or first.payload != proposal.new_base:
            state.updates.add(held, is_late=is_late)
        return self.fetch_missing() + self.consider_proposal()

    def _announce_shard(self, number: int, proposal: Proposal) -> Announcement:
        bytes_max = self.standing.config.limits.payload_bytes_max
        name = get_shard_name(number)
        return Announcement(proposal.round, name, proposal.base, proposal.new_base, bytes_max, 0)

    def list_shards(self, proposal: Proposal) -> tuple[Proposal, ...]:
        """What the shards of a proposal certified, of those whose certificates were heard here."""
        return tuple(self._certified[digest][1] for digest in proposal.shards if digest in self._certified)

    def _by_payload(self, named: tuple[Digest, ...]) -> dict[Digest, tuple[int, Proposal]]:
        """What shards certified, by payload: where one payload has several, those that are named, or the lowest."""
        digests = (*sorted(self._certified, reverse=True), *(digest for digest in named if digest in self._certified))
        return {self._certified[digest][1].new_base: self._certified[digest] for digest in digests}

    def can_follow(self, proposal: Proposal) -> bool:
        """Whether what was certified is made of shards that are known here, in this round and from this base."""
        if self.dealt is None or proposal.round != self.state.round or proposal.base != self.standing.durable.base:
            return False
        num_shards = len(self.dealt.shards)
        return all(
            update.member < num_shards and update.peer == get_shard_name(update.member) for update in proposal.updates
        )

    def follow(self, certificate: Certificate) -> list[AnyAction]:
        """Compute what a committee certified from the shards' payloads, without having taken part."""
        state, proposal = self.state, certificate.proposal
        for held in announce_updates(proposal, self.standing.config.limits.payload_bytes_max).values():
            if held.payload not in state.updates.makers:
                state.updates.add(held, is_late=True)
        state.proposal, state.is_proposal_valid, self._lacking = proposal, True, []
        return self.fetch_missing() + self._merge(proposal)

    def remember(self) -> tuple[Remembered, ...]:
        """The round's payloads, all public now: also those of a round that was void and paid nobody.

        Who has no seat holds its own alone, and could compare nothing with the others.
        """
        state = self.state
        certified = state.certificate.proposal if state.certificate and not self.is_outside() else None
        updates = sorted(certified.updates, key=lambda update: -update.contribution) if certified else ()
        paid = tuple(Remembered(update.payload, is_paid=True) for update in updates)
        unpaid = sorted(state.updates.makers.keys() - {item.payload for item in paid})
        return (*paid, *(Remembered(payload, is_paid=False) for payload in unpaid))

    def _keep_rival(self, author: PeerId, message: Word) -> list[AnyAction]:
        state = self.state
        if isinstance(message, Proposal) and state.proposal and state.proposal.proposer == message.proposer:
            state.rival = message
        elif isinstance(message, Attestation) and state.roster and get_peer(state.roster, message.member) == author:
            state.second_attestations[message.member] = message
        return self._accuse()

    def _accuse(self) -> list[AnyAction]:
        """Everybody of whom two signatures are held here, of two proposals that are held here too.

        The chain judges only what it could have taken: not what a shard's committee signs.
        """
        state = self.state
        if state.proposal is None or state.rival is None or self.shard is not None:
            return []
        proposals = {self._sign_as(told): told for told in (state.proposal, state.rival)}
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
        validate_vector(message, len(message.scores))
        roster = self.state.roster
        if len(message.scores) > len(roster.members) or not are_members(message.served, roster):
            return False  # it may know a newer registry
        if message.commitment not in self.state.commitments.get(message.member, ()):
            return False
        self.state.reveals[message.member] = message
        return True

    def _on_announcement(self, author: PeerId, message: Announcement) -> tuple[bool, list[AnyAction]]:
        limits = self.standing.config.limits
        if message.peer != author:
            raise Reject(f"announces for {message.peer}")
        if message.payload_bytes > limits.payload_bytes_max:
            raise Reject(f"announces {message.payload_bytes} bytes, over {limits.payload_bytes_max}")
        state = self.state
        if message.base != self.standing.durable.base or self.level == Level.TOP:
            return False, []
        # Payloads are public once TRAIN is over: whoever announces then may have copied, so it is not scored here.
        # It is kept all the same, for the case that most of the committee heard it in time. A peer that was away
        # cannot tell and relies on them. The same holds for the second update of an equivocator.
        is_late = state.phase > Phase.TRAIN and state.saw_train
        state.updates.add(message, is_late=is_late)
        return True, self.fetch_missing()

    def _on_proposal(self, author: PeerId, message: Proposal) -> bool:
        state = self.state
        if not self._is_of_member(author, message.proposer):
            return False
        assert state.roster is not None, "checked where messages come in"
        if compute_ranks(state.roster, state.round)[0] != message.proposer:
            return False
        state.proposal = message
        return True
