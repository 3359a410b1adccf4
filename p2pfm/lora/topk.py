"""What of a delta is sent: the largest values of every chunk, and two magnitudes a tensor to send them with.

Knows tensors and numbers only; no bytes. A sender's arithmetic here may differ between machines in the last bit: what
receivers must agree on is the integers that come out (places, signs, level codes), and `compress` codes those.

**Order.** Chunks run over each tensor with its shorter axis innermost (a LoRA A of (rank, in) is read as (in, rank)),
because the values of one model dimension are large or small together: on SmolLM2's deltas places cost a fifth less than
in an order that ignores it. **Slots.** Chunks stand one after the other, the longest first and equal ones in canonical
order, each in a room of the next power of two; so every block of 2**h slots that begins at a multiple of 2**h lies in
one chunk, and a chunk can be halved down to its values.
"""

from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from p2pfm.errors import ConfigError, OperatorError
from p2pfm.lora.delta import Layout
from p2pfm.types import Array

SLOTS_MAX = (1 << 31) - 1
"""Slots are numbered by int32."""
CHUNKS_MAX = (1 << 24) - 1
"""Chunks are counted in a frequency table, which must stay below 2**24 (`subsets`)."""
CHUNK_MAX = 1 << 16
LEVEL_EXPONENT_MIN = -80
LEVEL_EXPONENT_MAX = 39
"""Levels from 2**-80 to nearly 2**40: none is subnormal, no merge of certified updates overflows."""
LEVEL_CODES = 16 * (LEVEL_EXPONENT_MAX - LEVEL_EXPONENT_MIN + 1)
"""A level is (16 + code % 16) / 16 * 2**(code // 16 - 80): steps of 3 to 6%, which cost 2% of the quantiser's error."""
LEVEL_MIN = 2.0**LEVEL_EXPONENT_MIN
LLOYD_STEPS = 20
"""Then the 1-bit quantiser of a Gaussian's tail is within 0.1% of where it ends."""

KEYS_MAX = 1 << 17
"""Magnitudes compared at once: 1 MB of keys, which stay in a cache."""
MAGNITUDE = np.int32(0x7FFFFFFF)
"""The bits of a float32 but for its sign."""
INDEX = np.int64(0xFFFFFFFF)
LOWEST = np.int64(np.float32(LEVEL_MIN).view(np.int32)) << 32

Doubles = NDArray[np.float64]
Number = TypeVar("Number", np.float32, np.uint8)


class Rows(NamedTuple):
    """Chunks of one length, side by side: `num` rooms of `room` slots from `slot`, `size` values each, `keep` sent."""

    slot: int
    num: int
    room: int
    size: int
    keep: int


class Piece(NamedTuple):
    """Chunks of one tensor and one length: its values from `start` on (shorter axis innermost) go to `rows`."""

    tensor: int
    start: int
    rows: Rows


class Arrangement(NamedTuple):
    """Where each value of a layout stands among the slots. Arrays have one entry a chunk, in the slots' order."""

    layout: Layout
    pieces: tuple[Piece, ...]
    rows: tuple[Rows, ...]
    num_slots: int
    starts: NDArray[np.int32]
    """A chunk's first slot."""
    sizes: NDArray[np.int32]
    """Its length."""
    most: NDArray[np.int32]
    """How many of its values may be sent."""


@lru_cache(maxsize=16)
def arrange(layout: Layout, chunk: int, keep: int) -> Arrangement:
    """The slots of a layout's values when `keep` of every `chunk` are sent (a shorter tail's share in proportion).

    Raises:
        ConfigError: chunk or keep out of range.
        OperatorError: more parameters or chunks than can be numbered.
    """
    if not (1 <= keep <= chunk <= CHUNK_MAX):
        raise ConfigError(f"compression: expected 1 <= keep <= chunk <= {CHUNK_MAX}, got keep {keep} and chunk {chunk}")
    parts: list[tuple[int, int, int, int]] = []  # length, tensor, first value, number of chunks
    for tensor, size in enumerate(layout.sizes):
        whole = size // chunk
        if whole:
            parts.append((chunk, tensor, 0, whole))
        if size % chunk:
            parts.append((size % chunk, tensor, whole * chunk, 1))
    parts.sort(key=lambda part: -part[0])
    pieces: list[Piece] = []
    slot = 0
    for size, tensor, start, num in parts:
        room = 1 << (size - 1).bit_length()
        pieces.append(Piece(tensor, start, Rows(slot, num, room, size, -(-keep * size // chunk))))
        slot += num * room
    num_chunks = sum(piece.rows.num for piece in pieces)
    if slot > SLOTS_MAX or num_chunks > CHUNKS_MAX:
        raise OperatorError(
            f"an adapter of {layout.size} parameters in {num_chunks} chunks: expected at most {SLOTS_MAX} in "
            f"{CHUNKS_MAX}. Lower network.adapter.rank or raise network.compression.chunk"
        )
    joined: list[Rows] = []
    for piece in pieces:
        if joined and joined[-1].size == piece.rows.size:
            joined[-1] = joined[-1]._replace(num=joined[-1].num + piece.rows.num)
        else:
            joined.append(piece.rows)
    starts = [np.arange(rows.num, dtype=np.int32) * rows.room + rows.slot for rows in joined]
    nums = [rows.num for rows in joined]
    return Arrangement(
        layout=layout,
        pieces=tuple(pieces),
        rows=tuple(joined),
        num_slots=slot,
        starts=np.concatenate([np.zeros(0, np.int32), *starts]).astype(np.int32),
        sizes=np.repeat(np.array([rows.size for rows in joined], np.int32), nums),
        most=np.repeat(np.array([rows.keep for rows in joined], np.int32), nums),
    )


def to_slots(flat: NDArray[Number], arrangement: Arrangement) -> NDArray[Number]:
    """The layout's flat vector, spread over the slots (num_slots,); slots without a value are 0."""
    slots = np.zeros(arrangement.num_slots, flat.dtype)
    for piece in arrangement.pieces:
        rows, count = piece.rows, piece.rows.num * piece.rows.size
        values = _innermost(flat, arrangement.layout, piece.tensor).reshape(-1)[piece.start : piece.start + count]
        _room(slots, rows)[:] = values.reshape(rows.num, rows.size)
    return slots


def from_slots(slots: NDArray[Number], arrangement: Arrangement) -> NDArray[Number]:
    """Inverse of `to_slots`."""
    layout = arrangement.layout
    flat = np.zeros(layout.size, slots.dtype)
    ordered = np.zeros(layout.size, slots.dtype)  # each tensor where it is in `flat`, its shorter axis innermost
    for piece in arrangement.pieces:
        start = layout.offsets[piece.tensor] + piece.start
        ordered[start : start + piece.rows.num * piece.rows.size] = _room(slots, piece.rows).reshape(-1)
    for tensor, (start, size) in enumerate(zip(layout.offsets, layout.sizes, strict=False)):
        target = _innermost(flat, layout, tensor)
        target[...] = ordered[start : start + size].reshape(target.shape)
    return flat


def select(rows: Array, arrangement: Arrangement) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which values are sent: of every chunk the largest magnitudes; of equal ones the earlier, none below LEVEL_MIN.

    Args:
        rows: (num_updates, layout.size) finite float32, updates of this layout.

    Returns:
        (places (num_values,), counts (num_updates, num_chunks)): ascending in the rows' own memory order, so that
        `rows.ravel()[places]` are the values; and how many there are of each chunk, in the slots' order.
    """
    places, counts = [np.zeros(0, np.int64)], [np.zeros((len(rows), 0), np.int64)]
    for piece in arrangement.pieces:
        found, num_found = _select_piece(rows, arrangement.layout, piece)
        places += found
        counts.append(num_found)
    return np.sort(np.concatenate(places)), np.concatenate(counts, axis=1)


def _select_piece(rows: Array, layout: Layout, piece: Piece) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """`select` of one piece: places in no order, and counts (num_updates, num_chunks of the piece)."""
    start, shape, chunks = layout.offsets[piece.tensor], layout.shapes[piece.tensor], piece.rows
    tensor = _innermost(rows, layout, piece.tensor).reshape(len(rows), -1)
    values = tensor[:, piece.start : piece.start + chunks.num * chunks.size].reshape(-1, chunks.num, chunks.size)
    bits = values.view(np.int32)
    at_once = max(1, KEYS_MAX // chunks.size)
    places: list[NDArray[np.int64]] = []
    counts = np.zeros((len(rows), chunks.num), np.int64)
    for first in range(0, chunks.num, at_once):
        step = max(1, at_once // chunks.num)
        for update in range(0, len(rows), step):
            part = slice(update, update + step), slice(first, first + at_once)
            is_sent, indices = _top(bits[part], chunks.keep)  # (updates, chunks, keep)
            numbers = np.arange(is_sent.shape[1]) + first
            inner = indices + (numbers * chunks.size + piece.start)[:, None]
            within = inner % shape[0] * shape[1] + inner // shape[0] if _is_turned(shape) else inner
            within += (np.arange(is_sent.shape[0]) + update)[:, None, None] * layout.size + start
            counts[part] = np.add.reduce(is_sent, axis=2, dtype=np.int64)
            places.append(within[is_sent])
    return places, counts


def quantise(
    magnitudes: Array, groups: NDArray[np.int64], num_groups: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(level codes (num_groups, 2), whether each magnitude takes its group's high level).

    A group with one level uses the low one; codes that nothing uses are 0. Magnitudes over the highest level become it.
    """
    weights = magnitudes.astype(np.float64)
    count = np.bincount(groups, minlength=num_groups)
    low, high = _lloyd(magnitudes, groups, num_groups)
    codes = np.stack([_code(low), _code(high)], axis=1)
    middle = compute_levels(codes).astype(np.float64).mean(axis=1)
    chosen = (weights >= middle[groups]) & (codes[:, 1] > codes[:, 0])[groups]
    has_low, has_high = np.bincount(2 * groups + chosen, minlength=2 * num_groups).reshape(-1, 2).T > 0
    chosen &= has_low[groups]
    codes[:, 0] = np.where(has_low, codes[:, 0], codes[:, 1])
    codes[:, 1] = np.where(has_low & has_high, codes[:, 1], 0)
    codes[count == 0] = 0
    return codes, chosen.astype(np.int32)


def _lloyd(magnitudes: Array, groups: NDArray[np.int64], num_groups: int) -> tuple[Doubles, Doubles]:
    """(low, high), each (num_groups,): Lloyd-Max with one bit, the threshold being the middle of the two means.

    Sorted by group and magnitude once, a threshold is a place in that order, and a mean a sum over a run of it.
    """
    keys = np.sort((groups << 32) | magnitudes.view(np.uint32))
    ordered = np.append((keys & 0xFFFFFFFF).astype(np.uint32).view(np.float32).astype(np.float64), 0)
    base = np.arange(num_groups, dtype=np.int64) << 32
    begin = np.searchsorted(keys, base)
    end = np.append(begin[1:], len(keys))
    runs = np.stack([begin, end], axis=1)
    low = high = threshold = _sums(ordered, runs)[:, 0] / np.maximum(end - begin, 1)
    runs[:, 1] = -1
    for _ in range(LLOYD_STEPS):
        split = np.searchsorted(keys, base | threshold.astype(np.float32).view(np.uint32))
        split = np.minimum(np.maximum(split, begin), end)
        if (split == runs[:, 1]).all():
            break  # nothing moves any more
        runs[:, 1] = split
        sums, sizes = _sums(ordered, runs), np.stack([runs[:, 1] - begin, end - runs[:, 1]], axis=1)
        means = sums / np.maximum(sizes, 1)
        low = np.where(sizes[:, 0] > 0, means[:, 0], means[:, 1])
        high = np.where(sizes[:, 1] > 0, means[:, 1], means[:, 0])
        threshold = (low + high) / 2
    return low, high


def _sums(values: Doubles, starts: NDArray[np.int64]) -> Doubles:
    """Of the runs between consecutive starts (and the end); an empty run's is some value."""
    sums: Doubles = np.add.reduceat(values, starts.ravel()).reshape(starts.shape)
    return sums


def compute_levels(codes: NDArray[np.int32]) -> Array:
    """The magnitudes of level codes, exact in float32 (5 significant bits)."""
    levels: Array = np.ldexp((16 + codes % 16).astype(np.float32), codes // 16 + (LEVEL_EXPONENT_MIN - 4))
    return levels


def _code(level: NDArray[np.float64]) -> NDArray[np.int32]:
    """The nearest level's code."""
    fraction, exponent = np.frexp(level)  # level = fraction * 2**exponent, fraction in [1/2, 1)
    code = (exponent - 1 - LEVEL_EXPONENT_MIN) * 16 + np.rint(fraction * 32).astype(np.int32) - 16
    clipped: NDArray[np.int32] = np.clip(code, 0, LEVEL_CODES - 1).astype(np.int32)
    return clipped


def _top(bits: NDArray[np.int32], keep: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(which are high enough to be sent, indices in the chunk) of each chunk's `keep` largest magnitudes, (..., keep)
    in no order; `bits` (..., size) of float32.

    Without their sign, bits have the order of the values. A key is those and then the index's complement: of equal
    magnitudes the earlier is the larger key.
    """
    size = bits.shape[-1]
    keys = np.left_shift(bits & MAGNITUDE, 32, dtype=np.int64)
    keys |= INDEX - np.arange(size)
    if keep < size:
        keys.partition(size - keep, axis=-1)
        keys = keys[..., size - keep :]
    return keys >= LOWEST, INDEX - (keys & INDEX)


def _room(slots: NDArray[Number], rows: Rows) -> NDArray[Number]:
    """The values of these chunks (num, size): a view of the slots."""
    return slots[rows.slot : rows.slot + rows.num * rows.room].reshape(rows.num, rows.room)[:, : rows.size]


def _innermost(rows: NDArray[Number], layout: Layout, tensor: int) -> NDArray[Number]:
    """One tensor of flat vectors (..., layout.size), its shorter axis last: a view (..., *shape)."""
    shape, start = layout.shapes[tensor], layout.offsets[tensor]
    lead: tuple[int, ...] = rows.shape[:-1]
    values = rows[..., start : start + layout.sizes[tensor]].reshape(lead + shape)
    return values.swapaxes(-1, -2) if _is_turned(shape) else values


def _is_turned(shape: tuple[int, ...]) -> bool:
    """Whether its shorter axis is not the last one."""
    return len(shape) == 2 and shape[0] < shape[1]
