"""Nested ranks in a node: a peer that trains the first directions sends an ordinary update of the network's adapter."""

from pathlib import Path

import numpy as np
import pytest
import torch

from p2pfm import work
from p2pfm.config import (
    AdapterConfig,
    ChainConfig,
    CompressionConfig,
    NetworkConfig,
    ScoringConfig,
    TrainingConfig,
    parse_node_config,
)
from p2pfm.errors import ConfigError
from p2pfm.local_round import MemoryBlobs
from p2pfm.lora.corpus import build_shards
from p2pfm.lora.cross_term import compute_dense_ratio
from p2pfm.lora.delta import decode_tensors, encode_tensors, subtract
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.merge import clip_factors
from p2pfm.lora.ranks import compute_nested_masks
from p2pfm.lora.samples import read_probe, read_samples
from p2pfm.lora.torch_learner import TorchLearner
from p2pfm.protocol.events import Merge, Train, Weighted
from p2pfm.types import WEIGHT_ONE, Digest, Millis, PeerId, Round, Weight

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama"
MAKER = PeerId("maker")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return build_shards(2, tmp_path_factory.mktemp("shards"), seed=0, corrupted=set())


def make_learner(shards, peer, kind, rank):
    torch.set_num_threads(1)
    probe = read_probe(shards.probe)
    config = NetworkConfig(
        name="test",
        genesis_ms=Millis(0),
        backbone="tiny",
        probe=probe.digest.hex(),
        chain=ChainConfig(1, "", ""),
        adapter=AdapterConfig(kind=kind, rank=8, alpha=16),
        training=TrainingConfig(steps=3, batch=4, tokens_max=48, learning_rate=5e-3),
        scoring=ScoringConfig(samples_per_stratum=2),
        compression=CompressionConfig(chunk=512, keep=512),
    )
    model, tokenizer = load_backbone(TINY, torch.float32)
    samples = read_samples(shards.peers[peer])
    return config, TorchLearner(model, tokenizer, config, samples, probe, rank=rank)


@pytest.mark.parametrize("kind", ["lora", "ffa", "fed_sb"])
def test_a_peer_of_lower_rank_moves_the_first_directions_only(shards, kind):
    _, learner = make_learner(shards, 0, kind, rank=3)
    rng = np.random.default_rng(0)
    shapes = learner.shapes()
    base = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    delta = learner.train(base, Round(0)).delta
    masks = compute_nested_masks(shapes, 3)
    for name, part in delta.items():
        assert not part[masks[name] == 0].any()
        assert (part[masks[name] == 1] != 0).mean() > 0.99
    # What it does not train is in its model all the same, and is measured whole.
    _, gradient = learner.gradient(base, 0)
    assert all(part[masks[name] == 0].any() for name, part in gradient.items())


def test_rank_0_and_the_networks_rank_train_all(shards):
    deltas = []
    for rank in (0, 8):
        _, learner = make_learner(shards, 0, "lora", rank)
        deltas.append(encode_tensors(learner.train(learner.initial(), Round(0)).delta))
    assert deltas[0] == deltas[1]


def test_peers_of_different_ranks_merge_to_the_same_bytes_in_any_order_and_the_cross_term_is_measured(shards):
    blobs = MemoryBlobs()
    payloads = []
    for peer, rank in enumerate((2, 8)):
        config, learner = make_learner(shards, peer, "lora", rank)
        start = blobs.put(encode_tensors(learner.initial()))
        answer = work.train_update(learner, blobs, config, Train(Round(0), MAKER, start, None))
        payloads.append(answer.payload)
    shapes = learner.shapes()
    weighted = tuple(Weighted(payload, Weight(WEIGHT_ONE // 2)) for payload in payloads)
    action = Merge(Digest(b"r" * 32), start, weighted)
    merged = work.merge_updates(blobs, shapes, config, action)
    backwards = work.merge_updates(blobs, shapes, config, Merge(Digest(b"r" * 32), start, weighted[::-1]))
    assert merged.new_base == backwards.new_base
    # Only the peer of rank 8 moved the last rows, by half of its step at most.
    initial, base = learner.initial(), decode_tensors(blobs.get(merged.new_base), shapes)
    name = sorted(shapes)[0]
    assert name.endswith("lora_A")
    assert subtract(base, initial)[name][2:].any()
    ratio = work.measure_cross_term(blobs, shapes, config, action)
    round_ = work.read_merged_round(blobs, shapes, config, Round(0), action, merged.new_base)
    updates = [item.update for item in round_.updates]
    halves = [
        (0.5, {name: np.float64(factor) * part for name, part in update.tensors().items()})
        for update, factor in zip(updates, clip_factors(updates), strict=True)
    ]
    assert 0 < ratio < 1
    assert ratio == pytest.approx(compute_dense_ratio(halves, initial), rel=1e-6)


NODE = f"""
home = "h"
data = "d"
rpc = "r"
rank = %d
[network]
name = "n"
genesis_ms = 0
backbone = "tiny"
probe = "{"0" * 64}"
chain = {{ chain_id = 1, federation = "0x{"0" * 40}", token = "0x{"0" * 40}" }}
"""


@pytest.mark.parametrize("rank", [0, 1, 8])
def test_a_node_may_train_any_rank_up_to_the_networks(rank):
    assert parse_node_config(NODE % rank).rank == rank


@pytest.mark.parametrize(
    ("rank", "lines", "message"),
    [
        (9, "", "rank: expected 0 .* 8; got 9"),
        (-1, "", "rank: expected 0"),
        (4, '[network.adapter]\nkind = "ia3"', "kind ia3 have no rank"),
        (4, '[network.adapter]\nkind = "prompt"', "kind prompt have no rank"),
        (4, "[privacy]\nenabled = true\nepsilon_max = 8\nrounds = 10", "noise falls on all directions"),
    ],
)
def test_a_nodes_rank_rejects_what_cannot_work(rank, lines, message):
    with pytest.raises(ConfigError, match=message):
        parse_node_config(NODE % rank + lines)
