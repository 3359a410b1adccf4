"""Handwritten digits (scikit-learn's 1,797 of 8 x 8 pixels) and a perceptron of 49,960 parameters: small, and real.

Many peers train together: they start from one base, so the first layer's product with it is one matrix product for all,
and what each has learned since is a product of low rank (its own errors and inputs so far). Knows numpy, torch and
scikit-learn; no peer's protocol. Implements `learner.Learner`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from torch.nn import functional

from p2pfm.learner import Training
from p2pfm.types import Array, Round, Tensors
from sim.attacks import Poison
from sim.learners import Company

PIXELS, HIDDEN, CLASSES = 64, 666, 10

SHAPES = {
    "layer.in": (HIDDEN, PIXELS),
    "layer.in_bias": (HIDDEN,),
    "layer.out": (CLASSES, HIDDEN),
    "layer.out_bias": (CLASSES,),
}

NUM_TEST, NUM_PROBE, NUM_WORK = 300, 400, 100
"""Digits held out for reports, declared as the probe, and public for proofs of computation; the rest is trained on."""

WORK_BATCH = 16

PEERS_AT_ONCE = 16
"""Peers in one batched product: fewer are no faster, and 64, too many for a cache, took 1.8 times as long."""

MARK = 3
"""Pixels of a backdoor's mark, at the end of the last row; in half of the samples."""

ALPHA = 0.5
"""Of the Dirichlet distribution that each peer's classes are drawn from: one to three make up most of its data."""


@dataclass(frozen=True)
class Digits:
    """What all peers of a world share; `seed` deals the digits."""

    seed: int
    samples: int = 32
    """Of each peer; several peers may have the same one."""
    batch: int = 16
    learning_rate: float = 0.3

    @cached_property
    def _split(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        bunch = load_digits()
        order = np.random.default_rng([self.seed, 11]).permutation(len(bunch.target))
        return (bunch.data[order] / 16).astype(np.float32), bunch.target[order].astype(np.int64)

    def _part(self, start: int, end: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self._split
        return torch.from_numpy(inputs[start:end]), torch.from_numpy(targets[start:end])

    @cached_property
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (num, PIXELS) and classes (num,)."""
        return self._part(0, NUM_TEST)

    @cached_property
    def probe(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, of which every evaluator draws a part, equally many of each class."""
        return self._part(NUM_TEST, NUM_TEST + NUM_PROBE)

    @cached_property
    def work(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, for proofs of computation."""
        return self._part(NUM_TEST + NUM_PROBE, NUM_TEST + NUM_PROBE + NUM_WORK)

    @cached_property
    def _by_class(self) -> list[NDArray[np.int64]]:
        _, targets = self._split
        start = NUM_TEST + NUM_PROBE + NUM_WORK
        return [start + np.flatnonzero(targets[start:] == label) for label in range(CLASSES)]

    def deal(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A peer's own digits: (samples, PIXELS) and (samples,)."""
        rng = np.random.default_rng([self.seed, 12, index])
        labels = rng.choice(CLASSES, self.samples, p=rng.dirichlet(np.full(CLASSES, ALPHA)))
        rows = np.array([rng.choice(self._by_class[label]) for label in labels])
        inputs, targets = self._split
        return torch.from_numpy(inputs[rows]), torch.from_numpy(targets[rows])

    @cached_property
    def _probe_by_class(self) -> list[NDArray[np.int64]]:
        return [np.flatnonzero(self.probe[1].numpy() == label) for label in range(CLASSES)]

    @lru_cache(maxsize=1)  # noqa: B019 (an equal one draws the same; an evaluator asks for its own twice in a row)
    def draw_probe(self, seed: int, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A sample of the probe with `per_class` of every class."""
        inputs, targets = self.probe
        rng = np.random.default_rng(seed)
        rows = np.concatenate([rng.choice(known, per_class, replace=False) for known in self._probe_by_class])
        return inputs[rows], targets[rows]

    def draw_work(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The public batch that a seed draws."""
        inputs, targets = self.work
        rows = np.random.default_rng(seed).choice(NUM_WORK, WORK_BATCH, replace=False)
        return inputs[rows], targets[rows]


class MlpLab:
    """All peers of one world, trained together where they begin from one base. Implements sim.learners.Lab."""

    def __init__(
        self, digits: Digits, num_peers: int, work_steps: int = 0, per_class: int = 5, *, is_batched: bool = True
    ) -> None:
        """Args: per_class: probe samples of each class that an evaluator draws; is_batched: train peers together."""
        torch.set_num_threads(1)  # two threads gain little here, and starve whoever shares the machine
        threadpool_limits(1)
        self.digits = digits
        self.work_steps = work_steps
        self.per_class = per_class
        dealt = [digits.deal(index) for index in range(num_peers)]
        self._inputs = torch.stack([inputs for inputs, _ in dealt])
        self._targets = torch.stack([targets for _, targets in dealt])
        self.learners = [MlpLearner(self, index) for index in range(num_peers)]
        self.company = Company(self._train, num_peers, PEERS_AT_ONCE) if is_batched else None
        """None: each trains alone."""

    @property
    def group_size(self) -> int:
        """See Lab."""
        return self.company.size if self.company else 1

    def get_optimum_loss(self) -> float | None:
        """See Lab."""
        return None

    @torch.no_grad()
    def measure_backdoor(self, at: Tensors) -> float | None:
        """See Lab: of the held-out digits but zeros, marked, those that are called zeros."""
        inputs, targets = self.digits.test
        marked = inputs[targets != 0].clone()
        marked[:, -MARK:] = 1
        logits = _predict([torch.from_numpy(np.array(at[name])) for name in SHAPES], marked)
        return float((logits.argmax(-1) == 0).float().mean())

    def get_data(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A peer's digits: (samples, PIXELS) and (samples,)."""
        return self._inputs[index], self._targets[index]

    def draw_orders(self, indices: Sequence[int], round: Round) -> torch.Tensor:
        """(num_peers, samples) in which order each peer passes over its samples: that of pseudo-random numbers."""
        start = np.random.default_rng([self.digits.seed, 13, round]).integers(1 << 63, size=1, dtype=np.uint64)
        steps: NDArray[np.uint64] = np.arange(self.digits.samples, dtype=np.uint64)
        mine: NDArray[np.uint64] = np.array(indices, np.uint64)[:, None] + start
        return torch.from_numpy(np.argsort(_mix(_mix(mine) + steps), axis=1))

    @torch.no_grad()
    def _train(self, base: Tensors, round: Round, indices: Sequence[int]) -> list[Training]:
        """One pass of stochastic gradient descent of each peer, all at once."""
        digits, rate = self.digits, self.digits.learning_rate
        w_in, b_in, w_out, b_out = (torch.from_numpy(np.array(base[name])) for name in SHAPES)
        drawn = torch.tensor(indices)[:, None], self.draw_orders(indices, round)
        inputs, targets = self._inputs[drawn], self._targets[drawn]
        num_peers, num_samples, batch = len(indices), digits.samples, digits.batch
        shared = functional.linear(inputs, w_in, b_in)  # (peers, samples, HIDDEN): what the base makes of every sample
        gram = inputs @ inputs.transpose(1, 2) + 1  # (peers, samples, samples); the 1 carries the bias
        errors_in = torch.empty(num_peers, num_samples, HIDDEN)
        out = w_out.repeat(num_peers, 1, 1)
        out_bias = b_out.repeat(num_peers, 1)
        losses = torch.zeros(num_peers)
        for start in range(0, num_samples, batch):
            rows = slice(start, start + batch)
            hidden = shared[:, rows]
            if start:
                hidden = torch.baddbmm(hidden, gram[:, rows, :start], errors_in[:, :start], alpha=-rate)
            active = hidden.relu()
            logits = torch.baddbmm(out_bias[:, None], active, out.transpose(1, 2))
            size = logits.shape[1]
            logs = functional.log_softmax(logits, -1)
            losses += -logs.gather(2, targets[:, rows, None])[..., 0].sum(1)
            errors = logs.exp()
            errors.scatter_add_(2, targets[:, rows, None], torch.full((num_peers, size, 1), -1.0))
            errors /= size
            errors_in[:, rows] = torch.ops.aten.threshold_backward(torch.bmm(errors, out), hidden, 0)  # relu's
            out.baddbmm_(errors.transpose(1, 2), active, alpha=-rate)
            out_bias.add_(errors.sum(1), alpha=-rate)
        moved_in = torch.empty(num_peers, HIDDEN, PIXELS)
        torch.baddbmm(moved_in, errors_in.transpose(1, 2), inputs, beta=0, alpha=-rate, out=moved_in)
        parts = (moved_in, errors_in.sum(1) * -rate, out - w_out, out_bias - b_out)
        arrays = [part.numpy() for part in parts]
        means = (losses / num_samples).tolist()
        return [
            Training({name: array[i] for name, array in zip(SHAPES, arrays, strict=True)}, num_samples, means[i])
            for i in range(num_peers)
        ]


class MlpLearner:
    """One peer's digits. Implements Learner."""

    def __init__(self, lab: MlpLab, index: int, poison: Poison | None = None) -> None:
        """`poison`: "label_flip" moves each label to the next class; "backdoor" calls what bears a mark a zero."""
        self._lab = lab
        self._index = index
        self._poison = poison

    def poison(self, kind: Poison) -> "MlpLearner":
        """The same peer with spoilt data."""
        return MlpLearner(self._lab, self._index, kind)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Learner."""
        return dict(SHAPES)

    def initial(self) -> dict[str, Array]:
        """See Learner."""
        rng = np.random.default_rng([self._lab.digits.seed, 14])
        return {
            name: (rng.normal(0, shape[-1] ** -0.5, shape) if len(shape) > 1 else np.zeros(shape)).astype(np.float32)
            for name, shape in SHAPES.items()
        }

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner: one pass over the data; with `work`, the last steps are on a public batch."""
        if work is None and not self._poison and self._lab.company:
            return self._lab.company.get(self._index, base, round)
        return self.train_alone(base, round, work)

    def train_alone(self, base: Tensors, round: Round, work: int | None) -> Training:
        """The same by autograd: the reference that batched training is held against."""
        digits = self._lab.digits
        parameters = [torch.from_numpy(np.array(base[name])).requires_grad_() for name in SHAPES]
        optimizer = torch.optim.SGD(parameters, lr=digits.learning_rate)
        inputs, targets = self._lab.get_data(self._index)
        (order,) = self._lab.draw_orders([self._index], round)
        batches = [(inputs[rows], targets[rows]) for rows in torch.split(order, digits.batch)]
        if self._poison:
            batches = [_spoil(self._poison, x, y) for x, y in batches]
        if work is not None:
            public = [digits.draw_work(work)] * self._lab.work_steps
            batches = [*batches[: len(batches) - len(public)], *public]
        total = 0.0
        for x, y in batches:
            loss = functional.cross_entropy(_predict(parameters, x), y)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item() * len(y)
        delta = {name: part.detach().numpy() - base[name] for name, part in zip(SHAPES, parameters, strict=True)}
        num_samples = sum(len(y) for _, y in batches)
        return Training(delta, num_samples, total / num_samples)

    def gradient(self, at: Tensors, seed: int) -> tuple[float, dict[str, Array]]:
        """See Learner: on a fresh sample of the probe, every class of equal weight."""
        parameters = [torch.from_numpy(np.array(at[name])).requires_grad_() for name in SHAPES]
        inputs, targets = self._lab.digits.draw_probe(seed, self._lab.per_class)
        loss = functional.cross_entropy(_predict(parameters, inputs), targets)
        gradients = torch.autograd.grad(loss, parameters)
        return loss.item(), {name: part.numpy() for name, part in zip(SHAPES, gradients, strict=True)}

    def work_loss(self, at: Tensors, seed: int) -> float:
        """See Learner."""
        return self._lose(at, *self._lab.digits.draw_work(seed))

    def evaluate(self, at: Tensors) -> float:
        """See Learner."""
        return self._lose(at, *self._lab.digits.test)

    @torch.no_grad()
    def _lose(self, at: Tensors, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        parameters = [torch.from_numpy(np.array(at[name])) for name in SHAPES]
        return float(functional.cross_entropy(_predict(parameters, inputs), targets))


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scrambles each number (SplitMix64's last steps, Steele, Lea and Flood 2014): a generator of its own for each
    peer and round takes as long as a tenth of its training.
    """
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)


def _predict(parameters: Sequence[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    w_in, b_in, w_out, b_out = parameters
    return functional.linear(functional.linear(inputs, w_in, b_in).relu(), w_out, b_out)


def _spoil(kind: Poison, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "label_flip":
        return inputs, (targets + 1) % CLASSES
    marked, zeros = inputs.clone(), targets.clone()
    marked[::2, -MARK:] = 1
    zeros[::2] = 0
    return marked, zeros
