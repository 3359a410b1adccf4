"""What simulated peers learn: one module a `LearnerModel.kind`. Knows no world."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from p2pfm.learner import Learner
from p2pfm.types import Round, Tensors


class Lab(Protocol):
    """All peers' learners of one world."""

    @property
    def learners(self) -> Sequence[Learner]:
        """By the peer's number: what it learns when it is honest."""
        ...

    def prepare(self, base: Tensors, round: Round, indices: Sequence[int]) -> None:
        """These peers are about to train from `base`: do it together, if that is faster, with the same result."""
        ...

    def get_optimum_loss(self) -> float | None:
        """The least held-out loss that anything reaches, where it is known [nats]."""
        ...


def is_same(left: Tensors, right: Tensors) -> bool:
    """Whether two adapters are one."""
    return left is right or all(np.array_equal(part, right[name]) for name, part in left.items())
