"""A Peer under arbitrary sequences of events: whatever others say and whenever, it neither fails nor grows nor signs
twice."""

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from peer_bench import BASE, CONFIG, NAMES, make_roster, maker_of, payload_of, reveal_of, seal, settled_as

from p2pfm.messages import (
    Announcement,
    Attestation,
    Certificate,
    Message,
    Proposal,
    Score,
    ScoreCommit,
    ScoreReveal,
    SyncRequest,
)
from p2pfm.protocol.events import (
    Aggregate,
    Aggregated,
    AnyAction,
    AnyEvent,
    Blame,
    Evaluate,
    Evaluated,
    Fetch,
    Fetched,
    FetchFailed,
    Merge,
    Merged,
    PeersChanged,
    Persist,
    Publish,
    Rewound,
    RosterChanged,
    Scored,
    ScoreUpdates,
    Serve,
    SettledChanged,
    Sign,
    Signed,
    SyncAnswered,
    SyncAsked,
    Tick,
    Train,
    Trained,
)
from p2pfm.protocol.gossip import SLOTS_MAX
from p2pfm.protocol.history import ROOTS_MAX
from p2pfm.protocol.peer import LOSSES_MAX, Peer, initial_durable
from p2pfm.protocol.phases import Phase
from p2pfm.protocol.round_state import EARLY_MAX
from p2pfm.settlement.ledger import LeafValue
from p2pfm.settlement.rewards import to_wire
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, Wei, compute_digest

ME = NAMES[0]
ROUND_MS = 60_000
digests = st.sampled_from([compute_digest(bytes([k])) for k in range(3)] + [BASE] + [payload_of(n) for n in NAMES])
members = st.integers(0, 4).map(MemberIndex)
speakers = st.sampled_from([*NAMES[1:], PeerId("stranger")])
contributions = st.sampled_from([-(2**60), -5, 0, 7, 2**60]).map(Contribution)


class PeerMachine(RuleBasedStateMachine):
    """Events in any order; answers to what the peer really asked come late, twice or never."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = Millis(CONFIG.genesis_ms - 1_000)
        self.durable = initial_durable(BASE)
        self.peer = Peer(ME, CONFIG, self.durable)
        self.asked: list[AnyAction] = []
        self.said: list[Message] = []
        self.signed: dict[Round, Digest] = {}
        self.announced: dict[Round, Digest] = {}
        self.position = (-1, 0)

    @initialize()
    def join(self) -> None:
        self.feed(RosterChanged(make_roster()))
        self.feed(PeersChanged(NAMES[1:]))

    def feed(self, event: AnyEvent) -> None:
        actions = self.peer.handle(event, self.now_ms)
        for action in actions:
            match action:
                case Persist(durable=durable):
                    self.durable = durable
                case Sign(round=round, message=message):
                    assert self.durable.signed_round == round, "durable before it is signed"
                    assert self.signed.setdefault(round, message) == message, "one proposal a round"
                case Publish(message=Announcement(round=round, payload=payload)):
                    assert self.announced.setdefault(round, payload) == payload, "one update a round"
                case Serve(digest=digest) if digest == self.durable.announced_payload:
                    assert self.durable.announced_round < self.peer.round or self.peer.phase > Phase.TRAIN
                case Blame(peer=peer):
                    assert peer != ME, "nobody blames itself"
                case _:
                    pass
            if isinstance(action, Train | Fetch | ScoreUpdates | Merge | Sign | Aggregate | Evaluate):
                self.asked = [*self.asked[-20:], action]
            if isinstance(action, Publish):
                self.feed(seal(ME, action.message))
                self.said = [*self.said[-20:], action.message]

    @rule(step_ms=st.sampled_from([0, 1, 100, 1_000, 3_000, 9_999, 10_000, ROUND_MS, 7 * ROUND_MS, -5_000]))
    def pass_time(self, step_ms: int) -> None:
        self.now_ms = Millis(self.now_ms + step_ms)
        self.feed(Tick())

    @rule(data=st.data(), salt=st.binary(min_size=32, max_size=32), is_good=st.booleans())
    def answer(self, data: st.DataObject, salt: bytes, is_good: bool) -> None:
        if not self.asked:
            return
        match data.draw(st.sampled_from(self.asked)):
            case Train(round=round, base=base):
                self.feed(Trained(round, base, compute_digest(salt), 10, 10, compute_digest(salt + b"r"), 1))
            case Fetch(digest=digest):
                maker = data.draw(st.sampled_from([None, maker_of(digest), *NAMES[1:]]))
                failed = FetchFailed(digest, is_malformed=data.draw(st.booleans()))
                self.feed(Fetched(digest, maker) if is_good else failed)
            case ScoreUpdates(round=round, updates=updates):
                if round != self.peer.round or len(updates) == len(self.peer.state.scored):
                    values = tuple(data.draw(contributions) for _ in updates)
                    self.feed(Scored(round, values, salt))
            case Merge(request=request):
                self.feed(Merged(request, compute_digest(request + (b"" if is_good else salt))))
            case Sign(round=round, message=message):
                self.feed(Signed(round, message, bytes(96)))
            case Aggregate(round=round, message=message, absent=absent):
                self.feed(Aggregated(round, message, absent, bytes(96)))
            case Evaluate(round=round):
                self.feed(Evaluated(round, 1))

    @rule(
        author=speakers,
        ahead=st.sampled_from([-1, 0, 0, 0, 0, 1, 2]),
        base=digests,
        payload=digests,
        num=st.integers(0, 2),
    )
    def hear_announcement(self, author: PeerId, ahead: int, base: Digest, payload: Digest, num: int) -> None:
        chosen = self.peer.durable.base if num else base
        self.feed(seal(author, Announcement(self.round(ahead), author, chosen, payload, 10, num)))

    @rule(author=speakers, member=members, ahead=st.sampled_from([0, 0, 0, 1]), payload=digests, value=contributions)
    def hear_vector(
        self, author: PeerId, member: MemberIndex, ahead: int, payload: Digest, value: Contribution
    ) -> None:
        reveal = ScoreReveal(self.round(ahead), member, bytes(32), (Score(payload, value),))
        self.feed(seal(author, ScoreCommit(reveal.round, member, reveal.commitment)))
        self.feed(seal(author, reveal))

    @rule(member=st.integers(1, 3), is_committed=st.booleans())
    def hear_good_vector(self, member: int, is_committed: bool) -> None:
        reveal = reveal_of(member, self.round(0))
        if is_committed:
            commitment = reveal.commitment
            self.feed(seal(NAMES[member], ScoreCommit(reveal.round, MemberIndex(member), commitment)))
        self.feed(seal(NAMES[member], reveal))

    @rule(author=speakers, data=st.data())
    def hear_proposal(self, author: PeerId, data: st.DataObject) -> None:
        self.feed(seal(author, self.make_proposal(data)))

    @rule(author=speakers, data=st.data())
    def hear_what_was_said(self, author: PeerId, data: st.DataObject) -> None:
        if self.said:
            self.feed(seal(author, data.draw(st.sampled_from(self.said))))

    @rule(author=speakers, member=members, message=digests)
    def hear_attestation(self, author: PeerId, member: MemberIndex, message: Digest) -> None:
        self.feed(seal(author, Attestation(self.round(0), member, message, bytes(96))))

    @rule(data=st.data(), is_gossip=st.booleans())
    def hear_certificate(self, data: st.DataObject, is_gossip: bool) -> None:
        certificate = Certificate(self.make_proposal(data), (), bytes(96))
        self.feed(seal(NAMES[1], certificate) if is_gossip else SyncAnswered(NAMES[1], certificate))

    @rule(ahead=st.integers(-2, 1), have=st.lists(digests, max_size=3), head=st.integers(-1, 5))
    def be_asked(self, ahead: int, have: list[Digest], head: int) -> None:
        self.feed(SyncAsked(NAMES[1], SyncRequest(self.round(ahead), tuple(have), head), 1))

    @rule(round=st.integers(0, 6).map(Round), prev_root=digests, root=digests)
    def see_settled(self, round: Round, prev_root: Digest, root: Digest) -> None:
        self.feed(SettledChanged(settled_as(round, root, prev_root)))

    @rule()
    def see_nothing_settled(self) -> None:
        self.feed(SettledChanged(None))

    @rule(data=st.data(), is_found=st.booleans())
    def be_rewound(self, data: st.DataObject, is_found: bool) -> None:
        head = Certificate(self.make_proposal(data), (), bytes(96)) if is_found else None
        self.feed(Rewound(head, BASE))

    @rule(
        committee=st.sampled_from([(), (0, 1, 2, 3), (3, 2), (1,)]),
        num_peers=st.integers(4, 5),
        epoch=st.integers(1, 3),
        nonce=st.integers(0, 2),
    )
    def see_roster(self, committee: tuple[int, ...], num_peers: int, epoch: int, nonce: int) -> None:
        self.feed(RosterChanged(msgspec.structs.replace(make_roster(committee, num_peers, epoch), nonce=nonce)))

    @rule(names=st.lists(st.sampled_from(NAMES[1:]), unique=True))
    def see_peers(self, names: list[PeerId]) -> None:
        self.feed(PeersChanged(tuple(sorted(names))))

    @rule()
    def restart(self) -> None:
        self.peer = Peer(ME, CONFIG, self.durable)
        self.asked = []
        self.feed(RosterChanged(make_roster()))

    @invariant()
    def no_phase_goes_backwards(self) -> None:
        position = (self.peer.round, int(self.peer.phase))
        if self.peer.round >= 0:  # a restarted peer enters its phase with its first event
            assert position >= self.position or self.now_ms < CONFIG.genesis_ms + ROUND_MS * (self.position[0] + 1)
            self.position = max(self.position, position)

    @invariant()
    def what_the_peer_holds_is_what_is_durable(self) -> None:
        assert self.peer.durable == self.durable

    @invariant()
    def nothing_grows_without_bound(self) -> None:
        state, num_members = self.peer.state, 5
        assert len(self.peer.early) <= min(EARLY_MAX, 5 * num_members)
        assert len(state.log) <= SLOTS_MAX * 5 * num_members
        assert len(state.updates.tries) <= 3 * num_members
        assert len(state.updates.announcements) <= num_members
        assert len(state.updates.late) <= SLOTS_MAX * num_members
        assert sum(len(held) for held in state.commitments.values()) <= (SLOTS_MAX + 1) * num_members
        assert len(self.peer.history.roots) <= ROOTS_MAX
        assert len(self.peer.losses) <= LOSSES_MAX

    def round(self, ahead: int) -> Round:
        return Round(max(0, self.peer.round + ahead))

    def make_proposal(self, data: st.DataObject) -> Proposal:
        """The right one, if this peer could draft one; else, or spoilt, something like it."""
        drawn = [data.draw(digests) for _ in range(4)]
        leaves = tuple(
            LeafValue(Wei(data.draw(st.integers(0, 3))), Wei(0), data.draw(contributions))
            for _ in range(data.draw(st.integers(0, 6)))
        )
        reveals = tuple(reveal_of(member, self.round(0)) for member in range(data.draw(st.integers(0, 4))))
        proposal = Proposal(
            self.round(data.draw(st.sampled_from([-1, 0, 0, 1]))), data.draw(members), 1, 0, *drawn, (), reveals,
            to_wire(leaves),
        )  # fmt: skip
        if self.peer.state.draft is not None and data.draw(st.booleans()):
            proposal = msgspec.structs.replace(self.peer.state.draft, new_base=drawn[0])
        return proposal


PeerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPeerMachine = PeerMachine.TestCase
