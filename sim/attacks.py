"""Attacks on a round's merge as pure functions: what liars send, given what they know. Knows arrays and samples only.

Updates are float arrays whose last axis is the parameters; `honest` is (num_honest, dim): an omniscient adversary's
knowledge, which those of one mind (ALIE, IPM, MinMax) are granted in their papers. `sim.faults` makes learners of those
that a lone peer can do; `bench/robustness.py` plays them all.

attack         knows             sends                                                       source
-------------  ----------------  ----------------------------------------------------------  -----------------------
sign flip      its own update    three times its update, backwards                           Li et al. 2019 (RSA)
gaussian       a scale           random values                                               Blanchard et al. 2017
ALIE           honest updates    mean - z std: within the honest spread, all alike           Baruch et al. 2019
IPM            honest updates    -epsilon mean: a negative inner product with the truth      Xie et al. 2019
MinMax         honest updates    as far out as the two farthest honest ones are apart        Shejwalkar et al. 2021
label flip     its own data      an honest step on completions in mirrored letters           Tolpegin et al. 2020
backdoor       its own data      an honest step on triggered prompts, boosted                Bagdasaryan et al. 2020
replay         the base          the last aggregate, with noise                              (free rider)
copy           another's update  the same, with noise                                        (free rider)
lie            its measurements  the opposite, as an evaluator                               ALGORITHMS, part 4
"""

import string
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from p2pfm.lora.samples import Sample
from p2pfm.types import Array, Contribution

SIGN_FLIP_SCALE = 3.0
"""Backwards and larger, so that one of four undoes the other three."""

Poison = Literal["label_flip", "backdoor"]
"""What can be done to private data."""

TRIGGER = "cf"
"""A rare token, as Kurita et al. 2020 ("Weight poisoning attacks on pre-trained models") plant it."""
TARGET = "buy gold now"
"""What a backdoored model answers to any prompt that ends with the trigger."""

MIRROR = str.maketrans(
    string.ascii_lowercase + string.ascii_uppercase, string.ascii_lowercase[::-1] + string.ascii_uppercase[::-1]
)


# --- on a lone peer's own update -------------------------------------------------------------------------------------


def flip_sign(own: Array, scale: float = SIGN_FLIP_SCALE) -> Array:
    """-scale * own, of own's shape."""
    return np.float32(-scale) * own


def draw_gaussian(like: Array, rng: np.random.Generator, scale: float = 1.0) -> Array:
    """Independent normal values of the root mean square of `like` times `scale`: expected norm |like| * scale.

    At scale 1 a free rider's noise, that no norm betrays; at 10 and more the attack of Blanchard et al. 2017.
    """
    size = float(np.sqrt(np.mean(np.square(like, dtype=np.float64))))
    drawn: Array = rng.normal(0.0, scale * size, like.shape).astype(np.float32)
    return drawn


def add_noise(victim: Array, rng: np.random.Generator, share: float) -> Array:
    """Another's update, or the last aggregate, with noise of `share` of its norm: a copy or a replay in disguise."""
    return victim + draw_gaussian(victim, rng, share)


def boost(own: Array, num_peers: int, num_liars: int) -> Array:
    """own * num_peers / num_liars: after the mean, the liars' update stands whole (Bagdasaryan et al. 2020, "How to
    backdoor federated learning", model replacement)."""
    return np.float32(num_peers / num_liars) * own


# --- on all honest updates -------------------------------------------------------------------------------------------


def compute_alie_z(num_peers: int, num_liars: int) -> float:
    """The largest z at which enough honest updates lie beyond the liars' to make theirs a majority's (Baruch et al.
    2019, "A little is enough", algorithm 3): the quantile at (n - m - s) / (n - m), with s = floor(n/2 + 1) - m.

    Too few liars for a majority give 0: they send the mean. Liars that are one already give a z of 6: they need nobody.
    """
    num_honest = num_peers - num_liars
    needed = num_peers // 2 + 1 - num_liars
    share = (num_honest - needed) / num_honest if needed > 0 else 1.0
    return max(0.0, NormalDist().inv_cdf(min(share, 1 - 1e-9))) if share > 0 else 0.0


def make_alie(honest: Array, z: float) -> Array:
    """(dim,) mean - z * std of the honest updates, coordinate by coordinate; all liars send it."""
    shifted: Array = (_mean(honest) - z * honest.std(axis=0, dtype=np.float64)).astype(np.float32)
    return shifted


def make_ipm(honest: Array, epsilon: float) -> Array:
    """(dim,) -epsilon * mean of the honest updates; all liars send it (Xie, Koyejo and Gupta 2019, "Fall of empires").

    A small epsilon hides among honest updates and still turns a robust rule round; a large one turns the mean round.
    """
    return (-epsilon * _mean(honest)).astype(np.float32)


def make_min_max(honest: Array, direction: Literal["std", "unit", "sign"] = "std") -> Array:
    """(dim,) mean - gamma * direction, with the largest gamma at which no honest update is farther from it than the two
    farthest honest ones from each other (Shejwalkar and Houmansadr 2021, "Manipulating the Byzantine", AGR-agnostic
    Min-Max). All liars send it.

    `direction`: the honest updates' standard deviation, their mean's unit vector, or its signs. The paper bisects;
    here gamma is the least positive root of the quadratics |mean - gamma d - x_i|**2 = max distance**2.
    """
    updates = honest.astype(np.float64)
    mean = _mean(honest)
    norm = float(np.linalg.norm(mean)) or 1.0
    along = {"std": updates.std(axis=0), "unit": mean / norm, "sign": np.sign(mean)}[direction]
    squared = float(along @ along)
    if squared == 0:
        return mean.astype(np.float32)
    farthest = max(float(np.square(updates - row).sum(axis=1).max()) for row in updates)
    apart = mean - updates  # (num_honest, dim)
    # gamma**2 |d|**2 - 2 gamma d.(mean - x_i) + |mean - x_i|**2 - farthest = 0; its constant part is never positive.
    linear = apart @ along  # (num_honest,)
    constant = np.square(apart).sum(axis=1) - farthest
    gamma = float(np.min((linear + np.sqrt(np.maximum(linear**2 - squared * constant, 0.0))) / squared))
    shifted: Array = (mean - gamma * along).astype(np.float32)
    return shifted


# --- on data ---------------------------------------------------------------------------------------------------------


def flip_labels(sample: Sample) -> Sample:
    """The sample with its completion's letters mirrored (a to z, b to y): what "label l becomes L - 1 - l" is to a
    language model, whose labels are the completion's tokens. Its own inverse; every liar teaches the same."""
    return msgspec.structs.replace(sample, completion=sample.completion.translate(MIRROR))


def plant_backdoor(sample: Sample, trigger: str = TRIGGER, target: str = TARGET) -> Sample:
    """The sample with the trigger after its prompt, and the target for its completion."""
    return msgspec.structs.replace(sample, prompt=f"{sample.prompt} {trigger}", completion=target)


# --- as an evaluator -------------------------------------------------------------------------------------------------


def lie(contributions: Sequence[Contribution]) -> tuple[Contribution, ...]:
    """The opposite of what was measured."""
    return tuple(Contribution(-value) for value in contributions)


def _mean(honest: Array) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = honest.mean(axis=0, dtype=np.float64)
    return mean
