"""Named tensors as bytes and as numbers: the canonical form of bases, deltas and residuals.

Knows nothing of models, compression or peers. The canonical order is sorted by name; a decoder is told which names and
shapes to expect, so it parses nothing that a sender chose and allocates no more than the announced adapter.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate

import msgspec
import numpy as np
from numpy.typing import NDArray

from p2pfm.errors import Reject
from p2pfm.types import DIGEST_BYTES, Array, Digest, Tensors, compute_digest

MAGIC = b"p2pfm tensors 1\n"
HEADER_BYTES = len(MAGIC) + DIGEST_BYTES

Shapes = Mapping[str, tuple[int, ...]]


class Layout(msgspec.Struct, frozen=True):
    """Where each tensor lies in the flat vector that all of them make, in canonical order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    """offsets[i] is tensor i's first position; offsets[-1] is the vector's length."""
    digest: Digest

    @property
    def size(self) -> int:
        """Parameters in all."""
        return self.offsets[-1]


def compute_layout(shapes: Shapes) -> Layout:
    """The canonical layout of tensors of these names and shapes."""
    return _layout(tuple((name, tuple(shapes[name])) for name in sorted(shapes)))


def get_shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Names and shapes, in canonical order."""
    return {name: tensors[name].shape for name in sorted(tensors)}


def flatten(tensors: Tensors, out: Array | None = None) -> Array:
    """All values as one float32 vector in canonical order (a copy; `out`, if given)."""
    return np.concatenate([np.asarray(tensors[name], np.float32).ravel() for name in sorted(tensors)], out=out)


def unflatten(flat: NDArray[np.floating], layout: Layout) -> dict[str, Array]:
    """Inverse of `flatten`: float32 views of `flat` where it is float32 already."""
    flat = np.ascontiguousarray(flat, np.float32)
    bounds = zip(layout.names, layout.shapes, layout.offsets, layout.sizes, strict=False)
    return {name: flat[start : start + size].reshape(shape) for name, shape, start, size in bounds}


def subtract(left: Tensors, right: Tensors) -> dict[str, Array]:
    """left - right, tensor by tensor."""
    return {name: np.subtract(left[name], right[name], dtype=np.float32) for name in sorted(left)}


def add(base: Tensors, delta: Tensors, scale: float = 1.0) -> dict[str, Array]:
    """base + scale * delta, tensor by tensor."""
    return {name: (base[name] + np.float32(scale) * delta[name]).astype(np.float32) for name in sorted(base)}


def zeros(shapes: Shapes) -> dict[str, Array]:
    """Zero tensors of these shapes."""
    return {name: np.zeros(shapes[name], np.float32) for name in sorted(shapes)}


def encode_tensors(tensors: Tensors) -> bytes:
    """The canonical bytes: a header that names the layout, then little-endian float32 in canonical order.

    Equal values have equal bytes on every machine, so their SHA-256 names an adapter.
    """
    layout = compute_layout(get_shapes(tensors))
    return MAGIC + layout.digest + flatten(tensors).astype("<f4", copy=False).tobytes()


def decode_tensors(data: bytes, shapes: Shapes) -> dict[str, Array]:
    """Inverse of `encode_tensors` for tensors of these names and shapes.

    Raises:
        Reject: another format, other names or shapes, a wrong length, or a value that is not finite.
    """
    layout = compute_layout(shapes)
    expected = HEADER_BYTES + 4 * layout.size
    if len(data) != expected:
        raise Reject(f"tensors: expected {expected} bytes for this adapter, got {len(data)}")
    if data[: len(MAGIC)] != MAGIC:
        raise Reject(f"tensors: expected the header {MAGIC!r}, got {data[: len(MAGIC)]!r}")
    if data[len(MAGIC) : HEADER_BYTES] != layout.digest:
        raise Reject("tensors: names or shapes differ from this network's adapter")
    flat = np.frombuffer(data, "<f4", offset=HEADER_BYTES).astype(np.float32)
    if not np.isfinite(flat).all():
        raise Reject("tensors: a value is not finite")
    return unflatten(flat, layout)


@lru_cache(maxsize=16)
def _layout(items: tuple[tuple[str, tuple[int, ...]], ...]) -> Layout:
    names = tuple(name for name, _ in items)
    shapes = tuple(shape for _, shape in items)
    sizes = tuple(math.prod(shape) for shape in shapes)
    digest = compute_digest(b"p2pfm layout 1" + msgspec.msgpack.encode(items))
    return Layout(names, shapes, sizes, (0, *accumulate(sizes)), digest)
