"""The torch learner and the work on top of it, on the tiny Llama fixture."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from p2pfm import work
from p2pfm.config import AdapterConfig, ChainConfig, CompressionConfig, NetworkConfig, ScoringConfig, TrainingConfig
from p2pfm.contribution.aumann_shapley import Player, compute_contributions
from p2pfm.contribution.shapley import compute_exact
from p2pfm.contribution.utility import CoalitionGame
from p2pfm.errors import OperatorError, Reject
from p2pfm.local_round import MemoryBlobs
from p2pfm.lora.compress import compress, decode_payload
from p2pfm.lora.corpus import build_shards
from p2pfm.lora.delta import decode_tensors, encode_tensors, flatten, unflatten
from p2pfm.lora.layers import adapter_shapes, build_peft, get_adapter_tensors, load_backbone, set_adapter_tensors
from p2pfm.lora.merge import clip_factors
from p2pfm.lora.samples import parse_probe, parse_samples, read_probe, read_samples
from p2pfm.lora.torch_learner import TorchLearner
from p2pfm.protocol.events import Evaluate, Merge, ScoreUpdates, Train, Weighted
from p2pfm.types import WEIGHT_ONE, Digest, Millis, PeerId, Round, Weight, compute_digest

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama"
NUM_PEERS = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return build_shards(NUM_PEERS, tmp_path_factory.mktemp("shards"), seed=0, corrupted={4})


MAKER = PeerId("maker")


def make_config(probe, **changes):
    config = NetworkConfig(
        name="test",
        genesis_ms=Millis(0),
        backbone="tiny",
        probe=probe.digest.hex(),
        chain=ChainConfig(1, "", ""),
        training=TrainingConfig(steps=12, batch=4, tokens_max=48, learning_rate=5e-3),
        scoring=ScoringConfig(samples_per_stratum=2),
        compression=CompressionConfig(chunk=512, keep=64),
    )
    return msgspec.structs.replace(config, **changes)


@pytest.fixture(scope="module")
def learners(shards):
    torch.set_num_threads(1)
    probe = read_probe(shards.probe)
    made = []
    for path in shards.peers:
        model, tokenizer = load_backbone(TINY, torch.float32)
        made.append(TorchLearner(model, tokenizer, make_config(probe), read_samples(path), probe))
    return made


def test_every_peer_starts_from_the_same_bytes(learners):
    first, second = (encode_tensors(learner.initial()) for learner in learners[:2])
    assert first == second
    # Pinned: another version of numpy, torch or peft must not change where a network starts.
    assert compute_digest(first).hex() == "b500038e525e21fe8404c93d5e12b41d8a3ebabfe49b4f440c92d8bf32610bd9"


def test_training_is_deterministic_and_lowers_its_loss(learners):
    base = learners[1].initial()
    first = learners[1].train(base, Round(0))
    again = learners[1].train(base, Round(0))
    assert encode_tensors(first.delta) == encode_tensors(again.delta)
    other = learners[1].train(base, Round(1))
    assert encode_tensors(first.delta) != encode_tensors(other.delta)
    trained = {name: base[name] + first.delta[name] for name in base}
    assert learners[1].train(trained, Round(0)).loss_nats < first.loss_nats


def test_the_gradient_is_the_slope_of_its_own_loss(learners):
    learner = learners[0]
    at = {name: values + np.float32(0.01) for name, values in learner.initial().items()}
    _, gradient = learner.gradient(at, seed=7)
    step = {name: values / np.sqrt(np.sum(flatten(gradient) ** 2)) for name, values in gradient.items()}
    ahead, _ = learner.gradient({name: at[name] + 0.01 * step[name] for name in at}, seed=7)
    behind, _ = learner.gradient({name: at[name] - 0.01 * step[name] for name in at}, seed=7)
    assert (ahead - behind) / 0.02 == pytest.approx(float(np.sqrt(np.sum(flatten(gradient) ** 2))), rel=0.02)


@pytest.fixture(scope="module")
def with_work(tmp_path_factory):
    return build_shards(2, tmp_path_factory.mktemp("work"), seed=0, corrupted=set(), work_max=6)


def test_the_last_steps_on_a_public_batch_teach_that_batch_and_it_is_everybodys(with_work):
    probe = read_probe(with_work.probe)
    assert probe.work
    private = {sample for path in with_work.peers for sample in read_samples(path)}
    held_out = {sample for split in (probe.probe, probe.test) for part in split.values() for sample in part}
    assert not set(probe.work) & (private | held_out)
    config = make_config(probe, scoring=ScoringConfig(work_steps=4))
    first, second = (
        TorchLearner(*load_backbone(TINY, torch.float32), config, read_samples(path), probe) for path in with_work.peers
    )
    base = first.initial()
    assert first.work_loss(base, 7) == second.work_loss(base, 7) != first.work_loss(base, 8)
    proving, skipping = (first.train(base, Round(0), work).delta for work in (7, None))
    losses = [first.work_loss({name: base[name] + delta[name] for name in base}, 7) for delta in (proving, skipping)]
    assert losses[0] < losses[1] - 0.2


def test_a_proof_of_computation_needs_something_to_draw_it_from(shards):
    probe = read_probe(shards.probe)
    config = make_config(probe, scoring=ScoringConfig(work_steps=1))
    with pytest.raises(OperatorError, match='"work"'):
        TorchLearner(*load_backbone(TINY, torch.float32), config, read_samples(shards.peers[0]), probe)


def test_each_seed_draws_a_fresh_sample_and_equal_seeds_the_same(learners):
    base = learners[0].initial()
    assert learners[0].gradient(base, 1)[0] == learners[1].gradient(base, 1)[0]
    assert learners[0].gradient(base, 1)[0] != learners[0].gradient(base, 2)[0]


def test_every_stratum_weighs_the_same_however_long_it_is(shards):
    probe = read_probe(shards.probe)
    topics = sorted(probe.test)[:3]
    part = {topic: probe.test[topic] for topic in topics}
    tripled = {**part, topics[0]: part[topics[0]] * 3}
    losses = []
    for strata in (part, tripled):
        model, tokenizer = load_backbone(TINY, torch.float32)
        balanced = msgspec.structs.replace(probe, probe=strata, test=strata)
        learner = TorchLearner(model, tokenizer, make_config(probe), read_samples(shards.peers[0]), balanced)
        losses.append(learner.evaluate(learner.initial()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_aumann_shapley_is_within_two_percent_of_exact_enumeration(shards, learners):
    config = make_config(read_probe(shards.probe))
    base = learners[0].initial()
    updates = []
    for learner in learners:
        payload, _ = compress(learner.train(base, Round(0)).delta, config.compression)
        updates.append(decode_payload(payload, learner.shapes(), config.compression, 1 << 24))
    factors = clip_factors(updates)
    players = [
        Player(update.positions, update.values, factor / NUM_PEERS)
        for update, factor in zip(updates, factors, strict=True)
    ]
    judge = learners[0]
    values = compute_contributions(lambda at: judge.gradient(at, 3)[1], base, players)

    def utility(coalition):
        moved = flatten(base).astype(np.float64)
        for index, player in enumerate(players):
            if coalition >> index & 1:
                moved[player.positions] += player.weight * player.values
        at = unflatten(moved, updates[0].layout)
        return -judge.gradient(at, 3)[0]

    exact = compute_exact(CoalitionGame(utility, NUM_PEERS)).values
    error = np.linalg.norm(np.subtract(values, exact)) / np.linalg.norm(exact)
    assert error < 0.02
    assert np.argsort(values).tolist() == np.argsort(exact).tolist()


def test_a_round_of_work_lowers_held_out_loss_and_is_the_same_on_every_peer(shards, learners):
    config = make_config(read_probe(shards.probe))
    blobs = MemoryBlobs()
    base = blobs.put(encode_tensors(learners[0].initial()))
    train = Train(Round(0), MAKER, base, None)
    trained = [work.train_update(learner, blobs, config, train) for learner in learners[:3]]
    nothing = {name: np.zeros(shape, np.float32) for name, shape in learners[0].shapes().items()}
    free_ride, _, _ = work.compress_delta(blobs, config.compression, nothing, None, MAKER)
    payloads = [*(answer.payload for answer in trained), free_ride]
    for answer in trained:
        work.validate_blob("payload", blobs.get(answer.payload), learners[0].shapes(), config)
        assert answer.payload_bytes == len(blobs.get(answer.payload))
    weighted = tuple(Weighted(payload, Weight(WEIGHT_ONE // 4)) for payload in payloads)
    scored = work.score_updates(
        learners[0], blobs, config, ScoreUpdates(Round(0), base, None, weighted), seed=5, salt=b"s" * 32
    )
    assert scored.contributions[3] == 0
    assert min(scored.contributions[:3]) > 0
    request = Digest(b"r" * 32)
    merged = work.merge_updates(blobs, learners[0].shapes(), config, Merge(request, base, weighted))
    reverse = work.merge_updates(blobs, learners[1].shapes(), config, Merge(request, base, weighted[::-1]))
    assert merged.new_base == reverse.new_base
    work.validate_blob("base", blobs.get(merged.new_base), learners[0].shapes(), config)
    before = work.evaluate(learners[0], blobs, Evaluate(Round(0), base))
    after = work.evaluate(learners[0], blobs, Evaluate(Round(0), merged.new_base))
    assert after.loss_nano < before.loss_nano


def test_error_feedback_keeps_what_the_payload_left_out(shards, learners):
    config = make_config(read_probe(shards.probe))
    blobs = MemoryBlobs()
    base = blobs.put(encode_tensors(learners[0].initial()))
    shapes = learners[0].shapes()
    answer = work.train_update(learners[0], blobs, config, Train(Round(0), MAKER, base, None))
    delta = learners[0].train(learners[0].initial(), Round(0)).delta
    maker, coded = work.split_payload(blobs.get(answer.payload))
    assert maker == MAKER
    sent = decode_payload(coded, shapes, config.compression, 1 << 24).tensors()
    rest = decode_tensors(blobs.get(answer.residual), shapes)
    for name in shapes:
        np.testing.assert_allclose(sent[name] + rest[name], delta[name], atol=1e-7)


def test_malformed_blobs_reject(shards, learners):
    config = make_config(read_probe(shards.probe))
    for kind in ("payload", "base"):
        with pytest.raises(Reject):
            work.validate_blob(kind, b"garbage", learners[0].shapes(), config)


def test_adapters_are_set_by_canonical_name():
    model, _ = load_backbone(TINY, torch.float32)
    peft_model = build_peft(model, AdapterConfig(rank=4))
    shapes = adapter_shapes(peft_model)
    assert shapes["model.layers.0.self_attn.q_proj.lora_A"] == (4, 128)
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    set_adapter_tensors(peft_model, tensors)
    assert encode_tensors(get_adapter_tensors(peft_model)) == encode_tensors(tensors)


def test_a_missing_model_or_wrong_target_names_the_next_step(tmp_path):
    with pytest.raises(OperatorError, match="p2pfm models fetch"):
        load_backbone(tmp_path / "nothing")
    model, _ = load_backbone(TINY, torch.float32)
    with pytest.raises(OperatorError, match="targets"):
        build_peft(model, AdapterConfig(targets=("no_such_module",)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no samples"),
        (b'{"topic":"t","prompt":"a","completion":"b"}\n{"topic":1}\n', "line 2"),
        (b'{"topic":"t","prompt":" ","completion":"b"}', "must not be empty"),
        (b"\xff\n", "line 1"),
    ],
)
def test_bad_samples_name_their_line(data, message):
    with pytest.raises(OperatorError, match=message):
        parse_samples(data, "data.jsonl")


def test_a_probe_needs_both_splits_of_every_topic():
    with pytest.raises(OperatorError, match="need lines"):
        parse_probe(b'{"split":"probe","topic":"t","prompt":"a","completion":"b"}', "probe.jsonl")


def test_shards_are_reproducible_distinct_and_hold_nothing_of_the_probe(shards, tmp_path):
    again = build_shards(NUM_PEERS, tmp_path, seed=0, corrupted={4})
    assert [path.read_bytes() for path in again.peers] == [path.read_bytes() for path in shards.peers]
    assert again.probe.read_bytes() == shards.probe.read_bytes()
    probe = read_probe(shards.probe)
    held_out = {(s.topic, s.prompt) for split in (probe.probe, probe.test) for part in split.values() for s in part}
    samples = [set(map(as_key, read_samples(path))) for path in shards.peers]
    for index, own in enumerate(samples):
        assert own
        assert not own & held_out
        assert all(not own & other for other in samples[index + 1 :])
    topics = [set(topics) for topics in shards.topics]
    assert all(not topics[i] & topics[j] for i in range(5) for j in range(i))


def as_key(sample):
    return (sample.topic, sample.prompt)
