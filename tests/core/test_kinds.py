"""Adapter kinds: one path for all of them (train, delta, compress, score, merge, serve), on the tiny Llama fixture."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from nodes.localnet import ADAPTERS, get_preset
from p2pfm import work
from p2pfm.config import (
    AdapterConfig,
    ChainConfig,
    CompressionConfig,
    NetworkConfig,
    ScoringConfig,
    TrainingConfig,
    validate_network,
)
from p2pfm.errors import ConfigError, OperatorError
from p2pfm.local_round import MemoryBlobs
from p2pfm.lora import kinds
from p2pfm.lora.corpus import build_shards
from p2pfm.lora.delta import add, decode_tensors, encode_tensors, flatten
from p2pfm.lora.layers import (
    adapter_shapes,
    build_peft,
    get_adapter_tensors,
    get_frozen,
    get_initial,
    get_parameters,
    get_sizes,
    load_backbone,
    set_adapter_tensors,
)
from p2pfm.lora.samples import read_probe, read_samples
from p2pfm.lora.torch_learner import TorchLearner
from p2pfm.messages import GenerateRequest
from p2pfm.protocol.events import Evaluate, Merge, ScoreUpdates, Train, Weighted
from p2pfm.runtime.engine import Engine
from p2pfm.types import WEIGHT_ONE, Digest, Millis, PeerId, Round, Weight, compute_digest

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama"
CONFIGS = {
    "lora": AdapterConfig(kind="lora", rank=4),
    "ffa": AdapterConfig(kind="ffa", rank=4),
    "fed_sb": AdapterConfig(kind="fed_sb", rank=16, alpha=32),
    "ia3": AdapterConfig(kind="ia3", targets=("k_proj", "v_proj", "down_proj")),
    "prompt": AdapterConfig(kind="prompt", prompt_tokens=6),
}
LEARNING_RATES = {"lora": 5e-3, "ffa": 5e-3, "fed_sb": 5e-3, "ia3": 5e-2, "prompt": 5e-2}
FACTORED = ("lora", "ffa", "fed_sb")
TOKENS = torch.tensor([[1, 300, 301, 302, 17, 400, 23, 5]])
EVERY_KIND = pytest.mark.parametrize("kind", sorted(CONFIGS))


def load(kind: str, **changes):
    model, tokenizer = load_backbone(TINY, torch.float32)
    return build_peft(model, msgspec.structs.replace(CONFIGS[kind], **changes)), tokenizer


def disturb(tensors, seed: int = 0, size: float = 0.1):
    rng = np.random.default_rng(seed)
    return {
        name: (part + size * rng.standard_normal(part.shape)).astype(np.float32)
        for name, part in sorted(tensors.items())
    }


@torch.inference_mode()
def compute_logits(model) -> np.ndarray:
    return model(input_ids=TOKENS, use_cache=False).logits[0, -TOKENS.shape[1] :].numpy()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return build_shards(3, tmp_path_factory.mktemp("shards"), seed=0, corrupted=frozenset())


def make_config(probe, kind: str) -> NetworkConfig:
    return NetworkConfig(
        name="test",
        genesis_ms=Millis(0),
        backbone="tiny",
        probe=probe.digest.hex(),
        chain=ChainConfig(1, "0x" + "1" * 40, "0x" + "2" * 40),
        adapter=CONFIGS[kind],
        training=TrainingConfig(steps=12, batch=4, tokens_max=48, learning_rate=LEARNING_RATES[kind]),
        scoring=ScoringConfig(samples_per_stratum=2, committee_size=3),
        compression=CompressionConfig(chunk=512, keep=128),
    )


@pytest.mark.parametrize("kind", ["lora", "ffa", "fed_sb", "ia3"])
def test_the_first_adapter_leaves_the_backbones_answers_as_they_were(kind):
    backbone, _ = load_backbone(TINY, torch.float32)
    before = compute_logits(backbone)
    model, _ = load(kind)
    np.testing.assert_allclose(compute_logits(model), before, atol=1e-6)


def test_a_prompt_starts_as_tokens_of_the_vocabulary():
    model, _ = load("prompt")
    (prompt,) = get_adapter_tensors(model).values()
    vocabulary = model.get_input_embeddings().weight.detach().numpy()
    assert prompt.shape == (6, 128)
    assert all((vocabulary == row).all(axis=1).any() for row in prompt)
    ids = [int(np.flatnonzero((vocabulary == row).all(axis=1))[0]) for row in prompt]
    backbone, _ = load_backbone(TINY, torch.float32)
    with torch.inference_mode():
        whole = backbone(input_ids=torch.cat([torch.tensor([ids]), TOKENS], dim=1)).logits[0, len(ids) :].numpy()
    np.testing.assert_allclose(compute_logits(model), whole, atol=1e-4)


@EVERY_KIND
def test_what_is_set_is_read_back_and_nothing_else_is_trained(kind):
    model, _ = load(kind)
    shapes = adapter_shapes(model)
    assert encode_tensors(get_adapter_tensors(model)) == encode_tensors(get_initial(model, CONFIGS[kind]))
    wanted = disturb(get_adapter_tensors(model))
    set_adapter_tensors(model, wanted)
    assert encode_tensors(get_adapter_tensors(model)) == encode_tensors(wanted)
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in get_parameters(model).values()}
    assert list(shapes) == sorted(shapes)
    first = min(wanted)
    for bad in ({}, {**wanted, "other": wanted[first]}, {**wanted, first: wanted[first][:1, :1]}):
        with pytest.raises(AssertionError):
            set_adapter_tensors(model, bad)


@EVERY_KIND
def test_every_peer_builds_the_same_adapter_from_the_networks_seed(kind):
    first, second, other = (load(kind, seed=seed)[0] for seed in (0, 0, 1))
    for read in (get_adapter_tensors, get_frozen):
        parts = [read(model) for model in (first, second, other)]
        assert parts[0].keys() == parts[1].keys() == parts[2].keys()
        assert all(parts[0][name].tobytes() == parts[1][name].tobytes() for name in parts[0])
        if parts[0] and kind != "ia3" and (read is get_frozen or kind in ("lora", "prompt")):
            assert any((parts[0][name] != parts[2][name]).any() for name in parts[0])


def test_payloads_carry_what_the_table_of_kinds_says():
    sizes = {
        f"model.layers.{layer}.self_attn.{name}": (128, 128) for layer in range(4) for name in ("q_proj", "v_proj")
    }
    for kind in FACTORED:
        model, _ = load(kind)
        assert get_sizes(model) == sizes
        assert adapter_shapes(model) == kinds.compute_shapes(CONFIGS[kind], sizes)
    number = {kind: sum(part.size for part in get_adapter_tensors(load(kind)[0]).values()) for kind in CONFIGS}
    assert number == {
        "lora": 8 * 4 * 256,
        "ffa": 8 * 4 * 128,
        "fed_sb": 8 * 16 * 16,
        "ia3": 4 * (128 + 128 + 384),
        "prompt": 6 * 128,
    }


def test_frozen_factors_are_orthogonal_and_pinned():
    config = CONFIGS["fed_sb"]
    frozen = kinds.compute_frozen(config, {"wide": (96, 200), "tall": (200, 96)})
    for name, factor in frozen.items():
        side = factor @ factor.T if name.endswith("lora_A") else factor.T @ factor
        norm = 1.0 if name.endswith("lora_A") else factor.shape[0] / config.rank
        np.testing.assert_allclose(side, norm * np.eye(config.rank), atol=2e-3 * norm)
    # Pinned: another version of numpy or LAPACK must not change what the peers of a network share.
    digest = compute_digest(encode_tensors(frozen)).hex()
    assert digest == "914151e91aab9a51fd7bcae633f539d7515417c69da792cd4e5534a946dd7310"


def test_fed_sb_rejects_a_rank_wider_than_a_layer():
    with pytest.raises(OperatorError, match=r"rank.*narrowest layer.*q_proj"):
        load("fed_sb", rank=200)


@pytest.mark.parametrize("kind", ["lora", "ffa", "fed_sb", "ia3"])
def test_targets_that_the_backbone_lacks_are_named(kind):
    with pytest.raises(OperatorError, match="targets"):
        load(kind, targets=("no_such_layer",))


@pytest.mark.parametrize("kind", ["lora", "ffa", "fed_sb", "ia3"])
def test_all_linear_means_every_layer_but_the_vocabularys_projection(kind):
    model, _ = load(kind, targets=("all-linear",))
    modules = {name.rsplit(".", 1)[0] for name in adapter_shapes(model)}
    assert len(modules) == 4 * 7
    shapes = adapter_shapes(model)
    if kind == "ia3":
        assert shapes["model.layers.0.mlp.down_proj.ia3_l"] == (1, 384)
        assert shapes["model.layers.0.mlp.up_proj.ia3_l"] == (384, 1)


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(OperatorError, match="1024 positions"):
        load("prompt", prompt_tokens=1024)


@pytest.mark.parametrize("kind", ["ffa", "fed_sb"])
def test_the_mean_of_the_adapters_is_the_adapter_of_the_mean_product(kind):
    assert measure_cross_term(kind) < 1e-6


def test_the_mean_of_lora_adapters_is_not_the_adapter_of_the_mean_product():
    assert measure_cross_term("lora") > 1e-2


def measure_cross_term(kind: str) -> float:
    """|mean(dW_i) - dW(mean)| over |mean(dW_i)|, all layers, after three peers have moved from one base."""
    model, _ = load(kind)
    base = disturb(get_adapter_tensors(model), 9)
    peers = [disturb(base, seed) for seed in range(3)]
    mean = {name: np.mean([peer[name] for peer in peers], axis=0) for name in base}

    def compute_products(tensors) -> np.ndarray:
        set_adapter_tensors(model, tensors)
        layers = [model.get_submodule("base_model.model." + name) for name in get_sizes(model)]
        products = [layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in layers]
        return torch.stack(products).detach().double().numpy()

    wanted = np.mean([compute_products(peer) for peer in peers], axis=0)
    return float(np.linalg.norm(wanted - compute_products(mean)) / np.linalg.norm(wanted))


@EVERY_KIND
def test_two_learners_train_compress_score_and_merge(kind, shards):
    probe = read_probe(shards.probe)
    config = make_config(probe, kind)
    blobs = MemoryBlobs()
    learners = []
    for path in shards.peers[:2]:
        model, tokenizer = load_backbone(TINY, torch.float32)
        learners.append(TorchLearner(model, tokenizer, config, read_samples(path), probe))
    shapes = learners[0].shapes()
    starts = [encode_tensors(learner.initial()) for learner in learners]
    assert starts[0] == starts[1]
    base = blobs.put(starts[0])

    first = learners[0].train(learners[0].initial(), Round(0))
    trained = {name: learners[0].initial()[name] + first.delta[name] for name in first.delta}
    assert learners[0].train(trained, Round(0)).loss_nats < first.loss_nats

    payloads = []
    for index, learner in enumerate(learners):
        answer = work.train_update(learner, blobs, config, Train(Round(0), PeerId(f"peer {index}"), base, None))
        assert work.validate_blob("payload", blobs.get(answer.payload), shapes, config) == f"peer {index}"
        payloads.append(answer.payload)
    weighted = tuple(Weighted(payload, Weight(WEIGHT_ONE // 2)) for payload in payloads)
    scored = work.score_updates(
        learners[0], blobs, config, ScoreUpdates(Round(0), base, None, weighted), seed=3, salt=bytes(32)
    )
    assert min(scored.contributions) > 0
    merged = work.merge_updates(blobs, shapes, config, Merge(Digest(bytes(32)), base, weighted))
    before = work.evaluate(learners[1], blobs, Evaluate(Round(0), base))
    after = work.evaluate(learners[1], blobs, Evaluate(Round(0), merged.new_base))
    assert after.loss_nano < before.loss_nano

    # What is served is what was trained and merged: the same logits from another instance of the backbone.
    tensors = decode_tensors(blobs.get(merged.new_base), shapes)
    engine = Engine(str(TINY), config.adapter, versions_max=1)
    served = engine.logits(tensors, tuple(TOKENS[0].tolist()))
    model, _ = load(kind)
    unmerged = compute_logits(model)[-1]
    set_adapter_tensors(model, tensors)
    expected = compute_logits(model)[-1]
    # The engine serves in the backbone's bf16: it is off by little of what the merge moved.
    assert np.linalg.norm(served - expected) < 0.2 * np.linalg.norm(unmerged - expected)


@EVERY_KIND
def test_a_served_stream_resumes_to_the_same_text_and_is_that_of_plain_generate(kind):
    engine = Engine(str(TINY), CONFIGS[kind], versions_max=1)
    version = Digest(b"v" * 32)
    model = build_peft(load_backbone(TINY)[0], CONFIGS[kind])
    tensors = disturb(get_adapter_tensors(model), size=0.05)
    set_adapter_tensors(model, tensors)
    engine.add_version(version, tensors)
    prompt = tuple(engine.tokenizer.encode("My fellow citizens, we meet again. " * 20))  # two blocks
    request = GenerateRequest(version, prompt, (), 12, 0, 950, 1, 0)
    whole = tuple(token for chunk in engine.generate(request) for token in chunk.tokens)
    resumed = msgspec.structs.replace(request, emitted=whole[:5])
    assert whole[5:] == tuple(token for chunk in engine.generate(resumed) for token in chunk.tokens)
    with torch.inference_mode():
        theirs = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert whole == tuple(theirs[0].tolist())[-len(whole) :]
    assert engine.vocabulary.context_max == 1024 - CONFIGS[kind].num_virtual


@EVERY_KIND
def test_the_gradient_covers_every_tensor_and_is_the_slope_of_its_loss(kind, shards):
    probe = read_probe(shards.probe)
    model, tokenizer = load_backbone(TINY, torch.float32)
    learner = TorchLearner(model, tokenizer, make_config(probe, kind), read_samples(shards.peers[0]), probe)
    at = disturb(learner.initial(), size=0.02)
    _, gradient = learner.gradient(at, seed=1)
    assert {name: part.shape for name, part in gradient.items()} == dict(learner.shapes())
    norm = float(np.linalg.norm(flatten(gradient)))
    ahead, behind = (learner.gradient(add(at, gradient, step / norm), seed=1)[0] for step in (0.01, -0.01))
    assert (ahead - behind) / 0.02 == pytest.approx(norm, rel=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "adapter.rank"),
        ({"alpha": 0}, "adapter.alpha"),
        ({"prompt_tokens": 0}, "adapter.prompt_tokens"),
        ({"seed": 2**63}, "adapter.seed"),
        ({"targets": ()}, "adapter.targets"),
        ({"targets": ("q_proj", " ")}, "adapter.targets"),
        ({"targets": ("q_proj", "q_proj")}, "each name once"),
        ({"targets": ("all-linear", "q_proj")}, "stands alone"),
    ],
)
def test_impossible_adapters_are_refused_by_key(change, message, shards):
    config = make_config(read_probe(shards.probe), "lora")
    validate_network(config)
    with pytest.raises(ConfigError, match=message):
        validate_network(msgspec.structs.replace(config, adapter=msgspec.structs.replace(config.adapter, **change)))


@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_local_networks_offer_every_kind(kind, shards):
    preset = get_preset("tiny", kind)
    assert preset.adapter.kind == kind
    validate_network(
        msgspec.structs.replace(
            make_config(read_probe(shards.probe), kind), adapter=preset.adapter, training=preset.training
        )
    )
    assert adapter_shapes(build_peft(load_backbone(TINY, torch.float32)[0], preset.adapter))


def test_a_local_network_of_an_unknown_kind_is_refused():
    assert set(ADAPTERS) == set(CONFIGS)
    with pytest.raises(OperatorError, match="adapter: expected one of"):
        get_preset("tiny", "dora")


def test_an_unknown_kind_is_no_adapter():
    with pytest.raises(msgspec.ValidationError, match="kind"):
        msgspec.convert({"kind": "dora"}, AdapterConfig)
