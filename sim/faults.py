"""Adversaries: wrappers around an honest Learner, or filters of what an honest Peer hears and does. Knows no world.

kind          what it does                                                                  wraps
------------  ----------------------------------------------------------------------------  --------
zero          announces an update that changes nothing                                      learner
replay        announces the last round's movement of the base again                         learner
sign_flip     announces three times its update, backwards                                   learner
noise         announces random values of its update's size                                  learner
liar          as an evaluator, reports the opposite of what it measured                      events
equivocator   announces one update to one half of its peers and another to the rest          actions
two_faced     as an evaluator, commits to one vector before one half and another before the rest  actions
copycat       announces what the last peer's data give, as its own work                     learner
skipper       trains as others do, but not on the public batch drawn for it                 learner
silent        as a committee member, says nothing                                           actions
withholder    announces its update and never serves it                                      actions
late          as an evaluator, commits when the others' vectors are public                   actions
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, assert_never

import msgspec
import numpy as np

from p2pfm.config import NetworkConfig
from p2pfm.learner import Learner, Training
from p2pfm.lora.compress import compress
from p2pfm.lora.delta import subtract, zeros
from p2pfm.messages import Announcement, Attestation, Proposal, ScoreCommit, ScoreReveal
from p2pfm.protocol.events import AnyAction, AnyEvent, Publish, Scored, ScoreUpdates, Serve
from p2pfm.types import Array, Contribution, Digest, Round, Tensors, compute_digest
from p2pfm.work import BlobStore, join_payload
from sim.scenarios import AdversaryKind

SIGN_FLIP_SCALE = np.float32(-3)


class Deed(NamedTuple):
    """An action and, where it is a message, which half of the others hears it."""

    action: AnyAction
    audience: Literal["all", "even", "odd"] = "all"


class Honest:
    """Hears everything, does as its peer says."""

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """What reaches the peer; None: nothing."""
        return event

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """What is carried out."""
        return [Deed(action) for action in actions]


class Liar(Honest):
    """Reports the opposite of what it measured."""

    def hear(self, event: AnyEvent) -> AnyEvent | None:
        """See Honest."""
        if isinstance(event, Scored):
            lies = tuple(Contribution(-value) for value in event.contributions)
            return msgspec.structs.replace(event, contributions=lies)
        return event


class Equivocator(Honest):
    """Announces its update to one half of its peers, and an empty one, which it serves too, to the others."""

    def __init__(self, network: NetworkConfig, shapes: dict[str, tuple[int, ...]], blobs: BlobStore) -> None:
        self._coded, _ = compress(zeros(shapes), network.compression)
        self._digest: Digest | None = None
        self._blobs = blobs

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """See Honest."""
        deeds: list[Deed] = []
        for action in actions:
            if isinstance(action, Publish) and isinstance(action.message, Announcement):
                empty = join_payload(action.message.peer, self._coded)
                self._digest = self._blobs.put(empty)
                other = msgspec.structs.replace(action.message, payload=self._digest, payload_bytes=len(empty))
                deeds += [Deed(action, "even"), Deed(Publish(other), "odd")]
            elif isinstance(action, Serve) and self._digest is not None:
                deeds += [Deed(action), Deed(Serve(self._digest))]
            else:
                deeds.append(Deed(action))
        return deeds


class TwoFaced(Honest):
    """Commits to its vector before one half of its peers, and to nonsense before the others."""

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """See Honest."""
        deeds: list[Deed] = []
        for action in actions:
            if isinstance(action, Publish) and isinstance(action.message, ScoreCommit):
                nonsense = compute_digest(b"nonsense" + action.message.commitment)
                other = msgspec.structs.replace(action.message, commitment=nonsense)
                deeds += [Deed(action, "even"), Deed(Publish(other), "odd")]
            else:
                deeds.append(Deed(action))
        return deeds


class Silent(Honest):
    """Scores nothing, proposes nothing, signs nothing; trains and announces as others do."""

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """See Honest."""
        words = (ScoreCommit, ScoreReveal, Proposal, Attestation)
        return [
            Deed(action)
            for action in actions
            if not isinstance(action, ScoreUpdates)
            and not (isinstance(action, Publish) and isinstance(action.message, words))
        ]


class Withholder(Honest):
    """Serves nothing to anybody."""

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """See Honest."""
        return [Deed(action) for action in actions if not isinstance(action, Serve)]


class LateCommitter(Honest):
    """Holds its commitment back until it has to reveal."""

    def __init__(self) -> None:
        self._held: Publish | None = None

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """See Honest."""
        deeds: list[Deed] = []
        for action in actions:
            if isinstance(action, Publish) and isinstance(action.message, ScoreCommit):
                self._held = action
            elif isinstance(action, Publish) and isinstance(action.message, ScoreReveal) and self._held:
                deeds += [Deed(self._held), Deed(action)]
                self._held = None
            else:
                deeds.append(Deed(action))
        return deeds


class Wrapped:
    """A Learner around another: all but `train` is the other's."""

    def __init__(self, inner: Learner) -> None:
        self.inner = inner

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Learner."""
        return dict(self.inner.shapes())

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
        return Training(zeros(self.shapes()), 1_000, 0.0)


class ReplayLearner(Wrapped):
    """A free rider: its update is how the base moved last time."""

    def __init__(self, inner: Learner) -> None:
        super().__init__(inner)
        self._last: Tensors | None = None
        self._moved: Tensors = zeros(self.shapes())

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        if self._last is not None:
            moved = subtract(base, self._last)
            self._moved = moved if any(part.any() for part in moved.values()) else self._moved
        self._last = base
        return Training(self._moved, 1_000, 0.0)


class SignFlipLearner(Wrapped):
    """A saboteur: its honest update, backwards and larger."""

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        honest = self.inner.train(base, round, work)
        flipped = {name: SIGN_FLIP_SCALE * part for name, part in honest.delta.items()}
        return Training(flipped, honest.num_tokens, honest.loss_nats)


class SkipperLearner(Wrapped):
    """Works, but proves nothing."""

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        return self.inner.train(base, round)


class NoiseLearner(Wrapped):
    """Random values as large as its honest update's."""

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        honest = self.inner.train(base, round, work)
        rng = np.random.default_rng([round, 77])
        noise: dict[str, Array] = {
            name: rng.normal(0, float(np.std(part)) or 1e-3, part.shape).astype(np.float32)
            for name, part in sorted(honest.delta.items())
        }
        return Training(noise, honest.num_tokens, honest.loss_nats)


def make_learner(kind: AdversaryKind | None, honest: Learner, make_victim: Callable[[], Learner]) -> Learner:
    """The learner of a peer of this kind: `honest` has its own data, the victim's learner has the last peer's."""
    match kind:
        case "zero":
            return ZeroLearner(honest)
        case "replay":
            return ReplayLearner(honest)
        case "sign_flip":
            return SignFlipLearner(honest)
        case "noise":
            return NoiseLearner(honest)
        case "copycat":
            return make_victim()
        case "skipper":
            return SkipperLearner(honest)
        case None | "liar" | "equivocator" | "two_faced" | "silent" | "withholder" | "late":
            return honest
        case _:
            assert_never(kind)


def make_filter(
    kind: AdversaryKind | None, network: NetworkConfig, shapes: dict[str, tuple[int, ...]], blobs: BlobStore
) -> Honest:
    """What stands between a peer of this kind and its driver."""
    match kind:
        case "liar":
            return Liar()
        case "equivocator":
            return Equivocator(network, shapes, blobs)
        case "two_faced":
            return TwoFaced()
        case "silent":
            return Silent()
        case "withholder":
            return Withholder()
        case "late":
            return LateCommitter()
        case None | "zero" | "replay" | "sign_flip" | "noise" | "copycat" | "skipper":
            return Honest()
        case _:
            assert_never(kind)
