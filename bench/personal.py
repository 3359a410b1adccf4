"""What a private adapter on top of the shared base gives its owner, and what it costs everybody else's topics.

    python bench/personal.py [--json FILE] [--check] [--quick]

Peers with a topic each (codec, error feedback, clip, equal weights). After every merge each peer refines its private
adapter (`p2pfm.lora.personal`) on its own data, the base frozen; a part of its data, held out of everything, decides
whether the refinement is taken. References of the same run: the shared base alone, and each peer alone (the same
number of local and private steps from the initial adapter, without a network).

Figures are means over peers [nats/token]. "held out" is the part that decides, "own test" prompts of the own topic that
nothing has seen, "declared test" all topics with equal weight. Spread: standard deviation over seeds.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import harness
import msgspec
import numpy as np
from tasks import COMPRESSION, Task, make_task, through_codec

from p2pfm.config import AdapterConfig, PersonalConfig, TrainingConfig
from p2pfm.learner import Training
from p2pfm.lora.batches import Encoded
from p2pfm.lora.compress import feed_back
from p2pfm.lora.delta import get_shapes, subtract, zeros
from p2pfm.lora.merge import merge
from p2pfm.lora.personal import mix, refine
from p2pfm.types import WEIGHT_ONE, Round, Tensors, Weight

ADAPTER = AdapterConfig(
    rank=8, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
TRAINING = TrainingConfig(steps=10, batch=4, tokens_max=48, learning_rate=1e-2)
HELD_OUT_EVERY = 8
"""One prompt in so many decides."""
SERVED = PersonalConfig().weight
"""The weight that refinements are judged at and served with; the others show what it trades."""
WEIGHTS = sorted({0.25, 0.5, 1.0, SERVED})


class Size(NamedTuple):
    """How much is run."""

    seeds: tuple[int, ...]
    num_peers: int = 6
    num_rounds: int = 6
    private_steps: int = 10


DEFAULT = Size(seeds=(1, 2, 3))
QUICK = Size(seeds=(1,), num_peers=2, num_rounds=1, private_steps=2)


class OwnLearner:
    """`p2pfm.lora.personal.Trainer` on one peer's data."""

    def __init__(self, task: Task, samples: Sequence[Encoded], held_out: Sequence[Encoded], steps: int) -> None:
        self._task, self._samples, self._held_out = task, samples, held_out
        self._training = msgspec.structs.replace(task.training, steps=steps)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The adapter's."""
        return get_shapes(self._task.initial)

    def train(self, base: Tensors, round: Round) -> Training:
        """Steps on the own samples."""
        draw = f"private {self._task.seed} {round}"
        trained = self._task.model.train([base], [self._samples], self._training, [draw])[0]
        return Training(subtract(trained, base), num_tokens=0, loss_nats=None)

    def evaluate(self, at: Tensors) -> float:
        """Loss on the held-out part."""
        return float(self._task.model.evaluate([at], {"own": self._held_out})[0, 0])


def main() -> None:
    """Every seed's adapters, their table, the targets."""
    options = harness.parse_options(__doc__)
    size = QUICK if options.quick else DEFAULT
    seconds: dict[str, float] = {}
    runs = []
    for seed in size.seeds:
        with harness.cpu_seconds(seconds, "all"):
            runs.append(run_seed(size, seed))
    figures = ("held out", "own test", "declared test")
    rows = [
        [name, *(value for key in figures for value in (mean(runs, name, key), spread(runs, name, key)))]
        for name in runs[0]
    ]
    columns = ("adapter", *(column for key in figures for column in (key, "spread")))
    harness.print_table(f"Private adapters after {size.num_rounds} rounds; {len(runs)} seeds", columns, rows)
    print(f"\nCPU seconds: {seconds['all']:.0f}")
    own = {name: np.array([run[name]["own test"] for run in runs]) for name in runs[0]}
    served = own[f"base + {SERVED:g} private"]
    over_base, over_alone = (float(np.max(served / own[name])) for name in ("shared base", "each peer alone"))
    targets = [
        harness.Target("own test loss, served over base, worst seed", over_base, 1.0, "less"),
        harness.Target("own test loss, served over alone, worst seed", over_alone, 1.0, "less"),
    ]
    harness.finish(options, {"size": size._asdict(), "seconds": seconds, "runs": runs}, targets)


def mean(runs: Sequence[Mapping[str, Mapping[str, float]]], name: str, key: str) -> float:
    """Over seeds."""
    return float(np.mean([run[name][key] for run in runs]))


def spread(runs: Sequence[Mapping[str, Mapping[str, float]]], name: str, key: str) -> float:
    """Standard deviation over seeds."""
    return float(np.std([run[name][key] for run in runs]))


def run_seed(size: Size, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every way to serve, by name."""
    task = make_task(size.num_peers, seed, num_topics=size.num_peers, training=TRAINING, adapter=ADAPTER)
    shards, held_out = zip(*(split(shard) for shard in task.peers), strict=True)
    task = dataclasses.replace(task, peers=shards)
    learners = [OwnLearner(task, *pair, size.private_steps) for pair in zip(shards, held_out, strict=True)]
    private: list[Tensors] = [zeros(get_shapes(task.initial))] * size.num_peers
    base = task.initial
    residuals: dict[int, Tensors] = {}
    alone: Sequence[Tensors] = [task.initial] * size.num_peers
    both = msgspec.structs.replace(TRAINING, steps=TRAINING.steps + size.private_steps)
    for number in range(size.num_rounds):
        updates = []
        for peer, delta in enumerate(task.train(base, number)):
            update, residuals[peer] = through_codec(feed_back(residuals.get(peer), delta, COMPRESSION))
            updates.append((update, Weight(WEIGHT_ONE // size.num_peers)))
        base = merge(base, updates)
        private = [
            refine(learner, base, own, SERVED, Round(number)).private
            for learner, own in zip(learners, private, strict=True)
        ]
        draws = [f"alone {seed} {number} {peer}" for peer in range(size.num_peers)]
        alone = task.model.train(alone, shards, both, draws)
    ways: dict[str, Sequence[Tensors]] = {"shared base": [base] * size.num_peers}
    ways |= {f"base + {weight:g} private": [mix(base, own, weight) for own in private] for weight in WEIGHTS}
    ways["each peer alone"] = alone
    return {name: measure(task, held_out, adapters) for name, adapters in ways.items()}


def split(shard: Sequence[Encoded]) -> tuple[tuple[Encoded, ...], tuple[Encoded, ...]]:
    """(for training, held out) by prompt."""
    prompts = list(dict.fromkeys(sample.tokens[: sample.num_prompt] for sample in shard))
    chosen = set(prompts[::HELD_OUT_EVERY])
    inside = tuple(sample for sample in shard if sample.tokens[: sample.num_prompt] not in chosen)
    return inside, tuple(sample for sample in shard if sample.tokens[: sample.num_prompt] in chosen)


def measure(task: Task, held_out: Sequence[Sequence[Encoded]], adapters: Sequence[Tensors]) -> dict[str, float]:
    """Means over peers, each with its own adapter."""
    own = [float(task.model.evaluate([a], {"own": part})[0, 0]) for a, part in zip(adapters, held_out, strict=True)]
    by_topic = task.model.evaluate(adapters, task.test)  # (num_peers, num_topics): peer i has topic i
    return {
        "held out": float(np.mean(own)),
        "own test": float(np.mean(np.diagonal(by_topic))),
        "declared test": float(by_topic.mean()),
    }


if __name__ == "__main__":
    main()
