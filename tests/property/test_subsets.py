"""Laws of the coder of sets of places: what goes in comes out, in as few bits as there are sets, by exact tables."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.errors import Reject
from p2pfm.lora import subsets
from p2pfm.lora.subsets import Blocks, Reader, Taken, Writer, code_centred, code_number, code_subsets


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


@given(st.integers(1, 64), st.integers(0, 64), st.data())
@settings(max_examples=150, deadline=None)
def test_an_untilted_split_is_hypergeometric(first, less, data):
    """The table against exact integers, for halves of one length and for a chunk's end."""
    second = max(1, first - less)
    count = data.draw(st.integers(1, first + second - 1))
    low, high = max(0, count - second), min(count, first)
    if low == high:
        return
    exact = [math.comb(first, at) * math.comb(second, count - at) for at in range(low, high + 1)]
    most = exact.index(max(exact))
    bits = -math.log2(exact[most] / sum(exact))
    repeats = 4000
    writer = Writer()
    writer.code(subsets._split_model(first, second, count, 0), repeats, np.full(repeats, most, np.int32))
    assert 8 * len(writer.get_bytes()) == pytest.approx(repeats * bits, abs=64 + 0.002 * repeats)


@pytest.mark.parametrize("half", [1, 8, 512, 32768])
@pytest.mark.parametrize("tilt", range(len(subsets.TILTS)))
def test_every_table_has_exact_sums_and_no_impossible_symbol(half, tilt, monkeypatch):
    seen = []
    monkeypatch.setattr(subsets, "_categorical", seen.append)
    for count in {2, 3, half // 2 + 2, half, half + 1, 2 * half - 1} & set(range(2, 2 * half)):
        for second in {half, (half + 1) // 2}:
            low, high = max(0, count - second), min(count, half)
            if low < high:
                subsets._split_model(half, second, count, tilt)
                table = seen.pop()
                assert len(table) == high - low + 1
                assert np.isfinite(table).all()
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
