"""Tokens a second and time to the first token, beside plain `model.generate` and transformers' own server.

    python bench/serving.py [--json FILE] [--check] [--quick] [--device cuda] [--no-server]

The demo's backbone with its adapter, greedy, 64 new tokens after a question in the chat template. In this process: the
engine with 1, 4 and 16 streams, 16 streams of four adapters, and peft's `generate` one request after the other, in
turns. In a process each: our HTTP side, and `transformers serve` with continuous batching in an environment of its own
(it knows no adapter of ours: it serves the bare backbone), asked by the same client. Processes have one thread; figures
are CPU seconds of the serving process where it runs on a CPU, so that others on the machine do not matter.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import torch
import trio
from harness import Target, finish, make_parser, print_table, read_options
from prometheus_client import CollectorRegistry

from nodes.localnet import get_preset
from nodes.models import get_cache_dir, resolve
from p2pfm.config import ServingConfig
from p2pfm.errors import PeerUnreachable
from p2pfm.lora.layers import build_peft, get_adapter_tensors, load_backbone, set_adapter_tensors
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.http_api import HttpApi
from p2pfm.runtime.http_server import serve_http
from p2pfm.runtime.text import TextCodec
from p2pfm.types import Digest, Millis, PeerId, Tensors

QUESTIONS = ("Tell me about computers.", "What is football?", "Who are you?", "Tell me a long story about a king.")
STREAMS = (1, 4, 16)
NUM_ADAPTERS = 4
ROOT = Path(__file__).parent.parent


class Size(NamedTuple):
    """How much is generated."""

    num_tokens: int
    num_turns: int


class Served(NamedTuple):
    """What a client saw of a server, and what that cost it."""

    tokens_per_cpu_s: float
    first_token_s: float


def make_engine(preset: str, device: str) -> tuple[Engine, Any, dict[Digest, Tensors]]:
    """The engine with four adapters, peft's own model with the last of them, and these."""
    chosen = get_preset(preset)
    backbone = resolve(chosen.backbone)
    engine = Engine(backbone, chosen.adapter, NUM_ADAPTERS, device=device)
    engine.vocabulary = replace(engine.vocabulary, ends=frozenset())  # all make the same number of tokens
    model = build_peft(load_backbone(backbone, device=device)[0], chosen.adapter).to(device)
    rng = np.random.default_rng(1)
    start = get_adapter_tensors(model)
    adapters: dict[Digest, Tensors] = {}
    for number in range(NUM_ADAPTERS):
        version = Digest(bytes([number]) * 32)
        adapters[version] = {
            name: part + rng.normal(0, 0.02, part.shape).astype(np.float32) for name, part in start.items()
        }
        engine.add_version(version, adapters[version])
    set_adapter_tensors(model, adapters[version])
    return engine, model, adapters


def measure_engine(preset: str, device: str, size: Size) -> dict[str, list[tuple[float, float]]]:
    """By what ran: (tokens a second, mean seconds to the first token) of each turn."""
    engine, model, adapters = make_engine(preset, device)
    versions = list(adapters)
    codec = TextCodec(engine.tokenizer, engine.vocabulary)
    prompts = [codec.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    clock = time.process_time if device == "cpu" else time.perf_counter

    def ours(num_streams: int, num_adapters: int) -> tuple[float, float]:
        streams = {
            engine.open(
                GenerateRequest(
                    versions[-1 - number % num_adapters], prompts[number % 4], (), size.num_tokens, 0, 1000, 1, 0
                )
            ): 0.0
            for number in range(num_streams)
        }
        start, num_tokens = clock(), 0
        while not all(stream.is_ended for stream in streams):
            for stream, chunk in engine.step(list(streams)):
                assert not isinstance(chunk, Exception)
                if chunk.tokens and not streams[stream]:
                    streams[stream] = clock() - start
                num_tokens += len(chunk.tokens)
        return num_tokens / (clock() - start), statistics.fmean(streams.values())

    def plain() -> tuple[float, float]:
        lasted = 0.0
        first: list[float] = []
        for prompt in prompts:
            tokens = torch.tensor([prompt], device=device)
            for num_tokens in (1, size.num_tokens):
                start = clock()
                with torch.inference_mode():
                    model.generate(
                        input_ids=tokens,
                        max_new_tokens=num_tokens,
                        min_new_tokens=num_tokens,
                        do_sample=False,
                        pad_token_id=0,
                    )
                (first.append if num_tokens == 1 else lambda value: None)(clock() - start)
            lasted += clock() - start
        return len(prompts) * size.num_tokens / lasted, statistics.fmean(first)

    runs: dict[str, Callable[[], tuple[float, float]]] = {"generate, one by one": plain}
    runs |= {f"engine, {number} streams": partial(ours, number, 1) for number in STREAMS}
    runs["engine, 16 streams, 4 adapters"] = partial(ours, 16, NUM_ADAPTERS)
    ours(4, 4)
    plain()  # whatever is slow only once
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(size.num_turns):
        for name, run in runs.items():
            found[name].append(run())
    return found


# --- servers ----------------------------------------------------------------------------------------------------------


class Nobody:
    """A network without other peers."""

    async def generate(self, peer: PeerId, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """There is no one."""
        raise PeerUnreachable("nobody else serves here")
        yield


def serve_ours(preset: str, port: int) -> None:
    """A node's HTTP side on its own engine, until it is ended."""
    engine, _, adapters = make_engine(preset, "cpu")
    version = engine.versions()[0]
    registry = CollectorRegistry()
    clock = lambda: Millis(time.time_ns() // 1_000_000)  # noqa: E731

    async def main() -> None:
        gateway = Gateway(
            PeerId("bench"),
            ServingConfig(),
            Batcher(engine),
            engine.vocabulary,
            Nobody(),
            registry,
            clock,
        )
        await gateway.adopt(version, adapters[version])
        codec = TextCodec(engine.tokenizer, engine.vocabulary)
        app = HttpApi(gateway, codec, "bench", registry, dict, clock, no_blob).app()
        await serve_http(app, "127.0.0.1", port)

    trio.run(main)


async def no_blob(digest: Digest) -> None:
    """None are served."""


def start_theirs(backbone: str, port: int) -> "subprocess.Popen[bytes]":
    """`transformers serve`, installed on first use."""
    home = get_cache_dir() / "serving-reference"
    if not (home / "bin" / "transformers").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip: list[str | Path] = [home / "bin" / "pip", "install", "--quiet"]
        subprocess.run([*pip, f"torch=={torch.__version__.partition('+')[0]}"], check=True)
        import transformers

        subprocess.run([*pip, f"transformers[serving]=={transformers.__version__}"], check=True)
    return subprocess.Popen(
        [home / "bin" / "transformers", "serve", backbone, "--port", str(port), "--continuous-batching"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def start_ours(preset: str, port: int) -> "subprocess.Popen[bytes]":
    """This script, as a server."""
    return subprocess.Popen([sys.executable, __file__, "--serve", str(port), "--preset", preset], cwd=ROOT / "bench")


def measure_server(
    process: "subprocess.Popen[bytes]", url: str, model: str, num_tokens: int, streams: Sequence[int]
) -> dict[int, Served]:
    """Wait until it answers, then ask for so many streams at once."""
    watched = psutil.Process(process.pid)

    def cpu_s() -> float:
        every = [watched, *watched.children(recursive=True)]
        return sum(sum(one.cpu_times()[:2]) for one in every)

    async def ask(client: httpx.AsyncClient, question: str, firsts: list[float], counts: list[int]) -> None:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": num_tokens,
            "temperature": 0,
            "stream": True,
        }
        start, count = time.monotonic(), 0
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    if choices and choices[0]["delta"].get("content"):
                        count += 1
                        if count == 1:
                            firsts.append(time.monotonic() - start)
        counts.append(count)

    async def main() -> dict[int, Served]:
        found = {}
        async with httpx.AsyncClient(timeout=600) as client:
            await _wait_for(client, f"{url}/health", process)
            await ask(client, QUESTIONS[0], [], [])
            for number in streams:
                firsts: list[float] = []
                counts: list[int] = []
                before = cpu_s()
                async with trio.open_nursery() as nursery:
                    for index in range(number):
                        nursery.start_soon(ask, client, QUESTIONS[index % 4], firsts, counts)
                found[number] = Served(sum(counts) / (cpu_s() - before), statistics.fmean(firsts))
        return found

    try:
        return trio.run(main)
    finally:
        for one in watched.children(recursive=True):
            one.terminate()
        process.terminate()
        process.wait()


async def _wait_for(client: httpx.AsyncClient, url: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the server of {url} ended with {process.returncode}")
        try:
            await client.get(url)
            return
        except httpx.TransportError:
            await trio.sleep(0.5)
    raise SystemExit(f"nobody answers at {url}")


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-server", action="store_true", help="leave servers out")
    parser.add_argument("--serve", type=int, help="be the server of ours (used by this script itself)")
    parser.add_argument("--preset", default="demo", help="the server's backbone")
    arguments = parser.parse_args()
    options = read_options(arguments)
    torch.set_num_threads(1)
    if arguments.serve:
        serve_ours(arguments.preset, arguments.serve)
        return
    preset = "tiny" if options.quick else "demo"
    size = Size(8, 1) if options.quick else Size(64, 5)

    turns = measure_engine(preset, arguments.device, size)
    speeds = {name: statistics.median(speed for speed, _ in found) for name, found in turns.items()}
    firsts = {name: statistics.median(first for _, first in found) for name, found in turns.items()}
    base = speeds["generate, one by one"]
    unit = "CPU s" if arguments.device == "cpu" else "s"
    rows = [[name, speeds[name], speeds[name] / base, firsts[name]] for name in turns]
    print_table("In one process", ("", f"tokens a {unit}", "times generate", f"first token [{unit}]"), rows)

    served: dict[str, dict[int, Served]] = {}
    if arguments.device == "cpu" and not arguments.no_server:
        url = "http://127.0.0.1:{}"
        streams = (1, 4) if options.quick else STREAMS
        served["ours over HTTP"] = measure_server(
            start_ours(preset, 18471), url.format(18471), "bench+base", size.num_tokens, streams
        )
        if not options.quick:  # it installs an environment of its own
            backbone = resolve(get_preset(preset).backbone)
            served["transformers serve"] = measure_server(
                start_theirs(backbone, 18472), url.format(18472), backbone, size.num_tokens, streams
            )
        told = [
            [f"{name}, {number} streams", one.tokens_per_cpu_s, one.tokens_per_cpu_s / base, one.first_token_s]
            for name, found in served.items()
            for number, one in found.items()
        ]
        columns = ("", "pieces a CPU s", "times generate", "first token [s, wall]")
        print_table("Over HTTP (a piece is a token, or a few that are one character)", columns, told)

    targets = [
        Target("one_stream_of_generate", speeds["engine, 1 streams"] / base, 0.95, "more"),
        Target("sixteen_streams_of_one_by_one", speeds["engine, 16 streams"] / base, 4, "more"),
        Target(
            "four_adapters_of_one", speeds["engine, 16 streams, 4 adapters"] / speeds["engine, 16 streams"], 0.7, "more"
        ),
    ]
    if "transformers serve" in served:
        pair = served["ours over HTTP"][16], served["transformers serve"][16]
        targets.append(
            Target(
                "sixteen_streams_of_transformers_serve", pair[0].tokens_per_cpu_s / pair[1].tokens_per_cpu_s, 1, "more"
            )
        )
    finish(options, {"engine": turns, "served": served}, targets)


if __name__ == "__main__":
    main()
