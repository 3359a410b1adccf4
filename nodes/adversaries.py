"""Dishonest peers for demonstrations and tests: a learner that does not train, a committee member that overpays.

Each changes one thing of an honest one, so that everything else is as real as anyone's.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import msgspec
import numpy as np

from p2pfm.learner import Learner, Training
from p2pfm.lora.delta import subtract
from p2pfm.messages import Proposal, ScoreReveal
from p2pfm.protocol.ballot import Ballot
from p2pfm.protocol.peer import Peer
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue
from p2pfm.settlement.rewards import from_wire, to_wire
from p2pfm.types import Digest, Round, Tensors, Wei

Wrap = Callable[[Learner], Learner]
"""What a node makes of its learner: nothing, or a dishonest one."""


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


def corrupt(adversary: str, honest: Learner) -> Learner:
    """The learner of a node with this `NodeConfig.adversary`; the honest one where that is no learner's affair."""
    match adversary:
        case "zero" | "replay":
            return FreeRider(honest, adversary)
        case _:
            return honest


class OverpayingBallot(Ballot):
    """All of a round's reward goes to the proposer."""

    def draft(self, reveals: tuple[ScoreReveal, ...], named: tuple[Digest, ...] = ()) -> Proposal:
        """See Ballot."""
        honest = super().draft(reveals, named)
        leaves = from_wire(honest.leaves)
        total = sum(leaf.reward_wei for leaf in leaves)
        false = [
            LeafValue(
                Wei(leaf.cumulative_wei - leaf.reward_wei + (total if index == honest.proposer else 0)),
                Wei(total if index == honest.proposer else 0),
                leaf.contribution,
            )
            for index, leaf in enumerate(leaves)
        ]
        return msgspec.structs.replace(honest, leaves=to_wire(false), root=merkle.compute_root(false).digest)


class Overpayer(Peer):
    """On a committee with others of its kind, all of them sign what overpays."""

    make_ballot = OverpayingBallot
