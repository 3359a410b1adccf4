"""Which places of a block are taken, in as few bits as their number allows: halving and a range coder.

Knows integers only; no tensor, no update. A block of 2**h places with k taken is halved: how many of the k lie in its
left half is coded, then each half is halved, until one is left alone (its place is uniform) or nothing is open. With
every set of k places alike, the left count is hypergeometric and the code's length is log2 C(2**h, k) (Cover 1973,
enumerative coding). Real sets are clustered, so at each size of block the hypergeometric weights are tilted by a Polya
urn: the density of either half is as if drawn from a Beta distribution with concentration `a` (infinite: no tilt).

One description serves both directions: every `code_` function writes what is `known` through a Writer, or reads it
through a Reader (then `known` is None), and returns it. So both walk the same steps and build the same models.

Models are integer tables. They come from IEEE multiplications and divisions in a fixed order, no libm, so that every
machine builds the same; and a table's sum is below 2**24, so that the range coder's float32 sums are exact.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from constriction import stream
from numpy.typing import NDArray

from p2pfm.errors import Reject

Ints = NDArray[np.int32]

TILTS = (0.0, *(2.0**power for power in range(8, -7, -1)))
"""Concentrations that a block size may choose from; 0 stands for an infinite one."""
DIGIT = 1 << 16
TABLE_BITS = 24
"""A model's precision in the range coder, and of the float32 sums that it makes of our tables."""
CACHED_PLACES_MAX = 512
"""Tables of larger splits are built when needed: 4096 cached ones of this size take about 30 MB."""
FAR = 16
"""A value this far from the centre is written out."""
DECAYS = (32, 60, 106, 137, 158, 185, 210, 232)
"""Of two-sided geometric tables: each step from the centre weighs so many 256ths of the last one. Their mean distances
are 1/4, 1/2, 1, 3/2, 2, 3, 5 and 10 (2 t / (1 - t**2))."""
DECAY_BOUNDS = (3, 6, 10, 14, 19, 31, 56)
"""Mean distances, in eighths, up to which each decay but the last is chosen."""


class Coder(Protocol):
    """Writes or reads symbols, whichever: the description of a format does not care."""

    def code(self, model: Any, count: int, known: Ints | None) -> Ints:
        """Write `known` (count,), or read `count` symbols where it is None; returns them."""
        ...


class Writer:
    """Collects symbols into words."""

    def __init__(self) -> None:
        self._coder = stream.queue.RangeEncoder()

    def code(self, model: Any, count: int, known: Ints | None) -> Ints:
        """See Coder."""
        assert known is not None
        assert len(known) == count
        self._coder.encode(known, model)
        return known

    def get_bytes(self) -> bytes:
        """The words so far, 4 bytes each, little endian."""
        words: bytes = self._coder.get_compressed().astype("<u4").tobytes()
        return words


class Reader:
    """Takes symbols from words; a word past the end reads as 0."""

    def __init__(self, data: bytes) -> None:
        """`data`: whole words."""
        self._coder = stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def code(self, model: Any, count: int, known: Ints | None) -> Ints:
        """See Coder.

        Raises:
            Reject: words that no Writer wrote.
        """
        assert known is None
        try:
            symbols: Ints = self._coder.decode(model, count)
        except (AssertionError, ValueError) as error:  # what constriction raises for them
            raise Reject(f"payload: not a range coder's output: {error}") from error
        return symbols


class Taken:
    """What a Writer asks of a mask (num_places,): how many places of a range are taken, and which is the first."""

    def __init__(self, mask: NDArray[np.uint8]) -> None:
        self.mask = mask
        self._before = np.zeros(len(mask) + 1, np.int32)
        np.cumsum(mask, dtype=np.int32, out=self._before[1:])
        self._places = _find(mask.view(np.bool_)).astype(np.int32)

    def count(self, start: Ints, size: Ints) -> Ints:
        """Taken places of each range."""
        counts: Ints = self._before[start + size] - self._before[start]
        return counts

    def first(self, start: Ints) -> Ints:
        """The first taken place from each start on."""
        places: Ints = self._places[self._before[start]]
        return places


class Blocks(NamedTuple):
    """Where to look for taken places: the longest first, each block within 2**h aligned places of its own.

    Arrays have one entry a block.
    """

    starts: Ints
    sizes: Ints
    num_places: int


def code_subsets(coder: Coder, blocks: Blocks, counts: Ints, known: "Taken | None") -> NDArray[np.uint8]:
    """A mask over all places (num_places,) in which block i has counts[i] ones.

    Raises:
        Reject: words that no Writer wrote.
    """
    mask = np.zeros(blocks.num_places, np.uint8) if known is None else known.mask.copy()
    heights = _bit_lengths(blocks.sizes - 1)
    # Open nodes, in the order of their places: aligned blocks of 2**height, of which the first `size` places exist
    # and `count` are taken.
    start, size, count = (np.zeros(0, np.int32) for _ in range(3))
    for height in range(int(heights.max(initial=-1)), -1, -1):
        new = _find(heights == height)
        if len(new):
            start = np.concatenate([start, blocks.starts[new]])
            size = np.concatenate([size, blocks.sizes[new]])
            count = np.concatenate([count, counts[new]])
        alone, rest = _find(count == 1), _find(count > 1)
        if len(alone):
            _code_places(coder, mask, start[alone], size[alone], known)
        start, size, count = start[rest], size[rest], count[rest]
        if len(rest) == 0:
            continue
        half = (1 << height) >> 1
        first = np.minimum(size, half)
        in_first = None if known is None else known.count(start, first)
        left = _code_splits(coder, half, first, size - first, count, in_first)
        start = _interleave(start, start + first)
        size = _interleave(first, size - first)
        count = _interleave(left, count - left)
    return mask


def code_number(coder: Coder, bound: int, known: int | None) -> int:
    """A number from 0 to bound - 1, all alike.

    Raises:
        Reject: a larger one was read.
    """
    high_bound, parts = -(-bound // DIGIT), []
    digits = [(min(bound, DIGIT), None if known is None else known % DIGIT)]
    if high_bound > 1:
        digits.insert(0, (high_bound, None if known is None else known // DIGIT))
    for digit_bound, digit in digits:
        wanted = None if digit is None else np.array([digit], np.int32)
        parts.append(int(code_bounded(coder, digit_bound, 1, wanted)[0]))
    number = parts[0] if len(parts) == 1 else parts[0] * DIGIT + parts[1]
    if number >= bound:
        raise Reject(f"payload: expected a number below {bound}, got {number}")
    return number


def code_centred(coder: Coder, bound: int, count: int, known: Ints | None) -> Ints:
    """`count` numbers from 0 to bound - 1 that lie around their median: two-sided geometric, far ones written out.

    Raises:
        Reject: numbers out of range, or a centre or decay that is not theirs.
    """
    if count == 0:
        return np.zeros(0, np.int32)
    centre = code_number(coder, bound, None if known is None else _median(known))
    decay = code_number(coder, len(DECAYS), None if known is None else _choose_decay(known, centre))
    symbols = None
    if known is not None:
        distance = known - centre
        symbols = np.where(np.abs(distance) < FAR, distance + FAR, 0).astype(np.int32)
    symbols = coder.code(_centred_model(decay), count, symbols)
    numbers = centre + symbols - FAR
    far = symbols == 0
    num_far = int(far.sum())
    if num_far:
        numbers[far] = code_bounded(coder, bound, num_far, None if known is None else known[far])
    if numbers.min() < 0 or numbers.max() >= bound:
        raise Reject(f"payload: expected numbers from 0 to {bound - 1}, got {numbers.min()} to {numbers.max()}")
    if known is None and (centre, decay) != (_median(numbers), _choose_decay(numbers, centre)):
        raise Reject("payload: numbers around another centre than theirs")
    return numbers.astype(np.int32)


def code_weighted(coder: Coder, weights: tuple[int, ...], count: int, known: Ints | None) -> Ints:
    """`count` symbols of these frequencies (sum below 2**24; one of 0 is possible but dear)."""
    return coder.code(_weighted(weights), count, known)


def code_bounded(coder: Coder, bound: int, count: int, known: Ints | None) -> Ints:
    """`count` numbers from 0 to bound - 1 (at most 2**16 + 1 of them), all alike."""
    return coder.code(uniform(bound), count, known) if bound > 1 else np.zeros(count, np.int32)


def code_grouped(
    coder: Coder, keys: NDArray[Any], model: Callable[[int], Any], known: Ints | None
) -> tuple[Ints, NDArray[np.intp]]:
    """One symbol a key, by ascending key with that key's model: (symbols in that order, the order)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    bounds = [0, *(_find(ordered[1:] != ordered[:-1]) + 1).tolist(), len(keys)]
    wanted = None if known is None else known[order]
    parts = [
        coder.code(model(int(ordered[begin])), end - begin, None if wanted is None else wanted[begin:end])
        for begin, end in pairwise(bounds)
        if begin < end
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32), order


# --- splits and places -----------------------------------------------------------------------------------------------


def _code_places(coder: Coder, mask: NDArray[np.uint8], start: Ints, size: Ints, taken: Taken | None) -> None:
    """The place of each lone value in its block: all of the block's alike."""
    is_open = size > 1
    if not is_open.all():
        mask[start[~is_open]] = 1
        start, size = start[is_open], size[is_open]
    known = None if taken is None else taken.first(start) - start
    offsets, order = code_grouped(coder, _narrow(size), uniform, known)
    mask[start[order] + offsets] = 1


def _code_splits(coder: Coder, half: int, first: Ints, second: Ints, count: Ints, known: Ints | None) -> Ints:
    """How many of each node's `count` lie in its first half of `first` (its second half has `second`).

    Halves are `half` long but at a chunk's end, where the second is shorter or the first is and the second empty.
    """
    low = np.maximum(count - second, 0)
    left: Ints = low.copy()
    is_open = low < np.minimum(count, first)
    is_even = second == half
    even, ends = _find(is_open & is_even), _find(is_open & ~is_even)
    tilt = 0
    if len(even):
        tilt = code_number(coder, len(TILTS), None if known is None else _choose_tilt(half, count[even], known[even]))
    # Only at a chunk's end are halves of two lengths: there the key holds the second's as well.
    base = 2 * half
    for nodes, keys, model in (
        (even, _narrow(count[even]), lambda key: _split(half, half, key, tilt)),
        (
            ends,
            second[ends].astype(np.int64) * base + count[ends],
            lambda key: _split(half, key // base, key % base, tilt),
        ),
    ):
        if len(nodes):
            wanted = None if known is None else known[nodes] - low[nodes]
            symbols, order = code_grouped(coder, keys, model, wanted)
            left[nodes[order]] += symbols
    if known is None and len(even) and tilt != _choose_tilt(half, count[even], left[even]):
        raise Reject("payload: a tilt that is not that of its splits")
    return left


def _choose_tilt(half: int, count: Ints, left: Ints) -> int:
    """The index of the concentration whose spread of left counts is nearest to the spread seen.

    The sum of (2 left - count)**2 is expected to be sum k (n - k) / (n - 1) * (k + 2 a) / (1 + 2 a), n places a node:
    a hypergeometric's variance times a Beta's. Integers, then one division a candidate: the same on every machine.
    """
    size, wide = 2 * half, count.astype(np.int64)
    seen = float(((2 * left.astype(np.int64) - wide) ** 2).sum())
    plain = float((wide * (size - wide)).sum())
    urn = float((wide * wide * (size - wide)).sum())
    expected = [plain / (size - 1)]
    expected += [(urn + 2 * tilt * plain) / ((size - 1) * (1 + 2 * tilt)) for tilt in TILTS[1:]]
    return int(np.argmin([abs(seen - value) for value in expected]))


def _split(first: int, second: int, count: int, tilt: int) -> Any:
    make = _split_cached if min(first, second, count) <= CACHED_PLACES_MAX else _split_model
    return make(first, second, count, tilt)


def _split_model(first: int, second: int, count: int, tilt: int) -> Any:
    return _categorical(compute_split_weights(first, second, count, tilt))


_split_cached = lru_cache(maxsize=4096)(_split_model)


def compute_split_weights(first: int, second: int, count: int, tilt: int) -> NDArray[np.float64]:
    """How likely each number of `count` taken places is to lie in the first half: positive integers, sum below 2**24.

    The halves have `first` and `second` places; entry i stands for the fewest that can lie in the first, plus i.
    """
    low, high = max(0, count - second), min(count, first)
    at = np.arange(low, high, dtype=np.int64)
    ratios = ((first - at) * (count - at)) / ((at + 1) * (second - count + at + 1))  # weight(at + 1) / weight(at)
    if tilt:
        first_urn = 2 * TILTS[tilt] * first / (first + second)
        second_urn = 2 * TILTS[tilt] * second / (first + second)
        ratios = ratios * (((at + first_urn) * second) / ((count - at - 1 + second_urn) * first))
    # Outwards from the centre, where no product can overflow.
    centre = min(max(count * first // (first + second), low), high) - low
    up = np.multiply.accumulate(ratios[centre:])
    down = np.multiply.accumulate(1 / ratios[:centre][::-1])[::-1]
    weights = np.concatenate([down, [1.0], up])
    bits = TABLE_BITS - 1 - len(weights).bit_length()
    table: NDArray[np.float64] = np.floor(weights / weights.max() * float(1 << bits)) + 1
    return table


# --- models ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def uniform(bound: int) -> Any:
    """The model in which all symbols below `bound` (at least 2, at most 2**16 + 1) are alike."""
    return stream.model.Uniform(bound)


@lru_cache(maxsize=512)
def _weighted(weights: tuple[int, ...]) -> Any:
    assert sum(weights) < 1 << TABLE_BITS
    return _categorical(np.array(weights, np.float64))


@lru_cache(maxsize=len(DECAYS))
def _centred_model(decay: int) -> Any:
    """Symbol FAR is the centre, others their distance from it; 0 stands for everything farther away."""
    side = [1 << 18]
    for _ in range(FAR):
        side.append(side[-1] * DECAYS[decay] >> 8)
    return _categorical(np.array([*side[:0:-1], *side[:FAR]], np.float64) + 1)


def _categorical(weights: NDArray[np.float64]) -> Any:
    """The range coder's model of integer weights."""
    return stream.model.Categorical(weights.astype(np.float32), perfect=False)


def _median(numbers: Ints) -> int:
    """The lower one."""
    middle = (len(numbers) - 1) // 2
    return int(np.partition(numbers, middle)[middle])


def _choose_decay(numbers: Ints, centre: int) -> int:
    eighths = 8 * int(np.minimum(np.abs(numbers - centre), FAR).sum())
    return sum(eighths > bound * len(numbers) for bound in DECAY_BOUNDS)


def _narrow(keys: Ints) -> NDArray[Any]:
    """Keys below 2**16 sort in linear time as uint16; 2**16 itself is a block of all places, and never open."""
    return keys.astype(np.uint16) if keys.max(initial=0) < DIGIT else keys


def _find(wanted: NDArray[np.bool_]) -> NDArray[np.intp]:
    """np.flatnonzero of a vector, in half the time where it is short."""
    return wanted.nonzero()[0]


def _interleave(even: Ints, odd: Ints) -> Ints:
    both = np.empty(2 * len(even), np.int32)
    both[0::2], both[1::2] = even, odd
    return both


def _bit_lengths(numbers: Ints) -> Ints:
    """Bits of each number: 0 for 0."""
    lengths: Ints = np.frexp(numbers.astype(np.float64))[1].astype(np.int32)
    return lengths
