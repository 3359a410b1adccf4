"""Reads a coded update in plain Python, by docs/wire.md section 7: no code of p2pfm, no constriction.

Slow and short. It checks neither bounds nor that the encoding is the only one: it shows that the page is enough.
"""

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import prod

MASK = (1 << 64) - 1
DECAYS = (32, 60, 106, 137, 158, 185, 210, 232)
Cdf = list[int]
Shapes = Sequence[tuple[str, Sequence[int]]]


def float32(value: float) -> float:
    """Rounded to float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def uniform(bound: int) -> Cdf:
    """All symbols alike."""
    return [symbol * ((1 << 24) // bound) for symbol in range(bound)] + [1 << 24]


def table(weights: Sequence[int]) -> Cdf:
    """Symbols of these frequencies."""
    factor = float32(((1 << 24) - len(weights)) / sum(weights))
    before, cdf = 0, []
    for symbol, weight in enumerate(weights):
        cdf.append(symbol + int(float32(before * factor)))
        before += weight
    return [*cdf, 1 << 24]


class Words:
    """The range coder's reading side."""

    def __init__(self, data: bytes) -> None:
        self._words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        self._next = 0
        self._lower, self._range = 0, MASK
        self._point = self._take() << 32 | self._take()

    def _take(self) -> int:
        self._next += 1
        return self._words[self._next - 1] if self._next <= len(self._words) else 0

    def symbol(self, cdf: Cdf) -> int:
        """The next symbol of a model."""
        scale = self._range >> 24
        quantile = ((self._point - self._lower) & MASK) // scale
        assert quantile < 1 << 24, "no range coder wrote this"
        symbol = bisect_right(cdf, quantile) - 1
        self._lower = (self._lower + scale * cdf[symbol]) & MASK
        self._range = scale * (cdf[symbol + 1] - cdf[symbol])
        if self._range < 1 << 32:
            self._lower, self._range = self._lower << 32 & MASK, self._range << 32
            self._point = (self._point << 32 & MASK) | self._take()
        return symbol

    def number(self, bound: int) -> int:
        """0 to bound - 1."""
        if bound <= 1 << 16:
            return self.symbol(uniform(bound)) if bound > 1 else 0
        return self.symbol(uniform(-(-bound >> 16))) << 16 | self.symbol(uniform(1 << 16))

    def grouped(self, keys: Sequence[tuple[int, ...]], model: Callable[..., Cdf]) -> list[int]:
        """One symbol a key, read by ascending key, returned in the keys' own order."""
        found = [0] * len(keys)
        for index in sorted(range(len(keys)), key=lambda i: keys[i]):
            found[index] = self.symbol(model(*keys[index]))
        return found

    def centred(self, bound: int, count: int) -> list[int]:
        """Numbers around their median."""
        if not count:
            return []
        median, decay = self.number(bound), DECAYS[self.number(8)]
        side = [1 << 18]
        for _ in range(16):
            side.append(side[-1] * decay >> 8)
        cdf = table([side[abs(symbol - 16)] + 1 for symbol in range(32)])
        symbols = [self.symbol(cdf) for _ in range(count)]
        return [median + symbol - 16 if symbol else self.symbol(uniform(bound)) for symbol in symbols]


def split(first: int, second: int, count: int, tilt: int) -> Cdf:
    """How many of `count` lie in the first half, less the fewest that can."""
    low, high = max(0, count - second), min(count, first)
    ratios = []
    for x in range(low, high):
        ratio = ((first - x) * (count - x)) / ((x + 1) * (second - count + x + 1))
        if tilt:
            c = 2.0 ** (9 - tilt)
            u, v = 2 * c * first / (first + second), 2 * c * second / (first + second)
            ratio = ratio * (((x + u) * second) / ((count - x - 1 + v) * first))
        ratios.append(ratio)
    centre = min(max(count * first // (first + second), low), high) - low
    weights = [1.0] * (len(ratios) + 1)
    for i in range(centre, len(ratios)):
        weights[i + 1] = weights[i] * ratios[i]
    for i in range(centre - 1, -1, -1):
        weights[i] = weights[i + 1] * (1 / ratios[i])
    one = float(1 << (23 - len(weights).bit_length()))
    return table([int(weight / max(weights) * one) + 1 for weight in weights])


def arrange(shapes: Shapes, chunk: int) -> list[list[int]]:
    """Chunks, the longest first: each a list of positions in the flat vector."""
    chunks, offset = [], 0
    for _, shape in sorted(shapes):
        places = list(range(offset, offset + prod(shape)))
        if len(shape) == 2 and shape[0] < shape[1]:
            places = [offset + row * shape[1] + column for column in range(shape[1]) for row in range(shape[0])]
        chunks += [places[i : i + chunk] for i in range(0, len(places), chunk)]
        offset += len(places)
    return sorted(chunks, key=lambda places: -len(places))


def read_counts(words: Words, most: list[int]) -> list[int]:
    """Values sent of each chunk."""
    if words.number(2):
        return most
    full, empty = words.number(len(most) + 1), words.number(len(most) + 1)
    cdf = table([full, empty, len(most) - full - empty])
    counts = [(room, 0, 1)[words.symbol(cdf)] for room in most]
    between = [i for i, room in enumerate(most) if counts[i] == 1 and room > 2]
    for i, more in zip(between, words.grouped([(most[i] - 1,) for i in between], uniform), strict=True):
        counts[i] += more
    return counts


def read_places(words: Words, sizes: list[int], counts: list[int]) -> list[tuple[int, int]]:
    """(chunk, place in it) of every value. A node is (chunk, first place, size, count)."""
    found = []
    nodes: list[tuple[int, int, int, int]] = []
    heights = [(size - 1).bit_length() for size in sizes]
    for height in range(max(heights), -1, -1):
        nodes += [(i, 0, sizes[i], counts[i]) for i, own in enumerate(heights) if own == height]
        alone = [node for node in nodes if node[3] == 1]
        found += [(chunk, start) for chunk, start, size, _ in alone if size == 1]
        wide = [node for node in alone if node[2] > 1]
        for (chunk, start, _, _), place in zip(wide, words.grouped([(n[2],) for n in wide], uniform), strict=True):
            found.append((chunk, start + place))
        nodes = halve(words, [node for node in nodes if node[3] > 1], (1 << height) >> 1)
    return found


def halve(words: Words, nodes: list[tuple[int, int, int, int]], half: int) -> list[tuple[int, int, int, int]]:
    """Each node's two halves, with how many lie in each."""
    left = [max(0, count - (size - min(size, half))) for _, _, size, count in nodes]
    is_open = [low < min(node[3], node[2], half) for low, node in zip(left, nodes, strict=True)]
    even = [i for i, node in enumerate(nodes) if is_open[i] and node[2] == 2 * half]
    ends = [i for i, node in enumerate(nodes) if is_open[i] and node[2] != 2 * half]
    tilt = words.number(16) if even else 0
    for group in (even, ends):
        keys = [(nodes[i][2] - half, nodes[i][3]) for i in group]
        for i, more in zip(group, words.grouped(keys, lambda b, k: split(half, b, k, tilt)), strict=True):
            left[i] += more
    halves = []
    for (chunk, start, size, count), low in zip(nodes, left, strict=True):
        first = min(size, half)
        halves += [(chunk, start, first, low), (chunk, start + first, size - first, count - low)]
    return halves


def read_update(data: bytes, shapes: Shapes, chunk: int, keep: int) -> dict[int, float]:
    """Values by position in the flat vector; `data` without its maker."""
    assert data[:4] == b"P2U2"
    if len(data) == 4:
        return {}
    words = Words(data[4:])
    chunks = arrange(shapes, chunk)
    counts = read_counts(words, [-(-keep * len(places) // chunk) for places in chunks])
    found = read_places(words, [len(places) for places in chunks], counts)
    positions = sorted(chunks[at][place] for at, place in found)
    share = words.number(256)
    cdf = table([256 - share, share, 256 - share, share])
    symbols = {position: words.symbol(cdf) for position in positions}
    ends = [sum(prod(shape) for _, shape in sorted(shapes)[: i + 1]) for i in range(len(shapes))]
    tensor = {position: bisect_right(ends, position) for position in positions}
    used = sorted(set(tensor.values()))
    high = sorted({tensor[position] for position, symbol in symbols.items() if symbol & 1})
    codes = {(i, 0): code for i, code in zip(used, words.centred(1920, len(used)), strict=True)}
    codes |= {(i, 1): codes[i, 0] + step for i, step in zip(high, words.centred(1920, len(high)), strict=True)}
    values = {}
    for position, symbol in symbols.items():
        code = codes[tensor[position], symbol & 1]
        values[position] = (-1 if symbol >> 1 else 1) * (16 + code % 16) * 2.0 ** (code // 16 - 84)
    return values
