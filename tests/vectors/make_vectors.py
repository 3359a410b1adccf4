"""Writes the wire's test vectors beside itself: `python tests/vectors/make_vectors.py`. Everything is fixed, so that a
second run writes the same bytes; `tests/core/test_vectors.py` recomputes them with each run of the tests.

In the JSON files bytes are "0x" and hex digits, whatever struct they stand in; other strings are text. A payload's
magnitudes are levels of the format, so that quantising them is exact everywhere.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from nacl.signing import SigningKey

from p2pfm.config import ChainConfig, CompressionConfig, NetworkConfig
from p2pfm.lora.compress import compress, decode_payload
from p2pfm.lora.delta import compute_layout, encode_tensors, get_shapes
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
    PeersReply,
    PeersRequest,
    Presence,
    Proposal,
    Receipt,
    ReceiptOffer,
    ReceiptReply,
    Score,
    ScoreCommit,
    ScoreReveal,
    Service,
    ServiceReport,
    ShardMessage,
    SyncReply,
    SyncRequest,
    TokenChunk,
    TokenLogprobs,
    Vouch,
    VouchReply,
    Wire,
    encode,
    proposal_digest,
    signed_bytes,
)
from p2pfm.runtime.envelopes import seal
from p2pfm.runtime.keys import Keys
from p2pfm.serving.keeping import compute_stream_id
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import LeafValue, Sums
from p2pfm.settlement.rewards import compute_sums, proposal_message, to_wire
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, Wei, Weight, compute_digest
from p2pfm.work import join_payload

HERE = Path(__file__).parent

NETWORK = NetworkConfig(
    name="vectors",
    genesis_ms=Millis(1_700_000_000_000),
    backbone="tiny",
    probe="ab" * 32,
    chain=ChainConfig(1337, "0x" + "11" * 20, "0x" + "22" * 20),
)
COMPRESSION = CompressionConfig(chunk=16, keep=4, beta=0.95)
ACCOUNT = "0x" + "ab" * 20


def make_keys(number: int) -> Keys:
    """A node's keys from fixed seeds."""
    seed = bytes([number]) * 32
    peer = PeerId(str(ID.from_pubkey(create_new_key_pair(seed).public_key)))
    return Keys(peer, ACCOUNT, seed, seed, bls.key_from_seed(bytes([0x80 + number]) * 32))


KEYS = [make_keys(number) for number in range(5)]

# --- the things that messages speak of -------------------------------------------------------------------------------


def make_base() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Tensors of a small adapter: one wide, one high, one vector; not in canonical order."""
    return {
        "b": np.arange(24, dtype=np.float32).reshape(8, 3) / 8,
        "a": -np.arange(96, dtype=np.float32).reshape(4, 24) / 64,
        "c": np.array([0.0, -0.0, 1.5, 2.0**-100, 3.0e30], np.float32),
    }


def make_updates() -> dict[str, dict[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """Updates by name. "full": every chunk sends all it may; "partial": some send less, some nothing; "zero"."""
    full = {name: np.zeros(shape, np.float32) for name, shape in get_shapes(make_base()).items()}
    partial = {name: values.copy() for name, values in full.items()}
    zero = {name: values.copy() for name, values in full.items()}
    for tensor, (name, low, high) in enumerate((("a", 0.5, 0.75), ("b", 2.0**-40, 2.0**-38), ("c", 1.0, 1.0))):
        flat = full[name].reshape(-1)
        for index in range(flat.size):
            flat[index] = (high if index % 3 == 0 else low) * (-1 if index % (5 + tensor) == 0 else 1)
    partial["a"].reshape(-1)[[0, 25, 50, 51, 95]] = (0.5, -0.75, 0.5, 0.5, -0.5)
    partial["c"][1] = -1.875
    return {"full": full, "partial": partial, "zero": zero}


LEAVES = (
    LeafValue(Wei(5 * 10**18), Wei(3 * 10**18), 700, Wei(2**127)),
    LeafValue(Wei(0), Wei(0), -(2**60)),
    LeafValue(Wei(2**64), Wei(1), 2**60),
    LeafValue(Wei(7), Wei(7), 0),
    LeafValue(Wei(10**19), Wei(10**18), 300),
)

COMPRESSED = {name: compress(update, COMPRESSION) for name, update in make_updates().items()}
PAYLOADS = {name: join_payload(KEYS[0].peer, payload) for name, (payload, _) in COMPRESSED.items()}
BASE = encode_tensors(make_base())

ANNOUNCEMENT = Announcement(
    round=Round(41),
    peer=KEYS[0].peer,
    base=compute_digest(BASE),
    payload=compute_digest(PAYLOADS["full"]),
    payload_bytes=len(PAYLOADS["full"]),
    num_tokens=70_000,
)
REVEALS = tuple(
    ScoreReveal(
        Round(41),
        MemberIndex(member),
        bytes([0x50 + member]) * 32,
        (
            Score(compute_digest(b"first"), Contribution(-1 - member)),
            Score(compute_digest(b"second"), Contribution(10**12 + member)),
        ),
        (Service(MemberIndex(1), 250_000_000 + member), Service(MemberIndex(4), 1)),
    )
    for member in (0, 2, 4)
)
PROPOSAL = Proposal(
    round=Round(41),
    proposer=MemberIndex(2),
    epoch=3,
    nonce=1,
    base=compute_digest(BASE),
    new_base=compute_digest(b"new base"),
    prev_root=compute_digest(b"previous root"),
    root=merkle.compute_root(LEAVES).digest,
    updates=(
        IncludedUpdate(KEYS[1].peer, MemberIndex(1), compute_digest(b"first"), Contribution(-3), Weight(0)),
        IncludedUpdate(
            KEYS[0].peer, MemberIndex(0), compute_digest(b"second"), Contribution(10**12 + 2), Weight(400_000_000)
        ),
    ),
    reveals=REVEALS,
    leaves=to_wire(LEAVES),
)
MESSAGE = proposal_message(NETWORK.chain, PROPOSAL)
SIGNERS = (0, 2)
"""Members 0, 2 and 4 are the committee in these examples; 4 is absent from the certificate (in a real one more than
two thirds of a committee sign)."""
SIGNATURES = [bls.sign(KEYS[member].bls_secret, MESSAGE) for member in SIGNERS]
ATTESTATION = Attestation(Round(41), MemberIndex(SIGNERS[0]), MESSAGE, SIGNATURES[0])
CERTIFICATE = Certificate(PROPOSAL, (MemberIndex(4),), bls.aggregate(SIGNATURES))

NETWORK_ID = NETWORK.network_id()
ENVELOPE = seal(KEYS[0], NETWORK_ID, ANNOUNCEMENT)

CLAIMED = GenerateRequest(compute_digest(BASE), (1, 2, 300), (70_000, 2), 32, 0, 1000, 7, 0)
VOUCH = Vouch(CLAIMED, 1)
VOUCH_SIGNATURE = SigningKey(KEYS[1].peer_seed).sign(signed_bytes(NETWORK_ID, KEYS[1].peer, encode(VOUCH))).signature

RECEIPT = Receipt(
    KEYS[0].peer, KEYS[1].peer, 5, 3, compute_digest(encode(CLAIMED)), compute_digest(BASE), 2, 130, bytes(32)
)
RECEIPT_SIGNATURES = [
    SigningKey(keys.peer_seed).sign(signed_bytes(NETWORK_ID, keys.peer, encode(RECEIPT))).signature for keys in KEYS[:2]
]
SEALED_RECEIPT = Envelope(KEYS[0].peer, encode(RECEIPT), RECEIPT_SIGNATURES[0])

KEPT = KeepStream(compute_digest(b"nonce"), CLAIMED, b"{}")

MESSAGES: dict[str, Wire] = {
    "announcement": ANNOUNCEMENT,
    "proposal_of_shards": msgspec.structs.replace(
        PROPOSAL,
        updates=tuple(
            msgspec.structs.replace(update, peer=PeerId(f"shard-{update.member}")) for update in PROPOSAL.updates
        ),
        shards=(compute_digest(b"shard 1"), compute_digest(b"shard 0")),
    ),
    "announcement_private": msgspec.structs.replace(ANNOUNCEMENT, privacy=DeclaredPrivacy(2_500_000, 10_000_000)),
    "commit": ScoreCommit(Round(41), MemberIndex(0), REVEALS[0].commitment),
    "reveal": REVEALS[0],
    "proposal": PROPOSAL,
    "attestation": ATTESTATION,
    "certificate": CERTIFICATE,
    "shard": ShardMessage(MemberIndex(3), ANNOUNCEMENT),
    "presence": Presence(KEYS[0].peer, (compute_digest(BASE), compute_digest(b"old")), 1, 4, 15_000, 2**40, 1, 12_500),
    "cheat": CheatReport(KEYS[1].peer, VOUCH, VOUCH_SIGNATURE),
    "service": ServiceReport(5, (SEALED_RECEIPT,)),
}
"""Gossip: the bodies of envelopes."""
ENVELOPES: dict[str, Wire] = {"envelope": ENVELOPE}
REQUESTS: dict[str, Wire] = {
    "blob": BlobRequest(compute_digest(BASE), 262_144, 262_144),
    "sync": SyncRequest(Round(41), (compute_digest(ENVELOPE.body),), -1),
    "peers": PeersRequest((f"/ip4/127.0.0.1/tcp/4001/p2p/{KEYS[0].peer}",)),
    "generate": GenerateRequest(compute_digest(BASE), (1, 2, 300), (70_000,), 32, 700, 950, 7, 2),
    "check": CheckRequest(CLAIMED),
    "vouch": VOUCH,
    "keep_stream": KEPT,
    "extend_stream": ExtendStream(compute_stream_id(KEPT), 2, (5, 130)),
    "find_stream": FindStream(compute_stream_id(KEPT)),
    "receipt_offer": ReceiptOffer(SEALED_RECEIPT),
}
REPLIES: dict[str, Wire] = {
    "blob_reply": BlobReply(300, bytes(range(256)) + bytes(44)),
    "blob_reply_not_served": BlobReply(0, b""),
    "sync_reply": SyncReply((ENVELOPE,), CERTIFICATE),
    "sync_reply_nothing": SyncReply((), None),
    "peers_reply": PeersReply((f"/ip4/127.0.0.1/tcp/4001/p2p/{KEYS[1].peer}",), 1_800_000_000_000),
    "tokens": TokenChunk(1, (5, 130), "stop", (TokenLogprobs(1_200_000, ((130, 50),)), TokenLogprobs(0, ()))),
    "check_reply": CheckReply((0, 1_250_000), (400, 70_000)),
    "check_reply_refused": CheckReply((), (), "busy"),
    "vouch_reply": VouchReply(VOUCH_SIGNATURE),
    "vouch_reply_refused": VouchReply(b""),
    "kept_reply": KeptReply(4),
    "kept_reply_not_kept": KeptReply(-1),
    "found_reply": FoundReply(KEPT),
    "found_reply_not_kept": FoundReply(None),
    "receipt_reply": ReceiptReply(RECEIPT_SIGNATURES[1]),
    "receipt_reply_refused": ReceiptReply(b""),
}
KINDS = {
    "message": MESSAGES,
    "envelope": ENVELOPES,
    "request": REQUESTS,
    "reply": REPLIES,
    "receipt": {"receipt": RECEIPT},
}

INVALID = {
    "unknown_tag": ("message", ["nonsense", 1, 2]),
    "map_instead_of_array": ("message", {"round": 1}),
    "field_too_many": ("message", ["commit", 41, 0, bytes(32), 0]),
    "field_missing": ("message", ["commit", 41, 0]),
    "digest_of_31_bytes": ("message", ["commit", 41, 0, bytes(31)]),
    "digest_as_text": ("message", ["commit", 41, 0, "x" * 32]),
    "negative_round": ("message", ["commit", -1, 0, bytes(32)]),
    "contribution_over_its_bound": ("message", ["reveal", 41, 0, bytes(32), [[bytes(32), 2**60 + 1]]]),
    "float_for_integer": ("message", ["commit", 41.5, 0, bytes(32)]),
    "request_as_message": ("message", ["blob", bytes(32), 0, 1]),
    "chunk_over_its_bound": ("request", ["blob", bytes(32), 0, 262_145]),
    "tagged_envelope": ("envelope", ["envelope", "x", b"", bytes(64)]),
}
"""What every decoder must refuse: (kind, value)."""

# --- their plain form ------------------------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """A struct as JSON holds it: arrays, numbers, text, and bytes as "0x..."."""
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        fields = [getattr(value, name) for name in value.__struct_fields__]
        return to_plain([*([] if tag is None else [tag]), *fields])
    return value


def make_messages() -> dict[str, Any]:
    """Every wire struct: which decoder reads it, its array, its bytes."""
    valid = {
        name: {"kind": kind, "array": to_plain(value), "bytes": to_plain(encode(value))}
        for kind, values in KINDS.items()
        for name, value in values.items()
    }
    invalid = {
        name: {"kind": kind, "array": to_plain(value), "bytes": to_plain(msgspec.msgpack.encode(value))}
        for name, (kind, value) in INVALID.items()
    }
    return {"valid": valid, "invalid": invalid}


def make_hashes() -> dict[str, Any]:
    """Digests and signatures over the messages of `make_messages`."""
    body = encode(ANNOUNCEMENT)
    assert isinstance(ENVELOPE, Envelope)
    return {
        "network": {
            "config": msgspec.to_builtins(NETWORK),
            "packed": to_plain(msgspec.msgpack.encode(NETWORK)),
            "id": to_plain(NETWORK_ID),
            "topic": f"/p2pfm/{NETWORK_ID.hex()[:32]}",
        },
        "envelope": {
            "seed": to_plain(KEYS[0].peer_seed),
            "author": KEYS[0].peer,
            "body": to_plain(body),
            "signed": to_plain(signed_bytes(NETWORK_ID, KEYS[0].peer, body)),
            "signature": to_plain(ENVELOPE.signature),
            "digest": to_plain(compute_digest(body)),
        },
        "commitment": to_plain(REVEALS[0].commitment),
        "proposal_digest": to_plain(proposal_digest(PROPOSAL)),
        "draft_digest": to_plain(PROPOSAL.draft_digest),
    }


def make_settlement() -> dict[str, Any]:
    """The rewards tree with its proofs, the round's message and the BLS signatures."""
    levels = merkle.build(LEAVES)
    key = bls.public_key(KEYS[0].bls_secret)
    return {
        "leaves": [
            _decimal(leaf.cumulative_wei, leaf.reward_wei, leaf.contribution, leaf.served_wei) for leaf in LEAVES
        ],
        "root": _node(levels[-1][0]),
        "proofs": [[_node(node) for node in merkle.prove(levels, MemberIndex(i))] for i in range(len(LEAVES))],
        "round": {
            "chain_id": NETWORK.chain.chain_id,
            "federation": NETWORK.chain.federation,
            "epoch": PROPOSAL.epoch,
            "nonce": PROPOSAL.nonce,
            "round": PROPOSAL.round,
            "prev_root": to_plain(PROPOSAL.prev_root),
            "root": to_plain(PROPOSAL.root),
            "num_leaves": len(PROPOSAL.leaves),
            "sums": _sums(compute_sums(LEAVES)),
            "data": to_plain(proposal_digest(PROPOSAL)),
            "base": to_plain(PROPOSAL.new_base),
            "message": to_plain(MESSAGE),
        },
        "bls": {
            "seeds": [to_plain(bytes([0x80 + member]) * 32) for member in SIGNERS],
            "keys": [to_plain(bls.public_key(KEYS[member].bls_secret)) for member in SIGNERS],
            "signatures": [to_plain(signature) for signature in SIGNATURES],
            "aggregate": to_plain(CERTIFICATE.signature),
        },
        "possession": {
            "account": ACCOUNT,
            "peer": KEYS[0].peer,
            "key": to_plain(key),
            "message": to_plain(bls.possession_message(NETWORK.chain, ACCOUNT, KEYS[0].peer, key)),
            "proof": to_plain(bls.prove_possession(KEYS[0].bls_secret, NETWORK.chain, ACCOUNT, KEYS[0].peer)),
        },
    }


def make_tensors() -> dict[str, Any]:
    """A base and the updates: what their bytes decode to (`base.bin`, `payload-*.bin`)."""
    layout = compute_layout(get_shapes(make_base()))
    payloads = {}
    for name, (coded, _) in COMPRESSED.items():
        update = decode_payload(coded, get_shapes(make_base()), COMPRESSION, 1 << 20)
        payloads[name] = {
            "file": f"payload-{name}.bin",
            "digest": to_plain(compute_digest(PAYLOADS[name])),
            "maker": KEYS[0].peer,
            "positions": update.positions.tolist(),
            "values": update.values.tolist(),
        }
    return {
        "shapes": [[name, list(shape)] for name, shape in zip(layout.names, layout.shapes, strict=True)],
        "layout_digest": to_plain(layout.digest),
        "chunk": COMPRESSION.chunk,
        "keep": COMPRESSION.keep,
        "base": {
            "file": "base.bin",
            "digest": to_plain(compute_digest(BASE)),
            "values": np.concatenate([make_base()[name].ravel() for name in layout.names]).tolist(),
        },
        "payloads": payloads,
    }


def make_files() -> dict[str, bytes]:
    """All vector files by name."""
    tables: dict[str, Callable[[], dict[str, Any]]] = {
        "messages.json": make_messages,
        "hashes.json": make_hashes,
        "settlement.json": make_settlement,
        "tensors.json": make_tensors,
    }
    files = {name: (json.dumps(make(), indent=1) + "\n").encode() for name, make in tables.items()}
    return files | {"base.bin": BASE} | {f"payload-{name}.bin": data for name, data in PAYLOADS.items()}


def _decimal(*numbers: int) -> list[str]:
    """As text: JSON readers lose integers above 2**53."""
    return [str(int(number)) for number in numbers]


def _sums(sums: Sums) -> list[str]:
    return _decimal(sums.cumulative_wei, sums.reward_wei, sums.contribution)


def _node(node: merkle.Node) -> dict[str, Any]:
    return {"digest": to_plain(Digest(node.digest)), "sums": _sums(node.sums)}


if __name__ == "__main__":
    for file, data in make_files().items():
        (HERE / file).write_bytes(data)
        print(f"{file}: {len(data)} bytes")
