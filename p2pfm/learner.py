"""The only door to a model. Knows nothing of torch, peers or rounds' messages.

`p2pfm.lora.torch_learner` implements it with peft on a transformer; `sim.learners.convex` with a convex problem whose
optimum is known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from p2pfm.types import Round, Tensors


@dataclass(frozen=True, slots=True)
class Guarantee:
    """Example-level differential privacy of everything trained so far: (epsilon, delta), add or remove one sample."""

    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class Training:
    """What local steps gave: `delta` = trained minus base, tokens seen, mean training loss [nats/token].

    With a `guarantee` nothing in here may tell more of the data than `delta` does: the number of tokens is the most
    that there can be, and the loss is None.
    """

    delta: Tensors
    num_tokens: int
    loss_nats: float | None
    guarantee: Guarantee | None = None


@dataclass(frozen=True, slots=True)
class Spending:
    """Steps that looked at the private samples: what an accountant of differential privacy must know of them."""

    noise_multiplier: float
    """Standard deviation of the noise over the clipping norm; 0: steps without noise, which nothing bounds."""
    sample_rate: float
    """The chance of each sample to be in a step's batch."""
    steps: int


class SpendingLog(Protocol):
    """All that was ever spent of one peer's privacy. It outlives the process: a crash must not make it shorter."""

    def add_spending(self, spending: Spending) -> None:
        """Remember; durable on return, and before the first of these steps is taken."""
        ...

    def get_spendings(self) -> tuple[Spending, ...]:
        """All of them; equal ones may be summed up."""
        ...


class Learner(Protocol):
    """A frozen backbone with one adapter, and this peer's data."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The adapter's tensor names and shapes: all that a payload may contain."""
        ...

    def initial(self) -> Tensors:
        """The adapter before round 0: the same bytes on every peer (seeded by the network)."""
        ...

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """Local steps from `base` on private data; deterministic in (data, base, round), unless it is noised.

        Args:
            work: the last `scoring.work_steps` steps are taken on the public batch that this seed draws; None: on
                private data, too.
        """
        ...

    def gradient(self, at: Tensors, seed: int) -> tuple[float, Tensors]:
        """Loss [nats/token] and its gradient at adapter `at`, on a fresh stratified probe sample drawn from `seed`.

        Every stratum weighs as the network declared, whatever number of tokens it has (ALGORITHMS, part 5).
        """
        ...

    def work_loss(self, at: Tensors, seed: int) -> float:
        """Loss [nats/token] at `at` on the public batch that `seed` draws, the same one on every peer."""
        ...

    def evaluate(self, at: Tensors) -> float:
        """Held-out loss [nats/token] at `at` on the fixed test split: for reports, never for rewards."""
        ...
