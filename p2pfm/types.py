"""The words of the house: identifiers and units that cross a module's edge.

Knows nothing else of p2pfm. A bare `int` or `bytes` never crosses a module; one of these does.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import NewType

import numpy as np
from numpy.typing import NDArray

PeerId = NewType("PeerId", str)
"""A participant: the base58 libp2p identity of its Ed25519 key (any unique string in a simulation)."""

Digest = NewType("Digest", bytes)
"""SHA-256 of some bytes: 32 bytes. What the core speaks of instead of tensors."""

Round = NewType("Round", int)
"""One cycle of the protocol, counted from the network's genesis."""

Epoch = NewType("Epoch", int)
"""A settlement period of `NetworkConfig.rounds_per_epoch` rounds."""

Millis = NewType("Millis", int)
"""A point in time since the Unix epoch, or a duration [ms]."""

Wei = NewType("Wei", int)
"""The reward token's smallest unit [10**-18 token]."""

Contribution = NewType("Contribution", int)
"""A Shapley value as a signed integer [nano-nats a token]."""

MemberIndex = NewType("MemberIndex", int)
"""A peer's position in the contract's registry, and its leaf's position in the rewards tree."""

Weight = NewType("Weight", int)
"""A merge weight [parts per WEIGHT_ONE]."""

WEIGHT_ONE = 1_000_000_000
"""The sum of a certificate's merge weights: integers, so that peers can compare them byte for byte."""

NANO = 1_000_000_000
"""Nano-nats in a nat."""

DIGEST_BYTES = 32

Array = NDArray[np.float32]
Tensors = Mapping[str, Array]
"""Named float32 tensors of an adapter (or a delta of one); the canonical order is sorted by name."""


def compute_digest(data: bytes) -> Digest:
    """SHA-256 of `data`."""
    return Digest(sha256(data).digest())


def short(value: bytes | str) -> str:
    """The first characters of a digest or peer id, for people's eyes only."""
    return value.hex()[:10] if isinstance(value, bytes) else f"…{value[-6:]}"
