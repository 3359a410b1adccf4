"""The real task that these scripts share: peers with private text, one small transformer, a declared probe.

The backbone is the tests' fixture (a Llama of 1M parameters, pretrained on presidents' speeches), the text is
ChatterBot's question-answer pairs, and a topic is a stratum. All peers train at once (`p2pfm.lora.stacked`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from p2pfm.config import AdapterConfig, CompressionConfig, TrainingConfig
from p2pfm.lora.batches import Encoded, collate, encode_all, weigh
from p2pfm.lora.compress import Update, compress, decode_payload, feed_back
from p2pfm.lora.corpus import read_topics
from p2pfm.lora.delta import get_shapes, subtract
from p2pfm.lora.kinds import compute_initial
from p2pfm.lora.layers import load_backbone, predict
from p2pfm.lora.merge import merge
from p2pfm.lora.samples import Sample
from p2pfm.lora.stacked import StackedModel
from p2pfm.types import WEIGHT_ONE, Array, Tensors, Weight

BACKBONE = Path(__file__).parent.parent / "tests" / "fixtures" / "tiny-llama"
ADAPTER = AdapterConfig(rank=8, alpha=16, targets=("q_proj", "v_proj"))
TRAINING = TrainingConfig(steps=10, batch=4, tokens_max=48, learning_rate=5e-3)
COMPRESSION = CompressionConfig(chunk=4096, keep=256)
NUM_TEST = 6
"""Test prompts a topic."""
SAMPLES_MIN = 8
"""A peer with fewer samples gets some of the largest peer's."""

Corrupt = Callable[[Sample, np.random.Generator], Sample]


@dataclass(frozen=True)
class Task:
    """A federation's data on one machine. `probe` and `test` map topic to samples; topics are held out alike."""

    model: StackedModel
    initial: dict[str, Array]
    peers: tuple[tuple[Encoded, ...], ...]
    probe: Mapping[str, tuple[Encoded, ...]]
    test: Mapping[str, tuple[Encoded, ...]]
    seed: int
    training: TrainingConfig

    def train(self, base: Tensors, round: int, peers: Sequence[int] | None = None) -> list[dict[str, Array]]:
        """The deltas of these peers (default all) after a round's local steps from `base`, in their order."""
        chosen = range(len(self.peers)) if peers is None else peers
        draws = [f"{self.seed} {round} {peer}" for peer in chosen]
        trained = self.model.train([base] * len(chosen), [self.peers[p] for p in chosen], self.training, draws)
        return [subtract(adapter, base) for adapter in trained]

    def losses(self, adapters: Sequence[Tensors], strata: Mapping[str, Sequence[Encoded]] | None = None) -> Array:
        """(num_adapters,) loss on the probe (or other strata), every stratum of equal weight [nats/token]."""
        means: Array = self.model.evaluate(adapters, self.probe if strata is None else strata).mean(axis=1)
        return means

    def gradient(self, at: Tensors, strata: Mapping[str, Sequence[Encoded]] | None = None) -> dict[str, Array]:
        """The gradient of the same loss."""
        return self.model.gradient(at, self.probe if strata is None else strata)[1]


def make_task(
    num_peers: int,
    seed: int,
    *,
    num_topics: int = 10,
    alpha: float | None = None,
    num_probe: int = 6,
    training: TrainingConfig = TRAINING,
    adapter: AdapterConfig = ADAPTER,
    corrupt: Mapping[int, Corrupt] | None = None,
    dtype: torch.dtype | None = None,
) -> Task:
    """A federation drawn from `seed`.

    Args:
        alpha: each topic is dealt to the peers by Dirichlet(alpha) (Hsu et al. 2019); None: whole topics, peer i gets
            topic i modulo num_topics (and shares it with whoever has the same).
        num_probe: probe prompts a topic (with all their answers); NUM_TEST more are the test split.
        corrupt: what becomes of a peer's samples.
        dtype: of the backbone's products; None: as stored (bf16: fast, and a loss is good to about 1e-3).
    """
    torch.set_num_threads(1)
    backbone, tokenizer = load_backbone(BACKBONE, dtype)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rng = np.random.default_rng([seed, 1])
    topics = read_topics(is_every_answer=True)
    prompts = {topic: list(dict.fromkeys(sample.prompt for sample in part)) for topic, part in topics.items()}
    chosen = sorted(topics, key=lambda topic: (-len(prompts[topic]), topic))[:num_topics]
    train: list[list[Sample]] = []
    probe: dict[str, list[Sample]] = {}
    test: dict[str, list[Sample]] = {}
    for topic in chosen:
        # A prompt is held out with all its answers.
        order = [prompts[topic][i] for i in rng.permutation(len(prompts[topic]))]
        place = {prompt: rank for rank, prompt in enumerate(order)}
        ranked = sorted(topics[topic], key=lambda sample: place[sample.prompt])
        probe[topic] = [sample for sample in ranked if place[sample.prompt] < num_probe]
        test[topic] = [sample for sample in ranked if num_probe <= place[sample.prompt] < num_probe + NUM_TEST]
        rest = [sample for sample in ranked if place[sample.prompt] >= num_probe + NUM_TEST]
        train.append([rest[i] for i in rng.permutation(len(rest))])
    shards = _deal_topics(train, num_peers) if alpha is None else _deal_dirichlet(train, num_peers, alpha, rng)
    for peer, change in (corrupt or {}).items():
        shards[peer] = [change(sample, rng) for sample in shards[peer]]
    limit = training.tokens_max
    model = StackedModel(backbone, pad, adapter)
    shapes = {f"{name}.lora_A": (adapter.rank, size_in) for name, (_, size_in) in model.sizes().items()}
    shapes |= {f"{name}.lora_B": (size_out, adapter.rank) for name, (size_out, _) in model.sizes().items()}
    return Task(
        model=model,
        initial=compute_initial(shapes, seed),
        peers=tuple(encode_all(tokenizer, shard, limit) for shard in shards),
        probe={topic: encode_all(tokenizer, part, limit) for topic, part in probe.items()},
        test={topic: encode_all(tokenizer, part, limit) for topic, part in test.items()},
        seed=seed,
        training=training,
    )


def through_codec(delta: Tensors, config: CompressionConfig = COMPRESSION) -> tuple[Update, dict[str, Array]]:
    """(what receivers decode, what is left out) of a delta."""
    payload, decoded = compress(delta, config)
    update = decode_payload(payload, get_shapes(delta), config, len(payload))
    return update, subtract(delta, decoded)


def train_second_round(task: Task) -> tuple[dict[str, Array], list[Update]]:
    """(the base after a first round, merged with equal weights; what receivers decode in the second)."""
    residuals: list[Tensors | None] = [None] * len(task.peers)
    base: dict[str, Array] = dict(task.initial)
    updates: list[Update] = []
    for round in range(2):
        share = Weight(WEIGHT_ONE // len(task.peers))
        base = merge(base, [(update, share) for update in updates])
        updates = []
        for peer, delta in enumerate(task.train(base, round)):
            update, residuals[peer] = through_codec(feed_back(residuals[peer], delta, COMPRESSION))
            updates.append(update)
    return base, updates


class MergedModel:
    """Losses of adapters, each merged into a plain float32 backbone: 30% faster than side by side, the same to 1e-6."""

    def __init__(self, strata: Mapping[str, Sequence[Encoded]], adapter: AdapterConfig = ADAPTER) -> None:
        """`strata`: what the loss is taken on, each of equal weight."""
        self._model, tokenizer = load_backbone(BACKBONE, torch.float32)
        self._model.set_attn_implementation("eager")
        self._scale = adapter.alpha / adapter.rank
        self._frozen = {
            name: module.weight.detach().clone()
            for name, module in self._model.named_modules()
            if name.rsplit(".", 1)[-1] in adapter.targets
        }
        self._batches = [
            ([torch.from_numpy(part) for part in collate(batch, tokenizer.pad_token_id)], torch.tensor(weights))
            for batch, weights in weigh(list(strata.values()))
        ]

    def losses(self, adapters: Sequence[Tensors]) -> list[float]:
        """Each adapter's loss [nats/token]."""
        with torch.inference_mode():
            return [self._loss(adapter) for adapter in adapters]

    def _loss(self, adapter: Tensors) -> float:
        for name, frozen in self._frozen.items():
            product = torch.from_numpy(adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"])  # (out, in)
            self._model.get_submodule(name).weight.copy_(frozen + self._scale * product)
        total = 0.0
        for (tokens, rows, columns, wanted), weights in self._batches:
            logits = predict(self._model, tokens, rows, columns)
            each = functional.cross_entropy(logits, wanted, reduction="none")  # (num_completion,)
            total += float((each * weights[rows]).sum())
        return total


def _deal_topics(train: Sequence[Sequence[Sample]], num_peers: int) -> list[list[Sample]]:
    shards: list[list[Sample]] = []
    for peer in range(num_peers):
        topic = peer % len(train)
        sharers = len(range(topic, num_peers, len(train)))
        shards.append(list(train[topic][peer // len(train) :: sharers]))
    return shards


def _deal_dirichlet(
    train: Sequence[Sequence[Sample]], num_peers: int, alpha: float, rng: np.random.Generator
) -> list[list[Sample]]:
    shards: list[list[Sample]] = [[] for _ in range(num_peers)]
    for part in train:
        cuts = (np.cumsum(rng.dirichlet([alpha] * num_peers))[:-1] * len(part)).astype(int)
        for peer, indices in enumerate(np.split(np.arange(len(part)), cuts)):
            shards[peer] += [part[i] for i in indices]
    for shard in shards:
        while len(shard) < SAMPLES_MIN:
            shard.append(max(shards, key=len).pop())
    return shards
