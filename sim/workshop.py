"""The heavy work of all peers of one world: train, score, merge, evaluate. Knows no time, network or protocol state.

A world asks one host's work at a time; a workshop may do that of many hosts together as long as the results do not
depend on which hosts are asked for.
"""

from collections.abc import Sequence, Set
from functools import partial
from random import Random
from typing import Protocol

import msgspec
import numpy as np

from p2pfm import work
from p2pfm.config import NetworkConfig
from p2pfm.contribution.similarity import Matrix, Vector, compute_cosines
from p2pfm.errors import Reject
from p2pfm.learner import Learner, Training
from p2pfm.lora.compress import Update, compress, decode_payload, feed_back_array, quantise_rows
from p2pfm.lora.delta import compute_layout, decode_tensors, encode_tensors, flatten, subtract, zeros
from p2pfm.lora.merge import merge
from p2pfm.protocol.events import Condense, Evaluate, Evaluated, Merge, Merged, Scored, ScoreUpdates, Train, Trained
from p2pfm.types import Array, Digest, PeerId, Tensors, compute_digest
from sim.disk import Disk, make_ghost
from sim.faults import make_learners
from sim.learners import Lab
from sim.learners.convex import LinearLab, Problem
from sim.learners.digests import DigestWorkshop
from sim.scenarios import AdversaryKind, LearnerModel, Scenario


class Workshop(Protocol):
    """Does what a Peer's actions ask for, for the hosts of one world, each known by its number."""

    def get_genesis(self) -> bytes:
        """The base before round 0."""
        ...

    def expect(self, index: int, disk: Disk, action: Train) -> None:
        """A host has begun to train: `train` asks for the result, unless the host dies before. A chance to begin."""
        ...

    def train(self, index: int, disk: Disk, action: Train) -> Trained:
        """A host's training has ended."""
        ...

    def score(self, index: int, disk: Disk, action: ScoreUpdates, rng: Random) -> Scored:
        """A committee member's contributions of a round's updates; its sample and salt are drawn from `rng`."""
        ...

    def merge(self, index: int, disk: Disk, action: Merge | Condense) -> Merged:
        """The merged base (or a shard's payload): the same for all who ask."""
        ...

    def evaluate(self, disk: Disk, action: Evaluate) -> Evaluated:
        """Held-out loss at a base: the same for all who ask."""
        ...

    def validate(self, kind: str, digest: Digest, disk: Disk) -> tuple[bool, PeerId | None]:
        """Whether a blob's bytes, as they come to a disk, are well-formed, and who made them."""
        ...

    def make_empty_payload(self, maker: PeerId) -> bytes:
        """A well-formed payload of an update that changes nothing."""
        ...

    def get_optimum_loss(self) -> float | None:
        """The least held-out loss that anything reaches, where it is known [nats]."""
        ...

    def get_backdoor(self, base: Digest) -> float | None:
        """How often the trigger works at a base that was evaluated, see `Lab`; None: nobody plants one."""
        ...

    def forget(self, digests: Set[Digest]) -> None:
        """No host holds these blobs any more."""
        ...


class TensorWorkshop:
    """Real tensors and the node's own `p2pfm.work`; implements Workshop."""

    def __init__(
        self,
        config: NetworkConfig,
        model: LearnerModel,
        lab: Lab,
        learners: Sequence[Learner],
        *,
        has_backdoor: bool = False,
    ) -> None:
        """Args: learners: one a host, adversaries' included; the honest ones are of the lab; has_backdoor: one of them
        plants a trigger, so every base is tried for it."""
        self._config = config
        self._model = model
        self._lab = lab
        self._learners = learners
        self.group_size = lab.group_size
        """See Lab."""
        self._shapes = dict(lab.learners[0].shapes())
        self._layout = compute_layout(self._shapes)
        self._bases: dict[Digest, Tensors] = {}
        """The newest ones, decoded."""
        self._updates: dict[Digest, tuple[PeerId, Update]] = {}
        """The newest rounds' payloads, decoded once for all."""
        self._merged: dict[Merge | Condense, Merged] = {}
        self._evaluated: dict[Digest, Evaluated] = {}
        self._has_backdoor = has_backdoor
        self._backdoors: dict[Digest, float | None] = {}
        """One number a round: kept for the report."""
        self._expected: dict[int, tuple[Disk, Train]] = {}
        """Of honest hosts: what each is at."""
        self._begun: dict[tuple[int, Train], tuple[Training, Array, tuple[Update, int]]] = {}
        """What came of it, with what its update leaves out, it and its bytes; hosts that died never ask."""
        self._cosines: dict[tuple[Digest, ...], Matrix] = {}
        self._validated: dict[tuple[str, Digest], tuple[bool, PeerId | None]] = {}

    def get_genesis(self) -> bytes:
        """See Workshop."""
        return encode_tensors(self._lab.learners[0].initial())

    def expect(self, index: int, disk: Disk, action: Train) -> None:
        """See Workshop."""
        is_honest = self._learners[index] is self._lab.learners[index]  # others may remember when they were asked
        if self._model.codec == "modelled" and is_honest:
            self._expected[index] = disk, action

    def train(self, index: int, disk: Disk, action: Train) -> Trained:
        """See Workshop."""
        if self._model.codec == "real":
            return work.train_update(self._learners[index], disk, self._config, action)
        if (index, action) not in self._begun:
            self._train_group(index, disk, action)
        training, rest, (update, size) = self._begun.pop((index, action))
        payload, size = self._keep_update(disk, action.maker, update, size)
        # Named after what it follows from: 50,000 parameters take half as long to hash as to train.
        name = compute_digest(b"residual" + payload + msgspec.msgpack.encode(action))
        disk.put_as(name, rest.tobytes())
        return work.make_trained(action, training, (payload, size, name))

    def _train_group(self, index: int, disk: Disk, action: Train) -> None:
        """`work.train_update`, but the payload is not coded: it is the update itself, under the name of its values.

        What is expected of peers that train together is quantised together, too.
        """
        number, size = index // self.group_size, self.group_size
        asked = {index: (disk, action)}
        for mate in range(number * size, (number + 1) * size):
            known = self._expected.pop(mate, None)
            if known and (known[1].round, known[1].base) == (action.round, action.base):
                asked.setdefault(mate, known)
        self._begun = {key: begun for key, begun in self._begun.items() if key[1].round >= action.round - 1}
        # Of a host whose disk is lost nobody will ask.
        asked = {mate: (theirs, wish) for mate, (theirs, wish) in asked.items() if _has_residual(theirs, wish)}
        trained = [
            self._learners[mate].train(
                self._get_base(theirs, wish.base), wish.round, work.draw_public(self._config, wish)
            )
            for mate, (theirs, wish) in asked.items()
        ]
        rows = np.empty((len(trained), self._layout.size), np.float32)
        for row, training in zip(rows, trained, strict=True):
            flatten(training.delta, out=row)
        losses = [training.loss_nats or 0 for training in trained]
        if not (np.isfinite(rows).all() and np.isfinite(losses).all()):  # of all at once: a third of the time
            for training in trained:
                work.validate_training(training)
        for row, (theirs, wish) in zip(rows, asked.values(), strict=True):
            if wish.residual is not None:
                residual = np.frombuffer(theirs.get(wish.residual), np.float32)
                feed_back_array(residual, row, self._config.compression, out=row)
        made = quantise_rows(rows, self._layout, self._config.compression)
        for (mate, (_, wish)), training, row, (update, num_bytes) in zip(
            asked.items(), trained, rows, made, strict=True
        ):
            row[update.positions] -= update.values  # what is left out
            self._begun[mate, wish] = training, row, (update, num_bytes)

    def _make(self, disk: Disk, maker: PeerId, wanted: Tensors) -> tuple[Digest, int]:
        ((update, size),) = quantise_rows(flatten(wanted)[None], self._layout, work.get_codec(self._config, maker))
        return self._keep_update(disk, maker, update, size)

    def _keep_update(self, disk: Disk, maker: PeerId, update: Update, size: int) -> tuple[Digest, int]:
        name = maker.encode()
        digest = compute_digest(name + update.digest)
        size += 1 + len(name)
        self.keep(disk, digest, size, maker, update)
        return digest, size

    def keep(self, disk: Disk, payload: Digest, size: int, maker: PeerId, update: Update) -> None:
        """Hold an update that is not coded, as the payload of `size` bytes that it would be."""
        disk.put_as(payload, make_ghost(maker.encode(), size))
        self._updates[payload] = (maker, update)

    def get_kept(self, payload: Digest) -> tuple[PeerId, Update] | None:
        """What is held of a payload beside its bytes: who made it, and the update."""
        return self._updates.get(payload)

    def score(self, index: int, disk: Disk, action: ScoreUpdates, rng: Random) -> Scored:
        """See Workshop."""
        seed, salt = rng.getrandbits(63), rng.randbytes(32)
        learner = self._learners[index]
        read = partial(self._read, disk)
        return work.score_updates(learner, disk, self._config, action, seed, salt, read, self._compare)

    def _compare(self, names: Sequence[Digest], rows: Sequence[Vector], size: int) -> Matrix:
        """Cosines, computed once for all evaluators of a shard, each of which heard of its updates in another order."""
        order = sorted(range(len(names)), key=names.__getitem__)
        key = tuple(names[row] for row in order)
        if key not in self._cosines:
            if len(self._cosines) >= COSINES_MAX:
                del self._cosines[next(iter(self._cosines))]
            self._cosines[key] = compute_cosines([rows[row] for row in order], size)
        places = np.argsort(order)
        return self._cosines[key][np.ix_(places, places)]

    def merge(self, index: int, disk: Disk, action: Merge | Condense) -> Merged:
        """See Workshop."""
        if action not in self._merged:
            self._merged[action] = self._merge(disk, action)
        merged = self._merged[action]
        disk.held.add(merged.new_base)
        return merged

    def _merge(self, disk: Disk, action: Merge | Condense) -> Merged:
        """`work.merge_updates` and `work.condense_updates` on updates that are decoded already."""
        base = self._get_base(disk, action.base)
        _, updates = self._read(disk, [item.payload for item in action.updates])
        merged = merge(base, list(zip(updates, [item.weight for item in action.updates], strict=True)))
        if isinstance(action, Merge):
            return Merged(action.request, disk.put(encode_tensors(merged)))
        if self._model.codec == "real":
            return work.condense_updates(disk, self._shapes, self._config, action)
        return Merged(action.request, self._make(disk, action.maker, subtract(merged, base))[0])

    def evaluate(self, disk: Disk, action: Evaluate) -> Evaluated:
        """See Workshop."""
        if action.base not in self._evaluated:
            self._evaluated[action.base] = work.evaluate(self._lab.learners[0], disk, action)
            if self._has_backdoor:
                self._backdoors[action.base] = self._lab.measure_backdoor(self._get_base(disk, action.base))
        return Evaluated(action.round, self._evaluated[action.base].loss_nano)

    def validate(self, kind: str, digest: Digest, disk: Disk) -> tuple[bool, PeerId | None]:
        """See Workshop."""
        if digest in self._updates:
            return kind == "payload", self._updates[digest][0]
        key = (kind, digest)
        if key not in self._validated:
            try:
                self._validated[key] = (True, work.validate_blob(kind, disk.read(digest), self._shapes, self._config))
            except Reject:
                self._validated[key] = (False, None)
        return self._validated[key]

    def make_empty_payload(self, maker: PeerId) -> bytes:
        """See Workshop."""
        coded, _ = compress(zeros(self._shapes), self._config.compression)
        return work.join_payload(maker, coded)

    def get_optimum_loss(self) -> float | None:
        """See Workshop."""
        return self._lab.get_optimum_loss()

    def get_backdoor(self, base: Digest) -> float | None:
        """See Workshop."""
        return self._backdoors.get(base)

    def _get_base(self, disk: Disk, digest: Digest) -> Tensors:
        if digest not in self._bases:
            if len(self._bases) > BASES_MAX:
                self._bases.pop(next(iter(self._bases)))
            self._bases[digest] = decode_tensors(disk.get(digest), self._shapes)
        return self._bases[digest]

    def _read(self, disk: Disk, payloads: Sequence[Digest]) -> tuple[list[PeerId], list[Update]]:
        """The updates of payloads that a disk holds, each decoded once for all who ask."""
        limits = self._config.limits
        for payload in payloads:
            if payload not in self._updates:
                maker, coded = work.split_payload(disk.get(payload))
                codec = work.get_codec(self._config, maker)
                self._updates[payload] = maker, decode_payload(coded, self._shapes, codec, limits.payload_bytes_max)
        found = [self._updates[payload] for payload in payloads]
        return [maker for maker, _ in found], [update for _, update in found]

    def forget(self, digests: Set[Digest]) -> None:
        """See Workshop."""
        for digest in digests & self._updates.keys():
            del self._updates[digest]
        for digest in digests & self._evaluated.keys():
            del self._evaluated[digest]
        self._validated = {key: found for key, found in self._validated.items() if key[1] not in digests}
        self._merged = {action: merged for action, merged in self._merged.items() if merged.new_base not in digests}


def _has_residual(disk: Disk, action: Train) -> bool:
    return action.residual is None or action.residual in disk.held


COSINES_MAX = 128
"""Matrices of cosines that are kept: shards score at one time."""

BASES_MAX = 4
"""Decoded bases that are kept: after a partition there are two."""


def make_workshop(scenario: Scenario, config: NetworkConfig, kinds: Sequence[AdversaryKind | None]) -> Workshop:
    """The workshop of a scenario's learner; `kinds`: what each host is.

    Raises:
        ConfigError: an adversary poisons data, and this learner's cannot be.
    """
    if scenario.learner.kind == "digests":
        return DigestWorkshop(config, scenario.seed, kinds)
    return make_tensor_workshop(scenario, config, kinds)


def make_tensor_workshop(
    scenario: Scenario, config: NetworkConfig, kinds: Sequence[AdversaryKind | None]
) -> TensorWorkshop:
    """`make_workshop` of a learner that has tensors."""
    lab = make_lab(scenario, config, len(kinds))
    learners = make_learners(kinds, lab.learners, scenario.seed)
    return TensorWorkshop(config, scenario.learner, lab, learners, has_backdoor="backdoor" in kinds)


def make_lab(scenario: Scenario, config: NetworkConfig, num_peers: int) -> Lab:
    """What all peers of a scenario learn together. Imports torch only where it is needed."""
    match scenario.learner.kind:
        case "mlp":
            from sim.learners.mlp import Digits, MlpLab

            return MlpLab(Digits(scenario.seed), num_peers, scenario.work_steps, is_batched=scenario.learner.batched)
        case "lora":
            from sim.learners.lora import LoraLab

            return LoraLab(config, scenario.seed, num_peers, is_batched=scenario.learner.batched)
        case _:
            return LinearLab(Problem(scenario.seed), num_peers, scenario.work_steps)
