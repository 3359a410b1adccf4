"""The whole interface of a peer on one page: what can happen to it, and what it can ask its driver to do.

    Peer.handle(event, now_ms) -> list[Action]

The driver carries out actions in the order in which they come. It has checked every signature, and every blob against
its digest and its format, before the core hears of it; the core checks meaning. Both are msgspec structs, so that an
event log is a file of MessagePack and replays anywhere.
"""

import msgspec

from p2pfm.messages import (
    Attestation,
    Certificate,
    DeclaredPrivacy,
    Envelope,
    Message,
    Proposal,
    Service,
    SyncReply,
    SyncRequest,
)
from p2pfm.settlement.ledger import Roster, SettledRound
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, Weight


class Event(msgspec.Struct, frozen=True, array_like=True):
    """Base of what happens to a peer."""


class Action(msgspec.Struct, frozen=True, array_like=True):
    """Base of what a peer asks for."""


# --- durable state


class Durable(msgspec.Struct, frozen=True, array_like=True):
    """What a peer must find again after it was stopped at any instruction."""

    base: Digest
    """The last certified base (before round 0: the initial adapter)."""
    residual: Digest | None
    """Blob of the error-feedback residual; None: nothing left out yet."""
    head: Certificate | None
    """The newest certificate."""
    signed_round: int
    """The last round in which this member signed a proposal: it signs at most one a round."""
    announced_round: int
    """The last round in which this peer announced an update: it commits to at most one a round."""
    pending_residual: Digest | None
    """The residual that holds once the announced update is merged."""
    announced_payload: Digest | None
    signed_shard_round: int = -1
    """The same as `signed_round` for the proposals of shards."""


# --- events


class Tick(Event, frozen=True, tag="tick"):
    """A timer that the peer set has passed."""


class RosterChanged(Event, frozen=True, tag="roster"):
    """The chain's registry or committee, as the driver read it."""

    roster: Roster


class SettledChanged(Event, frozen=True, tag="settled"):
    """The newest round that the chain has accepted and not voided; None: there is none (any more)."""

    settled: SettledRound | None


class Received(Event, frozen=True, tag="received"):
    """A gossip message; `envelope.author` is proven, `message` is its decoded body."""

    envelope: Envelope
    message: Message


class Trained(Event, frozen=True, tag="trained"):
    """Local work is done: the payload and the next residual lie in the blob store."""

    round: Round
    base: Digest
    """The base it started from: a result for another base is stale."""
    payload: Digest
    payload_bytes: int
    num_tokens: int
    residual: Digest
    loss_nano: int | None
    """Mean training loss [nano-nats/token], for people; None where privacy forbids to tell."""
    privacy: DeclaredPrivacy | None = None


class Fetched(Event, frozen=True, tag="fetched"):
    """A blob has come, matches its digest, and is well-formed for its kind."""

    digest: Digest
    maker: PeerId | None = None
    """Who a payload's first bytes name; None for a base, which has no maker."""


class FetchFailed(Event, frozen=True, tag="fetch_failed"):
    """No provider gave the blob (`is_malformed` False), or its bytes match the digest but are not a valid payload."""

    digest: Digest
    is_malformed: bool


class Scored(Event, frozen=True, tag="scored"):
    """Contributions of a round's updates, in the order asked; `salt` is 32 fresh secret bytes."""

    round: Round
    contributions: tuple[Contribution, ...]
    salt: bytes
    proofs: tuple[bool, ...] = ()
    """Whether each update passed its proof of computation, in the same order; empty: none was asked for."""
    shard: int | None = None
    """As in the question."""
    served: tuple[Service, ...] = ()
    """What replicas are due for the `served_epoch` asked for (`serving.receipts.list_services`)."""


class Merged(Event, frozen=True, tag="merged"):
    """What was merged lies in the blob store."""

    request: Digest
    new_base: Digest
    """After `Condense`: the shard's payload."""


class Signed(Event, frozen=True, tag="signed"):
    """This member's BLS signature of a proposal's message."""

    round: Round
    message: Digest
    signature: bytes


class Aggregated(Event, frozen=True, tag="aggregated"):
    """Attestations of one message, made into one signature."""

    round: Round
    message: Digest
    absent: tuple[MemberIndex, ...]
    signature: bytes


class Evaluated(Event, frozen=True, tag="evaluated"):
    """Held-out loss at a base, for reports [nano-nats/token]."""

    round: Round
    loss_nano: int


class SyncAsked(Event, frozen=True, tag="sync_asked"):
    """A peer asks what it lacks; answer with `AnswerSync` and the same token."""

    peer: PeerId
    request: SyncRequest
    token: int


class SyncAnswered(Event, frozen=True, tag="sync_answered"):
    """A peer's answer. The driver has checked the head's signature and delivers the envelopes as `Received`."""

    peer: PeerId
    head: Certificate | None


class Rewound(Event, frozen=True, tag="rewound"):
    """What a `Rewind` asked for, from this peer's own disk."""

    head: Certificate | None
    """Of the round that was asked for; None: no round was, the story begins anew."""
    base: Digest
    """The base before round 0."""


class PeersChanged(Event, frozen=True, tag="peers"):
    """Peers that are connected now, sorted."""

    peers: tuple[PeerId, ...]


# --- actions


class SetTimer(Action, frozen=True, tag="set_timer"):
    """Deliver a `Tick` at this time; a new timer replaces the old one."""

    at_ms: Millis


class Persist(Action, frozen=True, tag="persist"):
    """Make this durable before the next action is carried out."""

    durable: Durable


class Train(Action, frozen=True, tag="train"):
    """Local steps from `base`, error feedback from `residual`, compression; answer: `Trained`.

    The payload begins with its `maker`, so that nobody is paid for announcing another's digest.
    """

    round: Round
    maker: PeerId
    base: Digest
    residual: Digest | None


class Publish(Action, frozen=True, tag="publish"):
    """Sign and gossip a message; the driver also delivers it back as `Received`."""

    message: Message
    topic: str = "all"
    """Who hears it (`protocol.shards`)."""
    hearers: tuple[PeerId, ...] = ()
    """Who hears it for certain, where the speaker may be connected to nobody who does."""


class Listen(Action, frozen=True, tag="listen"):
    """From now on hear these topics beside "all", and no others."""

    topics: tuple[str, ...]
    mates: tuple[tuple[PeerId, ...], ...] = ()
    """By topic: who speaks there; of each some are to be connected."""


class Serve(Action, frozen=True, tag="serve"):
    """From now on this blob may be given to whoever asks (a payload: only after TRAIN has closed)."""

    digest: Digest


class Fetch(Action, frozen=True, tag="fetch"):
    """Get a blob from these providers, the first first; answer: `Fetched` or `FetchFailed`."""

    digest: Digest
    kind: str
    """"payload" or "base": what its bytes must be."""
    bytes_max: int
    providers: tuple[PeerId, ...]


class Weighted(msgspec.Struct, frozen=True, array_like=True):
    """An update by its payload, with its weight in the scoring game or the merge."""

    payload: Digest
    weight: Weight


class Remembered(msgspec.Struct, frozen=True, array_like=True):
    """An update of an earlier round."""

    payload: Digest
    is_paid: bool
    """Its round was certified with it. What it says counts against its own maker, too; else only against others."""


class ScoreUpdates(Action, frozen=True, tag="score"):
    """Measure the contribution of every update to the round's game; answer: `Scored`.

    Of updates that are alike the first in `updates` counts. What an update repeats of the last aggregate (`base` minus
    `previous`) or of `earlier` ones earns nothing.
    """

    round: Round
    base: Digest
    previous: Digest | None
    """None: there is none."""
    updates: tuple[Weighted, ...]
    """In the order in which they were announced here."""
    earlier: tuple[Remembered, ...] = ()
    """The newest first."""
    shard: int | None = None
    """Whose round it is; None: that of the whole network. Returned with the answer."""
    served_epoch: int | None = None
    """Settlement epoch whose receipts this round pays, if it does."""
    is_compared: bool = True
    """False: the updates are shards', of which none is taken for a copy, of another or of what was before."""


class Merge(Action, frozen=True, tag="merge"):
    """base + sum(weight * clipped update), deterministic; answer: `Merged` with the same `request`."""

    request: Digest
    base: Digest
    updates: tuple[Weighted, ...]


class Condense(Action, frozen=True, tag="condense"):
    """The same of a shard, compressed (merged minus base) into a payload of this maker; answer: `Merged`."""

    request: Digest
    base: Digest
    updates: tuple[Weighted, ...]
    maker: PeerId


class Sign(Action, frozen=True, tag="sign"):
    """Sign a proposal's message with the BLS key; answer: `Signed`."""

    round: Round
    message: Digest


class Aggregate(Action, frozen=True, tag="aggregate"):
    """Make one signature of these; answer: `Aggregated`."""

    round: Round
    message: Digest
    attestations: tuple[Attestation, ...]
    absent: tuple[MemberIndex, ...]


class Adopt(Action, frozen=True, tag="adopt"):
    """A certified base: serving swaps to it."""

    round: Round
    base: Digest


class Rewind(Action, frozen=True, tag="rewind"):
    """Look up the certificate of the chain's newest round on disk, since another one is held.

    Answer: `Rewound`, or none if it is not there (then a neighbour has it).
    """

    round: Round
    """The round to go to; -1: to before round 0."""
    root: Digest


class Evaluate(Action, frozen=True, tag="evaluate"):
    """Held-out loss at a base, when there is time; answer: `Evaluated`."""

    round: Round
    base: Digest


class Settle(Action, frozen=True, tag="settle"):
    """Bring a certificate on chain, whoever does it first; keep trying. `rank` 0 goes first."""

    certificate: Certificate
    rank: int
    shards: tuple[Proposal, ...] = ()
    """What its shards certified, as far as it is known here: auditors find it beside the proposal."""


class AskSync(Action, frozen=True, tag="ask_sync"):
    """Anti-entropy with one peer; answer: `SyncAnswered` and `Received`s."""

    peer: PeerId
    request: SyncRequest


class AnswerSync(Action, frozen=True, tag="answer_sync"):
    """The answer to a `SyncAsked`."""

    token: int
    reply: SyncReply


class Blame(Action, frozen=True, tag="blame"):
    """A peer broke a rule that honest peers never break."""

    peer: PeerId
    reason: str


class Accuse(Action, frozen=True, tag="accuse"):
    """A member signed two proposals of one round: evidence that the chain slashes for."""

    member: MemberIndex
    first: Proposal
    first_signature: bytes
    second: Proposal
    second_signature: bytes


class Note(Action, frozen=True, tag="note"):
    """Something an operator wants to see (phase changes, a void round and why)."""

    round: Round
    text: str


AnyEvent = (
    Tick
    | RosterChanged
    | SettledChanged
    | Received
    | Trained
    | Fetched
    | FetchFailed
    | Scored
    | Merged
    | Signed
    | Aggregated
    | Evaluated
    | SyncAsked
    | SyncAnswered
    | Rewound
    | PeersChanged
)
AnyAction = (
    SetTimer
    | Persist
    | Train
    | Publish
    | Listen
    | Serve
    | Fetch
    | ScoreUpdates
    | Merge
    | Condense
    | Sign
    | Aggregate
    | Adopt
    | Rewind
    | Evaluate
    | Settle
    | AskSync
    | AnswerSync
    | Blame
    | Accuse
    | Note
)
