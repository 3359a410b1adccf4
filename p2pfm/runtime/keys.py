"""A node's three identities on disk: libp2p (Ed25519), Ethereum account, BLS. Made once, never logged.

Knows files and formats only; who signs what is others' affair.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import coincurve
import eth_keyfile
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.peer.id import ID

from p2pfm.errors import OperatorError
from p2pfm.runtime.files import make_private_folder, refuse_shared, write_durably
from p2pfm.settlement import bls
from p2pfm.types import PeerId

PEER_FILE = "libp2p.key"
"""32 bytes: the Ed25519 seed."""
ACCOUNT_FILE = "account.json"
"""Ethereum keystore (Web3 Secret Storage, version 3), encrypted with the node's password."""
BLS_FILE = "bls.json"
"""The same format around the BLS secret's 32-byte seed."""
KDF_ROUNDS = 2**18  # scrypt's N as geth uses it: about a second
KDF_ROUNDS_LIGHT = 2**12  # localnets and tests: milliseconds


class WrongPassword(OperatorError):
    """The keys are encrypted with another one."""


@dataclass(frozen=True)
class Keys:
    """Secrets of one node; `repr` shows the public halves only."""

    peer: PeerId
    account_address: str
    """Checksummed Ethereum address."""
    peer_seed: bytes = field(repr=False)
    """32 bytes."""
    account_private_key: bytes = field(repr=False)
    """32 bytes."""
    bls_secret: int = field(repr=False)

    @property
    def keypair(self) -> KeyPair:
        """The libp2p identity."""
        return create_new_key_pair(self.peer_seed)


def create_keys(folder: Path, password: str, *, light: bool = False) -> Keys:
    """Make the three keys in `folder` (0700), each in a file of its own (0600), durable before this returns.

    Args:
        light: a weak key derivation, for throw-away networks.

    Raises:
        OperatorError: there are keys already, or the folder cannot be written.
    """
    make_private_folder(folder)
    present = [name for name in (PEER_FILE, ACCOUNT_FILE, BLS_FILE) if (folder / name).exists()]
    if present:
        raise OperatorError(f"{folder} has keys already ({', '.join(present)}); choose another folder, or use these")
    rounds = KDF_ROUNDS_LIGHT if light else KDF_ROUNDS
    account = coincurve.PrivateKey().secret
    try:
        write_durably(folder / BLS_FILE, _encrypt(os.urandom(32), password, rounds), is_new=True)
        write_durably(folder / ACCOUNT_FILE, _encrypt(account, password, rounds), is_new=True)
        write_durably(folder / PEER_FILE, os.urandom(32), is_new=True)
    except OSError as error:
        raise OperatorError(f"cannot write keys into {folder}: {error.strerror}") from error
    return load_keys(folder, password)


def load_keys(folder: Path, password: str) -> Keys:
    """The keys in `folder`.

    Raises:
        OperatorError: a file is missing, readable by others, or damaged.
        WrongPassword: it is another one.
    """
    seed = _read_private(folder / PEER_FILE)
    if len(seed) != 32:
        raise OperatorError(f"{folder / PEER_FILE}: expected 32 bytes, got {len(seed)}; restore it from your backup")
    account = _decrypt(folder / ACCOUNT_FILE, password)
    bls_seed = _decrypt(folder / BLS_FILE, password)
    return Keys(
        peer=PeerId(str(ID.from_pubkey(create_new_key_pair(seed).public_key))),
        account_address=account_address(account),
        peer_seed=seed,
        account_private_key=account,
        bls_secret=bls.key_from_seed(bls_seed),
    )


def account_address(private_key: bytes) -> str:
    """The checksummed Ethereum address of a secp256k1 key."""
    public = coincurve.PrivateKey(private_key).public_key.format(compressed=False)
    return str(to_checksum_address(keccak(public[1:])[12:]))


def _encrypt(secret: bytes, password: str, rounds: int) -> bytes:
    keystore = eth_keyfile.create_keyfile_json(secret, password.encode(), kdf="scrypt", iterations=rounds)
    return json.dumps(keystore, indent=1).encode()


def _decrypt(path: Path, password: str) -> bytes:
    data = _read_private(path)
    try:
        return bytes(eth_keyfile.decode_keyfile_json(json.loads(data), password.encode()))
    except ValueError as error:
        if "MAC" in str(error):
            raise WrongPassword(f"{path}: wrong password") from error
        raise OperatorError(f"{path}: damaged; restore it from your backup") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise OperatorError(f"{path}: not an Ethereum keystore; restore it from your backup") from error


def _read_private(path: Path) -> bytes:
    try:
        refuse_shared(path)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise OperatorError(f"no key file {path}; `p2pfm init` makes one") from error
    except OSError as error:
        raise OperatorError(f"cannot read {path}: {error.strerror}") from error
