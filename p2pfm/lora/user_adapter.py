"""A user's own LoRA as one blob that peers pass on by its digest: encoded, decoded and checked.

Knows bytes, names and shapes; no file, peer or model. The blob is a magic line, a short header in msgpack, then the
factors as little-endian float32. Its reader knows the backbone's layers and so computes what the length must be: it
allocates nothing that a sender chose, and no byte of it is ever run.

    magic          "p2pfm user adapter 1\n"
    header length  4 bytes, big-endian
    header         kind "lora", the backbone's name, each changed layer's path and rank, sorted by path
    factors        layer by layer: A (rank, in), then B (out, rank) with the scale in it: dW = B A
"""

from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np

from p2pfm.errors import Reject
from p2pfm.types import Array, Digest, compute_digest

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
"""The two files of a peft folder (`lora.checkpoint` reads them)."""

MAGIC = b"p2pfm user adapter 1\n"
LENGTH_BYTES = 4
HEADER_BYTES_MAX = 1 << 20
"""Ten thousand layers of long names."""

START_BYTES_MAX = len(MAGIC) + LENGTH_BYTES + HEADER_BYTES_MAX
"""What `read_header` needs of a blob at most."""

VALUE_MAX = 65_504.0
"""Float16's largest number: no factor of a trained adapter comes near, and larger ones break sums in the model."""

BACKBONE_VERSION: Digest = compute_digest(b"p2pfm backbone without adapter 1")
"""The version of an adapter that changes nothing: every replica serves it, no blob has this digest."""

Sizes = Mapping[str, tuple[int, int]]
"""(out, in) of the layers that an adapter may change, by module path."""

Factors = Mapping[str, tuple[Array, Array]]
"""By module path: A (rank, in) and B (out, rank), float32, the scale in B."""


class Target(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A layer that the adapter changes."""

    module: str
    rank: int


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What stands before the numbers."""

    kind: Literal["lora"]
    backbone: str
    targets: tuple[Target, ...]


def encode_adapter(backbone: str, factors: Factors) -> bytes:
    """The blob. Equal adapters of one backbone have equal bytes, so its digest names the adapter."""
    targets = tuple(Target(name, len(factors[name][0])) for name in sorted(factors))
    header = msgspec.msgpack.encode(Header("lora", backbone, targets))
    parts = [np.ascontiguousarray(part, "<f4").tobytes() for target in targets for part in factors[target.module]]
    return b"".join((MAGIC, len(header).to_bytes(LENGTH_BYTES, "big"), header, *parts))


def decode_adapter(data: bytes, backbone: str, sizes: Sizes, rank_max: int) -> dict[str, tuple[Array, Array]]:
    """Inverse of `encode_adapter` for this backbone.

    Raises:
        Reject: another format, backbone or layer, a rank above `rank_max`, a wrong length, or a value that is not
            finite or larger than VALUE_MAX.
    """
    header, start = read_header(data, backbone)
    shapes = [shape for target in header.targets for shape in _shapes_of(target, sizes, rank_max)]
    expected = start + 4 * sum(rows * columns for rows, columns in shapes)
    if len(data) != expected:
        raise Reject(f"adapter: expected {expected} bytes for its layers and ranks, got {len(data)}")
    parts, offset = [], start
    for rows, columns in shapes:
        part = np.frombuffer(data, "<f4", rows * columns, offset).astype(np.float32)
        parts.append(part.reshape(rows, columns))
        offset += part.nbytes
    pairs = zip(parts[::2], parts[1::2], strict=True)
    factors = dict(zip((target.module for target in header.targets), pairs, strict=True))
    validate_factors(factors, sizes, rank_max)
    return factors


def read_header(data: bytes, backbone: str) -> tuple[Header, int]:
    """The header, and where the factors begin. Raises: Reject, as `decode_adapter`."""
    start = len(MAGIC) + LENGTH_BYTES
    if not data.startswith(MAGIC) or len(data) < start:
        raise Reject(f"adapter: expected a blob that begins with {MAGIC!r}, got {data[: len(MAGIC)]!r}")
    num_header = int.from_bytes(data[len(MAGIC) : start], "big")
    if num_header > min(HEADER_BYTES_MAX, len(data) - start):
        raise Reject(f"adapter: expected a header of at most {HEADER_BYTES_MAX} bytes within the blob")
    header = _decode_header(data[start : start + num_header])
    if header.backbone != backbone:
        raise Reject(f"adapter: it is of the backbone {header.backbone[:200]!r}, this network's is {backbone!r}")
    return header, start + num_header


def validate_factors(factors: Factors, sizes: Sizes, rank_max: int) -> None:
    """Refuse what is no LoRA of a backbone with layers of these sizes.

    Raises:
        Reject: says the layer that is at fault, what was expected of it, and what came.
    """
    if not factors:
        raise Reject("adapter: expected factors of at least one layer, got none")
    for name, (low, high) in sorted(factors.items()):
        rank, fan_in = low.shape
        _shapes_of(Target(name, rank), sizes, rank_max)
        fan_out = high.shape[0]
        if (fan_out, fan_in) != sizes[name] or high.shape[1] != rank:
            raise Reject(
                f"adapter: {name} of this backbone is {sizes[name]} (out, in), got A {low.shape} and B {high.shape}; "
                "was the adapter trained on another backbone?"
            )
        for role, part in (("A", low), ("B", high)):
            if not (np.abs(part) <= VALUE_MAX).all():  # NaN too
                raise Reject(f"adapter: {name}: expected finite values of {role}, at most {VALUE_MAX:g}")


def _decode_header(data: bytes) -> Header:
    try:
        header = msgspec.msgpack.decode(data, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Reject(f"adapter: expected a header of kind, backbone and layers: {str(error)[:200]}") from error
    names = [target.module for target in header.targets]
    if not names or names != sorted(set(names)) or msgspec.msgpack.encode(header) != data:
        raise Reject("adapter: expected a header in canonical form, at least one layer, sorted by path, each once")
    return header


def _shapes_of(target: Target, sizes: Sizes, rank_max: int) -> tuple[tuple[int, int], tuple[int, int]]:
    if target.module not in sizes:
        raise Reject(
            f"adapter: this backbone has no linear layer {target.module[:200]!r} that an adapter may change; was it "
            "trained on another backbone?"
        )
    if not 1 <= target.rank <= rank_max:
        raise Reject(f"adapter: {target.module}: expected a rank from 1 to {rank_max}, got {target.rank}")
    fan_out, fan_in = sizes[target.module]
    return (target.rank, fan_in), (fan_out, target.rank)
