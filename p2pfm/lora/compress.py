"""Error-feedback top-k updates as bytes: chunked selection, two magnitudes a tensor, entropy coding.

Knows tensors and numbers only; no model, no peer. The decoder uses integer arithmetic, integer tables from the header
and exact float products (no libm), so every machine decodes the same bits; and it accepts only the one encoding that
the encoder would have written (decode, encode again, compare), so garbage can only ever `Reject`.

A payload:
    magic, number of gap symbols, number of values      4 + 4 + 4 bytes, little endian
    scale                                               2 bytes: the upper half of a float32 (so products are exact)
    gap table, value table                              65 + 4 bytes: relative frequencies
    level codes                                         2 bytes a tensor: its low and high magnitude
    range coder's words                                 4 bytes each

Positions run over the flat vector of all tensors in canonical order; a gap symbol g < 64 skips g positions and takes
the next one, 64 skips 64 and takes none (for the nearly geometric gaps of top-k this costs nothing: they are
memoryless). A value symbol is 2 * is_negative + is_high.
"""

import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np
from constriction import stream
from numpy.typing import NDArray

from p2pfm.config import CompressionConfig
from p2pfm.errors import Reject
from p2pfm.lora.delta import Layout, Shapes, compute_layout, flatten, get_shapes, unflatten
from p2pfm.types import Array, Digest, Tensors, compute_digest

MAGIC = b"P2U1"
HEAD = struct.Struct("<4sIIH")
SKIP = 64
"""The gap symbol that takes no position: large enough for 1/16 density, small enough for a 65-byte table."""
GAP_SYMBOLS = SKIP + 1
VALUE_SYMBOLS = 4
LLOYD_STEPS = 12
"""The 1-bit quantiser moves less than its codes' resolution after about eight."""
LEVEL_BITS = 20
"""A level is scale * (16 + mantissa) * 2**(exponent - 20): 4 bits each, 2**-16 to 31/32 of the scale."""
SCALE_EXPONENT_MAX = 127 + 40
SCALE_EXPONENT_MIN = 127 - 60
"""Scales from 2**-60 to 2**40: no level is subnormal, no merge of certified updates overflows."""


class Update:
    """A decoded update: `positions` (sorted, flat over the layout) and float32 `values`, and its exact norm's parts.

    Immutable; `tensors()` spreads it out, `norm()` has the same bits on every machine.
    """

    __slots__ = ("counts", "digest", "layout", "levels", "positions", "values")

    def __init__(
        self,
        digest: Digest,
        layout: Layout,
        positions: NDArray[np.int64],
        values: Array,
        levels: Array,
        counts: NDArray[np.int64],
    ) -> None:
        """`levels` and `counts`: (num_tensors, 2), the two magnitudes of each tensor and how often each occurs."""
        self.digest = digest
        self.layout = layout
        self.positions = positions
        self.values = values
        self.levels = levels
        self.counts = counts

    def norm(self) -> float:
        """Euclidean norm, exactly rounded: squares of levels fit 26 bits and counts 27, and fsum rounds once."""
        squares = self.levels.astype(np.float64) ** 2 * self.counts
        return math.sqrt(math.fsum(squares.ravel().tolist()))

    def tensors(self) -> dict[str, Array]:
        """Dense float32 tensors."""
        flat = np.zeros(self.layout.size, np.float32)
        flat[self.positions] = self.values
        return unflatten(flat, self.layout)


def feed_back(residual: Tensors | None, delta: Tensors, config: CompressionConfig) -> dict[str, Array]:
    """What to compress this round: beta * residual + delta (Karimireddy et al. 2019, with decay)."""
    if residual is None:
        return {name: np.array(delta[name], np.float32) for name in sorted(delta)}
    beta = np.float32(config.beta)
    return {name: beta * residual[name] + delta[name] for name in sorted(delta)}


def compress(tensors: Tensors, config: CompressionConfig) -> tuple[bytes, dict[str, Array]]:
    """(payload, the tensors that every receiver will decode from it). Values must be finite.

    Of each chunk the `keep` largest magnitudes are sent (a shorter tail's share in proportion, ties to the lower
    index, zeros never); what is left out is the caller's residual: tensors - decoded.
    """
    layout = compute_layout(get_shapes(tensors))
    flat = flatten(tensors)
    assert np.isfinite(flat).all(), "a delta must be finite before it is compressed"
    positions = _select(flat, layout, config)
    groups = _groups(positions, layout)
    kept = flat[positions]
    scale, codes, is_high = _quantise(np.abs(kept), groups, len(layout.names))
    symbols = 2 * (kept < 0).astype(np.int32) + is_high
    payload = _encode(layout, positions, symbols, scale, codes)
    values = _values(_levels(scale, codes), groups, symbols)
    decoded = np.zeros(layout.size, np.float32)
    decoded[positions] = values
    return payload, unflatten(decoded, layout)


def decode_payload(data: bytes, shapes: Shapes, config: CompressionConfig, bytes_max: int) -> Update:
    """The update in a payload for an adapter of these shapes.

    Raises:
        Reject: anything but the one encoding of a legal update: length, counts, order, range, tables, trailing bytes.
    """
    if len(data) > bytes_max:
        raise Reject(f"payload: expected at most {bytes_max} bytes, got {len(data)}")
    layout = compute_layout(shapes)
    num_tensors = len(layout.names)
    head = HEAD.size + GAP_SYMBOLS + VALUE_SYMBOLS + 2 * num_tensors
    if len(data) < HEAD.size or data[:4] != MAGIC:
        raise Reject(f"payload: expected it to begin with {MAGIC!r}")
    _, num_gaps, num_values, scale_half = HEAD.unpack_from(data)
    if num_values == 0:
        if data != _encode_nothing():
            raise Reject("payload: an empty update has one encoding only")
        return _empty(data, layout)
    # All bounds before anything is allocated: no payload makes a receiver hold more than the announced shape.
    values_max = _limits(layout, config.chunk, config.keep)[1]
    if not num_values <= num_gaps <= num_values + layout.size // SKIP or num_values > values_max:
        raise Reject(f"payload: {num_values} values in {num_gaps} gaps is impossible (at most {values_max})")
    if not SCALE_EXPONENT_MIN <= scale_half >> 7 <= SCALE_EXPONENT_MAX:  # a set sign bit is above every exponent
        raise Reject("payload: scale out of range")
    if len(data) <= head or (len(data) - head) % 4:
        raise Reject(f"payload: expected a header of {head} bytes and whole words, got {len(data)} bytes")
    tables = np.frombuffer(data, np.uint8, GAP_SYMBOLS + VALUE_SYMBOLS, HEAD.size)
    codes = np.frombuffer(data, np.uint8, 2 * num_tensors, head - 2 * num_tensors).reshape(num_tensors, 2)
    gaps, symbols = _decode_words(data[head:], tables, num_gaps, num_values)
    positions = _positions(gaps)
    if len(positions) != num_values or positions[-1] >= layout.size or gaps[-1] == SKIP:
        raise Reject("payload: gaps do not fit the announced tensors")
    _check_density(positions, layout, config)
    if _encode(layout, positions, symbols, scale_half, codes) != data:
        raise Reject("payload: not the canonical encoding of its update")
    groups = _groups(positions, layout)
    levels = _levels(scale_half, codes)
    counts = np.bincount(2 * groups + (symbols & 1), minlength=2 * num_tensors).reshape(num_tensors, 2)
    _check_levels(codes, counts)
    values = _values(levels, groups, symbols)
    return Update(compute_digest(data), layout, positions, values, levels, counts)


# --- selection and quantisation --------------------------------------------------------------------------------------


def _select(flat: Array, layout: Layout, config: CompressionConfig) -> NDArray[np.int64]:
    """Positions of the largest magnitudes of every chunk, sorted."""
    magnitudes = np.abs(flat)
    kept = np.zeros(layout.size, np.bool_)
    for start, size in zip(layout.offsets, layout.sizes, strict=False):
        whole = size - size % config.chunk
        if whole:
            block = slice(start, start + whole)
            rows = magnitudes[block].reshape(-1, config.chunk)  # (num_chunks, chunk)
            kept[block] = _top(rows, config.keep).ravel()
        if whole < size:
            block = slice(start + whole, start + size)
            kept[block] = _top(magnitudes[block][None], _tail_keep(size - whole, config.chunk, config.keep)).ravel()
    return np.flatnonzero(kept)


def _top(rows: Array, keep: int) -> NDArray[np.bool_]:
    """Mask of each row's `keep` largest entries; of equal ones the earlier, zeros never."""
    if keep >= rows.shape[1]:
        return rows > 0
    threshold = np.partition(rows, rows.shape[1] - keep, axis=1)[:, rows.shape[1] - keep, None]  # (num_chunks, 1)
    mask = (rows >= threshold) & (rows > 0)
    crowded = np.flatnonzero(mask.sum(axis=1) > keep)
    if len(crowded):
        above = rows[crowded] > threshold[crowded]
        equal = mask[crowded] & ~above
        room = keep - above.sum(axis=1, keepdims=True)
        mask[crowded] = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return mask


def _tail_keep(length: int, chunk: int, keep: int) -> int:
    return -(-keep * length // chunk)


@lru_cache(maxsize=16)
def _limits(layout: Layout, chunk: int, keep: int) -> tuple[NDArray[np.int64], int, NDArray[np.int64]]:
    """(first position of every chunk and the end, most values in all, most values of every chunk)."""
    starts: list[int] = []
    most: list[int] = []
    for start, size in zip(layout.offsets, layout.sizes, strict=False):
        starts += range(start, start + size, chunk)
        most += [keep] * (size // chunk)
        if size % chunk:
            most.append(_tail_keep(size % chunk, chunk, keep))
    return np.array([*starts, layout.size], np.int64), sum(most), np.array(most, np.int64)


def _check_density(positions: NDArray[np.int64], layout: Layout, config: CompressionConfig) -> None:
    bounds, _, most = _limits(layout, config.chunk, config.keep)
    if (np.diff(np.searchsorted(positions, bounds)) > most).any():
        raise Reject("payload: more values in a chunk than the network allows")


def _groups(positions: NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    """The tensor that each position lies in."""
    return np.searchsorted(np.array(layout.offsets[1:]), positions, side="right")


def _quantise(
    magnitudes: Array, groups: NDArray[np.int64], num_groups: int
) -> tuple[int, NDArray[np.uint8], NDArray[np.int32]]:
    """(scale's upper half, level codes (num_groups, 2), whether each value takes its group's high level).

    Lloyd-Max with one bit, all groups at once: the threshold is the middle of the two means.
    """
    weights = magnitudes.astype(np.float64)
    count = np.bincount(groups, minlength=num_groups)
    total = np.bincount(groups, weights, num_groups)
    low = high = threshold = total / np.maximum(count, 1)
    for _ in range(LLOYD_STEPS):
        is_high = weights >= threshold[groups]
        count_high = np.bincount(groups[is_high], minlength=num_groups)
        total_high = np.bincount(groups[is_high], weights[is_high], num_groups)
        high = np.where(count_high > 0, total_high / np.maximum(count_high, 1), low)
        low = np.where(count_high < count, (total - total_high) / np.maximum(count - count_high, 1), high)
        threshold = (low + high) / 2
    scale = _scale_above(float(high.max(initial=0.0)))
    codes = np.stack([_code(low, scale), _code(high, scale)], axis=1)
    levels = _levels(scale, codes)
    middle = levels.astype(np.float64).mean(axis=1)
    chosen = (magnitudes >= middle[groups]) & (codes[:, 1] > codes[:, 0])[groups]
    used = np.bincount(2 * groups + chosen, minlength=2 * num_groups).reshape(num_groups, 2)
    return scale, np.where(used > 0, codes, 0).astype(np.uint8), chosen.astype(np.int32)


def _scale_above(largest: float) -> int:
    """The upper half of the least float32 with 7 bits of mantissa that is at least 32/31 of `largest`."""
    wanted = np.float32(largest * 32 / 31)
    half = (int(wanted.view(np.uint32)) >> 16) + 1
    return min(max(half, SCALE_EXPONENT_MIN << 7), (SCALE_EXPONENT_MAX << 7) + 127)


def _scale(half: int) -> float:
    return float(np.uint32(half << 16).view(np.float32))


def _code(level: NDArray[np.float64], half: int) -> NDArray[np.uint8]:
    """The nearest level code."""
    parts = np.clip(level / _scale(half), 2.0**-16, 31 / 32)
    fraction, exponent = np.frexp(parts)  # parts = fraction * 2**exponent, fraction in [1/2, 1)
    code = ((exponent + 15) * 16 + np.rint(fraction * 32).astype(np.int64) - 16).astype(np.int64)
    clipped: NDArray[np.uint8] = np.clip(code, 1, 255).astype(np.uint8)
    return clipped


def _levels(half: int, codes: NDArray[np.uint8]) -> Array:
    """The magnitudes (num_tensors, 2) of level codes: 8 bits of scale times 5 of code are exact in float32."""
    wide = codes.astype(np.int32)
    levels: Array = np.ldexp(_scale(half) * (16 + (wide & 15)), (wide >> 4) - LEVEL_BITS).astype(np.float32)
    return levels


def _values(levels: Array, groups: NDArray[np.int64], symbols: NDArray[np.int32]) -> Array:
    magnitudes = levels[groups, symbols & 1]
    values: Array = np.where(symbols >> 1, -magnitudes, magnitudes).astype(np.float32)
    return values


def _check_levels(codes: NDArray[np.uint8], counts: NDArray[np.int64]) -> None:
    if ((codes == 0) != (counts == 0)).any():
        raise Reject("payload: a level without values, or values without a level")
    both = (counts > 0).all(axis=1)
    if (codes[both, 0] >= codes[both, 1]).any():
        raise Reject("payload: a tensor's low level is not below its high one")


# --- entropy coding --------------------------------------------------------------------------------------------------


def _encode(
    layout: Layout,
    positions: NDArray[np.int64],
    symbols: NDArray[np.int32],
    scale_half: int,
    codes: NDArray[np.uint8],
) -> bytes:
    """The one payload of these positions, value symbols and levels."""
    if len(positions) == 0:
        return _encode_nothing()
    gaps = _gaps(positions)
    gap_table = _table(gaps, GAP_SYMBOLS)
    value_table = _table(symbols, VALUE_SYMBOLS)
    coder = stream.queue.RangeEncoder()
    coder.encode(gaps, _model(gap_table))
    coder.encode(symbols, _model(value_table))
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    head = HEAD.pack(MAGIC, len(gaps), len(symbols), scale_half)
    return head + gap_table.tobytes() + value_table.tobytes() + codes.tobytes() + words


def _encode_nothing() -> bytes:
    return HEAD.pack(MAGIC, 0, 0, 0)


def _empty(data: bytes, layout: Layout) -> Update:
    nothing = np.zeros(0, np.int64)
    shape = (len(layout.names), 2)
    levels, counts = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    return Update(compute_digest(data), layout, nothing, np.zeros(0, np.float32), levels, counts)


def _gaps(positions: NDArray[np.int64]) -> NDArray[np.int32]:
    """Gap symbols: for each position its skips of 64, then the rest."""
    distances = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum(distances // SKIP + 1) - 1
    symbols = np.full(int(ends[-1]) + 1, SKIP, np.int32)
    symbols[ends] = distances % SKIP
    return symbols


def _positions(gaps: NDArray[np.int32]) -> NDArray[np.int64]:
    """Inverse of `_gaps`."""
    steps = gaps.astype(np.int64) + (gaps < SKIP)
    return np.cumsum(steps)[gaps < SKIP] - 1


def _table(symbols: NDArray[np.int32], num_symbols: int) -> NDArray[np.uint8]:
    """Frequencies relative to the most frequent symbol's 255; 0 only for a symbol that never occurs."""
    counts = np.bincount(symbols, minlength=num_symbols).astype(np.int64)
    scaled = (counts * 510 // counts.max() + 1) // 2  # rounded to nearest, in integers
    return np.where(counts > 0, np.maximum(scaled, 1), 0).astype(np.uint8)


def _model(table: NDArray[np.uint8]) -> Any:
    # Small integers as floats: every sum is exact, and the one division and products that follow are plain IEEE.
    return stream.model.Categorical(table.astype(np.float32), perfect=False)


def _decode_words(
    data: bytes, tables: NDArray[np.uint8], num_gaps: int, num_values: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    gap_table, value_table = tables[:GAP_SYMBOLS], tables[GAP_SYMBOLS:]
    if gap_table.max() != 255 or value_table.max() != 255:
        raise Reject("payload: a frequency table's largest entry must be 255")
    decoder = stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
    try:
        gaps = decoder.decode(_model(gap_table), num_gaps)
        symbols = decoder.decode(_model(value_table), num_values)
    except (AssertionError, ValueError) as error:
        # What constriction raises for words that no encoder wrote.
        raise Reject(f"payload: not a range coder's output: {error}") from error
    return gaps, symbols
