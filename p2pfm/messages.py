"""Every wire struct, its bytes, and what is signed. Nothing else in the house knows bytes.

MessagePack arrays (msgspec, `array_like`), tagged by the struct's name: any MessagePack library reads them. Decoding is
validation: a wrong type, an unknown tag, a digest of another length or a message over its limit raises `Reject`.
Signatures are checked by the driver before the core hears of a message.
"""

import itertools
from functools import cached_property
from typing import Annotated, TypeVar, get_args

import msgspec

from p2pfm.errors import Reject
from p2pfm.types import WEIGHT_ONE, Contribution, Digest, MemberIndex, PeerId, Round, Wei, Weight, compute_digest

SIGNING_DOMAIN = b"p2pfm/2 envelope"
LIST_MAX = 4096
"""No list in any message may be longer, but one with an entry a registered peer."""
MEMBERS_MAX = 128 * 128
"""Two levels of shards reach this many peers."""

RECEIPTS_MAX = 512
"""Gateways in one report: more peers than one shard holds."""

SERVED_MAX = 128
"""Replicas paid for serving by one round, those with the largest shares: it bounds what a committee reveals."""

LOGPROBS_MAX = 20
"""Alternatives a token that a client may ask for: OpenAI's bound."""

STATE_BYTES_MAX = 32_768
"""What a gateway may keep with a stream: a model's name, and stop strings."""

MICRO = 10**6
PICO = 10**12
EPSILON_MICRO_MAX = 2**53
"""Epsilon 9e9: a larger one says nothing, and the bound keeps it exact in any language's JSON."""

Bytes32 = Annotated[Digest, msgspec.Meta(min_length=32, max_length=32)]
Salt = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
BlsSignature = Annotated[bytes, msgspec.Meta(min_length=96, max_length=96)]
Name = Annotated[PeerId, msgspec.Meta(min_length=1, max_length=128)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
RoundNumber = Annotated[Round, msgspec.Meta(ge=0, le=2**53)]
Index = Annotated[MemberIndex, msgspec.Meta(ge=0, le=2**31)]
NanoNats = Annotated[Contribution, msgspec.Meta(ge=-(2**60), le=2**60)]
WireWei = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
"""Wei as 16 bytes, big endian: MessagePack integers end at 64 bits, 18.4 tokens."""
NO_WEI = bytes(16)


def wei_to_wire(amount: Wei) -> bytes:
    """16 bytes, big endian."""
    return amount.to_bytes(16, "big")


def wei_from_wire(data: bytes) -> Wei:
    """Inverse of `wei_to_wire`."""
    return Wei(int.from_bytes(data, "big"))


class Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of what travels."""


class DeclaredPrivacy(Wire, frozen=True):
    """What a peer says of its own training so far: (epsilon, delta)-differentially private for each of its samples.

    Nobody can check it: it tells the peer's own users what they may rely on, and others how noisy its updates are.
    """

    epsilon_micro: Annotated[int, msgspec.Meta(ge=1, le=EPSILON_MICRO_MAX)]
    """All announced updates together, this one included [millionths], rounded up."""
    delta_pico: Annotated[int, msgspec.Meta(ge=1, le=PICO)]
    """[millionths of a millionth], rounded up."""


class Announcement(Wire, frozen=True, tag="announcement"):
    """A peer's commitment to its update of a round. The payload itself is served only after TRAIN closes."""

    round: RoundNumber
    peer: Name
    base: Bytes32
    payload: Bytes32
    payload_bytes: Count
    num_tokens: Count
    privacy: DeclaredPrivacy | None = None
    """None: no differential privacy."""


class ScoreCommit(Wire, frozen=True, tag="commit"):
    """Hash of a member's contributions, so that no evaluator can copy another."""

    round: RoundNumber
    member: Index
    commitment: Bytes32


class Score(Wire, frozen=True):
    """One update's contribution as one member measured it."""

    payload: Bytes32
    contribution: NanoNats


class Service(Wire, frozen=True):
    """A replica's part of what is paid for serving, as one member sees its receipts (`serving.receipts`)."""

    member: Index
    share: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    """[parts of a billion]."""


class ScoreReveal(Wire, frozen=True, tag="reveal", dict=True):
    """What the commitment was of; scores sorted by payload digest, services by member."""

    round: RoundNumber
    member: Index
    salt: Salt
    scores: Annotated[tuple[Score, ...], msgspec.Meta(max_length=LIST_MAX)]
    served: Annotated[tuple[Service, ...], msgspec.Meta(max_length=SERVED_MAX)] = ()
    """In rounds that end a settlement epoch."""

    @cached_property
    def commitment(self) -> Digest:
        """The hash that a member gossips before its scores."""
        return compute_digest(b"p2pfm/2 commit" + encode(self))

    @cached_property
    def disorder(self) -> str:
        """Which rule of a vector's form it breaks; empty: none."""
        if any(a.payload >= b.payload for a, b in itertools.pairwise(self.scores)):
            return "scores are not sorted by payload digest, or one payload is scored twice"
        if any(a.member >= b.member for a, b in itertools.pairwise(self.served)):
            return "services are not sorted by member, or one member is named twice"
        if sum(service.share for service in self.served) > WEIGHT_ONE:
            return f"services add up to more than {WEIGHT_ONE} billionths"
        return ""


class IncludedUpdate(Wire, frozen=True):
    """An update in a proposal: its median contribution and its merge weight (they sum to WEIGHT_ONE at most)."""

    peer: Name
    member: Index
    payload: Bytes32
    contribution: NanoNats
    weight: Annotated[Weight, msgspec.Meta(ge=0, le=10**9)]


class Leaf(Wire, frozen=True):
    """A member's leaf in the rewards tree; the tuple's position is the registry index.

    `contribution` is the sum over the current epoch so far, this round included.
    """

    cumulative_wei: WireWei
    reward_wei: WireWei
    contribution: NanoNats
    served_wei: WireWei = NO_WEI
    """Allotted for serving so far, out of another pool."""


class Proposal(Wire, frozen=True, tag="proposal", dict=True):
    """All that a certificate certifies; everyone recomputes it. Its digest is the data hash on chain."""

    round: RoundNumber
    proposer: Index
    epoch: Count
    """The contract's committee epoch at which members sign."""
    nonce: Count
    """The contract's restart nonce."""
    base: Bytes32
    """The base that the updates start from."""
    new_base: Bytes32
    prev_root: Bytes32
    root: Bytes32
    updates: Annotated[tuple[IncludedUpdate, ...], msgspec.Meta(max_length=LIST_MAX)]
    reveals: Annotated[tuple[ScoreReveal, ...], msgspec.Meta(max_length=LIST_MAX)]
    leaves: Annotated[tuple[Leaf, ...], msgspec.Meta(max_length=MEMBERS_MAX)]
    shards: Annotated[tuple[Bytes32, ...], msgspec.Meta(max_length=LIST_MAX)] = ()
    """Where `updates` are shards': by place there, the digest of the proposal that the shard certified."""

    @cached_property
    def digest(self) -> Digest:
        """SHA-256 of the proposal's bytes."""
        return compute_digest(encode(self))

    @cached_property
    def payloads(self) -> frozenset[Digest]:
        """Of all included updates."""
        return frozenset(update.payload for update in self.updates)

    @cached_property
    def weights(self) -> dict[Digest, Weight]:
        """By payload."""
        return {update.payload: update.weight for update in self.updates}

    @cached_property
    def draft_digest(self) -> Digest:
        """What a proposal is known by before its new base is: the same for its proposer and whoever recomputes it."""
        return compute_digest(encode(msgspec.structs.replace(self, new_base=NO_DIGEST)))


class Attestation(Wire, frozen=True, tag="attestation"):
    """A member's BLS signature of `settlement.rewards.round_message` of one proposal."""

    round: RoundNumber
    member: Index
    message: Bytes32
    signature: BlsSignature


class Certificate(Wire, frozen=True, tag="certificate"):
    """A proposal and the aggregated signature of more than 2/3 of its committee."""

    proposal: Proposal
    absent: Annotated[tuple[Index, ...], msgspec.Meta(max_length=LIST_MAX)]
    """Committee members who did not sign, sorted by registry index."""
    signature: BlsSignature


Word = Announcement | ScoreCommit | ScoreReveal | Proposal | Attestation
"""What a round is made of: each names its round."""


class ShardMessage(Wire, frozen=True, tag="shard"):
    """A word of a shard's own round, in a network of several (`protocol.shards`).

    A shard's certificate certifies a payload: its `new_base` names the shard's merged update, compressed.
    """

    shard: Index
    message: Word | Certificate


class Presence(Wire, frozen=True, tag="presence"):
    """What a node serves right now. Short-lived: routing forgets it after `ttl_ms`."""

    peer: Name
    versions: Annotated[tuple[Bytes32, ...], msgspec.Meta(max_length=64)]
    """Adapter digests that it can serve at once, newest first."""
    sessions: Count
    sessions_max: Count
    ttl_ms: Count
    sequence: Count
    """Grows with every record of one peer, so that an old one cannot be replayed over a new one."""
    waiting: Count = 0
    """Of its sessions, those that wait for their first token."""
    speed_milli: Count = 0
    """Tokens of one stream a second, lately [thousandths]; 0: not measured."""


class GenerateRequest(Wire, frozen=True, tag="generate"):
    """Continue a token stream. `emitted` is what the client already holds: the replica starts at that very position."""

    version: Bytes32
    prompt: Annotated[tuple[int, ...], msgspec.Meta(max_length=32_768)]
    emitted: Annotated[tuple[int, ...], msgspec.Meta(max_length=32_768)]
    tokens_max: Annotated[int, msgspec.Meta(ge=1, le=32_768)]
    temperature_milli: Annotated[int, msgspec.Meta(ge=0, le=100_000)]
    top_p_milli: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    seed: Count
    num_logprobs: Annotated[int, msgspec.Meta(ge=0, le=1 + LOGPROBS_MAX)]
    """0: none; 1 + k: that of each token, and of the k likeliest at its place."""


class Vouch(Wire, frozen=True, tag="vouch"):
    """A replica's answer: it gave the tokens from `start` on, the asker brought those before.

    Sent by an asker who wants it signed (a request); and, signed by the replica, part of a `CheatReport`.
    """

    claimed: GenerateRequest
    """Its `emitted` is the whole answer so far."""
    start: Count


class CheatReport(Wire, frozen=True, tag="cheat"):
    """A replica's own signature under an answer that the model does not give. Whoever hears it recomputes it."""

    replica: Name
    vouch: Vouch
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class Receipt(Wire, frozen=True, tag="receipt"):
    """A gateway's word about what a replica generated for it; the newest of a pair and epoch stands for all."""

    gateway: Name
    replica: Name
    epoch: Count
    number: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    """Counts a pair's receipts of an epoch."""
    answer: Bytes32
    """Digest of the request with all tokens of the answer, as a replica is asked to go on with it."""
    version: Bytes32
    num_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    """Of this answer, by this replica."""
    total_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    """Of the epoch so far, this answer included."""
    client: Bytes32
    """Digest of the client's API key name and the gateway's peer id; zeros: it has none."""


class ServiceReport(Wire, frozen=True, tag="service"):
    """What a replica shows of an epoch: the newest receipt of each gateway, as that gateway sealed it."""

    epoch: Count
    receipts: Annotated[tuple["Envelope", ...], msgspec.Meta(max_length=RECEIPTS_MAX)]


Aside = Presence | CheatReport | ServiceReport
"""Of serving: nothing in a round depends on them."""

Message = Word | Certificate | ShardMessage | Aside


class Envelope(Wire, frozen=True, dict=True):
    """A message with its author's Ed25519 signature: it can pass through strangers' hands."""

    author: Name
    body: Annotated[bytes, msgspec.Meta(max_length=1_000_000)]
    signature: Annotated[bytes, msgspec.Meta(max_length=64)]

    @cached_property
    def digest(self) -> Digest:
        """SHA-256 of the body: what the message is known by."""
        return compute_digest(self.body)


# Requests between two peers, one tagged union for all. Replies follow on the same stream.


class BlobRequest(Wire, frozen=True, tag="blob"):
    """Bytes [start, start + length) of a content-addressed blob."""

    digest: Bytes32
    start: Count
    length: Annotated[int, msgspec.Meta(ge=1, le=262_144)]


class BlobReply(Wire, frozen=True, tag="blob_reply"):
    """`total` 0: not held, or not served yet."""

    total: Count
    chunk: Annotated[bytes, msgspec.Meta(max_length=262_144)]


class SyncRequest(Wire, frozen=True, tag="sync"):
    """Anti-entropy: what I have of this round; tell me what I lack, and your newest certificate."""

    round: RoundNumber
    have: Annotated[tuple[Bytes32, ...], msgspec.Meta(max_length=LIST_MAX)]
    head_round: Annotated[int, msgspec.Meta(ge=-1, le=2**53)]


class SyncReply(Wire, frozen=True, tag="sync_reply"):
    """Envelopes the asker lacked; the head is the newest certificate, if newer than the asker's."""

    envelopes: Annotated[tuple[Envelope, ...], msgspec.Meta(max_length=LIST_MAX)]
    head: Certificate | None


class PeersRequest(Wire, frozen=True, tag="peers"):
    """Who else do you know? Tells the asker's own addresses, so that both learn."""

    addresses: Annotated[tuple[str, ...], msgspec.Meta(max_length=8)]


class PeersReply(Wire, frozen=True, tag="peers_reply"):
    """Multiaddresses (with /p2p/ID) of peers seen lately."""

    addresses: Annotated[tuple[str, ...], msgspec.Meta(max_length=256)]
    clock_ms: Count
    """The teller's wall clock [ms since 1970]: from the median of several a peer learns that its own is off."""


class TokenLogprobs(Wire, frozen=True):
    """Log-probabilities at one place, before temperature and top_p [millionths of a nat below 0]."""

    micro_nats: Count
    """Of the token that stands there: minus its log-probability."""
    likeliest: Annotated[tuple[tuple[Count, Count], ...], msgspec.Meta(max_length=LOGPROBS_MAX)]
    """(token, micro_nats), likeliest first."""


class TokenChunk(Wire, frozen=True, tag="tokens"):
    """Tokens from `position` of the generated text on; `finish`: "" while more come, else stop, length or error."""

    position: Count
    tokens: Annotated[tuple[int, ...], msgspec.Meta(max_length=4096)]
    finish: Annotated[str, msgspec.Meta(max_length=200)]
    logprobs: Annotated[tuple[TokenLogprobs, ...], msgspec.Meta(max_length=4096)] = ()
    """One a token where the request asks for them, else none."""


class CheckRequest(Wire, frozen=True, tag="check"):
    """Would the model have given these tokens? `claimed.emitted` is the whole answer that somebody claims."""

    claimed: GenerateRequest


class CheckReply(Wire, frozen=True, tag="check_reply"):
    """One entry a claimed token; none with a refusal."""

    gaps_micro: Annotated[tuple[Count, ...], msgspec.Meta(max_length=LIST_MAX)]
    """`serving.recheck.compute_gap`: how far the logits would have to move for it [millionths of a nat]."""
    micro_nats: Annotated[tuple[Count, ...], msgspec.Meta(max_length=LIST_MAX)]
    """Minus its log-probability, as in TokenLogprobs."""
    refusal: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """"": none; else busy, unknown_version, invalid or error, as in TokenChunk."""


class VouchReply(Wire, frozen=True, tag="vouch_reply"):
    """The replica's signature of the `Vouch` asked for (`signed_bytes`); empty: it does not remember such an answer."""

    signature: Annotated[bytes, msgspec.Meta(max_length=64)]


class ReceiptOffer(Wire, frozen=True, tag="receipt_offer"):
    """A sealed `Receipt` for the replica that earned it."""

    sealed: Envelope


class ReceiptReply(Wire, frozen=True, tag="receipt_reply"):
    """The replica's signature of the receipt's body (`signed_bytes`); empty: it takes none."""

    signature: Annotated[bytes, msgspec.Meta(max_length=64)]


class KeepStream(Wire, frozen=True, tag="keep_stream"):
    """A client's stream as its gateway holds it, for another gateway to go on with should this one die.

    Its name is `serving.keeping.compute_stream_id`: who knows it may have the stream.
    """

    nonce: Bytes32
    """Random, so that nobody guesses the name."""
    request: GenerateRequest
    """Its `emitted` is all that was generated so far."""
    state: Annotated[bytes, msgspec.Meta(max_length=STATE_BYTES_MAX)]
    """What the gateways' HTTP sides need of it; nobody else reads it."""


class ExtendStream(Wire, frozen=True, tag="extend_stream"):
    """New tokens of a stream that the asked one keeps, from `position` of the generated text on."""

    stream: Bytes32
    position: Count
    tokens: Annotated[tuple[int, ...], msgspec.Meta(max_length=32_768)]


class KeptReply(Wire, frozen=True, tag="kept_reply"):
    """Answer to both."""

    num_tokens: Annotated[int, msgspec.Meta(ge=-1, le=32_768)]
    """Of the stream, held now; -1: the stream is not kept here."""


class FindStream(Wire, frozen=True, tag="find_stream"):
    """Do you keep this stream?"""

    stream: Bytes32


class FoundReply(Wire, frozen=True, tag="found_reply"):
    """The stream, or None: not kept here."""

    kept: KeepStream | None


Request = (
    BlobRequest
    | SyncRequest
    | PeersRequest
    | GenerateRequest
    | CheckRequest
    | Vouch
    | KeepStream
    | ExtendStream
    | FindStream
    | ReceiptOffer
)
Reply = (
    BlobReply | SyncReply | PeersReply | TokenChunk | CheckReply | VouchReply | KeptReply | FoundReply | ReceiptReply
)

_TAGS = frozenset(str(kind.__struct_config__.tag).encode() for kind in (*get_args(Request), *get_args(Reply)))

T = TypeVar("T")

_message: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_envelope: msgspec.msgpack.Decoder[Envelope] = msgspec.msgpack.Decoder(Envelope)
_request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_receipt: msgspec.msgpack.Decoder[Receipt] = msgspec.msgpack.Decoder(Receipt)
_encoder = msgspec.msgpack.Encoder()


def encode(value: Wire) -> bytes:
    """The canonical bytes of a struct (one value has one encoding)."""
    return _encoder.encode(value)


def decode_message(data: bytes, bytes_max: int = 1_000_000) -> Message:
    """A gossip message.

    Raises:
        Reject: too long, not MessagePack, an unknown tag, or a field out of range.
    """
    return _decode(_message, data, bytes_max)


def decode_envelope(data: bytes, bytes_max: int = 1_000_000) -> Envelope:
    """A signed message; its signature is not checked here (that is the driver's door). Raises: Reject."""
    return _decode(_envelope, data, bytes_max)


def decode_request(data: bytes, bytes_max: int = 1_000_000) -> Request:
    """A request of another peer. Raises: Reject."""
    return _decode(_request, data, bytes_max)


def decode_reply(data: bytes, bytes_max: int = 8_000_000) -> Reply:
    """An answer of another peer. Raises: Reject."""
    return _decode(_reply, data, bytes_max)


def decode_receipt(data: bytes, bytes_max: int = 1_000) -> Receipt:
    """The body of a sealed receipt. Raises: Reject."""
    return _decode(_receipt, data, bytes_max)


def peek_tag(data: bytes) -> str:
    """The tag of an encoded request or reply, without decoding the rest; "other" where there is none.

    Only for counting: nothing but the tag is checked.
    """
    if len(data) < 2 or data[0] >> 4 != 0x9 or data[1] >> 5 != 0b101:
        return "other"
    tag = data[2 : 2 + (data[1] & 0x1F)]
    return tag.decode() if tag in _TAGS else "other"


def signed_bytes(network_id: Digest, author: PeerId, body: bytes) -> bytes:
    """What an envelope's Ed25519 signature covers: domain, network, author, body."""
    name = author.encode()
    return SIGNING_DOMAIN + network_id + len(name).to_bytes(2, "big") + name + body


def proposal_digest(proposal: Proposal) -> Digest:
    """The data hash on chain: SHA-256 of the proposal's bytes."""
    return proposal.digest


NO_DIGEST = Digest(bytes(32))
"""Stands for the new base while a proposal is a draft, and for the root before the first."""


def _decode(decoder: "msgspec.msgpack.Decoder[T]", data: bytes, bytes_max: int) -> T:
    if len(data) > bytes_max:
        raise Reject(f"expected at most {bytes_max} bytes, got {len(data)}")
    try:
        return decoder.decode(data)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Reject(f"not a p2pfm message: {error}") from error
