"""Laws of the wire: one value has one encoding, it comes back as it went, any MessagePack library reads it, and bytes
that are not ours only ever Reject."""

import contextlib
import importlib

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfm.errors import Reject
from p2pfm.messages import (
    Announcement,
    Attestation,
    BlobReply,
    BlobRequest,
    Certificate,
    CheatReport,
    CheckReply,
    CheckRequest,
    DeclaredPrivacy,
    Envelope,
    ExtendStream,
    FindStream,
    FoundReply,
    GenerateRequest,
    IncludedUpdate,
    KeepStream,
    KeptReply,
    Leaf,
    Message,
    PeersReply,
    PeersRequest,
    Presence,
    Proposal,
    ReceiptOffer,
    ReceiptReply,
    Reply,
    Request,
    Score,
    ScoreCommit,
    ScoreReveal,
    ServiceReport,
    SyncReply,
    SyncRequest,
    TokenChunk,
    TokenLogprobs,
    Vouch,
    VouchReply,
    Wire,
    decode_envelope,
    decode_message,
    decode_reply,
    decode_request,
    encode,
    proposal_digest,
    wei_from_wire,
    wei_to_wire,
)
from p2pfm.types import Wei

digests = st.binary(min_size=32, max_size=32)
names = st.text(min_size=1, max_size=64).filter(lambda text: text.isprintable())
rounds = st.integers(0, 2**53)
indices = st.integers(0, 2**31)
counts = st.integers(0, 2**63 - 1)
nanos = st.integers(-(2**60), 2**60)
wire_wei = st.binary(min_size=16, max_size=16)
bls = st.binary(min_size=96, max_size=96)
tokens = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)


def tuples_of(items: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(items, max_size=4).map(tuple)


scores = st.builds(Score, digests, nanos)
reveals = st.builds(ScoreReveal, rounds, indices, digests, tuples_of(scores))
updates = st.builds(IncludedUpdate, names, indices, digests, nanos, st.integers(0, 10**9))
leaves = st.builds(Leaf, wire_wei, wire_wei, nanos)
proposals = st.builds(
    Proposal,
    rounds,
    indices,
    counts,
    counts,
    digests,
    digests,
    digests,
    digests,
    tuples_of(updates),
    tuples_of(reveals),
    tuples_of(leaves),
)
certificates = st.builds(Certificate, proposals, tuples_of(indices), bls)
privacies = st.builds(DeclaredPrivacy, st.integers(1, 2**53), st.integers(1, 10**12))
envelopes = st.builds(Envelope, names, st.binary(max_size=200), st.binary(max_size=64))
generates = st.builds(
    GenerateRequest,
    digests,
    tokens,
    tokens,
    st.integers(1, 32_768),
    st.integers(0, 100_000),
    st.integers(1, 1000),
    counts,
    st.integers(0, 21),
)
vouches = st.builds(Vouch, generates, counts)
keeps = st.builds(KeepStream, digests, generates, st.binary(max_size=200))
messages = st.one_of(
    st.builds(Announcement, rounds, names, digests, digests, counts, counts, st.none() | privacies),
    st.builds(ScoreCommit, rounds, indices, digests),
    reveals,
    proposals,
    st.builds(Attestation, rounds, indices, digests, bls),
    certificates,
    st.builds(Presence, names, tuples_of(digests), counts, counts, counts, counts, counts, counts),
    st.builds(CheatReport, names, vouches, st.binary(min_size=64, max_size=64)),
    st.builds(ServiceReport, counts, tuples_of(envelopes)),
)
requests = st.one_of(
    st.builds(BlobRequest, digests, counts, st.integers(1, 262_144)),
    st.builds(SyncRequest, rounds, tuples_of(digests), st.integers(-1, 2**53)),
    st.builds(PeersRequest, tuples_of(names)),
    generates,
    st.builds(CheckRequest, generates),
    vouches,
    keeps,
    st.builds(ExtendStream, digests, counts, tokens),
    st.builds(FindStream, digests),
    st.builds(ReceiptOffer, envelopes),
)
logprobs = st.builds(TokenLogprobs, counts, tuples_of(st.tuples(counts, counts)))
replies = st.one_of(
    st.builds(BlobReply, counts, st.binary(max_size=200)),
    st.builds(SyncReply, tuples_of(envelopes), st.none() | certificates),
    st.builds(PeersReply, tuples_of(names), counts),
    st.builds(TokenChunk, counts, tokens, st.text(max_size=20), tuples_of(logprobs)),
    st.builds(CheckReply, tuples_of(counts), tuples_of(counts), st.text(max_size=20)),
    st.builds(VouchReply, st.binary(max_size=64)),
    st.builds(KeptReply, st.integers(-1, 32_768)),
    st.builds(FoundReply, st.none() | keeps),
    st.builds(ReceiptReply, st.binary(max_size=64)),
)

DECODERS = (decode_message, decode_envelope, decode_request, decode_reply)


@given(messages)
def test_a_message_comes_back_as_it_went(message: Message) -> None:
    assert decode_message(encode(message)) == message


@given(envelopes)
def test_an_envelope_comes_back_as_it_went(envelope: Envelope) -> None:
    assert decode_envelope(encode(envelope)) == envelope


@given(requests)
def test_a_request_comes_back_as_it_went(request: Request) -> None:
    assert decode_request(encode(request)) == request


@given(replies)
def test_a_reply_comes_back_as_it_went(reply: Reply) -> None:
    assert decode_reply(encode(reply)) == reply


@given(st.one_of(messages, requests, replies))
def test_any_messagepack_library_reads_our_bytes(value: Wire) -> None:
    read = msgpack.unpackb(encode(value), use_list=False, raw=False)
    assert read == as_plain(value)
    assert read[0] == type(value).__struct_config__.tag


@given(messages)
def test_another_library_writes_the_same_bytes(message: Message) -> None:
    assert msgpack.packb(as_plain(message), use_bin_type=True) == encode(message)


@given(st.binary(max_size=300))
def test_garbage_only_ever_rejects(data: bytes) -> None:
    for decode in DECODERS:
        try:
            value = decode(data)
        except Reject:
            continue
        # What decodes is one of ours after all: then its fields are in range and it has our encoding of them.
        assert decode(encode(value)) == value


@given(messages, st.data())
def test_a_damaged_message_rejects_or_is_another_message(message: Message, data: st.DataObject) -> None:
    body = bytearray(encode(message))
    position = data.draw(st.integers(0, len(body) - 1))
    body[position] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(Reject):
        decode_message(bytes(body))


@given(messages, st.integers(1, 20))
def test_a_cut_or_lengthened_message_rejects(message: Message, num_bytes: int) -> None:
    body = encode(message)
    for wrong in (body[: -min(num_bytes, len(body))], body + bytes(num_bytes)):
        with pytest.raises(Reject):
            decode_message(wrong)


@given(st.recursive(st.none() | st.integers(-(2**40), 2**40) | st.binary(max_size=40) | st.text(max_size=9), st.lists))
def test_other_messagepack_only_ever_rejects(value: object) -> None:
    data = msgpack.packb(value)
    for decode in DECODERS:
        with pytest.raises(Reject):
            decode(data)


def test_deep_nesting_rejects() -> None:
    for decode in DECODERS:
        with pytest.raises(Reject):
            decode(b"\x91" * 200_000 + b"\xc0")


def test_a_length_that_lies_rejects_without_allocating() -> None:
    for head in (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"):
        with pytest.raises(Reject):
            decode_message(b"\x94\xa8proposal" + head)


@pytest.mark.parametrize(
    "message",
    [
        Announcement(-1, "p", bytes(32), bytes(32), 0, 0),
        Announcement(0, "", bytes(32), bytes(32), 0, 0),
        Announcement(0, "p" * 129, bytes(32), bytes(32), 0, 0),
        Announcement(0, "p", bytes(31), bytes(32), 0, 0),
        Announcement(0, "p", bytes(32), bytes(32), -1, 0),
        ScoreReveal(0, 0, bytes(32), (Score(bytes(32), 2**60 + 1),)),
        ScoreReveal(0, 0, bytes(32), tuple(Score(bytes(32), 0) for _ in range(4097))),
        Attestation(0, 0, bytes(32), bytes(95)),
        Attestation(0, 2**31 + 1, bytes(32), bytes(96)),
    ],
)
def test_a_field_out_of_range_rejects(message: Message) -> None:
    with pytest.raises(Reject):
        decode_message(encode(message))


def test_a_message_over_its_limit_rejects() -> None:
    body = encode(ScoreCommit(0, 0, bytes(32)))
    assert decode_message(body, len(body))
    with pytest.raises(Reject, match="at most"):
        decode_message(body, len(body) - 1)


@given(st.integers(0, 2**128 - 1))
def test_wei_comes_back_as_it_went(amount: int) -> None:
    assert wei_from_wire(wei_to_wire(Wei(amount))) == amount


@given(reveals, reveals)
def test_two_vectors_have_one_commitment_only_if_they_are_one(left: ScoreReveal, right: ScoreReveal) -> None:
    assert (left.commitment == right.commitment) == (left == right)


@given(proposals, proposals)
def test_two_proposals_have_one_digest_only_if_they_are_one(left: Proposal, right: Proposal) -> None:
    assert (proposal_digest(left) == proposal_digest(right)) == (left == right)


def as_plain(value: object) -> object:
    """The value as plain tuples, independently of msgspec's encoder."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        fields = tuple(as_plain(getattr(value, name)) for name in value.__struct_fields__)
        return (tag, *fields) if tag else fields
    if isinstance(value, tuple):
        return tuple(as_plain(item) for item in value)
    return value


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1x", b"\x92\xa8proposal"])
def test_nesting_of_any_depth_is_rejected_and_ends_no_process(opening: bytes) -> None:
    """py_ecc once raised the recursion limit so far that such bytes overflowed the C stack."""
    importlib.import_module("p2pfm.settlement.bls")
    for decode in (decode_message, decode_envelope, decode_request, decode_reply):
        with pytest.raises(Reject):
            decode(opening * 200_000)
    with pytest.raises((msgspec.DecodeError, RecursionError)):
        msgspec.json.decode(b"[" * 1_000_000)
