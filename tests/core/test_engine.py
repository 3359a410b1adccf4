from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peer_bench import CONFIG

from nodes.transformer import make_models
from p2pfm.config import AdapterConfig, NodeConfig, ServingConfig
from p2pfm.errors import OperatorError, Reject
from p2pfm.lora.kinds import compute_initial
from p2pfm.lora.layers import build_peft, choose_device, get_adapter_tensors, load_backbone, set_adapter_tensors
from p2pfm.messages import GenerateRequest
from p2pfm.runtime.engine import BLOCK_TOKENS_MAX, Engine, split_prompt
from p2pfm.serving.sampling import compute_logprobs
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


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(device: str) -> Engine:
    made = Engine(str(TINY), AdapterConfig(), versions_max=2, device=device)
    for seed, version in ((1, V1), (2, V2)):
        made.add_version(version, make_adapter(made.shapes, seed))
    return made


def ask(engine: Engine, version: Digest = V1, num_tokens: int = 40, temperature: int = 0, text: str = "My fellow"):
    prompt = tuple(engine.tokenizer.encode(text))
    return GenerateRequest(version, prompt, (), num_tokens, temperature, 950, 11, 0)


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


def test_a_resumed_stream_has_the_same_bits(engine: Engine) -> None:
    request = msgspec.structs.replace(ask(engine, num_tokens=40), num_logprobs=6)
    whole = [chunk.logprobs for chunk in engine.generate(request) if chunk.tokens]
    emitted = run(engine, request)
    for cut in (1, 7, 30):
        resumed = engine.generate(msgspec.structs.replace(request, emitted=emitted[:cut]))
        assert [chunk.logprobs for chunk in resumed if chunk.tokens] == whole[cut:]
    seen = list(engine.compute_logits(msgspec.structs.replace(request, emitted=emitted)))
    assert [compute_logprobs(row, token, 5) for row, token in zip(seen, emitted, strict=True)] == [
        one for (one,) in whole
    ]


def test_what_else_is_in_the_batch_changes_no_bit(engine: Engine) -> None:
    texts = ["My fellow", "The state of the Union is strong, " * 40, "We", "Peace and prosperity"]
    requests = [
        msgspec.structs.replace(ask(engine, (V1, V2)[index % 2], 20 + index, 700, texts[index % 4]), num_logprobs=3)
        for index in range(20)  # more than rows of one pass
    ]
    alone = [[chunk for chunk in engine.generate(request) if chunk.tokens] for request in requests]
    streams = {engine.open(request): index for index, request in enumerate(requests)}
    together: list[list] = [[] for _ in requests]
    num_steps = 0
    while not all(stream.is_ended for stream in streams):
        for stream, chunk in engine.step(list(streams)):
            together[streams[stream]] += [chunk] if chunk.tokens else []
        num_steps += 1
    assert together == alone
    assert num_steps < sum(map(len, alone)) / 3


def test_prompts_that_begin_alike_share_their_beginning(engine: Engine, device: str) -> None:
    text = "Our citizens are free, and brave, and strong, " * 30
    first, second = (ask(engine, num_tokens=6, text=text + end) for end in ("God bless you", "and so are we."))
    fresh = Engine(str(TINY), AdapterConfig(), versions_max=2, device=device, prefix_bytes_max=0)
    fresh.add_version(V1, make_adapter(fresh.shapes, 1))
    expected = list(fresh.generate(second))
    list(engine.generate(first))
    chunks = list(engine.generate(second))
    assert sum(not chunk.tokens for chunk in chunks) < sum(not chunk.tokens for chunk in expected) / 2
    assert [chunk for chunk in chunks if chunk.tokens] == [chunk for chunk in expected if chunk.tokens]
    other = list(engine.generate(msgspec.structs.replace(second, version=V2)))  # another adapter: nothing is shared
    assert sum(not chunk.tokens for chunk in other) == sum(not chunk.tokens for chunk in expected)


def test_a_resume_reads_no_block_of_its_prompt_again_that_is_held(engine: Engine, device: str) -> None:
    """Only what was emitted is read anew, in rows."""
    request = ask(engine, num_tokens=6, text="Our harvests were good, and our mills were busy, " * 30)
    fresh = Engine(str(TINY), AdapterConfig(), versions_max=2, device=device, prefix_bytes_max=0)
    fresh.add_version(V1, make_adapter(fresh.shapes, 1))
    whole = run(engine, request)
    resume = msgspec.structs.replace(request, emitted=whole[:3], num_logprobs=3)
    chunks, expected = list(engine.generate(resume)), list(fresh.generate(resume))
    assert [chunk for chunk in chunks if chunk.tokens] == [chunk for chunk in expected if chunk.tokens]
    num_blocks = len(split_prompt(request.prompt, engine.vocabulary.ends))
    assert num_blocks > 3
    assert sum(not chunk.tokens for chunk in expected) == num_blocks
    assert sum(not chunk.tokens for chunk in chunks) == 1  # the last block alone, whose logits are in no cache


@given(st.lists(st.integers(0, 6), max_size=400), st.lists(st.integers(0, 6), max_size=200))
def test_blocks_of_a_prompt_depend_on_nothing_that_comes_after_them(prompt: list[int], more: list[int]) -> None:
    ends = frozenset({0})
    blocks, longer = split_prompt(tuple(prompt), ends), split_prompt((*prompt, *more), ends)
    assert [token for block in blocks for token in block] == prompt
    assert all(0 < len(block) <= BLOCK_TOKENS_MAX for block in blocks)
    assert longer[: max(len(blocks) - 1, 0)] == blocks[:-1]


def test_greedy_text_is_that_of_plain_generate(engine: Engine, device: str) -> None:
    request = ask(engine, num_tokens=24)
    model = build_peft(load_backbone(TINY)[0], AdapterConfig()).to(device)
    set_adapter_tensors(model, make_adapter(engine.shapes, 1))
    with torch.inference_mode():
        theirs = model.generate(
            torch.tensor([request.prompt], device=device), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
    assert run(engine, request) == tuple(theirs[0, len(request.prompt) :].tolist())


def test_a_users_lora_of_any_rank_on_any_layer_is_that_of_peft(engine: Engine, device: str) -> None:
    config = AdapterConfig(rank=3, alpha=48, targets=("down_proj", "o_proj"))
    model = build_peft(load_backbone(TINY)[0], config).to(device)
    tensors = make_adapter({name: tuple(part.shape) for name, part in get_adapter_tensors(model).items()}, 4)
    tensors = {name: 2 * part for name, part in tensors.items()}
    set_adapter_tensors(model, tensors)
    names = {name.rpartition(".")[0] for name in tensors}
    engine.add_lora(V3, {name: (tensors[f"{name}.lora_A"], 16 * tensors[f"{name}.lora_B"]) for name in names})
    bare = Digest(b"bare" * 8)
    engine.add_lora(bare, {})
    requests = [ask(engine, version, num_tokens=40) for version in (V3, bare, V2)]
    alone = [run(engine, request) for request in requests]
    assert len(set(alone)) == 3
    prompt = torch.tensor([requests[0].prompt], device=device)
    with torch.inference_mode():
        theirs = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
        with model.disable_adapter():
            without = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert alone[0] == tuple(theirs[0, prompt.shape[1] :].tolist())
    assert alone[1] == tuple(without[0, prompt.shape[1] :].tolist())
    assert engine.versions() == (V2, V1)
    stream = engine.open(requests[0])
    engine.drop(V3)
    assert tuple(token for chunk in iter(stream.step, None) for token in chunk.tokens) == alone[0]
    with pytest.raises(UnknownVersion):
        engine.open(requests[0])
    for bad in (
        {"model.layers.9.mlp.up_proj": (np.zeros((2, 128), np.float32), np.zeros((341, 2), np.float32))},
        {"model.layers.0.mlp.up_proj": (np.zeros((2, 127), np.float32), np.zeros((341, 2), np.float32))},
        {"model.layers.0.mlp.up_proj": (np.zeros((2, 128), np.float32), np.zeros((341, 3), np.float32))},
    ):
        with pytest.raises(Reject):
            engine.add_lora(V3, bad)


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


def test_a_running_stream_keeps_its_version_when_newer_ones_push_it_out(device: str) -> None:
    engine = Engine(str(TINY), AdapterConfig(), versions_max=1, device=device)
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
    request = ask(engine, num_tokens=1, text="Let us read on, and on, and on. " * 40)
    chunks = list(engine.generate(request))
    assert len(chunks) == -(-len(request.prompt) // BLOCK_TOKENS_MAX) > 1
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


def test_a_diverged_adapter_breaks_its_own_streams_only(device: str) -> None:
    engine = Engine(str(TINY), AdapterConfig(), versions_max=2, device=device)
    good = make_adapter(engine.shapes, 1)
    engine.add_version(V1, good)
    engine.add_version(V2, {name: np.full_like(tensor, np.nan) for name, tensor in good.items()})
    before = run(engine, ask(engine, V1, num_tokens=8))
    with pytest.raises(BrokenLogits):
        run(engine, ask(engine, V2))
    assert run(engine, ask(engine, V1, num_tokens=8)) == before


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_in_every_number_format_a_resume_gives_the_same_text_in_company(device: str, dtype: str) -> None:
    engine = Engine(str(TINY), AdapterConfig(), versions_max=1, device=device, dtype=dtype)
    engine.add_version(V1, make_adapter(engine.shapes, 1))
    requests = [ask(engine, num_tokens=24, temperature=900, text=text) for text in ("My fellow", "We", "Peace")]
    alone = [run(engine, request) for request in requests]
    streams = [
        engine.open(msgspec.structs.replace(request, emitted=whole[: 3 * index]))
        for index, (request, whole) in enumerate(zip(requests, alone, strict=True))
    ]
    together: dict = {stream: [] for stream in streams}
    while not all(stream.is_ended for stream in streams):
        for stream, chunk in engine.step(streams):
            together[stream] += chunk.tokens
    assert [tuple(tokens) for tokens in together.values()] == [whole[3 * i :] for i, whole in enumerate(alone)]


def test_a_device_is_where_the_operator_wants_it_and_cuda_only_where_there_is_one() -> None:
    assert choose_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert choose_device("auto") == choose_device("cuda") == "cuda"
        return
    assert choose_device("auto") == choose_device() == "cpu"
    config = NodeConfig(
        home=".",
        data="",
        probe="",
        rpc="",
        network=msgspec.structs.replace(CONFIG, backbone="tiny"),
        serving=ServingConfig(device="cuda"),
    )
    with pytest.raises(OperatorError, match=r"serving\.device"):
        make_models(config, (), lambda learner: learner).engine()
