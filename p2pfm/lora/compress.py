"""Updates as bytes: what a peer sends of its delta, and what everyone else decodes from it.

Knows tensors and numbers only; no model, no peer. This page is the format's specification, with `topk` (which values,
in which order) and `subsets` (how sets of places and numbers are coded).

A payload is the magic bytes `P2U2` and the words of one range coder (constriction's, 32 bits each, little endian). They
hold, in this order:

    1. how many of each chunk's values are sent: one bit if all are full, else three kinds of chunk, then the numbers
    2. which ones: blocks halved down to single values, a tilt (4 bits) for each size of block   `code_subsets`
    3. the share of high magnitudes (8 bits), then for each value its sign and magnitude: 2 * is_negative + is_high
    4. level codes: each tensor's low one around their median, then its high one less its low one   `code_centred`

Values stand in canonical order in 3, tensors in 4 (those with values, those with high values); chunks in 1 and 2 in the
order of `topk`. The update of zeros is the magic bytes alone.

**One update, one payload.** Every parameter in a payload (tilts, shares, centres) is a function of the integers that it
codes, in integer arithmetic, and the decoder encodes what it has read and compares. So garbage can only ever `Reject`,
and nobody can send one update under two digests.

**The same bits everywhere.** The decoder uses integers, integer tables, and products that are exact in float32.

**Bounds.** What a decoder allocates depends on the announced adapter alone; a chunk cannot hold more values than the
network allows, because there is no way to say so; and it stops when a payload has fewer bits than values.
"""

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from p2pfm.config import CompressionConfig
from p2pfm.errors import OperatorError, Reject
from p2pfm.lora.delta import Layout, Shapes, compute_layout, flatten, get_shapes, unflatten
from p2pfm.lora.subsets import (
    Blocks,
    Coder,
    Ints,
    Reader,
    Taken,
    Writer,
    code_centred,
    code_grouped,
    code_number,
    code_subsets,
    code_weighted,
    uniform,
)
from p2pfm.lora.topk import (
    LEVEL_CODES,
    Arrangement,
    arrange,
    compute_levels,
    from_slots,
    quantise,
    select,
    to_slots,
)
from p2pfm.types import Array, Digest, Tensors, compute_digest

MAGIC = b"P2U2"
WORD_BYTES = 4
SHARE_ONE = 256
"""Of high magnitudes, in a byte: 1/256 off costs a hundred thousandth."""
FULL, EMPTY, PARTIAL = range(3)
"""Kinds of chunk."""


class Update:
    """A decoded update: `positions` (sorted, flat over the layout) and float32 `values`, and its exact norm's parts.

    Immutable; `tensors()` spreads it out, `norm()` has the same bits on every machine.
    """

    __slots__ = ("_norm", "counts", "digest", "layout", "levels", "positions", "values")

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
        self._norm: float | None = None

    def norm(self) -> float:
        """Euclidean norm, exactly rounded: squares of levels fit 10 bits and counts 29, and fsum rounds once."""
        if self._norm is None:
            squares = self.levels.astype(np.float64) ** 2 * self.counts
            self._norm = math.sqrt(math.fsum(squares.ravel().tolist()))
        return self._norm

    def tensors(self) -> dict[str, Array]:
        """Dense float32 tensors."""
        flat = np.zeros(self.layout.size, np.float32)
        flat[self.positions] = self.values
        return unflatten(flat, self.layout)


def feed_back(residual: Tensors | None, delta: Tensors, config: CompressionConfig) -> dict[str, Array]:
    """What to compress this round: beta * residual + delta (Karimireddy et al. 2019, with decay).

    Raises:
        OperatorError: no delta of real numbers, or the residual is another adapter's.
    """
    _validate(delta, "delta")
    if residual is None:
        return {name: np.array(delta[name], np.float32) for name in sorted(delta)}
    _validate(residual, "residual")
    if get_shapes(residual) != get_shapes(delta):
        name = _first_difference(get_shapes(residual), get_shapes(delta))
        raise OperatorError(
            f"the residual is another adapter's than the delta: they differ in {name}. Drop the residual"
        )
    return {name: feed_back_array(residual[name], delta[name], config) for name in sorted(delta)}


def feed_back_array(residual: Array, delta: Array, config: CompressionConfig, out: Array | None = None) -> Array:
    """`feed_back` of one array, whatever it holds; `out`: where to, may be `delta` itself."""
    fed: Array = np.add(np.float32(config.beta) * residual, delta, out=out)
    return fed.astype(np.float32, copy=False)


def compress(tensors: Tensors, config: CompressionConfig) -> tuple[bytes, dict[str, Array]]:
    """(payload, the tensors that every receiver will decode from it).

    Of each chunk the `keep` largest magnitudes are sent (a shorter tail's share in proportion, ties to the lower
    index, none below 2**-80; those over 2**40 are sent as nearly that); what is left out is the caller's residual:
    tensors - decoded. Any type of real floating-point numbers is taken, as the nearest float32.

    Raises:
        OperatorError: no tensors, names that are no text, other types of numbers, or a value that is not finite.
        ConfigError: chunk or keep out of range.
    """
    _validate(tensors, "delta")
    layout = compute_layout(get_shapes(tensors))
    with np.errstate(over="ignore"):  # a float64 over float32's range: not finite, said below
        flat = flatten(tensors)
    arrangement, parts, _ = _choose(flat[None], layout, config)
    decoded = np.zeros(layout.size, np.float32)
    decoded[parts.positions] = _compute_values(parts)
    return _encode(arrangement, parts), unflatten(decoded, layout)


def quantise_rows(rows: Array, layout: Layout, config: CompressionConfig) -> list[tuple[Update, int]]:
    """What every receiver would decode from `compress` of each row, and how many bytes that takes at most, without
    coding it.

    For simulations: the coder is most of a small model's time. The bytes are log2 of the ways to choose each chunk's
    positions, a sign, and the entropy of the two magnitudes; the coder needs less where positions cluster. An update's
    digest is of its values, and no row's depends on another's.

    Args:
        rows: (num_updates, layout.size) float32, flat tensors of this layout.

    Raises:
        OperatorError, ConfigError: as `compress`.
    """
    arrangement, parts, sent = _choose(rows, layout, config)
    values = _compute_values(parts)
    num_tensors = len(layout.names)
    counts, levels = (each.reshape(len(rows), num_tensors, 2) for each in _count_levels(parts))
    symbols, codes = parts.symbols.astype(np.uint8), parts.codes.reshape(len(rows), num_tensors, 2)
    cuts = np.searchsorted(parts.positions, layout.size * np.arange(len(rows) + 1))
    found = []
    for number, (start, end) in enumerate(itertools.pairwise(cuts.tolist())):
        positions = parts.positions[start:end] - number * layout.size
        digest = compute_digest(
            layout.digest
            + positions.astype(np.int32).tobytes()
            + symbols[start:end].tobytes()
            + codes[number].tobytes()
        )
        share = int(counts[number, :, 1].sum()) / max(1, end - start)
        entropy = -sum(part * math.log2(part) for part in (share, 1 - share) if part > 0)
        num_ways = sum(map(_log2_ways, arrangement.sizes.tolist(), sent[number].tolist()))
        num_bits = num_ways + (end - start) * (1 + entropy)
        update = Update(digest, layout, positions, values[start:end], levels[number], counts[number])
        found.append((update, len(MAGIC) + math.ceil(num_bits / 8)))
    return found


@lru_cache(maxsize=4096)
def _log2_ways(size: int, count: int) -> float:
    return (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)


def _choose(rows: Array, layout: Layout, config: CompressionConfig) -> tuple[Arrangement, "Parts", NDArray[np.int64]]:
    """Which values of each row are sent, and as what: all in one, as tensors of one large update; and how many of each
    row's chunks (num_updates, num_chunks).
    """
    arrangement = arrange(layout, config.chunk, config.keep)
    if not np.isfinite(rows).all():
        flat = next(row for row in rows if not np.isfinite(row).all())
        bad = {name: int((~np.isfinite(values)).sum()) for name, values in unflatten(flat, layout).items()}
        name = next(name for name, count in bad.items() if count)
        raise OperatorError(
            f"a delta must be finite in float32 before it is compressed: {name} has {bad[name]} values that are not "
            f"({sum(bad.values())} in all). Lower network.training.learning_rate"
        )
    positions, sent = select(rows, arrangement)
    kept = rows.ravel()[positions]
    starts = (np.arange(len(rows))[:, None] * layout.size + layout.offsets[:-1]).ravel()
    groups = _group(positions, np.append(starts, rows.size))
    codes, is_high = quantise(np.abs(kept), groups, len(starts))
    return arrangement, Parts(positions, groups, 2 * (kept < 0).astype(np.int32) + is_high, codes), sent


def decode_payload(data: bytes, shapes: Shapes, config: CompressionConfig, bytes_max: int) -> Update:
    """The update in a payload for an adapter of these shapes.

    Raises:
        Reject: anything but the one encoding of a legal update.
    """
    if len(data) > bytes_max:
        raise Reject(f"payload: expected at most {bytes_max} bytes, got {len(data)}")
    if data[: len(MAGIC)] != MAGIC:
        raise Reject(f"payload: expected it to begin with {MAGIC!r}, got {bytes(data[: len(MAGIC)])!r}")
    if len(data) % WORD_BYTES:
        raise Reject(f"payload: expected whole words of {WORD_BYTES} bytes, got {len(data)} bytes")
    arrangement = arrange(compute_layout(shapes), config.chunk, config.keep)
    if len(data) == len(MAGIC):
        parts = _get_nothing(arrangement)
    else:
        parts = code_update(Reader(data[len(MAGIC) :]), arrangement, None, 8 * len(data))
        if _encode(arrangement, parts) != data:
            raise Reject("payload: not the canonical encoding of its update")
    counts, levels = _count_levels(parts)
    return Update(compute_digest(data), arrangement.layout, parts.positions, _compute_values(parts), levels, counts)


def _count_levels(parts: "Parts") -> tuple[NDArray[np.int64], Array]:
    """Each tensor's (counts of low and high values, magnitudes of its used levels), (num_tensors, 2) each."""
    num = 2 * len(parts.codes)
    counts = np.bincount(2 * parts.groups + (parts.symbols & 1), minlength=num).reshape(-1, 2)
    return counts, np.where(counts > 0, compute_levels(parts.codes), np.float32(0))


# --- the format ------------------------------------------------------------------------------------------------------
# Each function writes what is known, or reads it where that is None (see `subsets`).


class Parts(NamedTuple):
    """What a payload holds: the integers from which everybody computes the same values."""

    positions: NDArray[np.int64]
    """Of the values that are sent, in the layout, in canonical order (num_values,); `groups` is the tensor of each."""
    groups: NDArray[np.int64]
    symbols: Ints
    """(num_values,): 2 * is_negative + is_high."""
    codes: Ints
    """(num_tensors, 2): low and high level; 0 where unused."""


def code_update(coder: Coder, arrangement: Arrangement, known: Parts | None, values_max: int) -> Parts:
    """An update of at least one value.

    Raises:
        Reject: over `values_max` values (each needs a bit for its sign), or none; words that no Writer wrote.
    """
    blocks = Blocks(arrangement.starts, arrangement.sizes, arrangement.num_slots)
    taken = None if known is None else Taken(_mask(known.positions, arrangement))
    counts = _code_counts(coder, arrangement, None if taken is None else taken.count(blocks.starts, blocks.sizes))
    num_values = int(counts.sum())
    if not 0 < num_values <= values_max:
        raise Reject(f"payload: expected at least one value and at most {values_max}, one a bit, got {num_values}")
    mask = code_subsets(coder, blocks, counts, taken)
    positions, groups = _locate(mask, arrangement) if known is None else (known.positions, known.groups)
    symbols = _code_symbols(coder, num_values, known and known.symbols)
    codes = _code_levels(coder, groups, symbols, len(arrangement.layout.names), known and known.codes)
    return Parts(positions, groups, symbols, codes)


def _encode(arrangement: Arrangement, parts: Parts) -> bytes:
    """The one payload of these parts."""
    writer = Writer()
    if len(parts.symbols):
        code_update(writer, arrangement, parts, len(parts.symbols))
    return MAGIC + writer.get_bytes()


def _code_counts(coder: Coder, arrangement: Arrangement, known: Ints | None) -> Ints:
    """Values sent of each chunk, between 0 and the chunk's most."""
    most, num = arrangement.most, len(arrangement.most)
    if code_number(coder, 2, None if known is None else int((known == most).all())):
        return most
    kinds = None
    if known is not None:
        kinds = np.where(known == most, FULL, np.where(known == 0, EMPTY, PARTIAL)).astype(np.int32)
    weights = [
        code_number(coder, num + 1, None if kinds is None else int((kinds == kind).sum())) for kind in (FULL, EMPTY)
    ]
    num_partial = num - sum(weights)
    if num_partial < 0 or weights[FULL] == num:
        raise Reject(f"payload: {weights} full and empty chunks of {num}")
    kinds = code_weighted(coder, (*weights, num_partial), num, kinds)
    counts = np.where(kinds == FULL, most, 0).astype(np.int32)
    partial = np.flatnonzero(kinds == PARTIAL)
    if (most[partial] == 1).any():
        raise Reject("payload: a chunk of one value is neither sent nor not sent")
    counts[partial] = 1
    open_ = partial[most[partial] > 2]  # 1 to most - 1 values, all alike
    symbols, order = code_grouped(coder, most[open_] - 1, uniform, None if known is None else known[open_] - 1)
    counts[open_[order]] += symbols
    return counts


def _code_symbols(coder: Coder, num_values: int, known: Ints | None) -> Ints:
    """2 * is_negative + is_high of each value."""
    share = None
    if known is not None:
        num_high = int((known & 1).sum())
        share = min(max((2 * SHARE_ONE * num_high + num_values) // (2 * num_values), 1), SHARE_ONE - 1)
    share = code_number(coder, SHARE_ONE, share)
    return code_weighted(coder, (SHARE_ONE - share, share) * 2, num_values, known)


def _code_levels(coder: Coder, groups: NDArray[np.int64], symbols: Ints, num_tensors: int, known: Ints | None) -> Ints:
    """Level codes (num_tensors, 2); 0 where unused. A tensor with values uses its low level; a high one is higher."""
    used = np.bincount(2 * groups + (symbols & 1), minlength=2 * num_tensors).reshape(num_tensors, 2) > 0
    has_low, has_high = used[:, 0], used[:, 1]
    if (has_high & ~has_low).any():
        raise Reject("payload: a tensor with high values and no low ones")
    codes = np.zeros((num_tensors, 2), np.int32)
    num_low, num_high = int(has_low.sum()), int(has_high.sum())
    codes[has_low, 0] = code_centred(coder, LEVEL_CODES, num_low, None if known is None else known[has_low, 0])
    steps = None if known is None else known[has_high, 1] - known[has_high, 0]
    codes[has_high, 1] = codes[has_high, 0] + code_centred(coder, LEVEL_CODES, num_high, steps)
    if (codes[has_high, 1] <= codes[has_high, 0]).any() or codes.max(initial=0) >= LEVEL_CODES:
        raise Reject("payload: a tensor's high level is not above its low one, or above all levels")
    return codes


def _mask(positions: NDArray[np.int64], arrangement: Arrangement) -> NDArray[np.uint8]:
    """(num_slots,): 1 where a value is sent."""
    flat = np.zeros(arrangement.layout.size, np.uint8)
    flat[positions] = 1
    return to_slots(flat, arrangement)


def _locate(mask: NDArray[np.uint8], arrangement: Arrangement) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where in the layout the values of a mask lie, in canonical order, and the tensor of each."""
    positions = np.flatnonzero(from_slots(mask, arrangement).view(np.bool_)).astype(np.int64)
    return positions, _group(positions, np.array(arrangement.layout.offsets))


def _group(positions: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The tensor of each ascending position; `bounds`: where each begins, and the end."""
    return np.repeat(np.arange(len(bounds) - 1), np.diff(np.searchsorted(positions, bounds)))


def _get_nothing(arrangement: Arrangement) -> Parts:
    none = np.zeros(0, np.int64)
    return Parts(none, none, none.astype(np.int32), np.zeros((len(arrangement.layout.names), 2), np.int32))


def _compute_values(parts: Parts) -> Array:
    magnitudes = compute_levels(parts.codes)[parts.groups, parts.symbols & 1]
    values: Array = np.where(parts.symbols >> 1, -magnitudes, magnitudes)
    return values


def _validate(tensors: Tensors, what: str) -> None:
    """Raises: OperatorError."""
    if not tensors:
        raise OperatorError(f"an empty {what}: expected at least one named tensor")
    for name, values in tensors.items():
        if not isinstance(name, str):
            raise OperatorError(f"{what}: expected tensors named by text, got the name {name!r}")
        if not isinstance(values, np.ndarray | np.generic):
            raise OperatorError(f"{what}: expected a numpy array for {name}, got {type(values).__name__}: convert it")
        if not np.issubdtype(values.dtype, np.floating):
            raise OperatorError(f"{what}: expected floating-point numbers in {name}, got {values.dtype}: use float32")


def _first_difference(left: Shapes, right: Shapes) -> str:
    name = min(name for name in {*left, *right} if left.get(name) != right.get(name))
    return f"{name} ({left.get(name, 'missing')} and {right.get(name, 'missing')})"
