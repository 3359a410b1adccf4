"""Signatures for a simulation: keyed hashes with the sizes and the laws of the real ones, at a thousandth of the cost.

The world holds the one secret, so a simulated peer can sign only through it. Aggregates are sums (XOR) of signatures,
as BLS aggregates are sums of points: one proves that every key signed, and which keys. Knows no peer's state.
"""

from collections.abc import Sequence
from hashlib import blake2b, shake_256

from p2pfm.config import ChainConfig
from p2pfm.types import Digest, PeerId

KEY_BYTES = 48
SIGNATURE_BYTES = 96


class Signatures:
    """Signs and verifies for all peers of one world; implements `settlement.memory_ledger.Verifier`."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: 32 bytes that no message contains."""
        self._secret = secret

    def bls_key(self, peer: PeerId) -> bytes:
        """A peer's public key."""
        return shake_256(b"key" + peer.encode()).digest(KEY_BYTES)

    def sign(self, bls_key: bytes, message: bytes) -> bytes:
        """The signature that the key's owner alone may ask for."""
        return shake_256(self._secret + bls_key + message).digest(SIGNATURE_BYTES)

    def aggregate(self, signatures: Sequence[bytes]) -> bytes:
        """The sum of signatures."""
        total = 0
        for signature in signatures:
            total ^= int.from_bytes(signature, "big")
        return total.to_bytes(SIGNATURE_BYTES, "big")

    def prove_possession(self, chain: ChainConfig, account: str, peer: PeerId) -> bytes:
        """Proof for the registry, bound to chain, contract, account and peer."""
        return self.sign(self.bls_key(peer), _possession(chain, account, peer))

    def verify_possession(
        self, chain: ChainConfig, account: str, peer: PeerId, bls_key: bytes, possession: bytes
    ) -> bool:
        """See Verifier."""
        return possession == self.sign(bls_key, _possession(chain, account, peer))

    def verify_round(self, bls_keys: Sequence[bytes], message: Digest, signature: bytes) -> bool:
        """See Verifier."""
        return signature == self.aggregate([self.sign(key, message) for key in bls_keys])

    def seal(self, author: PeerId, data: bytes) -> bytes:
        """An envelope's 64-byte signature."""
        return blake2b(author.encode() + b"\0" + data, key=self._secret).digest()


def _possession(chain: ChainConfig, account: str, peer: PeerId) -> bytes:
    return f"{chain.chain_id} {chain.federation} {account} {peer}".encode()
