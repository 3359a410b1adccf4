"""Dishonest learners: wrappers around an honest one that announce something else than what it learned.

Knows no protocol: what a peer says beside its update is changed by `sim.adversaries.filters`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from p2pfm.learner import Learner, Training
from p2pfm.lora.delta import compute_layout, flatten, get_shapes, subtract, unflatten, zeros
from p2pfm.types import Array, Digest, Round, Tensors, compute_digest
from sim import attacks

CLAIMED_TOKENS = 1_000
"""What those who did no work say that they trained on."""

BASES_MAX = 3
"""Bases that a cabal remembers its update of: some of its members may be a round behind."""

Distort = Callable[[Array, np.random.Generator], Array]
"""From a delta, flat, to the announced one."""

Draw = Callable[[Round], np.random.Generator]
"""One peer's randomness in a round, see `draw_stream`."""


@runtime_checkable
class Poisonable(Protocol):
    """A Learner that can be had with changed data."""

    def poison(self, kind: attacks.Poison) -> Learner:
        """The same learner on poisoned private data; what it measures for others is not poisoned.

        Raises:
            ConfigError: its data have no such thing (a regression knows no trigger).
        """
        ...


class Wrapped:
    """A Learner around another: all but `train` is the other's."""

    def __init__(self, inner: Learner) -> None:
        self.inner = inner

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Learner."""
        return self.inner.shapes()

    def initial(self) -> Tensors:
        """See Learner."""
        return self.inner.initial()

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        return self.inner.train(base, round, work)

    def gradient(self, at: Tensors, seed: int) -> tuple[float, Tensors]:
        """See Learner."""
        return self.inner.gradient(at, seed)

    def work_loss(self, at: Tensors, seed: int) -> float:
        """See Learner."""
        return self.inner.work_loss(at, seed)

    def evaluate(self, at: Tensors) -> float:
        """See Learner."""
        return self.inner.evaluate(at)


class ZeroLearner(Wrapped):
    """A free rider: claims tokens, changes nothing."""

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        return Training(zeros(self.shapes()), CLAIMED_TOKENS, 0.0)


class ReplayLearner(Wrapped):
    """A free rider: its update is how the base moved last time, with `noise` of that share of its norm."""

    def __init__(self, inner: Learner, draw: Draw, noise: float = 0.0) -> None:
        super().__init__(inner)
        self._draw = draw
        self._noise = noise
        self._last: Tensors | None = None
        self._moved: Tensors = zeros(self.shapes())

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        if self._last is not None:
            moved = subtract(base, self._last)
            self._moved = moved if any(part.any() for part in moved.values()) else self._moved
        self._last = base
        announced = _change(self._moved, lambda flat: attacks.add_noise(flat, self._draw(round), self._noise))
        return Training(announced, CLAIMED_TOKENS, 0.0)


class DistortingLearner(Wrapped):
    """Trains as others do, and announces something else made of it."""

    def __init__(self, inner: Learner, draw: Draw, distort: Distort) -> None:
        super().__init__(inner)
        self._draw = draw
        self._distort = distort

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        honest = self.inner.train(base, round, work)
        announced = _change(honest.delta, lambda flat: self._distort(flat, self._draw(round)))
        return Training(announced, honest.num_tokens, honest.loss_nats)


class PoisonedLearner(Wrapped):
    """Trains on changed data, and announces `distort` of what it learned; measures as others do."""

    def __init__(
        self, inner: Learner, poisoned: Learner, draw: Draw, distort: Distort = lambda delta, rng: delta
    ) -> None:
        super().__init__(inner)
        self._poisoned = DistortingLearner(poisoned, draw, distort)

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        return self._poisoned.train(base, round, work)


class SkipperLearner(Wrapped):
    """Works, but proves nothing."""

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        return self.inner.train(base, round)


class Cabal:
    """Liars of one mind: each knows what all of them would honestly announce, and so what honest updates look like.

    (ALIE's authors call this the corrupted workers' own data; omniscience of all honest updates hardly adds to it.)
    """

    def __init__(self, learners: Sequence[Learner], craft: Callable[[Array], Array]) -> None:
        """Args: craft: from the members' honest deltas (num_members, dim) to the one that all announce (dim,)."""
        self._learners = learners
        self._craft = craft
        self._crafted: dict[tuple[Round, Digest], Array] = {}

    def make(self, base: Tensors, round: Round) -> Array:
        """What to announce in a round from a base; computed once for all members that hold that base."""
        key = (round, compute_digest(flatten(base).tobytes()))
        if key not in self._crafted:
            deltas = [flatten(learner.train(base, round).delta) for learner in self._learners]
            for old in list(self._crafted)[: 1 - BASES_MAX]:
                del self._crafted[old]
            self._crafted[key] = self._craft(np.stack(deltas))
        return self._crafted[key]


class ColludingLearner(Wrapped):
    """Announces what its cabal agreed on."""

    def __init__(self, inner: Learner, cabal: Cabal) -> None:
        super().__init__(inner)
        self._cabal = cabal

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        announced = unflatten(self._cabal.make(base, round), compute_layout(self.shapes()))
        return Training(announced, CLAIMED_TOKENS, 0.0)


def draw_stream(seed: int, index: int, round: Round) -> np.random.Generator:
    """What the peer of number `index` draws in a round of a scenario of this seed: the same whoever asks, and whenever.

    No two peers share one: equal noise would be one update, and duplicates are paid once.
    """
    return np.random.default_rng([seed, 77, index, round])


def _change(delta: Tensors, change: Callable[[Array], Array]) -> Tensors:
    return unflatten(change(flatten(delta)), compute_layout(get_shapes(delta)))
