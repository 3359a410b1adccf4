"""Envelopes: who said what, for which network."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfm.errors import Reject
from p2pfm.messages import Envelope, ScoreCommit, encode
from p2pfm.runtime.envelopes import open_envelope, seal, verify_envelope
from p2pfm.runtime.keys import Keys, create_keys
from p2pfm.types import MemberIndex, PeerId, Round, compute_digest

NETWORK = compute_digest(b"network")
MESSAGE = ScoreCommit(Round(3), MemberIndex(1), compute_digest(b"scores"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return create_keys(Path(tmp_path_factory.mktemp("keys")), "", light=True)


def test_a_sealed_message_opens(keys: Keys) -> None:
    envelope, message = open_envelope(NETWORK, encode(seal(keys, NETWORK, MESSAGE)))
    assert message == MESSAGE
    assert envelope.author == keys.peer


def test_libp2p_itself_accepts_the_signature(keys: Keys) -> None:
    from p2pfm.messages import signed_bytes

    envelope = seal(keys, NETWORK, MESSAGE)
    data = signed_bytes(NETWORK, keys.peer, envelope.body)
    assert keys.keypair.public_key.verify(data, envelope.signature)


def test_another_network_rejects(keys: Keys) -> None:
    with pytest.raises(Reject, match="not signed"):
        verify_envelope(compute_digest(b"other"), seal(keys, NETWORK, MESSAGE))


@pytest.mark.parametrize("field", ["author", "body", "signature"])
def test_a_changed_field_rejects(keys: Keys, tmp_path: Path, field: str) -> None:
    other = create_keys(tmp_path / "other", "", light=True)
    envelope = seal(keys, NETWORK, MESSAGE)
    changed = {
        "author": other.peer,
        "body": encode(MESSAGE)[:-1] + b"x",
        "signature": bytes(64),
    }
    with pytest.raises(Reject):
        verify_envelope(NETWORK, msgspec.structs.replace(envelope, **{field: changed[field]}))


@pytest.mark.parametrize(
    "author", ["x", "0OIl", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "1" * 64, "12D3KooW" + "é", "z" * 128]
)
def test_an_author_that_is_no_ed25519_peer_id_rejects(keys: Keys, author: str) -> None:
    envelope = msgspec.structs.replace(seal(keys, NETWORK, MESSAGE), author=PeerId(author))
    with pytest.raises(Reject):
        verify_envelope(NETWORK, envelope)


@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), b"\xff" * 64])
def test_a_malformed_signature_rejects(keys: Keys, signature: bytes) -> None:
    with pytest.raises(Reject):
        verify_envelope(NETWORK, Envelope(keys.peer, encode(MESSAGE), signature))


@given(st.binary(max_size=200))
def test_garbage_only_rejects(data: bytes) -> None:
    with pytest.raises(Reject):
        open_envelope(NETWORK, data)
