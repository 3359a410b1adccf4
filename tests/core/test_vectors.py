"""The wire is what `tests/vectors/` and `docs/wire.md` say: our code makes these bytes, and other libraries read them.

Where a test says "independently", nothing of p2pfm computes what is compared: plain `msgpack`, `hashlib`, PyNaCl,
py_ecc and `keccak` follow docs/wire.md.
"""

import json
import re
import struct
from collections.abc import Callable
from hashlib import sha256
from importlib import metadata
from typing import Any

import base58
import msgpack
import numpy as np
import pytest
from eth_hash.auto import keccak
from nacl.signing import SigningKey, VerifyKey
from py_ecc.bls import G2ProofOfPossession
from py_ecc.bls.g2_primitives import pubkey_to_G1
from py_ecc.optimized_bls12_381 import normalize
from vectors.make_vectors import COMPRESSION, HERE, KINDS, make_base, make_files, to_plain
from vectors.plain_payload import read_update

from p2pfm.config import ChainConfig, CompressionConfig, TransportLimits
from p2pfm.errors import Reject
from p2pfm.lora.compress import MAGIC as COMPRESS_MAGIC
from p2pfm.lora.compress import compress, decode_payload
from p2pfm.lora.delta import MAGIC as TENSORS_MAGIC
from p2pfm.lora.delta import decode_tensors, flatten, unflatten
from p2pfm.lora.subsets import DECAY_BOUNDS, DECAYS
from p2pfm.lora.topk import LEVEL_CODES
from p2pfm.messages import (
    SIGNING_DOMAIN,
    decode_envelope,
    decode_message,
    decode_receipt,
    decode_reply,
    decode_request,
    encode,
)
from p2pfm.protocol.gossip import REPLY_MAX
from p2pfm.protocol.peer import SYNC_MS
from p2pfm.runtime.envelopes import ID_PREFIX
from p2pfm.runtime.gateway import PRESENCE_TTL_MS
from p2pfm.runtime.network.bans import BAN_S
from p2pfm.runtime.network.blobs import CHUNK_BYTES
from p2pfm.runtime.network.peer_exchange import PEERS_PROTOCOL
from p2pfm.runtime.network.transport import REQUEST_PROTOCOL, STREAM_PROTOCOL
from p2pfm.runtime.replica_streams import FRAME_BYTES_MAX
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import LeafValue, Sums
from p2pfm.settlement.rewards import ROUND_TYPEHASH
from p2pfm.types import Digest, MemberIndex, PeerId, Wei
from p2pfm.work import join_payload, split_payload

PAGE = (HERE.parents[1] / "docs" / "wire.md").read_text()
FILES = make_files()
PROSE = " ".join(PAGE.split())
CHANGED = (
    "the wire is not what {name} says. If that is meant: raise the version of what changed (docs/wire.md, "
    '"Versions"), then run `python tests/vectors/make_vectors.py` and commit the new vectors'
)
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "message": decode_message,
    "envelope": decode_envelope,
    "request": decode_request,
    "reply": decode_reply,
    "receipt": decode_receipt,
}


def read(name: str) -> Any:
    return json.loads((HERE / name).read_text())


def from_plain(value: Any) -> Any:
    """JSON's form of a message back: bytes stand there as "0x" and digits."""
    if isinstance(value, str):
        return bytes.fromhex(value[2:]) if value.startswith("0x") else value
    return [from_plain(item) for item in value] if isinstance(value, list) else value


VALID, INVALID = read("messages.json")["valid"], read("messages.json")["invalid"]
HASHES, SETTLEMENT, TENSORS = read("hashes.json"), read("settlement.json"), read("tensors.json")
SHAPES = {name: tuple(shape) for name, shape in TENSORS["shapes"]}


def array_of(name: str) -> Any:
    return from_plain(VALID[name]["array"])


# --- everything, recomputed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_vectors_are_what_this_code_makes(name: str) -> None:
    assert (HERE / name).exists(), f"{name} is missing: run `python tests/vectors/make_vectors.py`"
    assert (HERE / name).read_bytes() == FILES[name], CHANGED.format(name=name)


def test_no_vector_is_left_over() -> None:
    kept = {path.name for path in HERE.iterdir() if path.suffix in (".json", ".bin")}
    assert kept == set(FILES)


def test_every_tagged_struct_has_a_vector() -> None:
    import p2pfm.messages as wire

    tags = {item.__struct_config__.tag for item in vars(wire).values() if isinstance(item, type(wire.Wire))}
    tags.discard(None)
    assert tags == {entry["array"][0] for entry in VALID.values() if entry["kind"] != "envelope"}


def test_the_page_names_every_tag_with_its_fields_in_order() -> None:
    import p2pfm.messages as wire

    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+: .*?) \|", PAGE, re.MULTILINE))
    structs = [item for item in vars(wire).values() if isinstance(item, type(wire.Wire)) and item is not wire.Wire]
    tagged = {item.__struct_config__.tag: list(item.__struct_fields__) for item in structs}
    untagged = {"Envelope", "DeclaredPrivacy", "Score", "Service", "IncludedUpdate", "Leaf", "TokenLogprobs"}
    assert {item.__name__ for item in structs if item.__struct_config__.tag is None} == untagged
    tagged.pop(None)
    assert {tag: re.findall(r"(?:^|, )(\w+): ", fields) for tag, fields in rows.items()} == tagged


def test_the_page_has_the_codes_constants() -> None:
    gossip, stream = TransportLimits(), [REQUEST_PROTOCOL, STREAM_PROTOCOL, PEERS_PROTOCOL]
    texts = [*stream, SIGNING_DOMAIN.decode(), COMPRESS_MAGIC.decode(), TENSORS_MAGIC.decode().strip()]
    texts += [bls.SIGNATURE_TAG.decode(), bls.POSSESSION_TAG.decode(), ID_PREFIX.hex(" ")]
    texts += [" ".join(map(str, DECAYS)), " ".join(map(str, DECAY_BOUNDS)), f"centred({LEVEL_CODES}, "]
    numbers = [gossip.gossip_bytes_max, CHUNK_BYTES, gossip.request_bytes_max, gossip.reply_bytes_max, FRAME_BYTES_MAX]
    numbers += [32_768, 16 * 1024, PRESENCE_TTL_MS]
    missing = [text for text in [*texts, *(f"{number:,}" for number in numbers)] if text not in PROSE]
    assert not missing, f"docs/wire.md says something else than the code: {missing}"
    types = [b"Round(uint256 chainId,address federation,", b"Possession(uint256 chainId,address federation,"]
    page = "".join(PAGE.split()).encode()
    for begin, typehash in zip(types, (ROUND_TYPEHASH, bls.POSSESSION_TYPEHASH), strict=True):
        found = page[page.index(begin.replace(b" ", b"")) :].split(b'"')[0]
        assert keccak(re.sub(rb"(uint\d+|address|bytes32)", rb"\1 ", found)) == typehash
    assert f"silent for {gossip.silent_s:g} s" in PROSE
    assert f"{gossip.author_burst_max} messages at once, {gossip.author_burst_max // 2} a second" in PROSE
    assert f"{gossip.streams_per_connection_max} open streams" in PROSE
    assert f"Sync** every {SYNC_MS // 1000} s" in PROSE
    assert f"at most {REPLY_MAX} are sent" in PROSE
    assert f"for {BAN_S:g} s" in PROSE
    assert "constriction " + ".".join(metadata.version("constriction").split(".")[:2]) in PROSE


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(VALID))
def test_a_message_encodes_and_decodes_byte_for_byte(name: str) -> None:
    entry, data = VALID[name], from_plain(VALID[name]["bytes"])
    struct_ = KINDS[entry["kind"]][name]
    assert encode(struct_) == data, CHANGED.format(name=name)
    assert DECODERS[entry["kind"]](data) == struct_, CHANGED.format(name=name)


@pytest.mark.parametrize("name", sorted(VALID))
def test_plain_messagepack_reads_and_writes_the_same_bytes_independently(name: str) -> None:
    data = from_plain(VALID[name]["bytes"])
    assert msgpack.unpackb(data) == array_of(name)
    assert msgpack.packb(array_of(name)) == data


@pytest.mark.parametrize("name", sorted(INVALID))
def test_a_decoder_rejects(name: str) -> None:
    with pytest.raises(Reject):
        DECODERS[INVALID[name]["kind"]](from_plain(INVALID[name]["bytes"]))


@pytest.mark.parametrize("name", sorted(VALID))
def test_a_decoder_rejects_cut_and_lengthened_bytes(name: str) -> None:
    data = from_plain(VALID[name]["bytes"])
    for changed in (data[:-1], data + b"\x00", b""):
        with pytest.raises(Reject):
            DECODERS[VALID[name]["kind"]](changed)


# --- digests and signatures, independently ----------------------------------------------------------------------------


def test_the_network_id_is_the_digest_of_the_configs_values() -> None:
    def values(config: Any) -> Any:
        if isinstance(config, dict):  # a struct travels as a map, its keys in the order of declaration
            return {key: values(item) for key, item in config.items()}
        return config

    network = HASHES["network"]
    packed = msgpack.packb(values(network["config"]))
    assert packed == from_plain(network["packed"])
    digest = sha256(b"p2pfm network 2" + packed).hexdigest()
    assert network["id"] == "0x" + digest
    assert network["topic"] == "/p2pfm/" + digest[:32]


def test_an_envelopes_signature_is_its_authors_over_domain_network_author_and_body() -> None:
    vector = HASHES["envelope"]
    author, body = vector["author"], from_plain(vector["body"])
    assert array_of("envelope") == [author, body, from_plain(vector["signature"])]
    assert msgpack.unpackb(body) == array_of("announcement")
    network = from_plain(HASHES["network"]["id"])
    signed = b"p2pfm/2 envelope" + network + struct.pack(">H", len(author)) + author.encode() + body
    assert signed == from_plain(vector["signed"])
    raw = base58.b58decode(author)
    assert raw[:6].hex() == "002408011220"
    VerifyKey(raw[6:]).verify(signed, from_plain(vector["signature"]))
    assert SigningKey(from_plain(vector["seed"])).sign(signed).signature == from_plain(vector["signature"])
    assert vector["digest"] == "0x" + sha256(body).hexdigest()


def test_commitment_and_proposal_digests() -> None:
    reveal, proposal = from_plain(VALID["reveal"]["bytes"]), array_of("proposal")
    assert HASHES["commitment"] == "0x" + sha256(b"p2pfm/2 commit" + reveal).hexdigest()
    assert array_of("commit")[3] == from_plain(HASHES["commitment"])
    assert HASHES["proposal_digest"] == "0x" + sha256(msgpack.packb(proposal)).hexdigest()
    draft = [*proposal[:6], bytes(32), *proposal[7:]]
    assert HASHES["draft_digest"] == "0x" + sha256(msgpack.packb(draft)).hexdigest()


# --- tensors and payloads ---------------------------------------------------------------------------------------------


def test_a_base_is_a_header_and_its_floats() -> None:
    base = TENSORS["base"]
    data = (HERE / base["file"]).read_bytes()
    layout = sha256(b"p2pfm layout 1" + msgpack.packb(TENSORS["shapes"])).digest()
    assert layout == from_plain(TENSORS["layout_digest"])
    values = struct.pack(f"<{len(base['values'])}f", *base["values"])
    assert data == b"p2pfm tensors 1\n" + layout + values
    assert base["digest"] == "0x" + sha256(data).hexdigest()
    decoded = decode_tensors(data, SHAPES)
    assert flatten(decoded).tobytes() == values
    assert {name: tensor.shape for name, tensor in decoded.items()} == {k: v.shape for k, v in make_base().items()}


@pytest.mark.parametrize("name", sorted(TENSORS["payloads"]))
def test_a_payload_decodes_to_exactly_its_values(name: str) -> None:
    vector = TENSORS["payloads"][name]
    data = (HERE / vector["file"]).read_bytes()
    assert vector["digest"] == "0x" + sha256(data).hexdigest()
    assert data[0] == len(vector["maker"])
    assert data[1 : 1 + data[0]] == vector["maker"].encode()
    assert data[1 + data[0] :][:4] == b"P2U2"
    maker, coded = split_payload(data)
    update = decode_payload(coded, SHAPES, COMPRESSION, 1 << 20)
    assert maker == vector["maker"]
    assert update.positions.tolist() == vector["positions"]
    assert update.values.tolist() == vector["values"]
    assert (COMPRESSION.chunk, COMPRESSION.keep) == (TENSORS["chunk"], TENSORS["keep"])
    flat = np.zeros(len(TENSORS["base"]["values"]), np.float32)
    flat[vector["positions"]] = vector["values"]
    again, _ = compress(unflatten(flat, update.layout), COMPRESSION)
    assert join_payload(maker, again) == data, CHANGED.format(name=vector["file"])


@pytest.mark.parametrize("name", sorted(TENSORS["payloads"]))
def test_a_payload_is_read_independently(name: str) -> None:
    vector = TENSORS["payloads"][name]
    data = (HERE / vector["file"]).read_bytes()
    found = read_update(data[1 + data[0] :], TENSORS["shapes"], TENSORS["chunk"], TENSORS["keep"])
    assert list(found) == vector["positions"]
    assert list(found.values()) == vector["values"]


@pytest.mark.parametrize("seed", range(12))
def test_payloads_of_many_shapes_are_read_independently(seed: int) -> None:
    """Clustered and scattered places, chunks of all kinds, tilts, far levels."""
    rng = np.random.default_rng(seed)
    chunk = int(rng.integers(16, 700))
    config = CompressionConfig(chunk=chunk, keep=int(rng.integers(1, chunk + 1)))
    shapes = {f"t{i}": tuple(int(n) for n in rng.integers(1, 40, rng.integers(1, 4))) for i in range(6)}
    scale = {name: 2.0 ** rng.integers(-60, 30) for name in shapes}
    delta = {
        name: (scale[name] * rng.normal(size=shape) * (rng.random(shape[-1:]) < rng.random())).astype(np.float32)
        for name, shape in shapes.items()
    }
    coded, decoded = compress(delta, config)
    found = read_update(coded, list(shapes.items()), config.chunk, config.keep)
    flat = flatten(decoded)
    assert found == {int(place): float(flat[place]) for place in np.flatnonzero(flat)}


def test_a_changed_bit_of_a_payload_is_rejected_or_another_update() -> None:
    """No two payloads decode to one update."""
    vector = TENSORS["payloads"]["partial"]
    _, coded = split_payload((HERE / vector["file"]).read_bytes())
    seen = {tuple(zip(vector["positions"], vector["values"], strict=True))}
    num_rejected = 0
    for bit in range(8 * len(coded)):
        changed = bytearray(coded)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            update = decode_payload(bytes(changed), SHAPES, COMPRESSION, 1 << 20)
        except Reject:
            num_rejected += 1
            continue
        found = tuple(zip(update.positions.tolist(), update.values.tolist(), strict=True))
        assert found not in seen
        seen.add(found)
    assert num_rejected >= 32, "the magic bytes at least"


# --- settlement -------------------------------------------------------------------------------------------------------


def keccak_leaf(leaf: list[int]) -> tuple[bytes, list[int]]:
    words = b"".join(value.to_bytes(32, "big", signed=True) for value in leaf)
    return keccak(keccak(words)), [leaf[0], leaf[1], max(0, leaf[2])]


def keccak_parent(left: tuple[bytes, list[int]], right: tuple[bytes, list[int]]) -> tuple[bytes, list[int]]:
    data = b"".join(
        digest + a.to_bytes(16, "big") + b.to_bytes(16, "big") + c.to_bytes(32, "big")
        for digest, (a, b, c) in (left, right)
    )
    return keccak(data), [x + y for x, y in zip(left[1], right[1], strict=True)]


def read_node(node: Any) -> tuple[bytes, list[int]]:
    return from_plain(node["digest"]), [int(value) for value in node["sums"]]


LEAVES = [[int(value) for value in leaf] for leaf in SETTLEMENT["leaves"]]


@pytest.mark.parametrize("index", range(len(LEAVES)))
def test_every_leaf_is_proven_independently(index: int) -> None:
    node = keccak_leaf(LEAVES[index])
    siblings = [read_node(sibling) for sibling in SETTLEMENT["proofs"][index]]
    assert len(siblings) == 3, "five leaves make a tree of three levels"
    for height, sibling in enumerate(siblings):
        node = keccak_parent(sibling, node) if index >> height & 1 else keccak_parent(node, sibling)
    assert node == read_node(SETTLEMENT["root"])


@pytest.mark.parametrize("index", range(len(LEAVES)))
def test_our_verifier_takes_the_proof_and_no_other_leaf(index: int) -> None:
    digest, sums = read_node(SETTLEMENT["root"])
    root = Sums(Wei(sums[0]), Wei(sums[1]), sums[2])
    siblings = [
        merkle.Node(Digest(node), Sums(Wei(parts[0]), Wei(parts[1]), parts[2]))
        for node, parts in map(read_node, SETTLEMENT["proofs"][index])
    ]
    cumulative, reward, contribution, served = LEAVES[index]
    leaf = LeafValue(Wei(cumulative), Wei(reward), contribution, Wei(served))
    richer = LeafValue(Wei(cumulative), Wei(reward), contribution, Wei(served + 1))
    place = MemberIndex(index)
    assert merkle.verify(Digest(digest), root, len(LEAVES), place, leaf, siblings)
    assert not merkle.verify(Digest(digest), root, len(LEAVES), place, richer, siblings)
    assert not merkle.verify(Digest(digest), root, len(LEAVES) + 4, place, leaf, siblings)


def word(value: int) -> bytes:
    return value.to_bytes(32, "big")


def test_the_rounds_message_is_its_fields_words_independently() -> None:
    told = SETTLEMENT["round"]
    typehash = keccak(
        b"Round(uint256 chainId,address federation,uint32 epoch,uint32 nonce,uint48 round,bytes32 prevRoot,"
        b"bytes32 root,uint32 numLeaves,uint128 cumulative,uint128 reward,uint128 contribution,bytes32 data,"
        b"bytes32 base)"
    )
    words = [told["chain_id"], int(told["federation"], 16), told["epoch"], told["nonce"], told["round"]]
    message = keccak(
        typehash
        + b"".join(map(word, words))
        + from_plain(told["prev_root"])
        + from_plain(told["root"])
        + word(told["num_leaves"])
        + b"".join(word(int(total)) for total in told["sums"])
        + from_plain(told["data"])
        + from_plain(told["base"])
    )
    assert message == from_plain(told["message"])
    assert told["data"] == HASHES["proposal_digest"]
    assert read_node(SETTLEMENT["root"]) == (from_plain(told["root"]), [int(total) for total in told["sums"]])
    proposal = array_of("proposal")
    assert [int.from_bytes(part, "big") for leaf in proposal[11] for part in leaf[:2]] == [
        value for leaf in LEAVES for value in leaf[:2]
    ]
    assert array_of("attestation")[3] == message


def test_bls_keys_and_signatures_are_the_reference_librarys() -> None:
    told = SETTLEMENT["bls"]
    message = from_plain(SETTLEMENT["round"]["message"])
    secrets = [G2ProofOfPossession.KeyGen(seed) for seed in from_plain(told["seeds"])]
    assert [G2ProofOfPossession.SkToPk(secret) for secret in secrets] == from_plain(told["keys"])
    assert [G2ProofOfPossession.Sign(secret, message) for secret in secrets] == from_plain(told["signatures"])
    assert G2ProofOfPossession.Aggregate(from_plain(told["signatures"])) == from_plain(told["aggregate"])
    assert bls.fast_aggregate_verify(from_plain(told["keys"]), message, from_plain(told["aggregate"]))
    assert array_of("attestation")[4] == from_plain(told["signatures"])[0]
    assert array_of("certificate")[3] == from_plain(told["aggregate"])


def test_a_possession_binds_chain_contract_account_peer_and_key_independently() -> None:
    told, chain = SETTLEMENT["possession"], SETTLEMENT["round"]
    x, y = normalize(pubkey_to_G1(from_plain(told["key"])))
    point = b"".join(bytes(16) + int(value).to_bytes(48, "big") for value in (x, y))
    message = keccak(
        keccak(b"Possession(uint256 chainId,address federation,address account,bytes32 peer,bytes32 key)")
        + word(chain["chain_id"])
        + word(int(chain["federation"], 16))
        + word(int(told["account"], 16))
        + keccak(told["peer"].encode())
        + keccak(point)
    )
    assert message == from_plain(told["message"])
    config = ChainConfig(chain["chain_id"], chain["federation"], "0x" + "22" * 20)
    key, proof = from_plain(told["key"]), from_plain(told["proof"])
    assert bls.verify_possession(config, told["account"], PeerId(told["peer"]), key, proof)
    assert not bls.verify_possession(config, told["account"], PeerId(told["peer"] + "x"), key, proof)
    assert not bls.verify(key, message, proof), "the two purposes have two tags"


def test_what_stands_in_json_reads_back() -> None:
    value = ["tag", b"\x00\xff", -(2**60), None, ["text"]]
    assert from_plain(json.loads(json.dumps(to_plain(value)))) == value
