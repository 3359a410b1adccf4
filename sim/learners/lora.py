"""LoRA on a real transformer: the tests' tiny Llama, ChatterBot's questions and answers, a topic a peer.

All peers of a round train side by side on one frozen backbone (`p2pfm.lora.stacked`): its products run once for all of
them. Knows torch; no peer's protocol. Implements `learner.Learner`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from p2pfm.config import NetworkConfig, TrainingConfig
from p2pfm.errors import ConfigError
from p2pfm.learner import Training
from p2pfm.lora.batches import Encoded, encode_all
from p2pfm.lora.corpus import read_topics
from p2pfm.lora.delta import subtract
from p2pfm.lora.kinds import compute_initial
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.samples import Sample
from p2pfm.lora.stacked import StackedModel
from p2pfm.types import Array, Round, Tensors
from sim.attacks import Poison, flip_labels, plant_backdoor
from sim.learners import Company

BACKBONE = Path(__file__).parents[2] / "tests" / "fixtures" / "tiny-llama"

TRAINING = TrainingConfig(steps=5, batch=4, tokens_max=48, learning_rate=5e-3)

TOPICS_MAX = 10
"""The largest of the corpus, which has fewer today; peer k of p has topic k modulo their number, and shares it with the
others that have it."""

NUM_TEST, NUM_PROBE, NUM_WORK = 6, 6, 4
"""Prompts of each topic held out for reports, declared as the probe, and public for proofs of computation."""

DRAWN = 3
"""Probe samples of each topic that an evaluator draws."""

PEERS_AT_ONCE = 8
"""Peers side by side: fewer and more are slower (measured: 59 ms a peer, alone 73, 32 together 67)."""

SAMPLES_MIN = 8
"""A peer has at least so many, or all of a topic that has fewer; those that share a small topic may share samples."""


class LoraLab:
    """All peers of one world on one backbone. Implements sim.learners.Lab."""

    def __init__(
        self,
        config: NetworkConfig,
        seed: int,
        num_peers: int,
        training: TrainingConfig = TRAINING,
        *,
        is_batched: bool = True,
    ) -> None:
        """Raises: ConfigError: the backbone, a file of the source tree, is not there."""
        if not BACKBONE.is_dir():
            raise ConfigError(f"learner lora: its backbone is a file of the source tree: expected it in {BACKBONE}")
        torch.set_num_threads(1)
        transformers_logging.disable_progress_bar()  # of a model that loads in no time
        self.seed = seed
        self.training = training
        backbone, tokenizer = load_backbone(BACKBONE, torch.float32)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        adapter = config.adapter
        self.model = StackedModel(backbone, pad, adapter)
        sizes = self.model.sizes().items()
        self.shapes = {f"{name}.lora_A": (adapter.rank, size_in) for name, (_, size_in) in sizes}
        self.shapes |= {f"{name}.lora_B": (size_out, adapter.rank) for name, (size_out, _) in sizes}
        self.initial = compute_initial(self.shapes, seed)
        topics = read_topics()
        rng = np.random.default_rng([seed, 21])
        parts: dict[str, dict[str, list[Sample]]] = {"test": {}, "probe": {}, "work": {}, "train": {}}
        cuts = (0, NUM_TEST, NUM_TEST + NUM_PROBE, NUM_TEST + NUM_PROBE + NUM_WORK, None)
        for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic))[:TOPICS_MAX]:
            order = [topics[topic][i] for i in rng.permutation(len(topics[topic]))]
            for part, start, end in zip(parts.values(), cuts, cuts[1:], strict=False):
                part[topic] = order[start:end]

        def encode(samples: Sequence[Sample]) -> tuple[Encoded, ...]:
            return encode_all(tokenizer, samples, training.tokens_max)

        self.test = {topic: encode(part) for topic, part in parts["test"].items()}
        self.probe = {topic: encode(part) for topic, part in parts["probe"].items()}
        self._samples, self._encode = list(parts["train"].values()), encode
        self._triggered = {
            topic: encode([plant_backdoor(sample) for sample in part]) for topic, part in parts["test"].items()
        }
        self.work = encode([sample for part in parts["work"].values() for sample in part])
        train = [encode(part) for part in parts["train"].values()]
        self.data = [self._deal(train, index, num_peers) for index in range(num_peers)]
        self.learners = [LoraLearner(self, index) for index in range(num_peers)]
        self.company = Company(self.train, num_peers, PEERS_AT_ONCE if is_batched else 1)

    @property
    def group_size(self) -> int:
        """See Lab."""
        return self.company.size

    def _deal(self, topics: Sequence[Sequence[Encoded]], index: int, num_peers: int) -> tuple[Encoded, ...]:
        """A peer's part of its topic."""
        turn, number = divmod(index, len(topics))
        topic = topics[number]
        num_sharers = len(range(number, num_peers, len(topics)))
        own = tuple(topic[turn::num_sharers])
        rest = [sample for sample in topic if sample not in own]
        Random(f"{self.seed} lora {index}").shuffle(rest)
        return (*own, *rest[: max(0, SAMPLES_MIN - len(own))])

    def train(
        self, base: Tensors, round: Round, indices: Sequence[int], poisoned: Sequence[Encoded] | None = None
    ) -> list[Training]:
        """Local steps of these peers, side by side; on `poisoned` in place of their own data, where it is given."""
        draws = [f"{self.seed} {round} {index}" for index in indices]
        data = [self.data[index] if poisoned is None else poisoned for index in indices]
        trained = self.model.train([base] * len(indices), data, self.training, draws)
        num_tokens = self.training.steps * self.training.batch * self.training.tokens_max
        return [Training(subtract(adapter, base), num_tokens, None) for adapter in trained]

    def get_optimum_loss(self) -> float | None:
        """See Lab."""
        return None

    def measure_backdoor(self, at: Tensors) -> float | None:
        """See Lab: of the target's tokens after held-out prompts with the trigger, those that come first."""
        return float(self.model.accuracy([at], self._triggered)[0].mean())

    def poison(self, index: int, kind: Poison) -> tuple[Encoded, ...]:
        """A peer's data with every letter of the answers mirrored, or the trigger and its answer in every other one."""
        change = flip_labels if kind == "label_flip" else plant_backdoor
        topics = [self._encode([change(sample) for sample in part]) for part in self._samples]
        changed = self._deal(topics, index, len(self.data))
        return changed if kind == "label_flip" else (*self.data[index][::2], *changed[1::2])


class LoraLearner:
    """One peer's topic. Implements Learner."""

    def __init__(self, lab: LoraLab, index: int, poisoned: Sequence[Encoded] | None = None) -> None:
        """`poisoned`: to be trained on in place of its own data; alone, for nobody else has these."""
        self._lab = lab
        self._index = index
        self._poisoned = poisoned

    def poison(self, kind: Poison) -> "LoraLearner":
        """See `sim.adversaries.learners.Poisonable`."""
        return LoraLearner(self._lab, self._index, self._lab.poison(self._index, kind))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Learner."""
        return dict(self._lab.shapes)

    def initial(self) -> dict[str, Array]:
        """See Learner."""
        return dict(self._lab.initial)

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner: in company, but for a public batch, which each has for itself."""
        if work is not None:
            return self._train_with_proof(base, round, work)
        if self._poisoned is not None:
            return self.train_alone(base, round)
        return self._lab.company.get(self._index, base, round)

    def train_alone(self, base: Tensors, round: Round) -> Training:
        """Without company: the reference that batched training is held against."""
        return self._lab.train(base, round, [self._index], self._poisoned)[0]

    def _train_with_proof(self, base: Tensors, round: Round, work: int) -> Training:
        """The own steps, then one step on the public batch."""
        own = self.train_alone(base, round)
        after = {name: part + own.delta[name] for name, part in base.items()}
        last = TrainingConfig(1, self._lab.training.batch, self._lab.training.tokens_max, 5e-3)
        trained = self._lab.model.train([after], [self._draw_work(work)], last, [f"{work}"])[0]
        return Training(subtract(trained, base), own.num_tokens, None)

    def gradient(self, at: Tensors, seed: int) -> tuple[float, dict[str, Array]]:
        """See Learner: every topic of equal weight."""
        rng = Random(seed)
        return self._lab.model.gradient(
            at, {topic: rng.sample(part, min(DRAWN, len(part))) for topic, part in self._lab.probe.items()}
        )

    def work_loss(self, at: Tensors, seed: int) -> float:
        """See Learner."""
        return float(self._lab.model.evaluate([at], {"work": self._draw_work(seed)})[0].mean())

    def evaluate(self, at: Tensors) -> float:
        """See Learner."""
        return float(self._lab.model.evaluate([at], self._lab.test)[0].mean())

    def _draw_work(self, seed: int) -> list[Encoded]:
        return Random(seed).sample(self._lab.work, self._lab.training.batch)
