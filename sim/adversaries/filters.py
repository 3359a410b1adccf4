"""Dishonest words and ears: what stands between an honest `Peer` and its driver, and changes what is heard and done.

A filter outlives its host's restarts. Knows messages, the core's events and actions and the pure rules of a committee;
no world, no other peer's state. Colluders know one another by a mark in what they announce (`CABAL_TOKENS`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject
from p2pfm.messages import (
    Announcement,
    Aside,
    Attestation,
    Certificate,
    Leaf,
    Message,
    Presence,
    Proposal,
    Score,
    ScoreCommit,
    ScoreReveal,
    ShardMessage,
    SyncReply,
    Word,
    wei_from_wire,
    wei_to_wire,
)
from p2pfm.protocol.committee import draft_proposal, merge_request
from p2pfm.protocol.events import (
    Aggregate,
    AnswerSync,
    AnyAction,
    AnyEvent,
    Merged,
    Persist,
    Publish,
    Received,
    RosterChanged,
    Scored,
    ScoreUpdates,
    Serve,
    SetTimer,
    Sign,
    Signed,
    SyncAsked,
    Train,
)
from p2pfm.protocol.membership import get_member
from p2pfm.protocol.shards import EVERYBODY
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import Roster
from p2pfm.settlement.rewards import from_wire, proposal_message
from p2pfm.settlement.sampling import compute_quorum
from p2pfm.types import Contribution, Digest, MemberIndex, PeerId, Round, Wei, compute_digest
from p2pfm.work import BlobStore
from sim import attacks

CABAL_TOKENS = 777_777
"""The mark: what colluders say that they trained on. Nobody checks that number, so it costs nothing to agree on it."""

FLOOD_MESSAGES = 12
"""What a spammer says whenever it sets its timer, about every three seconds."""

FAR_ROUNDS = 50
"""How far ahead of its time a word can be and still be a valid message."""

SIGNED_MAX = 64
"""Messages of its own signing that a splitter remembers."""

PRAISE = 2
"""A friend's update is worth this many times the best one, says a colluder."""

MakeEmpty = Callable[[PeerId], bytes]
"""A well-formed payload of an update that changes nothing, by its maker."""


class Deed(NamedTuple):
    """An action and, where it is a message, who of the others hears it from here."""

    action: AnyAction
    audience: Literal["all", "even", "odd"] = "all"
    """By the hearers' numbers."""
    but: frozenset[PeerId] = frozenset()
    """These do not."""


class Honest:
    """Hears everything, does as its peer says."""

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """What reaches the peer; None: nothing."""
        return event

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """What is carried out."""
        return [deed for action in actions for deed in self.do(action)]

    def do(self, action: AnyAction) -> list[Deed]:
        """What is carried out instead of one action."""
        return [Deed(action)]


# --- as a trainer ----------------------------------------------------------------------------------------------------


class Equivocator(Honest):
    """Announces its update to one half of its peers, and an empty one, which it serves too, to the others."""

    def __init__(self, make_empty: MakeEmpty, blobs: BlobStore) -> None:
        self._make_empty = make_empty
        self._digest: Digest | None = None
        self._blobs = blobs

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        word = get_word(action)
        if isinstance(word, Announcement):
            empty = self._make_empty(word.peer)
            self._digest = self._blobs.put(empty)
            other = msgspec.structs.replace(word, payload=self._digest, payload_bytes=len(empty))
            return [Deed(action, "even"), Deed(with_word(action, other), "odd")]
        if isinstance(action, Serve) and self._digest is not None:
            return [Deed(action), Deed(Serve(self._digest))]
        return [Deed(action)]


class Withholder(Honest):
    """Serves nothing to anybody."""

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        return [] if isinstance(action, Serve) else [Deed(action)]


class Latecomer(Honest):
    """Announces when payloads are public, as who has copied one would."""

    def __init__(self) -> None:
        self._held: AnyAction | None = None

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        if isinstance(get_word(action), Announcement):
            self._held = action
            return []
        if isinstance(action, Serve) and self._held is not None:
            held, self._held = self._held, None
            return [Deed(held), Deed(action)]
        return [Deed(action)]


class Forger(Honest):
    """Announces a payload of its own making instead of its update: garbage, or one that names another as its maker."""

    def __init__(self, blobs: BlobStore, make_false: Callable[[PeerId], bytes]) -> None:
        """Args: make_false: from a peer to the bytes that it announces."""
        self._blobs = blobs
        self._make_false = make_false
        self._digest: Digest | None = None

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        word = get_word(action)
        if isinstance(word, Announcement):
            data = self._make_false(word.peer)
            self._digest = self._blobs.put(data)
            return [
                Deed(with_word(action, msgspec.structs.replace(word, payload=self._digest, payload_bytes=len(data))))
            ]
        if isinstance(action, Serve) and self._digest is not None:
            return [Deed(action), Deed(Serve(self._digest))]
        return [Deed(action)]


class Thief(Honest):
    """Announces the digest that another announced, the first that it hears of."""

    def __init__(self) -> None:
        self._held: tuple[Publish, Announcement] | None = None
        self._loot: Announcement | None = None

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """See Honest."""
        word = get_heard(event)
        is_newer = self._loot is None or (isinstance(word, Announcement) and word.round > self._loot.round)
        if isinstance(word, Announcement) and is_newer:
            self._loot = word
        return event

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """See Honest."""
        deeds = super().act(actions)
        if self._held and self._loot and self._held[1].round == self._loot.round:
            (action, own), loot = self._held, self._loot
            stolen = msgspec.structs.replace(own, payload=loot.payload, payload_bytes=loot.payload_bytes)
            self._held = None
            deeds.append(Deed(with_word(action, stolen)))
        return deeds

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        word = get_word(action)
        if isinstance(action, Publish) and isinstance(word, Announcement):
            self._held = (action, word)
            return []
        return [Deed(action)]


# --- as an evaluator -------------------------------------------------------------------------------------------------


class Liar(Honest):
    """Reports the opposite of what it measured."""

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """See Honest."""
        if isinstance(event, Scored):
            return msgspec.structs.replace(event, contributions=attacks.lie(event.contributions))
        return event


class Lazy(Honest):
    """Measures nothing: says that all updates are worth the same."""

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """See Honest."""
        if isinstance(event, Scored):
            return msgspec.structs.replace(event, contributions=(Contribution(1),) * len(event.contributions))
        return event


class TwoFaced(Honest):
    """Commits to its vector before one half of its peers, and to nonsense before the others."""

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        word = get_word(action)
        if isinstance(word, ScoreCommit):
            nonsense = compute_digest(b"nonsense" + word.commitment)
            other = msgspec.structs.replace(word, commitment=nonsense)
            return [Deed(action, "even"), Deed(with_word(action, other), "odd")]
        return [Deed(action)]


class Silent(Honest):
    """Scores nothing, proposes nothing, signs nothing; trains and announces as others do."""

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        is_duty = isinstance(get_word(action), ScoreCommit | ScoreReveal | Proposal | Attestation)
        return [] if is_duty or isinstance(action, ScoreUpdates) else [Deed(action)]


class LateCommitter(Honest):
    """Holds its commitment back until it has to reveal."""

    def __init__(self) -> None:
        self._held: AnyAction | None = None

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        word = get_word(action)
        if isinstance(word, ScoreCommit):
            self._held = action
            return []
        if isinstance(word, ScoreReveal) and self._held is not None:
            held, self._held = self._held, None
            return [Deed(held), Deed(action)]
        return [Deed(action)]


class LateRevealer(Honest):
    """Holds its vector back until it has heard a proposal, which shows everybody else's."""

    def __init__(self) -> None:
        self._held: AnyAction | None = None
        self._is_heard = False

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """See Honest."""
        self._is_heard = isinstance(get_heard(event), Proposal)
        return event

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """See Honest."""
        deeds = super().act(actions)
        if self._is_heard and self._held is not None:
            held, self._held = self._held, None
            deeds.append(Deed(held))
        return deeds

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        if isinstance(get_word(action), ScoreReveal):
            self._held = action
            return []
        return [Deed(action)]


class Colluder(Honest):
    """Praises its own and its friends' updates and damns all others."""

    def __init__(self) -> None:
        self.friends: set[PeerId] = set()
        """All who ever showed the mark."""
        self._praised: dict[Digest, Round] = {}
        """Payloads of the cabal, of its newest rounds: friends announce before it and after it."""
        self._asked: dict[int | None, tuple[Digest, ...]] = {}

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """See Honest."""
        word = get_heard(event)
        if isinstance(word, Announcement) and word.num_tokens == CABAL_TOKENS:
            self.friends.add(word.peer)
            self._praised[word.payload] = word.round
        if isinstance(event, Scored) and event.shard in self._asked:
            asked = self._asked.pop(event.shard)
            told = self._judge([payload in self._praised for payload in asked], event.contributions)
            return msgspec.structs.replace(event, contributions=told)
        return event

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        word = get_word(action)
        if isinstance(word, Announcement):
            newest = {payload: round for payload, round in self._praised.items() if round >= word.round}
            self._praised = {**newest, word.payload: word.round}
            return [Deed(with_word(action, msgspec.structs.replace(word, num_tokens=CABAL_TOKENS)))]
        if isinstance(action, ScoreUpdates):
            self._asked[action.shard] = tuple(item.payload for item in action.updates)
        return [Deed(action)]

    def _judge(self, are_friends: Sequence[bool], measured: Sequence[Contribution]) -> tuple[Contribution, ...]:
        best = max(1, *(abs(value) for value in measured)) * PRAISE
        return tuple(
            Contribution(best if is_friend else -abs(value))
            for is_friend, value in zip(are_friends, measured, strict=True)
        )


class Overpayer(Colluder):
    """Pays a round's whole reward to its friends when it proposes, and signs whatever a friend proposes.

    Its core proves such a proposal wrong and signs nothing; so it signs and, with a quorum of friends, aggregates on
    its own account. A shard pays nobody: there it only praises.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self._config = config
        self._roster: Roster | None = None
        self._proposal: Proposal | None = None
        self._attestations: dict[MemberIndex, Attestation] = {}
        self._pending: list[AnyAction] = []

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """See Honest."""
        if isinstance(event, RosterChanged):
            self._roster = event.roster
        word = get_heard(event)
        if isinstance(word, Proposal) and isinstance(event, Received) and event.envelope.author in self.friends:
            self._proposal, self._attestations = word, {}
            self._pending.append(Sign(word.round, proposal_message(self._config.chain, word)))
        if isinstance(word, Attestation):
            self._collect(word)
        return super().hear(event)

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """See Honest."""
        deeds = super().act(actions)
        pending, self._pending = self._pending, []
        return deeds + [Deed(action) for action in pending]

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        if isinstance(action, Publish) and isinstance(action.message, Proposal) and self._roster is not None:
            return [Deed(Publish(self._overpay(action.message, self._roster), action.topic))]
        return super().do(action)

    def _overpay(self, proposal: Proposal, roster: Roster) -> Proposal:
        members = [get_member(roster, peer) for peer in sorted(self.friends)]
        leaves = pay_only({member.index for member in members if member}, proposal.leaves)
        return msgspec.structs.replace(proposal, leaves=leaves, root=merkle.compute_root(from_wire(leaves)).digest)

    def _collect(self, attestation: Attestation) -> None:
        proposal, roster = self._proposal, self._roster
        if proposal is None or roster is None or attestation.message != proposal_message(self._config.chain, proposal):
            return
        self._attestations[attestation.member] = attestation
        signed = self._attestations
        if len(signed) == compute_quorum(len(roster.committee)):
            absent = tuple(sorted(index for index in roster.committee if index not in signed))
            signatures = tuple(signed[index] for index in sorted(signed))
            self._pending.append(Aggregate(proposal.round, attestation.message, signatures, absent))


class Splitter(Honest):
    """As first-ranked makes two right proposals (of all reveals, and of all but one) and tells each to one half; signs
    both, and so does any other splitter on the committee. Plays in small networks only."""

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config
        self._me: PeerId | None = None
        self._roster: Roster | None = None
        self._head: Proposal | None = None
        self._first: Publish | None = None
        """The core's own proposal, held until the second one has its base."""
        self._second: Proposal | None = None
        self._heard: tuple[Round, Digest] | None = None
        """What the core signs: the first proposal of a round."""
        self._signed: set[Digest] = set()
        """What this filter signs."""
        self._pending: list[Deed] = []

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """See Honest."""
        match event:
            case RosterChanged(roster=roster):
                self._roster = roster
            case Merged(request=request, new_base=new_base):
                if self._second and self._second.draft_digest == request:
                    self._tell(msgspec.structs.replace(self._second, new_base=new_base))
            case Received(message=Proposal() as proposal):
                message = proposal_message(self._config.chain, proposal)
                if self._heard is None or self._heard[0] < proposal.round:
                    self._heard = (proposal.round, message)
                elif self._heard != (proposal.round, message):
                    self._sign(proposal.round, message)
            case Signed(round=round, message=message, signature=signature) if message in self._signed:
                member = get_member(self._roster, self._me) if self._roster and self._me else None
                if member is not None:
                    attestation = Attestation(round, member.index, message, signature)
                    self._pending.append(Deed(Publish(attestation), "odd"))
            case _:
                pass
        return event

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """See Honest."""
        deeds = super().act(actions)
        pending, self._pending = self._pending, []
        return deeds + pending

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        match action:
            case Train(maker=maker):
                self._me = maker
            case Persist(durable=durable):
                self._head = durable.head.proposal if durable.head else None
            case Publish(message=Proposal() as proposal, topic=topic) if topic == EVERYBODY:
                return self._split(action, proposal)
            case _:
                pass
        return [Deed(action)]

    def _split(self, action: Publish, first: Proposal) -> list[Deed]:
        """The first proposal for one half; the second waits for its base, where one reveal can be spared."""
        roster, reveals = self._roster, first.reveals[:-1]
        if roster is None or len(reveals) < compute_quorum(len(roster.committee)):
            return [Deed(action, "even")]
        announced = {
            update.payload: Announcement(first.round, update.peer, first.base, update.payload, 0, 0)
            for update in first.updates
        }
        try:
            draft = draft_proposal(self._config, roster, self._head, first.round, first.base, reveals, announced)
        except Reject:
            return [Deed(action, "even")]  # what one reveal alone left out is not known here
        self._second = draft
        merge = merge_request(draft)
        if merge is not None:
            return [Deed(action, "even"), Deed(merge)]
        self._tell(msgspec.structs.replace(draft, new_base=draft.base))
        return [Deed(action, "even")]

    def _tell(self, proposal: Proposal) -> None:
        self._second = None
        self._pending.append(Deed(Publish(proposal), "odd"))
        self._sign(proposal.round, proposal_message(self._config.chain, proposal))

    def _sign(self, round: Round, message: Digest) -> None:
        if message not in self._signed:
            self._signed = {*sorted(self._signed)[-SIGNED_MAX:], message}
            self._pending.append(Deed(Sign(round, message)))


# --- as a neighbour --------------------------------------------------------------------------------------------------


class Eclipser(Honest):
    """Keeps its words from one victim, the newest member, and tells it nothing but its own when asked."""

    def __init__(self) -> None:
        self._victim: frozenset[PeerId] = frozenset()
        self._tokens: set[int] = set()

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """See Honest."""
        if isinstance(event, RosterChanged):
            self._victim = frozenset(member.peer for member in event.roster.members[-1:])
        if isinstance(event, SyncAsked) and event.peer in self._victim:
            self._tokens.add(event.token)
        return event

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        if isinstance(action, AnswerSync) and action.token in self._tokens:
            self._tokens.discard(action.token)
            return [Deed(AnswerSync(action.token, SyncReply((), None)))]
        return [Deed(action, but=self._victim)]


class Spammer(Honest):
    """Floods everybody with well-formed nonsense: other updates, other rounds, other members' duties, presences."""

    def __init__(self) -> None:
        self._me: PeerId | None = None
        self._roster: Roster | None = None
        self._last: Announcement | None = None
        self._count = 0

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """See Honest."""
        if isinstance(event, RosterChanged):
            self._roster = event.roster
        return event

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        word = get_word(action)
        if isinstance(word, Announcement):
            self._me, self._last = word.peer, word
        flood = self._make_flood() if isinstance(action, SetTimer) else ()
        return [Deed(action), *(Deed(Publish(nonsense)) for nonsense in flood)]

    def _make_flood(self) -> Iterable[Word | Presence]:
        member = get_member(self._roster, self._me) if self._roster and self._me else None
        if self._last is None or self._roster is None or member is None:
            return
        round, index = self._last.round, member.index
        for number in range(FLOOD_MESSAGES):
            self._count += 1
            digest = compute_digest(self._count.to_bytes(8, "big"))
            match number % 6:
                case 0:
                    yield msgspec.structs.replace(self._last, payload=digest)
                case 1:
                    yield msgspec.structs.replace(self._last, payload=digest, round=Round(round + 1))
                case 2:
                    yield ScoreCommit(round, index, digest)
                case 3:
                    scores = tuple(Score(compute_digest(digest + bytes([i])), Contribution(1)) for i in range(64))
                    yield ScoreReveal(round, index, digest, tuple(sorted(scores, key=lambda score: score.payload)))
                case 4:
                    yield Presence(member.peer, (digest,) * 64, 0, 1, 60_000, self._count)
                case _:
                    yield Proposal(
                        round=round,
                        proposer=index,
                        epoch=self._roster.epoch,
                        nonce=self._roster.nonce,
                        base=self._last.base,
                        new_base=digest,
                        prev_root=digest,
                        root=digest,
                        updates=(),
                        reveals=(),
                        leaves=(),
                    )


class Untimely(Honest):
    """Announces for the next round and a far one as well, and repeats what it announced in the last."""

    def __init__(self) -> None:
        self._last: AnyAction | None = None

    def do(self, action: AnyAction) -> list[Deed]:
        """See Honest."""
        word = get_word(action)
        if not isinstance(word, Announcement):
            return [Deed(action)]
        later = [msgspec.structs.replace(word, round=Round(word.round + ahead)) for ahead in (1, FAR_ROUNDS)]
        said = [self._last] if self._last is not None else []
        self._last = action
        return [Deed(old) for old in (*said, action, *(with_word(action, word) for word in later))]


# --- tools -----------------------------------------------------------------------------------------------------------


def get_word(action: AnyAction) -> Word | Certificate | Aside | None:
    """What an action says, be it to a shard or to all; None: it is no message."""
    return _unwrap(action.message) if isinstance(action, Publish) else None


def with_word(action: AnyAction, word: Word) -> Publish:
    """The same Publish, to the same hearers, of another word."""
    assert isinstance(action, Publish), "asked for a message's other form"
    message = action.message
    wrapped = msgspec.structs.replace(message, message=word) if isinstance(message, ShardMessage) else word
    return msgspec.structs.replace(action, message=wrapped)


def get_heard(event: AnyEvent) -> Word | Certificate | Aside | None:
    """What was heard, be it of a shard or of all; None: it is no message."""
    return _unwrap(event.message) if isinstance(event, Received) else None


def pay_only(friends: set[MemberIndex], leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """The leaves with the round's reward paid to `friends` in equal parts, the first getting what is left over.

    The sums stay as they were, so the contract has nothing to refuse.
    """
    payees = sorted(friends & set(range(len(leaves))))
    if not payees:
        return tuple(leaves)
    total = sum(wei_from_wire(leaf.reward_wei) for leaf in leaves)
    part, rest = divmod(total, len(payees))
    paid = {index: part + (rest if index == payees[0] else 0) for index in payees}
    return tuple(_repay(leaf, paid.get(MemberIndex(index), 0)) for index, leaf in enumerate(leaves))


def _repay(leaf: Leaf, reward_wei: int) -> Leaf:
    before = wei_from_wire(leaf.cumulative_wei) - wei_from_wire(leaf.reward_wei)
    return Leaf(wei_to_wire(Wei(before + reward_wei)), wei_to_wire(Wei(reward_wei)), leaf.contribution)


def _unwrap(message: Message) -> Word | Certificate | Aside:
    return message.message if isinstance(message, ShardMessage) else message
