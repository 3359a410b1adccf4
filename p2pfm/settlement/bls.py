"""BLS signatures on BLS12-381 (keys in G1, signatures in G2; the ciphersuite of py_ecc's G2ProofOfPossession).

py_ecc is the reference; py-arkworks-bls12381 does the same some hundred times faster when it is installed. Libraries
differ on empty, malformed and infinite input, so this wrapper refuses those before any library is called. Knows no
peer, round or transport. Sources: draft-irtf-cfrg-bls-signature-05, RFC 9380, EIP-2537 (points as the chain has them).
"""

import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol

from eth_hash.auto import keccak
from py_ecc.bls import G2ProofOfPossession
from py_ecc.bls.ciphersuites import BaseG2Ciphersuite
from py_ecc.bls.g2_primitives import pubkey_to_G1, signature_to_G2, subgroup_check
from py_ecc.optimized_bls12_381 import curve_order, normalize

from p2pfm.config import ChainConfig
from p2pfm.types import Digest, PeerId

RECURSION_MAX = 3000
"""py_ecc 8 raises the interpreter's limit to 100,000 when it is imported. A stranger's deeply nested JSON would then
overflow the C stack and end the process; three times the usual limit is plenty for everything here."""

sys.setrecursionlimit(min(sys.getrecursionlimit(), RECURSION_MAX))

KEY_BYTES = 48
SIGNATURE_BYTES = 96
SEED_BYTES_MIN = 32
"""KeyGen wants at least as much entropy as the key holds [bytes]."""

SIGNATURE_TAG: bytes = G2ProofOfPossession.DST
POSSESSION_TAG: bytes = G2ProofOfPossession.POP_TAG

POSSESSION_TYPEHASH = keccak(b"Possession(uint256 chainId,address federation,address account,bytes32 peer,bytes32 key)")

FIELD_MODULUS = 0x1A0111EA397FE69A4B1BA7B6434BACD764774B84F38512BF6730D2A0F6B0F6241EABFFFEB153FFFFB9FEFFFFFFFFAAAB

_COMPRESSED, _INFINITY, _GREATER = 0x80, 0x40, 0x20
"""Flag bits in the first byte of a compressed point."""

_POINTS_CACHED_MAX = 4096
"""Validated keys kept decompressed: a registry's worth (validation costs 6 ms a key with py_ecc)."""


class Library(Protocol):
    """What the wrapper needs of a BLS library. Every point given has the right length and is not infinity."""

    def public_key(self, secret: int) -> bytes:
        """48 bytes."""
        ...

    def sign(self, secret: int, message: bytes, tag: bytes) -> bytes:
        """96 bytes."""
        ...

    def aggregate(self, signatures: Sequence[bytes]) -> bytes:
        """96 bytes. Raises: ValueError for a point off the curve or outside the subgroup."""
        ...

    def verify_sum(self, keys: Sequence[bytes], message: bytes, signature: bytes, tag: bytes) -> bool:
        """Whether the signature is of the sum of `keys`. Raises: ValueError for an invalid point."""
        ...

    def key_coordinates(self, key: bytes) -> bytes:
        """x, y: 2 * 48 bytes. Raises: ValueError for an invalid point."""
        ...

    def signature_coordinates(self, signature: bytes) -> bytes:
        """x.c0, x.c1, y.c0, y.c1: 4 * 48 bytes. Raises: ValueError for an invalid point."""
        ...


class PyEcc:
    """The reference implementation, in Python."""

    def public_key(self, secret: int) -> bytes:
        """See Library."""
        return bytes(G2ProofOfPossession.SkToPk(secret))

    def sign(self, secret: int, message: bytes, tag: bytes) -> bytes:
        """See Library."""
        return bytes(_suite(tag).Sign(secret, message))

    def aggregate(self, signatures: Sequence[bytes]) -> bytes:
        """See Library."""
        for signature in signatures:
            self.signature_coordinates(signature)
        return bytes(G2ProofOfPossession.Aggregate(signatures))

    def verify_sum(self, keys: Sequence[bytes], message: bytes, signature: bytes, tag: bytes) -> bool:
        """See Library."""
        for key in keys:
            _py_ecc_key(key)
        # The suite's own FastAggregateVerify knows only the signature tag; the sum it makes is the same.
        key = bytes(G2ProofOfPossession._AggregatePKs(keys)) if len(keys) > 1 else keys[0]
        return bool(_suite(tag).Verify(key, message, signature))

    def key_coordinates(self, key: bytes) -> bytes:
        """See Library."""
        x, y = normalize(_py_ecc_key(key))
        return b"".join(int(c).to_bytes(48, "big") for c in (x, y))

    def signature_coordinates(self, signature: bytes) -> bytes:
        """See Library."""
        point = _checked(signature_to_G2, signature)
        x, y = normalize(point)
        return b"".join(int(c).to_bytes(48, "big") for c in (*x.coeffs, *y.coeffs))


class Arkworks:
    """The same in Rust."""

    def __init__(self) -> None:
        """Raises: ImportError when the package is not installed (extra `fast`)."""
        from py_arkworks_bls12381 import GT, G1Point, G2Point, Scalar

        self._g1, self._g2, self._gt, self._scalar = G1Point, G2Point, GT, Scalar
        self._key = lru_cache(_POINTS_CACHED_MAX)(G1Point.from_compressed_bytes)

    def public_key(self, secret: int) -> bytes:
        """See Library."""
        return bytes((self._g1() * self._secret(secret)).to_compressed_bytes())

    def sign(self, secret: int, message: bytes, tag: bytes) -> bytes:
        """See Library."""
        return bytes((self._g2.hash_to_curve(message, tag) * self._secret(secret)).to_compressed_bytes())

    def aggregate(self, signatures: Sequence[bytes]) -> bytes:
        """See Library."""
        total = self._g2.identity()
        for signature in signatures:
            total = total + self._g2.from_compressed_bytes(signature)
        return bytes(total.to_compressed_bytes())

    def verify_sum(self, keys: Sequence[bytes], message: bytes, signature: bytes, tag: bytes) -> bool:
        """See Library."""
        total = self._g1.identity()
        for key in keys:
            total = total + self._key(key)
        if total == self._g1.identity():
            return False
        point = self._g2.from_compressed_bytes(signature)
        message_point = self._g2.hash_to_curve(message, tag)
        return bool(self._gt.pairing_check([-self._g1(), total], [point, message_point]))

    def key_coordinates(self, key: bytes) -> bytes:
        """See Library."""
        return bytes(self._key(key).to_xy_bytes_be())

    def signature_coordinates(self, signature: bytes) -> bytes:
        """See Library."""
        return bytes(self._g2.from_compressed_bytes(signature).to_xy_bytes_be())

    def _secret(self, secret: int) -> Any:
        return self._scalar.from_be_bytes(secret.to_bytes(32, "big"))


PY_ECC: Library = PyEcc()
BEST: Library = Arkworks() if find_spec("py_arkworks_bls12381") else PY_ECC


def key_from_seed(seed: bytes) -> int:
    """The secret key of `seed` (KeyGen: HKDF with SHA-256), 1 to the group order - 1. Raises: ValueError if short."""
    if len(seed) < SEED_BYTES_MIN:
        raise ValueError(f"expected a seed of at least {SEED_BYTES_MIN} bytes, got {len(seed)}")
    return int(G2ProofOfPossession.KeyGen(seed))


def public_key(secret: int, library: Library = BEST) -> bytes:
    """The 48-byte public key. Raises: ValueError for a secret outside the group's order."""
    _validate_secret(secret)
    return library.public_key(secret)


def sign(secret: int, message: bytes, library: Library = BEST) -> bytes:
    """The 96-byte signature of `message`. Raises: ValueError for a secret outside the group's order."""
    _validate_secret(secret)
    return library.sign(secret, message, SIGNATURE_TAG)


def verify(key: bytes, message: bytes, signature: bytes, library: Library = BEST) -> bool:
    """Whether the signature is `key`'s; False for any malformed, infinite or non-subgroup input."""
    return _verify_sum((key,), message, signature, SIGNATURE_TAG, library)


def aggregate(signatures: Sequence[bytes], library: Library = BEST) -> bytes:
    """The sum of the signatures.

    Raises:
        ValueError: none given, a wrong length, infinity, a point off the curve or the subgroup, or the sum is infinity.
    """
    if not signatures:
        raise ValueError("expected at least one signature")
    for signature in signatures:
        if not _is_well_formed(signature, SIGNATURE_BYTES):
            raise ValueError("expected a compressed G2 point of 96 bytes that is not infinity")
    total = library.aggregate(signatures)
    if not _is_well_formed(total, SIGNATURE_BYTES):
        raise ValueError("the signatures add up to infinity")
    return total


def fast_aggregate_verify(keys: Sequence[bytes], message: bytes, signature: bytes, library: Library = BEST) -> bool:
    """Whether the signature is the aggregate of all `keys`' signatures of one message; False for no keys.

    Sound only for keys whose possession was proven (rogue keys otherwise).
    """
    return _verify_sum(keys, message, signature, SIGNATURE_TAG, library)


def prove_possession(secret: int, chain: ChainConfig, account: str, peer: PeerId, library: Library = BEST) -> bytes:
    """A proof that whoever sends it from `account` knows the secret; good for this contract on this chain only."""
    _validate_secret(secret)
    key = library.public_key(secret)
    return library.sign(secret, possession_message(chain, account, peer, key, library), POSSESSION_TAG)


def verify_possession(
    chain: ChainConfig, account: str, peer: PeerId, key: bytes, possession: bytes, library: Library = BEST
) -> bool:
    """Whether the proof is of this key, for this account, peer, contract and chain."""
    if not _is_well_formed(key, KEY_BYTES):
        return False
    try:
        message = possession_message(chain, account, peer, key, library)
    except ValueError:
        return False
    return _verify_sum((key,), message, possession, POSSESSION_TAG, library)


def possession_message(chain: ChainConfig, account: str, peer: PeerId, key: bytes, library: Library = BEST) -> Digest:
    """The 32 bytes a proof of possession signs, as the contract rebuilds them. Raises: ValueError for a bad key."""
    return Digest(
        keccak(
            POSSESSION_TYPEHASH
            + chain.chain_id.to_bytes(32, "big")
            + int(chain.federation, 16).to_bytes(32, "big")
            + int(account, 16).to_bytes(32, "big")
            + keccak(peer.encode())
            + keccak(decompress_key(key, library))
        )
    )


def decompress_key(key: bytes, library: Library = BEST) -> bytes:
    """A G1 point as EIP-2537 takes it: x, y of 64 bytes each. Raises: ValueError for an invalid key."""
    if not _is_well_formed(key, KEY_BYTES):
        raise ValueError("expected a compressed G1 point of 48 bytes that is not infinity")
    return _padded(library.key_coordinates(key))


def decompress_signature(signature: bytes, library: Library = BEST) -> bytes:
    """A G2 point as EIP-2537 takes it: x.c0, x.c1, y.c0, y.c1 of 64 bytes each. Raises: ValueError if invalid."""
    if not _is_well_formed(signature, SIGNATURE_BYTES):
        raise ValueError("expected a compressed G2 point of 96 bytes that is not infinity")
    return _padded(library.signature_coordinates(signature))


def compress_key(point: bytes) -> bytes:
    """The 48-byte key of a G1 point from the chain (128 bytes; trusted: the contract has checked it)."""
    if len(point) != 128:
        raise ValueError(f"expected 128 bytes, got {len(point)}")
    y = int.from_bytes(point[64:], "big")
    flags = _COMPRESSED | (_GREATER if 2 * y > FIELD_MODULUS else 0)
    return bytes([point[16] | flags]) + point[17:64]


class BlsVerifier:
    """The ledger's signature checks, for real (`memory_ledger.Verifier`)."""

    def verify_possession(
        self, chain: ChainConfig, account: str, peer: PeerId, bls_key: bytes, possession: bytes
    ) -> bool:
        """See `verify_possession` of this module."""
        return verify_possession(chain, account, peer, bls_key, possession)

    def verify_round(self, bls_keys: Sequence[bytes], message: Digest, signature: bytes) -> bool:
        """See `fast_aggregate_verify`."""
        return fast_aggregate_verify(bls_keys, message, signature)


class _PossessionSuite(G2ProofOfPossession):  # type: ignore[misc]
    DST = POSSESSION_TAG


def _suite(tag: bytes) -> type[BaseG2Ciphersuite]:
    return _PossessionSuite if tag == POSSESSION_TAG else G2ProofOfPossession


@lru_cache(_POINTS_CACHED_MAX)
def _py_ecc_key(key: bytes) -> Any:
    return _checked(pubkey_to_G1, key)


def _checked(decompress: Any, data: bytes) -> Any:
    try:
        point = decompress(data)
    except AssertionError as error:
        raise ValueError("not a point of the curve") from error
    if not subgroup_check(point):
        raise ValueError("the point is outside the prime-order subgroup")
    return point


def _verify_sum(keys: Sequence[bytes], message: bytes, signature: bytes, tag: bytes, library: Library) -> bool:
    if not keys or not _is_well_formed(signature, SIGNATURE_BYTES):
        return False
    if not all(_is_well_formed(key, KEY_BYTES) for key in keys):
        return False
    try:
        return library.verify_sum(keys, message, signature, tag)
    except ValueError:
        return False


def _is_well_formed(data: bytes, length: int) -> bool:
    """Right length, marked as compressed, not marked as infinity, and x below the modulus (libraries differ here)."""
    if len(data) != length or not data[0] & _COMPRESSED or data[0] & _INFINITY:
        return False
    first = bytes([data[0] & 0x1F]) + data[1:48]
    coordinates = (first, data[48:]) if length == SIGNATURE_BYTES else (first,)
    return all(int.from_bytes(coordinate, "big") < FIELD_MODULUS for coordinate in coordinates)


def _padded(coordinates: bytes) -> bytes:
    return b"".join(bytes(16) + coordinates[i : i + 48] for i in range(0, len(coordinates), 48))


def _validate_secret(secret: int) -> None:
    if not 0 < secret < curve_order:
        raise ValueError("expected a secret key between 1 and the group's order - 1")
