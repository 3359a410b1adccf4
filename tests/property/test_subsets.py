"""Laws of the coder of sets of places: what goes in comes out, in as few bits as there are sets, by exact tables."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.errors import Reject
from p2pfm.lora import subsets
from p2pfm.lora.subsets import (
    Blocks,
    Reader,
    Taken,
    Writer,
    code_centred,
    code_number,
    code_subsets,
    compute_split_weights,
)


def make_blocks(sizes):
    """Blocks of these lengths, the longest first, each in a room of the next power of two."""
    sizes = sorted(sizes, reverse=True)
    rooms = [1 << (size - 1).bit_length() for size in sizes]
    starts = np.cumsum([0, *rooms])
    return Blocks(starts[:-1].astype(np.int32), np.array(sizes, np.int32), int(starts[-1]))


def write(blocks, mask):
    taken = Taken(mask)
    counts = taken.count(blocks.starts, blocks.sizes)
    writer = Writer()
    code_subsets(writer, blocks, counts, taken)
    return writer.get_bytes(), counts


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_a_set_that_is_written_is_read(sizes, density, seed):
    blocks = make_blocks(sizes)
    draw = np.random.default_rng(seed)
    mask = np.zeros(blocks.num_places, np.uint8)
    for start, size in zip(blocks.starts, blocks.sizes, strict=True):
        mask[start : start + size] = draw.random(size) < density * draw.random()
    data, counts = write(blocks, mask)
    np.testing.assert_array_equal(code_subsets(Reader(data), blocks, counts, None), mask)


@pytest.mark.parametrize(("size", "count"), [(4096, 256), (4096, 64), (512, 32), (1500, 90), (4096, 3000)])
def test_scattered_places_cost_what_their_number_allows(size, count):
    draw, num = np.random.default_rng(0), 40
    blocks = make_blocks([size] * num)
    mask = np.zeros(blocks.num_places, np.uint8)
    for start in blocks.starts:
        mask[start + draw.permutation(size)[:count]] = 1
    data, _ = write(blocks, mask)
    bound = num * math.log2(math.comb(size, count))
    assert bound <= 8 * len(data) <= 1.003 * bound + 200


@given(st.integers(1, 300), st.integers(0, 300), st.data())
@settings(max_examples=150, deadline=None)
def test_an_untilted_split_is_hypergeometric(first, less, data):
    """The table against exact integers, for halves of one length and for a chunk's end."""
    second = max(1, first - less)
    count = data.draw(st.integers(1, first + second - 1))
    low, high = max(0, count - second), min(count, first)
    exact = [math.comb(first, at) * math.comb(second, count - at) for at in range(low, high + 1)]
    weights = compute_split_weights(first, second, count, 0)
    assert len(weights) == len(exact)
    bits = sum(
        n / sum(exact) * math.log2(n / sum(exact) * weights.sum() / w) for n, w in zip(exact, weights, strict=True)
    )
    assert 0 <= bits + 1e-9 < 0.002  # what the table's rounding costs a symbol


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, len(subsets.TILTS) - 1), st.data())
@settings(max_examples=150, deadline=None)
def test_a_tilted_split_is_a_polya_urn_on_top(first, less, tilt, data):
    """Against exact fractions: hypergeometric, times Beta-binomial, over binomial."""
    second = max(1, first - less)
    count = data.draw(st.integers(2, min(40, first + second - 1))) if first + second > 2 else 1
    low, high = max(0, count - second), min(count, first)
    a = Fraction(subsets.TILTS[tilt]) * 2 * first / (first + second)
    b = Fraction(subsets.TILTS[tilt]) * 2 * second / (first + second)

    def rising(start, steps):
        return math.prod((start + i for i in range(steps)), start=Fraction(1))

    exact = [
        math.comb(first, at)
        * math.comb(second, count - at)
        * rising(a, at)
        * rising(b, count - at)
        / (Fraction(first) ** at * Fraction(second) ** (count - at))
        for at in range(low, high + 1)
    ]
    weights = compute_split_weights(first, second, count, tilt)
    wanted = np.array([float(value / sum(exact)) for value in exact])
    np.testing.assert_allclose(weights / weights.sum(), wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("half", [1, 8, 512, 32768])
def test_every_table_has_an_exact_sum_and_no_impossible_symbol(half):
    for tilt in range(len(subsets.TILTS)):
        for count in {2, 3, half // 2 + 2, half, half + 1, 2 * half - 1} & set(range(2, 2 * half)):
            for second in {half, (half + 1) // 2}:
                low, high = max(0, count - second), min(count, half)
                if low < high:
                    table = compute_split_weights(half, second, count, tilt)
                    assert len(table) == high - low + 1
                    assert (table == np.floor(table)).all()
                    assert table.min() >= 1
                    assert table.sum() < 1 << subsets.TABLE_BITS


def test_a_tilt_follows_the_clusters():
    """Concentrated halves choose a small concentration, even ones an infinite one (index 0) or nearly."""
    draw = np.random.default_rng(0)
    count = np.full(2000, 40, np.int32)
    even = draw.hypergeometric(512, 512, 40, 2000).astype(np.int32)
    for index in (5, 9, 12):
        a = subsets.TILTS[index]
        clustered = draw.binomial(40, draw.beta(a, a, 2000)).astype(np.int32)
        assert abs(subsets._choose_tilt(512, count, clustered) - index) <= 1
    assert subsets._choose_tilt(512, count, even) <= 2


@given(st.lists(st.integers(0, 1919), max_size=200), st.booleans())
@settings(max_examples=150, deadline=None)
def test_centred_numbers_that_are_written_are_read(numbers, is_near):
    known = np.array(numbers, np.int32)
    if is_near:
        known = known % 20 + 900
    writer = Writer()
    code_centred(writer, 1920, len(known), known)
    np.testing.assert_array_equal(code_centred(Reader(writer.get_bytes()), 1920, len(known), None), known)


@given(st.integers(1, 1 << 31), st.data())
@settings(max_examples=100, deadline=None)
def test_numbers_of_any_bound_that_are_written_are_read(bound, data):
    number = data.draw(st.integers(0, bound - 1))
    writer = Writer()
    code_number(writer, bound, number)
    assert code_number(Reader(writer.get_bytes()), bound, None) == number


def test_numbers_over_their_bound_reject():
    writer = Writer()
    code_number(writer, 1 << 17, (1 << 17) - 1)
    with pytest.raises(Reject, match="below"):
        code_number(Reader(writer.get_bytes()), (1 << 17) - 1, None)


class Liar:
    """A writer that says one number less than the truth the `at`-th time it writes a lone symbol, and stands by it."""

    def __init__(self, at):
        self.writer, self.left = Writer(), at

    def code(self, model, count, known):
        if count == 1 and known[0] > 0:
            self.left -= 1
            if self.left == 0:
                known = known - 1
        return self.writer.code(model, count, known)


@pytest.mark.parametrize("at", [1, 2])
def test_numbers_around_another_centre_than_theirs_reject(at):
    known = np.array([7, 9, 9, 10, 12, 40], np.int32)
    liar = Liar(at)
    code_centred(liar, 100, len(known), known)
    assert liar.left <= 0
    with pytest.raises(Reject):
        code_centred(Reader(liar.writer.get_bytes()), 100, len(known), None)
