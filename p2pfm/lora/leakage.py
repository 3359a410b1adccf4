"""How much a model tells of its training data: membership inference and canary exposure, from losses alone.

Knows numbers only: no model, adapter or peer. These are the standard attacks and not the strongest known, so what they
find is a lower bound of what leaks; the upper bound is `privacy`'s epsilon.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from p2pfm.errors import OperatorError

Losses = Sequence[float] | NDArray[np.floating]
"""One number a sample: its mean loss [nats/token] under the model that is attacked."""


def compute_membership_auc(member_losses: Losses, nonmember_losses: Losses) -> float:
    """How well a low loss tells members (training samples) from others: .5 is chance, 1 a certain attack.

    The probability that a member has the lower loss of a random pair, ties counting half (Mann-Whitney's U over its
    maximum; the attack is Yeom et al. 2018). Any other score that is low for members will do.

    Raises:
        OperatorError: one side is empty, or a number is not finite.
    """
    members, others = _validated(member_losses, "member losses"), _validated(nonmember_losses, "non-member losses")
    wins = stats.mannwhitneyu(others, members, alternative="greater", method="asymptotic").statistic
    return float(wins / (len(members) * len(others)))


def compute_calibrated_auc(
    member_losses: Losses, nonmember_losses: Losses, member_reference: Losses, nonmember_reference: Losses
) -> float:
    """The stronger attack: each loss minus the same sample's under a model that never saw it (the base, say).

    A sample that is easy for every model no longer looks like a member (Watson et al. 2022, "difficulty calibration").

    Raises:
        OperatorError: as `compute_membership_auc`, or losses without their reference.
    """
    return compute_membership_auc(
        _calibrate(member_losses, member_reference, "member"),
        _calibrate(nonmember_losses, nonmember_reference, "non-member"),
    )


def compute_exposure(canary_loss: float, reference_losses: Losses) -> float:
    """Bits of a canary that the model gives away: log2 |R| - log2 rank (Carlini et al. 2019, The Secret Sharer, 4.2).

    R is the canary and the reference: losses of other secrets of the same form, drawn at random, that were not trained
    on. Ties get the middle rank. An unknown canary has 1 bit in the median, 1.44 in the mean; more than log2 |R| cannot
    be seen.

    Raises:
        OperatorError: no reference, or a number is not finite.
    """
    others = _validated(reference_losses, "reference losses")
    canary = _validated([canary_loss], "the canary's loss")[0]
    rank = 1 + np.count_nonzero(others < canary) + np.count_nonzero(others == canary) / 2
    return float(np.log2(len(others) + 1) - np.log2(rank))


def _calibrate(losses: Losses, reference: Losses, what: str) -> NDArray[np.float64]:
    if len(losses) != len(reference):
        raise OperatorError(f"expected one reference a {what} loss, got {len(reference)} for {len(losses)}")
    return _validated(losses, f"{what} losses") - _validated(reference, f"{what} reference losses")


def _validated(losses: ArrayLike, what: str) -> NDArray[np.float64]:
    numbers = np.asarray(losses, np.float64)
    if numbers.ndim != 1 or not numbers.size:
        raise OperatorError(f"{what}: expected a list of at least one number, got shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise OperatorError(f"{what}: {np.count_nonzero(~np.isfinite(numbers))} of {numbers.size} are not finite")
    return numbers
