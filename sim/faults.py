"""Adversaries: wrappers around an honest Learner, or filters of what an honest Peer hears and does. Knows no world.

kind          what it does                                                                  wraps
------------  ----------------------------------------------------------------------------  --------
zero          announces an update that changes nothing                                      learner
replay        announces the last round's movement of the base again                         learner
noisy_replay  the same in disguise: with noise of a tenth of its size                       learner
sign_flip     announces three times its update, backwards                                   learner
boosted       announces ten times its update                                                learner
noise         announces random values of its update's size                                  learner
gaussian      announces random values ten times its update's size                           learner
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

from p2pfm.learner import Learner, Training
from p2pfm.lora.delta import compute_layout, flatten, get_shapes, subtract, unflatten, zeros
from p2pfm.messages import Announcement, Attestation, Proposal, ScoreCommit, ScoreReveal
from p2pfm.protocol.events import AnyAction, AnyEvent, Publish, Scored, ScoreUpdates, Serve
from p2pfm.types import Array, Digest, PeerId, Round, Tensors, compute_digest
from p2pfm.work import BlobStore
from sim import attacks
from sim.scenarios import AdversaryKind

REPLAY_NOISE = 0.1
"""Noise in a disguised replay, as a share of its norm: no exact repetition any more, and still the same direction."""
BOOST = 10
"""Honest peers that a boosted update outweighs in a plain mean."""
GAUSSIAN_SCALE = 10.0
"""Size of gaussian noise by an honest update's."""


MakeEmpty = Callable[[PeerId], bytes]
"""A well-formed payload of an update that changes nothing, by its maker."""


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
            return msgspec.structs.replace(event, contributions=attacks.lie(event.contributions))
        return event


class Equivocator(Honest):
    """Announces its update to one half of its peers, and an empty one, which it serves too, to the others."""

    def __init__(self, make_empty: MakeEmpty, blobs: BlobStore) -> None:
        self._make_empty = make_empty
        self._digest: Digest | None = None
        self._blobs = blobs

    def act(self, actions: Sequence[AnyAction]) -> list[Deed]:
        """See Honest."""
        deeds: list[Deed] = []
        for action in actions:
            if isinstance(action, Publish) and isinstance(action.message, Announcement):
                empty = self._make_empty(action.message.peer)
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
    """A free rider: its update is how the base moved last time, with `noise` of that share of its norm."""

    def __init__(self, inner: Learner, noise: float = 0.0) -> None:
        super().__init__(inner)
        self._noise = noise
        self._last: Tensors | None = None
        self._moved: Tensors = zeros(self.shapes())

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        if self._last is not None:
            moved = subtract(base, self._last)
            self._moved = moved if any(part.any() for part in moved.values()) else self._moved
        self._last = base
        announced = _change(self._moved, lambda flat: attacks.add_noise(flat, _draw(round), self._noise))
        return Training(announced, 1_000, 0.0)


class DistortingLearner(Wrapped):
    """Trains as others do, and announces something else made of it."""

    def __init__(self, inner: Learner, distort: Callable[[Array, np.random.Generator], Array]) -> None:
        """`distort`: from the honest delta, flat, to the announced one."""
        super().__init__(inner)
        self._distort = distort

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        honest = self.inner.train(base, round, work)
        announced = _change(honest.delta, lambda flat: self._distort(flat, _draw(round)))
        return Training(announced, honest.num_tokens, honest.loss_nats)


class SkipperLearner(Wrapped):
    """Works, but proves nothing."""

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        return self.inner.train(base, round)


def make_learner(kind: AdversaryKind | None, honest: Learner, make_victim: Callable[[], Learner]) -> Learner:
    """The learner of a peer of this kind: `honest` has its own data, the victim's learner has the last peer's."""
    match kind:
        case "zero":
            return ZeroLearner(honest)
        case "replay":
            return ReplayLearner(honest)
        case "noisy_replay":
            return ReplayLearner(honest, REPLAY_NOISE)
        case "sign_flip":
            return DistortingLearner(honest, lambda delta, rng: attacks.flip_sign(delta))
        case "boosted":
            return DistortingLearner(honest, lambda delta, rng: attacks.boost(delta, BOOST, 1))
        case "noise":
            return DistortingLearner(honest, attacks.draw_gaussian)
        case "gaussian":
            return DistortingLearner(honest, lambda delta, rng: attacks.draw_gaussian(delta, rng, GAUSSIAN_SCALE))
        case "copycat":
            return make_victim()
        case "skipper":
            return SkipperLearner(honest)
        case None | "liar" | "equivocator" | "two_faced" | "silent" | "withholder" | "late":
            return honest
        case _:
            assert_never(kind)


def make_filter(kind: AdversaryKind | None, make_empty: MakeEmpty, blobs: BlobStore) -> Honest:
    """What stands between a peer of this kind and its driver."""
    match kind:
        case "liar":
            return Liar()
        case "equivocator":
            return Equivocator(make_empty, blobs)
        case "two_faced":
            return TwoFaced()
        case "silent":
            return Silent()
        case "withholder":
            return Withholder()
        case "late":
            return LateCommitter()
        case None | "zero" | "replay" | "noisy_replay" | "sign_flip" | "boosted" | "noise" | "gaussian":
            return Honest()
        case "copycat" | "skipper":
            return Honest()
        case _:
            assert_never(kind)


def _change(delta: Tensors, change: Callable[[Array], Array]) -> Tensors:
    return unflatten(change(flatten(delta)), compute_layout(get_shapes(delta)))


def _draw(round: Round) -> np.random.Generator:
    return np.random.default_rng([round, 77])
