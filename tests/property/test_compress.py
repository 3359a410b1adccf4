"""Laws of the update codec: what is sent, what garbage does, and how small it is."""

import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2pfm.config import CompressionConfig
from p2pfm.errors import Reject
from p2pfm.lora.compress import HEAD, compress, decode_payload, feed_back
from p2pfm.lora.delta import decode_tensors, encode_tensors, get_shapes, subtract

BYTES_MAX = 1 << 20
SHAPES = {"a.lora_A": (4, 33), "a.lora_B": (70, 4), "b.lora_A": (1, 5), "b.lora_B": (300, 2)}
CONFIG = CompressionConfig(chunk=64, keep=7)


def make_tensors(seed, shapes=SHAPES, scale=1e-3):
    draw = np.random.default_rng(seed)
    return {name: (draw.standard_normal(shape) * scale).astype(np.float32) for name, shape in shapes.items()}


def smollm2_shapes():
    shapes = {}
    for layer in range(30):
        shapes[f"{layer}.q.lora_A"], shapes[f"{layer}.q.lora_B"] = (8, 576), (576, 8)
        shapes[f"{layer}.v.lora_A"], shapes[f"{layer}.v.lora_B"] = (8, 576), (192, 8)
    return shapes


@given(st.integers(0, 2**32), st.integers(-8, 8), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_receivers_decode_exactly_what_the_sender_subtracted(seed, exponent, keep):
    tensors = make_tensors(seed, scale=10.0**exponent)
    config = CompressionConfig(chunk=64, keep=keep)
    payload, decoded = compress(tensors, config)
    update = decode_payload(payload, SHAPES, config, BYTES_MAX)
    received = update.tensors()
    for name in SHAPES:
        np.testing.assert_array_equal(received[name], decoded[name])
    dense = np.concatenate([decoded[name].ravel() for name in sorted(decoded)]).astype(np.float64)
    assert update.norm() == pytest.approx(np.linalg.norm(dense), rel=1e-12)


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_largest_of_every_chunk_are_kept_and_ties_go_to_the_lower_index(seed):
    draw = np.random.default_rng(seed)
    values = draw.integers(-3, 4, 300).astype(np.float32)
    _, decoded = compress({"t": values}, CONFIG)
    for start in range(0, 300, 64):
        chunk = np.abs(values[start : start + 64])
        keep = -(-7 * len(chunk) // 64)
        order = np.lexsort((np.arange(len(chunk)), -chunk))[:keep]
        expected = sorted(index for index in order if chunk[index] > 0)
        assert np.flatnonzero(decoded["t"][start : start + 64]).tolist() == expected
    assert (np.sign(decoded["t"]) * np.sign(values) >= 0).all()


@pytest.mark.parametrize(
    "tensors",
    [
        {"t": np.zeros(1000, np.float32)},
        {"t": np.full(1000, -2.5, np.float32)},
        {"t": np.eye(40, dtype=np.float32), "u": np.zeros(5000, np.float32), "v": np.full(3, 1e-30, np.float32)},
        {"t": np.float32([3e38, -1e-38, 0, 1])},
    ],
)
def test_extreme_updates_round_trip(tensors):
    payload, decoded = compress(tensors, CONFIG)
    received = decode_payload(payload, get_shapes(tensors), CONFIG, BYTES_MAX).tensors()
    assert all(np.array_equal(received[name], decoded[name]) for name in tensors)


def test_a_zero_update_is_tiny_and_legal():
    payload, _ = compress({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, CONFIG)
    assert len(payload) <= 16
    assert decode_payload(payload, SHAPES, CONFIG, BYTES_MAX).norm() == 0.0


def test_a_payload_is_seventy_times_smaller_than_fp32():
    tensors = make_tensors(0, smollm2_shapes())
    num_parameters = sum(values.size for values in tensors.values())
    payload, _ = compress(tensors, CompressionConfig())
    assert num_parameters == 460_800
    assert 4 * num_parameters / len(payload) >= 70


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


GOOD, _ = compress(make_tensors(3), CONFIG)


@given(st.binary(max_size=600))
@example(b"")
@example(GOOD[:-1])
@example(GOOD + b"\0\0\0\0")
@example(GOOD[: HEAD.size])
@settings(max_examples=200, deadline=None)
def test_garbage_only_ever_rejects(data):
    with pytest.raises(Reject):
        decode_payload(data, SHAPES, CONFIG, BYTES_MAX)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_changed_payload_rejects_or_is_another_legal_update(data):
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
    try:
        update = decode_payload(bytes(changed), SHAPES, CONFIG, BYTES_MAX)
    except Reject:
        return
    # A changed sign, level or position can be legal; then it obeys every limit.
    assert np.isfinite(update.norm())
    assert len(update.positions) <= update.layout.size * 7 / 64 + 7
    assert (np.diff(update.positions) > 0).all()


@given(st.binary(min_size=40, max_size=4000))
@settings(max_examples=200, deadline=None)
def test_random_words_behind_a_good_header_reject(words):
    head = GOOD[: HEAD.size + 69 + 2 * len(SHAPES)]
    with pytest.raises(Reject):
        decode_payload(head + words[: len(words) // 4 * 4], SHAPES, CONFIG, BYTES_MAX)


def test_announced_counts_cannot_make_a_receiver_allocate():
    huge = bytearray(GOOD)
    struct.pack_into("<II", huge, 4, 2**32 - 1, 2**32 - 1)
    with pytest.raises(Reject, match="impossible"):
        decode_payload(bytes(huge), SHAPES, CONFIG, BYTES_MAX)
    with pytest.raises(Reject, match="at most"):
        decode_payload(GOOD, SHAPES, CONFIG, len(GOOD) - 1)


def test_a_denser_update_than_the_network_allows_rejects():
    payload, _ = compress(make_tensors(4), CompressionConfig(chunk=64, keep=20))
    with pytest.raises(Reject):
        decode_payload(payload, SHAPES, CONFIG, BYTES_MAX)


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
