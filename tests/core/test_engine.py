from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from p2pfm.config import AdapterConfig
from p2pfm.errors import Reject
from p2pfm.lora.layers import compute_initial
from p2pfm.messages import GenerateRequest
from p2pfm.runtime.engine import PREFILL_TOKENS, Engine
from p2pfm.serving.session import BrokenLogits, UnknownVersion
from p2pfm.types import Digest, Tensors

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
V1, V2, V3 = (Digest(bytes([index]) * 32) for index in (1, 2, 3))


def make_adapter(shapes, seed: int) -> Tensors:
    """An adapter that changes the text: B is not 0."""
    rng = np.random.default_rng(seed)
    return {
        name: (tensor + rng.normal(0, 0.05, tensor.shape)).astype(np.float32)
        for name, tensor in compute_initial(shapes, seed).items()
    }


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = Engine(str(TINY), AdapterConfig(), versions_max=2)
    for seed, version in ((1, V1), (2, V2)):
        made.add_version(version, make_adapter(made.shapes, seed))
    return made


def ask(engine: Engine, version: Digest = V1, num_tokens: int = 40, temperature: int = 0, text: str = "My fellow"):
    prompt = tuple(engine.tokenizer.encode(text))
    return GenerateRequest(version, prompt, (), num_tokens, temperature, 950, 11)


def run(engine: Engine, request: GenerateRequest) -> tuple[int, ...]:
    return tuple(token for chunk in engine.generate(request) for token in chunk.tokens)


@pytest.mark.parametrize("temperature", [0, 800])
@pytest.mark.parametrize("text", ["My fellow", "The state of the Union is strong, " * 40])
def test_a_resume_at_any_position_gives_the_undisturbed_text(engine: Engine, temperature: int, text: str) -> None:
    request = ask(engine, temperature=temperature, text=text)
    whole = run(engine, request)
    for cut in {1, 2, len(whole) // 2, len(whole) - 1}:
        rest = run(engine, msgspec.structs.replace(request, emitted=whole[:cut]))
        assert whole[:cut] + rest == whole
    assert run(engine, msgspec.structs.replace(request, emitted=whole)) == ()


def test_resumed_logits_are_the_same_bits(engine: Engine) -> None:
    request = ask(engine, num_tokens=12)
    seen: dict[int, list[bytes]] = {}
    forward = engine.forward

    def record(tensors, tokens, cache):
        logits = forward(tensors, tokens, cache)
        seen.setdefault(cache.get_seq_length(), []).append(logits.tobytes())
        return logits

    engine.forward = record  # type: ignore[method-assign]
    try:
        whole = run(engine, request)
        run(engine, msgspec.structs.replace(request, emitted=whole[:7]))
    finally:
        engine.forward = forward  # type: ignore[method-assign]
    assert len(seen) == len(whole)
    assert all(len(rows) == 2 and rows[0] == rows[1] for rows in seen.values())


def test_greedy_text_is_that_of_plain_generate(engine: Engine) -> None:
    request = ask(engine, num_tokens=24)
    ours = run(engine, request)  # leaves this version's weights in the model
    with torch.inference_mode():
        theirs = engine.model.generate(
            torch.tensor([request.prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
    assert ours == tuple(theirs[0, len(request.prompt) :].tolist())


def test_interleaved_streams_never_mix_versions(engine: Engine) -> None:
    requests = [ask(engine, V1), ask(engine, V2), ask(engine, V1, temperature=900)]
    alone = [run(engine, request) for request in requests]
    assert alone[0] != alone[1]
    streams = [engine.open(request) for request in requests]
    together: list[list[int]] = [[], [], []]
    running = {0, 1, 2}
    while running:
        for index in sorted(running):
            chunk = streams[index].step()
            if chunk is None:
                running.discard(index)
            else:
                together[index].extend(chunk.tokens)
    assert [tuple(tokens) for tokens in together] == alone


def test_a_running_stream_keeps_its_version_when_newer_ones_push_it_out() -> None:
    engine = Engine(str(TINY), AdapterConfig(), versions_max=1)
    engine.add_version(V1, make_adapter(engine.shapes, 1))
    request = ask(engine, V1)
    whole = run(engine, request)
    stream = engine.open(request)
    first = stream.step()
    assert first is not None
    engine.add_version(V2, make_adapter(engine.shapes, 2))
    assert engine.versions() == (V2,)
    rest = [token for chunk in iter(stream.step, None) for token in chunk.tokens]
    assert (*first.tokens, *rest) == whole
    with pytest.raises(UnknownVersion):
        engine.open(request)


def test_versions_are_listed_newest_first(engine: Engine) -> None:
    assert engine.versions() == (V2, V1)


def test_the_last_chunk_carries_the_finish_and_positions_have_no_gap(engine: Engine) -> None:
    chunks = [chunk for chunk in engine.generate(ask(engine, num_tokens=5)) if chunk.tokens]
    assert [chunk.position for chunk in chunks] == list(range(5))
    assert [chunk.finish for chunk in chunks] == ["", "", "", "", "length"]


def test_an_end_token_stops_the_stream(engine: Engine) -> None:
    whole = run(engine, ask(engine))
    end = whole[6]
    kept, engine.vocabulary = engine.vocabulary, replace(engine.vocabulary, ends=frozenset({end}))
    try:
        chunks = [chunk for chunk in engine.generate(ask(engine)) if chunk.tokens]
    finally:
        engine.vocabulary = kept
    assert tuple(token for chunk in chunks for token in chunk.tokens) == whole[: whole.index(end) + 1]
    assert chunks[-1].finish == "stop"


def test_reading_a_long_prompt_gives_signs_of_life(engine: Engine) -> None:
    request = ask(engine, num_tokens=1, text="The state of the Union is strong, " * 40)
    chunks = list(engine.generate(request))
    assert len(chunks) == -(-len(request.prompt) // PREFILL_TOKENS) > 1
    assert [bool(chunk.tokens) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_wrong_adapter_rejects(engine: Engine) -> None:
    good = dict(make_adapter(engine.shapes, 1))
    name = next(iter(good))
    for bad in ({}, {**good, name: good[name].T}, {**good, "other": good[name]}):
        with pytest.raises(Reject):
            engine.add_version(V3, bad)


def test_a_request_beyond_the_context_rejects(engine: Engine) -> None:
    with pytest.raises(Reject):
        engine.open(ask(engine, num_tokens=engine.vocabulary.context_max))


def test_a_diverged_adapter_breaks_its_own_streams_only() -> None:
    engine = Engine(str(TINY), AdapterConfig(), versions_max=2)
    good = make_adapter(engine.shapes, 1)
    engine.add_version(V1, good)
    engine.add_version(V2, {name: np.full_like(tensor, np.nan) for name, tensor in good.items()})
    before = run(engine, ask(engine, V1, num_tokens=8))
    with pytest.raises(BrokenLogits):
        run(engine, ask(engine, V2))
    assert run(engine, ask(engine, V1, num_tokens=8)) == before
