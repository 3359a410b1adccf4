"""Laws of the update codec: what is sent, how small it is, what a dishonest payload does, and what is no delta."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2pfm.config import CompressionConfig
from p2pfm.errors import ConfigError, OperatorError, Reject
from p2pfm.lora.compress import MAGIC, compress, decode_payload, feed_back
from p2pfm.lora.delta import decode_tensors, encode_tensors, get_shapes, subtract
from p2pfm.lora.topk import LEVEL_CODES, LEVEL_MIN, compute_levels
from p2pfm.types import compute_digest

BYTES_MAX = 1 << 20
SHAPES = {"a.lora_A": (4, 33), "a.lora_B": (70, 4), "b.lora_A": (1, 5), "b.lora_B": (300, 2)}
CONFIG = CompressionConfig(chunk=64, keep=7)
REPOSITORY = Path(__file__).parents[2]


def make_tensors(seed, shapes=SHAPES, scale=1e-3):
    draw = np.random.default_rng(seed)
    return {name: (draw.standard_normal(shape) * scale).astype(np.float32) for name, shape in shapes.items()}


def lora_shapes(layers, hidden, key_value, rank=8):
    shapes = {}
    for layer in range(layers):
        shapes[f"{layer}.q.lora_A"], shapes[f"{layer}.q.lora_B"] = (rank, hidden), (hidden, rank)
        shapes[f"{layer}.v.lora_A"], shapes[f"{layer}.v.lora_B"] = (rank, hidden), (key_value, rank)
    return shapes


def in_chunk_order(values):
    """A tensor's values in the order in which chunks run over it."""
    return (values.T if values.ndim == 2 and values.shape[0] < values.shape[1] else values).ravel()


def assert_received(tensors, config, shapes=None):
    payload, decoded = compress(tensors, config)
    update = decode_payload(payload, shapes or get_shapes(tensors), config, BYTES_MAX)
    received = update.tensors()
    for name in tensors:
        np.testing.assert_array_equal(received[name], decoded[name])
        assert received[name].shape == decoded[name].shape == tensors[name].shape
    return payload, update


# --- what is sent ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(-8, 8), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_receivers_decode_exactly_what_the_sender_subtracted(seed, exponent, keep):
    tensors = make_tensors(seed, scale=10.0**exponent)
    _, update = assert_received(tensors, CompressionConfig(chunk=64, keep=keep))
    dense = np.concatenate([values.ravel() for _, values in sorted(update.tensors().items())]).astype(np.float64)
    assert update.norm() == pytest.approx(np.linalg.norm(dense), rel=1e-12)
    assert (np.diff(update.positions) > 0).all()
    np.testing.assert_array_equal(np.flatnonzero(dense), update.positions)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_shapes_chunks_and_sparsity_round_trip(data):
    shape = st.lists(st.integers(0, 40), max_size=3).map(tuple)
    shapes = data.draw(st.dictionaries(st.text(max_size=3), shape, min_size=1, max_size=4))
    chunk = data.draw(st.sampled_from([1, 2, 3, 16, 17, 100, 1000, 65536]))
    config = CompressionConfig(chunk=chunk, keep=data.draw(st.integers(1, chunk)))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    density = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    tensors = {
        name: np.float32(draw.standard_normal(shape) * (draw.random(shape) < density)) * np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }
    assert_received(tensors, config)


@pytest.mark.parametrize("shape", [(300,), (12, 25), (25, 12), (150, 2), (2, 150), (5, 6, 10)])
@given(st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_the_largest_of_every_chunk_are_kept_and_ties_go_to_the_lower_index(shape, seed):
    values = np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)
    _, decoded = compress({"t": values}, CONFIG)
    wanted, kept = np.abs(in_chunk_order(values)), in_chunk_order(decoded["t"])
    for start in range(0, 300, 64):
        chunk = wanted[start : start + 64]
        order = np.lexsort((np.arange(len(chunk)), -chunk))[: -(-7 * len(chunk) // 64)]
        expected = sorted(index for index in order if chunk[index] > 0)
        assert np.flatnonzero(kept[start : start + 64]).tolist() == expected
    assert (np.sign(decoded["t"]) * np.sign(values) >= 0).all()


def test_levels_are_lloyds_means():
    values = np.concatenate([np.linspace(0.9, 1.1, 40), np.linspace(2.9, 3.1, 24)]).astype(np.float32)
    _, decoded = compress({"t": values}, CompressionConfig(chunk=64, keep=64))
    levels = np.unique(decoded["t"])
    assert len(levels) == 2
    np.testing.assert_allclose(levels, [1, 3], rtol=1 / 32)


def test_levels_are_ascending_exact_and_normal():
    levels = compute_levels(np.arange(LEVEL_CODES, dtype=np.int32))
    assert (np.diff(levels) > 0).all()
    assert (np.diff(levels) / levels[:-1] <= 1 / 16).all()
    assert levels[0] == LEVEL_MIN >= np.finfo(np.float32).tiny
    assert 2.0**39 < levels[-1] < 2.0**40


def test_what_receivers_decode_compresses_to_the_same_bytes():
    for seed in range(20):
        payload, decoded = compress(make_tensors(seed), CONFIG)
        assert compress(decoded, CONFIG)[0] == payload


def test_error_feedback_sends_everything_in_the_end():
    tensors = make_tensors(1)
    zero = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    config = CompressionConfig(chunk=64, keep=7, beta=1.0)
    wanted = feed_back(None, tensors, config)
    sent = zero
    for _ in range(60):
        _, decoded = compress(wanted, config)
        sent = {name: sent[name] + decoded[name] for name in sent}
        wanted = feed_back(subtract(wanted, decoded), zero, config)
    error = sum(float(np.sum((sent[name] - tensors[name]) ** 2)) for name in sent)
    assert error < 0.01 * sum(float(np.sum(values**2)) for values in tensors.values())


def test_a_payload_s_bytes_are_pinned():
    """Another version of numpy or of the range coder must not change what peers sign."""
    numbers = ((np.arange(60_000, dtype=np.int64) * 48271 % 65537 - 32768) ** 3).astype(np.float32)
    cuts = {"a.lora_A": (8, 2000), "a.lora_B": (2500, 8), "b": (23_999,), "c": (1,)}
    tensors, start = {}, 0
    for name, shape in cuts.items():
        tensors[name] = numbers[start : start + int(np.prod(shape))].reshape(shape) * np.float32(2.0**-60)
        start += tensors[name].size
    tensors["b"][4096:8192] = 0
    payload, _ = assert_received(tensors, CompressionConfig())
    assert compute_digest(payload).hex() == "e51a934f91e4256bb59ab5e6bdad8bc0c624c046fdb2173d0ef2679495666ee4"


# --- how small -------------------------------------------------------------------------------------------------------


def log2_choose(size, count):
    """log2 C(size, count), by exact integers."""
    ways, taken = 1, min(count, size - count)
    for index in range(taken):
        ways = ways * (size - index) // (index + 1)
    return ways.bit_length() - 1 + np.log2(ways / (1 << (ways.bit_length() - 1)))


@pytest.mark.parametrize(("keep", "ratio"), [(256, 71), (64, 220)])
def test_a_gaussian_delta_is_so_many_times_smaller_than_fp32(keep, ratio):
    tensors = make_tensors(0, lora_shapes(20, 2048, 512))
    num_parameters = sum(values.size for values in tensors.values())
    payload, update = assert_received(tensors, CompressionConfig(keep=keep))
    assert num_parameters == 1_064_960
    assert 4 * num_parameters / len(payload) >= ratio
    # Headers, tables, levels, all: within half a percent of the entropy of places and values.
    shares = update.counts.sum(axis=0) / update.counts.sum()
    places = num_parameters / 4096 * log2_choose(4096, keep)
    assert 8 * len(payload) <= 1.005 * (places + len(update.positions) * (1 - np.sum(shares * np.log2(shares))))


def test_clustered_places_cost_less_than_scattered_ones():
    tensors = make_tensors(0, lora_shapes(4, 576, 192))
    scattered, _ = compress(tensors, CompressionConfig())
    strong = np.random.default_rng(1).gamma(0.5, size=576).astype(np.float32)
    for values in tensors.values():
        values *= strong[: max(values.shape)].reshape((1, -1) if values.shape[0] == 8 else (-1, 1))
    clustered, _ = compress(tensors, CompressionConfig())
    assert len(clustered) < 0.85 * len(scattered)


def test_a_zero_update_is_the_magic_bytes():
    zero = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    payload, decoded = compress(zero, CONFIG)
    assert payload == MAGIC
    update = decode_payload(payload, SHAPES, CONFIG, BYTES_MAX)
    assert update.norm() == 0.0
    assert all(np.array_equal(update.tensors()[name], decoded[name]) for name in zero)


# --- a dishonest payload ---------------------------------------------------------------------------------------------

GOOD, _ = compress(make_tensors(3), CONFIG)


def assert_rejects_or_is_legal(data, shapes=SHAPES, config=CONFIG):
    """Whatever decodes has these bytes as its one encoding, and obeys every limit."""
    try:
        update = decode_payload(data, shapes, config, BYTES_MAX)
    except Reject:
        return False
    assert np.isfinite(update.norm())
    assert (np.diff(update.positions) > 0).all()
    assert compress(update.tensors(), config)[0] == data
    return True


@given(st.binary(max_size=600))
@example(b"")
@example(GOOD[:-1])
@example(GOOD[:-4])
@example(GOOD + b"\0\0\0\0")
@example(GOOD[:4] + b"\0\0\0\0")
@example(b"P2U1" + GOOD[4:])
@settings(max_examples=200, deadline=None)
def test_garbage_only_ever_rejects(data):
    if data == MAGIC:  # the update of zeros
        return
    with pytest.raises(Reject):
        decode_payload(data, SHAPES, CONFIG, BYTES_MAX)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_changed_payload_rejects_or_is_another_legal_update(data):
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
    assert_rejects_or_is_legal(bytes(changed))


@given(st.binary(min_size=4, max_size=400), st.integers(0, len(GOOD) // 4))
@settings(max_examples=200, deadline=None)
def test_random_words_behind_good_ones_reject_or_are_legal(words, kept):
    assert_rejects_or_is_legal(GOOD[: 4 * kept] + words[: len(words) // 4 * 4])


@given(st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_tiny_adapter_s_few_payloads_are_each_one_update(seed):
    """Small enough that many random words are legal: then the law of one encoding is tried in earnest."""
    word = int(seed).to_bytes(8, "little")[:4]
    assert_rejects_or_is_legal(MAGIC + word, {"a": (3,)}, CompressionConfig(chunk=16, keep=16))


def test_a_short_payload_cannot_make_a_receiver_work_or_allocate():
    shapes, config = lora_shapes(20, 2048, 512), CompressionConfig()
    payload, _ = compress(make_tensors(0, shapes), config)
    num_parameters = 1_064_960
    tracemalloc.start()
    try:
        with pytest.raises(Reject, match="one a bit"):
            decode_payload(payload[: len(MAGIC) + 400], shapes, config, BYTES_MAX)
        assert tracemalloc.get_traced_memory()[1] < num_parameters  # one byte a parameter would be the first mask
        tracemalloc.reset_peak()
        with pytest.raises(Reject):
            decode_payload(payload[:-4], shapes, config, BYTES_MAX)
        assert tracemalloc.get_traced_memory()[1] < 16 * num_parameters
    finally:
        tracemalloc.stop()
    with pytest.raises(Reject, match="at most"):
        decode_payload(GOOD, SHAPES, CONFIG, len(GOOD) - 1)


def test_a_denser_update_than_the_network_allows_rejects():
    for seed in range(20):
        payload, _ = compress(make_tensors(seed), CompressionConfig(chunk=64, keep=20))
        with pytest.raises(Reject):
            decode_payload(payload, SHAPES, CONFIG, BYTES_MAX)


def test_another_adapter_s_update_rejects():
    for seed in range(20):
        payload, _ = compress(make_tensors(seed, {"a": (40, 9), "b": (7,)}), CONFIG)
        with pytest.raises(Reject):
            decode_payload(payload, SHAPES, CONFIG, BYTES_MAX)


def test_mutated_payloads_reject_or_are_legal(tmp_path):
    """The fuzz loop in its short form; `bench/fuzz_payloads.py` alone runs a million."""
    command = [sys.executable, "bench/fuzz_payloads.py", "--quick", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["mutations"] >= 10_000
    assert figures["other exceptions"] == 0
    assert figures["accepted"] > 0
    assert sum(kind["tried"] for kind in figures["kinds"].values()) == figures["mutations"]


# --- what is no delta ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors",
    [
        {"t": np.zeros(1000, np.float32)},
        {"t": np.full(1000, -2.5, np.float32)},
        {"t": np.eye(40, dtype=np.float32), "u": np.zeros(5000, np.float32), "v": np.full(3, 1e-30, np.float32)},
        {"t": np.float32([3e38, -1e-38, 0, 1])},
        {"t": np.full((3, 4), 1e30, np.float32)},
        {"t": np.float32([7.0])},
        {"t": np.array(-0.5, np.float32)},
        {"t": np.zeros((0, 8), np.float32)},
        {"t": np.zeros((0, 8), np.float32), "u": np.float32([1, 2])},
    ],
    ids=["zeros", "equal", "some zero", "float32's range", "huge", "one", "no axis", "empty", "empty and not"],
)
def test_extreme_updates_round_trip(tensors):
    assert_received(tensors, CONFIG)


def test_magnitudes_beyond_the_levels_are_sent_as_the_highest_and_the_rest_stays():
    _, decoded = compress({"t": np.float32([1e30, -3e38])}, CompressionConfig(chunk=64, keep=64))
    np.testing.assert_array_equal(decoded["t"], np.float32([31 / 32 * 2.0**40, -31 / 32 * 2.0**40]))


def test_magnitudes_below_the_levels_are_not_sent():
    subnormal = np.float32([1e-40, -1e-45, 2.0**-81])
    payload, decoded = compress({"t": subnormal}, CONFIG)
    assert payload == MAGIC
    assert not decoded["t"].any()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_types_are_taken_as_the_nearest_float32(dtype):
    tensors = {name: values.astype(dtype) for name, values in make_tensors(2, scale=1.0).items()}
    as_float32 = {name: values.astype(np.float32) for name, values in tensors.items()}
    assert compress(tensors, CONFIG)[0] == compress(as_float32, CONFIG)[0]
    fed = feed_back(as_float32, tensors, CONFIG)
    assert {values.dtype for values in fed.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected at least one named tensor"),
        ({"t": np.float32([1, np.nan])}, "t has 1 values that are not"),
        ({"s": np.float32([0]), "t": np.float32([np.inf, -np.inf])}, "t has 2 values that are not"),
        ({"t": np.array([1e300])}, "finite in float32"),
        ({"t": np.array([1, 2])}, "floating-point numbers in t, got int64"),
        ({"t": np.array([True])}, "got bool"),
        ({"t": np.array([1j])}, "got complex"),
        ({"t": np.array(["x"])}, "floating-point numbers"),
        ({"t": [1.0, 2.0]}, "expected a numpy array for t, got list"),
        ({7: np.float32([1])}, "named by text, got the name 7"),
    ],
    ids=["nothing", "nan", "infinities", "over float32", "ints", "bools", "complex", "text", "list", "number as name"],
)
def test_compress_rejects_what_is_no_delta(tensors, message):
    with pytest.raises(OperatorError, match=message):
        compress(tensors, CONFIG)


def test_feed_back_rejects_another_adapter_s_residual():
    delta = make_tensors(0)
    other_shape = dict(delta, **{"b.lora_A": np.zeros((5, 1), np.float32)})
    other_name = {name.replace("b.", "c."): values for name, values in delta.items()}
    for residual, message in ((other_shape, r"b.lora_A \(\(5, 1\) and \(1, 5\)\)"), (other_name, "b.lora_A .missing")):
        with pytest.raises(OperatorError, match=message):
            feed_back(residual, delta, CONFIG)
    with pytest.raises(OperatorError, match="got int64"):
        feed_back({**delta, "b.lora_A": np.zeros((1, 5), np.int64)}, delta, CONFIG)
    with pytest.raises(OperatorError, match="an empty delta"):
        feed_back(None, {}, CONFIG)


@pytest.mark.parametrize(("chunk", "keep"), [(0, 0), (16, 0), (16, 17), (-1, -1), (65537, 1)])
def test_chunks_that_hold_less_than_is_kept_are_refused(chunk, keep):
    config = CompressionConfig(chunk=chunk, keep=keep)
    with pytest.raises(ConfigError, match="1 <= keep <= chunk"):
        compress(make_tensors(0), config)


def test_tensors_have_one_encoding_and_others_reject():
    tensors = make_tensors(5)
    data = encode_tensors(tensors)
    assert encode_tensors(decode_tensors(data, SHAPES)) == data
    assert encode_tensors(dict(reversed(tensors.items()))) == data
    not_a_number = dict(tensors, **{"b.lora_A": np.full((1, 5), np.nan, np.float32)})
    for bad in (data[:-1], data + b"\0", b"x" + data[1:], encode_tensors(not_a_number), b""):
        with pytest.raises(Reject):
            decode_tensors(bad, SHAPES)
    with pytest.raises(Reject):
        decode_tensors(data, {**SHAPES, "b.lora_A": (5, 1)})
