"""The heavy work of all peers of one world: train, score, merge, evaluate. Knows no time, network or protocol state.

A world asks one host's work at a time; a workshop may do that of many hosts together as long as the results are those
of doing them alone.
"""

from collections.abc import Sequence
from random import Random
from typing import Protocol

from p2pfm import work
from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject
from p2pfm.learner import Learner
from p2pfm.lora.compress import compress
from p2pfm.lora.delta import encode_tensors, zeros
from p2pfm.protocol.events import Evaluate, Evaluated, Merge, Merged, Scored, ScoreUpdates, Train, Trained
from p2pfm.types import Digest, PeerId
from sim.disk import Disk
from sim.faults import make_learners
from sim.learners.convex import LinearLearner, Problem
from sim.scenarios import AdversaryKind, Scenario


class Workshop(Protocol):
    """Does what a Peer's actions ask for, for the hosts of one world, each known by its number."""

    def get_genesis(self) -> bytes:
        """The base before round 0."""
        ...

    def expect(self, index: int, disk: Disk, action: Train) -> None:
        """A host has begun to train: `train` will ask for the result, unless the host dies before."""
        ...

    def train(self, index: int, disk: Disk, action: Train) -> Trained:
        """A host's training has ended."""
        ...

    def score(self, index: int, disk: Disk, action: ScoreUpdates, rng: Random) -> Scored:
        """A committee member's contributions of a round's updates; its sample and salt are drawn from `rng`."""
        ...

    def merge(self, index: int, disk: Disk, action: Merge) -> Merged:
        """The merged base (or a shard's payload): the same for all who ask."""
        ...

    def evaluate(self, disk: Disk, action: Evaluate) -> Evaluated:
        """Held-out loss at a base: the same for all who ask."""
        ...

    def validate(self, kind: str, digest: Digest, data: bytes) -> tuple[bool, PeerId | None]:
        """Whether a blob's bytes are well-formed, and who made them."""
        ...

    def make_empty_payload(self, maker: PeerId) -> bytes:
        """A well-formed payload of an update that changes nothing."""
        ...

    def get_optimum_loss(self) -> float | None:
        """The least held-out loss that anything reaches, where it is known [nats]."""
        ...


class TensorWorkshop:
    """Real tensors and the node's own `p2pfm.work`; implements Workshop."""

    def __init__(self, config: NetworkConfig, learners: Sequence[Learner], optimum_loss: float | None = None) -> None:
        """`learners`: one a host, adversaries' included."""
        self._optimum_loss = optimum_loss
        self._config = config
        self._learners = learners
        self._shapes = dict(learners[0].shapes())
        self._merged: dict[Merge, Merged] = {}
        self._evaluated: dict[Digest, Evaluated] = {}
        self._validated: dict[tuple[str, Digest], tuple[bool, PeerId | None]] = {}

    def get_genesis(self) -> bytes:
        """See Workshop."""
        return encode_tensors(self._learners[0].initial())

    def expect(self, index: int, disk: Disk, action: Train) -> None:
        """See Workshop."""

    def train(self, index: int, disk: Disk, action: Train) -> Trained:
        """See Workshop."""
        return work.train_update(self._learners[index], disk, self._config, action)

    def score(self, index: int, disk: Disk, action: ScoreUpdates, rng: Random) -> Scored:
        """See Workshop."""
        seed, salt = rng.getrandbits(63), rng.randbytes(32)
        return work.score_updates(self._learners[index], disk, self._config, action, seed, salt)

    def merge(self, index: int, disk: Disk, action: Merge) -> Merged:
        """See Workshop."""
        if action not in self._merged:
            self._merged[action] = work.merge_updates(disk, self._shapes, self._config, action)
        merged = self._merged[action]
        disk.held.add(merged.new_base)
        return merged

    def evaluate(self, disk: Disk, action: Evaluate) -> Evaluated:
        """See Workshop."""
        if action.base not in self._evaluated:
            self._evaluated[action.base] = work.evaluate(self._learners[0], disk, action)
        return Evaluated(action.round, self._evaluated[action.base].loss_nano)

    def validate(self, kind: str, digest: Digest, data: bytes) -> tuple[bool, PeerId | None]:
        """See Workshop."""
        key = (kind, digest)
        if key not in self._validated:
            try:
                self._validated[key] = (True, work.validate_blob(kind, data, self._shapes, self._config))
            except Reject:
                self._validated[key] = (False, None)
        return self._validated[key]

    def make_empty_payload(self, maker: PeerId) -> bytes:
        """See Workshop."""
        coded, _ = compress(zeros(self._shapes), self._config.compression)
        return work.join_payload(maker, coded)

    def get_optimum_loss(self) -> float | None:
        """See Workshop."""
        return self._optimum_loss


def make_workshop(scenario: Scenario, config: NetworkConfig, kinds: Sequence[AdversaryKind | None]) -> Workshop:
    """The workshop of a scenario's learner; `kinds`: what each host is."""
    problem = Problem(scenario.seed)
    honest = [LinearLearner(problem, index, work_steps=scenario.work_steps) for index in range(len(kinds))]
    return TensorWorkshop(config, make_learners(kinds, honest), problem.optimum_loss)
