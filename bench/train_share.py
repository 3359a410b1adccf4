"""What training in the background costs serving, beside what the operator allows (serving.train_share).

    python bench/train_share.py [--json FILE] [--check] [--quick]

The worst case: one core for both. Four streams are generated again and again by the batching engine of a node; in the
same minutes, in turns, nobody trains, or a learner trains without a pause with each share. A share's cost is the part
of the tokens a second that serving alone reaches and serving beside training does not; it must not be larger than the
share. The training steps that were done are told, too: resting is easy.
"""

import os
import threading
import time
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch
import trio
from harness import Target, finish, parse_options, print_table

from nodes.localnet import get_preset
from nodes.models import resolve
from p2pfm.config import ChainConfig, NetworkConfig
from p2pfm.lora.corpus import build_shards
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.samples import read_probe, read_samples
from p2pfm.lora.torch_learner import TorchLearner
from p2pfm.messages import GenerateRequest
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.text import TextCodec
from p2pfm.runtime.train_share import TrainShare
from p2pfm.types import Digest, Millis, Round

SHARES = (0.25, 0.5, 1.0)
VERSION = Digest(b"v" * 32)
NUM_STREAMS = 4


class Training(threading.Thread):
    """Rounds of training, one after another, until it is told to stop."""

    def __init__(self, learner: TorchLearner, hook: torch.utils.hooks.RemovableHandle) -> None:
        super().__init__()
        self.learner, self.hook = learner, hook
        self.num_rounds, self.is_stopping = 0, False

    def run(self) -> None:
        """Train."""
        base = self.learner.initial()
        for number in count():
            if self.is_stopping:
                self.hook.remove()
                return
            self.learner.train(base, Round(number))
            self.num_rounds += 1


async def serve(batcher: Batcher, prompt: tuple[int, ...], serve_s: float) -> float:
    """Tokens a second."""
    num_tokens, start = 0, time.monotonic()

    async def one() -> None:
        nonlocal num_tokens
        for seed in count():
            request = GenerateRequest(VERSION, prompt, (), 32, 1000, 1000, seed, 0)
            async for chunk in batcher.generate(request, is_local=True):
                num_tokens += len(chunk.tokens)

    with trio.move_on_after(serve_s):
        async with trio.open_nursery() as nursery:
            for _ in range(NUM_STREAMS):
                nursery.start_soon(one)
    return num_tokens / (time.monotonic() - start)


def main() -> None:
    options = parse_options(__doc__ or "")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    preset = get_preset("tiny" if options.quick else "demo")
    serve_s, num_turns = (1.0, 1) if options.quick else (20.0, 3)
    backbone = resolve(preset.backbone)
    with TemporaryDirectory() as folder:
        shards = build_shards(2, Path(folder), seed=1, corrupted=set())
        probe, samples = read_probe(shards.probe), read_samples(shards.peers[0])
    network = NetworkConfig(
        name="bench",
        genesis_ms=Millis(0),
        backbone=preset.backbone,
        probe=probe.digest.hex(),
        chain=ChainConfig(1, "0x" + "1" * 40, "0x" + "2" * 40),
        training=msgspec.structs.replace(preset.training, steps=1),
    )
    model, tokenizer = load_backbone(backbone)
    learner = TorchLearner(model, tokenizer, network, samples, probe)
    engine = Engine(backbone, network.adapter, 1)
    engine.add_version(VERSION, learner.initial())
    batcher = Batcher(engine)
    prompt = TextCodec(engine.tokenizer, engine.vocabulary).encode_chat([{"role": "user", "content": "Who are you?"}])

    speeds: dict[float, list[float]] = {share: [] for share in (0.0, *SHARES)}
    steps: dict[float, int] = dict.fromkeys(SHARES, 0)
    for _ in range(num_turns):
        speeds[0.0].append(trio.run(serve, batcher, prompt, serve_s))
        for share in SHARES:
            hook = model.register_forward_pre_hook(TrainShare(share, batcher.is_busy).pause)
            training = Training(learner, hook)
            training.start()
            speeds[share].append(trio.run(serve, batcher, prompt, serve_s))
            training.is_stopping = True
            training.join()
            steps[share] += training.num_rounds

    means = {share: sum(each) / len(each) for share, each in speeds.items()}
    costs = {share: 1 - means[share] / means[0.0] for share in SHARES}
    rows: list[list[object]] = [["nobody trains", means[0.0], 0.0, 0]]
    rows += [[f"train_share {share:g}", means[share], costs[share], steps[share]] for share in SHARES]
    print_table("Four streams on one core", ("", "tokens/s", "cost to serving", "training steps"), rows)
    finish(
        options,
        {"tokens_per_s": means, "cost": costs, "steps": steps},
        [Target(f"cost_at_share_{share:g}", costs[share], share, "less") for share in SHARES],
    )


if __name__ == "__main__":
    main()
