"""A convex toy learner: linear regression in strata, each peer's data mostly of one. Its optimum is known exactly.

Knows numpy only; implements `learner.Learner`, so that the very work of a real node (compression, scoring, merge) runs
on it.
"""

from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from p2pfm.errors import ConfigError
from p2pfm.learner import Training
from p2pfm.lora.delta import compute_layout, flatten, unflatten, zeros
from p2pfm.types import Array, Round, Tensors
from sim.attacks import Poison

Matrix = NDArray[np.float64]

WORK_BATCH = 16
"""Public samples in a proof of computation: with fewer their own difficulty outweighs what was learned from them."""

SHAPES = {"layer.first": (4, 8), "layer.second": (16, 2)}
"""Two small tensors, so that everything that depends on tensors' names and borders is exercised."""


@dataclass(frozen=True)
class Problem:
    """What all peers of a world share: the strata, the probe and the known optimum.

    Stratum k: inputs with their own scales, targets x . (theta + shift_k) + noise. The declared loss is the mean over
    strata of half the squared error, so its optimum is a compromise that no peer could find alone.
    """

    seed: int
    num_strata: int = 5
    num_test: int = 200
    """Test samples a stratum."""
    num_probe: int = 400
    """Probe samples a stratum, of which each evaluator draws a fresh part."""
    noise: float = 0.3
    num_work: int = 64
    """Public samples a stratum, which proofs of computation are drawn from."""
    shift: float = 0.3
    """How far strata differ: the spread of their parameters around the common ones."""

    @cached_property
    def dim(self) -> int:
        """Parameters in all."""
        return compute_layout(SHAPES).size

    @cached_property
    def parameters(self) -> Matrix:
        """Each stratum's true parameters: (num_strata, dim)."""
        rng = np.random.default_rng([self.seed, 1])
        common = rng.normal(0, 1 / np.sqrt(self.dim) * 2, self.dim)
        return common + rng.normal(0, self.shift / np.sqrt(self.dim), (self.num_strata, self.dim))

    @cached_property
    def scales(self) -> Matrix:
        """Each stratum's input scales: (num_strata, dim)."""
        return np.random.default_rng([self.seed, 2]).uniform(0.5, 1.5, (self.num_strata, self.dim))

    def draw(self, stratum: int, num: int, rng: np.random.Generator) -> tuple[Matrix, Matrix]:
        """Samples of a stratum: inputs (num, dim), targets (num,)."""
        inputs = rng.normal(0, 1, (num, self.dim)) * self.scales[stratum]
        return inputs, inputs @ self.parameters[stratum] + rng.normal(0, self.noise, num)

    @cached_property
    def test(self) -> tuple[Matrix, Matrix]:
        """The fixed test split, equally many of every stratum: inputs, targets."""
        return self._all_strata(self.num_test, 3)

    @cached_property
    def probe(self) -> tuple[Matrix, Matrix]:
        """The declared probe: inputs (num_strata, num_probe, dim), targets (num_strata, num_probe)."""
        inputs, targets = self._all_strata(self.num_probe, 4)
        return inputs.reshape(self.num_strata, -1, self.dim), targets.reshape(self.num_strata, -1)

    @cached_property
    def work(self) -> tuple[Matrix, Matrix]:
        """The public samples for proofs of computation: inputs, targets."""
        return self._all_strata(self.num_work, 7)

    def draw_work(self, seed: int) -> tuple[Matrix, Matrix]:
        """The WORK_BATCH public samples that a seed draws: inputs, targets."""
        inputs, targets = self.work
        rows = np.random.default_rng(seed).choice(len(targets), WORK_BATCH, replace=False)
        return inputs[rows], targets[rows]

    def loss(self, at: Matrix) -> float:
        """Held-out loss at parameters (dim,)."""
        inputs, targets = self.test
        return float(np.mean((inputs @ at - targets) ** 2) / 2)

    @cached_property
    def optimum_loss(self) -> float:
        """The least held-out loss that any parameters reach."""
        inputs, targets = self.test
        return self.loss(np.linalg.lstsq(inputs, targets, rcond=None)[0].astype(np.float64))

    def _all_strata(self, num: int, part: int) -> tuple[Matrix, Matrix]:
        rng = np.random.default_rng([self.seed, part])
        drawn = [self.draw(stratum, num, rng) for stratum in range(self.num_strata)]
        return np.concatenate([inputs for inputs, _ in drawn]), np.concatenate([targets for _, targets in drawn])


class LinearLearner:
    """One peer's data of a Problem. Implements Learner."""

    def __init__(
        self,
        problem: Problem,
        index: int,
        num_samples: int = 64,
        steps: int = 20,
        learning_rate: float = 0.03,
        probe_samples: int = 60,
        work_steps: int = 0,
    ) -> None:
        """`index`: the peer's place in the world, which decides its stratum; three quarters of its data are of that.

        `probe_samples`: a stratum; the whole probe, whatever the seed, where it has no more.
        `work_steps`: of the steps, the last ones, taken on a public batch where one is asked for.
        """
        self.problem = problem
        self._index = index
        self._steps = steps
        self._learning_rate = learning_rate
        self._probe_samples = probe_samples
        self._work_steps = work_steps
        rng = np.random.default_rng([problem.seed, 5, index])
        home = index % problem.num_strata
        strata = np.where(rng.random(num_samples) < 0.75, home, rng.integers(0, problem.num_strata, num_samples))
        drawn = [problem.draw(int(stratum), 1, rng) for stratum in strata]
        self._inputs = np.concatenate([inputs for inputs, _ in drawn])  # (num_samples, dim)
        self._targets = np.concatenate([targets for _, targets in drawn])  # (num_samples,)

    def poison(self, kind: Poison) -> "LinearLearner":
        """See `sim.adversaries.learners.Poisonable`: label_flip negates the targets.

        Raises:
            ConfigError: a backdoor needs a trigger, and a regression's inputs have none.
        """
        if kind != "label_flip":
            raise ConfigError(f"adversary {kind}: linear regression knows no triggers; use a learner with labels")
        poisoned = copy(self)
        poisoned._targets = -self._targets
        return poisoned

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Learner."""
        return dict(SHAPES)

    def initial(self) -> dict[str, Array]:
        """See Learner: zeros."""
        return zeros(SHAPES)

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner: gradient descent on random halves of the data."""
        start = flatten(base).astype(np.float64)
        rng = np.random.default_rng([self.problem.seed, 6, self._index, round])
        at, batch = start.copy(), max(1, len(self._targets) // 2)
        losses = []
        public = [] if work is None else [self.problem.draw_work(work)] * self._work_steps
        for step in range(self._steps):
            rows = rng.integers(0, len(self._targets), batch)
            inputs, targets = self._inputs[rows], self._targets[rows]
            if step >= self._steps - len(public):
                inputs, targets = public[0]
            errors = inputs @ at - targets  # (num_rows,)
            losses.append(float(np.mean(errors**2) / 2))
            at -= self._learning_rate * (inputs.T @ errors) / len(errors)
        delta = unflatten(at - start, compute_layout(SHAPES))
        return Training(delta, self._steps * batch, float(np.mean(losses)))

    def gradient(self, at: Tensors, seed: int) -> tuple[float, dict[str, Array]]:
        """See Learner: on a fresh sample of the probe, every stratum of equal weight."""
        inputs, targets = self.problem.probe
        num_strata, num_probe = self.problem.num_strata, self.problem.num_probe
        rows = np.broadcast_to(np.arange(num_probe), (num_strata, num_probe))
        if self._probe_samples < num_probe:
            rows = np.random.default_rng(seed).integers(0, num_probe, (num_strata, self._probe_samples))
        strata = np.arange(num_strata)[:, None]
        chosen = inputs[strata, rows].reshape(-1, self.problem.dim)  # (num_strata * samples, dim)
        errors = chosen @ flatten(at).astype(np.float64) - targets[strata, rows].ravel()
        gradient = unflatten(chosen.T @ errors / len(errors), compute_layout(SHAPES))
        return float(np.mean(errors**2) / 2), gradient

    def work_loss(self, at: Tensors, seed: int) -> float:
        """See Learner."""
        inputs, targets = self.problem.draw_work(seed)
        return float(np.mean((inputs @ flatten(at).astype(np.float64) - targets) ** 2) / 2)

    def evaluate(self, at: Tensors) -> float:
        """See Learner."""
        return self.problem.loss(flatten(at).astype(np.float64))


class LinearLab:
    """All peers of a Problem. Implements sim.learners.Lab."""

    def __init__(self, problem: Problem, num_peers: int, work_steps: int = 0) -> None:
        self._problem = problem
        self.learners = [LinearLearner(problem, index, work_steps=work_steps) for index in range(num_peers)]

    @property
    def group_size(self) -> int:
        """See Lab: too small to gain from company."""
        return 1

    def get_optimum_loss(self) -> float | None:
        """See Lab."""
        return self._problem.optimum_loss

    def measure_backdoor(self, at: Tensors) -> float | None:
        """See Lab."""
        return None
