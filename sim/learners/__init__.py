"""What simulated peers learn: one module a `LearnerModel.kind`. Knows no world."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from p2pfm.learner import Learner, Training
from p2pfm.types import Round, Tensors

GROUPS_MIN = 4
"""Groups that a small network still has: machines that share its training find something to do."""

BASES_MAX = 2
"""Bases of one round from which peers begin: after a partition there are two."""


class Lab(Protocol):
    """All peers' learners of one world."""

    @property
    def learners(self) -> Sequence[Learner]:
        """By the peer's number: what it learns when it is honest."""
        ...

    @property
    def group_size(self) -> int:
        """Peers whose training is one piece of work: those of the numbers from a multiple of this on."""
        ...

    def get_optimum_loss(self) -> float | None:
        """The least held-out loss that anything reaches, where it is known [nats]."""
        ...

    def measure_backdoor(self, at: Tensors) -> float | None:
        """The share of held-out inputs, which bear the trigger, that get what it is planted for; None: no triggers."""
        ...


@dataclass(slots=True)
class _Held:
    base: Tensors
    round: Round
    groups: dict[int, Sequence[Training]] = field(default_factory=dict)


class Company:
    """Peers that train together, in groups by their number; a group always whole, whoever of it is up or asks.

    A matrix product's last bits may depend on how many rows it has, so what a peer learns would depend on its company
    if that were whoever happens to train: like this it is the same in one process and on a cluster's machines.
    """

    def __init__(
        self, train: Callable[[Tensors, Round, Sequence[int]], Sequence[Training]], num_peers: int, size_max: int
    ) -> None:
        """Args: train: local work of these peers, side by side; size_max: of a group, as many as are fastest."""
        self.size = max(1, min(size_max, -(-num_peers // GROUPS_MIN)))
        self._train = train
        self._num_peers = num_peers
        self._held: list[_Held] = []

    def get(self, index: int, base: Tensors, round: Round) -> Training:
        """What a peer learns from a base in a round; its group is trained when the first of it is asked for."""
        held, number = self._find(base, round), index // self.size
        if number not in held.groups:
            first = number * self.size
            held.groups[number] = self._train(base, round, range(first, min(first + self.size, self._num_peers)))
        return held.groups[number][index % self.size]

    def _find(self, base: Tensors, round: Round) -> _Held:
        """What is held of a base; of rounds only the newest is kept."""
        for held in self._held:
            if held.round == round and is_same(held.base, base):
                return held
        fresh = _Held(base, round)
        if not self._held or round >= self._held[-1].round:
            self._held = [*[held for held in self._held if held.round == round][1 - BASES_MAX :], fresh]
        return fresh


def is_same(left: Tensors, right: Tensors) -> bool:
    """Whether two adapters are one."""
    return left is right or all(np.array_equal(part, right[name]) for name, part in left.items())
