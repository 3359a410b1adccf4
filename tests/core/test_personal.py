"""The private adapter: how data is split for it, what a refinement keeps, and an engine that serves both kinds."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from node_toml import NODE

from p2pfm.config import AdapterConfig, ChainConfig, NetworkConfig, PersonalConfig, TrainingConfig, parse_node_config
from p2pfm.errors import ConfigError, OperatorError, Reject
from p2pfm.lora.batches import encode_all
from p2pfm.lora.corpus import read_topics
from p2pfm.lora.delta import add, encode_tensors, zeros
from p2pfm.lora.kinds import compute_initial
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.personal import HELD_OUT_MAX, decode_private, encode_private, mix, refine, split_samples
from p2pfm.lora.samples import Probe, Sample
from p2pfm.lora.torch_learner import Data, TorchLearner
from p2pfm.messages import GenerateRequest
from p2pfm.runtime.engine import PRIVATE_MAX, Engine
from p2pfm.serving.session import UnknownVersion
from p2pfm.types import Digest, Millis, Round

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
BASE, PRIVATE = Digest(b"b" * 32), Digest(b"p" * 32)
STEPS = TrainingConfig(steps=12, batch=4, tokens_max=48, learning_rate=1e-2)


# --- what is held out -------------------------------------------------------------------------------------------------


def make_samples(num_prompts: int, answers: int = 1) -> list[Sample]:
    return [Sample("t", f"question {i}", f"answer {j}") for i in range(num_prompts) for j in range(answers)]


@pytest.mark.parametrize("num_prompts", [2, 3, 10, 100, 2000])
@pytest.mark.parametrize("part", [0.01, 0.1, 0.5])
def test_all_answers_to_a_prompt_are_on_one_side_and_both_sides_have_some(num_prompts: int, part: float) -> None:
    samples = make_samples(num_prompts, answers=3)
    inside, outside = split_samples(samples, part)
    assert inside
    assert outside
    assert sorted(map(str, (*inside, *outside))) == sorted(map(str, samples))
    assert not {s.prompt for s in inside} & {s.prompt for s in outside}
    assert len(outside) <= max(HELD_OUT_MAX, 3)
    if num_prompts >= 100 and part * num_prompts * 3 < HELD_OUT_MAX:
        assert 0.3 * part < len(outside) / len(samples) < 3 * part


def test_what_was_trained_on_is_never_held_out_later() -> None:
    few, many = make_samples(200), make_samples(400)
    trained = set(split_samples(few, 0.1)[0])
    assert not trained & set(split_samples(many, 0.1)[1])
    assert split_samples(few, 0.1) == split_samples(few, 0.1)


def test_one_prompt_alone_rejects() -> None:
    with pytest.raises(OperatorError, match="at least 2 prompts"):
        split_samples(make_samples(1, answers=9), 0.1)


# --- refinement -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared() -> tuple[TorchLearner, object]:
    """A network's learner on the tiny model, and its tokenizer."""
    torch.set_num_threads(1)
    model, tokenizer = load_backbone(TINY, torch.float32)
    topics = read_topics()
    probe = {"emotion": tuple(topics["emotion"][:4])}
    config = NetworkConfig("t", Millis(0), "tiny", "0" * 64, ChainConfig(1, "", ""), training=STEPS)
    learner = TorchLearner(model, tokenizer, config, topics["emotion"][8:40], Probe(probe, probe, Digest(b"")))
    return learner, tokenizer


def make_own(shared, samples, held_out, steps: int = STEPS.steps) -> TorchLearner:
    learner, tokenizer = shared
    judge = {"own": encode_all(tokenizer, held_out, 48)}
    data = Data(encode_all(tokenizer, samples, 48), judge, judge, Digest(b"own"))
    return learner.beside(data, msgspec.structs.replace(STEPS, steps=steps))


def test_refinement_lowers_the_own_held_out_loss_and_leaves_the_base_alone(shared) -> None:
    own = make_own(shared, *split_samples(read_topics()["trivia"][:60], 0.2))
    base = shared[0].initial()
    bytes_before = encode_tensors(base)
    private, losses = zeros(own.shapes()), []
    for round in range(3):
        refined = refine(own, base, private, 0.5, Round(round))
        assert refined.base_nats == own.evaluate(base)
        assert refined.mixed_nats == own.evaluate(mix(base, refined.private, 0.5))
        private = refined.private
        losses.append(refined.mixed_nats)
    assert losses[0] < refined.base_nats
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * refined.base_nats
    assert encode_tensors(base) == bytes_before
    # The base goes on; the private adapter still helps on the new one, before any further step.
    new_base = add(base, shared[0].train(base, Round(0)).delta)
    assert own.evaluate(mix(new_base, private, 0.5)) < own.evaluate(new_base)


def test_a_refinement_that_harms_is_not_taken(shared) -> None:
    rng = np.random.default_rng(0)
    # So long that its end mark is cut off: even garbage that ends teaches a model to answer briefly.
    garbage = [Sample("t", f"q {i}", " ".join(map(str, rng.integers(0, 999, 60)))) for i in range(12)]
    own = make_own(shared, garbage, read_topics()["trivia"][:8], steps=30)
    base = shared[0].initial()
    refined = refine(own, base, zeros(own.shapes()), 1.0, Round(0))
    assert refined.mixed_nats == refined.base_nats
    assert encode_tensors(refined.private) == encode_tensors(zeros(own.shapes()))


def test_what_a_new_base_made_useless_is_dropped(shared) -> None:
    own = make_own(shared, *split_samples(read_topics()["trivia"][:40], 0.2), steps=8)
    base = add(shared[0].initial(), own.train(shared[0].initial(), Round(0)).delta)
    rng = np.random.default_rng(0)
    useless = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in own.shapes().items()}
    assert own.evaluate(mix(base, useless, 1.0)) > own.evaluate(base)
    refined = refine(own, base, useless, 1.0, Round(1))
    assert refined.mixed_nats == refined.base_nats
    assert encode_tensors(refined.private) == encode_tensors(zeros(own.shapes()))


def test_private_bytes_come_back_and_others_reject() -> None:
    shapes = {"a.lora_A": (2, 3)}
    private = {"a.lora_A": np.arange(6, dtype=np.float32).reshape(2, 3)}
    data = encode_private(private)
    assert encode_tensors(decode_private(data, shapes)) == encode_tensors(private)
    for bad in (b"", b"garbage", data[:-1], data + b"x", encode_tensors(private)):
        with pytest.raises(OperatorError, match="private adapter"):
            decode_private(bad, shapes)
    with pytest.raises(OperatorError, match="another network"):
        decode_private(data, {"a.lora_A": (3, 2)})


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Engine:
    made = Engine(str(TINY), AdapterConfig(), versions_max=2)
    made.add_version(BASE, make_adapter(made.shapes, 1))
    made.add_private(PRIVATE, mix(make_adapter(made.shapes, 1), make_adapter(made.shapes, 2), 0.5))
    return made


def make_adapter(shapes, seed: int):
    rng = np.random.default_rng(seed)
    return {
        name: (tensor + rng.normal(0, 0.05, tensor.shape)).astype(np.float32)
        for name, tensor in compute_initial(shapes, seed).items()
    }


def ask(engine: Engine, version: Digest, num_tokens: int = 24) -> GenerateRequest:
    return GenerateRequest(version, tuple(engine.tokenizer.encode("My fellow")), (), num_tokens, 0, 1000, 1, 0)


def run(engine: Engine, version: Digest) -> tuple[int, ...]:
    stream = engine.open(ask(engine, version), is_local=True)
    return tuple(token for chunk in iter(stream.step, None) for token in chunk.tokens)


def test_a_private_adapter_answers_otherwise_and_disturbs_no_stream_of_the_base(engine: Engine) -> None:
    alone = {version: run(engine, version) for version in (BASE, PRIVATE)}
    assert alone[BASE] != alone[PRIVATE]
    assert run(engine, BASE) == alone[BASE]
    streams = [(version, engine.open(ask(engine, version), is_local=True)) for version in (BASE, PRIVATE) * 2]
    texts: list[list[int]] = [[] for _ in streams]
    for step in range(24):
        for text, (_, stream) in zip(texts, streams, strict=True):
            chunk = stream.step()
            assert chunk is not None
            text.extend(chunk.tokens)
        if step == 8:  # a new mix comes while they run, and pushes the old ones out
            for seed in range(PRIVATE_MAX):
                engine.add_private(Digest(bytes([seed]) * 32), make_adapter(engine.shapes, 9 + seed))
    assert [tuple(text) for text in texts] == [alone[version] for version, _ in streams]
    with pytest.raises(UnknownVersion):
        engine.open(ask(engine, PRIVATE), is_local=True)


def test_a_private_adapter_exists_for_local_askers_only(engine: Engine) -> None:
    assert engine.versions() == (BASE,)
    with pytest.raises(UnknownVersion) as private:
        engine.open(ask(engine, PRIVATE))
    with pytest.raises(UnknownVersion) as unknown:
        engine.open(ask(engine, Digest(b"?" * 32)))
    # Nothing in the refusal tells that one of them is there.
    assert str(private.value).replace(PRIVATE.hex()[:16], "") == str(unknown.value).replace((b"?" * 8).hex(), "")


def test_a_private_adapter_of_other_shapes_rejects(engine: Engine) -> None:
    with pytest.raises(Reject):
        engine.add_private(PRIVATE, {})


# --- configuration ----------------------------------------------------------------------------------------------------


def test_personalisation_is_off_unless_asked_for() -> None:
    assert parse_node_config(NODE).personal == PersonalConfig(enabled=False)
    assert parse_node_config(NODE + "[personal]\nenabled = true").personal.enabled


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("[personal]\nenabled = true\nsteps = 0", "personal.steps: expected 1"),
        ("[personal]\nenabled = true\nweight = 0.0", "personal.weight"),
        ("[personal]\nenabled = true\nweight = nan", "personal.weight"),
        ("[personal]\nenabled = true\nheld_out = 0.9", "personal.held_out"),
        ("[personal]\nenabled = true\nrank = 4", "rank"),
        ("[personal]\nenabled = true\n[serving]\nenabled = false", "serving.enabled"),
        ('[personal]\nenabled = true\n[http]\nhost = "0.0.0.0"', "http.host 0.0.0.0"),
        ('[personal]\nenabled = true\n[http]\nhost = "node.example.org"', "127.0.0.1"),
    ],
)
def test_personalisation_rejects_what_cannot_work_or_would_be_open_to_others(lines: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_node_config(NODE + lines)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_personalisation_takes_any_address_of_this_machine_alone(host: str) -> None:
    assert parse_node_config(NODE + f'[personal]\nenabled = true\n[http]\nhost = "{host}"').personal.enabled
