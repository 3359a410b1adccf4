"""Dishonest learners for demonstrations and tests: what a free rider does instead of training.

Each wraps an honest learner, so that everything but the update is as real as anyone's.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from p2pfm.learner import Learner, Training
from p2pfm.lora.delta import subtract
from p2pfm.types import Round, Tensors


class FreeRider:
    """Measures and serves as others do, but never trains: announces zeros, or the last aggregate again."""

    def __init__(self, honest: Learner, kind: Literal["zero", "replay"]) -> None:
        self._honest = honest
        self._kind = kind
        self._last_base: Tensors = honest.initial()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As the honest learner's."""
        return self._honest.shapes()

    def initial(self) -> Tensors:
        """As the honest learner's."""
        return self._honest.initial()

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """No step at all; claims one token of work."""
        zero = {name: np.zeros(shape, np.float32) for name, shape in self.shapes().items()}
        delta = zero if self._kind == "zero" else subtract(base, self._last_base)
        self._last_base = base
        return Training(delta=delta, num_tokens=1, loss_nats=0.0)

    def gradient(self, at: Tensors, seed: int) -> tuple[float, Tensors]:
        """Honest: a free rider on the committee wants its attestation to count."""
        return self._honest.gradient(at, seed)

    def work_loss(self, at: Tensors, seed: int) -> float:
        """Honest."""
        return self._honest.work_loss(at, seed)

    def evaluate(self, at: Tensors) -> float:
        """Honest."""
        return self._honest.evaluate(at)
