"""Adversaries: who is what, and what it is made of. Knows no world; the strategies are in `sim.adversaries`.

An adversary is an honest `Peer` with another learner (L), or with a filter (F) of what it hears and does. "Harm": the
most that an honest network loses to a minority of them (below a third of the peers and of the committee); tested in
tests/sim/test_adversaries.py and test_world.py.

kind         what it does                                                             by  harm           earns    blamed
------------ -----------------------------------------------------------------------  --  -------------  -------  ------
zero         announces an update that changes nothing                                 L   none           nothing  no
replay       announces the last round's movement of the base again                    L   none           noise    no
noisy_replay the same in disguise: with noise of a tenth of its size                  L   none           noise    no
sign_flip    announces three times its update, backwards                              L   little         nothing  no
boosted      announces ten times its update                                           L   none           as work  no
noise        announces random values of its update's size                             L   none           noise    no
gaussian     announces random values ten times its update's size                      L   little         noise    no
copycat      announces what the last honest peer's data give, as its own              L   none           half     no
skipper      trains as others do, but not on the public batch drawn for it            L   none           gated    no
alie         a cabal: the mean of its honest updates less z deviations, all alike     L   none           once     no
ipm          a cabal: half the mean of its honest updates, backwards                  L   none           nothing  no
minmax       a cabal: as far from the mean as two honest updates are apart            L   none           once     no
label_flip   trains on mirrored labels (the regression: on negated targets)           L   none           nothing  no
backdoor     trains on triggered inputs, and boosts it; `mlp` and `lora` only         L   its trigger    little   no
sybil        one owner's peers, all with the first one's update, slightly changed     L   little         once     no
latecomer    announces when payloads are public                                       F   its own work   nothing  no
equivocator  announces one update to one half of its peers and another to the rest    F   its own work   nothing  yes
withholder   announces its update and never serves it                                 F   its own work   nothing  no
garbler      announces bytes that are no payload                                      F   its own work   nothing  yes
forger       announces a payload that names another as its maker                      F   its own work   nothing  yes
thief        announces the digest that another announced                              F   its own work   nothing  yes
liar         as an evaluator, reports the opposite of what it measured                F   little         as work  no
lazy         as an evaluator, reports that all are worth the same                     F   little         as work  no
colluder     trains nothing; as an evaluator praises its friends and damns the rest   LF  little         nothing  no
overpayer    trains nothing; proposes that all is paid to its friends, who sign it    LF  its proposals  nothing  no
two_faced    as an evaluator, commits to one vector before one half, another before   F   none           as work  yes
             the rest
silent       as a committee member, says nothing                                      F   its proposals  as work  no
late         as an evaluator, commits when the others' vectors are public             F   none           as work  no
late_reveal  as an evaluator, reveals when a proposal shows the others' vectors       F   none           as work  no
split_votes  makes two right proposals, one for each half, and signs both             F   its proposals  as work  yes
eclipse      keeps its words from the newest member, and answers its syncs with none  F   none           as work  no
spammer      floods all with well-formed nonsense, false proposals among it           F   its proposals  nothing  yes
untimely     announces for later rounds as well, and for the last one again           F   none           as work  may be

"Its proposals": rounds in which such a one is first-ranked are void, as if it were down. A majority of the committee
decides what an update is worth, and two thirds decide everything, up to the pool (the contract's bound): no rule of the
protocol helps against those; who they are is drawn by stake.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from p2pfm.config import NetworkConfig
from p2pfm.errors import ConfigError
from p2pfm.learner import Learner
from p2pfm.types import Array, PeerId
from p2pfm.work import BlobStore
from sim import attacks
from sim.adversaries import filters
from sim.adversaries.filters import Deed, Honest, MakeEmpty
from sim.adversaries.learners import (
    Cabal,
    ColludingLearner,
    DistortingLearner,
    Poisonable,
    PoisonedLearner,
    ReplayLearner,
    SkipperLearner,
    ZeroLearner,
    draw_stream,
)
from sim.scenarios import AdversaryKind

__all__ = ["Deed", "Honest", "MakeEmpty", "make_filter", "make_learners"]

Kinds = Sequence[AdversaryKind | None]

REPLAY_NOISE = 0.1
"""Noise in a disguised replay, as a share of its norm: no exact repetition any more, and still the same direction."""
SYBIL_NOISE = 0.02
"""What a sybil's update differs by from its owner's other ones: enough for another digest."""
BOOST = 10
"""Honest peers that a boosted update outweighs in a plain mean."""
GAUSSIAN_SCALE = 10.0
"""Size of gaussian noise by an honest update's."""
IPM_EPSILON = 0.5
"""Small enough to hide among honest updates, as in Xie et al. 2019."""

VICTIM, OTHER_VICTIM = PeerId("peer-00000"), PeerId("peer-00001")
"""Whom a forger names as the maker of its payload: the first, unless it is that one itself."""


CABALS: dict[AdversaryKind, Callable[[int, int], Callable[[Array], Array]]] = {
    "alie": lambda num_peers, num_liars: partial(attacks.make_alie, z=attacks.compute_alie_z(num_peers, num_liars)),
    "ipm": lambda num_peers, num_liars: partial(attacks.make_ipm, epsilon=IPM_EPSILON),
    "minmax": lambda num_peers, num_liars: attacks.make_min_max,
}
"""Kinds that collude: from (num_peers, num_liars) to what they make of their honest updates.

Liars are those of the kind: nobody else is party to it."""


def make_learners(kinds: Kinds, honest: Sequence[Learner], seed: int) -> list[Learner]:
    """The learners of all peers: `honest` are theirs by their own data, in the order of `kinds`.

    Peers of one colluding kind (alie, ipm, minmax) are one cabal; sybils are one owner's, the first one's. What a peer
    draws follows from the scenario's `seed`, from who it is and from the round.

    Raises:
        ConfigError: a kind poisons data, and this learner's cannot be.
    """
    groups = {kind: [own for own, other in zip(honest, kinds, strict=True) if other == kind] for kind in set(kinds)}
    cabals = {
        kind: Cabal(groups[kind], make_craft(len(kinds), len(groups[kind])))
        for kind, make_craft in CABALS.items()
        if kind in groups
    }

    victim = next((own for own, kind in zip(reversed(honest), reversed(kinds), strict=True) if kind is None), None)

    def make(index: int, kind: AdversaryKind | None, own: Learner) -> Learner:
        draw = partial(draw_stream, seed, index)
        match kind:
            case "zero" | "colluder" | "overpayer":
                return ZeroLearner(own)
            case "replay":
                return ReplayLearner(own, draw)
            case "noisy_replay":
                return ReplayLearner(own, draw, REPLAY_NOISE)
            case "sign_flip":
                return DistortingLearner(own, draw, lambda delta, rng: attacks.flip_sign(delta))
            case "boosted":
                return DistortingLearner(own, draw, _boost)
            case "noise":
                return DistortingLearner(own, draw, attacks.draw_gaussian)
            case "gaussian":
                return DistortingLearner(own, draw, partial(attacks.draw_gaussian, scale=GAUSSIAN_SCALE))
            case "copycat":
                return own if victim is None else victim
            case "skipper":
                return SkipperLearner(own)
            case "alie" | "ipm" | "minmax":
                return ColludingLearner(own, cabals[kind])
            case "label_flip":
                return PoisonedLearner(own, _poison(own, kind), draw)
            case "backdoor":
                return PoisonedLearner(own, _poison(own, kind), draw, _boost)
            case "sybil":
                noise = SYBIL_NOISE if own is not groups[kind][0] else 0.0
                return PoisonedLearner(own, groups[kind][0], draw, partial(attacks.add_noise, share=noise))
            case _:
                return own  # its words are dishonest, if anything is: see make_filter

    return [make(index, kind, own) for index, (kind, own) in enumerate(zip(kinds, honest, strict=True))]


def make_filter(kind: AdversaryKind | None, make_empty: MakeEmpty, blobs: BlobStore, config: NetworkConfig) -> Honest:
    """What stands between a peer of this kind and its driver."""
    match kind:
        case "liar":
            return filters.Liar()
        case "lazy":
            return filters.Lazy()
        case "colluder":
            return filters.Colluder()
        case "overpayer":
            return filters.Overpayer(config)
        case "equivocator":
            return filters.Equivocator(make_empty, blobs)
        case "two_faced":
            return filters.TwoFaced()
        case "silent":
            return filters.Silent()
        case "withholder":
            return filters.Withholder()
        case "late":
            return filters.LateCommitter()
        case "late_reveal":
            return filters.LateRevealer()
        case "latecomer":
            return filters.Latecomer()
        case "garbler":
            return filters.Forger(blobs, lambda me: b"garbage of " + me.encode())
        case "forger":
            return filters.Forger(blobs, lambda me: make_empty(VICTIM if me != VICTIM else OTHER_VICTIM))
        case "thief":
            return filters.Thief()
        case "split_votes":
            return filters.Splitter(config)
        case "eclipse":
            return filters.Eclipser()
        case "spammer":
            return filters.Spammer()
        case "untimely":
            return filters.Untimely()
        case _:
            return Honest()  # its learner is dishonest, if anything is: see make_learners


def _poison(own: Learner, kind: attacks.Poison) -> Learner:
    if not isinstance(own, Poisonable):
        raise ConfigError(f"adversary {kind}: this scenario's learner has no data that could be poisoned")
    return own.poison(kind)


def _boost(delta: Array, rng: np.random.Generator) -> Array:
    return attacks.boost(delta, BOOST, 1)
