"""Signs what this peer says and proves who said what others said: Ed25519 over `messages.signed_bytes`.

The public key is inside the peer id, so nothing has to be looked up. Knows no transport and no message's meaning.
"""

from functools import lru_cache

import base58
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from p2pfm.errors import Reject
from p2pfm.messages import Envelope, Message, Receipt, Vouch, decode_envelope, decode_message, encode, signed_bytes
from p2pfm.runtime.keys import Keys
from p2pfm.types import Digest, PeerId, short

ID_PREFIX = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))
"""An Ed25519 peer id: identity multihash of 36 bytes, which are a protobuf of key type 1 and 32 bytes of key."""
ID_CHARS_MAX = 64
SIGNATURE_BYTES = 64
AUTHORS_CACHED_MAX = 1024


def seal(keys: Keys, network_id: Digest, message: Message | Receipt) -> Envelope:
    """`message`, signed by this peer for this network. A receipt's seal is its gateway's word, or its replica's yes."""
    body = encode(message)
    signature = SigningKey(keys.peer_seed).sign(signed_bytes(network_id, keys.peer, body)).signature
    return Envelope(author=keys.peer, body=body, signature=signature)


def verify_envelope(network_id: Digest, envelope: Envelope) -> None:
    """Prove that `envelope.author` signed the body for this network.

    Raises:
        Reject: an author that is no Ed25519 peer id, or another signature than the author's.
    """
    key = _key_of(envelope.author)
    data = signed_bytes(network_id, envelope.author, envelope.body)
    if len(envelope.signature) != SIGNATURE_BYTES:
        raise Reject(f"expected a signature of {SIGNATURE_BYTES} bytes, got {len(envelope.signature)}")
    try:
        key.verify(data, envelope.signature)
    except BadSignatureError as error:
        raise Reject(f"not signed by {short(envelope.author)} for this network") from error


def sign_vouch(keys: Keys, network_id: Digest, vouch: Vouch) -> bytes:
    """This peer's signature under its answer; a vouch is no message, so that it stands for nothing else."""
    return SigningKey(keys.peer_seed).sign(signed_bytes(network_id, keys.peer, encode(vouch))).signature


def verify_vouch(network_id: Digest, replica: PeerId, vouch: Vouch, signature: bytes) -> None:
    """Prove that `replica` signed `vouch` for this network. Raises: Reject."""
    verify_envelope(network_id, Envelope(replica, encode(vouch), signature))


def open_envelope(network_id: Digest, data: bytes, bytes_max: int = 1_000_000) -> tuple[Envelope, Message]:
    """An envelope from the wire, its signature proven, and its decoded message.

    Raises:
        Reject: not an envelope, a wrong signature, or a body that is no message.
    """
    envelope = decode_envelope(data, bytes_max)
    verify_envelope(network_id, envelope)
    return envelope, decode_message(envelope.body, bytes_max)


@lru_cache(maxsize=AUTHORS_CACHED_MAX)
def _key_of(peer: PeerId) -> VerifyKey:
    if len(peer) > ID_CHARS_MAX:
        raise Reject(f"expected a peer id of at most {ID_CHARS_MAX} characters, got {len(peer)}")
    try:
        raw = base58.b58decode(peer)
    except ValueError as error:
        raise Reject(f"not a peer id: {error}") from error
    if len(raw) != len(ID_PREFIX) + 32 or not raw.startswith(ID_PREFIX) or base58.b58encode(raw).decode() != peer:
        raise Reject(f"expected an Ed25519 peer id, got {peer!r}")
    return VerifyKey(raw[len(ID_PREFIX) :])
