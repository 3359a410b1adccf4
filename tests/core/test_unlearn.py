"""Subtracting a peer's part of the base: the law, its bytes, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from p2pfm import work
from p2pfm.config import ChainConfig, CompressionConfig, NetworkConfig
from p2pfm.errors import OperatorError, WorldError
from p2pfm.local_round import MemoryBlobs
from p2pfm.lora.compress import compress, decode_payload, feed_back
from p2pfm.lora.delta import decode_tensors, encode_tensors, flatten, get_shapes, subtract
from p2pfm.lora.merge import merge
from p2pfm.lora.unlearn import MergedRound, MergedUpdate, remove_peers
from p2pfm.protocol.events import Merge, Weighted
from p2pfm.types import WEIGHT_ONE, Digest, Millis, PeerId, Round, Weight, compute_digest

CODEC = CompressionConfig(chunk=64, keep=8)
SHAPES = {"a.lora_A": (4, 30), "a.lora_B": (50, 4)}
ANN, BOB, CYD = (PeerId(name) for name in ("ann", "bob", "cyd"))
PEERS = (ANN, BOB, CYD)


def name_of(base):
    return compute_digest(encode_tensors(base))


def draw_tensors(rng, scale=1.0):
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def run_rounds(seed, num_rounds, weights):
    """(initial adapter, history, last base) of peers with error feedback; norms differ, so clipping takes part."""
    rng = np.random.default_rng(seed)
    initial = base = draw_tensors(rng)
    residuals = dict.fromkeys(PEERS)
    history = []
    for number in range(num_rounds):
        updates = []
        for scale, peer in enumerate(PEERS, start=1):
            wanted = feed_back(residuals[peer], draw_tensors(rng, 0.1 * scale), CODEC)
            payload, decoded = compress(wanted, CODEC)
            residuals[peer] = subtract(wanted, decoded)
            update = decode_payload(payload, SHAPES, CODEC, len(payload))
            updates.append(MergedUpdate(peer, update, weights[number][peer]))
        merged = merge(base, [(item.update, item.weight) for item in updates])
        history.append(MergedRound(Round(number), name_of(base), name_of(merged), tuple(updates)))
        base = merged
    return initial, history, base


def draw_weights(rng, num_rounds):
    parts = rng.dirichlet([1.0] * len(PEERS), size=num_rounds)
    return [{peer: Weight(int(part * WEIGHT_ONE)) for peer, part in zip(PEERS, row, strict=True)} for row in parts]


def replay(initial, history, removed):
    """The reference: every merge again, with the removed peers' weights at 0."""
    base = initial
    for step in history:
        pairs = [(item.update, Weight(0) if item.peer in removed else item.weight) for item in step.updates]
        base = merge(base, pairs)
    return base


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("removed", [{ANN}, {CYD}, {ANN, BOB}])
def test_subtraction_gives_what_the_same_rounds_give_at_weight_zero(seed, removed):
    weights = draw_weights(np.random.default_rng(seed), 6)
    initial, history, base = run_rounds(seed, 6, weights)
    ours = flatten(remove_peers(base, history, removed, name_of(initial)))
    theirs = flatten(replay(initial, history, removed))
    # Each of six merges rounds to float32 once, and so does the subtraction.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=7 * np.spacing(np.abs(flatten(base)).max()) / 2)
    assert np.abs(ours - flatten(base)).max() > 100 * np.abs(ours - theirs).max()


def test_removing_everybody_gives_the_initial_adapter():
    initial, history, base = run_rounds(1, 4, draw_weights(np.random.default_rng(1), 4))
    ours = flatten(remove_peers(base, history, PEERS, name_of(initial)))
    np.testing.assert_allclose(ours, flatten(initial), rtol=0, atol=1e-6)


def test_parts_that_error_feedback_sent_later_are_removed_too():
    """One peer alone at full weight: all that it ever sent is all that moved the base, though no payload is whole."""
    weights = [{ANN: Weight(WEIGHT_ONE), BOB: Weight(0), CYD: Weight(0)} for _ in range(8)]
    initial, history, base = run_rounds(2, 8, weights)
    sent_late = {position for step in history[1:] for position in step.updates[0].update.positions.tolist()}
    assert sent_late - set(history[0].updates[0].update.positions.tolist())
    ours = flatten(remove_peers(base, history, {ANN}, name_of(initial)))
    np.testing.assert_allclose(ours, flatten(initial), rtol=0, atol=1e-6)


def test_the_bytes_do_not_depend_on_the_order_of_history_or_updates():
    initial, history, base = run_rounds(3, 5, draw_weights(np.random.default_rng(3), 5))
    shuffled = [replace(step, updates=step.updates[::-1]) for step in history[::-1]]
    first = encode_tensors(remove_peers(base, history, {BOB}, name_of(initial)))
    assert first == encode_tensors(remove_peers(base, shuffled, {BOB}, name_of(initial)))


def test_a_weight_of_zero_leaves_the_base_as_it_is():
    weights = [{ANN: Weight(0), BOB: Weight(WEIGHT_ONE // 2), CYD: Weight(WEIGHT_ONE // 2)} for _ in range(2)]
    initial, history, base = run_rounds(4, 2, weights)
    assert encode_tensors(remove_peers(base, history, {ANN}, name_of(initial))) == encode_tensors(base)


def test_a_peer_that_joined_late_needs_only_the_rounds_since():
    initial, history, base = run_rounds(5, 5, draw_weights(np.random.default_rng(5), 5))
    late = [replace(history[i], updates=history[i].updates[1:]) if i < 3 else history[i] for i in range(5)]
    whole = encode_tensors(remove_peers(base, late, {ANN}, name_of(initial)))
    assert whole == encode_tensors(remove_peers(base, late[3:], {ANN}, history[3].base))


def test_a_second_removal_links_over_the_first():
    initial, history, base = run_rounds(6, 3, draw_weights(np.random.default_rng(6), 3))
    without_ann = remove_peers(base, history, {ANN}, name_of(initial))
    link = MergedRound(Round(3), name_of(base), name_of(without_ann), ())
    without_both = remove_peers(without_ann, [*history, link], {BOB}, name_of(initial))
    at_once = remove_peers(base, history, {ANN, BOB}, name_of(initial))
    np.testing.assert_allclose(flatten(without_both), flatten(at_once), rtol=0, atol=1e-6)


def test_removal_rejects_a_peer_that_never_took_part():
    initial, history, base = run_rounds(7, 2, draw_weights(np.random.default_rng(7), 2))
    with pytest.raises(OperatorError, match="dan"):
        remove_peers(base, history, {PeerId("dan"), ANN}, name_of(initial))
    with pytest.raises(OperatorError, match="nobody"):
        remove_peers(base, history, set(), name_of(initial))


def test_removal_rejects_a_history_with_a_gap():
    initial, history, base = run_rounds(8, 4, draw_weights(np.random.default_rng(8), 4))
    since = name_of(initial)
    for wrong, message in (
        ([], "no round first"),
        (history[1:], "expected the rounds since"),
        ([*history[:1], *history[2:]], "fetch the rounds between"),
        ([*history, history[-1]], "leads on from"),
        (history[:-1], "up to the base given"),
    ):
        with pytest.raises(OperatorError, match=message):
            remove_peers(base, wrong, {ANN}, since)
    other = {name: values + 1 for name, values in base.items()}
    with pytest.raises(OperatorError, match="up to the base given"):
        remove_peers(other, history, {ANN}, since)


def test_removal_rejects_updates_of_another_adapter():
    initial, history, base = run_rounds(9, 2, draw_weights(np.random.default_rng(9), 2))
    small = {"a.lora_A": np.ones((4, 30), np.float32)}
    payload, _ = compress(small, CODEC)
    alien = decode_payload(payload, get_shapes(small), CODEC, len(payload))
    first = replace(history[0], updates=(*history[0].updates, MergedUpdate(ANN, alien, Weight(1))))
    with pytest.raises(OperatorError, match="round 0: an update has other names or shapes"):
        remove_peers(base, [first, history[1]], {ANN}, name_of(initial))


# --- from payloads in a node's store ----------------------------------------------------------------------------------


def run_work(blobs, num_rounds):
    """Certified rounds as nodes do them: payloads with their makers in a store, merged by digest."""
    rng = np.random.default_rng(0)
    config = NetworkConfig("t", Millis(0), "none", "0" * 64, ChainConfig(1, "", ""), compression=CODEC)
    initial = base = blobs.put(encode_tensors(draw_tensors(rng)))
    residuals = dict.fromkeys(PEERS)
    history = []
    for number in range(num_rounds):
        payloads = []
        for peer in PEERS:
            residual = residuals[peer] and decode_tensors(blobs.get(residuals[peer]), SHAPES)
            payload, _, residuals[peer] = work.compress_delta(blobs, CODEC, draw_tensors(rng), residual, peer)
            payloads.append(payload)
        action = Merge(Digest(b"r" * 32), base, tuple(Weighted(p, Weight(WEIGHT_ONE // 3)) for p in payloads))
        merged = work.merge_updates(blobs, SHAPES, config, action).new_base
        history.append((Round(number), action, merged))
        base = merged
    return config, initial, history, base


def test_a_node_removes_a_peer_with_the_payloads_in_its_store():
    blobs = MemoryBlobs()
    config, initial, history, base = run_work(blobs, 3)
    rounds = [work.read_merged_round(blobs, SHAPES, config, *step) for step in history]
    assert [item.peer for item in rounds[0].updates] == list(PEERS)
    tensors = {digest: decode_tensors(blobs.get(digest), SHAPES) for digest in (initial, base)}
    ours = flatten(remove_peers(tensors[base], rounds, {BOB}, initial))
    theirs = flatten(replay(tensors[initial], rounds, {BOB}))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_reading_a_round_rejects_a_missing_payload_by_name():
    blobs, rest = MemoryBlobs(), MemoryBlobs()
    config, _, history, _ = run_work(blobs, 1)
    first, lost, last = (item.payload for item in history[0][1].updates)
    for digest in (first, last):
        rest.put(blobs.get(digest))
    with pytest.raises(WorldError, match=f"1 of 3 payloads are not held here; fetch {lost.hex()}"):
        work.read_merged_round(rest, SHAPES, config, *history[0])
