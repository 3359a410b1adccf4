"""A vLLM server behind a node, by its documented contract (`vllm_contract`): the backbone, and bases as they come."""

from contextlib import aclosing
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from serving_world import TINY, V1, V2, make_adapter
from transformers import AutoConfig
from vllm_contract import running_vllm

from p2pfm.config import AdapterConfig, ServingConfig
from p2pfm.errors import OperatorError
from p2pfm.lora.checkpoint import write_checkpoint
from p2pfm.lora.layers import describe_form
from p2pfm.lora.user_adapter import BACKBONE_VERSION
from p2pfm.messages import GenerateRequest
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.text import TextCodec
from p2pfm.runtime.upstream import Upstream
from p2pfm.runtime.upstream_adapters import VllmAdapters
from p2pfm.runtime.upstream_check import connect_upstream
from p2pfm.types import Digest

V3 = Digest(b"\x33" * 32)


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = Engine(str(TINY), AdapterConfig(), versions_max=3, dtype="fp32")
    for seed, version in ((1, V1), (2, V2), (3, V3)):
        made.add_version(version, make_adapter(made.shapes, seed))
    return made


async def connect(url: str, engine: Engine, folder: Path, versions_max: int = 2) -> Upstream:
    form = describe_form(AutoConfig.from_pretrained(TINY), AdapterConfig())
    adapters = VllmAdapters(folder / "upstream", versions_max, lambda path, base: write_checkpoint(path, form, base))
    config = ServingConfig(backend="vllm", backend_url=url, backend_s=20.0, sessions_max=2)
    codec = TextCodec(engine.tokenizer, engine.vocabulary)
    return await connect_upstream(config, codec, lambda: engine.compute_logits, adapters)


async def collect(upstream: Upstream, request: GenerateRequest) -> tuple[int, ...]:
    async with aclosing(upstream.generate(request, is_local=False)) as chunks:
        return tuple([token async for chunk in chunks for token in chunk.tokens])


def ask(engine: Engine, version: Digest, temperature: int = 0) -> GenerateRequest:
    prompt = tuple(engine.tokenizer.encode("My fellow citizens"))
    return GenerateRequest(version, prompt, (), 24, temperature, 950, 7, 0)


def run(engine: Engine, request: GenerateRequest) -> tuple[int, ...]:
    return tuple(token for chunk in engine.generate(request) for token in chunk.tokens)


def test_backbone_and_bases_give_our_own_engines_texts(engine, tmp_path) -> None:
    async def main(url: str) -> None:
        upstream = await connect(url, engine, tmp_path)
        assert upstream.versions() == (BACKBONE_VERSION,)
        await upstream.add_version(V2, make_adapter(engine.shapes, 2))
        await upstream.add_version(V1, make_adapter(engine.shapes, 1))
        assert upstream.versions() == (V1, V2, BACKBONE_VERSION)
        texts = set()
        for version in upstream.versions():
            for temperature in (0, 800):
                request = ask(engine, version, temperature)
                whole = await collect(upstream, request)
                assert whole == run(engine, request)
                rest = await collect(upstream, msgspec.structs.replace(request, emitted=whole[:9]))
                assert whole[:9] + rest == whole
                texts.add(whole)
        assert len(texts) > 3, "adapters that change nothing prove nothing"

    with running_vllm(TINY) as (url, _):
        trio.run(main, url)


def test_the_oldest_base_goes_when_no_stream_uses_it(engine, tmp_path) -> None:
    async def main(url: str, loaded: dict) -> None:
        upstream = await connect(url, engine, tmp_path)
        add = [partial(upstream.add_version, version, make_adapter(engine.shapes, seed)) for seed, version in BASES]
        await add[0]()
        stream = upstream.generate(ask(engine, V1), is_local=False)
        got = [await anext(stream), await anext(stream)]
        await add[1]()
        await add[2]()
        assert upstream.versions() == (V3, V2, BACKBONE_VERSION)
        assert set(loaded) == {V1.hex(), V2.hex(), V3.hex()}
        got += [chunk async for chunk in stream]
        assert tuple(token for chunk in got for token in chunk.tokens) == run(engine, ask(engine, V1))
        await add[2]()
        assert set(loaded) == {V2.hex(), V3.hex()}
        assert sorted(path.name for path in (tmp_path / "upstream").iterdir()) == [V2.hex(), V3.hex()]

    with running_vllm(TINY) as (url, vllm):
        trio.run(main, url, vllm.adapters)


BASES = ((1, V1), (2, V2), (3, V3))


def test_a_base_left_by_an_earlier_run_is_loaded_again(engine, tmp_path) -> None:
    async def main(url: str) -> None:
        for folder in ("first", "second"):
            upstream = await connect(url, engine, tmp_path / folder)
            await upstream.add_version(V1, make_adapter(engine.shapes, 1))
            assert upstream.versions() == (V1, BACKBONE_VERSION)
            assert await collect(upstream, ask(engine, V1)) == run(engine, ask(engine, V1))

    with running_vllm(TINY) as (url, _):
        trio.run(main, url)


def test_a_server_that_takes_no_adapters_offers_the_backbone(engine, tmp_path, caplog) -> None:
    async def main(url: str, vllm) -> None:
        upstream = await connect(url, engine, tmp_path)
        vllm._load = lambda name, path: (404, {"detail": "Not Found"})
        await upstream.add_version(V1, make_adapter(engine.shapes, 1))
        assert upstream.versions() == (BACKBONE_VERSION,)

    with running_vllm(TINY) as (url, vllm):
        trio.run(main, url, vllm)
    assert "the base 1111111111111111 is not served here" in caplog.text


def test_a_server_that_tells_few_log_probabilities_says_how_to_start_it(engine, tmp_path) -> None:
    async def main(url: str) -> None:
        await connect(url, engine, tmp_path)

    with running_vllm(TINY, max_logprobs=20) as (url, _), pytest.raises(OperatorError, match="--max-logprobs -1"):
        trio.run(main, url)


def test_another_kind_of_server_is_found(engine, tmp_path) -> None:
    async def main(url: str) -> None:
        config = ServingConfig(backend="llama.cpp", backend_url=url)
        codec = TextCodec(engine.tokenizer, engine.vocabulary)
        adapters = VllmAdapters(tmp_path / "upstream", 2, lambda *_: None)
        await connect_upstream(config, codec, lambda: engine.compute_logits, adapters)

    with running_vllm(TINY) as (url, _), pytest.raises(OperatorError, match=r"expected a llama\.cpp server there"):
        trio.run(main, url)
